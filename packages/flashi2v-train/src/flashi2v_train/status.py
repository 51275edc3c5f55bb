"""`flashi2v-train status RUN`: where a run is, read off its directory alone."""

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashi2v_data.errors import InputError
from flashi2v_data.locking import holder
from flashi2v_train.history import held_out_table, mean_of, read_steps, read_validations


def describe(run: Path) -> str:
    """Return where a run is.

    Raises:
        InputError: the directory is none of a run.
    """
    if not (run / "config.json").exists() and (run / "train/config.json").exists():
        run = run / "train"  # of the files that `init` writes
    try:
        config = json.loads((run / "config.json").read_text())
        total = int(config["options"]["train_iters"])
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f"{run}: no run of flashi2v-train: its config.json is not there, or is none") from None
    steps, validations = read_steps(run), read_validations(run)
    summary = _read_object(run / "train_summary.json")
    running = holder(run / ".lock")
    state = "running" + running if running is not None else summary.get("ended", "not running: it has been ended")
    rows = [("run", f"{run}: {state}"), ("step", _step(steps, total, is_running=running is not None))]
    if steps:
        tenth = steps[-max(1, len(steps) // 10) :]
        last, mean = steps[-1]["loss"], mean_of(tenth, "loss")
        rows.append(("loss", f"{_number(last)}, mean of the last {len(tenth)} steps {_number(mean)}"))
    pointer = run / "latest_checkpointed_iteration.txt"
    if pointer.is_file():
        rows.append(("checkpoint", f"step {pointer.read_text().strip()}, {_ago(pointer)}"))
    if validations:
        latest = validations[-1]
        rows.append(("validation", f"step {latest['step']}: loss {_number(latest['validation_loss'])}"))
    pictures = [name for name in ("train_loss.png", "validation.png") if (run / name).exists()]
    if pictures:
        rows.append(("pictures", ", ".join(str(run / name) for name in pictures)))
    lines = [f"{name:<12}{text}" for name, text in rows]
    table = held_out_table(validations)
    return "\n".join([*lines, "", table] if table else lines)


def _step(steps: list[dict[str, Any]], total: int, *, is_running: bool) -> str:
    if not steps:
        return f"0 of {total}"
    last = steps[-1]
    text = f"{last['step']} of {total}, {last['step'] / total:.0%}"
    recent = mean_of(steps[-20:], "seconds")
    if recent is not None and last["step"] < total:
        left = tqdm.format_interval((total - last["step"]) * recent)
        text += f", {recent:.3g} s a step, {left} left" if is_running else f", {recent:.3g} s a step"
    return text


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _ago(path: Path) -> str:
    return f"{tqdm.format_interval(max(0, time.time() - path.stat().st_mtime))} ago"
