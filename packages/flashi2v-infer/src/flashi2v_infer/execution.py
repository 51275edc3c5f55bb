"""How a video is computed: where, in which precision and within how much memory. What is computed stays the same, up
to rounding, except for the seams of a tiled VAE; and for a variant of the network, which has to be named.

Nothing heavy is imported, so that a contradiction is told at once.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, TypeVar, get_args

from cyclopts import Parameter

from flashi2v_data.errors import InputError
from flashi2v_model.config import DType

Offload: TypeAlias = Literal["none", "model", "group"]

_T = TypeVar("_T")
_Flag: TypeAlias = Annotated[bool, Parameter(negative=())]
# The command line samples videos one by one, and lets go of the text encoder.
_InPython: TypeAlias = Annotated[_T, Parameter(parse=False)]

# What a run with low_memory keeps within, in bytes: the 8 GB of a small card less what its driver, the libraries'
# workspaces and the allocator's gaps take.
LOW_MEMORY_BUDGET = 6 * 2**30


@dataclass(frozen=True)
class Execution:
    """How to compute; None leaves a choice to the preset, the configuration file or the machine.

    The command line takes its help from here.

    Attributes:
        device: npu, cuda, cpu, cuda:1, ... (default: what the file says, else auto, the best there is).
        dtype: Of transformer and text encoder (default: what the file says, else bf16, fp32 on the CPU).
        vae_dtype: Of the VAE (default: what the file says, else fp32).
        offload: Which weights wait in the CPU's memory: none; model, all parts but the one at work; group, all but the
            block at work (default: none).
        vae_tiling: Decode in overlapping tiles (default: only as far as the free memory asks for it).
        vae_slicing: Decode the videos of a batch one after the other (default: only where the free memory asks for it).
        low_memory: For cards of 8 GB: offloads in groups, runs the VAE in bf16 and decodes within 6 GiB.
        compile: Compile the transformer's blocks.
        cfg_batch: Run both branches of the guidance as one batch: a little faster where memory allows it.
        keep_text_encoder: Hold the text encoder in the CPU's memory once all prompts are encoded, for more of them,
            instead of letting go of it.
        context_parallel_size: Processes of torchrun that share each video; it must divide the attention heads.
        recipe: module:Class of the variant of the network that the weights are of, or of the recipe that it was trained
            by (default: FlashI2V's own).

    Raises:
        InputError: two of them contradict each other.
    """

    device: str | None = None
    dtype: DType | None = None
    vae_dtype: DType | None = None
    offload: Offload | None = None
    vae_tiling: bool | None = None
    vae_slicing: _InPython[bool | None] = None
    low_memory: _Flag = False
    compile: _Flag = False
    cfg_batch: _Flag = False
    keep_text_encoder: _InPython[bool] = False
    context_parallel_size: int = 1
    recipe: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("offload", get_args(Offload)),
            ("dtype", get_args(DType)),
            ("vae_dtype", get_args(DType)),
        ):
            if getattr(self, name) not in (None, *allowed):
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.low_memory:
            for setting, wrong, why in (
                ("offload", self.offload not in (None, "group"), f"offloads in groups, not {self.offload!r}"),
                ("cfg_batch", self.cfg_batch, "runs one branch of the guidance at a time"),
                ("keep_text_encoder", self.keep_text_encoder, "lets go of the text encoder after use"),
            ):
                if wrong:
                    raise InputError(f"low_memory {why}: leave out {setting} or low_memory")
        if self.compile and self.offloading == "group":
            raise InputError(
                "compile cannot be combined with offload 'group' (or low_memory), which moves the weights of a block "
                "while it runs: use offload 'model', or leave out compile"
            )
        if self.context_parallel_size < 1:
            raise InputError(f"context_parallel_size must be at least 1, got {self.context_parallel_size}")
        if self.compile and self.context_parallel_size > 1:
            raise InputError("compile was never tried together with context_parallel_size above 1: leave out one")
        self.check_device((self.device or "").partition(":")[0])

    def check_device(self, device_type: str) -> None:
        """Refuse what makes no sense on a device of this type.

        Raises:
            InputError: on the CPU there is nothing to offload from.
        """
        if device_type == "cpu" and self.offloading != "none":
            raise InputError(
                f"offload {self.offloading!r} (or low_memory) moves weights between an accelerator and the CPU, and "
                "the device is the CPU: leave it out, or choose another device"
            )

    @property
    def offloading(self) -> Offload:
        """`offload`, settled."""
        return self.offload or ("group" if self.low_memory else "none")

    def settled_dtype(self, device_type: str) -> DType:
        """Return the dtype of transformer and text encoder, where no configuration file says it."""
        return self.dtype or ("fp32" if device_type == "cpu" else "bf16")

    def settled_vae_dtype(self, file: DType | None = None) -> DType:
        """Return the dtype of the VAE; `file` is what a configuration file says."""
        return self.vae_dtype or ("bf16" if self.low_memory else None) or file or "fp32"
