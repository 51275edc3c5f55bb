"""A VAE's tiles shared among processes: each computes some, all of them get all.

Which tiles there are, and how they are blended, is diffusers' own code: it is run with parts that play back what the
processes computed. So a video has the same seams, bit for bit, as in one process.

B batch, C channels, F frames, H W latent grid or pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from flashi2v_model.config import TEMPORAL_STRIDE

# Rows and columns of a tile in what it is cut from.
Tile = tuple[slice, slice]


def parallelise_tiles(vae: AutoencoderKLWan, group: dist.ProcessGroup) -> None:
    """Let processes share the tiles of whatever a VAE encodes or decodes in tiles; all give and get the whole.

    Where it uses no tiles nothing changes: each process computes all.

    Args:
        vae: its settings of tiles may change later, on all processes alike.
        group: the processes.
    """
    decode, encode = vae.tiled_decode, vae.tiled_encode

    def tiled_decode(z: Tensor, return_dict: bool = True) -> Any:
        tiles = tiles_of(z.shape[-2:], *_sides(vae, vae.spatial_compression_ratio))
        parts = _shared(tiles, lambda rows, columns: _decoded(vae, z[..., rows, columns]), group)
        with _played_back(vae, "decoder", parts):
            return decode(z, return_dict=return_dict)

    def tiled_encode(x: Tensor) -> Any:
        tiles = tiles_of(x.shape[-2:], *_sides(vae, 1))
        parts = _shared(tiles, lambda rows, columns: _encoded(vae, x[..., rows, columns]), group)
        with _played_back(vae, "encoder", parts):
            return encode(x)

    vae.tiled_decode, vae.tiled_encode = tiled_decode, tiled_encode


def tiles_of(size: Sequence[int], sides: tuple[int, int], strides: tuple[int, int]) -> list[Tile]:
    """Return the tiles of a picture, row by row, as diffusers cuts them: the last ones may be smaller."""
    rows, columns = (
        [slice(start, min(start + side, length)) for start in range(0, length, stride)]
        for length, side, stride in zip(size, sides, strides)
    )
    return [(row, column) for row in rows for column in columns]


def owners(tiles: Sequence[Tile], num_processes: int) -> list[int]:
    """Return which process computes each tile, such that the slowest has little to do: large ones are given first."""
    areas = [(row.stop - row.start) * (column.stop - column.start) for row, column in tiles]
    chosen, busy = [0] * len(tiles), [0] * num_processes
    for number in sorted(range(len(tiles)), key=lambda number: -areas[number]):
        chosen[number] = busy.index(min(busy))
        busy[chosen[number]] += areas[number]
    return chosen


def _sides(vae: AutoencoderKLWan, scale: int) -> tuple[tuple[int, int], tuple[int, int]]:
    sides = vae.tile_sample_min_height // scale, vae.tile_sample_min_width // scale
    return sides, (vae.tile_sample_stride_height // scale, vae.tile_sample_stride_width // scale)


def _decoded(vae: AutoencoderKLWan, z: Tensor) -> list[Tensor]:
    """Return what the decoder makes of each latent frame of a tile."""
    vae.clear_cache()
    frames = []
    for number, frame in enumerate(z.split(1, 2)):
        vae._conv_idx = [0]
        frame = vae.post_quant_conv(frame)
        frames.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=number == 0))
    vae.clear_cache()
    return frames


def _encoded(vae: AutoencoderKLWan, x: Tensor) -> list[Tensor]:
    """Return what the encoder makes of the first frame of a tile, and of each four behind it."""
    vae.clear_cache()
    frames = []
    for part in (x[:, :, :1], *x[:, :, 1:].split(TEMPORAL_STRIDE, 2)):
        if part.shape[2]:
            vae._enc_conv_idx = [0]
            frames.append(vae.encoder(part, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
    vae.clear_cache()
    return frames


def _shared(
    tiles: Sequence[Tile], compute: Callable[[slice, slice], list[Tensor]], group: dist.ProcessGroup
) -> Iterator[Tensor]:
    """Compute this process's tiles; return what exchanges them with the others', the parts of all in order."""
    computed_by = owners(tiles, group.size())
    own = {n: compute(*tile) for n, tile in enumerate(tiles) if computed_by[n] == group.rank()}
    described = {n: [(tuple(part.shape), part.dtype, part.device.type) for part in parts] for n, parts in own.items()}
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, described, group)
    shapes = {n: found for each in told for n, found in each.items()}
    return _exchanged(own, [(owner, shapes[number]) for number, owner in enumerate(computed_by)], group)


def _exchanged(
    own: dict[int, list[Tensor]], tiles: Sequence[tuple[int, Sequence[Any]]], group: dist.ProcessGroup
) -> Iterator[Tensor]:
    for number, (owner, shapes) in enumerate(tiles):
        parts = own.pop(number, None)
        for place, (shape, dtype, device) in enumerate(shapes):
            part = torch.empty(shape, dtype=dtype, device=device) if parts is None else parts[place].contiguous()
            dist.broadcast(part, group=group, group_src=owner)
            yield part


@contextmanager
def _played_back(vae: AutoencoderKLWan, name: str, parts: Iterator[Tensor]) -> Iterator[None]:
    """Let a part of the VAE return, call by call, what was computed before."""
    real = getattr(vae, name)
    setattr(vae, name, _Playback(parts))
    try:
        yield
    finally:
        setattr(vae, name, real)


class _Playback(nn.Module):
    def __init__(self, parts: Iterator[Tensor]) -> None:
        super().__init__()
        self._parts = parts

    def forward(self, x: Tensor, **caches: Any) -> Tensor:
        return next(self._parts)
