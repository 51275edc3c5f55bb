"""Files from strangers: what they claim is not believed, what they are is said."""

import io
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from golden import small_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5EncoderModel

from flashi2v_model import InputError, convert_state_dict
from flashi2v_model.config import Defaults
from flashi2v_model.encoders import load_pretrained
from flashi2v_model.weights import detect_layout
from flashi2v_model.weights.fingerprint import fingerprint
from flashi2v_model.weights.reading import check_directory, read_json, read_state_dict
from flashi2v_model.weights.runs import Run, run_of


def nested(depth: int) -> bytes:
    return b'{"a": ' * depth + b"1" + b"}" * depth


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "is not there"),
        (lambda path: os.mkfifo(path), "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: path.mkdir(), "is no regular file"),
        (lambda path: path.write_bytes(nested(100_000)), "cannot be read: maximum recursion depth"),
        (lambda path: path.write_bytes(b'{"a": %s}' % (b"9" * 5000)), "cannot be read: Exceeds the limit"),
        (lambda path: path.write_bytes(b" " * 2**23 + b"{}"), "has 8,388,610 bytes, where such a file has at most"),
        (lambda path: path.write_bytes(b'{"a": "\xff"}'), "cannot be read: 'utf-8' codec"),
        (lambda path: path.write_bytes(b"[]"), "must hold a JSON object"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(tmp_path, write, message):
    write(tmp_path / "config.json")
    with pytest.raises(InputError, match=re.escape(message)):
        read_json(tmp_path / "config.json")


def compressed_zeros(path: Path) -> None:
    """A gigabyte of zeros in a megabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data/0", "w") as entry:
        for _ in range(1024):
            entry.write(bytes(2**20))


def asking_for_bytes(path: Path) -> None:
    """A pickle of a few bytes that makes an array of a trillion."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02cbuiltins\nbytearray\nM\xff\xff\x85R.")
        archive.writestr("a/version", "3")


def one_number_for_many(path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(2**40)}, path)


def claiming(size: int):
    return lambda path: path.write_bytes(struct.pack("<Q", size) + b"{}")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pt", compressed_zeros, "would unpack to far more than the weights of a model"),
        ("a.pt", asking_for_bytes, "holds more than tensors"),
        ("a.pt", lambda path: path.write_bytes(pickle.dumps(bytearray(9), 2)), "holds more than tensors"),
        ("a.pt", one_number_for_many, "weight claims 1,099,511,627,776 numbers, which it does not hold"),
        ("a.safetensors", claiming(2**62), "its header claims 4,611,686,018,427,387,904 bytes"),
        ("a.safetensors", claiming(9), "is damaged or holds more than tensors"),
        ("a.safetensors", lambda path: path.write_bytes(b""), "is damaged or holds more than tensors"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_memory_is_taken_for_what_a_file_only_claims(tmp_path, name, write, message, device):
    write(tmp_path / name)
    with pytest.raises(InputError, match=re.escape(message)):
        read_state_dict(tmp_path / name, device=device)


def test_a_header_without_end_does_not_keep_a_fingerprint(tmp_path):
    path = tmp_path / "a.safetensors"
    found = []
    for content in (nested(100_000), b'{"a": {"data_offsets": [-9, 7]}}', b'{"a": {"data_offsets": [0, -1]}}', b""):
        path.write_bytes(struct.pack("<Q", len(content)) + content)
        found.append(fingerprint(path))
    claiming(2**62)(path)
    assert len({*found, fingerprint(path)}) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"num_layers": 10**9}, "num_layers is 1,000,000,000: a model of that size is not built"),
        ("config.json", {"_attn_implementation_internal": "stranger/kernel"}, "names code to download"),
        ("tokenizer.json", None, "tokenizer.json is no regular file"),
    ],
)
def test_a_directory_is_looked_at_before_a_library_loads_it(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(json.dumps(content)) if content else os.mkfifo(path)
    with pytest.raises(InputError, match=message):
        check_directory(tmp_path)
    with pytest.raises(InputError, match=rf"^--model: .*{message}"):
        load_pretrained(torch.nn.Module, str(tmp_path), "--model", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("cls", "key"), [(AutoencoderKLWan, "base_dim"), (UMT5EncoderModel, "d_model")])
def test_a_configuration_cannot_make_a_model_larger_than_its_weights(tmp_path, cls, key):
    config = {"base_dim": 8, "num_layers": 2, "vocab_size": 99, "d_ff": 8, key: 100_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}" + bytes(1000))
    with pytest.raises(
        InputError, match=r"^ae: .*config.json describes a model of [0-9,]+ numbers, its weights have 1,0"
    ):
        load_pretrained(cls, str(tmp_path), "ae", torch.float32, torch.device("cpu"))


def test_a_configuration_of_other_types_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": "../../.."}))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}" + bytes(1000))
    with pytest.raises(InputError, match=r"^ae: cannot load UMT5EncoderModel from"):
        load_pretrained(UMT5EncoderModel, str(tmp_path), "ae", torch.float32, torch.device("cpu"))


def test_the_transformer_of_a_whole_checkpoint_is_read_and_the_rest_named(tmp_path, caplog):
    model = small_model().state_dict()
    weights = convert_state_dict(model, target="main")
    whole = {f"model.diffusion_model.{key}": tensor.clone() for key, tensor in weights.items()}
    whole |= {"first_stage_model.conv1.weight": torch.zeros(3), "text_encoders.shared.weight": torch.zeros(3)}
    save_file(whole, tmp_path / "a.safetensors")
    read = read_state_dict(tmp_path / "a.safetensors")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in weights.items())
    assert (
        "under model.diffusion_model. is read, 2 tensors of other parts are not (first_stage_model, text_enc"
        in caplog.text
    )
    save_file(whole | {f"ema.{key}": tensor for key, tensor in weights.items()}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"several transformers, under the prefixes 'ema.', 'model.diffusion_model.'"):
        read_state_dict(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (
            ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.alpha"),
            "LoRA adapter",
        ),
        (("transformer.blocks.0.attn1.to_q.lora_B.weight",), "LoRA adapter"),
        (("lora_unet_blocks_0_self_attn_q.lora_down.weight",), "LoRA adapter"),
        (("blocks.0.self_attn.q.lokr_w1",), "LoRA adapter"),
        (("decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"), "of a VAE"),
        (("encoder.mid_block.resnets.0.norm1.gamma", "decoder.mid_block.resnets.0.norm1.gamma"), "of a VAE"),
        (("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "of a T5 text encoder"),
        (("token_embedding.weight", "blocks.0.attn.q.weight"), "of a text encoder"),
        (("features.0.weight",), "not weights of a Wan2.1 or FlashI2V transformer"),
    ],
)
def test_what_is_no_transformer_is_called_by_its_name(names, what):
    with pytest.raises(InputError, match=what):
        detect_layout(names)


def test_an_archive_without_check_sums_is_read(tmp_path):
    """torch may leave them out, and counts on nobody looking."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(3.0)}, buffer)
    data = bytearray(buffer.getvalue())
    with zipfile.ZipFile(buffer) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    for start in (entry.header_offset + 14, data.rindex(b"data.pkl") - len(entry.filename) + 8 - 46 + 16):
        data[start : start + 4] = b"\0\0\0\0"
    (tmp_path / "a.pt").write_bytes(data)
    weight: Tensor = read_state_dict(tmp_path / "a.pt")["weight"]
    assert weight.tolist() == [0, 1, 2]


def test_what_a_run_says_of_its_model_is_read_or_refused_in_one_line(tmp_path):
    checkpoint = tmp_path / "run" / "iter_0000120"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    data = {"sample_num_frames": 17, "sample_height": 64, "metafile_or_dir_path": "/somewhere/clips.lmdb"}
    settings = {"data": {"dataset_param": data}, "model": {"diffusion": {"shift": 3.0}}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    assert run_of(checkpoint) == Run(Defaults(num_frames=17, height=64), 3.0, "120 steps on `clips.lmdb`")
    assert run_of(tmp_path) == Run()
    data["sample_height"] = "64"
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"config.json is damaged: height: Input should be a valid integer"):
        run_of(checkpoint)
