"""Model x measure: the panel's numbers of every family against loops over tokens, from plain hooks.

`tiny_moes.observe` says which experts served each token, and with which weights, without moe_lib.

Shapes: N tokens, E experts, B sequences, T positions.
"""

import importlib.util
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import tiny_moes
import torch

from moe_lib.inspect import inspect_moe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of transformers, about its own affairs
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="transformers is not installed: .[test-hf]"
    ),
]


def entropy(shares):
    return -sum(p * math.log(p) for p in shares if p > 0)


def by_loops(served_NE, weight_NE, label_N, length):
    """Every measure that counts, in Python's float64; a token's weights are made to sum to 1."""
    num_tokens, num_experts = served_NE.shape
    chosen = [set(np.flatnonzero(row).tolist()) for row in served_NE]
    used = [n for n in range(num_tokens) if chosen[n]]
    weights = {n: np.abs(weight_NE[n]) / np.abs(weight_NE[n]).sum() for n in used}
    count_E = [sum(e in s for s in chosen) for e in range(num_experts)]
    slots, top_k = sum(count_E), max(map(len, chosen))
    marginal = entropy([sum(weights[n][e] for n in used) / len(used) for e in range(num_experts)])
    per_token = sum(entropy(weights[n]) for n in used) / len(used)
    pairs = [(n, n + 1) for n in range(num_tokens - 1) if (n + 1) % length and chosen[n] and chosen[n + 1]]
    kept = [len(chosen[n] & chosen[m]) / max(len(chosen[n]), len(chosen[m])) for n, m in pairs]
    joint = Counter((label_N[n], e) for n in used for e in chosen[n])
    together = [
        sum({a, b} <= s for s in chosen) / min(count_E[a], count_E[b])
        for a, b in itertools.combinations(range(num_experts), 2)
        if count_E[a] and count_E[b]
    ]
    by_label = Counter()
    for (label, _), count in joint.items():
        by_label[label] += count
    found = {
        "never chosen": count_E.count(0),
        "largest load": max(count_E) / slots,
        "dropped": 1 - len(used) / num_tokens,
        "effective experts": math.exp(entropy([count / slots for count in count_E])),
        "H(E)": marginal,
        "H(E|x)": per_token,
        "I(x;E)": marginal - per_token,
        "I(c;E)": sum(m / slots * math.log(m * slots / by_label[c] / count_E[e])
                      for (c, e), m in joint.items()),
        "switching": 1 - sum(kept) / len(kept),
    }  # fmt: skip
    return count_E, found | ({"co-activation": max(together)} if top_k > 1 else {})


def logits(model, data):
    with torch.no_grad():
        return [model(**batch).logits for batch in data]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [*tiny_moes.FAMILIES, *tiny_moes.OTHERS])
def test_every_measure_is_the_loops(family, dtype):
    data, model = tiny_moes.batches(family), tiny_moes.causal_lm(family)
    if model is None:
        pytest.skip(f"the installed transformers has no {family}")
    try:
        clean = logits(model.to(dtype), data)
    except RuntimeError:
        pytest.skip(f"{family} runs in float32 alone")
    panel = inspect_moe(model, data, "tokens")
    seen = tiny_moes.observe(model)
    torch.testing.assert_close(logits(model, data), clean, rtol=0, atol=0)
    assert len(panel) == len(seen) > 0
    for layer, (name, calls) in zip(panel.layers, seen.items(), strict=True):
        assert layer.name.startswith(name)
        served_NE, weight_NE = (torch.cat(parts).numpy() for parts in zip(*calls, strict=True))
        ids = "decoder_input_ids" if "decoder_input_ids" in data[0] and "decoder" in name else "input_ids"
        label_N = torch.cat([batch[ids].flatten() for batch in data]).tolist()
        count_E, expected = by_loops(served_NE, weight_NE, label_N, data[0][ids].shape[1])
        assert layer.state.count_E.tolist() == count_E
        assert layer["never chosen"] == expected.pop("never chosen")
        assert layer.load_E == pytest.approx([count / sum(count_E) for count in count_E], abs=1e-12)
        for measure, value in expected.items():
            assert layer[measure] == pytest.approx(value, rel=1e-6, abs=1e-6), (name, measure)
        if not layer.name.endswith("self_attention"):  # experts of attention are not mixed token by token
            assert layer["mixture error"] < 1e-5, layer.explanation
