"""LoRA adapters of a pipeline, as diffusers has them for Wan, in any published spelling."""

import json
from collections.abc import Sequence
from typing import Any

from diffusers.loaders import WanLoraLoaderMixin

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.adapter_choice import AdapterChoice
from flashi2v_model.errors import InputError, named
from flashi2v_model.weights.adapter_files import open_adapter
from flashi2v_model.weights.adapter_spellings import CONFIG, read_adapter, spell


class LoraMixin(WanLoraLoaderMixin):
    """A pipeline whose transformer takes adapters.

    `set_adapters`, `fuse_lora`, `unfuse_lora`, `delete_adapters`, `unload_lora_weights`, `save_lora_weights` and others
    are those of diffusers.
    """

    _lora_loadable_modules = ["transformer"]  # noqa: RUF012 (diffusers declares it so)

    transformer: FlashI2VTransformer3DModel

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Any, return_lora_metadata: bool = False, **fetching: Any
    ) -> Any:
        """Return an adapter in diffusers' spelling.

        Args:
            pretrained_model_name_or_path_or_dict: as of `load_lora_weights`.
            return_lora_metadata: return a pair, with peft's configuration of it, or None, as the second.
            fetching: as of `load_lora_weights`.

        Raises:
            InputError: it is not there, is no adapter of this network, or has no place in that spelling.
        """
        state_dict, header = open_adapter(pretrained_model_name_or_path_or_dict, **fetching)
        spelled, written = spell(read_adapter(state_dict, header), "diffusers")
        config = {**written, **header}.get(CONFIG)
        return (spelled, config and json.loads(config)) if return_lora_metadata else spelled

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        load_into_transformer_2: bool = False,
        **fetching: Any,
    ) -> None:
        """Load a LoRA adapter, exactly or not at all: after an error the pipeline is what it was before.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a directory, a hub id or a state dict; diffusers' spelling,
                peft's, ComfyUI's, kohya's (musubi-tuner's), bare names, with biases, norms and tables too.
            adapter_name: what to call it; None: "default_0", "default_1", ...
            hotswap: put it in the place of the adapter of this name.
            low_cpu_mem_usage: make room for its tensors without drawing random numbers.
            load_into_transformer_2: there is none.
            fetching: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`.

        Raises:
            InputError: naming every key that the transformer has no place for; or the name is taken, or (for `hotswap`)
                not there; or peft is not installed.
        """
        if load_into_transformer_2:
            raise InputError("load_into_transformer_2: this pipeline has one transformer")
        if getattr(self, "transformer", None) is None:
            raise InputError("this pipeline has no transformer, which LoRA adapters are for")
        self.transformer.load_lora_adapter(
            pretrained_model_name_or_path_or_dict,
            adapter_name=adapter_name,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage,
            _pipeline=self,
            **fetching,
        )


def load_adapters(transformer: FlashI2VTransformer3DModel, choices: Sequence[AdapterChoice]) -> None:
    """Load adapters into a transformer, which may be without numbers, and weigh them as they are asked for.

    Raises:
        InputError: naming the adapter that does not fit.
    """
    names = [f"lora_{number}" for number in range(len(choices))]
    for name, choice in zip(names, choices):
        with named(f"--lora {choice.source}"):
            transformer.load_lora_adapter(choice.source, adapter_name=name, low_cpu_mem_usage=True)
    if names:
        transformer.set_adapters(names, [choice.scale for choice in choices])
        transformer.requires_grad_(False)
