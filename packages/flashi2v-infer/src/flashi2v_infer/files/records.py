"""What a video's record says: all that made it, so that it can be made again, or recognised as finished."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from flashi2v_infer.settings import Request

_PACKAGES = ("flashi2v-infer", "flashi2v-model", "flashi2v-npu-ops", "torch", "diffusers", "transformers")

# Names, by which the same things may go elsewhere: their contents count.
_NAMES = ("image", "model", "lora")
_KNOWN_BEFORE = (
    *("settings.conditioning.", "settings.speed"),
    *("model_settings.network.", "model_settings.lora", "model_settings.quantize"),
)


def versions() -> dict[str, str]:
    """Return the versions of what a video depends on."""
    return {name: version(name) for name in _PACKAGES}


@dataclass(frozen=True)
class Source:
    """The model that videos come from.

    Attributes:
        name: of the model, as it was given.
        settings: of its parts.
        weights: fingerprints of its parts.
        lora: its adapters, as they were given.
    """

    name: str
    settings: Mapping[str, Any]
    weights: Mapping[str, str]
    lora: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return what a record says of the model, as JSON gives it back."""
        facts = {"model": self.name, "model_settings": self.settings, "weights": self.weights}
        return _as_json(facts | ({"lora": self.lora} if self.lora else {}))


def origin(request: Request, image_contents: str, source: Source | None = None) -> dict[str, Any]:
    """Return the part of a record that is known before sampling, as JSON gives it back.

    Args:
        request: what is to be sampled.
        image_contents: hash of the image's file.
        source: the model; None where it is known only once it is loaded.
    """
    facts = _as_json({**asdict(request), "image_contents": image_contents})
    if facts["settings"]["speed"] == "exact":  # as all videos were before there was a choice
        del facts["settings"]["speed"]
    return facts if source is None else facts | source.facts()


def _as_json(facts: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(facts)))


def differences(record: Mapping[str, Any], origin: Mapping[str, Any]) -> list[str]:
    """Say in which facts a record differs from an `origin`; versions and devices are no such facts."""
    then, now = dict(_flatten(record)), dict(_flatten(origin))
    # A record holds more than what is known before sampling; of these everything is.
    now |= {key: None for key in then if key.startswith(_KNOWN_BEFORE) and key not in now}
    return [
        f"{key} was {_short(then.get(key))}, is {_short(value)}"
        for key, value in now.items()
        if key not in _NAMES and (key not in then or then[key] != value)
    ]


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
