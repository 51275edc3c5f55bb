"""VAE and text encoder: normalisation, causality, padding."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from golden import number, tensor
from torch.testing import assert_close
from transformers import AutoTokenizer

from flashi2v_model import InputError, presets
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
    torch.manual_seed(3)
    presets.init("tiny", directory)
    return directory


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
