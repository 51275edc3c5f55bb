"""Which signals there are, and how others are found."""

import importlib
import os
import sys
from collections.abc import Sequence

from flashi2v_data.errors import InputError
from flashi2v_data.signals.protocol import Signal

# By name: where its class is. A module is imported when its signal is asked for, as it may need an extra.
BUILT_IN: dict[str, str] = {
    "cuts": "flashi2v_data.signals.cuts:Cuts",
    "duplicates": "flashi2v_data.signals.duplicates:Duplicates",
    "motion": "flashi2v_data.signals.motion:Motion",
    "still": "flashi2v_data.signals.still:Still",
    "text": "flashi2v_data.signals.text:Text",
    "transnet": "flashi2v_data.signals.cuts:Transnet",
}

# What records and the rules are made of; `motion` is a signal's to give.
_RESERVED = ("path", "cap", "resolution", "fps", "num_frames", "cut", "crop", "start_frame_idx")


def find_signals(names: Sequence[str], own: Sequence[str] = ()) -> list[Signal]:
    """Return the signals of these names, and those of the user's classes.

    Args:
        names: among `BUILT_IN`.
        own: module:Class, installed or in the working directory; the class is called without arguments.

    Raises:
        InputError: there is no such signal, or it is none, or two fill one column; a library that it needs is missing.
    """
    unknown = [name for name in names if name not in BUILT_IN]
    if unknown:
        known = ", ".join(sorted(BUILT_IN)) or "none; others are given by --signal module:Class"
        raise InputError(f"--signals: there is no signal {unknown[0]!r:.60}; there are {known}")
    signals = [_make(BUILT_IN[name], "--signals") for name in names] + [_make(name, "--signal") for name in own]
    if not signals:
        raise InputError("no signal was asked for: give --signals or --signal")
    filled: dict[str, str] = dict.fromkeys(_RESERVED, "the record")
    for signal in signals:
        for column in signal.columns:
            if column in filled:
                raise InputError(f"signal {signal.name}: its column {column} is that of {filled[column]} already")
            filled[column] = f"signal {signal.name}"
    if len({signal.name for signal in signals}) < len(signals):
        raise InputError("two signals have one name: ask for each once")
    return signals


def _make(name: str, option: str) -> Signal:
    module_name, colon, class_name = name.partition(":")
    if not (module_name and colon and class_name):
        raise InputError(f"{option}: expected module:Class, got {name!r:.100}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # behind what is installed
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise InputError(f"{option}: there is no module {module_name} here, and none is installed") from None
        raise InputError(f"{option} {name}: needs the library {error.name}, which is not installed") from None
    made = getattr(module, class_name, None)
    if not isinstance(made, type):
        raise InputError(f"{option}: {module_name} has no class {class_name}")
    signal = made()
    if not isinstance(signal, Signal):
        lacking = [key for key in Signal.__annotations__ if not hasattr(signal, key)] or ["__call__"]
        raise InputError(f"{option} {name}: is no signal, it lacks {', '.join(lacking)}")
    return signal
