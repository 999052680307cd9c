"""torch.compile, torch.export and torch.func reach the loss, the routers and the experts.

Shapes: N samples, D width.
"""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from moe_lib.models.transformer import Projection, TransformerConfig
from moe_lib.models.vision import VisionConfig, VisionTransformer
from moe_lib.moe import ACConfig, AdaptiveClusteringRouter, HashRouter, MoE, route
from moe_lib.snnl import soft_nearest_neighbor_loss

pytestmark = pytest.mark.slow
SIZE = torch.export.Dim("size", min=2, max=4096)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same_gradients(function, compiled, *inputs):
    """Values agree to 1e-6, gradients to 1e-5, relative to the largest of each."""
    found = []
    for one in (function, compiled):
        out = one(*inputs)
        weights = normal(*out.shape, seed=9)
        wanted = [x for x in inputs if x.requires_grad]
        found.append([out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)])
    for tolerance, eager, other in zip([1e-6] + [1e-5] * len(inputs), *found, strict=False):
        assert (eager - other).abs().max() <= tolerance * eager.abs().max()


def whole(function):
    """Compiled without a break of the graph, differentiation included; no code is generated for the CPU."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


class TestLoss:
    @pytest.mark.parametrize(
        ("distance", "temperature", "reduction"), [("cosine", 0.5, "mean"), ("sqeuclidean", 200.0, "none")]
    )
    def test_compiled_whole(self, distance, temperature, reduction):
        """At a size at which the eager kernels take oneDNN's products."""
        features_ND, labels_N = normal(256, 128).requires_grad_(), torch.arange(256) % 10

        def loss(x_ND, labels_N):
            return soft_nearest_neighbor_loss(x_ND, labels_N, temperature, distance, reduction)

        same_gradients(loss, whole(loss), features_ND, labels_N)

    def test_exported(self):
        class Loss(nn.Module):
            def forward(self, x_ND, labels_N):
                return soft_nearest_neighbor_loss(x_ND, labels_N, 0.5)

        inputs = normal(20, 6), torch.arange(20) % 3
        shapes = {"x_ND": {0: SIZE}, "labels_N": {0: SIZE}}
        exported = torch.export.export(Loss(), inputs, dynamic_shapes=shapes).module()
        for given in (inputs, (normal(33, 6), torch.arange(33) % 4)):
            torch.testing.assert_close(exported(*given), Loss()(*given))

    @pytest.mark.parametrize("distance", ["cosine", "sqeuclidean"])
    def test_torch_func(self, distance):
        features_BND, labels_N = normal(3, 12, 5, dtype=torch.float64), torch.arange(12) % 4

        def loss(x_ND, reduction="mean"):
            return soft_nearest_neighbor_loss(x_ND, labels_N, 0.7, distance, reduction)

        mapped = torch.func.vmap(loss)(features_BND)
        torch.testing.assert_close(mapped, torch.stack([loss(x_ND) for x_ND in features_BND]))
        x_ND = features_BND[0].clone().requires_grad_()
        expected_ND = torch.autograd.grad(loss(x_ND), x_ND)[0]
        torch.testing.assert_close(torch.func.grad(loss)(x_ND.detach()), expected_ND)
        jacobian_NND = torch.func.jacrev(lambda x_ND: loss(x_ND, "none"))(x_ND.detach())
        torch.testing.assert_close(jacobian_NND.mean(0), expected_ND)

    @pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # of torch, at its first use
    def test_forward_mode(self):
        """The slope along a direction is the gradient times that."""
        x_ND, along_ND, labels_N = normal(12, 5), normal(12, 5, seed=1), torch.arange(12) % 4
        with forward_ad.dual_level():
            loss = soft_nearest_neighbor_loss(forward_ad.make_dual(x_ND, along_ND), labels_N, 0.7)
            slope = forward_ad.unpack_dual(loss).tangent
        x_ND.requires_grad_()
        soft_nearest_neighbor_loss(x_ND, labels_N, 0.7).backward()
        torch.testing.assert_close(slope, (x_ND.grad * along_ND).sum())


def layer_of(kind, top_k, dtype=torch.float32):
    torch.manual_seed(0)
    router = {
        "linear": lambda: None,
        "ac": lambda: AdaptiveClusteringRouter(64, 8, top_k, ACConfig(gradient=True)),
    }[kind]()
    return MoE(64, 8, 64, top_k=top_k, router=router).to(dtype)


class TestLayer:
    @pytest.mark.parametrize(("kind", "top_k"), [("linear", 2), ("ac", 1)])
    def test_compiled_whole(self, kind, top_k):
        """At a size at which the eager kernels take oneDNN's products."""
        layer, x_ND = layer_of(kind, top_k), normal(512, 64).requires_grad_()
        previous = route(normal(512, 8, seed=1), 2)

        def forward(x_ND):
            return layer(x_ND, previous)[0]

        same_gradients(forward, whole(forward), x_ND)

    def test_a_hash_router_compiled_whole(self):
        layer, keys_N = MoE(6, 4, 8, router=HashRouter(4, 5, 2)), torch.arange(20) % 5
        compiled = whole(layer)
        torch.testing.assert_close(
            compiled(normal(20, 6), None, keys_N)[0], layer(normal(20, 6), None, keys_N)[0]
        )

    @pytest.mark.parametrize("kind", ["linear", "ac"])
    def test_exported(self, kind):
        """Two layers, the second told of the first's decision; for any number of rows."""

        class Layers(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = layer_of("linear", 2), layer_of(kind, 2)

            def forward(self, x_ND):
                hidden_ND, routing = self.first(x_ND)
                return self.second(hidden_ND, routing)[0]

        layers = Layers()
        exported = torch.export.export(layers, (normal(20, 64),), dynamic_shapes=({0: SIZE},)).module()
        for x_ND in (normal(20, 64), normal(300, 64)):
            torch.testing.assert_close(exported(x_ND), layers(x_ND))

    def test_a_model_exported(self):
        model = VisionTransformer(
            VisionConfig(TransformerConfig(depth=2, moe_blocks=(0, 1), router="hash"), patch=4), (3, 8, 8), 5
        )
        images_NCHW = normal(4, 3, 8, 8)
        shapes = {"images_NCHW": {0: SIZE}}
        exported = torch.export.export(model, (images_NCHW,), dynamic_shapes=shapes).module()
        for given_NCHW in (images_NCHW, normal(9, 3, 8, 8)):
            torch.testing.assert_close(exported(given_NCHW)[0], model(given_NCHW).log_probs_NC)

    @pytest.mark.parametrize("top_k", [2, None])
    def test_torch_func(self, top_k):
        layer, x_BND = layer_of("linear", top_k, torch.float64), normal(3, 10, 64, dtype=torch.float64)

        def loss(x_ND):
            return layer(x_ND)[0].square().sum()

        mapped = torch.func.vmap(lambda x_ND: layer(x_ND)[0])(x_BND)
        torch.testing.assert_close(mapped, torch.stack([layer(x_ND)[0] for x_ND in x_BND]))
        x_ND = x_BND[0].clone().requires_grad_()
        expected_ND = torch.autograd.grad(loss(x_ND), x_ND)[0]
        torch.testing.assert_close(torch.func.grad(loss)(x_ND.detach()), expected_ND)
        parameters = dict(layer.named_parameters())
        found = torch.func.grad(lambda p: torch.func.functional_call(layer, p, x_ND)[0].square().sum())(
            parameters
        )
        expected = torch.autograd.grad(loss(x_ND), list(parameters.values()))
        for one, other in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_projection_compiles_and_has_second_derivatives():
    layer, x_NI = Projection(128, 256), normal(256, 128).requires_grad_()
    same_gradients(layer, torch.compile(layer, fullgraph=True), x_NI)

    def penalty(function):
        (gradient_NI,) = torch.autograd.grad(function(x_NI).sum(), x_NI, create_graph=True)
        return torch.autograd.grad(gradient_NI.square().sum(), layer.weight)[0]

    expected_OI = penalty(lambda x_NI: nn.functional.linear(x_NI, layer.weight, layer.bias))
    torch.testing.assert_close(penalty(layer), expected_OI)
