"""What a run starts from: the demo model, a directory, or a model of the hub."""

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from flashi2v_data.errors import InputError
from flashi2v_train.downloads import ENCODERS, RELEASED, WAN_1_3B, WAN_14B, download

DEMO, WAN = "demo", "Wan2.1"
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
# Of the hub's models, what need not be asked for: the transformer's settings, where they are not the default.
_1_3B: dict[str, Any] = {"hidden_size": 1536, "num_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_14B: dict[str, Any] = {"hidden_size": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_KNOWN = {WAN_1_3B: _1_3B, WAN_14B: _14B, RELEASED: _1_3B}
_SIZES = {WAN_1_3B: "5.7 GB", WAN_14B: "57 GB", RELEASED: "up to 5.7 GB"}
# The names of a transformer's settings in the reference's files.
_NAMES = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "rope_max_seq_len": "max_seq_len",
    **{name: name for name in ("text_dim", "freq_dim", "ffn_dim", "num_layers", "eps", "text_len")},
    **{name: name for name in ("cross_attn_norm", "conv3x3x3_proj", "low_freq_proj", "fft_return_abs")},
}


class Download(NamedTuple):
    """What must be fetched first."""

    command: str
    what: str
    size: str
    place: str  # that it fills


@dataclass(frozen=True)
class Base:
    """What to start from.

    Attributes:
        name: as the user gave it.
        predictor: the transformer's settings, under the names of the reference's files.
        paths: of `transformer`, `vae`, `text_encoder` and `tokenizer`.
        encoders: directory that holds the last three.
        downloads: what is not here.
        pixels: of a frame that the model was made for.
        frames: likewise.
        copies: from where its small parts are copied into the run, to be changed there; None: they stay.
        is_trunk: it lacks FlashI2V's new layers.
        samples: it is a whole model that `flashi2v-infer --model` takes, by the name of `encoders`.
    """

    name: str
    predictor: dict[str, Any]
    paths: dict[str, str]
    encoders: str
    pixels: int
    frames: int
    downloads: list[Download] = field(default_factory=list)
    copies: Path | None = None
    is_trunk: bool = False
    samples: bool = False

    @property
    def is_small(self) -> bool:
        """Whether it trains on a laptop."""
        return self.predictor.get("hidden_size", 1536) < 1024


def find(name: str, run: Path) -> Base:
    """Return what to start from.

    Args:
        name: demo, Wan2.1, a directory in diffusers' layout, or a hub id.
        run: directory of the files to come.

    Raises:
        InputError: there is no such model, or it is not one to train from.
    """
    if name == DEMO:
        return _demo(run)
    directory = Path(name)
    if directory.is_dir():
        missing = [part for part in _PARTS if not (directory / part).is_dir()]
        if missing:
            raise InputError(f"--from {name}: lacks {', '.join(missing)}: name a directory in diffusers' layout")
        return _of_directory(name, directory, {part: str(directory / part) for part in _PARTS})
    repository = {WAN: WAN_1_3B}.get(name, name)
    if repository in _KNOWN:
        return _of_hub(name, repository, _KNOWN[repository], is_trunk=repository != RELEASED)
    if name.count("/") != 1 or name.startswith(("/", ".")):
        raise InputError(f"--from {name}: no such directory; name one, a hub id (owner/name), {DEMO} or {WAN}")
    asked = _asked(repository)
    return _of_hub(name, repository, asked.predictor, is_trunk=asked.is_trunk)


def _demo(run: Path) -> Base:
    # Its package is beside this one, not below it: looked up, not imported.
    found = importlib.util.find_spec("flashi2v_infer")
    if found is None or found.origin is None:
        raise InputError("--from demo: the model comes with flashi2v-infer: pip install flashi2v-infer")
    source, copy = Path(found.origin).parent / "demo" / "model", run / "base"
    base = _of_directory(DEMO, source, {part: str(copy / part) for part in _PARTS})
    return replace(base, encoders=str(copy), copies=source)


def _of_directory(name: str, directory: Path, paths: dict[str, str]) -> Base:
    from flashi2v_model.weights.reading import read_json
    from flashi2v_model.weights.settings import DEFAULTS, stored_settings

    _, stored = stored_settings(directory / "transformer")
    settings = DEFAULTS | stored
    predictor = {ours: settings[theirs] for theirs, ours in _NAMES.items() if settings.get(theirs) is not None}
    predictor["hidden_size"] = settings["num_attention_heads"] * settings["attention_head_dim"]
    predictor["patch_size"] = tuple(settings["patch_size"])
    predictor["qk_norm"] = settings["qk_norm"] is not None
    large = predictor["text_dim"] == 4096
    config = directory / "transformer" / "config.json"
    is_trunk = config.is_file() and read_json(config).get("_class_name") in ("WanTransformer3DModel", "WanModel")
    return Base(
        name, predictor, paths, str(directory), 480 * 832 if large else 64 * 64, 49 if large else 17,
        is_trunk=is_trunk, samples=not is_trunk and (directory / "model_index.json").is_file(),
    )  # fmt: skip


def _of_hub(name: str, repository: str, predictor: dict[str, Any], *, is_trunk: bool) -> Base:
    directory = Path("models") / repository.split("/")[1]
    sources = {part: (repository, part) for part in _PARTS}
    paths = {part: str(directory / part) for part in _PARTS}
    if repository == RELEASED:  # its encoders are those of Wan2.1
        sources = {part: (WAN_1_3B, part) for part in _PARTS} | {"transformer": (RELEASED, "npu")}
        paths["transformer"] = str(directory / "npu" / "flashi2v_1_3B.pt")
    downloads = []
    for part, (owner, folder) in sources.items():
        if not Path(paths[part]).exists():
            place = str(directory / folder)
            what, size = ENCODERS.get(part, ("weights of the transformer", _SIZES.get(repository, "size unknown")))
            downloads.append(Download(download(owner, folder, place), what, size, place))
    return Base(name, predictor, paths, str(directory), 480 * 832, 49, downloads, is_trunk=is_trunk)


def _asked(repository: str) -> Base:
    """Read the transformer's settings from the hub, a few hundred bytes."""
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(repository, "transformer/config.json"))
    except Exception as error:  # whatever the library raises of a network, a name, a right
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--from {repository}: the hub cannot be asked ({reason}): download it, and name it") from None
    return _of_directory(repository, config.parent.parent, {})
