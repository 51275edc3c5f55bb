"""What lies in a saved pipeline beside diffusers' own files: the model card, and the map of previews; and the hub."""

import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import create_repo

from flashi2v_infer.preview import FILE, vae_directories
from flashi2v_model.card import CARD, model_card

_OF_THE_HUB = ("repo_id", "commit_message", "private", "create_pr", "token", "subfolder")


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options that are of the hub out of all."""
    return {name: options.pop(name) for name in _OF_THE_HUB if name in options}


def write_beside(pipeline: Any, directory: Path, name: str) -> None:
    """Write a model card, unless one is there, and carry the map of previews along.

    Args:
        pipeline: a `FlashI2VPipeline`; the card and the map of the directory that it comes from are kept.
        directory: where it is saved.
        name: of the model.
    """
    source = Path(pipeline.config.get("_name_or_path") or "")
    card = directory / CARD
    if not card.exists() and pipeline.transformer is not None:
        if (source / CARD).is_file() and (source / "model_index.json").is_file():
            shutil.copyfile(source / CARD, card)
        else:
            card.write_text(model_card(name, pipeline.transformer.config, pipeline.defaults), encoding="utf-8")
    if pipeline.vae is not None and not (directory / "vae" / FILE).exists():
        found = next((place / FILE for place in vae_directories(pipeline) if (place / FILE).is_file()), None)
        if found is not None:
            shutil.copyfile(found, directory / "vae" / FILE)


def upload(
    pipeline: DiffusionPipeline,
    directory: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | None = None,
    subfolder: str | None = None,
) -> None:
    """Upload a saved pipeline to the hub; arguments as of `diffusers.DiffusionPipeline.push_to_hub`."""
    made = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
    pipeline._upload_folder(
        directory, made, token=token, commit_message=commit_message, create_pr=create_pr, subfolder=subfolder
    )
