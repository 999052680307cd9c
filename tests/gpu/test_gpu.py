"""Every fast path of a GPU against loops over float64 numbers; mixed precision, determinism, resuming, waits,
memory.

Each test runs twice: on the CPU, told to take the branches of a GPU, and on a GPU (`-m gpu`; skipped where
there is none). Needs what a bare machine has: torch and pytest.
"""

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import reference
import reference_ac
import torch
from torch.nn import functional as F

from moe_lib import products
from moe_lib.models.classifier import ClassifierConfig
from moe_lib.models.language import LanguageConfig
from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig
from moe_lib.moe import MoE, Routing, adaptive_scales, dispatch, route
from moe_lib.snnl import SNNLConfig, soft_nearest_neighbor_loss
from moe_study import train
from moe_study.data import Dataset, Split
from moe_study.data.text import Corpus, Text
from moe_study.evaluate import ClassifierExperiment
from moe_study.replay import Replayed
from moe_study.tasks import ClassifierTask, LanguageTask, Objective, RoutedObjective, VisionTask
from moe_study.train import TrainConfig, adam, fit

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


def on_a_gpu(test):
    """For what the CPU can't play."""
    return pytest.mark.gpu(NO_GPU(test))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(products, "HOST", ())
    return request.param


def close(found, expected, rtol, atol=None):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    found = found.detach().cpu().double()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol if atol is None else atol)


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("route_", ["dense", "streaming", "fused"])
@pytest.mark.parametrize("distance", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("temperature", [0.005, 0.5, 20.0])
def test_snnl(temperature, distance, route_, dtype, rtol, device):
    if route_ == "fused" and (device == "cpu" or dtype == torch.float64):
        pytest.skip("the fused kernels are for a GPU, in float32")
    draw = torch.Generator().manual_seed(0)
    features_ND = torch.randn(40, 6, generator=draw, dtype=torch.float64).to(dtype)
    labels_N = torch.randint(4, (40,), generator=draw)
    x_ND = features_ND.to(device).requires_grad_()
    loss = soft_nearest_neighbor_loss(x_ND, labels_N.to(device), temperature, distance, route=route_)
    close(loss, reference.snnl(features_ND, labels_N, temperature, distance), rtol)
    (grad_ND,) = torch.autograd.grad(loss, x_ND)
    step, at = 1e-6, (3, 2)  # the gradient's largest error would show in any entry
    shifted = [features_ND.double().clone() for _ in range(2)]
    shifted[0][at] += step
    shifted[1][at] -= step
    above, below = (reference.snnl(one, labels_N, temperature, distance) for one in shifted)
    close(grad_ND[at], (above - below) / (2 * step), max(rtol, 1e-4), 1e-4)


@pytest.mark.parametrize("skew", [0.0, 8.0], ids=["even", "one expert takes nearly all"])
@pytest.mark.parametrize(
    ("form", "dtype", "rtol"),
    [
        ("blocks", torch.float64, 1e-10),
        ("blocks", torch.float32, 1e-4),
        ("blocks", torch.bfloat16, 5e-2),
        ("grouped", torch.bfloat16, 5e-2),
        ("chosen by the library", torch.bfloat16, 5e-2),
    ],
)
def test_top_k_experts(form, dtype, rtol, skew, device):
    """Outputs and every gradient; one expert has no row at all."""
    torch.manual_seed(0)
    layer = MoE(16, 6, 24, 8, top_k=2).double()
    for weight in layer.experts.stacked():
        weight.data = weight.data.to(dtype).double()
    x_ND = torch.randn(70, 16, dtype=torch.float64).to(dtype).double()
    logits_NE = torch.randn(70, 6, dtype=torch.float64)
    logits_NE[:, 2] += skew
    logits_NE[:, 5] = -30
    grad_NO = torch.randn(70, 8, dtype=torch.float64)
    routing = route(logits_NE, 2)
    exact = reference.moe(x_ND, routing.indices_NK, routing.weights_NK, *layer.experts.stacked())
    function = {"blocks": dispatch._by_blocks, "grouped": dispatch._by_grouped_products}.get(
        form, dispatch.mixture
    )

    def run(x_ND, routing, weights, function):
        inputs = [x_ND.detach().requires_grad_(), *(w.detach().requires_grad_() for w in weights)]
        gate_NK = routing.weights_NK.detach().requires_grad_()
        out_NO = function(inputs[0], routing._replace(weights_NK=gate_NK), dispatch.Stacked(*inputs[1:]))
        return out_NO, torch.autograd.grad(out_NO, [*inputs, gate_NK], grad_NO.to(out_NO))

    with torch.random.fork_rng():
        products_on_host = products.HOST
        products.HOST = ("cpu",)  # the oracle of the gradients: expert by expert, in float64
        try:
            expected, gradients = run(x_ND, routing, layer.experts.stacked(), dispatch._by_expert)
        finally:
            products.HOST = products_on_host
    close(expected, exact, 1e-10)
    moved = Routing(*(field.to(device) for field in routing))
    moved = moved._replace(
        weights_NK=moved.weights_NK.to(torch.promote_types(dtype, torch.float32)),
    )
    weights = [w.to(device, dtype) for w in layer.experts.stacked()]
    found, found_gradients = run(x_ND.to(device, dtype), moved, weights, function)
    close(found, exact, rtol)
    for one, other in zip(found_gradients, gradients, strict=True):
        close(one, other, rtol, rtol * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("dispersion", ["mad", "variance"])
@pytest.mark.parametrize("normalize", ["feature", "row", "global", "none"])
def test_adaptive_scales(normalize, dispersion, dtype, rtol, device):
    """With a cluster of one token, and one without any."""
    draw = torch.Generator().manual_seed(1)
    tokens_ND = torch.randn(50, 7, generator=draw, dtype=torch.float64).to(dtype)
    assignment_N = torch.randint(3, (50,), generator=draw)
    assignment_N[0] = 4
    options = {"dispersion": dispersion, "normalize": normalize}
    found = adaptive_scales(tokens_ND.to(device), assignment_N.to(device), 5, **options)
    close(found, reference_ac.adaptive_scales(tokens_ND, assignment_N, 5, **options), rtol)


# ----------------------------------------------------------------------------------------- training

CNN = ClassifierConfig(code_dim=16, expert_hidden=16, gate_hidden=16)
TRUNK = TransformerConfig(
    dim=32,
    depth=3,
    num_heads=2,
    mlp_hidden=32,
    moe_blocks=(1, 2),
    num_experts=8,
    expert_hidden=16,
    router="ac",
)


def dataset(device, count=96, classes=4):
    """Classes differ in brightness, so that a few steps teach something."""
    draw = torch.Generator().manual_seed(2)
    labels_N = torch.randint(classes, (count,), generator=draw)
    noise = torch.randint(0, 64, (count, 3, 16, 16), generator=draw)
    images = (noise + 60 * labels_N[:, None, None, None]).clamp(max=255).to(torch.uint8)
    split = Split(images.to(device), labels_N.to(device))
    return Dataset("bright", split, split, split, classes)


def classifier(device, bf16=False, dtype=torch.float32, shuffled=False):
    objective = Objective(snnl=SNNLConfig(factor=1.0), shuffled=shuffled, balance=0.01)
    return ClassifierTask(
        dataset(device), CNN, objective, seed=3, epochs=2, batch_size=32, bf16=bf16, dtype=dtype
    )


def vision(device, bf16=False, dtype=torch.float32):
    options = {"seed": 3, "batch_size": 32, "bf16": bf16, "dtype": dtype, "augment": True}
    return VisionTask(dataset(device), VisionConfig(TRUNK, patch=4), RoutedObjective(), **options)


def language(device, bf16=False, dtype=torch.float32):
    draw = torch.Generator().manual_seed(4)
    part = Text(torch.randint(256, (700,), generator=draw).to(device), "")
    config = LanguageConfig(replace(TRUNK, moe_blocks=(2,)), context=16)
    options = {"seed": 3, "batch_size": 8, "bf16": bf16, "dtype": dtype}
    return LanguageTask(Corpus("random", part, part, part), config, RoutedObjective(), **options)


TASKS = {"classifier": classifier, "vision": vision, "language": language}
tasks = pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)


def losses_of(task, epochs=2):
    optimizer, found = adam(task.parameters(), TrainConfig(learning_rate=1e-3)), []
    task.train()
    for epoch in range(epochs):
        for batch in task.batches(epoch):
            losses = task.losses(batch, epoch)
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
            found.append(losses["total"].detach())
    return torch.stack(found).cpu().double()


@tasks
def test_training_follows_the_cpu_in_float64(make, device):
    found = losses_of(make(device, dtype=torch.float64))
    products.HOST, before = ("cpu",), products.HOST
    try:
        expected = losses_of(make("cpu", dtype=torch.float64))
    finally:
        products.HOST = before
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@tasks
def test_bfloat16_stays_near_float32(make, device):
    """The first loss within 2 %: later ones diverge as tokens change experts. And it falls as far."""
    single, half = losses_of(make(device)), losses_of(make(device, bf16=True))
    assert float(half[0]) == pytest.approx(float(single[0]), rel=0.02)
    assert float(half[-1]) == pytest.approx(float(single[-1]), rel=0.1)
    assert float(half[-1]) < float(half[0])


@tasks
def test_two_trainings_are_equal(make, device):
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(losses_of(make(device)), losses_of(make(device)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, device):
    config = TrainConfig(epochs=3, batch_size=32)

    def run(path=None, stop=None):
        task = classifier(device, dtype=torch.float64)

        def on_epoch(epoch, history):
            if epoch == stop:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            validate = ClassifierExperiment(task).validation
            fit(task, config, validate, label="x", checkpoint=path, on_epoch=on_epoch)
        return task

    path = tmp_path / "checkpoint.pt"
    run(path, stop=1)
    for name, weight in run(path).state_dict().items():
        torch.testing.assert_close(weight, run().state_dict()[name], rtol=1e-9, atol=1e-9)


@on_a_gpu
@pytest.mark.parametrize("make", [*TASKS.values(), lambda *a, **k: classifier(*a, **k, shuffled=True)])
def test_a_replayed_update_is_the_update(make, monkeypatch):
    """Three epochs of losses; the last batch of each is shorter, and so not replayed."""
    found = {}
    for enabled in (False, True):
        monkeypatch.setattr(train, "Replayed", partial(Replayed, enabled=enabled))
        task, config = make("cuda", dtype=torch.float64), TrainConfig(epochs=3)
        task.batch_size, task.num_batches = (28, 4) if hasattr(task, "dataset") else (8, task.num_batches)
        optimizer = adam(task.parameters(), config)
        found[enabled] = [train._train_epoch(task, optimizer, config, epoch, "x") for epoch in range(3)]
    for plain, replayed in zip(found[False], found[True], strict=True):
        assert replayed == pytest.approx(plain, rel=1e-9)


@on_a_gpu
def test_graphs_of_a_thread_share_their_memory():
    """One after another, as the epochs of a run: with a memory each, they fill the GPU."""
    x = torch.randn(2**20, device="cuda")  # 4 MiB
    before = torch.cuda.memory_reserved()
    for scale in range(1, 20):
        replayed = Replayed(lambda x, scale=scale: {"sum": sum((x * scale).exp().neg() for _ in range(4))})
        for _ in range(3):
            found = replayed(x)["sum"]
        torch.testing.assert_close(found, -4 * (x * scale).exp())
    assert torch.cuda.memory_reserved() - before <= 5 * 20 * 2**20  # segments of 20 MiB


@on_a_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [*TASKS.values(), lambda *a, **k: classifier(*a, **k, shuffled=True)])
def test_no_step_waits(make, bf16):
    task = make("cuda", bf16=bf16)
    optimizer = adam(task.parameters(), TrainConfig())
    task.train()
    batches = task.batches(0)
    batch = next(batches)  # what an epoch copies
    for round_ in range(2):  # in the first, libraries start
        torch.cuda.set_sync_debug_mode("error" if round_ else "default")
        try:
            optimizer.zero_grad()
            task.losses(batch, 0)["total"].backward()
            optimizer.step()
            batch = next(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize(("distance", "width"), [("cosine", 5), ("cosine", 128), ("sqeuclidean", 256)])
def test_fused_snnl_of_several_blocks(distance, width):
    """Against float64, with the temperature's derivative; N fills no block. Bits are the same again."""
    draw = torch.Generator().manual_seed(5)
    features_ND = torch.randn(1003, width, generator=draw).cuda()
    labels_N = torch.randint(9, (1003,), generator=draw).cuda()
    start = 0.1 if distance == "cosine" else 2.0 * width
    found = []
    for route_, dtype in [("fused", torch.float32), ("fused", torch.float32), ("streaming", torch.float64)]:
        x_ND = features_ND.to(dtype).requires_grad_()
        temperature = torch.tensor(start, dtype=dtype, device="cuda", requires_grad=True)
        loss = soft_nearest_neighbor_loss(x_ND, labels_N, temperature, distance, route=route_)
        found.append([loss.detach(), *torch.autograd.grad(loss, (x_ND, temperature))])
    for one, again, expected in zip(*found, strict=True):
        assert torch.equal(one, again)
        close(one, expected.cpu(), 1e-4, 1e-4 * float(expected.abs().max()))


@on_a_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_fused_snnl_does_not_wait():
    x_ND = torch.randn(300, 16, device="cuda", requires_grad=True)
    labels_N = torch.randint(10, (300,), device="cuda")
    temperature = torch.tensor(0.5, device="cuda", requires_grad=True)
    for round_ in range(2):  # in the first, kernels are compiled
        torch.cuda.set_sync_debug_mode("error" if round_ else "default")
        try:
            soft_nearest_neighbor_loss(x_ND, labels_N, temperature, route="fused").backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("route_", ["streaming", "fused", "auto"])
def test_memory_of_snnl(route_):
    """Far below one matrix of all pairs, which is 256 MiB here; fused, a few times the features of 4 MiB."""
    x_ND = torch.randn(8192, 128, device="cuda", requires_grad=True)
    labels_N = torch.randint(10, (8192,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    soft_nearest_neighbor_loss(x_ND, labels_N, 0.5, route=route_).backward()
    most = 4 * 2048 * 8192 * 4 if route_ == "streaming" else 12 * x_ND.nbytes
    assert torch.cuda.max_memory_allocated() - before < most


@on_a_gpu
def test_memory_of_top_k_experts():
    """No more than a few times the activations of all choices; never rows times experts."""
    layer = MoE(512, 64, 512, top_k=2).to("cuda", torch.bfloat16)
    x_ND = torch.randn(8192, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    F.mse_loss(layer(x_ND)[0].float(), torch.zeros(8192, 512, device="cuda")).backward()
    weights = sum(w.nbytes for w in layer.parameters())
    activations = 2 * 8192 * 512 * 2
    assert torch.cuda.max_memory_allocated() - before < 16 * activations + 3 * weights
