"""Convolutions of another library's module, served by the operator."""

import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flashi2v_npu_ops import route_conv3d
from flashi2v_npu_ops.operators import convolution


@pytest.fixture
def depths(monkeypatch) -> list[int]:
    """How many frames each kernel that the operator was given has."""
    met = []
    plain = convolution.conv3d

    def counted(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        met.append(weight.shape[2])
        return plain(x, weight, *rest)

    monkeypatch.setattr(convolution, "conv3d", counted)
    return met


def causal(zeros: int) -> nn.Conv3d:
    """A convolution whose kernel's first frames are zero; it is given its past, as Wan's VAE does."""
    torch.manual_seed(0)
    layer = nn.Conv3d(2, 3, 3, padding=(0, 1, 1))
    with torch.no_grad():
        layer.weight[:, :, :zeros] = 0
    return layer


@torch.no_grad()
@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_frames_that_a_kernel_weighs_by_zero_are_not_met(zeros, depths):
    layer, x = causal(zeros), torch.randn(1, 2, 5, 4, 4)
    expected = layer(x)
    route_conv3d(layer, skips_zeros=True)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0.0)
    assert depths == [3 - zeros]


@torch.no_grad()
def test_other_weights_are_looked_at_again(depths):
    layer, other, x = causal(2), causal(0), torch.randn(1, 2, 5, 4, 4)
    route_conv3d(layer, skips_zeros=True)
    layer(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x), atol=1e-6, rtol=0.0)
    layer.load_state_dict(causal(1).state_dict(), assign=True)
    torch.testing.assert_close(layer(x), causal(1)(x), atol=1e-6, rtol=0.0)
    again = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(again(x), layer(x), atol=1e-6, rtol=0.0)
    assert depths == [1, 3, 2, 2, 2]


@torch.no_grad()
def test_nothing_is_left_out_where_that_would_change_the_result(depths):
    x = torch.randn(1, 2, 5, 4, 4)
    padded, unasked, empty = causal(2), causal(2), causal(3)
    padded.padding = (1, 1, 1)
    expected = [layer(x) for layer in (padded, unasked, empty)]
    route_conv3d(padded, skips_zeros=True)
    route_conv3d(unasked)
    route_conv3d(empty, skips_zeros=True)
    for layer, result in zip((padded, unasked, empty), expected):
        torch.testing.assert_close(layer(x), result, atol=1e-6, rtol=0.0)
    assert depths == [3, 3, 3]


@torch.no_grad()
def test_shapes_are_enough():
    with FakeTensorMode():
        layer, x = nn.Conv3d(2, 3, 3, padding=(0, 1, 1)), torch.randn(1, 2, 5, 4, 4)
        route_conv3d(layer, skips_zeros=True)
        assert layer(x).shape == (1, 3, 3, 4, 4)
    layer = nn.Conv3d(2, 3, 3, padding=(0, 1, 1), device="meta")
    route_conv3d(layer, skips_zeros=True)
    assert layer(torch.empty(1, 2, 5, 4, 4, device="meta")).shape == (1, 3, 3, 4, 4)
