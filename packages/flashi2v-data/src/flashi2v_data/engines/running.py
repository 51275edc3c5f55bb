"""Running what a ledger does not hold yet."""

from collections.abc import Callable, Iterable, Iterator

from flashi2v_data.engines.ledger import Ledger
from flashi2v_data.engines.protocol import Engine, P, R, Stage
from flashi2v_data.errors import InputError

# Pieces in a row of which nothing went well.
_MOST_DOUBTFUL = 64


def run_pieces(
    engine: Engine,
    stage: Stage[P, R],
    pieces: Iterable[P],
    ledger: Ledger,
    *,
    fault_of: Callable[[R], str | None] = lambda result: None,
    on_done: Callable[[int, R], None] = lambda number, result: None,
) -> None:
    """Run the pieces of the ledger's shard that it does not hold yet, until it holds them all.

    Args:
        engine: spreads them.
        stage: what is done with each.
        pieces: all of the set, in their order; the same at every run.
        ledger: of one shard.
        fault_of: says what is wrong with a result of which nothing went well. It is kept only with others that are
            better: where nothing goes well, a disk is probably not mounted, and the run ends.
        on_done: is told number and result of every piece.

    Raises:
        InputError: as `Engine.run`; or nothing went well.
        EngineError: as `Engine.run`.
        StorageError: the ledger cannot be written.
    """
    num_pieces = 0

    def missing() -> Iterator[tuple[int, P]]:
        nonlocal num_pieces
        for number, piece in enumerate(pieces):
            num_pieces = number + 1
            if ledger.lacks(number):
                yield number, piece

    doubtful: list[tuple[int, R]] = []
    fault: str | None = None
    for number, result in engine.run(stage, missing()):
        on_done(number, result)
        fault = fault_of(result)
        doubtful.append((number, result))
        if fault is None:
            ledger.put_all(doubtful)
            doubtful.clear()
        elif len(doubtful) == _MOST_DOUBTFUL:
            break
    if doubtful and (len(doubtful) == _MOST_DOUBTFUL or ledger.is_empty):
        raise InputError(
            f"all clips of {len(doubtful)} pieces in a row failed; is a disk not mounted? The last: {fault}"
        )
    ledger.put_all(doubtful)
    ledger.finish(num_pieces)
