"""Sampling with fewer calls of the network: what is left out, what stands in, and that both are as they are said."""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.guiders import ClassifierFreeZeroStarGuidance
from golden import small_model, tensor
from PIL import Image
from torch.testing import assert_close

from flashi2v_model import FlashI2VTransformer3DModel, InputError, cli, presets
from flashi2v_model.sampling import VelocityField, denoise, guided, guided_zero, set_timesteps
from flashi2v_model.scheduler import euler_scheduler, make_scheduler
from flashi2v_model.speed.calibration import FILE, Calibration, Products, as_text, read_calibration
from flashi2v_model.speed.choice import NOTHING, Calls, as_record, choose_calls, polynomial
from flashi2v_model.speed.measuring import Start, calibrate, compare
from flashi2v_model.speed.plan import PRESETS, SamplingPlan, plan_of, read_speed
from flashi2v_model.speed.stand_ins import Past
from flashi2v_model.weights.fingerprint import fingerprint

STEPS = 12
SHIFT = 3.0


def sigmas(steps: int = STEPS) -> list[float]:
    scheduler = euler_scheduler(SHIFT)
    set_timesteps(scheduler, steps, torch.device("cpu"))
    return scheduler.sigmas.tolist()


def smooth(order: int, steps: int = STEPS, seed: int = 0) -> Calibration:
    """Of velocities that are polynomials of an order in sigma, text and guidance apart from each other."""
    levels, draw = sigmas(steps), random.Random(seed)
    rows = []
    for part in range(2):
        coefficients = [[draw.uniform(-1, 1) for _ in range(order + 1)] for _ in range(5)]
        vectors = [[sum(c * s**k for k, c in enumerate(row)) for row in coefficients] for s in levels[:-1]]
        rows += [[0.0] * 5 * part + vector + [0.0] * 5 * (1 - part) for vector in vectors]
    products = [[math.fsum(a * b for a, b in zip(x, y)) for y in rows[: i + 1]] for i, x in enumerate(rows)]
    return Calibration(
        weights="w", made_from="m", guidance_scale=5.0, sigmas=levels, energies=(1.0, 0.5), covered=2.0,
        products=products,
    )  # fmt: skip


def bent(steps: int = STEPS, seed: int = 0) -> Calibration:
    return smooth(6, steps, seed)


@pytest.fixture(scope="module")
def network() -> FlashI2VTransformer3DModel:
    return small_model().requires_grad_(False).eval()


def start(number: int = 0, videos: int = 1) -> Start:
    def some(name: str, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.cat([tensor(f"{name}{number + i}", (1, *shape), scale) for i in range(videos)])

    return Start(
        some("noise", 16, 3, 4, 6, scale=3**0.5), some("condition", 16, 1, 4, 6), some("text", 6, 24),
        some("negative", 6, 24),
    )  # fmt: skip


def sampled(network, calls=None, begin=None, scheduler=None, steps=STEPS, **options):
    scheduler, begin = scheduler or euler_scheduler(SHIFT), begin or start()
    set_timesteps(scheduler, steps, torch.device("cpu"))
    text, negative = begin.text, begin.negative_text
    return denoise(network, scheduler, begin.noise, begin.condition, text, negative, 5.0, calls=calls, **options)


@pytest.mark.parametrize(("given", "found"), [("fast", "fast"), ("2.5", 2.5), (2, 2.0), ("1", "exact"), (1.0, "exact")])
def test_a_speed_has_one_spelling(given, found):
    assert read_speed(given) == found
    assert type(read_speed(given)) is type(found)


@pytest.mark.parametrize("speed", ["quick", 0.5, "nan", math.inf, True, None, "-2", ""])
def test_other_speeds_are_refused(speed):
    with pytest.raises(InputError, match="speed must be one of exact, balanced, fast, or a number from 1"):
        read_speed(speed)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"times": 0.5}, "times must be at least 1"),
        ({"budget": -0.1}, "budget must be at least 0"),
        ({}, "a plan needs a limit"),
        ({"times": 2.0, "order": 3}, "order must be 0 to 2"),
        ({"times": 2.0, "guided": (0.5, 0.2)}, "two sigmas"),
    ],
)
def test_plans_that_make_no_sense_are_refused(numbers, message):
    with pytest.raises(InputError, match=message):
        SamplingPlan(**numbers)


def test_plans_by_name_number_and_object():
    assert plan_of(None).is_exact
    assert plan_of("exact").is_exact
    assert plan_of("fast") is PRESETS["fast"]
    assert plan_of(3).times == 3
    assert not plan_of(SamplingPlan(budget=0.0, cfg_zero=True)).is_exact


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_polynomial_stands_in_exactly_for_one_of_its_order(order):
    past, nodes = Past(), [0.9, 0.7, 0.4][-order - 1 :]
    shape = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for sigma in nodes:
        past.add(sigma, shape * sigma**order)
    assert_close(past.at(0.1, order), shape * 0.1**order, atol=1e-6, rtol=0)
    assert math.isclose(sum(polynomial(0.1, nodes)), 1.0)  # what does not change is kept as it is


def test_what_follows_a_line_is_called_as_often_as_a_line_needs():
    calls = choose_calls(SamplingPlan(budget=1e-4), smooth(1), sigmas(), 5.0)
    assert calls.num_calls == 4  # two points of each part
    assert calls.error < 1e-4
    assert calls.text[0] is calls.guidance[0] is None


def test_a_budget_of_zero_and_a_factor_of_one_leave_nothing_out():
    for plan in (SamplingPlan(budget=0.0), SamplingPlan(times=1.0)):
        calls = choose_calls(plan, bent(), sigmas(), 5.0)
        assert calls.num_calls == calls.num_whole == 2 * STEPS
        assert plan.is_exact


@pytest.mark.parametrize("times", [1.5, 2.0, 2.5, 4.0])
def test_a_factor_of_calls_is_reached_to_one_call(times):
    calls = choose_calls(SamplingPlan(times=times), bent(), sigmas(), 5.0)
    assert 2 * STEPS / times - 1 < calls.num_calls <= 2 * STEPS / times


def test_both_limits_hold_and_more_budget_takes_fewer_calls():
    found = [choose_calls(SamplingPlan(budget=budget), bent(), sigmas(), 5.0) for budget in (1e-4, 1e-3, 1e-2, 0.1)]
    assert all(calls.error <= budget for calls, budget in zip(found, (1e-4, 1e-3, 1e-2, 0.1)))
    numbers = [calls.num_calls for calls in found]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > numbers[-1]


def test_each_loss_is_the_cheapest_by_its_definition():
    """The quick reckoning of losses against one that starts anew for every candidate."""
    calibration, levels, scale = bent(), sigmas(), 5.0
    products = calibration.at(levels)

    def square(text, guidance):
        final = {}
        for first, acts, strength in ((0, text, 1.0), (STEPS, guidance, scale - 1)):
            for i in range(STEPS):
                if acts[i]:
                    continue
                made = [j for j in range(i) if acts[j]]
                choices = []
                for order in range(-1 if first else 0, min(3, len(made))):
                    nodes = made[len(made) - 1 - order :] if order >= 0 else []
                    weights = polynomial(levels[i], [levels[j] for j in nodes])
                    wrong = {first + i: -1.0} | {first + j: w for j, w in zip(nodes, weights)}
                    choices.append((products.square(wrong), wrong))
                for j, weight in min(choices, key=lambda choice: choice[0])[1].items():
                    final[j] = final.get(j, 0.0) + (levels[i + 1] - levels[i]) * strength * weight
        return products.square(final)

    text, guidance = [True] * STEPS, [True] * STEPS
    for _ in range(10):
        candidates = []
        for acts in (text, guidance):
            for i in range(1, STEPS):
                if acts[i] and not (acts is text and guidance[i]):
                    acts[i] = False
                    candidates.append((square(text, guidance), acts is guidance, i))
                    acts[i] = True
        least, of_guidance, step = min(candidates)
        (guidance if of_guidance else text)[step] = False
    calls = choose_calls(SamplingPlan(times=2 * STEPS / (2 * STEPS - 10)), calibration, levels, scale)
    assert [act is None for act in calls.text] == text
    assert [act is None for act in calls.guidance] == guidance
    assert_close(calls.error, math.sqrt(least), rtol=1e-6, atol=1e-9)


def test_guidance_is_called_only_together_with_the_text_and_never_first_looked_for():
    for seed, times in itertools.product(range(5), (1.5, 3.0, 6.0)):
        calls = choose_calls(SamplingPlan(times=times), bent(seed=seed), sigmas(), 5.0)
        assert all(text is None for text, other in zip(calls.text, calls.guidance) if other is None)
        assert calls.text[0] is None
        for acts in (calls.text, calls.guidance):
            for i, act in enumerate(acts):
                if act is not None:
                    assert act < sum(before is None for before in acts[:i])


def test_orders_are_kept():
    assert {*choose_calls(SamplingPlan(times=3, order=0), bent(), sigmas(), 5.0).text} <= {None, 0}


def test_without_guidance_there_is_no_branch_for_it():
    calls = choose_calls(SamplingPlan(times=3), bent(), sigmas(), None)
    assert (calls.guidance, calls.num_whole, calls.num_calls) == ((), STEPS, STEPS // 3)


@pytest.mark.parametrize("steps", [5, 12, 25, 60])
def test_runs_of_other_lengths_take_what_lies_between(steps):
    calls = choose_calls(SamplingPlan(times=2), bent(), sigmas(steps), 5.0)
    assert len(calls.text) == steps
    assert calls.num_calls == steps


def test_products_between_two_levels_are_those_of_a_mean():
    calibration, levels = bent(), sigmas()
    middle = (levels[3] + levels[4]) / 2
    products = calibration.at([levels[3], middle, levels[4], 0.0])
    assert products.square({1: 1.0, 0: -0.5, 2: -0.5}) < 1e-12
    assert_close(products.values, calibration.at([levels[3], middle, levels[4], 0.0]).values)


@torch.no_grad()
def test_the_plain_loop_is_the_plain_loop(network):
    exact = sampled(network)
    begin, scheduler = start(), euler_scheduler(SHIFT)
    set_timesteps(scheduler, STEPS, torch.device("cpu"))
    y = begin.noise
    for t in scheduler.timesteps:
        v, n = (network(y, t.expand(1), x, begin.condition).sample for x in (begin.text, begin.negative_text))
        y = scheduler.step(guided(v, n, 5.0), t, y, return_dict=False)[0]
    assert torch.equal(exact, y)
    every = Calls((None,) * STEPS, (None,) * STEPS)
    assert torch.equal(exact, sampled(network, every))


@torch.no_grad()
def test_a_run_makes_the_calls_of_its_plan_and_no_others(network, monkeypatch):
    calls = choose_calls(SamplingPlan(times=2.5), bent(), sigmas(), 5.0)
    made = []
    call = VelocityField._call
    monkeypatch.setattr(VelocityField, "_call", lambda self, *a: made.append((self._step, a[0])) or call(self, *a))
    sampled(network, calls)
    planned = [(i, "cond") for i, act in enumerate(calls.text) if act is None]
    planned += [(i, "uncond") for i, act in enumerate(calls.guidance) if act is None]
    assert sorted(made) == sorted(planned)
    assert len(made) == calls.num_calls


@torch.no_grad()
def test_videos_of_a_batch_are_those_one_by_one(network):
    calls = choose_calls(SamplingPlan(times=2.5), bent(), sigmas(), 5.0)
    together = sampled(network, calls, start(0, videos=2))
    for i in range(2):
        assert_close(together[i : i + 1], sampled(network, calls, start(i)), atol=2e-5, rtol=0)
    assert_close(together, sampled(network, calls, start(0, videos=2), cfg_batch=True), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["euler", "unipc", "dpm++"])
def test_a_plan_goes_with_every_scheduler_of_one_path(network, name):
    scheduler = make_scheduler(name, SHIFT)
    set_timesteps(scheduler, STEPS, torch.device("cpu"))
    levels = scheduler.sigmas.tolist()
    exact = sampled(network, scheduler=make_scheduler(name, SHIFT))
    errors = []
    for times in (1.1, 4.0):
        calls = choose_calls(SamplingPlan(times=times), bent(), levels, 5.0)
        planned = sampled(network, calls, scheduler=make_scheduler(name, SHIFT))
        errors.append(float((planned - exact).norm() / exact.norm()))
    assert 0 < errors[0] < errors[1] < 1


@pytest.mark.parametrize("scheduler", [FlowMatchHeunDiscreteScheduler(shift=SHIFT), FlowMatchLCMScheduler(shift=SHIFT)])
def test_other_schedulers_are_refused(network, scheduler):
    with pytest.raises(InputError, match="choose the scheduler euler, unipc or dpm"):
        sampled(network, Calls((None,) * STEPS, (None,) * STEPS), scheduler=scheduler)


def test_a_cache_of_diffusers_beside_a_plan_is_refused():
    model = small_model().eval()
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(InputError, match=r"call disable_cache\(\), or leave speed at exact"):
        sampled(model, Calls((None,) * STEPS, (None,) * STEPS))
    model.disable_cache()
    sampled(model, Calls((None, 0), (None, 0)), steps=2)


@torch.no_grad()
def test_what_a_callback_changes_is_computed_anew(network):
    """Nothing stands in for velocities of another state or text."""
    calls = Calls((None,) + (0,) * (STEPS - 1), (None,) + (0,) * (STEPS - 1))
    begin, made = start(), {}
    for name in ("nothing", "state", "text"):
        field = VelocityField(network, begin.condition, begin.text, begin.negative_text, 5.0, calls=calls)

        def on_step(step, timestep, y, name=name, field=field):
            if step == 3 and name == "state":
                return y * 0.5
            if step == 3 and name == "text":
                field.text = field.text + 1
            return y

        scheduler = euler_scheduler(SHIFT)
        set_timesteps(scheduler, STEPS, torch.device("cpu"))
        field.follow(scheduler, begin.noise, on_step=on_step)
        made[name] = [i for i, (called, _) in enumerate(field.made) if called]
    assert made == {"nothing": [0], "state": [0, 4], "text": [0, 4]}


@torch.no_grad()
def test_guidance_that_a_callback_ends_takes_no_calls(network):
    calls = Calls((None,) * STEPS, (None,) * STEPS)
    begin = start()
    field = VelocityField(network, begin.condition, begin.text, begin.negative_text, 5.0, calls=calls)

    def on_step(step, timestep, y):
        field.guidance_scale = 1.0 if step >= 4 else 5.0
        return y

    scheduler = euler_scheduler(SHIFT)
    set_timesteps(scheduler, STEPS, torch.device("cpu"))
    field.follow(scheduler, begin.noise, on_step=on_step)
    assert [other for _, other in field.made] == [True] * 5 + [False] * (STEPS - 5)


@torch.no_grad()
def test_outside_of_its_sigmas_nothing_is_guided(network):
    levels = sigmas()
    calls = choose_calls(SamplingPlan(times=1.0, guided=(levels[8], levels[2])), None, levels, 5.0)
    assert calls.guidance == (NOTHING,) * 2 + (None,) * 7 + (NOTHING,) * 3
    begin, scheduler = start(), euler_scheduler(SHIFT)
    set_timesteps(scheduler, STEPS, torch.device("cpu"))
    y = begin.noise
    for i, t in enumerate(scheduler.timesteps):
        v, n = (network(y, t.expand(1), x, begin.condition).sample for x in (begin.text, begin.negative_text))
        y = scheduler.step(guided(v, n, 5.0) if 2 <= i <= 8 else v, t, y, return_dict=False)[0]
    assert_close(sampled(network, calls), y, atol=1e-5, rtol=0)


def test_cfg_zero_is_that_of_diffusers():
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=0)
    v, n = (torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(2))
    guider.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(500))
    assert_close(guided_zero(v, n, 5.0), guider.forward(v, n).pred)


@torch.no_grad()
def test_with_cfg_zero_the_first_step_stands_still(network):
    calls = choose_calls(SamplingPlan(times=1.0, cfg_zero=True), None, sigmas(), 5.0)
    begin, states = start(), []
    found = sampled(network, calls, begin, on_step=lambda step, t, y: states.append(y) or y)
    assert torch.equal(states[0], begin.noise)
    assert not torch.equal(found, sampled(network))


@pytest.fixture(scope="module")
def calibrated(network) -> Calibration:
    starts = [start(10, videos=2), start(12)]
    return calibrate(network, euler_scheduler(SHIFT), starts, STEPS, 5.0, weights="w", made_from="3 pictures")


@torch.no_grad()
def test_products_are_those_of_the_velocities_of_runs(network, calibrated):
    """By the definition: half of the whole, half of what moves, by what the final latents have of both."""
    parts, ends = [], []
    for i in (10, 11, 12):
        begin, seen = start(i), {"text": [], "guidance": []}

        scheduler = euler_scheduler(SHIFT)
        set_timesteps(scheduler, STEPS, torch.device("cpu"))
        y = begin.noise
        for t in scheduler.timesteps:
            v, n = (network(y, t.expand(1), x, begin.condition).sample for x in (begin.text, begin.negative_text))
            seen["text"].append(v)
            seen["guidance"].append(v - n)
            y = scheduler.step(guided(v, n, 5.0), t, y, return_dict=False)[0]
        parts.append(torch.stack(seen["text"] + seen["guidance"]).squeeze(1).double())
        ends.append(y.squeeze(0).double())

    def moving(x):
        return x - x.mean(-3, keepdim=True)

    whole, moved = (torch.stack([f(end).square().sum() for end in ends]).mean() for f in (lambda x: x, moving))
    products = sum(
        (x.flatten(1) @ x.flatten(1).T) / whole / 2 + (moving(x).flatten(1) @ moving(x).flatten(1).T) / moved / 2
        for x in parts
    ) / len(parts)
    assert_close(calibrated.energies, (whole.item(), moved.item()), rtol=1e-5, atol=0)
    for i, row in enumerate(calibrated.products):
        assert_close(torch.tensor(row, dtype=torch.float64), products[i, : i + 1], rtol=1e-4, atol=1e-6)


def test_a_first_stand_in_errs_as_predicted(network, calibrated):
    """Where no state is off yet: over the calibrated runs, true errors and velocities have the predicted squares."""
    step, levels = 4, sigmas()
    act = tuple(1 if i == step else None for i in range(STEPS))
    lines = dict(zip((2, 3), polynomial(levels[step], [levels[2], levels[3]])))
    wrong = {part * STEPS + i: weight * (1, 4)[part] for part in (0, 1) for i, weight in {step: -1.0, **lines}.items()}
    products = calibrated.at(levels)
    predicted = math.sqrt(products.square(wrong) / products.square({step: 1.0, STEPS + step: 4.0}))
    calls = Calls(act, act, tuple(predicted if i == step else 0.0 for i in range(STEPS)))
    found = [
        compared
        for begin in (start(10), start(11), start(12))
        for compared in compare(network, euler_scheduler(SHIFT), begin, 5.0, calibrated, calls)
    ]
    assert [compared.step for compared in found] == [step] * 3
    assert min(compared.true for compared in found) <= predicted <= max(compared.true for compared in found)


def test_covered_holds_on_the_runs_that_it_was_made_from(network, calibrated):
    calls = choose_calls(PRESETS["fast"], calibrated, sigmas(), 5.0)
    assert calls.num_calls < calls.num_whole
    found = [
        compared
        for i in (10, 11, 12)
        for compared in compare(network, euler_scheduler(SHIFT), start(i), 5.0, calibrated, calls)
    ]
    inside = sum(compared.true <= calibrated.covered * compared.predicted for compared in found)
    assert inside >= 0.9 * len(found)


def test_calibration_needs_guided_runs_and_several(network):
    with pytest.raises(InputError, match="at least 2 pictures"):
        calibrate(network, euler_scheduler(SHIFT), [start()], 3, 5.0, weights="w", made_from="m")
    with pytest.raises(InputError, match="guidance_scale above 1"):
        calibrate(network, euler_scheduler(SHIFT), [start()], 3, 1.0, weights="w", made_from="m")


def test_a_file_gives_back_the_same_decisions(tmp_path):
    calibration = bent()
    (tmp_path / FILE).write_text(as_text(calibration))
    found = read_calibration([tmp_path / "nowhere", tmp_path], "w")
    for times in (1.5, 2.5, 4.0):
        plan = SamplingPlan(times=times)
        one, other = (choose_calls(plan, each, sigmas(), 5.0) for each in (calibration, found))
        assert (one.text, one.guidance) == (other.text, other.guidance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"w"', '"other"'), "was made for other weights"),
        (lambda text: text[:-200], "is no calibration"),
        (lambda text: text.replace('"covered": 2.0', '"covered": -1.0'), "is no calibration.*covered"),
        (lambda text: text.replace('"guidance_scale"', '"guidance"'), "is no calibration.*guidance"),
    ],
)
def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path, change, message):
    (tmp_path / FILE).write_text(change(as_text(bent())))
    with pytest.raises(InputError, match=message) as refused:
        read_calibration([tmp_path], "w")
    assert len(str(refused.value)) < 500 + len(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_without_a_file_it_is_said_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="flashi2v-model calibrate DIR --pictures FOLDER"):
        read_calibration([tmp_path], "w")


def test_a_record_lists_what_was_called_and_skipped():
    calls = Calls((None, 0, None), (None, 0, 0), (0.0, 0.1, 0.05), 0.02, 2.0)
    record = as_record(calls, [(True, True), (False, False), (True, False)])
    assert record["calls"] == {
        "prompt": {"called": [0, 2], "skipped": [1]},
        "negative_prompt": {"called": [0], "skipped": [1, 2]},
    }
    assert (record["num_calls"], record["num_calls_exact"], record["predicted_error"]) == (3, 6, 0.02)


def test_inner_products_measure_lengths():
    products = Products([[2.0, 1.0], [1.0, 3.0]])
    assert products.square({0: 1.0, 1: -2.0}) == 2 + 12 - 4


@pytest.fixture(scope="module")
def pipeline_directory(tmp_path_factory) -> Path:
    """A whole pipeline with random weights for 5 frames of 32x32."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    presets.init("tiny", directory)
    transformer = FlashI2VTransformer3DModel.from_pretrained(directory / "transformer")
    for parameter in transformer.parameters():
        if not parameter.any():  # or every velocity would be zero
            torch.nn.init.normal_(parameter, std=0.1)
    transformer.save_pretrained(directory / "transformer")
    index = json.loads((directory / "model_index.json").read_text())
    index["defaults"] = {"num_frames": 5, "height": 32, "width": 32}
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (50, 40), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{colour} everywhere\n")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["flashi2v-model", *map(str, arguments)])
        ended = 0
        try:
            cli.main()
        except SystemExit as exit_:
            ended = exit_.code or 0
        told = capsys.readouterr()
        assert ended == code, told.err
        return told.err if code else told.out

    return command


def test_the_command_writes_a_file_beside_the_transformer(run, pipeline_directory, pictures):
    weights = fingerprint(pipeline_directory / "transformer")
    options = ("--pictures", pictures, "--num-inference-steps", 4, "--device", "cpu", "--batch", 2)
    told = run("calibrate", pipeline_directory, *options)
    assert told.startswith(f"wrote {pipeline_directory / 'transformer' / FILE}, from 2 pictures, 5 frames of 32x32")
    found = read_calibration([pipeline_directory / "transformer"], weights)
    assert (found.num_steps, found.guidance_scale) == (4, 5.0)
    first = (pipeline_directory / "transformer" / FILE).read_text()
    run("calibrate", pipeline_directory, *options)  # also over the one that is there
    assert (pipeline_directory / "transformer" / FILE).read_text() == first


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda folder: (folder / "1.txt").unlink(), (), "1.png needs a prompt: write what happens into 1.txt"),
        (lambda folder: (folder / "1.png").unlink(), (), "holds 1 pictures"),
        (lambda folder: (folder / "1.png").write_bytes(b"no picture"), (), "1.png cannot be read"),
        (lambda folder: None, ("--guidance-scale", 1), "--guidance-scale must be above 1"),
        (lambda folder: None, ("--num-inference-steps", 2), "--num-inference-steps must be at least 3"),
        (lambda folder: None, ("--batch", 0), "--batch must be at least 1"),
    ],
)
def test_the_command_refuses_in_one_line(run, pipeline_directory, pictures, spoil, options, message):
    spoil(pictures)
    told = run("calibrate", pipeline_directory, "--pictures", pictures, "--device", "cpu", *options, code=2)
    assert message in told.replace("\n", " ")
    assert told.count("\n") == 1


def test_what_is_no_pipeline_is_refused(run, tmp_path, pictures):
    assert "holds no model_index.json" in run("calibrate", tmp_path, "--pictures", pictures, "--device", "cpu", code=2)


def test_weights_that_answer_with_zeros_are_refused():
    model = small_model().eval()
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    with pytest.raises(InputError, match="answers with zeros"):
        calibrate(model, euler_scheduler(SHIFT), [start(videos=2)], 3, 5.0, weights="w", made_from="m")


@pytest.mark.slow
@torch.no_grad()
def test_a_thousand_seeds_make_the_same_calls(network):
    steps = 6
    calls = choose_calls(SamplingPlan(times=3), bent(steps), sigmas(steps), 5.0)
    condition, text, negative = (tensor(name, (1, *shape)) for name, shape in (
        ("condition", (16, 1, 2, 2)), ("text", (4, 24)), ("negative", (4, 24)),
    ))  # fmt: skip
    made, ends = set(), set()
    for seed in range(1000):
        scheduler = euler_scheduler(SHIFT)
        set_timesteps(scheduler, steps, torch.device("cpu"))
        field = VelocityField(network, condition, text, negative, 5.0, calls=calls)
        end = field.follow(scheduler, torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(seed)))
        made.add(tuple(field.made))
        ends.add(float(end.sum()))
    assert len(made) == 1
    assert len(ends) == 1000
