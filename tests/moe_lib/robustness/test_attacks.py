"""Attacks on models whose worst case is known.

Shapes: N images, C channels, H height, W width, D = C * H * W values, K classes.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_lib.robustness.attacks import fgsm, pgd, spsa

SHAPE = (6, 3, 2, 2)
EPS = 0.05


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape, low=0.1, high=0.9, dtype=torch.float64):
    return low + (high - low) * torch.rand(shape or SHAPE, generator=generator(1), dtype=dtype)


def linear(num_classes, seed=0, scale=1.0, dtype=torch.float64):
    """Weights [K, D], a bias, and the logits that they give an image."""
    weights_KD = scale * torch.randn(num_classes, 12, generator=generator(seed), dtype=dtype)
    bias_K = torch.linspace(-1, 1, num_classes, dtype=dtype)
    return weights_KD, bias_K, lambda x_NCHW: F.linear(x_NCHW.flatten(1), weights_KD, bias_K)


def mlp(dtype=torch.float64):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    for index, weight in enumerate(model.parameters()):
        weight.data = torch.randn(weight.shape, generator=generator(index), dtype=dtype)
    return model


def labels(num_classes):
    return torch.arange(SHAPE[0]) % num_classes


def losses(predict, x_NCHW, labels_N):
    with torch.no_grad():
        return F.cross_entropy(predict(x_NCHW), labels_N, reduction="none")


def three_attacks(predict, x_NCHW, labels_N, eps=EPS):
    return {
        "fgsm": fgsm(predict, x_NCHW, labels_N, eps),
        "pgd": pgd(predict, x_NCHW, labels_N, eps, generator()),
        "spsa": spsa(predict, x_NCHW, labels_N, eps, generator()),
    }


def worst_corner(weights_2D, x_NCHW, labels_N, eps=EPS):
    """Of two classes of linear logits, the true one's lead falls fastest along W_other - W_true."""
    worst = np.empty(x_NCHW.shape)
    for n, y in enumerate(labels_N.tolist()):
        slope_D = (weights_2D[1 - y] - weights_2D[y]).numpy().reshape(x_NCHW.shape[1:])
        worst[n] = np.clip(x_NCHW[n].numpy() + eps * np.sign(slope_D), 0, 1)
    return worst


# ------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
@pytest.mark.parametrize("random_start", [False, True])
def test_two_linear_classes_are_driven_into_the_worst_corner(random_start, dtype, tolerance):
    """Twenty steps of 0.15 eps cross the whole ball, whatever the start."""
    (weights_2D, _, predict), x, y = linear(2, dtype=dtype), images(dtype=dtype), labels(2)
    expected = worst_corner(weights_2D, x, y)
    attacked = pgd(predict, x, y, EPS, generator(), random_start=random_start)
    for found in (attacked, fgsm(predict, x, y, EPS)):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)


def test_fgsm_on_several_linear_classes_follows_the_analytic_gradient():
    (weights_KD, bias_K, predict), x, y = linear(5), images(), labels(5)
    expected = np.empty(SHAPE)
    for n in range(SHAPE[0]):
        scores_K = [float(w_D @ x[n].flatten() + b) for w_D, b in zip(weights_KD, bias_K, strict=True)]
        probs_K = np.exp(scores_K) / np.exp(scores_K).sum()
        slope_D = sum(probs_K[k] * weights_KD[k].numpy() for k in range(5)) - weights_KD[y[n]].numpy()
        expected[n] = x[n].numpy() + EPS * np.sign(slope_D).reshape(SHAPE[1:])
    np.testing.assert_allclose(fgsm(predict, x, y, EPS).numpy(), expected, rtol=0, atol=1e-15)


def test_one_step_of_pgd_from_the_image_is_fgsm():
    predict, x, y = mlp(), images(), labels(4)
    one = pgd(predict, x, y, EPS, generator(), steps=1, step_size=EPS, random_start=False)
    assert torch.equal(one, fgsm(predict, x, y, EPS))


def test_pgd_moves_by_its_step_size():
    (weights_2D, _, predict), x, y = linear(2), images(), labels(2)
    attacked = pgd(predict, x, y, EPS, generator(), steps=3, step_size=0.01, random_start=False)
    np.testing.assert_allclose(attacked.numpy(), worst_corner(weights_2D, x, y, 0.03), rtol=0, atol=1e-15)
    default = pgd(predict, x, y, EPS, generator(), steps=3, random_start=False)
    np.testing.assert_allclose(
        default.numpy(), worst_corner(weights_2D, x, y, 0.45 * EPS), rtol=0, atol=1e-15
    )


def test_pgd_starts_anywhere_in_the_ball():
    x, y = torch.full((400, 3, 2, 2), 0.5, dtype=torch.float64), torch.zeros(400, dtype=torch.long)
    predict = linear(2)[2]
    start = pgd(predict, x, y, EPS, generator(), steps=1, step_size=1e-12) - x
    assert start.abs().max() <= EPS
    assert start.mean().item() == pytest.approx(0, abs=5 * EPS / (3 * start.numel()) ** 0.5)
    assert start.std().item() == pytest.approx(EPS / 3**0.5, rel=0.05)  # that of a uniform distribution


def test_spsa_reaches_most_of_what_the_worst_corner_costs():
    (weights_2D, _, predict), x, y = linear(2), images(), labels(2)
    clean_N = losses(predict, x, y)
    most_N = losses(predict, torch.from_numpy(worst_corner(weights_2D, x, y)), y) - clean_N
    gain_N = losses(predict, spsa(predict, x, y, EPS, generator()), y) - clean_N
    assert (gain_N <= most_N + 1e-12).all()
    assert (gain_N > 0).all()
    assert gain_N.sum() > 0.8 * most_N.sum()
    many_N = losses(predict, spsa(predict, x, y, EPS, generator(), samples=256), y) - clean_N
    assert many_N.sum() > 0.99 * most_N.sum()


# ------------------------------------------------------------------------------------ what they reach


@pytest.mark.parametrize("num_classes", [2, 5])
def test_the_loss_of_a_linear_model_only_rises(num_classes):
    """It is convex, so that every step along its slope's signs raises it, for every image."""
    predict, x, y = linear(num_classes)[2], images(low=0, high=1), labels(num_classes)
    before_N = losses(predict, x, y)
    assert (losses(predict, fgsm(predict, x, y, EPS), y) > before_N).all()
    for steps in (1, 2, 5, 20):
        attacked = pgd(predict, x, y, EPS, generator(), steps=steps, random_start=False)
        after_N = losses(predict, attacked, y)
        assert (after_N >= before_N - 1e-12).all()
        before_N = after_N


def test_many_small_steps_beat_one_large_step():
    predict, x, y = mlp(), images(), labels(4)
    clean = losses(predict, x, y).sum()
    found = {
        name: losses(predict, attacked, y).sum() - clean
        for name, attacked in three_attacks(predict, x, y, 0.3).items()
    }
    assert found["pgd"] > found["fgsm"] > 0
    assert 0 < found["spsa"] <= found["pgd"] * 1.01


def test_a_hidden_gradient_stops_all_but_spsa():
    _, _, logits = linear(2)
    x, y = images(), labels(2)

    def hidden(x_NCHW):  # in steps of 1/255: flat almost everywhere
        return logits((x_NCHW * 255).round() / 255)

    attacked = three_attacks(hidden, x, y)
    assert torch.equal(attacked["fgsm"], x)
    gain_N = losses(logits, attacked["spsa"], y) - losses(logits, x, y)
    assert (gain_N > 0).all()


def test_spsa_needs_no_gradient():
    weights_KD, bias_K, logits = linear(3)
    x, y = images(), labels(3)

    def black_box(x_NCHW):
        assert not torch.is_grad_enabled()
        return torch.from_numpy(x_NCHW.flatten(1).numpy() @ weights_KD.numpy().T + bias_K.numpy())

    attacked = spsa(black_box, x, y, EPS, generator())
    assert (losses(logits, attacked, y) > losses(logits, x, y)).all()


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "spsa"])
def test_a_sure_model_is_attacked_as_well(attack):
    """p of the true class is 1 in float32 on every image; the slope's signs do not depend on how sure."""
    weights_2D, _, predict = linear(2, dtype=torch.float32)
    x = images(dtype=torch.float32)

    def sure(x_NCHW):
        return predict(x_NCHW) + 40 * F.one_hot(y, 2)

    y = predict(x).argmax(1)
    assert (sure(x).softmax(1).gather(1, y[:, None]) == 1).all()
    found = three_attacks(sure, x, y)[attack]
    expected = worst_corner(weights_2D, x, y)
    if attack == "spsa":
        assert ((found - x).sign().numpy() == np.sign(expected - x.numpy())).mean() > 0.8
    else:
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------ what they keep to


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "spsa"])
@pytest.mark.parametrize("eps", [0.0, 1 / 255, 0.3, 1.0])
def test_results_stay_in_the_ball_and_in_range(attack, eps):
    predict, x, y = mlp(), images(low=-0.5, high=1.5).clamp(0, 1), labels(4)
    attacked = three_attacks(predict, x, y, eps)[attack]
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (attacked - x).abs().max() <= eps + 1e-15
    assert torch.equal(attacked, x) == (eps == 0)


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "spsa"])
def test_arguments_parameters_and_global_randomness_stay_as_they_are(attack):
    model, x, y = mlp(), images(), labels(4)
    copies = [x.clone(), y.clone(), *(weight.detach().clone() for weight in model.parameters())]
    state = torch.get_rng_state()
    with torch.no_grad():
        found = three_attacks(model, x, y)[attack]
    assert torch.equal(found, three_attacks(model, x, y)[attack])
    assert not found.requires_grad
    assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    for copy, tensor in zip(copies, [x, y, *model.parameters()], strict=True):
        assert torch.equal(copy, tensor)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_the_generator_alone_decides():
    predict, x, y = mlp(), images(), labels(4)
    for attack in (pgd, spsa):
        first, again, other = (attack(predict, x, y, EPS, generator(seed), steps=2) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_an_image_is_attacked_alike_in_any_company():
    predict, x, y = mlp(), images(), labels(4)
    together = [fgsm(predict, x, y, EPS), pgd(predict, x, y, EPS, generator(), random_start=False)]
    for n in range(len(x)):
        x_1CHW, y_1 = x[n : n + 1], y[n : n + 1]
        assert torch.equal(fgsm(predict, x_1CHW, y_1, EPS)[0], together[0][n])
        alone = pgd(predict, x_1CHW, y_1, EPS, generator(), random_start=False)
        torch.testing.assert_close(alone[0], together[1][n], rtol=0, atol=1e-15)


def test_all_images_go_through_the_model_at_once():
    model, calls = mlp(), []

    def predict(x_NCHW):
        calls.append(x_NCHW.shape)
        return model(x_NCHW)

    fgsm(predict, images(), labels(4), EPS)
    pgd(predict, images(), labels(4), EPS, generator(), steps=3)
    spsa(predict, images(), labels(4), EPS, generator(), steps=2, samples=5)
    assert calls == [SHAPE] * (1 + 3 + 2 * 2 * 5)


def test_logits_and_log_probabilities_are_attacked_alike():
    model, x, y = mlp(), images(), labels(4)
    logits = three_attacks(model, x, y)
    log_probs = three_attacks(lambda x_NCHW: model(x_NCHW).log_softmax(1), x, y)
    for name, attacked in logits.items():
        torch.testing.assert_close(log_probs[name], attacked, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -0.1}, r"eps must lie in \[0, 1\].*got -0.1"),
        ({"eps": 2}, r"eps must lie in \[0, 1\], in units of intensity \(2 / 255, not 2\), got 2"),
        ({"eps": float("nan")}, "got nan"),
        ({"images": images() + 0.5}, r"images must lie in \[0, 1\], got values from .* to 1\.\d"),
        ({"images": images() - 0.5}, r"images must lie in \[0, 1\], got values from -0\.\d"),
        ({"images": images() * float("nan")}, "from nan to nan"),
        (
            {"images": torch.zeros(SHAPE, dtype=torch.uint8)},
            "images must be floating point.* got torch.uint8",
        ),
        ({"images": images(6, 12)}, r"images must have shape \[N, C, H, W\], got \[6, 12\]"),
        ({"images": images()[:0], "labels": labels(4)[:0]}, r"images must not be empty, got \[0, 3, 2, 2\]"),
        ({"labels": labels(4)[:5]}, r"labels must have shape \[6\].*got \[5\]"),
        ({"labels": labels(4) + 1}, r"labels must lie in 0 to 3, got 1 to 4"),
        ({"labels": labels(4) - 1}, r"labels must lie in 0 to 3, got -1 to 2"),
        ({"predict": lambda x: mlp()(x)[:5]}, r"predict must return scores \[6, .*got \(5, 4\)"),
        ({"predict": lambda x: mlp()(x)[:, :1]}, r"at least 2 classes\], got \(6, 1\)"),
        ({"predict": lambda x: mlp()(x) * float("nan")}, "predict returns have no finite slope: nan"),
    ],
)
@pytest.mark.parametrize("attack", [fgsm, pgd, spsa])
def test_bad_input_is_named(attack, changes, message):
    given = {"predict": mlp(), "images": images(), "labels": labels(4), "eps": EPS} | changes
    draw = () if attack is fgsm else (generator(),)
    with pytest.raises(ValueError, match=message):
        attack(given["predict"], given["images"], given["labels"], given["eps"], *draw)


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        (pgd, {"steps": 0}, "steps must be an integer, at least 1, got 0"),
        (pgd, {"step_size": -0.1}, "step_size must be a finite number above 0, got -0.1"),
        (pgd, {"step_size": float("inf")}, "step_size must be a finite number above 0, got inf"),
        (spsa, {"steps": 0}, "steps must be an integer, at least 1, got 0"),
        (spsa, {"samples": -1}, "samples must be an integer, at least 1, got -1"),
        (spsa, {"delta": 0.0}, "delta must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_options_are_named(attack, options, message):
    with pytest.raises(ValueError, match=message):
        attack(mlp(), images(), labels(4), EPS, generator(), **options)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_attacks_work_under_inference_mode(attack):
    model = mlp()

    def attacked():
        x, y = images(), labels(4)
        if attack == "fgsm":
            return fgsm(model, x, y, EPS)
        return pgd(model, x, y, EPS, torch.Generator().manual_seed(0), steps=3)

    expected = attacked()
    with torch.inference_mode():
        assert torch.equal(attacked(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_in_half_precision_are_refused(dtype):
    """Steps of a part of 1 / 255 would be rounded away."""
    images_NCHW, labels_N = torch.rand(2, 1, 4, 4).to(dtype), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="must be float32 or float64, got torch"):
        fgsm(lambda x: x.flatten(1)[:, :2], images_NCHW, labels_N, 1 / 255)
