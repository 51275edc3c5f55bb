"""Which kernel attends: names of diffusers' attention backends, as flashi2v_npu_ops serves them."""

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from flashi2v_model.errors import InputError
from flashi2v_npu_ops import backends

# diffusers' names, and the backends of `flashi2v_npu_ops.attention` that compute the same.
_SERVED = {
    "native": "torch",
    "_native_math": "reference",
    "_native_npu": "ascend",
    "_native_cudnn": "cudnn",
    "flash": "cuda",
    "_flash_3": "flash3",
}


def known_kernel(name: str) -> str:
    """Return the backend of `flashi2v_npu_ops.attention` that a name stands for: its own, "auto", or one of diffusers'.

    Raises:
        InputError: none serves it; the message lists those that are.
    """
    name = str(getattr(name, "value", name)).lower()
    own = ("auto", *backends("attention"))
    kernel = _SERVED.get(name, name)
    if kernel not in own:
        raise InputError(
            f"attention backend {name!r} is not served here: choose one of {', '.join((*_SERVED, *own))} by "
            "transformer.set_attention_backend (flashi2v-npu-ops doctor says which this machine has)"
        )
    return kernel


def attention_kernel(asked: str | None) -> str:
    """Return the backend of `flashi2v_npu_ops.attention` for a call.

    Args:
        asked: by `set_attention_backend`; None leaves it to `diffusers.attention_backend`, and where that says nothing
            ("native") to flashi2v_npu_ops.

    Raises:
        InputError: none serves what is asked for.
    """
    if asked is not None:
        return known_kernel(asked)
    active, _ = _AttentionBackendRegistry.get_active_backend()
    return "auto" if active == AttentionBackendName.NATIVE else known_kernel(active)
