"""torch.compile, torch.export and torch.func reach the loss, the routers and the experts.

Shapes: N samples, D width.
"""

import pytest
import torch
from torch import nn

from moe_lib.snnl import soft_nearest_neighbor_loss


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


class TestLoss:
    @pytest.mark.parametrize(("distance", "temperature"), [("cosine", 0.5), ("sqeuclidean", 200.0)])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_compiled_whole(self, distance, temperature, reduction):
        """At a size at which the eager kernels take oneDNN's products."""
        features_ND, labels_N = normal(256, 128).requires_grad_(), torch.arange(256) % 10

        def loss(x_ND, labels_N):
            return soft_nearest_neighbor_loss(x_ND, labels_N, temperature, distance, reduction)

        same_gradients(loss, torch.compile(loss, fullgraph=True), features_ND, labels_N)

    def test_exported(self):
        class Loss(nn.Module):
            def forward(self, x_ND, labels_N):
                return soft_nearest_neighbor_loss(x_ND, labels_N, 0.5)

        inputs = normal(20, 6), torch.arange(20) % 3
        exported = torch.export.export(Loss(), inputs).module()
        torch.testing.assert_close(exported(*inputs), Loss()(*inputs))

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
