"""How many processes share what of a video: plain numbers, for whoever checks options before torch is imported."""

from dataclasses import dataclass
from math import gcd

from flashi2v_model.errors import InputError


@dataclass(frozen=True)
class ContextDegrees:
    """How processes share the tokens of a video.

    Attributes:
        ulysses: those that exchange tokens for heads, neighbours of each other.
        ring: groups of them, which pass keys and values on.
    """

    ulysses: int = 1
    ring: int = 1

    @property
    def size(self) -> int:
        """All processes that share a video."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        return f"Ulysses {self.ulysses} x ring {self.ring}"


def share(total: int, parts: int) -> list[int]:
    """Return a total in parts as equal as they go, the first ones larger, as `torch.tensor_split` has them."""
    least, rest = divmod(total, parts)
    return [least + (part < rest) for part in range(parts)]


def choose_degrees(size: int, num_heads: int, ulysses: int | None = None, ring: int | None = None) -> ContextDegrees:
    """Return how so many processes share a video's tokens.

    What is left open is chosen so that all have equally many heads, with as few passes around the ring as that allows:
    12 heads and 8 processes are Ulysses 4 x ring 2.

    Args:
        size: the number of processes.
        num_heads: of each of them before they exchange heads.
        ulysses: the degree that is asked for; it need not divide the heads.
        ring: likewise.

    Raises:
        InputError: a degree is below 1, the degrees do not make up the size, or there are more processes than heads to
            exchange.
    """
    for name, degree in (("a ring", ring), ("Ulysses", ulysses)):
        if degree is not None and degree < 1:
            raise InputError(f"the degree of {name} must be at least 1, got {degree}")
    if ulysses is None:
        ulysses = gcd(size, num_heads) if ring is None else size // ring
    ring = size // ulysses if ring is None else ring
    if ulysses * ring != size:
        raise InputError(f"a ring of {ring} x Ulysses of {ulysses} is not the context parallel size of {size}")
    if ulysses > num_heads:
        raise InputError(
            f"a Ulysses degree of {ulysses} leaves processes without one of the {num_heads} heads: "
            f"use at most {num_heads}, and a ring for the rest ({choose_degrees(size, num_heads)})"
        )
    return ContextDegrees(ulysses, ring)


def check_heads(size: int, num_heads: int) -> None:
    """Refuse a number of processes among which the matrices of attention cannot be shared out by heads.

    Raises:
        InputError: with the numbers that can be used.
    """
    if size < 1 or num_heads % size:
        divisors = [str(number) for number in range(1, num_heads + 1) if num_heads % number == 0]
        raise InputError(
            f"a tensor parallel size of {size} does not divide the {num_heads} heads: use one of {', '.join(divisors)}"
        )
