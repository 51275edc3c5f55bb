"""What is known of a model's velocities: how alike they are at any two noise levels; a file beside its weights.

S steps of the calibrated run. Nothing heavy is imported.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from pydantic import Field, PositiveFloat, ValidationError, model_validator

from flashi2v_model.config import Settings
from flashi2v_model.errors import InputError

FILE = "calibration.json"
_LARGEST = 2**24  # bytes of a file: 1,000 steps take more, and nobody takes those
# A vector in the space of velocities that were computed: weights by their number. That of the text is the step's, that
# of the guidance S more.
Vector = Mapping[int, float]


class Calibration(Settings):
    """How a model's velocities hang together, averaged over runs that were computed whole.

    A velocity has two parts: that of the text, and how much it differs from that of the negative text (the guidance).
    Whatever stands in for one is a weighted sum of others, so inner products tell its error.

    The inner product is half of the whole, half of what changes from frame to frame, each divided by what the final
    latents have of it: an error of the motion counts as much as one of the picture, however little moves.
    """

    weights: str = Field(description="Fingerprint of the transformer.")
    made_from: str = Field(description="Pictures, size and settings, in words.")
    guidance_scale: float
    sigmas: list[float] = Field(min_length=3, description="(S + 1), falling, of the calibrated run.")
    energies: tuple[PositiveFloat, float] = Field(
        strict=False, description="Mean square sum of the final latents, and of what changes in them over frames."
    )
    covered: PositiveFloat = Field(
        description="Errors of stand-ins are at most so many times the predicted one, in 95 % of cases."
    )
    products: list[list[float]] = Field(description="Lower triangle of (2 S, 2 S).")

    @model_validator(mode="after")
    def _check(self) -> "Calibration":
        if [len(row) for row in self.products] != list(range(1, 2 * self.num_steps + 1)):
            raise ValueError(f"products must be the lower triangle of a square of {2 * self.num_steps}")
        if any(first <= second for first, second in zip(self.sigmas, self.sigmas[1:])):
            raise ValueError("sigmas must fall from step to step")
        return self

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.sigmas) - 1

    def at(self, sigmas: Sequence[float]) -> "Products":
        """Return the products for a run with other noise levels: velocities between two are taken to lie on a line.

        Args:
            sigmas: of its steps, and 0 behind them.
        """
        rows = [self._between(sigma) for sigma in sigmas[:-1]]
        size = self.num_steps
        rows += [{size + i: weight for i, weight in row.items()} for row in rows]
        whole = self._whole
        return Products(
            [
                [math.fsum(a * b * whole[i][j] for i, a in first.items() for j, b in second.items()) for second in rows]
                for first in rows
            ]
        )

    @cached_property
    def _whole(self) -> list[list[float]]:
        size = len(self.products)
        return [[self.products[max(i, j)][min(i, j)] for j in range(size)] for i in range(size)]

    def _between(self, sigma: float) -> dict[int, float]:
        known = self.sigmas[:-1]
        after = next((i for i, other in enumerate(known) if other <= sigma), len(known) - 1)
        if after == 0 or known[after] >= sigma:
            return {after: 1.0}
        share = (known[after - 1] - sigma) / (known[after - 1] - known[after])
        return {after: 1.0} if share > 1 - 1e-6 else {after - 1: 1 - share, after: share}


class Products:
    """Inner products of the velocities of a run with S steps: (2 S, 2 S), text first, then guidance.

    All is plain Python: machines of any kind come to the same number, and so to the same decisions.
    """

    def __init__(self, values: list[list[float]]) -> None:
        self.values = values

    def square(self, vector: Vector) -> float:
        """Return the square of a vector's length."""
        pairs = list(vector.items())
        values = self.values
        total = 0.0
        for place, (i, a) in enumerate(pairs):
            row = values[i]
            total += a * a * row[i]
            for j, b in pairs[:place]:
                total += 2 * a * b * row[j]
        return max(total, 0.0)


def read_calibration(directories: Sequence[Path], fingerprint: str | None = None) -> Calibration:
    """Return the calibration that lies in the first of some directories.

    Args:
        directories: where the transformer's weights may have come from.
        fingerprint: of these weights; None does not compare.

    Raises:
        InputError: there is none, it is malformed, or it is of other weights; the message says what to do.
    """
    file = next((place / FILE for place in directories if (place / FILE).is_file()), None)
    if file is None:
        where = directories[0] if directories else "the model"
        raise InputError(
            f"speed: there is no {FILE} beside the transformer in {where}: make one by "
            "`flashi2v-model calibrate DIR --pictures FOLDER`, or leave speed at exact"
        )
    try:
        if file.stat().st_size > _LARGEST:
            raise InputError(f"{file} is larger than any calibration")
        found = Calibration.model_validate_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} is no calibration: {reason}; make it anew by flashi2v-model calibrate") from None
    if fingerprint is not None and found.weights != fingerprint:
        raise InputError(f"{file} was made for other weights: make it anew by flashi2v-model calibrate")
    return found


def as_text(calibration: Calibration) -> str:
    """Return a calibration as its file holds it, one row of products a line."""
    values = calibration.model_dump()
    rows = ",\n".join(json.dumps([float(f"{value:.10g}") for value in row]) for row in values.pop("products"))
    head = json.dumps(values, indent=1)
    return f'{head[:-2]},\n "products": [\n{rows}\n]}}\n'
