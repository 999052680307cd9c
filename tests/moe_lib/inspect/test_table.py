"""Model x measure: the panel's numbers of every family against loops over tokens, from plain hooks.

`tiny_moes.observe` says which experts served each token, and with which weights, without moe_lib.

Shapes: N tokens, E experts, B sequences, T positions.
"""

import importlib.util

import pytest
import reference_panel
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
        follows_N = (torch.arange(1, len(label_N) + 1) % data[0][ids].shape[1] != 0).tolist()
        count_E, expected = reference_panel.measures(served_NE, weight_NE, label_N, follows_N)
        assert layer.state.count_E.tolist() == count_E
        assert layer["never chosen"] == expected.pop("never chosen")
        assert layer.load_E == pytest.approx([count / sum(count_E) for count in count_E], abs=1e-12)
        for measure, value in expected.items():
            assert layer[measure] == pytest.approx(value, rel=1e-6, abs=1e-6), (name, measure)
        if not layer.name.endswith("self_attention"):  # experts of attention are not mixed token by token
            assert layer["mixture error"] < 1e-5, layer.explanation
