"""How a video is computed: where, in which precision and within how much memory. What is computed stays the same, up
to rounding, except for the seams of a tiled VAE.

Nothing heavy is imported, so that a contradiction is told at once.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from flashi2v_data.errors import InputError
from flashi2v_model.config import DType

Offload: TypeAlias = Literal["none", "model", "group"]

# What a run with low_memory keeps within, in bytes: the 8 GB of a small card less what its driver, the libraries'
# workspaces and the allocator's gaps take.
LOW_MEMORY_BUDGET = 6 * 2**30


@dataclass(frozen=True)
class Execution:
    """How to compute; None leaves a choice to the preset, the configuration file or the machine.

    Attributes:
        device: as of `flashi2v_npu_ops.device.resolve_device`. None: what the configuration file says, else the best.
        dtype: of transformer and text encoder. None: what the configuration file says; without one bf16 on
            accelerators, fp32 on the CPU.
        vae_dtype: of the VAE. None: what the configuration file says; without one fp32.
        offload: "none" holds all weights on the device; "model" one part at a time; "group" one block at a time.
        vae_tiling: decode in overlapping tiles. None: only as far as the free memory asks for it.
        vae_slicing: decode the videos of a batch one after the other. None: only where the free memory asks for it.
        low_memory: for cards of 8 GB: offload "group", a bf16 VAE whose decoding keeps within 6 GiB, one branch of the
            guidance at a time. What is set besides must agree; dtypes may differ.
        compile: compile the transformer's blocks, each kind once.
        cfg_batch: run both branches of the guidance as one batch.
        keep_text_encoder: hold the text encoder in the main memory after all prompts are encoded, for more of them,
            instead of letting go of it.

    Raises:
        InputError: two of them contradict each other.
    """

    device: str | None = None
    dtype: DType | None = None
    vae_dtype: DType | None = None
    offload: Offload | None = None
    vae_tiling: bool | None = None
    vae_slicing: bool | None = None
    low_memory: bool = False
    compile: bool = False
    cfg_batch: bool = False
    keep_text_encoder: bool = False

    def __post_init__(self) -> None:
        if self.offload not in (None, "none", "model", "group"):
            raise InputError(f"offload must be none, model or group, got {self.offload!r}")
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

    def settled_dtype(self, device_type: str, file: DType | None = None) -> DType:
        """Return the dtype of transformer and text encoder; `file` is what a configuration file says."""
        return self.dtype or file or ("fp32" if device_type == "cpu" else "bf16")

    def settled_vae_dtype(self, file: DType | None = None) -> DType:
        """Return the dtype of the VAE; `file` is what a configuration file says."""
        return self.vae_dtype or ("bf16" if self.low_memory else None) or file or "fp32"
