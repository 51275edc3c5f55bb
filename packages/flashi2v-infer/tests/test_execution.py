import copy
import gc
import json
import subprocess
import sys
import weakref
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch._dynamo.utils import counters

import flashi2v_infer.decoding
from flashi2v_data.errors import InputError
from flashi2v_infer.arguments import prepare_image
from flashi2v_infer.commands.sampler import psnr
from flashi2v_infer.decoding import Decoding, choose_decoding, decode_within_memory, decoding_as, predicted_peak
from flashi2v_infer.execution import LOW_MEMORY_BUDGET, DTypes, Execution
from flashi2v_infer.load import load_from_pretrained
from flashi2v_infer.placement import encode_prompts, place, put_away_text_encoder
from flashi2v_model.cost import num_bytes, tracing
from flashi2v_model.encoders import decode_video, encode_video
from flashi2v_model.sampling import VelocityField
from flashi2v_model.scheduler import euler_scheduler, inference_sigmas

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cpu", "offload": "model"}, "the device is the CPU: leave it out"),
        ({"device": "cpu", "low_memory": True}, "offload 'group' (or low_memory)"),
        ({"low_memory": True, "offload": "model"}, "low_memory offloads in groups, not 'model'"),
        ({"low_memory": True, "offload": "none"}, "low_memory offloads in groups, not 'none'"),
        ({"low_memory": True, "cfg_batch": True}, "leave out cfg_batch or low_memory"),
        ({"low_memory": True, "keep_text_encoder": True}, "leave out keep_text_encoder or low_memory"),
        ({"compile": True, "offload": "group"}, "compile cannot be combined with offload 'group'"),
        ({"compile": True, "low_memory": True}, "compile cannot be combined with offload 'group'"),
        ({"offload": "disk"}, "offload must be one of none, model, group, got 'disk'"),
        ({"vae_dtype": torch.bfloat16}, "vae_dtype must be one of fp32, float32, bf16, fp16, got torch.bfloat16"),
        ({"dtype": "int8"}, "dtype must be one of fp32, float32, bf16, fp16, got 'int8'"),
    ],
)
def test_contradictions_are_one_line(settings, message):
    with pytest.raises(InputError) as error:
        Execution(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["cpu:0", None])
def test_offloading_from_the_cpu_is_refused_before_anything_is_loaded(model_directory, monkeypatch, device):
    monkeypatch.setattr("flashi2v_infer.load.resolve_device", lambda name, index=None: CPU)  # what "auto" finds here
    with pytest.raises(InputError, match="the device is the CPU"):
        load_from_pretrained(str(model_directory), Execution(device=device, offload="model"))


def test_an_execution_is_made_without_heavy_imports():
    code = "import sys, flashi2v_infer.execution; print({'torch', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_low_memory_settles_what_is_left_open_and_bows_to_what_is_said():
    execution = Execution(low_memory=True)
    assert execution.offloading == "group"
    file = DTypes("fp16", "bf16", "float32")
    assert execution.dtypes(file) == ("fp16", "bf16", "bf16")
    assert Execution().dtypes(file) == ("fp16", "bf16", "fp32")
    assert Execution(low_memory=True, dtype="fp32", vae_dtype="fp32").dtypes(file) == ("fp32",) * 3


def test_dtypes_are_those_that_suit_the_device_where_nothing_names_them():
    assert Execution().settle(torch.device("cuda")).dtypes == ("bf16", "bf16", "fp32")
    assert Execution(dtype="fp16").settle(torch.device("cuda")).dtypes == ("fp16", "fp16", "fp32")
    settled = Execution().settle(CPU)
    assert settled.dtypes == ("fp32",) * 3
    assert settled.device == CPU


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    return vae.requires_grad_(False).eval()


SHAPE = (2, 16, 3, 40, 56)  # 320 x 448 pixels


def test_decoding_is_whole_then_sliced_then_in_ever_smaller_tiles(vae):
    ways = [Decoding(), Decoding(True), *(Decoding(True, tile) for tile in ((384, 288), (256, 192), (128, 96)))]
    needs = [predicted_peak(vae, SHAPE, way) for way in ways]
    assert needs == sorted(needs, reverse=True)
    for way, need in zip(ways, needs):
        assert choose_decoding(vae, SHAPE, Execution(), int(need / 0.8) + 1) == way
    assert choose_decoding(vae, SHAPE, Execution(), None) == Decoding()


def test_decoding_that_does_not_fit_is_tried_and_warned_about(vae, caplog):
    assert choose_decoding(vae, SHAPE, Execution(), 2**20) == Decoding(True, (128, 96))
    assert "GiB even in tiles of 128 pixels, 96 apart, one video at a time" in caplog.text


def test_tiles_and_slices_can_be_forced_on_and_off(vae):
    plenty, little = 2**40, 2**20
    assert choose_decoding(vae, SHAPE, Execution(vae_tiling=True), plenty) == Decoding(True, (384, 288))
    assert choose_decoding(vae, SHAPE, Execution(vae_tiling=True, vae_slicing=False), plenty).sliced is False
    assert choose_decoding(vae, SHAPE, Execution(vae_slicing=True), plenty) == Decoding(True)
    assert choose_decoding(vae, SHAPE, Execution(vae_tiling=False), little) == Decoding(True)
    assert choose_decoding(vae, (1, 16, 3, 8, 8), Execution(vae_tiling=True), little) == Decoding()
    assert choose_decoding(vae, SHAPE, Execution(low_memory=True), None) == Decoding()


def test_low_memory_decodes_within_its_budget_however_much_is_free(vae, monkeypatch):
    monkeypatch.setattr(flashi2v_infer.decoding, "LOW_MEMORY_BUDGET", int(predicted_peak(vae, SHAPE, Decoding(True))))
    assert choose_decoding(vae, SHAPE, Execution(low_memory=True), 2**40).tile is not None
    assert LOW_MEMORY_BUDGET < 8e9


def test_tiling_that_is_already_on_stays_as_it_is(vae):
    own = AutoencoderKLWan.from_config(vae.config)
    own.enable_tiling(128, 128, 64, 64)
    assert choose_decoding(own, SHAPE, Execution(), 2**40) is None
    assert choose_decoding(own, SHAPE, Execution(vae_tiling=False), 2**40) == Decoding()


def test_slicing_that_is_already_on_stays_on(vae):
    own = AutoencoderKLWan.from_config(vae.config)
    own.enable_slicing()
    assert choose_decoding(own, SHAPE, Execution(), None) == Decoding(True)
    assert choose_decoding(own, SHAPE, Execution(vae_slicing=False), None) == Decoding()


@pytest.mark.parametrize("way", [Decoding(), Decoding(True), Decoding(False, (128, 96)), Decoding(True, (128, 96))])
def test_the_predicted_peak_is_what_decoding_takes(vae, way):
    latents = torch.randn(2, 16, 2, 24, 32)
    with decoding_as(vae, way), tracing() as trace:
        decode_video(vae, latents)
    predicted = predicted_peak(vae, tuple(latents.shape), way)
    if way == Decoding():
        assert predicted == trace.peak
    assert trace.peak <= predicted <= 1.3 * trace.peak


@torch.no_grad()
def test_slices_are_equal_tiles_nearly_and_the_vae_is_left_as_it_was(vae, photograph):
    # In fp32, one video and two round apart, how far depends on the CPU.
    vae = copy.deepcopy(vae).double()
    height, width = 144, 160
    frames = torch.stack(
        [prepare_image(picture, height, width) for picture in (photograph, photograph[:, ::-1].copy())]
    )
    video = frames.repeat(1, 1, 5, 1, 1) * torch.linspace(1, 0.8, 5)[:, None, None]  # (2, 3, 5, H, W), growing darker
    latents = encode_video(vae, video)
    whole = decode_video(vae, latents)
    sliced, way = decode_within_memory(vae, latents, Execution(vae_slicing=True, vae_tiling=False))
    assert way == "whole pictures, one video at a time"
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-6)
    tiled, way = decode_within_memory(vae, latents, Execution(vae_tiling=True))
    assert way == "tiles of 128 pixels, 96 apart, one video at a time"
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    ours, theirs = ((x * 127.5 + 127.5).round().to(torch.uint8).numpy() for x in (tiled, whole))
    assert 25 < psnr(ours, theirs) < 40  # 27.8 dB: the seams of a VAE with random weights
    assert not vae.use_tiling
    assert not vae.use_slicing
    assert vae.tile_sample_min_height == 256


def test_the_way_of_decoding_is_logged_once(vae, caplog, monkeypatch):
    monkeypatch.setattr(flashi2v_infer.decoding, "_reported", set())
    caplog.set_level("DEBUG")
    for _ in range(2):
        decode_within_memory(vae, torch.zeros(1, 16, 1, 4, 6), Execution())
    assert caplog.text.count("decoding (1, 16, 1, 4, 6) in whole pictures") == 1


def load(model_directory, **settings):
    """A fresh pipeline under an execution, with the CPU for an accelerator: the hooks are the same."""
    pipe = load_from_pretrained(str(model_directory), Execution(device="cpu", dtype="fp32"))
    pipe.set_progress_bar_config(disable=True)
    execution = Execution(device="cuda", **settings)
    place(pipe, execution, CPU)
    return pipe, execution


def sample(pipe, photograph):
    return pipe(
        image=photograph,
        prompt="a red circle",
        num_frames=5,
        height=32,
        width=48,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        max_sequence_length=24,
    ).frames


@pytest.mark.parametrize("settings", [{"offload": "model"}, {"offload": "group"}, {"low_memory": True}])
def test_offloading_changes_nothing_of_the_video(model_directory, sampled, photograph, settings):
    pipe, _ = load(model_directory, **settings)
    assert pipe._execution_device.type == "cpu"
    expected = sampled(image=photograph)
    for _ in range(2):  # the second run starts from where the first has left the parts
        torch.testing.assert_close(sample(pipe, photograph), expected, rtol=0, atol=1e-6)


def pretend(offload):
    pytest.importorskip("torch", "2.13", reason="older versions of torch cannot pretend to have another device")
    command = [sys.executable, str(Path(__file__).with_name("pretended_card.py")), offload]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_every_stage_finds_its_weights_on_the_card_and_no_others(model_directory, offload):
    result = pretend(offload)
    assert result.returncode == 0, result.stderr[-2000:]
    seen = json.loads(result.stdout)
    within, block = seen["in the text encoder"], seen["in a block"]
    after = [seen["after the image"], seen["after decoding"]]
    if offload == "model":
        assert within["text encoder"] > 0
        assert [within[part] for part in ("blocks", "ends", "VAE")] == [0, 0, 0]
        assert block["text encoder"] == 0
        assert min(block[part] for part in ("blocks", "ends", "VAE")) > 0
        assert after[1]["blocks"] == after[1]["ends"] == after[1]["text encoder"] == 0
    else:
        assert [within[part] for part in ("text encoder", "blocks", "ends")] == [0, 0, 0]  # its leaves come one by one
        pipe, _ = load(model_directory)
        assert block["blocks"] == num_bytes(pipe.transformer.blocks[0])
        assert block["ends"] > 0
        assert [place["blocks"] + place["ends"] + place["text encoder"] for place in after] == [0, 0]
        assert seen["in the latent shift"]["blocks"] == 0
    assert min(place["VAE"] for place in (*after, seen["in the decoder"])) > 0
    assert seen["in the decoder"]["blocks"] == seen["as the free memory is asked for"]["blocks"] == 0
    assert seen["in the latent shift"]["shift"] > 0


def test_every_block_is_compiled_on_its_own(model_directory, sampled, photograph):
    pipe, _ = load(model_directory, compile=True)
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    assert pipe.transformer._compiled_call_impl is None
    with torch.compiler.set_stance("force_eager"):  # a compiler takes half a minute
        torch.testing.assert_close(sample(pipe, photograph), sampled(image=photograph), rtol=0, atol=1e-6)


@torch.no_grad()
def test_compiled_blocks_serve_other_sizes_without_being_compiled_again(model_directory, monkeypatch):
    pipe, _ = load(model_directory)
    network = type(pipe.transformer)
    plain = partialmethod(network.compile_repeated_blocks, backend="eager")  # what is traced counts here
    monkeypatch.setattr(network, "compile_repeated_blocks", plain)
    place(pipe, Execution(device="cuda", compile=True), CPU)
    torch._dynamo.reset()
    graphs = []
    for shape in ((1, 16, 2, 4, 6), (1, 16, 3, 6, 4), (1, 16, 5, 4, 8)):
        latents, texts = torch.randn(shape), torch.randn(2, 1, 24, pipe.transformer.config.text_dim)
        scheduler = euler_scheduler(7.0)
        scheduler.set_timesteps(sigmas=inference_sigmas(2))
        before = counters["stats"]["unique_graphs"]
        VelocityField(pipe.transformer, latents[:, :, :1], *texts, 5.0).follow(scheduler, latents)
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs == [2, 0, 0]  # one keeps keys and values of the text, the other has them


def test_each_distinct_prompt_is_encoded_once(model_directory, monkeypatch):
    pipe, execution = load(model_directory)
    seen = []
    encode = pipe.encode_prompt
    monkeypatch.setattr(
        pipe, "encode_prompt", lambda prompt, **options: (seen.append([prompt]), encode(prompt, **options))[1]
    )
    states = encode_prompts(pipe, ["a cat", "", "a dog", "", "a cat"], execution, CPU, 24)
    assert seen == [["a cat"], [""], ["a dog"]]
    assert {prompt: tuple(state.shape) for prompt, state in states.items()} == dict.fromkeys(states, (1, 24, 64))
    torch.testing.assert_close(states["a dog"], encode("a dog", max_sequence_length=24)[0])


@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_a_released_text_encoder_is_gone_from_memory(model_directory, offload):
    pipe, execution = load(model_directory, offload=offload)
    encode_prompts(pipe, ["a cat"], execution, CPU, 24)
    weights = [weakref.ref(parameter.untyped_storage()) for parameter in pipe.text_encoder.parameters()]
    others = weakref.ref(pipe.transformer.proj_out.weight)
    gc.disable()  # so that it is not gone by chance
    try:
        put_away_text_encoder(pipe, execution, CPU)
    finally:
        gc.enable()
    assert pipe.text_encoder is None
    assert not any(storage() is not None for storage in weights)
    assert others() is not None
    assert pipe._execution_device.type == "cpu"


@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_a_text_encoder_that_is_kept_encodes_again(model_directory, offload):
    pipe, execution = load(model_directory, offload=offload, keep_text_encoder=True)
    first = encode_prompts(pipe, ["a cat"], execution, CPU, 24)
    put_away_text_encoder(pipe, execution, CPU)
    second = encode_prompts(pipe, ["a cat"], execution, CPU, 24)
    torch.testing.assert_close(first, second)
