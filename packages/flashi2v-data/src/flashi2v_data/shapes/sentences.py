"""How motions are told: sentences of common words, some of which a training leaves out.

Every word and pattern is in one of two lists: those of training, "seen", and those that it leaves out, "unseen". An
unseen sentence has one thing that training never had: its order of words, its verb, or its words for the direction,
the pace or standing still.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

T = TypeVar("T")
Words: TypeAlias = Literal["all", "seen", "unseen"]

DIRECTIONS = ("right", "left", "up", "down", "upper right", "upper left", "lower right", "lower left")


class _Verb(NamedTuple):
    """A verb: "move", "moves", "moving"."""

    base: str
    does: str
    doing: str


def _verbs(*words: str) -> tuple[_Verb, ...]:
    """Return regular verbs."""
    return tuple(
        _Verb(word, f"{word}es" if word[-1] in "osh" else f"{word}s", f"{word.rstrip('e')}ing") for word in words
    )


# By what they say of the pace: None says nothing.
_VERBS: dict[str | None, tuple[tuple[_Verb, ...], tuple[_Verb, ...]]] = {
    None: (_verbs("move", "go", "slide", "glide", "head", "shift"), _verbs("sail", "walk", "roll")),
    "slowly": (_verbs("drift", "creep", "float"), _verbs("crawl", "stroll")),
    "quickly": ((*_verbs("race", "rush", "dart"), _Verb("fly", "flies", "flying")), _verbs("speed", "zoom")),
}
_PACES = {
    "slowly": (("slowly", "gently", "at a slow pace"), ("leisurely",)),
    "quickly": (("quickly", "fast", "rapidly", "at high speed"), ("swiftly",)),
}
_ALONG = {
    "left": (("left", "to the left", "leftwards", "towards the left"), ("to the left side", "leftward")),
    "right": (("right", "to the right", "rightwards", "towards the right"), ("to the right side", "rightward")),
    "up": (("up", "upwards", "to the top", "towards the top"), ("upward", "to the upper side")),
    "down": (("down", "downwards", "to the bottom", "towards the bottom"), ("downward", "to the lower side")),
}
_STILL = (
    ("stays where it is", "stays still", "stands still", "does not move", "stays in place", "keeps still"),
    ("remains where it is", "stays put"),
)
_REST = ("the rest stays", "nothing else moves", "the others stay where they are")


def phrases(direction: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words for a direction: those of training, and those that it leaves out."""
    if direction in _ALONG:
        return _ALONG[direction]
    height, side = direction.split()
    edge, way = ("top", "up") if height == "upper" else ("bottom", "down")
    seen = (
        f"to the {height} {side}",
        f"to the {edge} {side}",
        f"towards the {height} {side}",
        f"{way} and to the {side}",
        f"diagonally {way} and {side}",
    )
    return seen, (f"{way}wards and {side}", f"{side} and {way}")


@dataclass(frozen=True)
class Motion:
    """What a sentence tells of a motion.

    Attributes:
        direction: one of `DIRECTIONS`, "still", or None where the sentence leaves it open.
        pace: "slowly" or "quickly", or None where the sentence leaves it open.
    """

    direction: str | None
    pace: str | None = None


class Teller:
    """Tells motions in sentences drawn at random."""

    def __init__(self, random: np.random.Generator, words: Words = "all") -> None:
        self._random = random
        unseen = ("order", "verb", "where", "pace")
        self._new = self.pick({"all": (None, *unseen), "seen": (None,), "unseen": unseen}[words])

    def pick(self, options: Sequence[T]) -> T:
        """Draw one."""
        return options[int(self._random.integers(len(options)))]

    def _from(self, lists: tuple[Sequence[T], Sequence[T]], part: str) -> T:
        """Draw one of training's words, or one that it leaves out where this is the new part of the sentence."""
        return self.pick(lists[self._new == part])

    def tell(self, motion: Motion, subject: str, many: bool = False) -> str:
        """Return a sentence.

        Args:
            motion: of the subject.
            subject: "the red star", or "" for none.
            many: the subject is in the plural.
        """
        if motion.direction == "still":
            return self._still(subject, many)
        by_verb = motion.pace is not None and self._new != "pace" and self._random.random() < 0.4
        if motion.pace is None or by_verb:
            verb, pace = self._from(_VERBS[motion.pace], "verb"), ""
        else:
            # "drifts slowly", but never "drifts quickly".
            verb = self._from(_VERBS[self.pick((None, None, motion.pace))], "verb")
            pace = self._from(_PACES[motion.pace], "pace")
        part = "where" if pace or self._new != "pace" else "pace"
        where = self._from(phrases(motion.direction), part) if motion.direction else ""
        return " ".join(word for word in self._order(subject, verb, where, pace, many) if word)

    def _order(self, subject: str, verb: _Verb, where: str, pace: str, many: bool) -> tuple[str, ...]:
        rest = (where, pace) if self._random.random() < 0.5 or " " in pace else (pace, where)
        does = verb.base if many else verb.does
        if self._new == "order" and where:
            return self.pick(((where, subject or "it", does, pace), ("see how", subject or "it", does, *rest)))
        orders: tuple[tuple[str, ...], ...] = (
            (subject, does, *rest),
            (subject, does, *rest),
            (subject, "are" if many else "is" if subject else "", verb.doing, *rest),
        )
        if subject.startswith("the "):
            orders += ((subject, verb.doing, *rest),)
        if verb.base == "move":
            orders += (("move", subject or "it", *rest),)
        return self.pick(orders)

    def _still(self, subject: str, many: bool) -> str:
        if many:
            return f"{subject} {self.pick(('stay where they are', 'do not move', 'stay still', 'stand still'))}"
        told = self.pick(_STILL[self._new is not None])
        return f"{subject} {told}".strip()

    def with_rest(self, sentence: str, stayers: Sequence[str], total: int) -> str:
        """Say of the others that they stay: all of them are named by `stayers`, or none is.

        Args:
            sentence: what moves.
            stayers: what stays, for example "the ring"; nothing where they cannot be told apart by words.
            total: how many things there are.
        """
        choice = self._random.random()
        if choice < 0.35:
            return sentence
        if choice < 0.75 and len(stayers) == total - 1:
            names = " and ".join(stayers)
            told = self._still(names, many=len(stayers) > 1)
            if len(stayers) == 1 and self._random.random() < 0.4:
                told = f"{names} stays"
            return f"{sentence}{self.pick((', ', ' and ', ' while '))}{told}"
        rest = self.pick(_REST if total > 2 else _REST[:2])
        return f"{sentence}{self.pick((', ', ' and '))}{rest}"
