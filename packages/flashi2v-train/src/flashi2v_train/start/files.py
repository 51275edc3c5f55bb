"""The files of a run, as the reference has them, short and commented: the texts are `templates`."""

import json
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flashi2v_data.curation.config import FilterConfig
from flashi2v_model.config import PredictorConfig
from flashi2v_train.options import flag
from flashi2v_train.start.base import Base
from flashi2v_train.start.options import InitOptions

if TYPE_CHECKING:
    from flashi2v_train.start.memory import Devices, Fit

SETTINGS = ("filter.yaml", "data.json", "model.json")
_SHOWN = ("hidden_size", "ffn_dim", "num_heads", "num_layers", "text_dim")  # even where they are the default


class _Pace(NamedTuple):
    """How fast is learnt."""

    rate: float
    warmup: int
    ema_decay: float
    projection: int = 1  # times the rate, of the new layers


# Of a large model, of a small one; and of their adapters.
_PACES = (_Pace(1e-5, 100, 0.999), _Pace(5e-4, 20, 0.98, projection=5))
_LORA_PACES = (_Pace(1e-4, 100, 0.999), _Pace(2e-3, 20, 0.98))


@dataclass(frozen=True)
class Plan:
    """All that the files say.

    Attributes:
        run: their directory, as the user named it.
        options: that the user gave.
        base: what to start from.
        limits: of the filter.
        num_frames: of a sample.
        text_length: tokens of a caption.
        held_out: clips kept from training.
        devices: to train on.
        batch: samples of a step.
        steps: of training.
        prompt: of the first frame, to sample from.
        lora: options of adapters; none where all weights are trained.
    """

    run: Path
    options: InitOptions
    base: Base
    limits: FilterConfig
    num_frames: int
    text_length: int
    held_out: int
    devices: "Devices"
    batch: int
    steps: int
    prompt: str
    lora: dict[str, Any]

    def write(self, directory: Path, name: str, fit: "Fit | None" = None) -> None:
        """Write a file.

        Args:
            directory: where.
            name: one of `SETTINGS`, or run.sh.
            fit: how the devices' memory is used, for run.sh.
        """
        defaults = {name: field.default for name, field in PredictorConfig.model_fields.items()}
        predictor = self.base.predictor | {"text_len": self.text_length}
        chosen = {name: value for name, value in predictor.items() if name in _SHOWN or value != defaults[name]}
        paces = _LORA_PACES if self.lora else _PACES
        text = _TEMPLATES.get_template(name).render(
            vars(self),
            fit=fit,
            here=Path.cwd(),
            keeps_average=fit is None or fit.saving.options.get("use_ema", True),
            often=max(1, self.steps // 4),
            on_cpu=self.devices.kind == "cpu",
            pace=paces[self.base.is_small],
            predictor=chosen,
            # Unless it is an adapter of a model that is here.
            writes_model=not (self.lora and self.base.samples),
        )
        (directory / name).write_text(text, "utf-8")

    def as_options(self, directory: Path) -> dict[str, Any]:
        """Return the options under which the run is checked before anything is written under its name."""
        return {
            "mm_model": directory / "model.json",
            "mm_data": directory / "data.json",
            "save": self.run / "train",
            "dry_run": True,
            "nproc_per_node": self.devices.number,
            "global_batch_size": self.batch,
            **self.lora,
        }


def _words(options: dict[str, Any]) -> str:
    """Return options of `flashi2v-train` as one types them, each behind a space."""
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            each = value if isinstance(value, list) else [value]
            words += [f"{flag(name)} {shlex.quote(str(one))}" for one in each]
    return "".join(f" {word}" for word in words)


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {
    "json": partial(json.dumps, default=str),
    "quote": lambda path: shlex.quote(str(path)),
    "words": _words,
}
