"""Every number in the committed report and RESULTS.md, computed again from the result files.

One that fails here is most often old: `make render PROFILE=core` and `make readme` write both afresh.

Nothing of the project's tables or statistics is used: files are read as JSON, statistics are numpy's and
scipy's, verdicts those of `test_recompute`. The plan says which files count. A column of a table passes if
one quantity in the files explains all of its cells, whatever it is called; a contrast passes if one quantity
explains difference, interval, p and number of seeds, and the same quantity all rows of that measure.

Shapes: S seeds, P quantities.
"""

import ast
import base64
import functools
import io
import itertools
import json
import math
import re
import runpy
from collections import defaultdict
from pathlib import Path

import nbformat
import numpy as np
import pytest
from bs4 import BeautifulSoup
from PIL import Image
from scipy import stats

from moe_study import study
from moe_study.claims import CLAIMS
from moe_study.configs import dose
from moe_study.data import ROOT
from moe_study.report.plots import DATASET_TITLES

pytestmark = pytest.mark.slow

RECOMPUTE = runpy.run_path(str(Path(__file__).with_name("test_recompute.py")))
PROFILE = "core"
RESULTS = ROOT / "results"
ENDPOINTS = ("last_epoch", "best_accuracy", "best_cross_entropy")
PAGE = RESULTS / PROFILE / "report.html"
NUMBER = r"[+-]?\d+\.\d+"
# What notes of prose may say that no run has measured: levels of tests, versions, identifiers of papers, and
# constants of the authors' code.
DECLARED = {"1.5", "0.3", "0.05", "3.11", "4.0", "2603.26734", "2502.15315", "1902.01889"}


# --------------------------------------------------------------------------------------- result files


def leaves(value, path=""):
    """(path, number) of every number under a JSON value; lists of numbers are left out."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for at, one in enumerate(value):
            yield from leaves(one, f"{path}[{at}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def mean(values):
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else math.nan


def quantities(result):
    """Everything in a result file that a table could show the mean of: its numbers, and what follows from
    its curves, layers, corruptions, attacks, swaps and company."""
    if "task" not in result:  # of a tuning run, which stops at its validation curve
        return {}
    left_out = ("run", "versions", "tsne", "history")
    found = dict(leaves({k: v for k, v in result.items() if k not in left_out}))
    curve = result["history"]["validation"]["cross_entropy"]
    found |= {"curve mean": float(np.mean(curve)), "curve minimum": min(curve)}
    layers = defaultdict(list)
    for path, value in found.items():
        if path.startswith("routing.layers"):
            layers[re.sub(r"\[\d+\]", "", path)].append(value)
    found |= {f"mean {path}": mean(values) for path, values in layers.items()}
    domains = result.get("domains") or {}
    found |= {f"accuracy on domain {at}": one for at, one in enumerate(domains.get("accuracy", []))}
    if "stability" in result["routing"]:
        found["stability"] = mean(result["routing"]["stability"])
    for name in ENDPOINTS:
        for path, value in leaves(RECOMPUTE["held"](result, name).get("task") or {}):
            found[f"{name} {path}"] = value
    if corrupted := dict(result.get("corruption") or {}):
        clean = corrupted.pop("clean")
        found["under corruption"] = float(np.mean(list(corrupted.values())))
        found["corruption"] = clean - found["under corruption"]
    if attacks := result.get("attack"):
        worst = {}
        for name in ("fgsm-1", "fgsm-2", "pgd-1", "pgd-2", "spsa-2"):
            clean = attacks.get(f"{name} clean", {}).get("detached", attacks["clean"])
            lost = {mode: clean - accuracy for mode, accuracy in attacks.get(name, {}).items()}
            found |= {f"attack {name} {mode}": value for mode, value in lost.items()}
            worst[name] = max((v for mode, v in lost.items() if mode != "frozen"), default=math.nan)
            found[f"attack {name}"] = worst[name]
        found["attack"] = float(np.mean([worst[name] for name in ("fgsm-1", "fgsm-2", "pgd-1", "pgd-2")]))
        found["under attack"] = attacks["clean"] - found["attack"]
    if swaps := result.get("swap"):
        lost = {share: swap["swapped"] - swap["clean"] for share, swap in swaps.items()}
        found |= {f"swap {share}": value for share, value in lost.items()}
        found["swap"] = float(np.mean([value for share, value in lost.items() if float(share)]))
        found["under swap"] = RECOMPUTE["swapped"](result)
    if company := result.get("company"):
        for kind, one in {"images": company}.items() if "changed_choice" in company else company.items():
            found[f"leak {kind}"] = one["cross_entropy_alone"] - one["cross_entropy_together"]
    if "expert_parameters" in result:
        found["floor"] = math.sqrt(2 / (math.pi * result["expert_parameters"]))
    initial = result.get("initial", {}).get("routing", {}).get("entropy", {})
    for name, entropy in (("end", result["routing"].get("entropy", {})), ("start", initial)):
        if entropy.get("num_experts", 0) > 1:
            found[f"collapse {name}"] = 1 - (math.exp(entropy["marginal"]) - 1) / (entropy["num_experts"] - 1)
    if result["routing"].get("load", {}).get("share"):
        found["experts in use"] = RECOMPUTE["experts_in_use"](result)
    if "collapse start" in found and "collapse end" in found:
        found["collapse above start"] = found["collapse end"] - found["collapse start"]
    return found


class Group:
    """The results of one study on one data set, arm by arm."""

    def __init__(self, results):
        flat = {(r["run"]["arm"], r["run"]["seed"]): quantities(r) for r in results}
        self.paths = sorted({path for one in flat.values() for path in one})
        self.values = defaultdict(dict)  # arm -> seed -> [P]
        for (arm, seed), one in flat.items():
            self.values[arm][seed] = np.array([one.get(path, np.nan) for path in self.paths])
        self.curves = {
            (r["run"]["arm"], r["run"]["seed"]): r["history"]["validation"]["cross_entropy"] for r in results
        }
        self.results = results

    def of_arm(self, arm):
        return np.array(list(self.values[arm].values()))

    def contrast(self, terms):
        """[S, P] of a weighted sum of arms, over the seeds that all of them have."""
        shared = set.intersection(*(set(self.values[arm]) for arm in terms))
        rows = [
            sum(weight * self.values[arm][seed] for arm, weight in terms.items()) for seed in sorted(shared)
        ]
        return np.array(rows).reshape(len(rows), len(self.paths))


@pytest.fixture(scope="module")
def groups():
    """(study, data set's title) -> Group, of all finished runs that the plan names."""
    found = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MOE_RESULTS_DIR", raising=False)
        for run in study.runs(PROFILE):
            if run.path.exists():
                result = json.loads(run.path.read_text())
                found[run.study, DATASET_TITLES[run.dataset]].append(result)
    if not found:
        pytest.skip(f"no results of profile {PROFILE}: `make report PROFILE={PROFILE}` makes them")
    return {key: Group(results) for key, results in found.items()}


@pytest.fixture(scope="module")
def page():
    if not PAGE.exists():
        pytest.skip(f"{PAGE.relative_to(ROOT)} is not there: `make render PROFILE={PROFILE}` makes it")
    text = PAGE.read_text()
    if "<nav" not in text or "<th>against</th>" not in text:
        pytest.skip(f"the report was rendered by an earlier version: `make render PROFILE={PROFILE}`")
    return BeautifulSoup(text, "html.parser")


def results_page():
    paths = [ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "benchmarks" / "RESULTS.md"]
    if not all(path.exists() for path in paths):
        pytest.skip("no RESULTS.md: `make readme` writes it")
    return "\n".join(path.read_text() for path in paths)


def html_tables(page):
    for table in page.find_all("table"):
        header = [cell.get_text() for cell in table.thead.find_all("th")]
        rows = [
            [cell.get_text() for cell in row.find_all(["td", "th"])] for row in table.tbody.find_all("tr")
        ]
        yield header, rows


def markdown_tables(text):
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.M)
    for block in blocks:
        rows = [
            [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.strip().split("\n")
        ]
        yield rows[0], rows[2:]


# ---------------------------------------------------------------------------------- numbers as shown


def shows(text, values):
    """Where an array is what a text shows, in its own unit or in percent: the text is its rounding."""
    unit = 0.5 * 10.0 ** -len(text.partition(".")[2])  # files hold six digits
    return [np.abs(v - float(text)) <= unit * (1 + 1e-6) + 2e-6 * np.abs(v) for v in (values, 100 * values)]


def moments(values_SP):
    """Number of values, mean and standard deviation of each column, NaN left out."""
    known = np.isfinite(values_SP)
    count = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where(known, values_SP, 0).sum(0) / count
        squares = np.where(known, values_SP - centre, 0) ** 2
        return count, centre, np.sqrt(squares.sum(0) / (count - 1))


def half_width(count, sd, confidence=0.95):
    with np.errstate(invalid="ignore", divide="ignore"):
        return stats.t.ppf((1 + confidence) / 2, count - 1) * sd / np.sqrt(count)


def terms_of(contrast):
    """Arms and their weights in a contrast as it is written: "a - b", "a", or two in brackets."""
    weights = defaultdict(float)
    pairs = re.findall(r"\(([\w-]+) - ([\w-]+)\)", contrast)
    share = 0.5 if "mean of" in contrast else 1.0
    if not pairs:
        pairs = [[*contrast.split(" - "), ""][:2]]
    for at, (treatment, control) in enumerate(pairs):
        sign = 1.0 if at == 0 or "mean of" in contrast else -1.0
        weights[treatment] += sign * share
        if control:
            weights[control] -= sign * share
    return {arm: weight for arm, weight in weights.items() if weight}


def explained(group, terms, difference, interval, seeds=None, p=None, confidence=0.95):
    """Paths whose contrast is as shown."""
    if not set(terms) <= set(group.values):
        return set()
    values_SP = group.contrast(terms)
    if len(values_SP) < 2:
        return set()
    count, centre, sd = moments(values_SP)
    half = half_width(count, sd, confidence)
    ends = [centre - half, centre + half]
    fit = np.zeros(len(group.paths), dtype=bool)
    for scale in (0, 1):
        one = np.ones_like(fit)
        for text, values in zip(
            ([difference] if difference else []) + interval,
            ([centre] if difference else []) + ends,
            strict=True,
        ):
            one &= shows(text, values)[scale]
        fit |= one
    if seeds is not None:
        fit &= count == seeds
    found = set()
    for at in np.flatnonzero(fit):
        if p is not None:
            exact = RECOMPUTE["sign_flip"](values_SP[np.isfinite(values_SP[:, at]), at])
            if not (exact < 1e-4 if p.startswith("<") else abs(exact - float(p)) <= 0.51e-4):
                continue
        found.add(group.paths[at])
    return found


# ------------------------------------------------------------------------------------------ the tables

# Studies of one data set are told apart by their models.
SPECIAL = {"collapse-top1": " (top-1)", "collapse-wide": " (16 experts)"}
SPECIAL["ac-language-everywhere"] = ", every mixture"
MODELS = {"snnl": " (CNN)", "ac-vision": " (ViT)"}
SHARED = ("FashionMNIST", "CIFAR-10", "CIFAR-100")
COLLAPSES = ("collapse", "collapse-top1", "collapse-wide")


def titled(study_name, title):
    first = study_name.split(", ")[0].removesuffix("-confirm").removesuffix("-trained")
    return title + SPECIAL.get(first, MODELS.get(first, "") if title in SHARED else "")


def candidates(groups, header, row):
    """Groups that a row can be of."""
    title = row.get("data set")
    for special in (*SPECIAL.values(), *MODELS.values()):
        title = title and title.removesuffix(special)
    studies = {row["study"]} if "study" in header else {name for name, _ in groups}
    return [key for key in groups if key[0] in studies and title in (None, key[1])]


def check_contrasts(groups, header, rows):
    """Rows of difference, interval, p and seeds: one study and one quantity a measure."""
    fits = {}
    for row in rows:
        if row["difference"] == "-":  # no seed has both arms yet
            assert row["verdict"] == "pilot", row
            continue
        measure, _, contrast = row.get("contrast", "snnl - base").rpartition(": ")
        if "measure" in row:
            measure, contrast = row["measure"].split(" (")[0], row.get("contrast", "snnl - base")
        interval = re.findall(NUMBER, row["95 % interval"])
        difference = re.search(NUMBER, row["difference"])[0]
        seeds = int(row["seeds"].split()[0])
        assert ("pilot" in row["seeds"]) == (seeds < 8), row
        now = set()
        for key in candidates(groups, header, row):
            paths = explained(groups[key], terms_of(contrast), difference, interval, seeds, row.get("p"))
            first = key[0].removesuffix("-confirm").removesuffix("-trained")
            # The confirmation alone has that data set, or stands beside data sets of the first study.
            alone = (first, key[1]) not in groups or key[0].endswith("-trained")
            name = first if alone else key[0]
            now |= {(name, "" if "data set" in row else key[1], path) for path in paths}
        if "paper" in row:  # the table of all papers: a measure may be of several studies
            measure = f"{row['paper']}: {measure}, {row['data set']}"
        fits[measure] = fits.get(measure, now) & now
        assert fits[measure], f"no quantity in the result files is {row}"
        if "reading" in row:
            low, high = map(float, interval)
            inside = low <= 0 <= high
            if 0.0 in (low, high):  # rounded to zero, from which side is not to be seen
                continue
            assert (row["reading"] == "interval includes 0") == inside, row


@functools.cache
def recomputed():
    """Rows of every study; claims and data sets as the tables write them."""
    wording = {claim.key: claim.wording for claim in CLAIMS}
    rows = [row for name in RECOMPUTE["STUDIES"] for row in RECOMPUTE["recompute"](name)]
    treatment = {one["key"]: one["treatment"] for own in RECOMPUTE["CLAIMS"].values() for one in own}
    return [
        row
        | {
            "title": titled(row["claim"].rpartition("-")[0], DATASET_TITLES[row["dataset"]]),
            "wording": wording[row["claim"]],
            "contrast": f"{treatment[row['claim']]} - {row['control']}",
        }
        for row in rows
    ]


def units_of(row):
    return [one for one in recomputed() if (one["title"], one["wording"]) == (row["data set"], row["claim"])]


def check_verdicts(groups, header, rows):
    """The table of verdicts: word, difference, interval, p and seeds of some study's unit."""
    for row in rows:
        low, high = re.findall(NUMBER, row["95 % interval"]) if row["95 % interval"] != "-" else ("", "")
        word = re.split("[,;] | †", row["verdict"])[0]
        assert any(
            one["control"] == row["against"].split(":")[0]
            and row["verdict"].endswith(" †") == (one["endpoint"] != "last_epoch")
            and one["word"] == word
            and ("depends on the checkpoint" in row["verdict"]) == (len(set(one["elsewhere"].values())) > 1)
            and row["seeds"].split(" ")[0] == str(one["seeds"])
            and (row["p (Holm)"] == "-") == math.isnan(one["holm"])
            and (row["p (Holm)"][0] in "-<" or abs(float(row["p (Holm)"]) - one["holm"]) <= 0.51e-4)
            and (row["p"][0] in "-<" or abs(float(row["p"]) - one["p"]) <= 0.51e-4)
            and any(
                all(
                    shows(text, np.array(value))[scale]
                    for text, value in (
                        (re.search(NUMBER, row["difference"])[0], one["difference"]),
                        (low, one["interval"][0]),
                        (high, one["interval"][1]),
                    )
                )
                for scale in (0, 1)
            )
            for one in units_of(row)
        ), row


MARKS = {
    "✓": "supported",
    "✗": "contradicted",
    "<": "smaller than claimed",
    "?": "undecided",
    "·": "not testable here",
    "○": "pilot",
}
UNIT = re.compile(rf"([{''.join(MARKS)}]) ({NUMBER}) \[({NUMBER}), ({NUMBER})\]")


def check_first_screen(header, rows):
    """Data set x claim: each cell's word, difference and interval are those of some unit."""
    seen = 0
    for title, *cells in rows:
        for label, cell in zip(header[1:], cells, strict=True):
            for mark, *numbers in UNIT.findall(cell):
                seen += 1
                assert any(
                    (one["title"], one["word"]) == (title, MARKS[mark])
                    and one["wording"] in label
                    and any(
                        all(
                            shows(text, np.array(value))[scale]
                            for text, value in zip(
                                numbers, (one["difference"], *one["interval"]), strict=True
                            )
                        )
                        for scale in (0, 1)
                    )
                    for one in recomputed()
                ), (label, title, cell)
    assert seen >= 10


def check_firmness(groups, header, rows):
    """What each verdict hangs on: the words at other margins and endpoints, and the seeds it would take."""
    for row in rows:
        row = {name: row["verdict"] if cell == "=" else cell for name, cell in row.items()}
        elsewhere = {name: row[name.replace("_", " ")] for name in ENDPOINTS}
        assert any(
            one["contrast"] == row["contrast"]
            and [one["half"], one["word"], one["twice"]]
            == [
                row[name].removesuffix(", but smaller than that")
                for name in ("at half the margin", "verdict", "at twice the margin")
            ]
            and elsewhere == {name: one["elsewhere"].get(name, "-") for name in ENDPOINTS}
            and row["seeds to find the difference that counts (80 % power, uncorrected)"]
            == str(one["needed"] or "-")
            and all(
                any(shows(text, np.array(end))[0] | shows(text, np.array(end))[1] for end in one["images"])
                for text in re.findall(NUMBER, row["interval over seeds and images"])[1:]
            )
            for one in units_of(row)
        ), row


def check_reasons(groups, header, rows):
    """Every "contrast difference [low, high]" in the sentences is some quantity's."""
    for row in rows:
        keys = candidates(groups, header, row)
        for contrast, *numbers in TRIPLE.findall(f"{row['reason']} {row['attribution']}"):
            terms = terms_of(contrast)
            assert any(explained(groups[key], terms, numbers[0], numbers[1:]) for key in keys), row


def check_rates(groups, header, rows):
    """Shares in % of the simulated studies, means over data sets."""
    wording = {claim.wording: claim.key for claim in CLAIMS if claim.key.startswith("snnl-")}
    found = json.loads((RESULTS / "planted" / "verdicts.json").read_text())["rates"]
    for row in rows:
        effect = 0.0 if row["true effect"] == "none" else float(row["true effect"].split(" ")[0])
        own = [
            one["words"]
            for one in found
            if (one["claim"], one["seeds"], one["effect"])
            == (wording[row["claim"]], int(row["seeds"]), effect)
        ]
        for word in ("supported", "smaller than claimed", "undecided", "contradicted"):
            assert float(row[word]) == pytest.approx(100 * np.mean([one[word] for one in own]), abs=0.051)


CELL = re.compile(r"(-?\d+\.\d+)(?: ± (\d+\.\d+))?(?: \((\d+)\))?")


def column_fits(group, cells):
    """Paths that explain every (arm, cell) of a column."""
    fit = np.ones(len(group.paths), dtype=bool)
    for arm, text in cells:
        centre_text, sd_text, number = CELL.fullmatch(text).groups()
        if arm not in group.values:
            return set()
        values_SP = group.of_arm(arm)
        if number is not None and int(number) != len(values_SP):
            return set()
        count, centre, sd = moments(values_SP)
        one = np.zeros_like(fit)
        for scale in (0, 1):
            now = shows(centre_text, centre)[scale]
            if sd_text is not None:
                one |= now & shows(sd_text, sd)[scale] & (count > 1)
            else:  # of one seed, the same in all of them, or the largest
                largest = np.where(np.isfinite(values_SP), values_SP, -np.inf).max(0)
                one |= (now & ((count == 1) | (sd < 1e-12))) | shows(centre_text, largest)[scale]
        fit &= one
    return {path for path, good in zip(group.paths, fit, strict=True) if good}


def confirmed(groups):
    """(both studies, title) -> the group of the confirmation where that is whole, else the study's."""

    def whole(group):
        run = group.results[0]["run"]
        return len(group.results) == len(study.runs(run["profile"], run["study"], run["dataset"]))

    found = {}
    for name, title in groups:
        first = name.removesuffix("-confirm").removesuffix("-trained")
        later = [groups.get((f"{first}-{kind}", title)) for kind in ("confirm", "trained")]
        own = [group for group in later if group and whole(group)] + [groups.get((first, title))]
        own = [group for group in own if group]
        if own:
            found[f"{first}, {first}-confirm", title] = own[0]
    return found


def with_collapse(groups):
    """(one name, title) -> the groups of the SNNL and the collapse studies, which one table shows."""
    found = {}
    for (name, title), group in groups.items():
        if name in ("snnl, snnl-confirm", *COLLAPSES):
            found["snnl and collapse", titled(name, title)] = group
    return found


def check_levels(groups, header, rows):
    """mean ± sd, arm by arm: in one study (or its confirmation where whole), one quantity a column (and
    layer, attack, kind of experts)."""
    groups = {**groups, **confirmed(groups)}
    groups |= with_collapse(groups)
    groups |= {(n, titled(n, title)): group for (n, title), group in groups.items()}
    parts = [name for name in ("experts", "MoE layer", "attack", "without") if name in header]
    known = {title for _, title in groups}
    titles = [name for name in header if name in known]
    others = [name for name in header if name not in ("arm", "seeds", "data set", *parts, *titles)]
    studies = sorted({name for name, _ in groups if not name.endswith("-tuning")})
    for name in studies:
        datasets = {title for own, title in groups if own == name}
        shown = {row["data set"] for row in rows if "data set" in row}
        for title in [None] if shown or titles else sorted(datasets):
            if not (shown | set(titles)) <= datasets:
                continue
            columns = [*others, *titles]
            if all(levels_fit(groups, name, title, rows, column, parts) for column in columns) and all(
                int(row["seeds"]) == len(groups[name, row.get("data set", title)].values[row["arm"]])
                for row in rows
                if "seeds" in row
            ):
                return
    raise AssertionError(f"no study explains the table {header}, {rows[0]}")


def levels_fit(groups, name, title, rows, column, parts):
    by_part = defaultdict(list)
    for row in rows:
        if row[column] != "-":
            by_part[tuple(row[part] for part in parts)].append(row)
    for own in by_part.values():
        common = None
        for dataset in {row.get("data set", title or column) for row in own}:
            group = groups[name, dataset]
            cells = [
                (row["arm"], row[column]) for row in own if row.get("data set", title or column) == dataset
            ]
            if column.startswith("epochs to best of "):
                if not all(epochs_fit(group, arm, text, column.split()[-1]) for arm, text in cells):
                    return False
                continue
            paths = column_fits(group, cells)
            common = paths if common is None else common & paths
        if common is not None and not common:
            return False
    return True


def epochs_fit(group, arm, text, control):
    """Median over seeds of the first epoch as good as the control's best, and how many got there."""
    steps = []
    for (name, seed), curve in group.curves.items():
        if name == arm and (control, seed) in group.curves:
            best = min(group.curves[control, seed])
            steps.append(next((e + 1 for e, v in enumerate(curve) if v <= best), math.inf))
    median, reached = np.median(steps), sum(map(math.isfinite, steps))
    shown = f"{median:g}" if math.isfinite(median) else f"> {len(curve)}"
    return text == f"{shown} ({reached} of {len(steps)})"


HEADINGS = {  # of tables with a row a setting: the arms that may stand there
    "MoE": "base", "MoE + SNNL": "snnl", "no learned gate": "uniform-gate hash-gate",
    "no learned gate + SNNL": "uniform-snnl hash-snnl", "dense": "dense", "dense + SNNL": "dense-snnl",
    "linear router": "linear", "cosine router": "cosine", "AC router": "ac",
    "experts fixed by position": "hash", "experts fixed by byte": "hash-token",
}  # fmt: skip


def check_settings(groups, header, rows):
    """Means of arms at the last epoch, the paired gain, and the effective experts of both."""
    routed = "linear router" in header
    first = "linear" if routed else "base"
    own = {**groups, **confirmed(groups)}
    for row in rows:
        title = row["setting"].removesuffix(" (exploratory)").removesuffix(" (nats ↓)")
        group = next(
            group
            for (name, dataset), group in own.items()
            if first in group.values
            and not name.endswith(("-tuning", "-map", "crossed"))
            and titled(name, dataset) == title
            and (
                "snnl, " in name
                or ("ac-" in name and "," in name)
                or name in ("ac-language-everywhere", *COLLAPSES)
            )
        )
        path = "last_epoch cross_entropy" if "nats" in row["setting"] else "last_epoch accuracy"
        at = group.paths.index(path)
        for heading in header:
            if row[heading] != "-" and heading in HEADINGS:
                (arm,) = set(HEADINGS[heading].split()) & set(group.values)
                value = np.nanmean(group.of_arm(arm)[:, at])
                assert shows(row[heading], np.array(value))["nats" not in row["setting"]], (row, heading)
        if row["gain [95 %]"] != "-":
            difference, *interval = re.findall(NUMBER, row["gain [95 %]"])
            treatment = "ac" if routed else "snnl"
            fits = explained(group, {treatment: 1, first: -1}, difference, interval)
            assert path in fits, row
        if (used := row.get("effective experts, without → with", "-")) != "-":
            shown = re.findall(r"\d+\.\d", used)
            path = (
                "mean routing.layers.load.effective_experts" if routed else "routing.load.effective_experts"
            )
            for text, arm in zip(shown, (first, "ac" if routed else "snnl"), strict=True):
                value = np.nanmean(group.of_arm(arm)[:, group.paths.index(path)])
                assert shows(text, np.array(value))[0], row


def check_widths(groups, header, rows):
    """Of the map: means over sizes of medians over seeds, and how many of these lie below 0."""
    (group,) = [group for (name, _), group in groups.items() if name == "collapse-map"]
    accuracy = defaultdict(dict)
    for r in group.results:
        model = r["run"]["model"]
        size = model["expert_hidden"], model["num_experts"], model["code_dim"]
        accuracy[size][r["run"]["arm"], r["run"]["seed"]] = 100 * r["task"]["accuracy"]
    seeds = {r["run"]["seed"] for r in group.results}
    for row in rows:
        for heading in header[1:]:
            a, b = heading.removesuffix(", points").split(" - ")
            medians = [
                np.median([cell[a, seed] - cell[b, seed] for seed in seeds])
                for (width, *_), cell in accuracy.items()
                if width == int(row["expert width"])
            ]
            mean, lower, number = re.fullmatch(rf"({NUMBER}) \((\d+) of (\d+)\)", row[heading]).groups()
            assert float(mean) == pytest.approx(np.mean(medians), abs=0.0051)
            assert (int(lower), int(number)) == (sum(m < 0 for m in medians), len(medians))


def check_published(groups, header, rows):
    known = {
        (DATASET_TITLES[dataset]): published.difference * 100
        for claim in CLAIMS
        if claim.study == "snnl"
        for dataset, published in claim.published.items()
    }
    for row in rows:
        group = groups[row["study"], row["data set"]]
        at = group.paths.index("last_epoch accuracy")
        shared = [seed for seed in group.values["base"] if seed in group.values["snnl"]]
        for arm in ("base", "snnl"):
            value = 100 * np.mean([group.values[arm][seed][at] for seed in shared])
            assert shows(row[f"our {arm}"], np.array(value))[0], row
        interval = re.findall(NUMBER, row["95 % interval"])
        fits = explained(group, {"snnl": 1, "base": -1}, row["our gain"], interval, int(row["seeds"]))
        assert "last_epoch accuracy" in fits, row
        published = float(row["published MoE + SNNL"]) - float(row["published MoE"])
        assert float(row["published gain"]) == pytest.approx(published)
        assert published == pytest.approx(known[row["data set"]])


def check_tuning(groups, header, rows):
    tried = defaultdict(list)
    for (name, _), group in groups.items():
        for result in group.results if name.endswith("-tuning") else ():
            # Not the whole run: older files lack the options that came later, with their defaults.
            run = {key: result["run"][key] for key in ("study", "dataset", "arm", "train_images")}
            run["train"] = {key: result["run"]["train"][key] for key in ("epochs", "learning_rate")}
            weights = result["run"]["objective"]
            run["objective"] = {key: weights.get(key) for key in ("snnl", "balance", "auxiliary")}
            run["objective"]["snnl"] = (weights.get("snnl") or {}).get("factor")
            history = result["history"]
            ends = history["best_cross_entropy"], history["validation"]["cross_entropy"][-1]
            tried[json.dumps(run, sort_keys=True)].append(ends)
    settings = [(json.loads(run), values) for run, values in tried.items()]
    assert len(rows) == len(settings)
    for row in rows:
        assert any(
            run["study"] == f"{row['study']}-tuning"
            and (run["arm"], DATASET_TITLES[run["dataset"]]) == (row["arm"], row["data set"])
            and str(run["train_images"] or "all") == row["training images"]
            and run["train"]["epochs"] == int(row["epochs"])
            and run["train"]["learning_rate"] == pytest.approx(float(row["learning rate"]))
            and len(values) == int(row["seeds"])
            and np.mean(values, axis=0)
            == pytest.approx(
                [float(row["validation cross-entropy"]), float(row["at the last epoch"])], abs=6e-5
            )
            and float(row["weight of the extra loss"]) in {0, *(v for _, v in leaves(run["objective"]))}
            for run, values in settings
        ), row


def minutes(results):
    return sum(r["wall_seconds"] for r in results if r["device"] == "cpu" and "same_as" not in r) / 60


def check_provenance(groups, header, rows):
    shown = dict(rows)
    results = [result for group in groups.values() for result in group.results]
    assert shown["runs finished / planned"].split(" / ")[0] == f"{len(results)}"
    time, *others = shown["time"].split("; ")
    assert time == f"{minutes(results):.0f} core-minutes"
    devices = [r["device"] for r in results if "same_as" not in r]
    assert others == [f"{devices.count(one)} runs on {one}" for one in sorted({*devices} - {"cpu"})]
    assert shown["longest run"] == f"{max(r['wall_seconds'] for r in results):.0f} s"
    memory = [r["peak_memory_mb"] for r in results if r["device"] == "cpu"]
    assert shown["highest memory of a run on a CPU"] == f"{max(memory):.0f} MB"
    assert set(shown["versions"].split(", ")) == {
        f"{k} {v}" for r in results for k, v in r["versions"].items()
    }
    assert set(shown["commits"].split(", ")) == {(r["commit"] or "unknown")[:10] for r in results}
    for part in shown["... by study"].split(", "):
        name, time = part.rsplit(" ", 1)
        own = [
            result
            for (study_name, _), group in groups.items()
            if study_name == name
            for result in group.results
        ]
        assert time == f"{minutes(own):.0f}"


def check_budgets(groups, header, rows):
    assert len(rows) == len(groups)
    for row in rows:
        results = groups[row["study"], row["data set"]].results
        assert int(row["runs"]) == len(results)
        assert int(row["arms"]) == len({r["run"]["arm"] for r in results})
        for name in ("epochs", "batch_size", "learning_rate"):
            column = {"batch_size": "batch", "learning_rate": "learning rates"}.get(name, name)
            expected = sorted({r["run"]["train"][name] for r in results})
            assert [float(v) for v in row[column].split(", ")] == pytest.approx(expected), row
        sizes = np.array([r["num_parameters"] for r in results if "num_parameters" in r]) / 1e6
        ends = row["weights (millions)"].split(", ")
        assert shows(ends[0], sizes.min())[0]
        assert shows(ends[-1], sizes.max())[0]
        for column, name in (("training images", "train_images"), ("tokens an epoch", "epoch_tokens")):
            if row[column] != "-":
                known = {str(r["run"].get(name) or "all") for r in results}
                assert set(row[column].split(", ")) == known, row


TERM = r"(?:\([\w-]+ - [\w-]+\)|[\w-]+)"
TRIPLE = re.compile(rf"((?:{TERM} - {TERM})) ({NUMBER}) \[({NUMBER}), ({NUMBER})\]")


GRID = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\] \((\d+)\)")


@functools.cache
def all_pairs(group):
    """(terms) of every two arms of a dose-response study."""
    return [{a: 1, b: -1} for a, b in itertools.permutations(group.values, 2)]


def check_grid(groups, header, rows):
    """Doses against controls, whose arms are not named: one quantity, and some two arms a cell."""
    cells = [GRID.fullmatch(cell).groups() for row in rows for cell in row.values() if GRID.fullmatch(cell)]
    for (name, _), group in groups.items():
        common = set(group.paths) if name in dose.PLANS else set()
        for difference, low, high, seeds in cells if common else ():
            common &= set().union(
                *(explained(group, terms, difference, [low, high], int(seeds)) for terms in all_pairs(group))
            )
        if common:
            return
    raise AssertionError(f"no dose-response study explains {header}, {rows[0]}")


def check_slopes(groups, header, rows):
    """Slopes on log10 of the factor, over arms that differ in it alone."""
    families = defaultdict(dict)
    for (name, dataset), group in groups.items():
        for result in group.results if name in dose.PLANS else ():
            run = {k: v for k, v in result["run"].items() if k not in ("seed", "arm", "objective")}
            objective = json.loads(json.dumps(result["run"]["objective"]))
            if objective.get("snnl"):
                factor = objective["snnl"].pop("factor")
                key = name, dataset, json.dumps([run, objective], sort_keys=True)
                families[key][factor] = result["run"]["arm"]
    for row in rows:
        interval = re.findall(NUMBER, row["95 % interval"])
        found = False
        for (name, dataset, _), family in families.items():
            for size in range(2, len(family) + 1):
                for chosen in itertools.combinations(sorted(family), size):
                    x = np.log10(chosen) - np.mean(np.log10(chosen))
                    terms = {family[f]: w for f, w in zip(chosen, x / (x**2).sum(), strict=True)}
                    seeds = int(row["seeds"].split()[0])
                    group = groups[name, dataset]
                    found |= bool(explained(group, terms, row["slope"], interval, seeds, row["p"]))
        assert found, row


def check_text(groups, header, rows):
    """A table of words has no numbers to trace."""
    for row in rows:
        for name, cell in row.items():
            found = {one[0] for one in re.finditer(rf"(?<![\w.]){NUMBER}", cell)} - DECLARED
            assert not found, f"{name}: {cell}"


def check_inspector(header, rows):
    """What each tool said, word by word; what it costs, as rounded."""
    tools = json.loads((RESULTS / "bench" / "inspect.json").read_text())["tools"]
    for first, *cells in rows:
        if header[0] == "planted":
            assert cells == [tools[name]["sees"][first] for name in header[1:]]
        else:
            known = np.array([value for _, value in leaves(tools[first])])
            for number in re.findall(r"[+-][\d.]+", " ".join(cells)):
                assert np.isclose(float(number), known, atol=0.51).any(), f"{number} of {first}"


POWER = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]")


def check_scaling(header, rows):
    """Each exponent and interval, fitted again to the rows that differ in one size alone."""
    measured = json.loads((RESULTS / "bench" / "scaling.json").read_text())["rows"]
    seen = 0
    for name, grows, *cells in rows:
        own = [row for row in measured if row["row"].startswith(f"{name} ")]
        varied = [size for size, cell in zip(header[2:], cells, strict=True) if cell != "-"]
        for size, cell in zip(header[2:], cells, strict=True):
            if cell == "-":
                continue
            line = [row for row in own if all(row[o] == own[0][o] for o in varied if o != size)]
            column = {"time": "milliseconds", "memory": "memory_mb"}[grows]
            x = np.log([row[size] for row in line])
            y = np.log([row["contestants"]["ours"][column] for row in line])
            slope, constant = np.polyfit(x, y, 1)
            error = ((y - slope * x - constant) ** 2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum()
            margin = stats.t.ppf(0.975, len(x) - 2) * math.sqrt(error)
            expected = slope, slope - margin, slope + margin
            for number, value in zip(POWER.fullmatch(cell).groups(), expected, strict=True):
                assert float(number) == pytest.approx(value, abs=0.0051), f"{size}: {cell} of {name}, {grows}"
            seen += 1
    assert seen > 12


def check_throughput(section):
    measured = json.loads((RESULTS / "bench" / "scaling.json").read_text())["throughput"]
    shown = re.findall(
        r"(\d+) processes do ([\d.]+) times as much \(quartiles ([\d.]+) to ([\d.]+)\)", section
    )
    expected = {
        row["processes"]: [row["times_one"][key] for key in ("median", "low", "high")] for row in measured
    }
    assert {int(count) for count, *_ in shown} == set(expected) - {1}
    for count, *numbers in shown:
        assert [float(n) for n in numbers] == pytest.approx(expected[int(count)], abs=0.0051)


CHECKS = {  # a column that only such tables have, the most telling first
    "setting": check_settings,
    "expert width": check_widths,
    "published gain": check_published,
    "against": check_verdicts,
    "at half the margin": check_firmness,
    "reason": check_reasons,
    "true effect": check_rates,
    "slope": check_slopes,
    "difference": check_contrasts,
    "validation cross-entropy": check_tuning,
}


def check(groups, header, rows):
    if any(UNIT.search(cell) for row in rows for cell in row):
        check_first_screen(header, rows)
        return
    named = [dict(zip(header, row, strict=True)) for row in rows]
    columns = set(header)
    if {"setting", "difference"} <= columns:
        for setting in dict.fromkeys(row["setting"] for row in named):
            own = [{"data set": setting} | row for row in named if row["setting"] == setting]
            check_contrasts(groups, header, own)
    elif marks := [column for column in CHECKS if column in columns]:
        CHECKS[marks[0]](groups, header, named)
    elif header == ["what", "value"]:
        check_provenance(groups, header, rows)
    elif {"study", "runs"} <= columns:
        check_budgets(groups, header, named)
    elif any(GRID.fullmatch(cell) for row in rows for cell in row):
        check_grid(groups, header, named)
    elif "arm" in columns and any(CELL.fullmatch(cell) for row in rows for cell in row):
        floor = [row for row in named if row.get("experts", "").startswith("floor")]
        check_levels(groups, header, [row for row in named if row not in floor])
        for row in floor:
            number = row["|cos| weights"]
            floors = {
                value
                for group in groups.values()
                for r in group.results
                for value in [quantities(r).get("floor")]
                if value
            }
            assert shows(number, np.array(sorted(floors)))[0].any(), row
    else:
        check_text(groups, header, named)


@pytest.mark.slow
def test_every_table_of_the_report(groups, page):
    tables = list(html_tables(page))
    assert len(tables) > 20
    for header, rows in tables:
        check(groups, header, rows)


@pytest.mark.slow
def test_every_table_of_the_results_page(groups):
    text = results_page()
    tables = list(markdown_tables(text))
    assert len(tables) > 8
    for header, rows in tables:
        if {"data set", "arm", "measure", "contrast", "setting", "expert width"} & set(header):
            check(groups, header, rows)
        elif header[0] == "term":
            check_text(groups, header, [dict(zip(header, row, strict=True)) for row in rows])
        elif header[:2] == ["step of", "grows"]:
            check_scaling(header, rows)
        elif header[0] in ("planted", "tool"):
            check_inspector(header, rows)
    check_throughput(text)
    finished, planned, time = re.search(
        r"(\d+) of (\d+) planned runs finished, tuning included.*?, (\d+) core-minutes", text
    ).groups()
    results = [r for group in groups.values() for r in group.results]
    assert (finished, time) == (f"{len(results)}", f"{minutes(results):.0f}")
    assert int(planned) >= int(finished)


@pytest.mark.slow
def test_a_number_that_no_file_holds_is_noticed(groups):
    """The checks above, on tables with one digit changed."""
    caught = total = 0
    for header, rows in markdown_tables(results_page()):
        if not {"data set", "arm"} & set(header):
            continue
        for row in rows[:3]:
            for at, cell in enumerate(row):
                # With one decimal, the cells of only two arms are some other quantity's by chance.
                level = CELL.fullmatch(cell) and "±" in cell
                level = level and (len(rows) > 2 or re.search(r"\.\d\d", cell))
                if header[at] in ("difference", "our gain") or level:
                    digit = re.search(r"\d(?!.*\d)", cell.split(" ")[0])
                    changed = f"{(int(digit[0]) + 3) % 10}"
                    wrong = cell[: digit.start()] + changed + cell[digit.end() :]
                    others = [one for one in rows if one is not row]
                    total += 1
                    try:
                        check(groups, header, [[*row[:at], wrong, *row[at + 1 :]], *others])
                    except AssertionError:
                        caught += 1
    assert total > 20
    assert caught == total


# ------------------------------------------------------------------------------------ figures and prose


def test_every_figure_names_files_that_are_there(page):
    """The picture's own "Source", and the line below it, against the files."""
    figures = page.find_all("figure")
    assert len(figures) == len(page.find_all("img")) > 5
    for figure in figures:
        with Image.open(io.BytesIO(base64.b64decode(figure.img["src"].split(",", 1)[1]))) as picture:
            source = picture.text["Source"]
        caption = figure.figcaption.get_text()
        assert f"from {source}" in caption
        assert "python -m moe_study" in caption
        pattern, number = re.fullmatch(r"results/(.*?)(?: \((\d+) files\))?", source).groups()
        arms = re.search(r"\{(.*)\}", pattern)
        patterns = [pattern.replace(arms[0], arm) for arm in arms[1].split(",")] if arms else [pattern]
        matches = [list(RESULTS.glob(one)) for one in patterns]
        assert all(matches), source
        assert sum(map(len, matches)) >= int(number or 1), source


def test_prose_states_no_results():
    """Numbers with a decimal point stand in tables and figures, which commands make."""
    report = nbformat.read(ROOT / "notebooks" / "90_report.ipynb", as_version=4)
    texts = [cell.source for cell in report.cells if cell.cell_type == "markdown"]
    readme = (ROOT / "README.md").read_text()
    texts += [readme.split("<!-- results: begin")[0], readme.split("results: end -->")[1]]
    texts.append((ROOT / "REPRODUCIBILITY.md").read_text())
    for text in texts:
        words = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        found = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", words)) - DECLARED
        assert not found, f"{found} in {text[:80]}"


def test_docstrings_of_plans_say_what_their_studies_took(groups):
    """Core-minutes, of the studies that are whole."""
    said = {}
    for path in (ROOT / "moe_study" / "configs").glob("*.py"):
        text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
        said |= dict(re.findall(r'(?:--study |")([a-z0-9-]+)[`"](?: takes)?(?: another)? (\d+)\b', text))
    assert len(said) > 10
    for name, time in said.items():
        results = [r for (own, _), group in groups.items() if own == name for r in group.results]
        if len(results) == len(study.runs(PROFILE, name)):
            assert time == f"{minutes(results):.0f}", name
