import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flashi2v_model
from flashi2v_data.errors import InputError
from flashi2v_data.settings import load_config
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import ConfiguredModel, ModelDirectory, load_from_pretrained
from flashi2v_infer.placement import place
from flashi2v_infer.plan.measured import Measured, Meter, comparison
from flashi2v_infer.plan.plan import group_sizes, make_plan, target_device
from flashi2v_infer.plan.skeleton import Parts, build_parts, parts_of
from flashi2v_infer.settings import SamplingSettings
from flashi2v_model import layers, presets
from flashi2v_model.caching import conditions_kept
from flashi2v_model.cost import FORMULAS, num_bytes
from flashi2v_model.sampling import VelocityField
from flashi2v_npu_ops.backends import half_spectrum

SMALL = SamplingSettings(num_frames=9, height=64, width=96, num_inference_steps=3, max_sequence_length=24)
TIME = 2 * (64 * 128 + 7 * 128**2)  # operations that embed a timestep
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def real(model_directory):
    """The tiny pipeline's parts, with numbers."""
    pipe = load_from_pretrained(str(model_directory), Execution(device="cpu"))
    return Parts(pipe.transformer, pipe.text_encoder, pipe.vae)


@pytest.fixture(scope="module")
def planned(model_directory):
    return parts_of(ModelDirectory(str(model_directory), Execution()), "cpu")


@pytest.fixture
def no_tables():
    """Forget the tables that other tests have computed, which a run computes once, and a plan too."""
    for module in (layers, half_spectrum):
        for function in vars(module).values():
            if hasattr(kept := getattr(function, "__wrapped__", None), "cache_clear"):
                kept.cache_clear()


@pytest.mark.parametrize(
    "execution",
    [
        Execution(),
        Execution(cfg_batch=True),
        Execution(vae_tiling=True, vae_slicing=True),
        Execution(device="cuda", offload="model"),
        Execution(device="cuda", offload="group"),
    ],
)
@pytest.mark.parametrize("num_videos", [1, 2])
@pytest.mark.usefixtures("no_tables")
def test_the_plan_is_what_the_same_run_takes(real, planned, execution, num_videos):
    if num_videos == 1 and execution.vae_slicing:
        pytest.skip("one video is its own slice")
    plan = make_plan(planned, SMALL, execution, "cpu", None, num_videos)
    run = make_plan(real, SMALL, execution, "cpu", None, num_videos)
    assert plan.stages == run.stages
    assert plan == run


def test_operations_are_those_that_torch_counts_in_real_steps(real, planned):
    plan = make_plan(planned, SMALL, Execution(), "cpu", None)
    latents = torch.randn(1, 16, 3, 8, 12)
    text, negative = torch.randn(2, 1, 24, 64)
    velocity = VelocityField(real.transformer, latents[:, :, :1], text, negative, 5.0, 0.1, cfg_batch=False)
    counts = []
    with conditions_kept(real.transformer), torch.no_grad():
        for timestep in (900.0, 600.0, 300.0):
            with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
                velocity(latents, torch.tensor(timestep))
            counts.append(counter.get_total_flops())
    assert counts[0] > counts[1] == counts[2] == plan.step_flops
    assert plan.stages[2].flops == sum(counts)
    assert plan.calls_per_step == 2
    unguided = make_plan(planned, SamplingSettings(9, 64, 96, 3, 1.0, max_sequence_length=24), Execution(), "cpu", None)
    assert 2 * unguided.step_flops - TIME == plan.step_flops
    assert unguided.calls_per_step == 1


def _formulas():
    def with_shapes(formula):
        formula._get_raw = True
        return formula

    return {operator: with_shapes(FORMULAS[operator]) for operator in FORMULAS if "for_cpu" in str(operator)}


def test_the_largest_model_fits_a_card_of_8_gb_with_low_memory():
    execution = Execution(device="cuda", low_memory=True)
    dtypes = execution.settle(torch.device("cuda")).dtypes
    parts = build_parts(presets.TRANSFORMERS["14b"], None, None, dtypes)
    plan = make_plan(parts, SamplingSettings(), execution, "cuda", None)
    assert plan.peak < 6 * 2**30
    assert plan.num_tokens == 20280
    assert 14.2e9 < plan.parameters["transformer"] < 14.4e9
    assert 5.6e9 < plan.parameters["text encoder"] < 5.8e9
    assert plan.decoding == "whole pictures"


def test_offloading_takes_weights_off_the_device(planned):
    none, model, group = (
        make_plan(planned, SMALL, Execution(device="cuda", offload=offload), "cuda", None)
        for offload in ("none", "model", "group")
    )
    weights = {name: num_bytes(module) for name, module in planned.modules.items()}
    assert none.stages[0].weights == sum(weights.values())
    assert none.stages[2].weights == weights["transformer"] + weights["VAE"]
    assert model.stages[0].weights == weights["text encoder"]
    assert model.stages[3].weights == weights["VAE"]
    assert [stage.weights for stage in group.stages[2:]] == [weights["VAE"]] * 2
    assert group.stages[2].peak < model.stages[2].peak
    assert group.stages[2].flops == model.stages[2].flops == none.stages[2].flops


def test_both_branches_at_once_are_one_call_of_the_same_work_in_more_memory(planned):
    one, both = (make_plan(planned, SMALL, Execution(cfg_batch=batch), "cpu", None) for batch in (False, True))
    assert (one.calls_per_step, both.calls_per_step) == (2, 1)
    assert both.step_flops == one.step_flops + TIME  # which branches that follow each other share
    assert both.stages[2].peak > one.stages[2].peak


def test_groups_are_those_that_diffusers_moves(model_directory):
    pipe = load_from_pretrained(str(model_directory), Execution(device="cpu"))
    expected = group_sizes(pipe.transformer, pipe.text_encoder, False)
    place(pipe, Execution(device="cuda", offload="group"), CPU)
    moved = {}
    for module in (*pipe.transformer.modules(), *pipe.text_encoder.modules()):
        hook = getattr(module, "_diffusers_hook", None)
        hook = hook and hook.get_hook("group_offloading")
        if hook is not None:
            inside = (p for part in hook.group.modules for p in part.parameters())
            tensors = {id(tensor): tensor for tensor in (*hook.group.parameters, *inside)}.values()
            if tensors:
                moved[module] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert moved == expected


def test_a_card_that_fetches_ahead_holds_one_block_more(planned):
    plain = group_sizes(planned.transformer, planned.text_encoder, False)
    ahead = group_sizes(planned.transformer, planned.text_encoder, True)
    block = planned.transformer.blocks[0]
    assert ahead[block] == 2 * plain[block]
    assert ahead[planned.transformer] == plain[planned.transformer]


_GROWTH = """
import ctypes

import torch
from flashi2v_model.cost import num_bytes, tracing
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.sampling import VelocityField
from flashi2v_npu_ops.backends import half_spectrum
from flashi2v_npu_ops.device import peak_memory, reset_peak_memory

torch.set_num_threads(1)
sizes = dict(num_attention_heads=8, attention_head_dim=128, ffn_dim=4096, num_layers=4, text_dim=256)

def run(device):
    with torch.device("meta"):
        transformer = FlashI2VTransformer3DModel(**sizes)
    if device == "cpu":
        transformer.to_empty(device="cpu")
        for parameter in transformer.parameters():
            torch.nn.init.constant_(parameter, 0.01)
    latents = torch.ones(1, 16, 3, 32, 32, device=device)
    with tracing() as trace:
        trace.hold(num_bytes(transformer))
        text = torch.ones(1, 64, 256, device=device)
        velocity = VelocityField(transformer, latents[:, :, :1], text, None, 1.0, 0.1, cfg_batch=False)
        velocity(latents, torch.tensor(500.0, device=device))
    return trace.peak

predicted = run("meta")
ctypes.CDLL(None).malloc_trim(0)  # importing has released much, which would be used again
reset_peak_memory(torch.device("cpu"))
before = peak_memory(torch.device("cpu"))
run("cpu")
print(predicted, peak_memory(torch.device("cpu")) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a process's peak start anew")
def test_a_real_process_grows_by_what_was_predicted():
    result = subprocess.run([sys.executable, "-c", _GROWTH], capture_output=True, text=True, check=True)
    predicted, grown = map(int, result.stdout.split())
    assert predicted > 300 * 2**20
    assert 0.8 < grown / predicted < 1.4


def test_a_configuration_file_is_planned_from_its_parts(job, model_directory, planned):
    config = load_config(job(ae={"enable_tiling": True}), InferenceConfig)
    parts = parts_of(ConfiguredModel(config, Execution()), "cpu")
    assert parts.assumptions == ()
    assert parts.vae.use_tiling
    assert {p.device.type for module in parts.modules.values() for p in module.parameters()} == {"meta"}
    assert num_bytes(*parts.modules.values()) == num_bytes(*planned.modules.values())
    plan = make_plan(parts, config.sampling, Execution(), "cpu", None)
    assert plan.decoding == "the tiles that are set for the VAE"
    half = parts_of(ConfiguredModel(config, Execution(dtype="bf16", vae_dtype="bf16")), "cpu")
    assert half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.transformer.scale_shift_table.dtype == torch.float32


def test_what_is_not_on_the_disk_is_assumed_and_said():
    parts = parts_of(ModelDirectory("somebody/FlashI2V", Execution()), "cuda")
    plan = make_plan(parts, SMALL, Execution(), "cuda", None)
    text = str(plan)
    for part in ("transformer's sizes are taken to be FlashI2V 1.3B's", "VAE's sizes are taken to be Wan2.1's"):
        assert part in text
    assert "operations per step" in text
    assert "6 in all; 72 tokens a video, 1 at a time" in text


def test_a_plan_asks_for_the_conditioning_that_the_network_asks_for(planned):
    with pytest.raises(InputError, match="this FlashI2VTransformer3DModel asks for none, got motion"):
        make_plan(planned, replace(SMALL, conditioning={"motion": 0.7}), Execution(), "cpu", None)


def test_a_damaged_config_is_one_line(model_directory, tmp_path):
    for name in ("transformer", "vae"):
        (tmp_path / name).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(flashi2v_model.InputError, match=r"--model: .*vae/config\.json cannot be read"):
        parts_of(ModelDirectory(str(tmp_path), Execution()), "cpu")


def test_a_run_can_be_planned_for_a_device_that_is_elsewhere():
    if not torch.cuda.is_available():
        assert target_device("cuda") == ("cuda", None)
    device_type, free = target_device("cpu")
    assert device_type == "cpu"
    assert free is None or free > 2**20
    with pytest.raises(InputError, match="unknown device type 'tpu'"):
        target_device("tpu")


def test_measured_figures_stand_beside_the_planned(planned):
    plan = make_plan(planned, SMALL, Execution(), "cpu", None)
    meter = Meter(CPU)
    tensors = {"latents": torch.zeros(1)}
    for step in range(3):
        assert meter.on_step_end(None, step, None, tensors) is tensors
    measured = meter.read()
    assert measured.seconds_per_step is not None
    assert measured.seconds_per_step > 0
    assert measured.peak > 50 * 2**20
    table = comparison(plan, measured)
    assert f"| peak memory | {plan.peak / 2**20:.1f} MiB | {measured.peak / 2**30:.2f} GiB |" in table
    assert "resident in this process on the CPU, Python and libraries included" in table
    rate = f"{plan.step_flops / 0.5 / 1e9:.1f} GFLOP/s"
    assert f"| operations per second | | {rate} |" in comparison(plan, Measured(CPU, 2**30, 0.5))
    on_gpu = comparison(plan, Measured(torch.device("cuda"), 2**30, None))
    assert "what PyTorch allocated on cuda" in on_gpu


def test_a_plan_reads_no_weights(model_directory, tmp_path):
    for name in ("transformer", "text_encoder", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((model_directory / name / "config.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    parts = parts_of(ModelDirectory(str(tmp_path), Execution()), "cpu")
    assert parts.assumptions == ()
    assert make_plan(parts, SMALL, Execution(), "cpu", None).peak > 0


def test_small_models_are_planned_in_small_units(planned):
    text = str(make_plan(planned, SMALL, Execution(), "cpu", None))
    assert " 0.00 " not in text
    assert "transformer 1.31 million" in text


def test_a_plan_says_what_context_parallelism_changes(planned):
    plan = make_plan(planned, SMALL, Execution(context_parallel_size=2), "cpu", None)
    assert "each of 2 has less to do" in str(plan)


def test_a_sampler_that_evaluates_the_network_twice_a_step_takes_more_work(planned):
    euler, heun = (make_plan(planned, SMALL, Execution(), "cpu", None, scheduler=name) for name in ("euler", "heun"))
    assert (euler.num_steps, heun.num_steps) == (3, 5)
    assert heun.stages[2].flops == euler.stages[2].flops + 2 * euler.step_flops
