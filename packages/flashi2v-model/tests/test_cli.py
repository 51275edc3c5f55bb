"""`flashi2v-model`: what it prints, writes, refuses, and leaves behind."""

import json
import re
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from golden import SMALL, small_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flashi2v_model import FlashI2VTransformer3DModel, InputError, cli, convert_state_dict, load_weights
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_model.weights import NEW_LAYERS, read_state_dict

SCRIPT = Path(sys.executable).with_name("flashi2v-model")
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """Run a command in this process; return what it printed, or its one line of error."""

    def command(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["flashi2v-model", *map(str, arguments)])
        try:
            cli.main()
            ended = 0
        except SystemExit as exit_:
            ended = exit_.code or 0
        captured = capsys.readouterr()
        assert ended == code, captured.err
        if code:
            assert captured.out == ""
            assert captured.err.count("\n") == 1
            assert captured.err.startswith("flashi2v-model: ")
        return captured.err if code else captured.out

    return command


@pytest.fixture
def training_run(tmp_path: Path) -> Path:
    """A run with settings that are no defaults, whose moving average is the raw weights plus one."""
    model = small_model(low_freq_proj=True, fft_return_abs=False, text_len=64, eps=1e-5)
    directory = tmp_path / "run" / "iter_0000007"
    directory.parent.mkdir()
    raw = model.state_dict()
    save_checkpoint({"model": raw, "ema": {k: v + 1 for k, v in raw.items()}}, checkpoint_id=directory)
    model.save_config(directory)
    (directory.parent / "latest_checkpointed_iteration.txt").write_text("7\n")
    (directory.parent / "config.json").write_text('{"options": {}}')
    return directory.parent


def trunk() -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in small_model().state_dict().items() if not key.startswith(NEW_LAYERS)}


def assert_same_weights(path: Path, expected: dict[str, torch.Tensor]) -> None:
    read = convert_state_dict(read_state_dict(path))
    assert read.keys() == expected.keys()
    assert {key: tensor.dtype for key, tensor in read.items()} == {
        key: tensor.dtype for key, tensor in expected.items()
    }
    assert all(torch.equal(read[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_run_goes_through_every_layout_bit_by_bit(run, training_run, tmp_path, suffix):
    average = {key: tensor + 1 for key, tensor in small_model().state_dict().items()}
    npu, main = tmp_path / f"npu{suffix}", tmp_path / f"main{suffix}"
    heads = ["--num-heads", 4] if suffix == ".pt" else []  # a .pt has no place for it
    run("convert", training_run, tmp_path / "model", "--to", "diffusers")
    run("convert", tmp_path / "model", npu, "--to", "npu")
    run("convert", npu, main, "--to", "main", *heads)
    run("convert", main, tmp_path / "back", "--to", "diffusers", *heads)
    for path in (tmp_path / "model", npu, main, tmp_path / "back"):
        assert_same_weights(path, average)
    if suffix == ".safetensors":
        first, last = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "back"))
        assert first == last
        assert (last["low_freq_proj"], last["fft_return_abs"], last["text_len"], last["eps"]) == (True, False, 64, 1e-5)


def test_a_pt_is_a_plain_state_dict_and_its_missing_settings_are_said_aloud(run, training_run, tmp_path):
    printed = run("convert", training_run, tmp_path / "flashi2v.pt", "--to", "npu", "--weights", "raw")
    for setting in ("num_heads to 4", "low_freq_proj to true", "fft_return_abs to false", "text_len to 64"):
        assert f"predictor.{setting}" in printed
    loaded = torch.load(tmp_path / "flashi2v.pt", weights_only=True)
    expected = convert_state_dict(small_model().state_dict(), target="npu")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_settings_in_the_header_of_a_file_are_held_against_a_model(run, training_run, tmp_path):
    run("convert", training_run, tmp_path / "npu.safetensors", "--to", "npu")
    with pytest.raises(InputError, match=r"low_freq_proj is True in the header of .*npu\.safetensors"):
        load_weights(FlashI2VTransformer3DModel(**SMALL), tmp_path / "npu.safetensors")


def test_large_models_are_sharded_as_diffusers_does(run, tmp_path):
    torch.save(small_model().state_dict(), tmp_path / "weights.pt")
    out = tmp_path / "sharded"
    run("convert", tmp_path / "weights.pt", out, "--to", "diffusers", "--num-heads", 4, "--max-shard-size", "500kb")
    assert len(list(out.glob("*-of-*.safetensors"))) > 2
    assert_same_weights(out, small_model().state_dict())
    FlashI2VTransformer3DModel.from_pretrained(out)


def test_tensors_that_share_memory_are_written_apart(run, tmp_path):
    original = small_model().state_dict()
    flat = torch.cat([tensor.flatten() for tensor in original.values()])
    views = flat.split([tensor.numel() for tensor in original.values()])
    shared = {key: view.view(original[key].shape) for key, view in zip(original, views)}
    shared["proj_out.bias"] = shared["patch_embedding.bias"][:64]
    shared["blocks.0.attn1.to_q.weight"] = original["blocks.0.attn1.to_q.weight"].T
    torch.save(shared, tmp_path / "flat.pt")
    for name, layout in (("npu.pt", "npu"), ("main.safetensors", "main"), ("model", "diffusers")):
        run("convert", tmp_path / "flat.pt", tmp_path / name, "--to", layout, "--num-heads", 4)
        assert_same_weights(tmp_path / name, shared)
    size = sum(tensor.nbytes for tensor in shared.values())
    assert (tmp_path / "npu.pt").stat().st_size < 1.1 * size


def test_inspect_says_what_the_weights_tell_and_what_is_assumed(run, tmp_path):
    weights = convert_state_dict(small_model(conv3x3x3_proj=False).state_dict(), target="main")
    save_file({key: tensor.bfloat16() for key, tensor in weights.items()}, tmp_path / "main.safetensors")
    facts = dict(
        line.split(maxsplit=1) for line in run("inspect", tmp_path / "main.safetensors", "--num-heads", 4).splitlines()
    )
    assert facts["layout"] == "main"
    assert facts["parameters"] == f"{sum(tensor.numel() for tensor in weights.values()):,} in bfloat16"
    assert facts["size"].endswith("GB in 1 file(s)")
    assert facts["conv3x3x3_proj"] == "False"
    assert facts["num_layers"] == "3"
    assert facts["num_attention_heads"] == "4"
    assert facts["fft_return_abs"].startswith("True  (assumed")
    assert facts["low_freq_proj"].startswith("False  (assumed")
    assert facts["text_len"].startswith("512  (assumed")


def test_inspect_reads_the_header_alone_of_a_file_larger_than_any_memory(run, tmp_path):
    with torch.device("meta"):
        model = FlashI2VTransformer3DModel(**TRANSFORMERS["14b"])
    header, end = {}, 0
    for name, tensor in convert_state_dict(model.state_dict(), target="npu").items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    words = json.dumps(header).encode()
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        file.truncate(8 + len(words) + end)  # all holes
    assert (tmp_path / "large.safetensors").stat().st_size > 57e9
    printed = run("inspect", tmp_path / "large.safetensors")
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} in float32" in printed
    assert "57.2" in printed


def test_inspect_warns_that_the_other_release_orders_its_3x3x3_convolutions_otherwise(run, tmp_path):
    for layout in ("main", "npu"):
        torch.save(convert_state_dict(small_model().state_dict(), target=layout), tmp_path / f"{layout}.pt")
        printed = run("inspect", tmp_path / f"{layout}.pt", "--num-heads", 4)
        assert ("projects one frame and repeats" in printed) == (layout == "main")


def test_inspect_of_a_run_tells_its_checkpoint_its_average_and_its_settings(run, training_run):
    printed = run("inspect", training_run)
    assert "iter_0000007" in printed
    assert "moving average kept" in " ".join(printed.split())
    assert "assumed" not in printed
    assert "low_freq_proj True" in " ".join(printed.split())


def test_a_trunk_is_named_as_such_and_makes_no_model(run, tmp_path):
    save_file(convert_state_dict(trunk(), target="wan"), tmp_path / "wan.safetensors")
    printed = run("inspect", tmp_path / "wan.safetensors", "--num-heads", 4)
    assert "text-to-video trunk" in printed
    assert "conv3x3x3_proj" not in printed
    command = ["convert", tmp_path / "wan.safetensors", "--num-heads", 4]
    message = run(*command, tmp_path / "model", "--to", "diffusers", code=2)
    assert "without FlashI2V's new layers" in message
    assert "train from them" in message
    assert "text-to-video trunk" in run(*command, tmp_path / "npu.pt", "--to", "npu")
    assert_same_weights(tmp_path / "npu.pt", trunk())


def test_settings_that_contradict_the_weights_beside_them_are_refused(run, tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"ffn_dim": 256, "text_dim": 7}))
    message = run("convert", tmp_path / "model", tmp_path / "out.pt", "--to", "npu", code=2)
    assert "ffn_dim is 256" in message
    assert "the weights have 128" in message
    assert "text_dim is 7" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nothing.pt"], "nothing.pt"),
        (["init", "{tmp}/out", "--preset", "tiny", "--seed", str(2**64)], "--seed is a number from 0 to"),
        (["inspect", "{tmp}/source/nothing"], "no weights at"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "npu"], "ends in .safetensors or .pt"),
        (["convert", "{tmp}/source", "{tmp}/out.pt", "--to", "diffusers"], "is a directory"),
        (["convert", "{tmp}/source", "{tmp}/out.pt", "--to", "wan"], "convert to 'main'"),
        (["convert", "{tmp}/source", "{tmp}/out.pt", "--to", "npu", "--max-shard-size", "1GB"], "--max-shard-size"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "diffusers", "--max-shard-size", "big"], "such as 5GB"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "diffusers", "--num-heads", "3"], "says 4"),
        (["convert", "{tmp}/lone.safetensors", "{tmp}/out", "--to", "diffusers"], "--num-heads"),
        (["inspect", "{tmp}/lone.safetensors", "--num-heads", "0"], "not divisible by 0 heads"),
        (["inspect", "{tmp}/odd"], "odd/config.json: eps must be like 1e-06, got 'tiny'"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "diffusers", "--weights", "raw"], "run of flashi2v-train"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "diffusers", "--encoders", "{tmp}"], "no directory vae"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "diffusers", "--shift", "3"], "together with --encoders"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "diffusers", "--dtype", "fp8"], "fp8"),
        (["convert", "{tmp}/source", "{tmp}/source", "--to", "diffusers"], "exists"),
        (["convert", "{tmp}/source", "{tmp}/out", "--to", "wam"], "wam"),
        (["init", "{tmp}/new", "--preset", "small"], "small"),
        (["inspekt", "x"], "inspekt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, arguments, words):
    small_model().save_pretrained(tmp_path / "source")
    save_file(small_model().state_dict(), tmp_path / "lone.safetensors")
    shutil.copytree(tmp_path / "source", tmp_path / "odd")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"eps": "tiny"}))
    before = {path.name for path in tmp_path.iterdir()}
    assert words in run(*(argument.format(tmp=tmp_path) for argument in arguments), code=2)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("name", "to"), [("out.safetensors", "npu"), ("out.pt", "npu"), ("out", "diffusers")])
def test_a_disk_that_fills_up_leaves_nothing_and_exits_1(tmp_path, name, to):
    resource = pytest.importorskip("resource")  # of Unix
    small_model().save_pretrained(tmp_path / "source")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (500_000, 500_000))
    command = ("flashi2v-model", "convert", tmp_path / "source", tmp_path / name, "--to", to)
    done = forked.run(*command, prepare=limit)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert re.match(r"flashi2v-model: cannot write \(.+\): ", done.stderr)
    assert done.stderr.endswith(f"{tmp_path / name}\n")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interrupt_is_one_line_and_leaves_nothing(tmp_path):
    large = FlashI2VTransformer3DModel(**SMALL | {"num_layers": 20, "ffn_dim": 9600})  # writing takes a while
    torch.save(large.state_dict(), tmp_path / "weights.pt")
    command = ("convert", tmp_path / "weights.pt", tmp_path / "out", "--to", "diffusers", "--num-heads", "4")
    process = forked.Command("flashi2v-model", *command)
    while not any(tmp_path.glob(".out.*/out")) and process.poll() is None:  # until it has begun to write
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "flashi2v-model: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_init_and_convert_make_pipelines_with_the_encoders_given(run, tmp_path):
    run("init", tmp_path / "tiny", "--preset", "tiny", "--seed", 3)
    run("init", tmp_path / "again", "--preset", "tiny", "--seed", 3)
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "tiny" / name).read_bytes()
    assert "exists" in run("init", tmp_path / "again", "--preset", "tiny", code=2)
    run("convert", tmp_path / "tiny", tmp_path / "new", "--to", "diffusers", "--encoders", tmp_path / "tiny")
    files = {str(path.relative_to(tmp_path / "tiny")) for path in (tmp_path / "tiny").rglob("*")}
    written = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*")}
    assert written == files | {"README.md"}
    card = (tmp_path / "new" / "README.md").read_text()
    assert "pipeline_tag: image-to-video" in card
    assert "- trained: not recorded" in card
    assert load_file(tmp_path / "new" / name).keys() == load_file(tmp_path / "tiny" / name).keys()
    assert json.loads((tmp_path / "new/scheduler/scheduler_config.json").read_text())["shift"] == 7
    shift = ["--shift", 2.5]
    run("convert", tmp_path / "tiny", tmp_path / "low", "--to", "diffusers", "--encoders", tmp_path / "tiny", *shift)
    assert json.loads((tmp_path / "low/scheduler/scheduler_config.json").read_text())["shift"] == 2.5


def test_a_tokenizer_of_transformers_5_is_written_so_that_4_reads_it(run, tmp_path):
    run("init", tmp_path / "tiny", "--preset", "tiny")
    shutil.rmtree(tmp_path / "tiny" / "tokenizer")
    core = Tokenizer(WordLevel({"<unk>": 0, "red": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path / "tiny" / "tokenizer")
    run("convert", tmp_path / "tiny", tmp_path / "new", "--to", "diffusers", "--encoders", tmp_path / "tiny")
    index = json.loads((tmp_path / "new/model_index.json").read_text())
    config = json.loads((tmp_path / "new/tokenizer/tokenizer_config.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path / "new/tokenizer")("red").input_ids == [1]


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_stored_in_the_dtype_that_is_asked_for(run, tmp_path, dtype, stored):
    model = small_model()
    model.save_pretrained(tmp_path / "source")
    for out, to in (("model", "diffusers"), ("model.pt", "npu")):
        run("convert", tmp_path / "source", tmp_path / out, "--to", to, "--dtype", dtype)
        assert_same_weights(tmp_path / out, {key: value.to(stored) for key, value in model.state_dict().items()})


def test_what_is_written_has_the_permissions_of_any_new_file(run, tmp_path):
    small_model().save_pretrained(tmp_path / "source")
    (tmp_path / "any").touch()
    run("convert", tmp_path / "source", tmp_path / "model", "--to", "diffusers")
    run("convert", tmp_path / "source", tmp_path / "npu.safetensors", "--to", "npu")
    for file in (*(tmp_path / "model").iterdir(), tmp_path / "npu.safetensors"):
        assert file.stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tiny: (tiny / "tokenizer" / "tokenizer_config.json").write_text("{"), "tokenizer cannot be loaded"),
        (lambda tiny: (tiny / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae lacks"),
        (lambda tiny: (tiny / "text_encoder" / "config.json").unlink(), "text_encoder lacks"),
    ],
)
def test_damaged_encoders_are_one_line_and_leave_nothing(run, tmp_path, spoil, words):
    run("init", tmp_path / "tiny", "--preset", "tiny")
    spoil(tmp_path / "tiny")
    command = ["convert", tmp_path / "tiny", tmp_path / "new", "--to", "diffusers", "--encoders", tmp_path / "tiny"]
    assert words in run(*command, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
