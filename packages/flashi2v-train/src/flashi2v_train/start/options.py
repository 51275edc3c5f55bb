"""The options of `flashi2v-train init`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from flashi2v_data.errors import InputError

SIZE_STEP = 16  # pixels: the VAE's 8 times the patches' 2


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """What a run starts from.

    Attributes:
        videos: A folder of videos with captions beside them, as of `flashi2v-data meta`; or a meta JSON, a table (CSV,
            Parquet), or an annotation file (.txt).
        start: demo (the small model of flashi2v-infer, for laptops), a directory in diffusers' layout, a hub id, or
            Wan2.1 (its text-to-video model of 1.3B).
        size: HEIGHTxWIDTH of samples, each divisible by 16; default: as most videos are, and no larger than the
            model's.
        frames: Frames of a sample, 4k + 1; default: as most videos have, and no more than the model's.
        buckets: Train on several sizes and lengths, each clip where it is cropped least, and on images; --size and
            --frames are then the largest.
        train_iters: Steps of training; default: 300 of a small model, 2000 of a large one.
        device: auto, cpu, cuda or npu: where run.sh will train.
        memory: GiB of each device; default: what is free here.
        nproc_per_node: Devices to train on; default: all of this machine.
        lora: Train a LoRA adapter, and leave the model as it is.
        lora_rank: Its rank; default: 16 of a small model, 32 of a large one.
        lora_from: An adapter to go on with: a file, a directory, a hub id, or a run; it says rank, alpha and layers.
    """

    videos: Path
    start: Annotated[str, Parameter(name="--from")]
    size: str | None = None
    frames: int | None = None
    buckets: Annotated[bool, Parameter(negative="")] = False
    train_iters: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    device: str = "auto"
    memory: Annotated[float | None, Parameter(validator=Number(gt=0))] = None
    nproc_per_node: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    lora: Annotated[bool, Parameter(negative="")] = False
    lora_rank: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    lora_from: str | None = None

    def pixels(self) -> tuple[int, int] | None:
        """Return the height and width that were given.

        Raises:
            InputError: these are no such numbers, or are not divisible by 16.
        """
        if self.size is None:
            return None
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", self.size)
        if match is None:
            raise InputError(f"--size: expected HEIGHTxWIDTH such as 480x832, got {self.size!r}")
        height, width = map(int, match.groups())
        for name, value in (("height", height), ("width", width)):
            if value % SIZE_STEP or value < SIZE_STEP:
                lower = max(SIZE_STEP, value // SIZE_STEP * SIZE_STEP)
                nearest = f"{lower} or {lower + SIZE_STEP}"
                raise InputError(f"--size {self.size}: {name} {value} is not divisible by {SIZE_STEP}: use {nearest}")
        return height, width
