"""What diffusers offers to speed a transformer up, on ours: caches, attention kernels, processes that share a video.

What would have no effect, or mix up what does not belong together, is refused, rather than taken in silence.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from flashi2v_model.caching import forget_text, keep_text
from flashi2v_model.errors import InputError
from flashi2v_model.kernels import known_kernel
from flashi2v_model.layers import Block

_CACHES = (
    *("FirstBlockCache", "MagCache", "TaylorSeerCache", "PyramidAttentionBroadcast", "FasterCache", "SeaCache"),
    "TextKVCache",
)
_OF_STACK = ("FirstBlockCacheConfig", "MagCacheConfig", "SeaCacheConfig")  # cut between a first and a last block
# Hooks that keep one state for all calls, so both branches of guidance have to come in one.
_STATE_OF_ONE_CALL = ("pyramid_attention_broadcast", "faster_cache_denoiser", "faster_cache_block")
_TEXT = "TextKVCacheConfig"
# How the hooks are called that give an earlier step's numbers for new ones.
_SKIPPING = ("fbc_", "mag_cache", "taylorseer_cache", "sea_cache", "faster_cache", "pyramid_attention_broadcast")

# Not by `register`, which imports every transformer that diffusers has.
_BLOCK = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
_BLOCK._cls = Block
TransformerBlockRegistry._registry[Block] = _BLOCK


class Accelerated(CacheMixin, AttentionMixin):
    """A transformer that takes diffusers' caches, attention backends and context parallelism."""

    conditioning_names: ClassVar[tuple[str, ...]]
    _cache_config: Any = None
    _parallel_config: Any = None
    shares_samples = False  # by `parallel.parallelise_samples`

    def enable_cache(self, config: Any) -> None:
        """Let steps reuse what earlier ones computed.

        Args:
            config: one of diffusers' configurations of caches. `TextKVCacheConfig` keeps the text with its keys and
                values, and changes no number; the pipeline does so by itself. Patterns of names that a configuration
                leaves open are set to those of this network.

        Raises:
            InputError: there is no such cache, or it cannot work on this network.
            ValueError: another cache is enabled, or the configuration lacks something.
        """
        name = type(config).__name__
        if name.removesuffix("Config") not in _CACHES:
            raise InputError(f"there is no cache {name}: give a configuration of {', '.join(_CACHES)} of diffusers")
        if self.is_cache_enabled:
            enabled = type(self._cache_config).__name__
            raise ValueError(f"Caching has already been enabled with {enabled}: call disable_cache() first")
        if name in _OF_STACK and len(self.get_submodule("blocks")._modules) < 2:
            raise InputError(f"{name} needs a first and a last block, this network has one")
        if name == _TEXT:
            keep_text(self)
            self._cache_config = config
        else:
            super().enable_cache(self._fitted(config))

    def disable_cache(self) -> None:
        """Compute every step whole again."""
        if type(self._cache_config).__name__ == _TEXT:
            forget_text(self)
            self._cache_config = None
        else:
            super().disable_cache()

    def _fitted(self, config: Any) -> Any:
        """Return a configuration with the names of this network where it leaves them open."""
        name = type(config).__name__
        if name == "TaylorSeerCacheConfig" and not (
            config.cache_identifiers or config.skip_predict_identifiers or config.use_lite_mode
        ):
            return replace(config, cache_identifiers=[r"blocks\.\d+\.attn[12]"])
        if name == "FasterCacheConfig":
            if self.conditioning_names:
                raise InputError(f"FasterCache cannot split {', '.join(self.conditioning_names)} into its two branches")
            names = [*config._unconditional_conditional_input_kwargs_identifiers, "condition"]
            return replace(config, _unconditional_conditional_input_kwargs_identifiers=names)
        if name == "SeaCacheConfig" and config.raw_vision_callback is None:
            return replace(config, raw_vision_callback=_latents)
        return config

    def set_attention_backend(self, backend: str) -> None:
        """Choose the kernel of all attentions; `reset_attention_backend` leaves the choice to flashi2v_npu_ops again.

        Args:
            backend: of `flashi2v_npu_ops.attention` ("auto", "torch", "reference", "ascend", "cuda", "cudnn", "flash3",
                "bf16", ...), or diffusers' name of one that is served: "native", "_native_math", "_native_npu",
                "_native_cudnn", "flash", "_flash_3".

        Raises:
            InputError: it is not served.
            RuntimeError: a library that it needs is missing.
        """
        known_kernel(backend)
        if backend in AttentionBackendName.__members__.values():
            _check_attention_backend_requirements(AttentionBackendName(backend))
        for module in self.modules():
            if isinstance(module, AttentionModuleMixin) and hasattr(module.processor, "_attention_backend"):
                module.processor._attention_backend = backend

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Refuse xformers, which is not served; to do without it changes nothing."""
        if valid:
            self.set_attention_backend("xformers")

    def set_use_npu_flash_attention(self, valid: bool) -> None:
        """Choose the NPU's attention, or leave the choice to flashi2v_npu_ops."""
        self.set_attention_backend("_native_npu" if valid else "auto")

    def set_use_xla_flash_attention(self, use_xla_flash_attention: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse XLA's attention, which is not served."""
        if use_xla_flash_attention:
            self.set_attention_backend("_native_xla")

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """Let processes share the tokens of each video (Ulysses, ring), as `parallel.parallelise_context` does.

        Args:
            config: a `ContextParallelConfig`, or a `ParallelConfig` with one, with a `ulysses_degree` and a
                `ring_degree`. Neither heads nor tokens need share out evenly.
            cp_plan: none: where tokens are shared out and gathered is known.

        Raises:
            InputError: something else is asked for, or the Ulysses degree is more than the heads.
            RuntimeError: torch.distributed is not initialised, or processes share this network already.
        """
        from flashi2v_model.parallel import ContextGroups, parallelise_context  # which imports this network

        context = getattr(config, "context_parallel_config", config)
        if getattr(config, "tensor_parallel_config", None) is not None or not hasattr(context, "ulysses_degree"):
            raise InputError(
                "enable_parallelism takes a ContextParallelConfig(ulysses_degree=..., ring_degree=...): for shared "
                "matrices call "
                "flashi2v_model.parallel.parallelise_tensors"
            )
        if cp_plan is not None:
            raise InputError("where tokens are shared out and gathered is known here: leave cp_plan out")
        if self._parallel_config is not None:
            raise RuntimeError("processes share this transformer already: load it anew to share it otherwise")
        if not torch.distributed.is_initialized():
            raise RuntimeError("torch.distributed is not initialised: start by torchrun and call init_process_group")
        mesh = context.mesh
        if mesh is None:
            device = next(self.parameters()).device.type
            mesh = init_device_mesh(device, context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
        parallelise_context(self, ContextGroups.of(mesh))
        self._parallel_config = config


def needs_one_call(transformer: nn.Module) -> bool:
    """Tell whether both branches of guidance have to come in one call.

    A hook that keeps one state for all calls would mix them up in two; processes that share samples share these.
    """
    return getattr(transformer, "shares_samples", False) or any(
        name in hooks for hooks in _hooks(transformer) for name in _STATE_OF_ONE_CALL
    )


def skips_work(transformer: nn.Module) -> bool:
    """Tell whether a hook of diffusers answers some calls, or parts of them, by what earlier ones computed."""
    return any(name.startswith(_SKIPPING) for hooks in _hooks(transformer) for name in hooks)


def check_guided(transformer: nn.Module, is_guided: bool) -> None:
    """Refuse to sample without guidance where a cache skips the branch that there is not.

    Raises:
        InputError: it does.
    """
    skippers = (hooks.get("faster_cache_denoiser") for hooks in _hooks(transformer))
    if not is_guided and any(skipper and not skipper.is_guidance_distilled for skipper in skippers):
        raise InputError(
            "FasterCache skips the branch of the negative prompt, and there is none: set guidance_scale above 1, or "
            "FasterCacheConfig(is_guidance_distilled=True)"
        )


def _hooks(transformer: nn.Module) -> Iterator[dict[str, Any]]:
    for module in transformer.modules():
        if (registry := getattr(module, "_diffusers_hook", None)) is not None:
            yield registry.hooks


def _latents(module: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the noisy latents of a call, (C, F, H, W) each: SeaCache compares them from step to step."""
    given: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return list(given.unbind(0))
