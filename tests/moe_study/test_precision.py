"""bfloat16 products where a CPU has none: against products of rounded numbers in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_study.precision import bfloat16

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def old_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.parametrize("kind", ["convolution", "linear layer"])
def test_products_are_those_of_rounded_numbers(kind):
    """The gradient of a bias too, which torch's own convolution sums up in bfloat16 on such a CPU."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 4, stride=2, padding=1) if kind == "convolution" else nn.Linear(48, 8)
    x = torch.randn(64, 3, 16, 16) if kind == "convolution" else torch.randn(4096, 48)
    x.requires_grad_()
    with bfloat16(CPU, True):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    grad = torch.randn(y.shape).bfloat16() + 1
    y.backward(grad)

    own = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (x, layer.weight, layer.bias)]
    exact = F.conv2d(*own, 2, 1) if kind == "convolution" else F.linear(*own)
    exact.backward(grad.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)
    for tensor, other in zip((x, layer.weight, layer.bias), own, strict=True):
        assert tensor.grad.dtype == torch.float32
        atol = 1e-5 * float(other.grad.abs().max())
        torch.testing.assert_close(tensor.grad.double(), other.grad, rtol=2**-8, atol=atol)


def test_the_rest_stays_as_it_is():
    x = torch.randn(4, 4)
    with bfloat16(CPU, True):
        assert (x @ x).dtype == x.relu().dtype == torch.float32
        assert x.bfloat16().relu().dtype == torch.bfloat16
    with bfloat16(CPU, False):
        assert torch.equal(F.linear(x, x), x @ x.T)


def test_torch_has_its_own_on_newer_cpus(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    x = torch.randn(4, 4)
    with bfloat16(CPU, True):
        assert torch.is_autocast_enabled("cpu")
        assert F.linear(x, x).dtype == torch.bfloat16
