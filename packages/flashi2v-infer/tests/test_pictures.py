"""What a viewer shows is what is sampled from, whatever a file says of its colours, its coverage and its upper side."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from flashi2v_infer import InputError
from flashi2v_infer.files.pictures import as_pixels, read_image

# Primaries adapted to D50, by column X, Y, Z.
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))


def profile(space: bytes, primaries=(), gamma: float = 2.2) -> bytes:
    """A colour profile of version 2, by hand: of three primaries, or of grey."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78, b"cprt": b"text\0\0\0\0x\0\0\0"}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    for name, primary in zip(b"rgb", primaries):
        tags |= {b"%cXYZ" % name: b"XYZ \0\0\0\0" + fixed(*primary), b"%cTRC" % name: curve}
    if not primaries:
        tags[b"kTRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 128 + len(table + body), b"    ", 0x02400000, b"mntr", space, b"XYZ ")
    return (head + b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


@pytest.fixture
def shown() -> np.ndarray:
    """Three colours that every profile here can show, and black. (8, 12, 3)."""
    colours = np.array([(200, 80, 70), (60, 150, 80), (90, 100, 180), (0, 0, 0)], np.uint8)
    return np.repeat(np.repeat(colours[None], 8, 0), 3, 1)


def test_colours_are_those_of_the_profile(tmp_path, shown, caplog):
    p3 = profile(b"RGB ", DISPLAY_P3)
    srgb = ImageCms.createProfile("sRGB")
    stored = ImageCms.profileToProfile(Image.fromarray(shown), srgb, ImageCms.ImageCmsProfile(io.BytesIO(p3)))
    assert np.abs(np.asarray(stored).astype(int) - shown).max() > 10
    for name in ("a.png", "a.tiff", "a.webp", "a.jpg"):
        options = (
            {"lossless": True} if name == "a.webp" else {"quality": 100, "subsampling": 0} if name == "a.jpg" else {}
        )
        stored.save(tmp_path / name, icc_profile=p3, **options)
        assert np.abs(read_image(tmp_path / name, "image").astype(int) - shown).max() <= 3, name
    # A palette, and what is transparent, are of the profile's colours, too.
    stored.quantize(8, dither=Image.Dither.NONE).save(tmp_path / "palette.png", icc_profile=p3)
    assert np.abs(read_image(tmp_path / "palette.png", "image").astype(int) - shown).max() <= 3
    stored.putalpha(255)
    stored.save(tmp_path / "covered.png", icc_profile=p3)
    assert np.abs(read_image(tmp_path / "covered.png", "image").astype(int) - shown).max() <= 3
    assert not caplog.text


def test_a_profile_of_srgb_changes_no_number(tmp_path, photograph):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(photograph).save(tmp_path / "a.png", icc_profile=srgb)
    assert np.array_equal(read_image(tmp_path / "a.png", "image"), photograph)


def test_grey_has_profiles_of_its_own(tmp_path, caplog):
    """Of linear light, half is as bright as 188 of 255 in sRGB."""
    grey = Image.new("L", (8, 8), 128)
    grey.save(tmp_path / "linear.png", icc_profile=profile(b"GRAY", gamma=1.0))
    assert np.abs(read_image(tmp_path / "linear.png", "image").astype(int) - 188).max() <= 1
    grey.putalpha(255)
    grey.save(tmp_path / "covered.png", icc_profile=profile(b"GRAY", gamma=1.0))
    assert np.abs(read_image(tmp_path / "covered.png", "image").astype(int) - 188).max() <= 1
    Image.new("L", (8, 8), 128).save(tmp_path / "rgb.png", icc_profile=profile(b"RGB ", DISPLAY_P3, 1.0))
    assert np.abs(read_image(tmp_path / "rgb.png", "image").astype(int) - 188).max() <= 1
    assert not caplog.text


@pytest.mark.parametrize("data", [b"no profile", profile(b"GRAY"), profile(b"RGB ", DISPLAY_P3)[:200]])
def test_a_profile_that_cannot_be_used_is_told(tmp_path, shown, caplog, data):
    Image.fromarray(shown).save(tmp_path / "a.png", icc_profile=data)
    assert np.array_equal(read_image(tmp_path / "a.png", "image"), shown)
    assert "a.png: its colour profile cannot be used, its colours are taken for sRGB" in caplog.text


def test_colours_told_by_other_means_than_a_profile_are_told(tmp_path, shown, caplog):
    Image.fromarray(shown).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "a.jpg", "image").astype(int) - shown).mean() < 30
    assert "which inks CMYK is meant for is not followed" in caplog.text
    caplog.clear()
    Image.fromarray(shown).save(tmp_path / "a.png")
    png = (tmp_path / "a.png").read_bytes()
    for gamma, told in ((45455, False), (100000, True)):
        chunk = b"gAMA" + struct.pack(">I", gamma)
        written = png[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]
        (tmp_path / "a.png").write_bytes(written)
        assert np.array_equal(read_image(tmp_path / "a.png", "image"), shown)
        assert ("gAMA and cHRM say is not followed" in caplog.text) == told
    caplog.clear()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    Image.fromarray(shown).save(tmp_path / "b.jpg", exif=exif)
    read_image(tmp_path / "b.jpg", "image")
    assert "Adobe RGB, of which its EXIF data speaks, is not followed" in caplog.text


def cutout(mode: str) -> Image.Image:
    """Grey in the middle, and around it, unseen, stripes that differ as much as numbers can. 16 x 16."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[::2, :, :3] = 255
    pixels[4:12, 4:12] = (90, 90, 90, 255)
    image = Image.fromarray(pixels)
    if mode == "P":
        index = np.zeros((16, 16), np.uint8)
        index[4:12, 4:12] = 1
        image = Image.fromarray(index, "P")
        image.putpalette([255, 0, 255, 90, 90, 90])
        image.info["transparency"] = 0
    elif mode in ("RGB", "L"):
        image = Image.fromarray(np.where(pixels[..., 3:] > 0, pixels[..., :3], 7).astype(np.uint8)).convert(mode)
        image.info["transparency"] = (7, 7, 7) if mode == "RGB" else 7
    return image if mode == image.mode else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(mode, "png") for mode in ("RGBA", "LA", "P", "RGB", "L")] + [("RGBA", "tiff"), ("RGBA", "webp"), ("P", "gif")],
)
def test_what_lies_under_transparent_pixels_is_never_seen(tmp_path, caplog, mode, suffix):
    image = cutout(mode)
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    picture = read_image(tmp_path / f"a.{suffix}", "image")
    assert (picture[4:12, 4:12] == 90).all()
    assert (picture[:4] == 255).all()
    assert f"a.{suffix}: its transparent parts are shown on white" in caplog.text
    assert np.array_equal(as_pixels(image), picture)


def test_half_a_coverage_is_half_a_colour(caplog):
    assert (as_pixels(Image.new("RGBA", (4, 4), (0, 100, 255, 51))) == (204, 224, 255)).all()
    caplog.clear()
    assert (as_pixels(Image.new("RGBA", (4, 4), (0, 100, 255, 255))) == (0, 100, 255)).all()
    assert not caplog.text


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    wide = np.array([[0, 128, 129, 257], [32768, 65406, 65407, 65535]], np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(wide).save(tmp_path / name)
        assert read_image(tmp_path / name, "image")[..., 0].tolist() == [[0, 0, 1, 1], [128, 254, 255, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_ends_upright(tmp_path, orientation):
    scene = np.zeros((24, 16, 3), np.uint8)
    scene[:8, :8], scene[:8, 8:], scene[16:, 8:] = 255, 128, 64  # all four corners differ
    on_its_side = scene.transpose(1, 0, 2)
    stored = {  # by which sides of the scene its first row and column are, as EXIF 2.3 has it
        1: scene,  # top, left
        2: scene[:, ::-1],  # top, right
        3: scene[::-1, ::-1],  # bottom, right
        4: scene[::-1],  # bottom, left
        5: on_its_side,  # left, top
        6: on_its_side[::-1],  # right, top
        7: on_its_side[::-1, ::-1],  # right, bottom
        8: on_its_side[:, ::-1],  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png", "image"), scene)


def test_a_photograph_is_turned_upright(job, photograph):
    turned = read_image("second.jpg", "image")
    assert turned.shape == photograph.shape
    # JPEG changes every pixel a little; lying on its side the picture would be another one.
    assert np.abs(turned.astype(float) - photograph).mean() < 5


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_pictures_of_every_mode_become_rgb(tmp_path, photograph, mode):
    path = tmp_path / "picture.tiff"
    Image.fromarray(photograph).convert(mode).save(path)
    assert read_image(path, "image").shape == photograph.shape


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_picture_is_taken_and_that_is_told(tmp_path, caplog, suffix):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("black", "white"))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    assert (read_image(tmp_path / f"a.{suffix}", "image") == 0).all()
    assert f"a.{suffix}: it holds several pictures, of which the first is taken" in caplog.text


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def jpeg_of_many_scans() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4096, 4096)).save(file, "jpeg", progressive=True)
    return file.getvalue()[:-2] + b"\xff\xda" * 100 + b"\xff\xd9"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "images.txt line 3: {path}: no such file"),
        (lambda path: path.write_bytes(b"GIF? no"), "images.txt line 3: {path}: not an image of a known format"),
        (lambda path: path.mkdir(), "images.txt line 3: {path}: cannot be read"),
        (lambda path: os.mkfifo(path), "images.txt line 3: {path}: cannot be read: not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "images.txt line 3: {path}: cannot be read: not a regular file"),
        (lambda path: path.write_bytes(png(40, 40)), "images.txt line 3: {path}: cannot be read"),
        (lambda path: Image.fromarray(np.ones((9, 9), np.float32)).save(path, "tiff"), "more than 8 bits per channel"),
        (
            lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            "not an image of a known",
        ),
        (lambda path: path.write_bytes(png(1, 178_000_000)), "1 x 178000000 is more than 67,108,864 pixels"),
        (lambda path: path.write_bytes(png(60_000, 60_000)), "cannot be read"),
        (lambda path: path.write_bytes(png(51, 1, bytes(154))), "51 x 1 is too narrow to cut a video's frame out of"),
        (
            lambda path: path.write_bytes(b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)),
            "not an image of a known",
        ),
        (lambda path: path.write_bytes(jpeg_of_many_scans()), "a JPEG of so many passes takes too long"),
        (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**30), "1,073,741,824 bytes, more than"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named_with_its_line(tmp_path, write, message):
    path = tmp_path / "picture.png"
    write(path)
    with pytest.raises(InputError, match=re.escape(message.format(path=path))):
        read_image(path, "images.txt line 3")


def test_pixels_do_not_share_memory_with_what_was_given(photograph):
    before = photograph.copy()
    as_pixels(photograph)[:] = 0
    assert np.array_equal(photograph, before)
