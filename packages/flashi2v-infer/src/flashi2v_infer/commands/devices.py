"""`--devices`: this command in a process for each device, laid out as is predicted to be fastest."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from flashi2v_data.errors import InputError
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import Model
from flashi2v_infer.plan.layouts import Layout, Ranked, rank_layouts, table
from flashi2v_infer.plan.plan import make_plan, target_device
from flashi2v_infer.plan.skeleton import parts_of
from flashi2v_infer.processes import is_started, start
from flashi2v_infer.settings import SamplingSettings
from flashi2v_model.machines import Machine, machine_of, measure_cpu
from flashi2v_npu_ops.device import missing

logger = logging.getLogger(__name__)

_OPTION = "--devices"


class Devices(NamedTuple):
    """What `--devices` asks for.

    Attributes:
        number: of devices; None: all that there are.
        kind: what they call themselves; None: what those of this machine do.
    """

    number: int | None
    kind: str | None

    @classmethod
    def read(cls, text: str) -> "Devices":
        """Read a number, auto, or a number and a kind, such as 8xH100.

        Raises:
            InputError: it is something else.
        """
        if text == "auto":
            return cls(None, None)
        match = re.fullmatch(r"([1-9]\d{0,3})(?:x(.+))?", text)
        if match is None:
            raise InputError(f"{_OPTION} {text}: give a number, auto, or 8xH100 to plan for devices that are elsewhere")
        return cls(int(match[1]), match[2])


def count(devices: Devices, model: Model) -> int:
    """Return how many devices are asked for.

    Raises:
        InputError: there are not so many, or `auto` has nothing to count.
    """
    device = model.settle().device
    if device.type == "cpu":
        if devices.number is None:
            raise InputError(f"{_OPTION} auto counts accelerators, and the device is the CPU: give a number")
        return devices.number
    if device.index is not None and ":" in model.device_name:
        raise InputError(f"--device {model.device_name} is one device: leave its number out, or {_OPTION}")
    present: int = getattr(torch, device.type).device_count()
    if devices.number is not None and devices.number > present:
        raise InputError(f"{_OPTION} {devices.number}: this machine has {present} of {device.type}")
    return devices.number or present


def machine_for(devices: Devices, device_type: str) -> Machine:
    """Return what is known of the devices.

    Raises:
        InputError: nothing is known of their kind.
    """
    if devices.kind is None and device_type == "cpu":
        return measure_cpu()
    name = devices.kind
    if name is None:
        if missing(device_type) is not None:
            raise InputError(f"{_OPTION}: no {device_type} is here, so name the kind to plan for: 8xH100, say")
        name = str(getattr(torch, device_type).get_device_name(0))
    found = machine_of(name)
    if found is None:
        raise InputError(f"{_OPTION}: nothing is known of {name}: give --context-parallel-size and the like yourself")
    return found


def rank(model: Model, settings: SamplingSettings, devices: Devices, number: int) -> tuple[list[Ranked], Machine]:
    """Rank the layouts of so many devices for one video; nothing is loaded.

    Raises:
        InputError: there is no such model, or nothing is known of the devices.
    """
    device_type = target_device(model.device_name)[0]
    machine = machine_for(devices, device_type)
    parts = parts_of(model, device_type)
    alone = replace(model.execution, context_parallel_size=1, ulysses_degree=None, guidance_parallel_size=1)
    plan = make_plan(parts, settings, alone, device_type, None, scheduler=model.scheduler or "euler")
    ranked = rank_layouts(parts.transformer, settings, machine, number, plan, cfg_batch=model.execution.cfg_batch)
    if not ranked:
        raise InputError(f"{_OPTION} {number}: the video has only {plan.num_tokens} tokens to share")
    return ranked, machine


def laid_out(execution: Execution, layout: Layout) -> Execution:
    """Return an execution with a layout."""
    return replace(
        execution,
        context_parallel_size=layout.context.size,
        ulysses_degree=layout.context.ulysses,
        guidance_parallel_size=layout.branches,
    )


def run_on(
    devices: Devices, model: Model, settings: SamplingSettings, arguments: Sequence[str], *, is_one: bool, plan: bool
) -> None:
    """Run this command on several devices; where one is enough, return.

    Args:
        devices: those that are asked for.
        model: of the command.
        settings: of its videos.
        arguments: of the command line.
        is_one: there is one video, which all of them share, in the best layout where none is given. Of a batch each
            samples videos of its own.
        plan: print all layouts.

    Raises:
        InputError: there are no such devices, or they do not fit the degrees that are given.
    """
    if devices.kind is not None:
        raise InputError(f"{_OPTION}: a kind is to plan for devices that are elsewhere, together with --plan --dry-run")
    if is_started():
        raise InputError(f"{_OPTION} starts processes, and torchrun has started this one: leave it out")
    number = count(devices, model)
    if number == 1:
        return
    model.check()
    arguments = without_option(arguments)
    if is_one and model.execution.processes_per_video == 1 and not model.execution.compile:
        ranked, machine = rank(model, settings, devices, number)
        if plan:
            print(table(ranked, machine), flush=True)  # before the processes say theirs
        logger.info("%d devices share the video: %s", number, ranked[0].layout)
        arguments += ranked[0].layout.options
    start(arguments, number)


def without_option(arguments: Sequence[str]) -> list[str]:
    """Return a command line without `--devices` and its value."""
    left, skips = [], False
    for argument in arguments:
        if not skips and argument != _OPTION and not argument.startswith(f"{_OPTION}="):
            left.append(argument)
        skips = argument == _OPTION and not skips
    return left
