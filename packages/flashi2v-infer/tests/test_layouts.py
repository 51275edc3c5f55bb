"""Layouts of several devices for one video: which there are, what each costs, which one is best, and why."""

from dataclasses import replace

import pytest

from flashi2v_infer import InputError
from flashi2v_infer.commands import devices as command
from flashi2v_infer.commands.devices import Devices, laid_out, machine_for, run_on, without_option
from flashi2v_infer.execution import DTypes, Execution
from flashi2v_infer.load import ModelDirectory
from flashi2v_infer.plan.layouts import layouts_of, rank_layouts, table
from flashi2v_infer.plan.plan import make_plan
from flashi2v_infer.plan.skeleton import build_parts
from flashi2v_infer.settings import SamplingSettings
from flashi2v_model.machines import machine_of


@pytest.fixture(scope="module")
def released():
    """The released 1.3B without numbers, and the plan of one device."""
    parts = build_parts(None, None, None, DTypes("bf16", "bf16", "fp32"))
    settings = SamplingSettings()
    return parts.transformer, settings, make_plan(parts, settings, Execution(), "cuda", None)


def ranked(released, number, kind="NVIDIA H100 80GB HBM3", **changes):
    transformer, settings, plan = released
    return rank_layouts(transformer, replace(settings, **changes), machine_of(kind), number, plan)


def test_every_number_of_devices_has_layouts_and_an_even_one_those_with_two_branches():
    words = [str(layout) for layout in layouts_of(8, 12, is_guided=True)]
    assert words == [
        *(f"Ulysses {ulysses} x ring {8 // ulysses}" for ulysses in (1, 2, 4, 8)),
        *(f"guidance 2 x Ulysses {ulysses} x ring {4 // ulysses}" for ulysses in (1, 2, 4)),
    ]
    assert [str(layout) for layout in layouts_of(7, 4, is_guided=True)] == ["Ulysses 1 x ring 7"]
    assert len(layouts_of(8, 12, is_guided=False)) == 4


def test_eight_devices_are_best_with_two_branches_and_heads_in_equal_shares(released):
    best, *others = ranked(released, 8)
    assert str(best.layout) == "guidance 2 x Ulysses 4 x ring 1"
    assert best.traffic.num_bytes == min(one.traffic.num_bytes for one in (best, *others) if one.layout.branches == 2)
    uneven = next(one for one in others if str(one.layout) == "Ulysses 8 x ring 1")
    assert uneven.largest_share == pytest.approx(4 / 3, rel=1e-3)  # 2 heads of 12 instead of 1.5
    assert uneven.flops > 1.1 * best.flops
    text = table([best, *others], machine_of("NVIDIA H100 80GB HBM3"))
    assert "best: guidance 2 x Ulysses 4 x ring 1, with equally many heads for all" in text
    assert text.count("\n|") == len(others) + 2


def test_operations_are_shared_out_and_add_up_to_those_of_one_device(released):
    _, _, plan = released
    (alone,) = ranked(released, 1)
    assert alone.flops == pytest.approx(plan.step_flops, rel=0.02)  # what is kept over the steps apart
    assert alone.traffic.num_bytes == alone.sending == 0
    for one in ranked(released, 4):
        if one.largest_share < 1.01:
            assert 4 * one.flops == pytest.approx(alone.flops, rel=0.01)
        assert one.memory < alone.memory


def test_without_guidance_there_is_one_branch(released):
    assert {one.layout.branches for one in ranked(released, 4, guidance_scale=1.0)} == {1}


@pytest.mark.parametrize(
    ("text", "number", "kind"), [("8", 8, None), ("auto", None, None), ("8xAscend910B2", 8, "Ascend910B2")]
)
def test_devices_are_a_number_all_or_a_number_of_a_kind(text, number, kind):
    assert Devices.read(text) == (number, kind)


@pytest.mark.parametrize("text", ["0", "-1", "x", "8x", "many", "1.5"])
def test_anything_else_is_refused(text):
    with pytest.raises(InputError, match=r"--devices .*: give a number, auto, or 8xH100"):
        Devices.read(text)


@pytest.mark.parametrize(
    ("text", "words"), [("8xabacus", "nothing is known of abacus"), ("8", "no npu is here, so name the kind")]
)
def test_devices_that_nothing_is_known_of_cannot_be_planned_for(text, words):
    with pytest.raises(InputError, match=words):
        machine_for(Devices.read(text), "npu")


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("auto", {}, "the device is the CPU: give a number"),
        ("2xH100", {}, "together with --plan --dry-run"),
        ("2", {"RANK": "0"}, "torchrun has started this one"),
    ],
)
def test_what_cannot_be_started_is_refused(monkeypatch, text, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model = ModelDirectory("demo", Execution(device="cpu"))
    with pytest.raises(InputError, match=words):
        run_on(Devices.read(text), model, SamplingSettings(), [], is_one=True, plan=False)


@pytest.mark.parametrize(
    ("is_one", "execution", "added"),
    [
        (True, Execution(device="cpu"), True),
        (False, Execution(device="cpu"), False),
        (True, Execution(device="cpu", context_parallel_size=2), False),
    ],
)
def test_a_layout_is_chosen_for_one_video_where_none_is_given(monkeypatch, is_one, execution, added):
    seen = []
    monkeypatch.setattr(command, "start", lambda arguments, number: seen.append((arguments, number)))
    settings = SamplingSettings(num_frames=17, height=64, width=64, num_inference_steps=2)
    given = ["--seed", "1", "--devices", "2"]
    run_on(Devices.read("2"), ModelDirectory("demo", execution), settings, given, is_one=is_one, plan=False)
    ((arguments, number),) = seen
    assert number == 2
    assert arguments[:2] == ["--seed", "1"]
    assert "--devices" not in arguments
    assert ("--guidance-parallel-size" in arguments) == added


def test_one_device_needs_no_other_process(monkeypatch):
    monkeypatch.setattr(command, "start", lambda *_: pytest.fail("started"))
    model = ModelDirectory("demo", Execution(device="cpu"))
    run_on(Devices.read("1"), model, SamplingSettings(), [], is_one=True, plan=False)


def test_a_layout_is_what_its_options_say():
    for layout in layouts_of(8, 12, is_guided=True):
        execution = laid_out(Execution(), layout)
        assert execution.processes_per_video == 8
        values = execution.context_parallel_size, execution.ulysses_degree, execution.guidance_parallel_size
        assert layout.options[1::2] == [str(value) for value in values]


@pytest.mark.parametrize("given", [["--devices", "8"], ["--devices=8"]])
def test_the_processes_are_not_told_of_devices(given):
    assert without_option(["-o", "a.mp4", *given, "--seed", "8"]) == ["-o", "a.mp4", "--seed", "8"]
