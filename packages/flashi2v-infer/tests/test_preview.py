"""Pictures of latents by a linear map."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from flashi2v_data.shapes.stories import Stage, sample_story
from flashi2v_infer import FlashI2VPipeline, InputError, demo
from flashi2v_infer.preview import FILE, fit, map_of, read_map, write_map
from flashi2v_model.encoders import encode_video


def scene(number: int) -> torch.Tensor:
    """A video of a story, (3, T, 64, 64) in [-1, 1]."""
    frames = Stage(sample_story(1, number, 64, 64, looks="seen"), 64, 64).film(5)
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def pipe():
    return FlashI2VPipeline.from_pretrained("demo")


@torch.no_grad()
def test_the_demo_shows_its_latents_as_the_pictures_that_they_are_of(pipe):
    error, spread = 0.0, 0.0
    for number in range(100, 108):  # of other seeds than those that it was fitted on
        video = scene(number)
        (pictures,) = pipe.preview(encode_video(pipe.vae, video[None]))
        assert [picture.size for picture in pictures] == [(256, 256)] * 2
        shown = np.asarray(pictures[0].resize((8, 8), Image.Resampling.BOX), dtype=float)
        expected = torch.nn.functional.avg_pool2d(video[:, 0], 8).add(1).mul(127.5).permute(1, 2, 0).numpy()
        error += np.square(shown - expected).sum()
        spread += np.square(expected - 127.5).sum()
    assert error < 0.25 * spread


def test_a_map_is_fitted_and_kept(pipe, tmp_path):
    found, explained = fit(pipe.vae, [scene(number) for number in range(6)])
    assert 0.7 < explained <= 1
    write_map(found, tmp_path / FILE, "a test")
    again = read_map(tmp_path / FILE)
    torch.testing.assert_close(again.weight, found.weight, atol=1e-4, rtol=0.0)
    assert "a test" in (tmp_path / FILE).read_text()
    saved = FlashI2VPipeline.from_pretrained(demo.DIRECTORY)
    saved.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "vae" / FILE).read_bytes() == (demo.DIRECTORY / "vae" / FILE).read_bytes()
    assert FlashI2VPipeline.from_pretrained(tmp_path / "saved").preview(torch.zeros(1, 16, 1, 8, 8))


def test_the_map_of_wan_is_known_and_others_are_asked_for(pipe, tmp_path):
    with torch.device("meta"):
        wan = AutoencoderKLWan()
    found = map_of(wan, [])
    assert found.weight.shape == (16, 3)
    torch.testing.assert_close(found.colours(torch.zeros(16, 1, 1, 1)).flatten(), found.bias)
    with pytest.raises(InputError, match=r"there is no preview.json beside this VAE: fit one by `python -m"):
        map_of(pipe.vae, [tmp_path])
    with pytest.raises(InputError, match=r"latents must be \(B, 16, F, H, W\), got \(16, 1, 8, 8\)"):
        pipe.preview(torch.zeros(16, 1, 8, 8))


@pytest.mark.parametrize("values", [{}, {"weight": 1, "bias": 2}, {"weight": [[1, 2]], "bias": [1, 2, 3]}])
def test_a_malformed_map_is_one_line(pipe, tmp_path, values):
    (tmp_path / FILE).write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"preview.json must hold weight"):
        map_of(pipe.vae, [tmp_path])


def test_a_callback_previews_what_is_sampled(pipe):
    pipe.set_progress_bar_config(disable=True)
    seen: list[list[Image.Image]] = []

    def look(pipe, step, timestep, tensors):
        seen.append(pipe.preview(tensors["denoised"])[0])

    pipe(
        demo.IMAGE,
        demo.PROMPT,
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["denoised"],
    )
    assert [len(pictures) for pictures in seen] == [5, 5, 5]
    second, last = (np.asarray(pictures, dtype=float) for pictures in seen[1:])
    assert np.abs(second - last).mean() < 12  # noise is 70 away


def test_the_script_fits_videos_of_a_folder(pipe, tmp_path, capsys):
    from flashi2v_data.video.write import write_video
    from flashi2v_infer.preview import fit_files

    vae = shutil.copytree(demo.DIRECTORY / "vae", tmp_path / "vae")
    (vae / FILE).unlink()
    (tmp_path / "videos").mkdir()
    for number in range(2):
        pixels = ((scene(number).permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        write_video(tmp_path / "videos" / f"{number}.mp4", pixels, 16)
    fit_files(vae, tmp_path / "videos")
    assert read_map(vae / FILE).weight.shape == (16, 3)
    assert "of the colours' variance in 2 videos" in capsys.readouterr().out
    for arguments, message in (
        ((tmp_path, tmp_path), "holds no config.json: name the directory of a VAE"),
        ((vae, tmp_path / "none"), "no such file: .*none"),
        ((vae, vae), "no videos are given, which end in .mp4"),
    ):
        with pytest.raises(InputError, match=message):
            fit_files(*arguments)
