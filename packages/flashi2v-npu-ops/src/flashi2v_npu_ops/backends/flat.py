"""Convolutions over frames without a 3-D kernel, which some devices lack or do slowly: exact in other words.

`taps`: one 2-D convolution, in which the frames that the kernel sees are channels, so that it also sums over them. As
many operations as a 3-D convolution; the input is copied once for each frame of the kernel.
`unfold`: for each frame of the result one matrix product, of the kernel and what it sees. As many operations; one frame
is copied as often as the kernel has elements.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashi2v_npu_ops.operators.convolution import Triple
from flashi2v_npu_ops.registry import Backend

taps = Backend("taps")
unfold = Backend("unfold")


@taps.serves("conv3d")
def by_taps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
) -> Tensor:
    """Convolve in two dimensions, over the channels of all frames that the kernel sees at once."""
    x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
    num_frames = _out_size(x.shape[2], weight.shape[2], stride[0], dilation[0])
    frames = x.transpose(1, 2).unflatten(2, (groups, -1))  # (B, F, groups, C / groups, H, W)
    parts = [frames[:, _seen(tap, num_frames, stride[0], dilation[0])] for tap in range(weight.shape[2])]
    seen = torch.stack(parts, 3).flatten(2, 4).flatten(0, 1)  # (B F', kf C, H, W)
    kernel = weight.transpose(1, 2).flatten(1, 2)  # (O, kf C / groups, kh, kw)
    out = F.conv2d(seen, kernel, bias, stride[1:], padding[1:], dilation[1:], groups)
    return out.unflatten(0, (-1, num_frames)).transpose(1, 2).contiguous()


@unfold.serves("conv3d")
def by_unfolding(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
) -> Tensor:
    """Multiply the kernel by what it sees, frame by frame."""
    x = F.pad(x, tuple(side for size in reversed(padding) for side in (size, size)))
    kernel = weight.shape[2:]
    num_frames, height, width = (_out_size(*axis) for axis in zip(x.shape[2:], kernel, stride, dilation))
    rows, columns = (
        [_seen(k, num, stride[i], dilation[i]) for k in range(kernel[i])] for i, num in ((1, height), (2, width))
    )
    matrix = weight.movedim(1, -1).flatten(1)  # (O, kf kh kw C / groups)
    start = x.new_zeros(weight.shape[0], 1) if bias is None else bias[:, None]  # (O, 1)
    out = []
    for frame in range(num_frames):
        looked = [x[:, :, frame * stride[0] + k * dilation[0]] for k in range(kernel[0])]  # (B, C, H, W)
        parts = [part[:, :, row, column] for part in looked for row in rows for column in columns]
        seen = (
            torch.stack(parts, 1).unflatten(2, (groups, -1)).transpose(1, 2)
        )  # (B, groups, kf kh kw, C / groups, H', W')
        made = [
            torch.baddbmm(s.expand(x.shape[0], -1, height * width), m.expand(x.shape[0], -1, -1), part)
            for s, m, part in zip(start.chunk(groups), matrix.chunk(groups), seen.flatten(2, 3).flatten(3).unbind(1))
        ]
        out.append(torch.cat(made, 1).unflatten(2, (height, width)))
    return torch.stack(out, 2)


def by_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Embed patches: a kernel as large as its stride sees each element once, so that nothing is copied twice."""
    batch, channels = x.shape[:2]
    grid = [size // step for size, step in zip(x.shape[2:], weight.shape[2:])]
    f, h, w = weight.shape[2:]
    x = x[:, :, : grid[0] * f, : grid[1] * h, : grid[2] * w]
    patches = x.reshape(batch, channels, grid[0], f, grid[1], h, grid[2], w).permute(0, 2, 4, 6, 1, 3, 5, 7)
    tokens = F.linear(patches.flatten(4).flatten(1, 3), weight.flatten(1), bias)  # (B, N, O)
    return tokens.transpose(1, 2).unflatten(2, grid)


def is_patches(weight: Tensor, stride: Triple, padding: Triple, dilation: Triple, groups: int) -> bool:
    """Say whether `by_patches` serves a convolution."""
    return tuple(weight.shape[2:]) == tuple(stride) and not any(padding) and set(dilation) == {1} and groups == 1


def _out_size(size: int, kernel: int, stride: int, dilation: int) -> int:
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def _seen(tap: int, num: int, stride: int, dilation: int) -> slice:
    """Return what an element of the kernel sees along an axis, for `num` results."""
    start = tap * dilation
    return slice(start, start + (num - 1) * stride + 1, stride)
