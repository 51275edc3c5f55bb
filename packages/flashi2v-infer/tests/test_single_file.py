"""A pipeline from one file of weights, and the parts around it."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
from safetensors.torch import save_file

from flashi2v_infer import FlashI2VPipeline, InputError
from flashi2v_model import InputError as ModelError
from flashi2v_model import convert_state_dict


@pytest.fixture(scope="module")
def weights(shared_pipe):
    """The transformer's, by layout."""
    own = shared_pipe.transformer.state_dict()
    return {layout: convert_state_dict(own, target=layout) for layout in ("main", "npu")}


@pytest.fixture(scope="module")
def wan(model_directory, tmp_path_factory) -> Path:
    """The encoders as Wan2.1 has them, around a transformer of its own."""
    directory = tmp_path_factory.mktemp("wan")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(model_directory / part, directory / part)
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "transformer": ["a", "B"]}))
    config = json.loads((model_directory / "transformer" / "config.json").read_text())
    names = inspect.signature(WanTransformer3DModel.__init__).parameters.keys() & config.keys()
    (directory / "transformer").mkdir()
    kept = {name: config[name] for name in names} | {"_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None}
    (directory / "transformer" / "config.json").write_text(json.dumps(kept))
    return directory


FILES = ("main.safetensors", "comfy.safetensors", "whole.safetensors", "released.pt", "a.gguf")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("around", ["a pipeline", "Wan's encoders", "objects"])
def test_every_published_file_gives_the_same_pipeline(
    shared_pipe, model_directory, wan, weights, photograph, tmp_path, name, around
):
    prefix = "" if name in ("main.safetensors", "released.pt") else "model.diffusion_model."
    layout = "npu" if name == "released.pt" else "main"
    held = {f"{prefix}{key}": value.clone() for key, value in weights[layout].items()}
    if name == "whole.safetensors":
        held["vae.decoder.conv1.weight"] = torch.zeros(3)
    if name == "a.gguf":
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(tmp_path / name, "wan")
        for key, value in held.items():
            writer.add_tensor(key, value.numpy())
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
    else:
        (torch.save if name.endswith(".pt") else save_file)(held, tmp_path / name)
    parts = {part: value for part, value in shared_pipe.components.items() if part != "transformer"}
    given = {
        "a pipeline": {"config": model_directory},
        "Wan's encoders": {"config": str(wan)},
        "objects": {**parts, "num_heads": 4},
    }[around]
    if name == "a.gguf":
        given["quantization_config"] = GGUFQuantizationConfig(compute_dtype=torch.float32)
    pipe = FlashI2VPipeline.from_single_file(tmp_path / name, **given)
    for part in ("transformer", "vae", "text_encoder"):
        ours, theirs = (getattr(pipeline, part).state_dict() for pipeline in (pipe, shared_pipe))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part
    assert pipe.transformer.config.num_attention_heads == 4
    assert pipe.scheduler.config.shift == shared_pipe.scheduler.config.shift == 7
    if name == "main.safetensors":
        pipe.set_progress_bar_config(disable=True)
        settings = {"image": photograph, "prompt": "a cat", "num_frames": 5, "height": 32, "width": 48}
        settings |= {"num_inference_steps": 1, "output_type": "latent", "max_sequence_length": 8}
        found, expected = (
            pipeline(**settings, generator=torch.Generator().manual_seed(1)).frames for pipeline in (pipe, shared_pipe)
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0.0)


def test_dtypes_are_those_of_a_directory(model_directory, wan, weights, tmp_path):
    save_file(weights["main"], tmp_path / "a.safetensors")
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    directory = FlashI2VPipeline.from_pretrained(model_directory, torch_dtype=dtypes)
    for config in (model_directory, wan):
        pipe = FlashI2VPipeline.from_single_file(tmp_path / "a.safetensors", config=config, torch_dtype=dtypes)
        for part in ("transformer", "vae", "text_encoder"):
            ours, theirs = (getattr(found, part).state_dict() for found in (pipe, directory))
            assert {key: value.dtype for key, value in ours.items()} == {k: v.dtype for k, v in theirs.items()}


def test_what_is_missing_or_does_not_fit_is_one_line(shared_pipe, model_directory, wan, weights, tmp_path):
    load = FlashI2VPipeline.from_single_file
    save_file(weights["main"], file := tmp_path / "a.safetensors")
    vae, scheduler = shared_pipe.vae, shared_pipe.scheduler
    encodes_nothing = load(file, vae=vae, scheduler=scheduler, num_heads=4)
    assert encodes_nothing.text_encoder is None
    changed = shutil.copytree(wan, tmp_path / "changed")
    config = changed / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    shutil.rmtree(changed / "vae")
    for given, message in (
        ({}, "give config=DIRECTORY, or the pipeline's scheduler, vae$"),
        ({"vae": vae, "num_heads": 4}, "or the pipeline's scheduler$"),
        (
            {"config": wan, "original_config": "a"},
            "original_config cannot be given, only config, dtype and scheduler",
        ),
        ({"config": wan, "transformer": shared_pipe.transformer}, "transformer cannot be given"),
        ({"config": wan, "num_heads": 8}, "num_attention_heads is 4 in .*config.json, the weights have 8"),
        ({"config": changed}, "num_layers is 3 in .*config.json, the weights have 4"),
    ):
        with pytest.raises((InputError, ModelError), match=message):
            load(file, **given)
    shutil.rmtree(changed / "transformer")
    with pytest.raises(InputError, match=r"config: .*changed holds no vae"):
        load(file, config=changed, num_heads=4)
    shutil.rmtree(changed / "tokenizer")
    with pytest.raises(InputError, match="config: no such directory"):
        load(file, config=changed, num_heads=4, vae=vae)
    (tmp_path / "evil.pt").write_bytes(b"\x80\x04cbuiltins\nprint\n.")
    with pytest.raises(ModelError, match=r"evil\.pt is damaged or holds more than tensors"):
        load(tmp_path / "evil.pt", config=model_directory)
