"""What the files of a run name that is not here: what it is, how large, and where it comes from.

Sizes are those of the published weights, counted from their parameters where it is not said in which type they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashi2v_data.loading.config import DataConfig, DatasetParam
from flashi2v_data.settings import load_config
from flashi2v_model.config import PredictorConfig

if TYPE_CHECKING:
    from flashi2v_train.config import RunConfig

WAN_1_3B, WAN_14B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
RELEASED = "yunyangge/FlashI2V-1.3B"
# The encoders of Wan2.1, the same for all its sizes.
ENCODERS = {
    "vae": ("Wan2.1's VAE", "0.5 GB"),
    "text_encoder": ("UMT5-XXL, the text encoder", "11 GB in bf16, 23 GB in fp32"),
    "tokenizer": ("the text encoder's tokenizer", "21 MB"),
}
_WIDTHS = {1536: "1.3B", 5120: "14B"}


@dataclass(frozen=True)
class Missing:
    """A file or directory that is not here.

    Attributes:
        key: that names it, behind its file.
        path: as it stands there.
        what: it is.
        size: in words.
        source: where it comes from: a command, mostly.
        reason: what is wrong, for who must not go on.
    """

    key: str
    path: str
    what: str
    size: str
    source: str
    reason: str

    def __str__(self) -> str:
        """Return what an error says."""
        return f"{self.key}: {self.reason}"


def download(repository: str, part: str, path: str) -> str:
    """Return the command that puts a part of a model where a file expects it."""
    directory = Path(path)
    place = str(directory.parent if directory.name == part else directory)
    return f"hf download {repository} --include '{part}/*' --local-dir {place or '.'}"


def find_missing(config: "RunConfig", *, encodes: bool = False, num_parameters: int | None = None) -> list[Missing]:
    """Return all that the files of a run name and that is not here.

    Args:
        config: of the run.
        encodes: for encoding ahead, which needs no transformer and makes the features.
        num_parameters: of the transformer, where its size is asked for.
    """
    options, model, data = config.options, config.model, config.data.dataset_param
    predictor = model.predictor
    encoders = {
        "vae": (f"{options.mm_model}: ae.from_pretrained", model.ae.from_pretrained),
        "text_encoder": (f"{options.mm_model}: text_encoder.from_pretrained", model.text_encoder.from_pretrained),
        "tokenizer": (f"{options.mm_data}: dataset_param.text_tokenizer_path", data.text_tokenizer_path),
    }
    found = [_missing_encoder(key, part, path, predictor) for part, (key, path) in encoders.items()]
    if not encodes:
        found.append(_missing_weights(f"{options.mm_model}: predictor.from_pretrained", predictor, num_parameters))
    found += _missing_data(options.mm_data, data)
    if options.eval_data is not None:
        found += _missing_data(options.eval_data, load_config(options.eval_data, DataConfig).dataset_param)
    return [missing for missing in found if missing is not None]


def hub_ids(config: "RunConfig") -> list[str]:
    """Return what is looked up on the hub when the run starts: names that are no directories here."""
    names = (config.model.ae.from_pretrained, config.model.text_encoder.from_pretrained)
    return [name for name in names if _is_hub_id(name) and not Path(name).is_dir()]


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith(("/", "."))


def _missing_encoder(key: str, part: str, path: str, predictor: PredictorConfig) -> Missing | None:
    """Return an encoder that is neither a directory nor, by its form, a hub id.

    Args:
        key: that names it.
        part: `vae`, `text_encoder` or `tokenizer`.
        path: as it stands there.
        predictor: for which it encodes.
    """
    if Path(path).is_dir() or (part != "tokenizer" and _is_hub_id(path)):
        return None
    what, size = ENCODERS[part]
    source = download(WAN_1_3B, part, path)
    if predictor.text_dim != 4096:  # not Wan2.1's
        what, size, source = part.replace("_", " "), "unknown", "the model that it was trained with"
    reason = f"no directory {path!r}: set it to a directory in diffusers' layout or to a hub id"
    if part == "tokenizer":
        reason = f"no such directory: {path}"
    return Missing(key, path, what, size, source, reason)


def _missing_weights(key: str, predictor: PredictorConfig, num_parameters: int | None) -> Missing | None:
    """Return the weights to start from, if they are not here."""
    path = predictor.from_pretrained
    if path is None or Path(path).exists():
        return None
    name = _WIDTHS.get(predictor.hidden_size)
    what = f"weights of the transformer ({name or f'width {predictor.hidden_size}'})"
    number = num_parameters or 0
    size = f"{_bytes(2 * number)} in bf16, {_bytes(4 * number)} in fp32" if number else "unknown"
    sources = {
        "1.3B": f"hf download {RELEASED} (or, to start from the text-to-video model, {WAN_1_3B})",
        "14B": f"hf download {WAN_14B} --include 'transformer/*' (the text-to-video model)",
    }
    return Missing(key, path, what, size, sources.get(name or "", "whoever trained it"), f"{path} does not exist")


def _missing_data(file: Path, data: DatasetParam) -> Iterator[Missing]:
    """Yield what a data file names that the other commands make of videos."""
    prefix = f"{file}: dataset_param"
    store = data.metafile_or_dir_path
    if not Path(store).exists():
        yield Missing(
            f"{prefix}.metafile_or_dir_path",
            store,
            "the clips to train on (LMDB)",
            "1 kB a clip",
            "flashi2v-data filter, from meta JSON",
            f"{store}: no such LMDB; write one with `flashi2v-data filter`",
        )
    features = data.features_path
    if features is not None and not Path(features).exists():
        yield Missing(
            f"{prefix}.features_path",
            features,
            "latents and text states, encoded ahead",
            _bytes(_features_bytes(data)) + " a clip",
            "flashi2v-encode",
            f"{features} is no store that flashi2v-encode has finished: run it first",
        )


def _features_bytes(data: DatasetParam) -> int:
    """Return what a clip's features take: mean and std of all frames and of the first, of 16 channels in fp32."""
    frames = (data.sample_num_frames - 1) // 4 + 2
    return 2 * 4 * 16 * frames * (data.sample_height // 8) * (data.sample_width // 8)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
