"""Signals: clips per second and core, and how well they find what was drawn.

Speed is that of one process on a clip of 8 seconds at 720p, 24 frames a second: decoding alone, and what each signal
takes besides, on frames that are decoded already. Accuracy is measured on films of the shapes sets that were coded by
H.264; `--long` takes more of them, and 10,000 distinct clips for the duplicates.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scene import write_scene

from flashi2v_data import write_video
from flashi2v_data.shapes.films import draw_film, join_films
from flashi2v_data.signals import Clip, Signal, find_signals
from flashi2v_data.signals.cuts import Detector, find_transitions
from flashi2v_data.signals.duplicates import Duplicates, fingerprint, repeated

NAMES = ("still", "motion", "cuts", "transnet", "text", "duplicates")
SETS = ("looks", "motion")
SENTENCES = ("Subscribe now for more", "Chapter 12: the return", "www.example.com", "NEWS AT TEN", "Part 2 of 3")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true")
    is_long = parser.parse_args().long
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "clip.mp4"
        measure_speed(path)
        measure_distinct(10_000 if is_long else 500)
        measure_cuts(path, "cuts", 12 if is_long else 3)
        measure_duplicates(path, 24 if is_long else 4)
        measure_text(path, 20 if is_long else 4)
        measure_cuts(path, "transnet", 4 if is_long else 1)
    measure_search(1_000_000 if is_long else 50_000)


def measure_speed(path: Path) -> None:
    write_scene(path, 720, 1280, 192)
    signals = {name: find_signals([name])[0] for name in NAMES}
    wanted = [frames for signal in signals.values() for frames in signal.frames]
    print("one process, a clip of 8 s at 720p: CPU seconds, clips per second and core")
    begin = time.process_time()
    with Clip({"path": str(path)}, wanted) as clip:
        for frames in wanted:
            clip.frames(frames)
        report_speed("decoding, for all of them", time.process_time() - begin)
        for name, signal in signals.items():
            signal(clip)  # loads libraries and weights
            report_speed(name, min(seconds_of(signal, clip) for _ in range(3)))


def seconds_of(signal: Signal, clip: Clip) -> float:
    begin = time.process_time()
    signal(clip)
    return time.process_time() - begin


def report_speed(name: str, seconds: float) -> None:
    print(f"  {name:<26} {seconds:8.3f} s  {1 / seconds:8.2f}", flush=True)


def measure_cuts(path: Path, detector: Detector, num_films: int) -> None:
    for captions in SETS:
        hits = num_found = num_true = 0
        for seed in range(num_films):
            frames, cuts = join_films(captions, seed, 8, 144, 240)
            write_video(path, frames, 16, crf=23)
            signal = find_signals([detector])[0]
            with Clip({"path": str(path)}, signal.frames) as clip:
                found = [begin for _, begin in find_transitions(clip.pictures(signal.frames[0]), detector)]
            hits += sum(any(abs(cut - other) <= 1 for other in found) for cut in cuts)
            num_found, num_true = num_found + len(found), num_true + len(cuts)
        print(
            f"{detector}, set {captions!r}: recall {hits}/{num_true} ({hits / num_true:.1%}), "
            f"precision {hits}/{num_found} ({hits / num_found:.1%})",
            flush=True,
        )


def measure_text(path: Path, num_clips: int) -> None:
    signal = find_signals(["text"])[0]
    num_read = num_false = 0
    random = np.random.default_rng(0)
    for index in range(num_clips):
        frames = draw_film("motion", 9, index, 3, 360, 640)
        size, place = int(random.integers(16, 48)), (int(random.integers(10, 120)), int(random.integers(20, 300)))
        drawn = [captioned(frame, SENTENCES[index % len(SENTENCES)], size, place) for frame in frames]
        num_read += area_of(signal, path, np.stack(drawn)) > 0
        num_false += area_of(signal, path, frames) > 0
    print(
        f"text: captions of 16 to 48 pixels found {num_read}/{num_clips}, where there is none {num_false}", flush=True
    )


def captioned(frame: NDArray[np.uint8], text: str, size: int, place: tuple[int, int]) -> NDArray[np.uint8]:
    picture = Image.fromarray(frame)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).text(place, text, font=font, fill="white", stroke_width=2, stroke_fill="black")
    return np.asarray(picture)


def area_of(signal: Signal, path: Path, frames: NDArray[np.uint8]) -> float:
    write_video(path, frames, 16, crf=23)
    with Clip({"path": str(path)}, signal.frames) as clip:
        return signal(clip)["text_area"]


def measure_duplicates(path: Path, num_clips: int) -> None:
    for captions in SETS:
        originals: list[bytes] = []
        copies: dict[str, list[bytes]] = {"coded again": [], "half the size": [], "a frame later": []}
        for index in range(num_clips):
            film = draw_film(captions, 11, index, 50, 144, 240)
            originals.append(print_of(path, film[:-1], 16))
            copies["coded again"].append(print_of(path, film[:-1], 32))
            half = [np.asarray(Image.fromarray(frame).resize((120, 72))) for frame in film[:-1]]
            copies["half the size"].append(print_of(path, np.stack(half), 26))
            copies["a frame later"].append(print_of(path, film[1:], 23))
        for kind, prints in copies.items():
            found = repeated(np.frombuffer(b"".join([*originals, *prints]), np.uint8).reshape(2 * num_clips, -1))
            hits = sum(found[num_clips + number] == number for number in range(num_clips))
            print(f"duplicates, set {captions!r}, {kind}: {hits}/{num_clips}", flush=True)


def print_of(path: Path, frames: NDArray[np.uint8], crf: int) -> bytes:
    write_video(path, frames, 16, crf=crf)
    with Clip({"path": str(path)}, Duplicates.frames) as clip:
        return bytes.fromhex(Duplicates()(clip)["fingerprint"])


def measure_distinct(num_clips: int) -> None:
    """Without coding, which changes no clip enough to matter here."""
    for captions in SETS:
        prints = b"".join(fingerprint(films) for films in small_films(captions, num_clips))
        found = repeated(np.frombuffer(prints, np.uint8).reshape(num_clips, -1))
        print(f"duplicates, set {captions!r}, {num_clips:,} distinct clips: {(found >= 0).sum()} false", flush=True)
        for number in np.flatnonzero(found >= 0)[:10]:
            print(f"  clip {number} is taken for {found[number]}")


def small_films(captions: str, num_clips: int) -> Iterator[NDArray[np.uint8]]:
    for index in range(num_clips):
        film = draw_film(captions, 13, index, 16, 32, 48)
        yield np.stack([np.asarray(Image.fromarray(frame).resize((16, 16), Image.Resampling.BOX)) for frame in film])


def measure_search(num_clips: int) -> None:
    prints = np.random.default_rng(0).integers(0, 256, (num_clips, 44), np.uint8)
    prints[num_clips // 2 :] = prints[: num_clips - num_clips // 2]
    prints[num_clips // 2 :, 7] ^= 1
    begin = time.process_time()
    found = repeated(prints)
    seconds = time.process_time() - begin
    print(f"duplicates, search among {num_clips:,} hashes: {seconds:.1f} s, {(found >= 0).sum():,} found", flush=True)


if __name__ == "__main__":
    main()
