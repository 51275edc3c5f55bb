"""Weights of every layout: names, detection, strictness, safety."""

import inspect
import io
import json
import pickle
import random
import shutil
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from golden import SMALL, small_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from flashi2v_model import FlashI2VTransformer3DModel, InputError, convert_state_dict, load_weights
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_model.weights import LAYOUTS, NEW_LAYERS, architecture, detect_layout, read_state_dict, translate

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Wan2.1 name, NPU release, diffusers (None for what diffusers' Wan model lacks), read off the published weights.
WAN_ARGUMENTS = inspect.signature(WanTransformer3DModel.__init__).parameters
NAMES = json.loads(Path(__file__).with_name("key_names.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_equal_the_published_ones(layout):
    model = small_model().state_dict()
    for wan, npu, diffusers in NAMES:
        if layout == "wan" and diffusers is None:
            continue
        name = {"wan": wan, "main": wan, "npu": npu, "diffusers": diffusers or wan}[layout]
        (ours,) = translate([name], layout, "diffusers").values()
        assert ours in model
        assert translate([wan], "main", layout) == {wan: name}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_keep_every_tensor(layout):
    original = small_model().state_dict()
    if layout == "wan":
        original = {k: v for k, v in original.items() if not k.startswith(("fourier_embedding", "learnable_proj"))}
    there = convert_state_dict(original, target=layout)
    assert detect_layout(there) == layout
    back = convert_state_dict(there)
    assert back.keys() == original.keys()
    assert all(back[key] is original[key] for key in original)


def test_the_wan_layout_refuses_layers_it_has_no_place_for():
    with pytest.raises(InputError, match="main"):
        convert_state_dict(small_model().state_dict(), target="wan")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["1.3b", "14b"])
def test_full_size_key_lists_go_through_every_layout_and_back(name, layout):
    with torch.device("meta"):
        original = FlashI2VTransformer3DModel(**TRANSFORMERS[name]).state_dict()
    if layout == "wan":
        original = {key: tensor for key, tensor in original.items() if not key.startswith(NEW_LAYERS)}
    there = convert_state_dict(original, target=layout)
    assert detect_layout(there) == layout
    assert len(there) == len(original) == {"1.3b": 833, "14b": 1103}[name] - (0 if layout != "wan" else 8)
    back = convert_state_dict(there)
    assert all(back[key] is tensor for key, tensor in original.items())


@pytest.mark.parametrize("name", ["1.3b", "14b"])
def test_full_size_architectures_are_read_off_their_shapes(name):
    with torch.device("meta"):
        model = FlashI2VTransformer3DModel(**TRANSFORMERS[name])
        wan = WanTransformer3DModel(**{k: v for k, v in model.config.items() if k in WAN_ARGUMENTS})
    sizes = architecture(model.state_dict())
    assert {key: model.config[key] for key in sizes} == sizes
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items() if not key.startswith(NEW_LAYERS)}
    assert shapes == {key: tensor.shape for key, tensor in wan.state_dict().items()}


@pytest.mark.parametrize("layout", ["npu", "main", "diffusers"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_any_layout_loads_exactly(tmp_path, layout, suffix):
    original = small_model()
    path = tmp_path / f"weights{suffix}"
    converted = convert_state_dict(original.state_dict(), target=layout)
    save_file(converted, path) if suffix == ".safetensors" else torch.save(converted, path)
    loaded = FlashI2VTransformer3DModel(**SMALL)
    assert load_weights(loaded, path) == []
    assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), loaded.state_dict().values()))


def test_a_text_to_video_trunk_leaves_the_new_layers_at_their_start_only_when_allowed(tmp_path):
    trunk = {k: v for k, v in small_model().state_dict().items() if not k.startswith(("fourier", "learnable"))}
    save_file(convert_state_dict(trunk, target="wan"), tmp_path / "wan.safetensors")
    model = FlashI2VTransformer3DModel(**SMALL)
    with pytest.raises(InputError, match=r"text-to-video trunk.*missing learnable_proj\.proj\.0,2\.bias"):
        load_weights(model, tmp_path / "wan.safetensors")
    kept = load_weights(model, tmp_path / "wan.safetensors", new_layers_may_start=True)
    assert "fourier_embedding.1.weight" in kept
    assert len(kept) == 8
    assert (model.fourier_embedding[1].weight == 0).all()


def faults_of(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_key_that_does_not_fit_is_listed_in_one_error(tmp_path):
    weights = small_model(num_layers=4).state_dict()
    del weights["proj_out.bias"]
    weights["patch_embedding.bias"] = torch.zeros(7)
    weights["blocks.1.attn1.to_q.bias"] = torch.zeros(96, dtype=torch.int8)
    weights["lora"] = torch.zeros(1)
    torch.save(weights, tmp_path / "weights.pt")
    model = FlashI2VTransformer3DModel(**SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = faults_of(lambda: load_weights(model, tmp_path / "weights.pt"))
    assert "missing proj_out.bias" in message
    assert "unexpected blocks.3.attn1.to_q.weight" in message
    assert "unexpected lora" in message
    assert "patch_embedding.bias is (7,), the model has (96,)" in message
    assert "blocks.1.attn1.to_q.bias is int8" in message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layout", ["npu", "main", "diffusers"])
def test_conversion_lists_every_fault_of_the_weights_under_their_own_names(layout):
    weights = convert_state_dict(small_model().state_dict(), target=layout)
    (bias,) = translate(["proj_out.bias"], "diffusers", layout).values()
    keys = translate([f"blocks.{i}.attn1.to_k.weight" for i in range(3)], "diffusers", layout).values()
    (query,) = translate(["blocks.1.attn2.to_q.weight"], "diffusers", layout).values()
    for key in (bias, *keys):
        del weights[key]
    weights[query] = torch.zeros(2, 3)
    weights["blocks.0.lora_A.weight"] = weights["blocks.2.lora_A.weight"] = torch.zeros(1)
    message = faults_of(lambda: convert_state_dict(weights))
    assert f"missing {bias}" in message
    assert f"missing {next(iter(keys)).replace('.0.', '.0-2.', 1)}" in message
    assert f"{query} is (2, 3), the model has (96, 96)" in message
    assert "unexpected blocks.0,2.lora_A.weight" in message


def test_weights_without_the_keys_that_tell_sizes_are_refused_with_all_of_those():
    weights = small_model().state_dict()
    del weights["proj_out.weight"], weights["patch_embedding.weight"]
    message = faults_of(lambda: convert_state_dict({**weights, "odd": torch.zeros(1)}))
    assert "patch_embedding.weight, proj_out.weight" in message
    assert "unexpected odd" in message


def test_a_stray_block_number_builds_no_giant_model():
    weights = {**small_model().state_dict(), "blocks.123456789.attn1.to_q.weight": torch.zeros(96, 96)}
    assert "unexpected blocks.123456789.attn1.to_q.weight" in faults_of(lambda: convert_state_dict(weights))


def test_thousands_of_foreign_keys_stay_one_readable_line():
    weights = small_model().state_dict() | {f"layer_{i}": torch.zeros(1) for i in range(5000)}
    message = faults_of(lambda: convert_state_dict(weights))
    assert len(message) < 5000
    assert "and 4940 more such groups of keys" in message


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_model(eps=1e-5).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", ["", "diffusion_pytorch_model.safetensors"])
def test_settings_that_shapes_do_not_tell_are_held_against_the_model(saved, name):
    loaded = FlashI2VTransformer3DModel(**SMALL, eps=1e-5)
    assert load_weights(loaded, saved / name) == []
    other = SMALL | {"num_attention_heads": 8, "attention_head_dim": 12, "low_freq_proj": True}
    message = faults_of(lambda: load_weights(FlashI2VTransformer3DModel(**other), saved / name))
    assert f"eps is 1e-05 in {saved / 'config.json'}, the model has 1e-06 (predictor.eps)" in message
    assert "num_attention_heads is 4" in message
    assert "the model has 8 (predictor.num_heads)" in message
    assert "the model has True (predictor.low_freq_proj)" in message
    assert "ffn_dim" not in message


def test_settings_that_the_config_does_not_name_contradict_nothing(saved):
    config = json.loads((saved / "config.json").read_text())
    trunk = {k: v for k, v in config.items() if k not in ("text_len", "low_freq_proj", "fft_return_abs")}
    (saved / "config.json").write_text(json.dumps(trunk | {"image_dim": None, "_class_name": "WanTransformer3DModel"}))
    load_weights(FlashI2VTransformer3DModel(**SMALL, eps=1e-5, low_freq_proj=True, text_len=64), saved)


def test_the_config_of_the_original_wan_is_held_against_the_model(tmp_path):
    trunk = {k: v for k, v in small_model().state_dict().items() if not k.startswith(NEW_LAYERS)}
    save_file(convert_state_dict(trunk, target="wan"), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "WanModel", "dim": 96, "num_heads": 6, "eps": 1e-6, "text_len": 77})
    )
    model = FlashI2VTransformer3DModel(**SMALL)
    message = faults_of(lambda: load_weights(model, tmp_path, new_layers_may_start=True))
    assert "num_attention_heads is 6" in message
    assert "text_len is 77" in message
    assert "eps is" not in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[]", "must hold a JSON object"),
        ('{"_class_name": "WanModel", "dim": "wide", "num_heads": 4}', "dim must be like 1536, got 'wide'"),
        ('{"_class_name": "WanModel", "dim": 96, "num_heads": "4"}', "num_attention_heads must be like 12, got '4'"),
        ('{"_class_name": "WanModel", "dim": 96, "num_heads": 0}', "num_attention_heads must be above 0"),
        ('{"num_attention_heads": 4, "eps": NaN}', "eps must be above 0, got nan"),
        ('{"num_attention_heads": 4, "text_len": -5}', "text_len must be above 0, got -5"),
    ],
)
def test_settings_that_no_model_has_are_refused(tmp_path, config, words):
    torch.save(small_model().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(config)
    assert words in faults_of(lambda: load_weights(FlashI2VTransformer3DModel(**SMALL), tmp_path / "weights.pt"))


def test_a_config_of_something_else_beside_a_file_is_left_alone(tmp_path):
    torch.save(small_model().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text('{"options": {"seed": 1}}')
    assert load_weights(FlashI2VTransformer3DModel(**SMALL), tmp_path / "weights.pt") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_the_meta_device_takes_the_weights_in_its_own_dtype(tmp_path, dtype):
    original = small_model()
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    with torch.device("meta"):
        model = FlashI2VTransformer3DModel(**SMALL).to(dtype)
    load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(value, original.state_dict()[key].to(dtype)) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_trunk_is_not_loaded_into_a_model_without_start_values(tmp_path):
    trunk = {k: v for k, v in small_model().state_dict().items() if not k.startswith(NEW_LAYERS)}
    torch.save(trunk, tmp_path / "trunk.pt")
    with torch.device("meta"):
        model = FlashI2VTransformer3DModel(**SMALL)
    with pytest.raises(ValueError, match="start values"):
        load_weights(model, tmp_path / "trunk.pt", new_layers_may_start=True)


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", ["pickle", "torch", "legacy", "renamed", "garbage", "empty", "list", "nested"])
def test_files_that_hold_more_than_tensors_are_refused(tmp_path, content):
    path = tmp_path / ("weights.safetensors" if content == "renamed" else "weights.pt")
    trap = Trap(tmp_path / "sprung")
    if content in ("pickle", "renamed"):
        path.write_bytes(pickle.dumps(trap))
    elif content in ("torch", "legacy"):
        torch.save({"a": trap}, path, _use_new_zipfile_serialization=content == "torch")
    elif content == "garbage":
        path.write_bytes(b"not weights")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    else:
        torch.save({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.zeros(1)}}, path)
    with pytest.raises(InputError, match=rf"weights\{path.suffix}"):
        read_state_dict(path)
    assert not trap.path.exists()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "spoil",
    [
        Tensor.to_sparse,
        lambda tensor: tensor.to("meta"),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_that_are_not_numbers_side_by_side_are_refused(tmp_path, spoil, device):
    torch.save({"a": torch.zeros(2, 2), "b": spoil(torch.ones(2, 2))}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt is not loaded: b is sparse, quantised"):
        read_state_dict(tmp_path / "weights.pt", device=device)


@pytest.mark.parametrize(("content", "words"), [(b"{}", "Unsupported operand 123"), (b"h0", "it refers to 48, which")])
def test_files_of_another_kind_say_what_is_wrong(tmp_path, content, words):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_state_dict(tmp_path / "weights.pt")


def test_the_trap_of_these_tests_would_spring(tmp_path):
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("wrap", ["model", "state_dict", "prefix", "prefix in model"])
def test_weights_are_found_under_a_name_and_behind_a_prefix(tmp_path, wrap):
    original = small_model().state_dict()
    weights = {f"module.{k}": v for k, v in original.items()} if "prefix" in wrap else original
    torch.save(weights if wrap == "prefix" else {wrap.split()[-1]: weights, "iteration": 7}, tmp_path / "weights.pt")
    read = read_state_dict(tmp_path / "weights.pt")
    assert all(torch.equal(read[key], value) for key, value in original.items())


def test_files_that_cannot_be_mapped_are_read_all_the_same(tmp_path):
    original = small_model().state_dict()
    torch.save(original, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(original, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "compressed.pt", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    for name in ("legacy.pt", "compressed.pt"):
        read = read_state_dict(tmp_path / name)
        assert all(torch.equal(read[key], value) for key, value in original.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_float_types_are_cast_to_the_models(tmp_path, dtype):
    original = {key: value.to(dtype) for key, value in small_model().state_dict().items()}
    save_file(original, tmp_path / "weights.safetensors")
    model = FlashI2VTransformer3DModel(**SMALL)
    load_weights(model, tmp_path / "weights.safetensors")
    assert all(torch.equal(value, original[key].float()) for key, value in model.state_dict().items())


def test_a_directory_without_weights_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors is not there"):
        read_state_dict(tmp_path)


def test_a_directory_is_read_if_it_holds_one_file_of_weights(tmp_path):
    torch.save(small_model().state_dict(), tmp_path / "flashi2v.pt")
    assert detect_layout(read_state_dict(tmp_path)) == "diffusers"
    torch.save(small_model().state_dict(), tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"name one of flashi2v\.pt, other\.pt"):
        read_state_dict(tmp_path)


def test_sharded_directories_are_read_and_a_missing_shard_is_named(tmp_path):
    original = small_model()
    original.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    read = read_state_dict(tmp_path)
    assert all(torch.equal(read[key], value) for key, value in original.state_dict().items())
    shutil.copy(shards[0], shards[1])
    with pytest.raises(InputError, match="both hold"):
        read_state_dict(tmp_path)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"{shards[1].name} is not there"):
        read_state_dict(tmp_path)


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "../weights.pt"}}')
    with pytest.raises(InputError, match="must name files beside it"):
        read_state_dict(tmp_path)


def test_other_models_are_refused():
    with pytest.raises(InputError, match=r"not weights of a Wan2\.1 or FlashI2V transformer"):
        convert_state_dict({"encoder.layer.0.weight": torch.zeros(1)})


class TransformerOnly(DiffusionPipeline):
    """The smallest pipeline with our transformer in it."""

    def __init__(self, transformer: FlashI2VTransformer3DModel) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


class TestFromPretrained:
    """`FlashI2VTransformer3DModel.from_pretrained` is as strict as `load_weights`."""

    def spoil(self, directory: Path, **changes: Tensor | None) -> None:
        file = directory / "diffusion_pytorch_model.safetensors"
        weights = load_file(file) | {key.replace("__", "."): value for key, value in changes.items()}
        save_file({key: value.clone() for key, value in weights.items() if value is not None}, file)

    def test_all_faults_are_in_one_error(self, saved):
        self.spoil(saved, proj_out__bias=None, patch_embedding__bias=torch.zeros(7), odd=torch.zeros(1))
        message = faults_of(lambda: FlashI2VTransformer3DModel.from_pretrained(saved))
        assert "missing proj_out.bias" in message
        assert "unexpected odd" in message
        assert "patch_embedding.bias is (7,), the model has (96,)" in message
        assert "missing patch_embedding.bias" not in message

    def test_shards_that_lack_what_the_index_promises_are_refused(self, saved):
        small_model().save_pretrained(saved, max_shard_size="200KB")
        shard = next(p for p in sorted(saved.glob("*-of-*.safetensors")) if "proj_out.bias" in load_file(p))
        save_file({k: v for k, v in load_file(shard).items() if k != "proj_out.bias"}, shard, {"format": "pt"})
        (saved / "diffusion_pytorch_model.safetensors").unlink()
        message = faults_of(lambda: FlashI2VTransformer3DModel.from_pretrained(saved))
        assert "missing proj_out.bias" in message

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_weights_that_lack_their_scales_are_refused(self, saved, dtype):
        self.spoil(saved, patch_embedding__bias=torch.zeros(96, dtype=dtype))
        message = faults_of(lambda: FlashI2VTransformer3DModel.from_pretrained(saved, torch_dtype=torch.bfloat16))
        assert f"patch_embedding.bias is {str(dtype).removeprefix('torch.')}" in message

    @pytest.mark.parametrize("max_shard_size", ["200KB", "1GB"])
    def test_the_variant_that_is_asked_for_is_the_one_that_is_checked(self, tmp_path, max_shard_size):
        for variant, dtype in {"half": torch.float16, "eighth": torch.float8_e4m3fn}.items():
            small_model().to(dtype).save_pretrained(tmp_path, variant=variant, max_shard_size=max_shard_size)
        FlashI2VTransformer3DModel.from_pretrained(tmp_path, variant="half")
        load = partial(
            FlashI2VTransformer3DModel.from_pretrained, tmp_path, variant="eighth", torch_dtype=torch.float32
        )
        assert "patch_embedding.weight is float8_e4m3fn" in faults_of(load)

    def test_ignoring_shapes_is_refused(self, saved):
        with pytest.raises(InputError, match="ignore_mismatched_sizes"):
            FlashI2VTransformer3DModel.from_pretrained(saved, ignore_mismatched_sizes=True)

    def test_diffusers_arguments_keep_their_meaning(self, saved, tmp_path):
        shutil.move(saved, tmp_path / "pipeline" / "transformer")
        model, report = FlashI2VTransformer3DModel.from_pretrained(
            tmp_path / "pipeline", subfolder="transformer", torch_dtype=torch.bfloat16, output_loading_info=True
        )
        assert not any(report.values())
        assert not model.training
        assert model.config.eps == 1e-5
        assert model.patch_embedding.weight.dtype == torch.bfloat16
        assert model.scale_shift_table.dtype == torch.float32
        mapped = FlashI2VTransformer3DModel.from_pretrained(
            str(tmp_path / "pipeline"), subfolder="transformer", low_cpu_mem_usage=True, device_map="cpu"
        )
        assert torch.equal(mapped.proj_out.weight, small_model().proj_out.weight)

    def test_pipelines_load_it_as_strictly(self, saved, tmp_path):
        (tmp_path / "pipeline").mkdir()
        shutil.move(saved, tmp_path / "pipeline" / "transformer")
        index = {
            "_class_name": "DiffusionPipeline",
            "transformer": ["flashi2v_model.transformer", "FlashI2VTransformer3DModel"],
        }
        (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
        load = partial(TransformerOnly.from_pretrained, tmp_path / "pipeline")
        assert load(torch_dtype=torch.bfloat16).transformer.proj_out.weight.dtype == torch.bfloat16
        self.spoil(tmp_path / "pipeline" / "transformer", proj_out__bias=None)
        assert "missing proj_out.bias" in faults_of(load)


def test_a_checkpoint_whose_table_of_contents_runs_code_is_refused(tmp_path):
    trap = Trap(tmp_path / "sprung")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(trap))
    with pytest.raises(InputError, match="no place in it"):
        read_state_dict(tmp_path)
    assert not trap.path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04Nr\xff\xff\xff\x0f.",  # room for 2^28 objects
        b"\x80\x05\x96\x00\x00\x00\x40\x01\x00\x00\x00.",  # a bytearray of 5 GB
        b"\x80\x04\x8e\x00\x00\x00\x40\x01\x00\x00\x00.",  # bytes of 5 GB
        # One list, copied again and again.
        b"\x80\x04](" + 2000 * b"K\x01" + b"e\x94](" + 2000 * b"cbuiltins\nset\nh\x00\x85R" + b"e.",
        # A class changed.
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x01\x00\x00\x00xK\x01s\x86b.",
    ],
)
def test_a_table_of_contents_that_asks_for_more_than_its_size_is_refused_in_little_memory(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(InputError, match="damaged"):
        read_state_dict(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


class EarlyPickler(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.2 does."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_a_table_of_contents_that_an_early_python_wrote_is_read(tmp_path):
    save_checkpoint({"model": {"weight": torch.arange(3.0)}}, checkpoint_id=tmp_path)
    file = io.BytesIO()
    EarlyPickler(file).dump(pickle.loads((tmp_path / ".metadata").read_bytes()))
    (tmp_path / ".metadata").write_bytes(file.getvalue())
    assert b"getattr" in file.getvalue()
    assert read_state_dict(tmp_path)["weight"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["Metadata", "_MEM_FORMAT_ENCODING"])
def test_of_a_table_of_contents_no_other_attribute_is_looked_up(tmp_path, name):
    kind = f"ctorch.distributed.checkpoint.metadata\n{name}\n".encode()
    word = pickle.dumps("__class__", 2)[2:-3]  # without the header, and what ends it
    (tmp_path / ".metadata").write_bytes(b"\x80\x04cbuiltins\ngetattr\n" + kind + word + b"\x86R.")
    with pytest.raises(InputError, match="no place in it"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "script"])
def test_the_refusal_of_a_pickle_does_not_say_how_to_run_it(tmp_path, how):
    trap, path = Trap(tmp_path / "sprung"), tmp_path / "weights.pt"
    if how == "script":
        with warnings.catch_warnings(action="ignore"):
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=how == "zip")
    with warnings.catch_warnings(action="ignore"):
        message = faults_of(lambda: read_state_dict(path))
    assert "pickle" in message or "TorchScript" in message
    for advice in ("weights_only", "safe_globals", "torch.load", "trust", "\x1b"):
        assert advice not in message


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run's directory whose moving average is the raw weights plus one."""
    model = small_model(low_freq_proj=True)
    raw = model.state_dict()
    average = {key: tensor + 1 for key, tensor in raw.items()}
    directory = tmp_path / "run"
    directory.mkdir()
    save_checkpoint(
        {"model": raw, "ema": average, "optimizer": {"x": torch.zeros(3)}}, checkpoint_id=directory / "iter_0000007"
    )
    model.save_config(directory / "iter_0000007")
    (directory / "latest_checkpointed_iteration.txt").write_text("7\n")
    return directory


@pytest.mark.parametrize("allocated", [True, False])
@pytest.mark.parametrize("ema", [True, False])
def test_a_checkpoint_gives_its_moving_average_or_its_raw_weights(run, ema, allocated):
    expected = {key: tensor + ema for key, tensor in small_model().state_dict().items()}
    loaded = read_state_dict(run, ema=ema)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    with torch.device("cpu" if allocated else "meta"):
        model = FlashI2VTransformer3DModel(**SMALL, low_freq_proj=True)
    load_weights(model, run, ema=ema)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_the_settings_of_a_checkpoint_are_held_against_the_model(run):
    message = faults_of(lambda: load_weights(FlashI2VTransformer3DModel(**SMALL), run))
    assert "predictor.low_freq_proj" in message


def test_a_checkpoint_that_lacks_a_part_of_a_tensor_is_refused(run):
    path = run / "iter_0000007" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["ema.proj_out.weight"].chunks.clear()
    path.write_bytes(pickle.dumps(metadata))
    assert "holds only a part of ema.proj_out.weight" in faults_of(lambda: read_state_dict(run))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_bytes_are_an_input_error_or_harmless(tmp_path):
    weights = {f"blocks.{i}.weight": torch.zeros(3, 4) for i in range(3)}
    torch.save(weights, tmp_path / "zip.pt")
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "weights.safetensors")
    save_checkpoint({"model": weights}, checkpoint_id=tmp_path / "run")
    chance = random.Random(0)
    for name in ("zip.pt", "legacy.pt", "weights.safetensors", "run/.metadata", "run/__0_0.distcp"):
        path = tmp_path / name
        whole = path.read_bytes()
        refused = 0
        for _ in range(100):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                damaged[chance.randrange(min(len(whole), 900))] = chance.randrange(256)
            path.write_bytes(damaged)
            try:
                read_state_dict(path.parent if name.startswith("run") else path)
            except InputError:
                refused += 1
        assert refused > 20, name
        path.write_bytes(whole)


def test_checkpoint_data_that_runs_code_is_refused(run, tmp_path):
    trap = Trap(tmp_path / "sprung")
    # What a tensor's bytes are replaced by is a whole torch file of its own, where the table of contents says.
    spring = io.BytesIO()
    torch.save(trap, spring)
    metadata_path = run / "iter_0000007" / ".metadata"
    metadata = pickle.loads(metadata_path.read_bytes())
    for data in (run / "iter_0000007").glob("*.distcp"):
        data.write_bytes(spring.getvalue())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(spring.getvalue())
    metadata_path.write_bytes(pickle.dumps(metadata))
    message = faults_of(lambda: read_state_dict(run))
    assert "holds more than tensors" in message
    assert "the pickle in it asks for more than tensors: " in message
    assert not trap.path.exists()
