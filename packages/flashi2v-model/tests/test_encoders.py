"""VAE and text encoder: normalisation, causality, padding; the commands that make and convert models."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from golden import number, small_model, tensor
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoTokenizer

from flashi2v_model import FlashI2VTransformer3DModel, InputError
from flashi2v_model.config import AEConfig, TextEncoderConfig
from flashi2v_model.encoders import (
    decode_video,
    encode_text,
    encode_video,
    load_text_encoder,
    load_vae,
    normalise_latents,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    run("init", directory, "--preset", "tiny", "--seed", "3")
    return directory


def run(*arguments, code=0):
    command = [Path(sys.executable).with_name("flashi2v-model"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def vae_at(directory) -> AutoencoderKLWan:
    return load_vae(AEConfig(model_id="wan_video_vae", from_pretrained=str(directory / "vae")), CPU)


def test_latent_normalisation_equals_the_reference():
    with torch.device("meta"):
        vae = AutoencoderKLWan()  # the config alone counts: Wan2.1's mean and std are its defaults
    assert_close(normalise_latents(vae, number("vae/mu")), number("vae/npu_norm_mode"), atol=1e-6, rtol=0.0)


@torch.no_grad()
def test_the_first_latent_frame_is_the_first_frame_encoded_alone(tiny):
    vae = vae_at(tiny)
    video = tensor("video", (1, 3, 9, 32, 48))
    latents = encode_video(vae, video)
    assert latents.shape == (1, 16, 3, 4, 6)
    assert_close(latents[:, :, :1], encode_video(vae, video[:, :, :1]))


@torch.no_grad()
def test_a_posterior_draw_adds_normalised_noise(tiny):
    vae = vae_at(tiny)
    video, noise = tensor("video", (1, 3, 5, 16, 16)), tensor("noise", (1, 16, 2, 2, 2))
    posterior = vae.encode(video).latent_dist
    expected = normalise_latents(vae, posterior.mean + posterior.std * noise)
    assert_close(encode_video(vae, video, noise), expected)


@torch.no_grad()
def test_decoding_inverts_the_normalisation(tiny):
    vae = vae_at(tiny)
    latents = tensor("latents", (1, 16, 2, 2, 3))
    raw = latents * torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    raw = raw + torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    assert_close(decode_video(vae, latents), vae.decode(raw).sample.clamp(-1, 1))
    assert decode_video(vae, latents).shape == (1, 3, 5, 16, 24)


def test_tiling_settings_reach_the_vae_in_pixels(tiny):
    config = AEConfig(
        model_id="wan_video_vae",
        from_pretrained=str(tiny / "vae"),
        enable_tiling=True,
        tiling_param={"tile_size": [34, 34], "tile_stride": [18, 16]},
    )
    vae = load_vae(config, CPU)
    assert vae.use_tiling
    assert (vae.tile_sample_min_height, vae.tile_sample_stride_width) == (272, 128)


@torch.no_grad()
def test_padding_is_zeroed_after_the_encoder_and_changes_nothing_else(tiny):
    config = TextEncoderConfig(model_id="UMT5", from_pretrained=str(tiny / "text_encoder"), dtype="fp32")
    encoder = load_text_encoder(config, CPU)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "tokenizer")
    short = tokenizer(["a red circle"], return_tensors="pt")
    padded = tokenizer(["a red circle"], return_tensors="pt", padding="max_length", max_length=40)
    states = encode_text(encoder, padded.input_ids, padded.attention_mask)
    length = short.input_ids.shape[1]
    assert_close(states[:, :length], encode_text(encoder, short.input_ids, short.attention_mask))
    assert (states[:, length:] == 0).all()
    without = encode_text(encoder, padded.input_ids, padded.attention_mask, use_mask=False)
    assert not torch.allclose(without[:, :length], states[:, :length])
    assert (without[:, length:] == 0).all()


@pytest.mark.parametrize("where", ["nowhere", "tokenizer"])
def test_a_directory_without_the_model_is_one_clear_line(tiny, where):
    config = AEConfig(model_id="wan_video_vae", from_pretrained=str(tiny / where))
    with pytest.raises(InputError, match=f"ae.from_pretrained.*{where}") as error:
        load_vae(config, CPU)
    assert "\n" not in str(error.value)


def test_init_is_reproducible_and_never_overwrites(tiny, tmp_path):
    run("init", tmp_path / "again", "--preset", "tiny", "--seed", "3")
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tiny / name).read_bytes()
    assert "exists" in run("init", tmp_path / "again", "--preset", "tiny", code=2)


def test_converting_there_and_back_gives_the_same_model(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "source")
    run("convert", tmp_path / "source", tmp_path / "npu.safetensors", "--to", "npu")
    run("convert", tmp_path / "npu.safetensors", tmp_path / "back", "--to", "diffusers", "--num-heads", "4")
    back = FlashI2VTransformer3DModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values()))
    assert back.config.attention_head_dim == 24
    printed = run("inspect", tmp_path / "npu.safetensors", "--num-heads", "4")
    assert "layout      npu" in printed
    assert "num_layers           3" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nothing.pt"], "nothing.pt"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "npu"], ".safetensors"),
        (["convert", "{tmp}/weights.safetensors", "{tmp}/out", "--to", "diffusers"], "--num-heads"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "diffusers", "--weights", "raw"], "run of flashi2v-train"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "wam"], "wam"),
        (["init", "{tmp}/new", "--preset", "small"], "small"),
        (["inspekt", "x"], "inspekt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, words):
    small_model().save_pretrained(tmp_path / "source")
    save_file(small_model().state_dict(), tmp_path / "weights.safetensors")
    message = run(*(argument.format(tmp=tmp_path) for argument in arguments), code=2)
    assert words in message
    assert len(message.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"source", "weights.safetensors"}
