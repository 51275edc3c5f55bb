"""All readers of what comes from outside, one target each: valid inputs, nasty ones, and how they are read."""

import contextlib
import functools
import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from mutate import mutate_bytes, mutate_value

EXAMPLES = Path(__file__).parents[2] / "examples"
CANARY = "canary"  # what code in an input would make, if it were run


class Target:
    """One reader. Attributes: `name`, and how many inputs it gets in the `short` form, by what one costs.

    `prepare` is called once, and returns valid inputs; `write` makes input number `number` of them in an empty folder;
    `read` reads it there. The first inputs are the nasty ones as they are, then those that must be refused.
    """

    name: ClassVar[str]
    short: ClassVar[int] = 100
    nasty: ClassVar[Mapping[str, bytes]] = {}
    refused: ClassVar[Mapping[str, bytes]] = {}

    def prepare(self, inputs: Path) -> dict[str, Any]:
        """Return valid inputs by file name; `inputs` is a directory of this target's own."""
        raise NotImplementedError

    def write(self, valid: Mapping[str, Any], number: int, chance: random.Random, folder: Path) -> Path:
        """Make one input; return what `read` takes."""
        own = [*{**self.nasty, **self.refused}.items()]
        name, data = own[number] if number < len(own) else self.mutated(valid, chance)
        (folder / name).write_bytes(data)
        return folder / name

    def mutated(self, valid: Mapping[str, bytes], chance: random.Random) -> tuple[str, bytes]:
        """Return a name, and bytes that are nearly valid."""
        name = chance.choice(sorted(valid))
        return name, mutate_bytes(valid[name], chance, [*valid.values()])

    def read(self, path: Path) -> object:
        raise NotImplementedError

    def must_refuse(self, number: int) -> bool:
        """Whether to read this input without an error is a fault."""
        return len(self.nasty) <= number < len(self.nasty) + len(self.refused)


class _Code:
    """Pickled, it makes a directory where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (CANARY,)


def _gzip_bomb(size: int) -> bytes:
    return gzip.compress(bytes(size), 9)


@functools.cache
def _zstd_bomb(size: int) -> bytes:
    import zstandard

    return zstandard.compress(bytes(size))


def _chosen(values: Mapping[str, Any], chance: random.Random) -> bytes:
    """One of some JSON values, changed in its values, in its text, or in both."""
    value = values[chance.choice(sorted(values))]
    if chance.random() < 0.8:
        value = mutate_value(value, chance)
    text = json.dumps(value).encode()
    return mutate_bytes(text, chance, [text]) if chance.random() < 0.3 else text


# ---- the data package ---------------------------------------------------------------------------------------------

ENTRY = {
    "path": "a.mp4",
    "cap": ["a boat", "a ship"],
    "resolution": {"height": 480, "width": 832},
    "fps": 24.0,
    "num_frames": 200,
    "cut": [0, 100],
    "crop": [0, 832, 0, 480],
    "motion": 0.5,
    "start_frame_idx": 0,
}
LIMITS = {
    "ann_txt_path": "videos.txt",
    "save_path": "store",
    "sample_height": 32,
    "sample_width": 32,
    "sample_num_frames": 5,
    "min_hxw": 1024,
    "train_fps": 16,
    "max_h_div_w_ratio": 1.2,
    "min_h_div_w_ratio": 0.4,
}


class Meta(Target):
    name = "meta JSON"
    short = 1500
    nasty: ClassVar = {
        "empty.json": b"",
        "open.json": b"[" * 200_000,
        "nested.json": b'[{"path": "a", "cap": ' + b"[" * 100_000,
        "digits.json": b'[{"path": "a", "num_frames": ' + b"9" * 5000 + b"}]",
        "digits.jsonl": b'{"path": "a", "fps": 1' + b"0" * 5000 + b"}\n",
        "exponent.json": b'[{"path": "a", "fps": 1e99999, "num_frames": -1e400}]',
        "bomb.json.gz": _gzip_bomb(1 << 28),
        "bomb.json.zst": _zstd_bomb(1 << 28),
        "brackets.json.gz": gzip.compress(b"[" * (1 << 26), 9),
        "surrogate.json": b'[{"path": "\\ud800", "cap": "\\udfff"}]',
        "utf16.json": "[]".encode("utf-16"),
        "nul.json": b"\0" * 5000,
    }

    def prepare(self, inputs: Path) -> dict[str, Any]:
        bare = {"path": "b.mp4", "cap": "a cat"}
        return {"one": [ENTRY], "some": [ENTRY, bare, {**ENTRY, "cap": "a dog"}] * 3, "entry": ENTRY}

    def mutated(self, valid: Mapping[str, Any], chance: random.Random) -> tuple[str, bytes]:
        text = _chosen(valid, chance)
        if chance.random() < 0.2:
            packed = gzip.compress(text)
            return "videos.json.gz", mutate_bytes(packed, chance, [packed]) if chance.random() < 0.5 else packed
        return "videos.json", text

    def read(self, path: Path) -> object:
        from flashi2v_data.curation.config import FilterConfig
        from flashi2v_data.curation.judge import Judge, read_entry, record_of
        from flashi2v_data.curation.meta import read_entries, read_pieces
        from flashi2v_data.curation.stream import JudgePiece
        from flashi2v_data.records import Annotation, Entry
        from flashi2v_data.store.codec import ValueCodec

        judge, codec, annotation = Judge(FilterConfig(**LIMITS)), ValueCodec(), Annotation("/videos", str(path))
        for entry in read_entries(annotation):
            clip = read_entry(entry)
            if isinstance(clip, Entry) and judge(clip) == "kept":
                codec.pack(record_of(clip, entry))
        judge_piece = JudgePiece(judge, codec.pack)  # what workers do, which read most pieces otherwise
        return [judge_piece(piece) for piece in read_pieces(annotation)]


class Lists(Target):
    name = "annotation files and lists"
    short = 400
    nasty: ClassVar = {
        "nul.txt": b"\0\0",
        "long.txt": b"a" * 3_000_000,
        "lines.txt": b"\n" * 100_000,
        "bom.txt": b"\xff\xfe",
    }

    def prepare(self, inputs: Path) -> dict[str, Any]:
        (inputs / "videos.json").write_text("[]")
        line = f"{inputs},{inputs / 'videos.json'}\n".encode()
        return {"videos.txt": line, "two.txt": line * 2, "prompts.txt": "a boat\nä ship\n".encode()}

    def read(self, path: Path) -> object:
        from flashi2v_data.records import read_annotations
        from flashi2v_infer.files.inputs import read_lines

        with _declared():
            read_annotations(path)
        return read_lines(path, "prompt")


@contextlib.contextmanager
def _declared() -> Any:
    """Let a declared error pass: another reader gets the same input."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise


class Configuration(Target):
    name = "configuration"
    short = 250
    nasty: ClassVar = {
        "filter_config.yaml": b"\n".join(
            [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
            + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]".encode() for k in range(1, 12)]
        ),
        "data.json": b"{" * 50_000,
        "data.yaml": b"- " * 50_000,
        "inference_model.json": b'{"seed": ' + b"9" * 5000 + b"}",
        "inference_model.yaml": b"seed: 0x" + b"f" * 5000,
        "pretrain_model.json": b"!!python/object/apply:os.mkdir [canary]",
        "pretrain_model.yaml": b"a: &a {b: *a}\n<<: *a\n",
        "filter_config.json": "{}".encode("utf-16"),
        "filter_config": b"\0",
    }

    def prepare(self, inputs: Path) -> dict[str, Any]:
        from ruamel.yaml import YAML

        return {
            path.stem: YAML(typ="safe", pure=True).load(path.read_text())
            for path in sorted(EXAMPLES.glob("demo_model/*.*"))
            if path.suffix in (".json", ".yaml")
        }

    def mutated(self, valid: Mapping[str, Any], chance: random.Random) -> tuple[str, bytes]:
        name = chance.choice(sorted(valid))
        return f"{name}.json", _chosen({name: valid[name]}, chance)

    def read(self, path: Path) -> object:
        from flashi2v_data.curation.config import FilterConfig
        from flashi2v_data.loading.config import DataConfig
        from flashi2v_data.settings import load_config
        from flashi2v_infer.config import InferenceConfig
        from flashi2v_train.config import TrainModelConfig

        schemas = {"filter_config": FilterConfig, "data": DataConfig, "pretrain_model": TrainModelConfig}
        return load_config(path, schemas.get(path.stem, InferenceConfig))


class Store(Target):
    """LMDBs whose pages are whole: what is hostile is in keys, header and values."""

    name = "stores"
    short = 500

    def prepare(self, inputs: Path) -> dict[str, Any]:
        config = {key: value for key, value in LIMITS.items() if not key.endswith("_path")}
        header = {"schema": 1, "count": 2, "compression": None, "config": config, "report": {"total": 2}}
        return {"header": header, "record": {**ENTRY, "cut": [0, 100]}}

    def write(self, valid: Mapping[str, Any], number: int, chance: random.Random, folder: Path) -> Path:
        import lmdb
        import zstandard

        values: list[bytes]
        header, record = valid["header"], valid["record"]
        kind = chance.choice(("header", "record", "bytes", "zstd", "pickle", "keys"))
        if number < len(_VALUES):
            kind, values = "pickle", [_VALUES[number], pickle.dumps(record)]
        elif kind == "pickle":
            good = [pickle.dumps(mutate_value(record, chance), protocol) for protocol in (2, 4, 5)]
            values = [mutate_bytes(chance.choice(good), chance, good), chance.choice(good)]
        else:
            values = [_packed(mutate_value(record, chance)), _packed(record)]
            if kind == "bytes":
                values[0] = mutate_bytes(values[0], chance, values)
        if kind == "zstd":
            header = {**header, "compression": "zstd"}
            good = [zstandard.compress(value) for value in values]
            values = [mutate_bytes(good[0], chance, good) if chance.random() < 0.7 else _zstd_bomb(1 << 28), good[1]]
        if kind == "header":
            header = mutate_value(header, chance)
        items = {b"%012d" % index: value for index, value in enumerate(values)}
        if kind != "pickle":
            items[b"header"] = _packed(header)
        if kind == "keys":
            items[chance.choice((b"x", b"000000000009", b"9" * 12, b"\xff" * 300))] = values[0]
        with (
            lmdb.open(str(folder / "a.lmdb"), map_size=64 << 20, sync=False) as environment,
            environment.begin(write=True) as writing,
        ):
            for key, value in items.items():
                writing.put(key, value)
        return folder / "a.lmdb"

    def read(self, path: Path) -> object:
        from flashi2v_data.curation.inspection import describe_store, inspect_store
        from flashi2v_data.store.reader import open_store

        store = open_store(path)
        for index in range(min(len(store), 3)):
            with _declared():
                store[index]
        return describe_store(store, inspect_store(store, limit=10))


def _packed(value: Any) -> bytes:
    """msgpack of what may hold what msgpack cannot."""
    import msgspec

    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, TypeError, ValueError, UnicodeEncodeError):
        return b"\xc1"


def _nested_pickle(depth: int) -> bytes:
    return b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."


# Values of stores of the public code, which are pickles.
_VALUES = [
    pickle.dumps(_Code()),
    b"cos\nsystem\n(S'touch canary'\ntR.",
    b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
    b"\x80\x04\x8b" + struct.pack("<i", 1 << 30) + b"x.",
    b"\x80\x04]\x94" + b"h\0a" * 1000 + b".",
    b"\x80\x04" + b"(" * 1_000_000,
    b"\x80\x04K\x01" + b"\x85" * 200_000 + b".",
    _nested_pickle(100_000),
    b"\x80\x04]\x94" + b"(" + b"h\0" * 100_000 + b"e.",
    b"\x80\x04}\x94(h\0h\0u.",
    _zstd_bomb(1 << 28),
    b"",
]


class Records(Target):
    """Records as training reads them: what they say of a video that is there."""

    name = "records"
    short = 200

    def prepare(self, inputs: Path) -> dict[str, Any]:
        import numpy as np

        from flashi2v_data.video.write import write_video

        write_video(inputs / "a.mp4", np.full((12, 32, 32, 3), 90, np.uint8), 16)
        record = {"path": str(inputs / "a.mp4"), "cap": ["a boat"], "resolution": {"height": 32, "width": 32}}
        return {"record": {**record, "fps": 16.0, "num_frames": 12, "cut": [0, 12], "crop": [0, 32, 0, 32]}}

    def write(self, valid: Mapping[str, Any], number: int, chance: random.Random, folder: Path) -> Path:
        import lmdb

        record = mutate_value(valid["record"], chance)
        with (
            lmdb.open(str(folder / "a.lmdb"), map_size=1 << 20, sync=False) as environment,
            environment.begin(write=True) as writing,
        ):
            header = {"schema": 1, "count": 2, "compression": None, "config": {}}
            for key, value in ((b"header", header), (b"%012d" % 0, record), (b"%012d" % 1, valid["record"])):
                writing.put(key, _packed(value))
        return folder / "a.lmdb"

    def read(self, path: Path) -> object:
        from flashi2v_data.loading.config import DatasetParam
        from flashi2v_data.loading.dataset import FlashI2VDataset
        from flashi2v_data.store.reader import open_store

        video = [
            {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [32, 32]}},
            {"trans_type": "ToTensorVideo"},
            {"trans_type": "ae_norm"},
        ]
        sample = {key: LIMITS[key] for key in ("sample_height", "sample_width", "sample_num_frames", "train_fps")}
        config = DatasetParam(
            **sample,
            dataset_type="flashi2v",
            text_drop_ratio=0.0,
            return_prompt_mask=True,
            metafile_or_dir_path=str(path),
            text_tokenizer_path="none",
            tokenizer_max_length=8,
            transform_pipeline={"video": video},
        )
        dataset = FlashI2VDataset(open_store(path), config, seed=1, tokenizer=_tokens)
        return [dataset[index] for index in range(len(dataset))]


def _tokens(text: str) -> Any:
    import torch

    from flashi2v_data.captions.tokenizer import TextTokens

    return TextTokens(torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64))


class Videos(Target):
    name = "videos"
    short = 500
    refused: ClassVar = {
        "list.mp4": b"ffconcat version 1.0\nfile /etc/hostname\n",
        "a.m3u8": b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n",
        "b.mp4": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "a.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "a.mpd": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
        "a.txt": b"just text\n" * 1000,
        "a.nut": b"nut/multimedia container\0" + b"\xff" * 1000,
        "empty.mp4": b"",
        "box.mp4": struct.pack(">I4sQ", 1, b"moov", (1 << 62)) + b"\0" * 100,
    }

    def prepare(self, inputs: Path) -> dict[str, Any]:
        from fractions import Fraction

        import av
        import numpy as np

        kinds = {
            "mp4": "libx264",
            "mkv": "libx264",
            "ts": "libx264",
            "avi": "mpeg4",
            "webm": "libvpx",
            "mpg": "mpeg2video",
        }
        for suffix, codec in kinds.items():
            with av.open(str(inputs / f"a.{suffix}"), "w") as file:
                stream = file.add_stream(codec, rate=Fraction(25))
                stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
                for index in range(8):
                    picture = np.full((32, 48, 3), 20 * index, np.uint8)
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                file.mux(stream.encode())
        return {path.name: path.read_bytes() for path in sorted(inputs.iterdir())}

    def read(self, path: Path) -> object:
        from flashi2v_data import read_frames
        from flashi2v_data.video.probe import probe

        with _declared():
            probe(path)
        return read_frames(path, [0, 3, 5])


# ---- the inference package ----------------------------------------------------------------------------------------


def _png(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


class Images(Target):
    name = "images"
    short = 1000
    refused: ClassVar = {
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n",
        "bomb.png": _png(30_000, 35_000),
        "wide.png": _png(0x7FFFFFFF, 1),
        "a.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:9/x"/></svg>',
        "a.pdf": b"%PDF-1.4\n%%EOF\n",
        "bomb.gif": b"GIF89a"
        + struct.pack("<HH", 60_000, 60_000)
        + b"\0\0\0,"
        + struct.pack("<HHHH", 0, 0, 60_000, 60_000)
        + b"\0\x02\x02D\x01\0;",
        "bomb.ppm": b"P6 40000 40000 255\n",
        "empty.png": b"",
    }

    def prepare(self, inputs: Path) -> dict[str, Any]:
        from PIL import Image

        picture = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
        for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
            picture.save(
                inputs / f"a.{suffix}", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
            )
        picture.convert("RGBA").save(inputs / "alpha.png")
        picture.convert("P").save(inputs / "palette.png")
        return {path.name: path.read_bytes() for path in sorted(inputs.iterdir())}

    def read(self, path: Path) -> object:
        from flashi2v_infer.files.pictures import read_image

        return read_image(path, "--image")


class VideoRecords(Target):
    name = "records of sampled videos"
    short = 300

    def prepare(self, inputs: Path) -> dict[str, Any]:
        import numpy as np

        from flashi2v_infer import save_video

        frames = np.zeros((5, 32, 32, 3), np.uint8)
        for name in ("a.mp4", "b.gif", "c.webp"):
            save_video(inputs / name, frames, 8, {"prompt": "a boat", "settings": {"height": 32}})
        return {path.name: path.read_bytes() for path in sorted(inputs.iterdir())}

    def read(self, path: Path) -> object:
        from flashi2v_infer import read_record

        return read_record(path)


class ModelDirectory(Target):
    """Directories in diffusers' layout, of which one file is not as it was written."""

    name = "model directories"
    short = 25
    nasty: ClassVar = {
        "scheduler/scheduler_config.json": b"[" * 100_000,
        "model_index.json": b'{"_class_name": "FlashI2VPipeline", "vae": ["os", "mkdir"]}',
        "tokenizer/tokenizer_config.json": b'{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["code.X", null]}}',
        "vae/config.json": b'{"_class_name": "AutoencoderKLWan", "base_dim": 1000000}',
        "text_encoder/config.json": b'{"model_type": "umt5", "d_model": 10000000, "auto_map": {"": "code.X"}}',
        "transformer/config.json": b'{"_class_name": "code.X", "num_layers": 1000000000}',
    }

    def prepare(self, inputs: Path) -> dict[str, Any]:
        import torch

        from flashi2v_model import presets

        torch.manual_seed(0)
        presets.init("tiny", inputs / "model")
        (inputs / "model/code.py").write_text(f"import os\nos.mkdir({CANARY!r})\nclass X: pass\n")
        shutil.copy(inputs / "model/code.py", inputs / "model/tokenizer/code.py")
        names = sorted((inputs / "model").rglob("*.json"))
        return {
            "": str(inputs / "model"),
            **{str(path.relative_to(inputs / "model")): path.read_bytes() for path in names},
        }

    def write(self, valid: Mapping[str, Any], number: int, chance: random.Random, folder: Path) -> Path:
        shutil.copytree(valid[""], folder / "model")
        if number < len(self.nasty):
            name, data = [*self.nasty.items()][number]
        else:
            name = chance.choice(sorted(valid)[1:])
            data = _chosen({"": json.loads(valid[name])}, chance)
        (folder / "model" / name).write_bytes(data)
        return folder / "model"

    def read(self, path: Path) -> object:
        from flashi2v_infer.load import load_from_pretrained

        return load_from_pretrained(str(path))


# ---- the model and training packages ------------------------------------------------------------------------------


def _torch_zip(data: bytes) -> bytes:
    """A file as `torch.save` writes it, around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def _zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 28))
        archive.writestr("archive/data/0", bytes(1 << 28))
    return file.getvalue()


class Weights(Target):
    name = "weights"
    short = 300
    refused: ClassVar = {
        "code.pt": pickle.dumps(_Code()),
        "code.bin": _torch_zip(pickle.dumps({"a": _Code()})),
        "bomb.pt": _zip_bomb(),
        "nested.pt": _nested_pickle(100_000),
        "huge.safetensors": struct.pack("<Q", 1 << 62) + b"{}",
        "deep.safetensors": struct.pack("<Q", 100_000) + b"[" * 100_000,
        "claims.safetensors": struct.pack("<Q", 67)
        + b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}   ',
        "long.pt": b"\x80\x02\x8d" + struct.pack("<Q", 1 << 40),
    }

    def prepare(self, inputs: Path) -> dict[str, Any]:
        import torch
        from safetensors.torch import save_file

        from flashi2v_model import FlashI2VTransformer3DModel

        model = FlashI2VTransformer3DModel(
            num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8, text_dim=8, freq_dim=8
        )
        state = {key: value.bfloat16().contiguous() for key, value in model.state_dict().items()}
        save_file(state, inputs / "a.safetensors", {"format": "pt"})
        torch.save(state, inputs / "a.pt")
        torch.save({"model": state}, inputs / "b.bin")
        torch.save(state, inputs / "old.pt", _use_new_zipfile_serialization=False)
        return {path.name: path.read_bytes() for path in sorted(inputs.iterdir())}

    def read(self, path: Path) -> object:
        from flashi2v_model.weights import convert_state_dict, read_state_dict

        return convert_state_dict(read_state_dict(path))


class Checkpoints(Target):
    """A run's directory, of which one file is damaged."""

    name = "checkpoints"
    short = 250

    def prepare(self, inputs: Path) -> dict[str, Any]:
        import torch
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        state = {f"{part}.{name}": torch.rand(4, 6) for part in ("model", "ema") for name in ("a.weight", "b.bias")}
        save(state, storage_writer=FileSystemWriter(inputs / "iter_0000001"), no_dist=True)
        (inputs / "iter_0000001/progress.json").write_text('{"iteration": 1}')
        (inputs / "latest_checkpointed_iteration.txt").write_text("1\n")
        files = [path for path in sorted(inputs.rglob("*")) if path.is_file()]
        return {str(path.relative_to(inputs)): path.read_bytes() for path in files}

    def write(self, valid: Mapping[str, Any], number: int, chance: random.Random, folder: Path) -> Path:
        damaged, data = self.mutated(valid, chance)
        if number < 2:
            damaged, data = "iter_0000001/.metadata", (pickle.dumps(_Code()), _nested_pickle(100_000))[number]
        for name, content in {**valid, damaged: data}.items():
            (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "run" / name).write_bytes(content)
        return folder / "run"

    def read(self, path: Path) -> object:
        import torch

        from flashi2v_model.weights.checkpoint import load_stored, newest_checkpoint, stored_weights

        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            return None
        weights = stored_weights(checkpoint, ema=True)
        if sum(tensor.numel() for tensor in weights.values()) > 1 << 24:
            return None  # the model that reads it is larger or smaller, and says so
        into = {key: torch.empty_like(tensor, device="cpu") for key, tensor in weights.items()}
        load_stored(checkpoint, into)
        return into


class Features(Target):
    name = "stores of features"
    short = 300

    def prepare(self, inputs: Path) -> dict[str, Any]:
        import lmdb
        import torch

        from flashi2v_data.store.features import FeatureWriter, text_key

        with FeatureWriter(inputs / "a.lmdb", {"size": [5, 32, 32], "vae": "x"}) as writer:
            writer.put({text_key("a"): {"context": torch.rand(3, 4)}})
        with (
            lmdb.open(str(inputs / "a.lmdb"), readonly=True, lock=False) as environment,
            environment.begin() as reading,
        ):
            items = {bytes(key).hex(): bytes(value) for key, value in reading.cursor()}
        return items

    def write(self, valid: Mapping[str, Any], number: int, chance: random.Random, folder: Path) -> Path:
        import lmdb

        name = chance.choice(sorted(valid))
        items = {**valid, name: mutate_bytes(valid[name], chance, [*valid.values()])}
        with (
            lmdb.open(str(folder / "a.lmdb"), map_size=1 << 20, sync=False) as environment,
            environment.begin(write=True) as writing,
        ):
            for key, value in items.items():
                writing.put(bytes.fromhex(key), value)
        return folder / "a.lmdb"

    def read(self, path: Path) -> object:
        from flashi2v_data.store.features import FeatureStore, text_key

        return FeatureStore(path).get(text_key("a"))


# ---- command lines ------------------------------------------------------------------------------------------------

COMMANDS = {
    "flashi2v_data.cli": (("filter", "--filter_config"), ("inspect",), ("shapes",)),
    "flashi2v_model.cli": (("inspect",), ("convert",), ("init",)),
    "flashi2v_train.launcher": (("--mm-model", "f.json", "--mm-data", "f.json", "--dry-run"), ()),
    "flashi2v_train.encode": (("--mm-model", "f.json", "--mm-data", "f.json"), ()),
    "flashi2v_infer.cli": (("--mm-model", "f.json"), ("--model", "d", "--dry-run"), ("--plan", "--dry-run")),
}
_WORDS = (
    "-1",
    "0",
    "1.5",
    "x",
    "",
    "f.json",
    "d",
    "no/such",
    "/dev/null",
    "\x1b[31m",
    "nan",
    "1e400",
    "é",
    "a\nb",
    "-o",
    "--",
    "9" * 500,
)


class CommandLines(Target):
    name = "command lines"
    short = 300

    def prepare(self, inputs: Path) -> dict[str, Any]:
        """All options, as the commands' own help lists them."""
        import re

        options: dict[str, Any] = {}
        for module, calls in COMMANDS.items():
            for call in calls:
                words = call[:1] if call and not call[0].startswith("-") else ()
                _, output, _ = _call(module, [*words, "--help"])
                options.setdefault(module, set()).update(re.findall(r"--[a-z][a-z0-9_-]+", output))
            options[module] = sorted(options[module] - {"--help", "--version"})
        return options

    def write(self, valid: Mapping[str, Any], number: int, chance: random.Random, folder: Path) -> Path:
        module = chance.choice(sorted(COMMANDS))
        arguments = [*chance.choice(COMMANDS[module])]
        for _ in range(chance.randrange(4)):
            if chance.random() < 0.7:
                arguments.append(chance.choice(valid[module]))
            if chance.random() < 0.8:
                arguments.append(chance.choice(_WORDS))
        (folder / "f.json").write_text(chance.choice(("{}", "[]", "x", "{'a': 1}", "\0")))
        (folder / "d").mkdir()
        (folder / "arguments.json").write_text(json.dumps([module, arguments]))
        return folder / "arguments.json"

    def read(self, path: Path) -> object:
        module, arguments = json.loads(path.read_text())
        os.chdir(path.parent)
        code, _, errors = _call(module, arguments)
        last = (errors.splitlines() or [""])[-1]
        if code not in (0, 1, 2):
            raise AssertionError(f"{arguments} exits with {code}")
        if code and (len(last) > 530 or not last.startswith("flashi2v-") or not last.isprintable()):
            raise AssertionError(f"{arguments} ends with no short printable line: {last!r:.600}")
        return code


def _call(module: str, arguments: list[str]) -> tuple[int, str, str]:
    """Run a command here; return its exit code and what it printed."""
    from importlib import import_module

    output, errors = io.StringIO(), io.StringIO()
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            import_module(module).main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            return code, output.getvalue(), errors.getvalue()
    return 0, output.getvalue(), errors.getvalue()


TARGETS: dict[str, Callable[[], Target]] = {
    kind.name: kind
    for kind in (
        *(Meta, Lists, Configuration, Store, Records, Features, Videos),
        *(Images, VideoRecords, ModelDirectory, Weights, Checkpoints, CommandLines),
    )
}
