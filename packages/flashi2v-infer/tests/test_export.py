"""Video files of every kind, read back by the libraries that wrote them, and by others."""

import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from flashi2v_data import read_frames
from flashi2v_data.errors import DecodeError, StorageError
from flashi2v_infer import InputError, read_record, save_video, write_mp4
from flashi2v_infer.files.export import check_output, check_picture, durations, enlarged, record_path, write_picture

RECORD = {"prompt": "a “red” circle\nmoves \0 <&", "seed": 3, "settings": {"height": 32}, "image": "ä b.png"}
OUTPUTS = ["a b.mp4", "ä.gif", "c.webp", "frames", "frames.v2/"]


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Shades that wander: (9, 32, 48, 3)."""
    t, y, x = np.mgrid[0:9, 0:32, 0:48]
    return np.stack([4 * x + 5 * t, 6 * y, 120 + 60 * np.sin((x + y + 3 * t) / 9)], -1).astype(np.uint8)


def pictures(path: Path) -> list[np.ndarray]:
    """The frames of a file of Pillow's, in RGB."""
    with Image.open(path) as image:
        shown = []
        for number in range(image.n_frames):
            image.seek(number)
            shown.append(np.asarray(image.convert("RGB")))
        return shown


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_video_of_one_frame_is_a_video(tmp_path, frames, name):
    path = check_output(f"{tmp_path}/{name}", 8, "--output")
    save_video(path, frames[:1], 8, RECORD)
    assert read_record(path) == RECORD


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_kind_of_output_carries_its_record_and_has_it_beside(tmp_path, frames, name):
    path = check_output(f"{tmp_path}/new/{name}", 8, "--output")
    assert not (tmp_path / "new").exists()
    save_video(path, frames, 8, RECORD)
    assert read_record(path) == RECORD
    assert json.loads(record_path(path).read_text("utf-8")) == read_record(record_path(path)) == RECORD
    kinds = {path.name, record_path(path).name} if path.suffix in (".mp4", ".gif", ".webp") else {path.name}
    assert {child.name for child in path.parent.iterdir()} == kinds


def test_an_enlarged_video_is_the_same_one_smoothly(frames):
    large = enlarged(frames, 3)
    assert large.shape == (9, 96, 144, 3)
    back = large.reshape(9, 32, 3, 48, 3, 3).mean((2, 4))
    assert np.abs(back - frames)[:, 2:-2, 2:-2].max() < 3
    steps, before = (np.abs(np.diff(video.astype(int), axis=2)).max() for video in (large, frames))
    assert steps < 0.7 * before  # where a pixel ends there is none as large
    assert enlarged(frames, 1) is frames


def test_a_video_has_its_rate_and_frames(tmp_path, frames):
    write_mp4(tmp_path / "video.mp4", frames, 8)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.streams.video[0].average_rate == 8
    decoded = read_frames(tmp_path / "video.mp4", range(9))
    assert np.abs(decoded.astype(int) - frames).mean() < 3
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
    with pytest.raises(InputError, match=r"video.mp4 holds no record of a sampled video"):
        read_record(tmp_path / "video.mp4")


def test_frames_are_exact_and_each_knows_how_it_was_made(tmp_path, frames):
    save_video(tmp_path / "frames", frames, 8, RECORD)
    names = [f"frame_{number:04d}.png" for number in range(9)]
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == [*names, "record.json"]
    for name, frame in zip(names, frames):
        with Image.open(tmp_path / "frames" / name) as image:
            assert np.array_equal(np.asarray(image), frame)
        assert read_record(tmp_path / "frames" / name) == RECORD


def _from_afar(picture: np.ndarray) -> np.ndarray:
    """Means over 4 x 4 pixels, where dithering leaves the colours as they were."""
    return picture.reshape(8, 4, 12, 4, 3).mean((1, 3))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animated_pictures_show_the_frames_again_and_again(tmp_path, frames, suffix):
    path = tmp_path / f"video{suffix}"
    save_video(path, frames, 16, RECORD)
    shown = pictures(path)
    assert len(shown) == 9
    for picture, frame in zip(shown, frames):
        assert np.abs(_from_afar(picture) - _from_afar(frame)).mean() < 6
    with Image.open(path) as image:
        assert image.info["loop"] == 0  # without end


def test_a_gif_gives_still_parts_the_same_colours_in_every_frame(tmp_path, frames):
    frames = frames.copy()
    frames[:, :, 24:] = frames[0, :, 24:]
    save_video(tmp_path / "video.gif", frames, 8, RECORD)
    # The last columns lie behind those where the noise of dithering can come from the moving half.
    still = [picture[:2, 40:] for picture in pictures(tmp_path / "video.gif")]
    assert all(np.abs(picture.astype(int) - still[0]).mean() < 4 for picture in still)


@pytest.mark.parametrize(("fps", "tick"), [(16, 10), (24, 10), (50, 10), (16, 1), (30000 / 1001, 1), (0.5, 10)])
def test_frames_are_shown_for_whole_ticks_that_add_up_to_the_videos_length(fps, tick):
    times = durations(49, fps, tick)
    assert len(times) == 49
    assert all(time % tick == 0 and abs(time - 1000 / fps) <= tick for time in times)
    assert sum(times) == pytest.approx(49 * 1000 / fps, abs=tick / 2)


def test_a_gif_of_16_frames_per_second_lasts_as_long_as_the_video(tmp_path, frames):
    save_video(tmp_path / "video.gif", np.concatenate([frames, frames[::-1]])[:16], 16, RECORD)
    with Image.open(tmp_path / "video.gif") as image:
        total = 0
        for number in range(image.n_frames):
            image.seek(number)
            total += image.info["duration"]
    assert total == 1000


def test_a_record_never_stands_beside_another_video_than_its_own(tmp_path, frames):
    save_video(tmp_path / "video.mp4", frames, 8, RECORD)
    with pytest.raises(InputError, match="even height and width"):
        save_video(tmp_path / "video.mp4", frames[:, :31], 8, {**RECORD, "seed": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
    assert read_record(tmp_path / "video.mp4") == RECORD


ODD_NAMES = ("12:30", "concat:a|b", "http:", "img%03d", "a\nb", "\x1b[31m", "-o", "a?b#c", "file:a", "ä 'b\"")


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", "/"])
def test_every_name_is_the_name_of_exactly_one_file(tmp_path, monkeypatch, frames, suffix):
    monkeypatch.chdir(tmp_path)
    for name in ODD_NAMES:
        path = check_output(f"{name}{suffix}", 8, "--output")
        save_video(path, frames[:1], 8, RECORD)
        written = {path.name} if suffix == "/" else {path.name, record_path(path).name}
        assert {file.name for file in tmp_path.iterdir()} == written
        assert read_record(path) == RECORD
        path.unlink() if path.is_file() else shutil.rmtree(path)
        record_path(path).unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "frames", "a.png"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, frames, name):
    resource = pytest.importorskip("resource")  # of Unix
    noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(StorageError, match=rf": cannot write {tmp_path / name}$"):
            write_picture(tmp_path / name, Image.fromarray(noise[0])) if name == "a.png" else save_video(
                tmp_path / name, noise, 8, RECORD
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["video.mp4", "video.gif", "video.webp", "strip.png"])
def test_a_damaged_file_is_told_from_one_without_a_record(tmp_path, frames, name):
    path = tmp_path / name
    path.write_bytes(b"\0" * 100)
    with pytest.raises(DecodeError):
        read_record(path)
    if name == "strip.png":
        write_picture(path, Image.fromarray(frames[0]))
    elif name == "video.mp4":
        write_mp4(path, frames, 8)
    else:
        Image.fromarray(frames[0]).save(path)
    with pytest.raises(InputError, match="holds no record of a sampled video"):
        read_record(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"prompt": "a"}', "\udcff", "[" * 100_000, "9" * 5000])
def test_a_json_file_of_somebody_else_is_no_record(tmp_path, text):
    (tmp_path / "cat.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"cat.json holds no record"):
        read_record(tmp_path / "cat.json")
    with pytest.raises(InputError, match="no such file"):
        read_record(tmp_path / "dog.json")


def test_outputs_that_cannot_be_written_are_refused_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "photo.json").write_text("{}")
    (tmp_path / "directory.mp4").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "link").symlink_to("empty")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "full" / "thesis.txt").write_text("")
    check_output(str(tmp_path / "empty"), 8, "--output")
    for name, message in (
        ("video.avi", r"--output: .*video.avi must end in .mp4, .gif or .webp, or in / for a directory of PNGs"),
        ("video.MP4", r"must end in .mp4"),
        ("frames.v2", r"must end in .mp4"),
        ("video.mp4/", r"is a directory by its form and a .mp4 by its end"),
        ("directory.mp4", r"--output: .* is a directory: name a file"),
        ("file/video.mp4", r"--output: cannot write below .*file"),
        ("file/", r"file/ is a file: name another directory"),
        ("..", r"has no name"),
        ("link", r"link is a link: name another"),
        ("full", r"full exists and is not empty: name another directory"),
        ("photo.mp4", r"photo.json holds no record .*: the video's record would go there; choose another name"),
        ("\udcff.mp4", r"--output: not UTF-8 text"),
        ("a\0.mp4", r"--output: no file's name holds the character 0"),
        ("pipe.mp4", r"--output: .* is a pipe or a device: name a file"),
        ("ä" * 114 + ".mp4", r"--output: the name is too long, of at most 230 bytes"),
        ("a/" * 1900 + "a.mp4", r"--output: the name is too long, .* 3800 with its directories"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(f"{tmp_path}/{name}", 8, "--output")
    with pytest.raises(InputError, match=r"--output: s3://a/b.mp4 is an address"):
        check_output("s3://a/b.mp4", 8, "--output")
    for name in ("", ".", "./", "/"):
        with pytest.raises(InputError, match="has no name: name a new directory"):
            check_output(name, 8, "--output")
    with pytest.raises(InputError, match=r"--fps: .gif shows at most 50 frames per second, got 60"):
        check_output(str(tmp_path / "video.gif"), 60, "--output")
    for name, message in (("strip.jpg", "must end in .png"), ("directory.mp4/..", "must end in .png")):
        with pytest.raises(InputError, match=message):
            check_picture(tmp_path / name, "--strip")


def test_a_record_that_another_run_left_is_no_obstacle(tmp_path, frames):
    save_video(tmp_path / "video.mp4", frames, 8, RECORD)
    (tmp_path / "video.mp4").unlink()
    assert check_output(f"{tmp_path}/video.mp4", 8, "--output") == tmp_path / "video.mp4"
    # A gif of the same name has another record.
    save_video(tmp_path / "video.gif", frames, 8, {**RECORD, "seed": 4})
    assert read_record(tmp_path / "video.json")["seed"] == 3
