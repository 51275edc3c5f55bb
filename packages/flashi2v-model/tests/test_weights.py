"""Weights of every layout: names, detection, strictness, safety."""

import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from golden import SMALL, small_model
from safetensors.torch import save_file

from flashi2v_model import FlashI2VTransformer3DModel, InputError, convert_state_dict, load_weights
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_model.weights import LAYOUTS, NEW_LAYERS, architecture, detect_layout, read_state_dict

# Wan2.1 name, NPU release, diffusers (None for what diffusers' Wan model lacks), read off the published weights.
WAN_ARGUMENTS = inspect.signature(WanTransformer3DModel.__init__).parameters
NAMES = json.loads(Path(__file__).with_name("key_names.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_equal_the_published_ones(layout):
    model = small_model().state_dict()
    for wan, npu, diffusers in NAMES:
        name = {"wan": wan, "main": wan, "npu": npu, "diffusers": diffusers or wan}[layout]
        if layout == "wan" and diffusers is None:
            continue
        assert convert_state_dict({name: torch.zeros(1)}, layout).keys() <= model.keys()
        assert list(convert_state_dict({wan: torch.zeros(1)}, "main", layout)) == [name]


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
    with pytest.raises(InputError, match=r"missing learnable_proj\.proj\.2\.bias"):
        load_weights(model, tmp_path / "wan.safetensors")
    kept = load_weights(model, tmp_path / "wan.safetensors", new_layers_may_start=True)
    assert "fourier_embedding.1.weight" in kept
    assert len(kept) == 8
    assert (model.fourier_embedding[1].weight == 0).all()


def test_every_key_that_does_not_fit_is_listed(tmp_path):
    weights = small_model(num_layers=4).state_dict()
    del weights["proj_out.bias"]
    weights["patch_embedding.bias"] = torch.zeros(7)
    torch.save(weights, tmp_path / "weights.pt")
    model = FlashI2VTransformer3DModel(**SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_weights(model, tmp_path / "weights.pt")
    message = str(error.value)
    assert "missing proj_out.bias" in message
    assert "unexpected blocks.3.attn1.to_q.weight" in message
    assert "patch_embedding.bias is (7,), the model has (96,)" in message
    assert "\n" not in message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("content", ["pickle", "torch", "garbage", "list", "nested"])
def test_files_that_hold_more_than_tensors_are_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    trap = Trap(tmp_path / "sprung")
    if content == "pickle":
        path.write_bytes(pickle.dumps(trap))
    elif content == "torch":
        torch.save({"a": trap}, path)
    elif content == "garbage":
        path.write_bytes(b"not weights")
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    else:
        torch.save({"model": {"a": torch.zeros(1)}, "step": 3}, path)
    with pytest.raises(InputError, match=r"weights\.pt"):
        read_state_dict(path)
    assert not trap.path.exists()


def test_weights_under_a_single_name_are_found(tmp_path):
    torch.save({"model": small_model().state_dict()}, tmp_path / "weights.pt")
    assert detect_layout(read_state_dict(tmp_path / "weights.pt")) == "diffusers"


def test_a_directory_without_weights_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors is not there"):
        read_state_dict(tmp_path)


def test_other_models_are_refused():
    with pytest.raises(InputError, match=r"not weights of a Wan2\.1 or FlashI2V transformer"):
        convert_state_dict({"encoder.layer.0.weight": torch.zeros(1)})


def test_a_checkpoint_whose_table_of_contents_runs_code_is_refused(tmp_path):
    trap = Trap(tmp_path / "sprung")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(trap))
    with pytest.raises(InputError, match="no place in it"):
        read_state_dict(tmp_path)
    assert not trap.path.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_gives_its_moving_average_or_its_raw_weights(tmp_path):
    from torch.distributed.checkpoint.state_dict_saver import save

    raw = small_model().state_dict()
    average = {key: tensor + 1 for key, tensor in raw.items()}
    run = tmp_path / "run"
    run.mkdir()
    save({"model": raw, "ema": average, "optimizer": {"x": torch.zeros(3)}}, checkpoint_id=run / "iter_0000007")
    (run / "latest_checkpointed_iteration.txt").write_text("7\n")
    for ema, expected in ((True, average), (False, raw)):
        loaded = read_state_dict(run, ema=ema)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
