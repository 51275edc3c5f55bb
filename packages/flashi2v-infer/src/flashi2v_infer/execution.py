"""How a video is computed: where, in which precision and within how much memory. What is computed stays the same, up
to rounding, except for the seams of a tiled VAE and for weights of 8 bits; and for a variant of the network, which has
to be named.

Nothing heavy is imported, so that a contradiction is reported at once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from flashi2v_data.errors import InputError
from flashi2v_model.config import DType

if TYPE_CHECKING:
    import torch

Offload: TypeAlias = Literal["none", "model", "group"]
Quantize: TypeAlias = Literal["int8", "fp8", "int8_dynamic", "fp8_dynamic"]

# What a run with low_memory keeps within, in bytes: the 8 GB of a small card less what its driver, the libraries'
# workspaces and the allocator's gaps take.
LOW_MEMORY_BUDGET = 6 * 2**30


class DTypes(NamedTuple):
    """Of the parts of a pipeline."""

    transformer: DType
    text_encoder: DType
    vae: DType


@dataclass(frozen=True)
class Execution:
    """How to compute; None leaves a choice to the preset, the configuration file or the machine.

    The command line takes its help from here.

    Attributes:
        device: npu, cuda, cpu, cuda:1, ... (default: what the file says, else auto, the best there is).
        dtype: Of transformer and text encoder (default: what the file says, else bf16, fp32 on the CPU).
        vae_dtype: Of the VAE (default: what the file says, else fp32).
        quantize: Store the transformer's matrices in 8 bits: int8, or fp8 (default: not). It takes half the memory, and
            changes the video a little; needs torchao. int8_dynamic and fp8_dynamic also multiply in 8 bits, where the
            device can, and change it a little more.
        offload: Which weights stay in the CPU's memory: none; model, all parts but the one that runs; group, all but
            the block that runs (default: none).
        vae_tiling: Decode in overlapping tiles (default: only where the free memory requires it).
        vae_slicing: Decode the videos of a batch one after the other (default: only where the free memory requires it).
        low_memory: For cards of 8 GB: offloads in groups, runs the VAE in bf16 and decodes within 6 GiB.
        compile: Compile the transformer's blocks.
        cfg_batch: Run both branches of the guidance as one batch: a little faster where memory allows it.
        keep_text_encoder: Hold the text encoder in the CPU's memory once all prompts are encoded, for more of them,
            instead of releasing it.
        context_parallel_size: Processes that share the tokens of each video; any number.
        ulysses_degree: Of these, those that exchange attention heads; the others pass keys on around a ring (default:
            as many as share the heads evenly).
        guidance_parallel_size: 2 gives each branch of the guidance its own processes, so many as share the tokens.
        recipe: module:Class of the variant of the network that the weights are of, or of the recipe that it was trained
            by (default: FlashI2V's own).

    Raises:
        InputError: two of them contradict each other.
    """

    device: str | None = None
    dtype: DType | None = None
    vae_dtype: DType | None = None
    quantize: Quantize | None = None
    offload: Offload | None = None
    vae_tiling: bool | None = None
    vae_slicing: bool | None = None
    low_memory: bool = False
    compile: bool = False
    cfg_batch: bool = False
    keep_text_encoder: bool = False
    context_parallel_size: int = 1
    ulysses_degree: int | None = None
    guidance_parallel_size: int = 1
    recipe: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("offload", Offload),
            ("dtype", DType),
            ("vae_dtype", DType),
            ("quantize", Quantize),
        ):
            if getattr(self, name) not in (None, *get_args(choices)):
                allowed = ", ".join(get_args(choices))
                raise InputError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.low_memory:
            for setting, wrong, why in (
                ("offload", self.offload not in (None, "group"), f"offloads in groups, not {self.offload!r}"),
                ("cfg_batch", self.cfg_batch, "runs one branch of the guidance at a time"),
                ("keep_text_encoder", self.keep_text_encoder, "releases the text encoder after use"),
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
        if self.guidance_parallel_size not in (1, 2):
            raise InputError(f"guidance_parallel_size must be 1 or 2, got {self.guidance_parallel_size}")
        if self.ulysses_degree is not None and self.context_parallel_size % max(self.ulysses_degree, 1):
            raise InputError(
                f"ulysses_degree {self.ulysses_degree} must divide the context_parallel_size of "
                f"{self.context_parallel_size}"
            )
        if self.compile and self.processes_per_video > 1:
            raise InputError(
                "compile was never tried together with context_parallel_size or guidance_parallel_size above 1: leave "
                "out one"
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
    def processes_per_video(self) -> int:
        """How many processes share each video."""
        return self.context_parallel_size * self.guidance_parallel_size

    @property
    def offloading(self) -> Offload:
        """`offload`, or what `low_memory` makes of it."""
        return self.offload or ("group" if self.low_memory else "none")

    def dtypes(self, file: DTypes) -> DTypes:
        """Return the dtypes of all parts; `file` has those that stand where nothing is asked for."""
        vae = self.vae_dtype or ("bf16" if self.low_memory else file.vae)
        chosen = (self.dtype or file.transformer, self.dtype or file.text_encoder, vae)
        # Of the two names of one dtype always the same, as records are compared.
        return DTypes(*("fp32" if dtype == "float32" else dtype for dtype in chosen))

    def dtypes_on(self, device_type: str, file: DTypes | None = None) -> DTypes:
        """Return the dtypes of all parts on a type of device, which need not be in this machine; errors of `settle`."""
        self.check_device(device_type)
        usual: DType = "fp32" if device_type == "cpu" else "bf16"
        return self.dtypes(file or DTypes(usual, usual, "fp32"))

    def settle(self, device: "torch.device", file: DTypes | None = None) -> "Settled":
        """Decide what is left open, once the device is known.

        Args:
            device: where to compute.
            file: dtypes that a configuration file names.

        Raises:
            InputError: the execution makes no sense on this device.
        """
        dtypes = self.dtypes_on(device.type, file)
        if self.quantize is not None:
            from flashi2v_model.encoders import DTYPES  # which import torch, as whoever knows the device has
            from flashi2v_model.quantization import check_products

            check_products(self.quantize, device, DTYPES[dtypes.transformer])
        return Settled(self, device, dtypes)


@dataclass(frozen=True)
class Settled:
    """How a run computes, with nothing left open.

    Attributes:
        execution: what was asked for.
        device: where to compute.
        dtypes: of all parts.
    """

    execution: Execution
    device: "torch.device"
    dtypes: DTypes
