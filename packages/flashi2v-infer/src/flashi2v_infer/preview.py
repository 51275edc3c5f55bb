"""Pictures of latents without the VAE: a linear map from their channels to colours, which takes milliseconds.

A map belongs to a VAE and lies beside its weights, as preview.json. To fit one for any VAE of Wan's kind:

    python -m flashi2v_infer.preview MODEL/vae VIDEOS...

VIDEOS are files or folders of them; they are encoded, and the map is the least-squares solution that leads from a
latent to the mean colour of the 8 x 8 pixels and 4 frames that it stands for.

C latent channels, F latent frames, H W latent grid.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cyclopts import App
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from flashi2v_data.atomic import atomic_file
from flashi2v_data.console import run
from flashi2v_data.curation.folder import VIDEOS
from flashi2v_data.errors import InputError
from flashi2v_data.loading.transforms import normalise, to_tensor
from flashi2v_data.video.decode import read_frames
from flashi2v_data.video.probe import probe
from flashi2v_model.config import SPATIAL_STRIDE, TEMPORAL_STRIDE
from flashi2v_model.encoders import encode_video
from flashi2v_model.weights.reading import read_json

app = App(name="python -m flashi2v_infer.preview", help_format="plaintext", version_flags=[])

FILE = "preview.json"
_SMALLEST = 256  # pixels of the longer side of a picture
_LONGEST, _LARGEST = 17, 480  # frames and rows of the videos that a map is fitted on

# Of Wan2.1's VAE, as ComfyUI publishes them (comfy/latent_formats.py, class Wan21): red, green and blue of each of 16
# channels, and what is added.
_WAN_WEIGHT = (
    *((-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420)),
    *((0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975)),
    *((-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639)),
    *((-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861)),
)
_WAN_BIAS = (-0.1835, -0.0868, -0.3360)
_WAN = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}


@dataclass(frozen=True)
class PreviewMap:
    """From normalised latents to colours in [-1, 1].

    Attributes:
        weight: (C, 3).
        bias: (3,).
    """

    weight: Tensor
    bias: Tensor

    def colours(self, latents: Tensor) -> Tensor:
        """Return (..., F, H, W, 3) in [-1, 1] of latents (..., C, F, H, W)."""
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        return torch.einsum("...cfhw,cr->...fhwr", latents.float(), weight) + bias

    def pictures(self, latents: Tensor) -> list[list[Image.Image]]:
        """Return a picture for every latent frame of every video, for latents (B, C, F, H, W).

        Raises:
            InputError: the latents have another number of channels.
        """
        if latents.ndim != 5 or latents.shape[1] != len(self.weight):
            raise InputError(f"preview: latents must be (B, {len(self.weight)}, F, H, W), got {tuple(latents.shape)}")
        colours = self.colours(latents.detach()).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        height, width = latents.shape[3:]
        scale = max(1, math.ceil(_SMALLEST / max(height, width)))
        size = (width * scale, height * scale)
        return [[Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in video] for video in colours]


class PreviewMixin:
    """A pipeline that shows latents as pictures."""

    vae: AutoencoderKLWan
    _preview: PreviewMap | None = None

    def preview(self, latents: Tensor) -> list[list[Image.Image]]:
        """Return a picture for every latent frame, by a linear map: milliseconds, for callbacks that show progress.

        Args:
            latents: (B, C, F, H, W), normalised, as callbacks are given them; "denoised" shows shapes from the second
                step on, where "latents" are noise until late.

        Raises:
            InputError: no map is known for this VAE; the message says how to fit one.
        """
        return self.preview_map().pictures(latents)

    def preview_map(self) -> PreviewMap:
        """Return the map that `preview` draws by.

        Raises:
            InputError: none is known for this VAE; the message says how to fit one.
        """
        if self._preview is None:
            self._preview = map_of(self.vae, vae_directories(self))
        return self._preview


def vae_directories(pipeline: Any) -> tuple[Path, ...]:
    """Return where the VAE's weights may have come from."""
    own, whole = (Path(part.config.get("_name_or_path") or "") for part in (pipeline.vae, pipeline))
    return own, own / "vae", whole / "vae"


def map_of(vae: AutoencoderKLWan, directories: Iterable[Path]) -> PreviewMap:
    """Return the map of a VAE: the one that lies in one of the directories, or Wan2.1's published one.

    Raises:
        InputError: there is none, or the file is malformed.
    """
    for directory in directories:
        if (directory / FILE).is_file():
            return read_map(directory / FILE)
    if all(vae.config.get(key) == value for key, value in _WAN.items()):
        return PreviewMap(torch.tensor(_WAN_WEIGHT), torch.tensor(_WAN_BIAS))
    raise InputError(f"there is no {FILE} beside this VAE: fit one by `python -m flashi2v_infer.preview VAE VIDEOS`")


def read_map(file: Path) -> PreviewMap:
    """Read a map.

    Raises:
        InputError: it is malformed.
    """
    values = read_json(file)
    try:
        found = PreviewMap(torch.tensor(values["weight"]).float(), torch.tensor(values["bias"]).float())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{file} must hold weight, three numbers for each channel, and bias: {error}") from None
    if found.weight.shape[1:] != (3,) or found.bias.shape != (3,):
        raise InputError(f"{file} must hold weight (C, 3) and bias (3), got {tuple(found.weight.shape)}")
    return found


def write_map(found: PreviewMap, file: Path, source: str) -> None:
    """Write a map, with a word on what it was fitted on."""
    values = {"source": source, "weight": _rounded(found.weight), "bias": _rounded(found.bias)}
    with atomic_file(file) as path:
        path.write_text(json.dumps(values, indent=1) + "\n")


def _rounded(tensor: Tensor) -> list[object]:
    return np.round(tensor.double().numpy(), 4).tolist()


@torch.no_grad()
def fit(vae: AutoencoderKLWan, videos: Iterable[Tensor]) -> tuple[PreviewMap, float]:
    """Fit the map of a VAE.

    Args:
        vae: the encoder.
        videos: (3, T, 8H, 8W) in [-1, 1] each, T = 4k + 1.

    Returns:
        the map, and the share of the colours' variance that it explains.
    """
    inputs, targets = [], []
    for video in videos:
        latents = encode_video(vae, video[None].to(vae.device))[0].cpu()  # (C, F, H, W)
        pixels = F.avg_pool2d(video.movedim(1, 0), SPATIAL_STRIDE)  # (T, 3, H, W)
        later = pixels[1:].unflatten(0, (-1, TEMPORAL_STRIDE)).mean(1)
        targets.append(torch.cat((pixels[:1], later)).movedim(1, -1).flatten(0, 2))  # (F H W, 3)
        inputs.append(latents.movedim(0, -1).flatten(0, 2))  # (F H W, C)
    x, y = torch.cat(inputs).double(), torch.cat(targets).double()
    with_one = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    solution = torch.linalg.lstsq(with_one, y).solution  # (C + 1, 3)
    explained = 1 - (with_one @ solution - y).square().sum() / (y - y.mean(0)).square().sum()
    return PreviewMap(solution[:-1].float(), solution[-1].float()), float(explained)


def _videos(paths: Sequence[Path]) -> Iterator[Tensor]:
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    for file in files:
        if file.suffix.lower() in VIDEOS:
            yield _read(file)


def _read(file: Path) -> Tensor:
    """Read the start of a video as (3, T, 8H, 8W) in [-1, 1], of a size that encodes quickly."""
    facts = probe(str(file))
    frames = min(_LONGEST, (facts.num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
    video = normalise(to_tensor(read_frames(file, range(frames))))  # (3, T, rows, columns)
    height, width = video.shape[2:]
    shrink = min(1.0, _LARGEST / height)
    size = [max(1, round(side * shrink / SPATIAL_STRIDE)) * SPATIAL_STRIDE for side in (height, width)]
    return F.interpolate(video.movedim(1, 0), size, mode="bilinear", antialias=True).movedim(0, 1)


@app.default
def fit_files(vae: Path, *videos: Path) -> None:
    """Fit the map of a VAE on videos, and store it beside the VAE.

    Example: python -m flashi2v_infer.preview my-model/vae videos

    Parameters
    ----------
    vae
        the VAE's directory
    videos
        files, or folders of them
    """
    if not (vae / "config.json").is_file():
        raise InputError(f"{vae}: holds no config.json: name the directory of a VAE, such as my-model/vae")
    if missing := [str(path) for path in videos if not path.exists()]:
        raise InputError(f"no such file: {missing[0]}")
    model = AutoencoderKLWan.from_pretrained(vae).eval()
    found = list(_videos(videos))
    if not found:
        raise InputError(f"no videos are given, which end in {', '.join(VIDEOS)}: name files, or folders of them")
    fitted, explained = fit(model, found)
    write_map(fitted, vae / FILE, f"least squares over {len(found)} videos, {explained:.1%} of the variance")
    print(f"wrote {vae / FILE}: {explained:.1%} of the colours' variance in {len(found)} videos")


if __name__ == "__main__":
    run(app)
