"""Blocks, what is read off a model at work, and the arms that are built from them, against plain loops.

Shapes: B sequences, T positions, N = B * T tokens, D width, E experts, K chosen.
"""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import reference_transformer
import torch
from small_models import SMALL, Dropped, language_model, random, read, shaken, tiny_dataset

from moe_lib.models.language import LanguageConfig
from moe_lib.models.transformer import (
    Attention,
    Block,
    Embedding,
    Projection,
    build_router,
    moe_layers,
    watching,
)
from moe_lib.models.vision import VisionConfig
from moe_lib.moe import ACConfig, AdaptiveClusteringRouter, CosineRouter, LinearRouter, MoE
from moe_lib.rng import initialise
from moe_lib.snnl import SNNLConfig
from moe_study.configs import ac_language, ac_vision, crossed
from moe_study.configs.arms import (
    CROSSED_ARM_DESCRIPTIONS,
    ROUTED_ARM_DESCRIPTIONS,
    RoutedSettings,
    routed_arms,
)
from moe_study.data.text import Corpus, Text
from moe_study.tasks import LanguageTask, RoutedObjective, VisionTask, weighted_total
from moe_study.train import TrainConfig

# ----------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_attention_equals_the_loops(num_heads, causal):
    layer, x_BTD = shaken(Attention(6, num_heads, causal)), random(2, 4, 6, seed=1)
    weights = reference_transformer.weights_of(layer)
    expected = [reference_transformer.attention(x_TD, weights, num_heads, causal) for x_TD in x_BTD.numpy()]
    np.testing.assert_allclose(layer(x_BTD).detach(), expected, rtol=1e-9, atol=1e-12)


def test_layers_start_at_the_scale_that_they_promise():
    projection, embedding = Projection(400, 300), Embedding(300, 400)
    for seed in (1, 2):
        initialise(projection, seed)
        initialise(embedding, seed)
        assert projection.weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
        assert not projection.bias.any()
        assert embedding.weight.norm(dim=1).mean().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("x",)])
@pytest.mark.parametrize("dims", [(96, 48), (48, 96)])
def test_a_projection_in_float32_equals_float64(dims, frozen):
    found, expected = {}, {}
    for dtype, gradients in ((torch.float32, found), (torch.float64, expected)):
        layer = Projection(*dims)
        initialise(layer, seed=3)
        layer.to(dtype)
        x = random(4, 64, dims[0]).to(dtype).transpose(0, 1).requires_grad_()
        tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
        for name in frozen:
            tensors.pop(name).requires_grad_(False)
        out = layer(x)
        assert out.shape == (64, 4, dims[1])
        values = torch.autograd.grad(
            (out * random(*out.shape, seed=1).to(dtype)).sum(), list(tensors.values())
        )
        gradients |= dict(zip(tensors, values, strict=True)) | {"out": out}
    for name, value in expected.items():
        assert (found[name].double() - value).abs().max() < 1e-5 * value.abs().max(), name


def test_a_projection_follows_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert Projection(8, 4)(torch.ones(2, 8)).dtype == torch.bfloat16


def test_every_router_has_its_class_and_chooses_top_k():
    kinds = {"linear": LinearRouter, "cosine": CosineRouter, "ac": AdaptiveClusteringRouter}
    for name, kind in kinds.items():
        router = build_router(6, replace(SMALL, router=name, top_k=3), block=0, num_keys=5)
        assert type(router) is kind
        assert router(torch.randn(5, 6)).indices_NK.shape == (5, 3)
    swin = ACConfig(normalize="global", max_ratio=1.5)
    assert build_router(6, replace(SMALL, router="ac", ac=swin), block=0, num_keys=5).config == swin


@pytest.mark.parametrize(("router", "by"), [("hash", "position"), ("hash-token", "token")])
def test_a_hashed_model_routes_by_position_or_token_alone(router, by):
    model, tokens_BT = language_model(router=router), read(count=4)
    routings = model(tokens_BT).routings
    for routing in routings:
        chosen = {}
        for at, choice_K in enumerate(routing.indices_NK.tolist()):
            key = at % 5 if by == "position" else int(tokens_BT.flatten()[at])
            assert chosen.setdefault(key, choice_K) == choice_K
            assert len(set(choice_K)) == 2
    layers = [routing.indices_NK.tolist() for routing in routings]
    assert layers[0] != layers[1] != layers[2]  # each layer has a hash of its own
    routers = [layer.router for layer in moe_layers(model)]
    assert [router.num_keys for router in routers] == [{"position": 5, "token": 9}[by]] * 3
    assert not any(True for router in routers for _ in router.parameters())


def test_the_other_blocks_have_a_linear_router():
    """The authors' small language model has AC in its last block alone."""
    model = language_model(router="ac", router_blocks=(2,))
    kinds = [type(layer.router) for layer in moe_layers(model)]
    assert kinds == [LinearRouter, LinearRouter, AdaptiveClusteringRouter]
    assert torch.isfinite(model(read()).log_probs_BTV).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "softmax"}, "'softmax'.*linear, cosine, ac, hash, hash-token"),
        ({"router_blocks": (3,)}, r"router_blocks.*\(0, 1, 2\).*\(3,\)"),
        ({"router": "linear", "ac": ACConfig(matched=True)}, "no effect.*'linear'"),
        ({"router": "cosine", "ac": ACConfig(eps=0.1)}, "no effect.*'cosine'"),
        ({"num_heads": 4}, "4 and 6"),
        ({"num_heads": 0}, "0 and 6"),
        ({"depth": 0, "moe_blocks": (0,)}, "depth.*0"),
        ({"moe_blocks": ()}, r"0 to 2.*\(\)"),
        ({"moe_blocks": (1, 3)}, r"0 to 2.*\(1, 3\)"),
        ({"moe_blocks": (-1,)}, r"0 to 2.*\(-1,\)"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


def test_a_top_k_beyond_the_experts_is_named():
    with pytest.raises(ValueError, match=r"top_k.*4.*5"):
        Block(6, replace(SMALL, top_k=5), index=0, num_keys=5, causal=True)


# ----------------------------------------------------------------------------------------- losses


def test_the_total_weighs_every_loss():
    losses = {"cross_entropy": 2.0, "balance": 3.0, "snnl": 7.0}
    losses = {name: torch.tensor(value) for name, value in losses.items()}
    plain = weighted_total(losses, RoutedObjective())
    assert plain["total"].item() == pytest.approx(2 + 0.01 * 3)
    assert all(plain[name] is losses[name] for name in losses)
    whole = RoutedObjective(balance=0.1, snnl=SNNLConfig(factor=10.0))
    assert weighted_total(losses, whole)["total"].item() == pytest.approx(2 + 0.3 + 70)
    assert set(losses) == {"cross_entropy", "balance", "snnl"}


# -------------------------------------------------------------------------------------- watching


def test_moe_layers_come_in_the_order_of_their_blocks():
    model = language_model(depth=12, moe_blocks=(0, 2, 11))
    assert moe_layers(model) == [model.blocks[index].feed_forward for index in (0, 2, 11)]


def test_watching_shows_what_each_layer_saw_and_decided():
    model = language_model(router="ac", moe_blocks=(0, 2))
    with watching(model) as seen:
        first, second = model(read(seed=1)), model(read(3, 4, seed=2))
    assert [one.layer for one in seen] == moe_layers(model) * 2
    routings = [*first.routings, *second.routings]
    assert all(one.routing is routing for one, routing in zip(seen, routings, strict=True))
    assert [one.tokens_ND.shape for one in seen] == [(10, 6), (10, 6), (12, 6), (12, 6)]
    # Passed over the block without experts, and from one pass not to the next.
    assert [one.previous for one in seen[::2]] == [None, None]
    assert seen[1].previous is seen[0].routing
    assert seen[3].previous is seen[2].routing
    for one in seen:
        assert not one.tokens_ND.requires_grad
        torch.testing.assert_close(one.layer.route(one.tokens_ND, one.previous), one.routing)


def test_watching_sees_a_previous_decision_that_is_named():
    """As in the README."""
    layer, tokens_ND = MoE(6, 4, 8, top_k=2), torch.randn(5, 6)
    with watching(layer) as seen:
        _, first = layer(tokens_ND)
        layer(tokens_ND, previous=first)
    assert [one.previous for one in seen] == [None, first]


def test_nobody_watches_afterwards():
    model = language_model()
    with watching(model) as seen:
        model(read())
    model(read())
    assert len(seen) == 3
    with pytest.raises(RuntimeError, match="halt"), watching(model):
        raise RuntimeError("halt")
    assert not any(layer._forward_hooks for layer in moe_layers(model))


# ------------------------------------------------------------------------------ arms of the studies


def tiny_corpus():
    raw = "the quick brown fox jumps over the lazy dog\n" * 4
    text = Text(torch.tensor(list(raw.encode())), raw)
    return Corpus("tiny", text, text, text, 256)


VISION = RoutedSettings(
    VisionConfig(replace(SMALL, moe_blocks=(1, 2)), patch=2),
    ACConfig(normalize="global", max_ratio=1.5),
    TrainConfig(batch_size=4),
)
LANGUAGE = RoutedSettings(LanguageConfig(SMALL, context=8), ACConfig(), TrainConfig(batch_size=4))


def differences(a, b, prefix=""):
    """Dotted names of the fields in which two configurations differ."""
    found = set()
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            found |= differences(one, other, f"{prefix}{field.name}.")
        elif one != other:
            found.add(prefix + field.name)
    return found


PARTNERS = [
    ("linear", "cosine", {"trunk.router"}),
    ("ac-shuffled", "ac", {"trunk.ac.shuffled"}),
    ("ac-matched", "ac", {"trunk.ac.matched"}),
    ("ac-causal", "ac", {"trunk.ac.causal"}),
    ("hash", "cosine", {"trunk.router"}),
    ("dense", "linear", {"trunk.num_experts", "trunk.top_k", "trunk.expert_hidden"}),
]


@pytest.mark.parametrize(
    ("study", "settings", "partners"),
    [
        ("ac-vision", VISION, [*PARTNERS, ("ac-pooled", "ac", {"trunk.ac.pooled"})]),
        (
            "ac-language",
            LANGUAGE,
            [
                *PARTNERS,
                ("hash-token", "hash", {"trunk.router"}),
                ("ac-pooled", "ac-row", {"trunk.ac.pooled"}),
                ("ac-row", "ac", {"trunk.ac.normalize"}),
            ],
        ),
    ],
    ids=["vision", "language"],
)
def test_an_arm_differs_from_its_partner_in_one_thing(study, settings, partners):
    arms = routed_arms(study, settings)
    assert set(arms) == {"cosine", "ac", *(arm for arm, _, _ in partners)}
    for arm, partner, fields in partners:
        assert differences(arms[arm][0], arms[partner][0]) == fields
        assert arms[arm][1] == arms[partner][1] == settings.objective
    # AC against its fair control: the router, and the options that the router alone has.
    (ac, _), (cosine, _) = arms["ac"], arms["cosine"]
    assert differences(replace(ac, trunk=replace(ac.trunk, router="cosine", ac=ACConfig())), cosine) == set()
    assert ac.trunk.ac == settings.form
    assert cosine == settings.model
    dense, mixture = arms["dense"][0].trunk, arms["linear"][0].trunk
    assert dense.num_experts == dense.top_k == 1
    assert dense.expert_hidden == mixture.top_k * mixture.expert_hidden  # the same work for each token


def test_the_crossed_arms_are_two_by_two():
    arms = routed_arms("crossed", replace(VISION, factor=3.0))
    assert set(arms) == set(CROSSED_ARM_DESCRIPTIONS)
    for plain, joint in (("base", "snnl"), ("ac", "snnl-ac")):
        assert arms[plain][0] == arms[joint][0]
        assert differences(arms[plain][1], arms[joint][1]) == {"snnl"}
        assert arms[joint][1].snnl == SNNLConfig(factor=3.0, layers=("stem",))
    assert arms["base"][1] == arms["ac"][1] == VISION.objective
    assert arms["base"][0].trunk.router == "cosine"
    assert arms["ac"][0] == routed_arms("ac-vision", VISION)["ac"][0]


def task_of(model, objective, seed=3):
    if isinstance(model, VisionConfig):
        return VisionTask(tiny_dataset(12, 4), model, objective, seed=seed, batch_size=4)
    return LanguageTask(tiny_corpus(), model, objective, seed=seed, batch_size=4)


@pytest.mark.parametrize(
    ("study", "settings"),
    [("ac-vision", VISION), ("ac-language", LANGUAGE), ("crossed", VISION)],
    ids=["vision", "language", "crossed"],
)
def test_arms_of_a_seed_share_initial_weights_and_batches(study, settings):
    tasks = {arm: task_of(*pair) for arm, pair in routed_arms(study, settings).items()}
    other = next(iter(tasks.values()))
    for arm, task in tasks.items():
        weights, shared = dict(task.model.named_parameters()), dict(other.model.named_parameters())
        of_another_shape = "feed_forward" if arm == "dense" else "router"
        same = [name for name in weights if name in shared and of_another_shape not in name]
        assert all(torch.equal(weights[name], shared[name]) for name in same)
        assert all(of_another_shape in name for name in weights.keys() ^ shared.keys())
        for epoch in (0, 1):
            for mine, theirs in zip(task.batches(epoch), other.batches(epoch), strict=True):
                pairs = [(mine, theirs)] if torch.is_tensor(mine) else zip(mine, theirs, strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
        if arm.startswith("ac") and "cosine" in tasks:
            embeddings = "blocks.1.feed_forward.router.embeddings_ED"
            assert torch.equal(
                weights[embeddings], dict(tasks["cosine"].model.named_parameters())[embeddings]
            )
    pair = next(iter(routed_arms(study, settings).values()))
    assert not torch.equal(task_of(*pair, seed=4).model.head.weight, other.model.head.weight)


@pytest.mark.parametrize(
    ("study", "config"), [("ac-vision", ac_vision), ("ac-language", ac_language), ("crossed", crossed)]
)
def test_every_planned_arm_exists_and_is_described(study, config):
    descriptions = CROSSED_ARM_DESCRIPTIONS if study == "crossed" else ROUTED_ARM_DESCRIPTIONS
    for profile, datasets in config.SEED_COUNTS.items():
        for dataset, groups in datasets.items():
            arms = routed_arms(study, config.SETTINGS[profile][dataset])
            assert set(arms) <= set(descriptions)
            assert {arm for names, _ in groups for arm in names} <= set(arms)


# -------------------------------------------------------------------------------- empty experts


def test_experts_without_tokens_do_not_touch_a_model():
    """Whatever their weights are."""
    model = language_model()
    for layer in moe_layers(model):
        layer.router = Dropped(layer.router, [1, 3])
    expected = model(read()).log_probs_BTV
    with torch.no_grad():
        for layer in moe_layers(model):
            for weight in layer.experts.parameters():
                weight[[1, 3]] = torch.nan
    torch.testing.assert_close(model(read()).log_probs_BTV, expected)
