import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashi2v_data.errors import InputError
from flashi2v_data.loading.config import TransformPipeline
from flashi2v_data.loading.transforms import build_transform, center_crop_resize, normalise, to_tensor

REFERENCE = np.load(Path(__file__).with_name("transforms.npz"))


def _noise(name: str, count: int) -> np.ndarray:
    """Numbers in [-1, 1) from a hash of name and position, of which the reference numbers were computed."""
    x = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(zlib.crc32(name.encode()))) % 2**32
    for shift, factor in ((16, 2246822519), (13, 3266489917)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) % 2**32
    return (x ^ (x >> np.uint64(16))) / 2**31 - 1


def _frame(height: int, width: int) -> np.ndarray:
    values = np.floor((_noise(f"tf:{height}x{width}", 3 * height * width) + 1) * 128)
    return values.astype(np.uint8).reshape(1, 3, height, width).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("release", "interpolation"), [("npu", "bilinear"), ("main", "bicubic")])
@pytest.mark.parametrize(("old", "new"), [((54, 96), (30, 52)), ((97, 41), (24, 40))])
def test_crop_and_resize_equals_the_reference_within_one_level(release, interpolation, old, new):
    result = center_crop_resize(_frame(*old), *new, interpolation)
    expected = REFERENCE[f"{release}/{old[0]}x{old[1]}_to_{new[0]}x{new[1]}"].transpose(1, 2, 0)
    assert result.shape == (1, *new, 3)
    assert np.abs(result[0].astype(int) - expected).max() <= 1


def test_the_whole_pipeline_equals_the_reference():
    pipeline = TransformPipeline(
        video=[
            {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [30, 52]}},
            {"trans_type": "ToTensorVideo"},
            {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
        ]
    )
    video = build_transform(pipeline)(_frame(54, 96))
    assert video.shape == (3, 1, 30, 52)
    assert video.dtype == torch.float32
    expected = REFERENCE["npu/54x96_to_30x52/normalised"]
    assert np.abs(video[:, 0, :4, :4].numpy() - expected).max() <= 2 / 255 + 1e-6


@pytest.mark.parametrize("antialias", [True, False])
def test_settings_of_the_pipeline_reach_the_resize(antialias):
    frames = _frame(54, 96)
    param = {
        "transform_size": [16, 32],
        "antialias": antialias,
        "align_corners": True,
        "interpolation_mode": "bicubic",
    }
    steps = [{"trans_type": "CenterCropResizeVideo", "param": param}, {"trans_type": "ToTensorVideo"}]
    pipeline = TransformPipeline(video=[*steps, {"trans_type": "norm_fun", "param": {"mean": 0.25, "std": 2.0}}])
    expected = normalise(to_tensor(center_crop_resize(frames, 16, 32, "bicubic", antialias, True)), 0.25, 2.0)
    assert torch.allclose(build_transform(pipeline)(frames), expected, atol=1e-6)
    assert not np.array_equal(
        center_crop_resize(frames, 16, 32, "bicubic", antialias, True),
        center_crop_resize(frames, 16, 32, "bicubic", not antialias, True),
    )


def test_crop_and_resize_agrees_with_pillow():
    frames = _frame(54, 96)
    picture = Image.fromarray(frames[0]).resize((54, 30), Image.Resampling.BILINEAR)  # 53.3 wide covers, rounded up
    expected = np.asarray(picture)[:, 1:53]
    assert np.abs(center_crop_resize(frames, 30, 52)[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("old", "new"), [((480, 832), (480, 832)), ((54, 96), (54, 40)), ((90, 30), (40, 30))])
def test_a_side_that_fits_is_only_cropped(old, new):
    frames = _frame(*old)
    top, left = round((old[0] - new[0]) / 2), round((old[1] - new[1]) / 2)
    expected = frames[:, top : top + new[0], left : left + new[1]]
    assert np.array_equal(center_crop_resize(frames, *new), expected)


def test_every_frame_is_treated_alike():
    frames = np.concatenate([_frame(54, 96), _frame(54, 96)[:, ::-1]])
    result = center_crop_resize(frames, 16, 32)
    for number in range(2):
        assert np.array_equal(result[number], center_crop_resize(frames[number : number + 1], 16, 32)[0])


def test_frames_of_another_kind_are_refused():
    for frames in (_frame(54, 96)[0], _frame(54, 96).astype(np.float32), _frame(54, 96).transpose(0, 3, 1, 2)):
        with pytest.raises(InputError, match="frames must be uint8"):
            center_crop_resize(frames, 16, 32)


def test_the_range_of_uint8_maps_to_minus_one_to_one():
    frames = np.zeros((2, 4, 5, 3), dtype=np.uint8)
    frames[1, 2, 3] = (255, 51, 0)
    video = normalise(to_tensor(frames))
    assert video.shape == (3, 2, 4, 5)
    assert video[:, 1, 2, 3].tolist() == pytest.approx([1.0, -0.6, -1.0])
    assert (video[:, 0] == -1).all()


def _pipeline(*steps):
    resize = {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [16, 32]}}
    return TransformPipeline(video=[resize, *steps])


def test_each_colour_has_its_mean_and_deviation():
    norm = {"trans_type": "norm_fun", "param": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 4.0]}}
    frames = _frame(54, 96)
    video = build_transform(_pipeline({"trans_type": "ToTensorVideo"}, norm))(frames)
    plain = to_tensor(center_crop_resize(frames, 16, 32))
    for colour, (mean, std) in enumerate(((0.1, 1.0), (0.2, 2.0), (0.3, 4.0))):
        assert torch.allclose(video[colour], normalise(plain[colour], mean, std), atol=1e-6)


def test_names_that_mean_the_same_give_the_same():
    frames = np.concatenate([_frame(54, 96), _frame(54, 96)[:, ::-1]])
    plain = build_transform(_pipeline({"trans_type": "ToTensorVideo"}, {"trans_type": "norm_fun"}))
    other = build_transform(_pipeline({"trans_type": "ToTensorAfterResize"}, {"trans_type": "ae_norm"}))
    assert torch.equal(plain(frames), other(frames))
    named = {"transform_size": {"max_height": 16, "max_width": 32}}
    steps = [{"trans_type": "CenterCropResizeVideo", "param": named}, {"trans_type": "ToTensorVideo"}]
    named_transform = build_transform(TransformPipeline(video=[*steps, {"trans_type": "norm_fun"}]))
    assert torch.equal(plain(frames), named_transform(frames))


def test_a_mirrored_clip_is_the_clip_mirrored():
    flip = {"trans_type": "RandomHorizontalFlipVideo", "param": {"p": 0.25}}
    transform = build_transform(_pipeline(flip, {"trans_type": "ToTensorVideo"}, {"trans_type": "norm_fun"}))
    assert transform.flip_probability == 0.25
    assert torch.equal(transform(_frame(54, 96), flip=True), transform(_frame(54, 96)).flip(-1))


def test_the_result_may_go_to_memory_that_is_there():
    transform = build_transform(_pipeline({"trans_type": "ToTensorVideo"}, {"trans_type": "norm_fun"}))
    pictures = np.empty((3, 3, 16, 32), np.uint8)
    for picture in pictures:
        transform.put_picture(_frame(54, 96)[0], picture)
    out = torch.full((3, 3, 16, 32), float("nan"))
    assert transform.normalise(torch.from_numpy(pictures), out) is out
    assert torch.equal(out, transform(_frame(54, 96).repeat(3, 0)))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("LongSideResizeVideo", "different sizes"),
        ("SpatialStrideCropVideo", "different sizes"),
        ("MaxHWResizeVideo", "different sizes"),
        ("ResizeVideo", "distorts"),
        ("TemporalRandomCrop", "leave it out"),
        ("AffineVideo", "is a norm_fun with mean -beta / gamma"),
    ],
)
def test_a_transform_without_a_place_here_is_refused_with_the_reason(name, advice):
    with pytest.raises(ValueError, match=f"{name} .*{advice}"):
        _pipeline({"trans_type": name, "param": {"size": 3}}, {"trans_type": "ToTensorVideo"})


@pytest.mark.parametrize("count", [2, 4])
def test_means_for_other_than_three_colours_are_refused(count):
    with pytest.raises(ValueError, match="mean takes one number, or three"):
        _pipeline({"trans_type": "ToTensorVideo"}, {"trans_type": "norm_fun", "param": {"mean": [0.5] * count}})


def test_two_flips_are_refused():
    flip = {"trans_type": "RandomHorizontalFlipVideo"}
    with pytest.raises(ValueError, match="RandomHorizontalFlipVideo may stand among them"):
        _pipeline(flip, flip, {"trans_type": "ToTensorVideo"}, {"trans_type": "norm_fun"})
