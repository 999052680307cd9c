"""What the words, arms and measures of the tables mean, each said once."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from moe_study.columns import Result
from moe_study.configs.arms import ARM_DESCRIPTIONS, CROSSED_ARM_DESCRIPTIONS, ROUTED_ARM_DESCRIPTIONS
from moe_study.data import DATASETS
from moe_study.report.first_screen import GLOSSARY
from moe_study.report.verdicts import in_words

TERMS = GLOSSARY | {
    "points": "percentage points of accuracy",
    "nats": "unit of entropies and cross-entropies, with natural logarithms",
    "M": "scaling matrix of the AC router, a diagonal one for each cluster; M = I: no scaling",
    "exploratory": "not confirmatory: seeds that also chose the epoch that counts",
    **{info.title: info.about for info in DATASETS.values() if info.about},
}
# Of the arms' names, which mean something else in each: the first part of a study's name.
FAMILIES = {
    "SNNL and collapse": (("snnl", "collapse"), ARM_DESCRIPTIONS),
    "AC router": (("ac",), ROUTED_ARM_DESCRIPTIONS),
    "both crossed": (("crossed",), CROSSED_ARM_DESCRIPTIONS),
}
MEASURES = {  # definition, source
    "H(E)": ("entropy of the mean gate", "Shannon"),
    "H(E|x)": ("mean entropy of a sample's gate", "Shannon"),
    "H(E|c)": (
        "entropy of a class's mean gate, averaged by the class's frequency",
        "our reading of ESE, whose formula is not known",
    ),
    "H(C|E)": (
        "entropy of the classes that an expert receives, averaged by its load",
        "the other reading of ESE",
    ),
    "I(x;E), I(c;E)": ("H(E) - H(E|x), H(E) - H(E|c); null: classes permuted", "mutual information"),
    "effective experts": (
        "exp H(E): all of them where the mean gate weighs experts alike, 1 where it uses one alone",
        "perplexity of the mean gate",
    ),
    "dead experts": ("experts that are no sample's first choice", "as usual"),
    "AMI": (
        "mutual information of class and first choice, adjusted for chance",
        "Vinh, Epps and Bailey 2010",
    ),
    "routing collapse": (
        "1 - (exp H(E) - 1) / (E - 1); null: the gate before training",
        "`moe_lib/metrics/collapse.py`",
    ),
    "representational collapse": (
        "mean cosine of two experts' logits, centred over classes and samples; null: experts trained alone "
        "on the same frozen extractor",
        "`moe_lib/metrics/collapse.py`",
    ),
    "functional collapse": (
        "1 - cost of permuted routing as a share of what perfect specialists would lose; null: 1",
        "`moe_lib/metrics/collapse.py`",
    ),
    "cost of permuted routing": (
        "accuracy (text: nats) lost when samples exchange their gates",
        "`moe_lib/metrics/interventions.py`",
    ),
    "|cos| weights": (
        "mean |cosine| of two experts' flattened weights; floor sqrt(2 / (pi P)) for P weights",
        "our reading of PES, whose formula is not known",
    ),
    "|cos| weights, aligned": ("mean cosine after the best matching of hidden units", "Hungarian method"),
    "cos outputs": (
        "representational collapse before it is cut at 0; *trained alone*: its null",
        "`moe_lib/metrics/collapse.py`",
    ),
    "CKA outputs": (
        "unbiased linear centred kernel alignment of two experts' logits",
        "Nguyen, Raghu and Kornblith 2021",
    ),
    "SNNL at T = 1": (
        "soft nearest neighbor loss of the code on test data, whatever the arm was trained with",
        "Frosst, Papernot and Hinton 2019",
    ),
    "kNN accuracy, silhouette, trustworthiness": ("of the code, on test data", "scikit-learn"),
    "calibration error": (
        "mean distance of confidence and accuracy over bins of confidence",
        "Guo et al. 2017",
    ),
    "bits per byte": ("cross-entropy of the next byte with logarithms to base 2", "as usual"),
    "validation area": ("mean validation cross-entropy over epochs", "area under the curve"),
    "lost to corruption": (
        "points: clean accuracy minus corrupted, mean over kinds and five severities",
        "kinds after Hendrycks and Dietterich 2019",
    ),
    "lost to attack": (
        "clean accuracy minus attacked, mean over FGSM and PGD at 1/255 and 2/255; M constant in the "
        "gradient or differentiated, whichever hurts more",
        "Goodfellow et al. 2015; Madry et al. 2018",
    ),
    "lost to swap": (
        "nats a token lost when words become `<unk>`, on the targets of the words left alone",
        "after Nielsen et al. 2025",
    ),
    "changed by M": (
        "share of tokens whose chosen experts differ from those of M = I in the same model",
        "`moe_lib/moe/adaptive.py`",
    ),
    "batch dependence": (
        "cross-entropy of samples predicted alone minus that of the same in a batch with other images",
        "`moe_study/evaluate_transformer.py`",
    ),
    "dependence on other sequences": (
        "the same of text, with other sequences in the batch",
        "`moe_study/evaluate_transformer.py`",
    ),
    "dependence on later tokens": (
        "the same, with tokens that come later in the sequence",
        "`moe_study/evaluate_transformer.py`",
    ),
}


def terms_table(unused: Sequence[str] = ()) -> pd.DataFrame:
    """Words, but for those that are not used."""
    rows = {term: text for term, text in TERMS.items() if term not in unused}
    return pd.DataFrame({"meaning": rows}).rename_axis("term")


def arms_table(results: Sequence[Result]) -> pd.DataFrame:
    """Every arm that has results: its name in sentences, and what it is."""
    ran = {(r["run"]["study"].split("-")[0], r["run"]["arm"]) for r in results}
    rows = [
        {
            "studies": family,
            "arm": arm,
            "in sentences": in_words(arm) if in_words(arm) != arm and family != "both crossed" else "-",
            "what it is": text,
        }
        for family, (studies, descriptions) in FAMILIES.items()
        for arm, text in descriptions.items()
        if any((name, arm) in ran for name in studies)
    ]
    columns = ["studies", "arm", "in sentences", "what it is"]
    return pd.DataFrame(rows, columns=columns).set_index(["studies", "arm"])


def measures_table(names: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """Definition and source of measures: of all, or of those named that are no everyday words."""
    rows = {name: MEASURES[name] for name in MEASURES if name in names}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["definition", "source"])
    return table.rename_axis("measure")
