import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from flashi2v_data.loading.transforms import center_crop_resize
from flashi2v_infer.arguments import prepare_image
from flashi2v_infer.commands.sampler import Sample, Sampler, psnr
from flashi2v_infer.execution import Execution
from flashi2v_infer.settings import InputError, Request, SamplingSettings

REQUEST = Request(
    "a red circle", "photo.jpg", settings=SamplingSettings(5, 32, 48, num_inference_steps=2, max_sequence_length=24)
)


def sampler_of(pipe) -> Sampler:
    return Sampler(
        pipe, {prompt: pipe.encode_prompt(prompt, max_sequence_length=24)[0] for prompt in (REQUEST.prompt, "")}
    )


def test_psnr_is_that_of_the_definition():
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black + 255) == 0
    assert psnr(black + 10, black) == pytest.approx(20 * math.log10(25.5))
    assert psnr(black, black + 10) == pytest.approx(20 * math.log10(25.5))
    assert psnr(black, black) == 100


@pytest.mark.parametrize(
    ("first_frame", "vae", "elsewhere"),
    [(30, 35, False), (22, 38, False), (12, 35, True), (12, 13, False), (19, 21, False), (14, 21, True)],
)
def test_a_video_starts_elsewhere_when_the_vae_is_not_the_reason(first_frame, vae, elsewhere):
    assert Sample(np.zeros((1, 2, 2, 3), np.uint8), first_frame, vae, "").starts_elsewhere is elsewhere


def test_a_second_frame_that_is_another_picture_is_a_jump():
    moving = np.zeros((5, 8, 32, 3), np.uint8)
    for number, frame in enumerate(moving):
        frame[:, number] = 200  # a bar that wanders: as much from every frame to the next
    assert not Sample(moving, 30.0, 30.0, "").jumps
    dark = np.concatenate((moving[:1], moving[1:] + 40))
    assert Sample(dark, 30.0, 30.0, "").jumps
    assert not Sample(moving[:1], 30.0, 30.0, "").jumps


@pytest.fixture
def image(photograph) -> np.ndarray:
    return center_crop_resize(photograph[None], 32, 48)[0]


def test_noise_depends_on_seed_and_index_alone(pipe, image):
    first = sampler_of(pipe)(REQUEST, image)
    assert np.array_equal(sampler_of(pipe)(REQUEST, image).frames, first.frames)
    assert not np.array_equal(sampler_of(pipe)(replace(REQUEST, seed=1), image).frames, first.frames)
    assert not np.array_equal(sampler_of(pipe)(replace(REQUEST, index=1), image).frames, first.frames)


def test_the_first_frame_is_compared_with_the_image_and_with_the_vae_alone(pipe, image):
    sample = sampler_of(pipe)(REQUEST, image)
    assert sample.frames.shape == (5, 32, 48, 3)
    assert sample.first_frame_psnr == psnr(sample.frames[0], image)
    frame = prepare_image(image, 32, 48)[None]
    (reconstruction,) = pipe.vae(frame).sample[0, :, 0].clamp(-1, 1).permute(1, 2, 0)[None].detach().numpy()
    expected = psnr((reconstruction * 127.5 + 127.5).round().astype(np.uint8), image)
    assert sample.vae_psnr == pytest.approx(expected, abs=0.1)


def test_the_vae_alone_decodes_as_the_video_was_decoded(pipe, image, monkeypatch):
    whole = sampler_of(pipe)(REQUEST, image)
    monkeypatch.setattr(pipe, "execution", Execution(vae_tiling=True))
    monkeypatch.setattr("flashi2v_infer.decoding.TILES", ((32, 16),))
    tiled = sampler_of(pipe)(REQUEST, image)
    assert (whole.decoding, tiled.decoding) == ("whole pictures", "tiles of 32 pixels, 16 apart")
    assert tiled.vae_psnr != whole.vae_psnr


def test_a_video_that_starts_elsewhere_is_warned_about(pipe, image, caplog, monkeypatch):
    import flashi2v_infer.commands.sampler as module

    sample = sampler_of(pipe)(REQUEST, image)
    monkeypatch.setattr(module, "_reconstruct", lambda pipeline, image: image)  # as a perfect VAE would
    with caplog.at_level(logging.INFO):
        again = sampler_of(pipe)(REQUEST, image)
    assert again.vae_psnr == 100
    assert again.first_frame_psnr == sample.first_frame_psnr < 20
    assert "video 0 does not start with its image" in caplog.text


def test_requests_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="fps must be positive, got 0"):
        replace(REQUEST, fps=0)
    for scale in (0, 86):
        with pytest.raises(InputError, match=f"scale must be 1 to 85 for 4096 pixels at most, got {scale}"):
            replace(REQUEST, scale=scale)
    with pytest.raises(InputError, match=r"prompt: not UTF-8 text: a \? cat"):
        replace(REQUEST, prompt="a \udcff cat")
    with pytest.raises(InputError, match="negative_prompt has no effect with guidance_scale 1"):
        replace(REQUEST, negative_prompt="dark", settings=replace(REQUEST.settings, guidance_scale=1.0))


def test_the_vae_sees_an_image_once_however_many_videos_start_with_it(pipe, image):
    sampler, encoded = sampler_of(pipe), []
    handle = pipe.vae.encoder.register_forward_hook(lambda *_: encoded.append(1))
    first = sampler(REQUEST, image)
    per_video_and_image = len(encoded)
    second = sampler(replace(REQUEST, index=1), image.copy())
    other = sampler(replace(REQUEST, index=2), image[::-1].copy())
    handle.remove()
    assert (per_video_and_image, len(encoded)) == (2, 5)
    assert first.vae_psnr == second.vae_psnr != other.vae_psnr
