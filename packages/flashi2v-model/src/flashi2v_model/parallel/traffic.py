"""What processes that share a video send each other, by formula.

B batch, N tokens, K heads, d head size, U and R the degrees of Ulysses and ring.
"""

from dataclasses import dataclass

from flashi2v_model.parallel.degrees import ContextDegrees, share


@dataclass(frozen=True)
class Traffic:
    """What one process sends.

    Attributes:
        messages: to other processes.
        num_bytes: in all of them.
    """

    messages: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.messages + other.messages, self.num_bytes + other.num_bytes)

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(self.messages * times, self.num_bytes * times)


def attention_rounds(degrees: ContextDegrees) -> int:
    """Return how often processes wait for each other in one self attention: an exchange there and back, and a ring."""
    return (2 if degrees.ulysses > 1 else 0) + degrees.ring - 1


def attention_traffic(
    degrees: ContextDegrees,
    num_tokens: int,
    num_heads: int,
    head_size: int,
    *,
    batch: int = 1,
    itemsize: int = 2,
    backward: bool = False,
) -> list[Traffic]:
    """Return what each process sends for one self attention.

    Args:
        degrees: of the processes that share the tokens.
        num_tokens: N.
        num_heads: K.
        head_size: d.
        batch: B.
        itemsize: bytes of a number.
        backward: of the backward pass, instead of the forward pass. Gradients go around the ring in fp32.
    """
    tokens, heads = share(num_tokens, degrees.size), share(num_heads, degrees.ulysses)
    of_groups = [sum(tokens[first : first + degrees.ulysses]) for first in range(0, degrees.size, degrees.ulysses)]
    number = batch * head_size * itemsize  # bytes of a token's head, in the whole batch
    found = []
    for rank, own in enumerate(tokens):
        place, at = divmod(rank, degrees.ulysses)
        others, rest = of_groups[place] - own, num_heads - heads[at]
        # Query, key and value for all heads of one's own tokens, and the result for one's own heads of all tokens;
        # backwards it is the other way round.
        exchanged = (3 * others * heads[at] + own * rest) if backward else (3 * own * rest + others * heads[at])
        ulysses = Traffic(2 * (degrees.ulysses - 1), number * exchanged)
        blocks = [2 * number * heads[at] * of_groups[(place - step) % degrees.ring] for step in range(degrees.ring)]
        ring = Traffic(degrees.ring - 1, sum(blocks[:-1])) if degrees.ring > 1 else Traffic()
        if backward and degrees.ring > 1:
            ring += Traffic(degrees.ring, sum(blocks) * max(itemsize, 4) // itemsize)
        found.append(ulysses + ring)
    return found
