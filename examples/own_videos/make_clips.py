"""Forty clips as people have them, to try everything on: mixed sizes, rates, lengths, containers and captions.

    python examples/own_videos/make_clips.py clips

In each a flat shape goes round in a circle, a motion that the demo model has never seen. One file is broken, one has
spaces in its name, one has no caption; eight captions are Chinese, four stand in a table.
"""

import argparse
import csv
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from flashi2v_data import write_video

COLOURS = {
    "red": ("红色", (220, 40, 40)),
    "green": ("绿色", (40, 170, 70)),
    "blue": ("蓝色", (50, 90, 220)),
    "yellow": ("黄色", (235, 205, 50)),
    "purple": ("紫色", (140, 60, 180)),
}
BACKGROUNDS = {"black": ("黑色", (15, 15, 15)), "white": ("白色", (240, 240, 240)), "grey": ("灰色", (125, 125, 125))}
SHAPES = {"circle": "圆", "square": "方块", "triangle": "三角"}
SIZES = ((96, 96), (90, 160), (120, 160), (128, 128), (108, 192))  # height, width
RATES = (16, 24, 25, 30, 30000 / 1001)
SUFFIXES = (".mp4", ".mp4", ".mov", ".mkv")
TURN_SECONDS = 1.0


def draw(number: int) -> tuple[np.ndarray, float, str, str]:
    """Return a clip (T, H, W, 3), its rate, and its captions in English and Chinese."""
    colour, background = list(COLOURS)[number % 5], list(BACKGROUNDS)[number // 5 % 3]
    shape = list(SHAPES)[number % 3]
    height, width = SIZES[number * 7 % 5]
    fps = RATES[number * 3 % 5]
    side, seconds = min(height, width), 1.2 + number % 7 * 0.3
    radius, orbit, phase = 0.12 * side, 0.25 * side, number * 2.4
    frames = []
    for i in range(round(seconds * fps)):
        angle = phase + 2 * math.pi * i / fps / TURN_SECONDS
        centre = width / 2 + orbit * math.cos(angle), height / 2 + orbit * math.sin(angle)
        image = Image.new("RGB", (3 * width, 3 * height), BACKGROUNDS[background][1])
        outline(ImageDraw.Draw(image), shape, [3 * value for value in (*centre, radius)], COLOURS[colour][1])
        frames.append(np.asarray(image.resize((width, height), Image.Resampling.BOX)))
    english = f"a {colour} {shape} goes round in a circle on a {background} background"
    chinese = f"一个{COLOURS[colour][0]}的{SHAPES[shape]}在{BACKGROUNDS[background][0]}背景上转圈"
    return np.stack(frames), fps, english, chinese


def outline(canvas: ImageDraw.ImageDraw, shape: str, place: list[float], colour: tuple[int, int, int]) -> None:
    """Draw a shape: centre and radius in pixels."""
    x, y, radius = place
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        canvas.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        corners = [(x + radius * math.sin(turn), y - radius * math.cos(turn)) for turn in (0, 2.094, 4.189)]
        canvas.polygon(corners, fill=colour)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--num", type=int, default=40, help="clips, broken ones among them (default: %(default)s)")
    options = parser.parse_args()
    options.directory.mkdir(parents=True)
    rows = []
    for number in range(options.num):
        frames, fps, english, chinese = draw(number)
        name = f"my clip, number {number}" if number == 3 else f"clip_{number:02}"
        video = options.directory / f"{name}{SUFFIXES[number % 4]}"
        write_video(video, frames, fps)
        caption = chinese if number % 5 == 2 else english
        if number == 5:
            video.write_bytes(video.read_bytes()[:2000])  # as a full disk leaves it
        if number == 7:
            continue  # nobody has described it yet
        if number % 10 == 1:
            rows.append((video.name, caption))
        else:
            video.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    with open(options.directory / "metadata.csv", "w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([("file_name", "text"), *rows])
    print(f"{options.num} clips in {options.directory}")


if __name__ == "__main__":
    main()
