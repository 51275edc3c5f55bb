"""Variants of the network: subclasses with arguments, layers and conditioning of their own."""

import json
import sys

import pytest
import torch
from torch import nn

from flashi2v_model import FlashI2VTransformer3DModel, InputError, load_weights
from flashi2v_model.variants import load_class, transformer_class
from flashi2v_model.weights.conversion import convert_state_dict
from flashi2v_model.weights.writing import write_file

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}


class Camera(FlashI2VTransformer3DModel):
    """Tokens know a camera's path of n numbers."""

    def __init__(self, path_length: int = 3, **config):
        super().__init__(**config)
        self.register_to_config(path_length=path_length)
        self.camera = nn.Linear(path_length, self.patch_embedding.out_channels)

    def embed(self, *inputs, path):
        x, *others = super().embed(*inputs)
        return x + self.camera(path)[:, None], *others


class Plain(FlashI2VTransformer3DModel):
    """Another class with the same parameters."""


def inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    latents = torch.randn(batch, 16, 2, 4, 4)
    return latents, 1000 * torch.rand(batch), torch.randn(batch, 5, 16), latents[:, :, :1], torch.rand(batch)


def test_a_variant_is_saved_and_loaded_with_its_own_arguments_and_layers(tmp_path):
    model = Camera(path_length=5, **SMALL)
    nn.init.normal_(model.proj_out.weight)  # which starts at zero
    assert Camera.conditioning_names == ("path",)
    assert FlashI2VTransformer3DModel.conditioning_names == Plain.conditioning_names == ()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["path_length"] == 5
    again, given = Camera.from_pretrained(tmp_path), inputs()
    path = torch.randn(2, 5)
    with torch.no_grad():
        ours, theirs = (one(*given, conditioning={"path": path}).sample for one in (model.eval(), again))
        moved = again(*given, conditioning={"path": path + 1}).sample
    assert torch.equal(ours, theirs)
    assert not torch.allclose(moved, theirs)
    assert Camera.from_config(model.config).camera.in_features == 5


@pytest.mark.parametrize("conditioning", [None, {}, {"track": torch.zeros(2, 3)}])
def test_what_a_variant_asks_for_must_be_given_and_nothing_else(conditioning):
    with pytest.raises(ValueError, match="conditioning must name"):
        Camera(**SMALL)(*inputs(), conditioning=conditioning)
    with pytest.raises(ValueError, match="conditioning must name"):
        FlashI2VTransformer3DModel(**SMALL)(*inputs(), conditioning={"path": torch.zeros(2, 3)})


def test_weights_of_one_variant_are_not_loaded_into_another_class(tmp_path):
    Plain(**SMALL).save_pretrained(tmp_path)
    for other in (FlashI2VTransformer3DModel, Camera):
        with pytest.raises(InputError, match=r"is of a 'Plain', .* loaded as a (FlashI2V\w+|Camera)"):
            other.from_pretrained(tmp_path)
        with pytest.raises(InputError, match="is of a 'Plain'"):
            load_weights(other(**SMALL), tmp_path)
    load_weights(Plain(**SMALL), tmp_path)


@pytest.mark.parametrize("layout", ["diffusers", "npu", "main"])
def test_a_variant_starts_from_flashi2v_and_its_own_layers_keep_their_start(tmp_path, layout):
    start = FlashI2VTransformer3DModel(**SMALL)
    write_file(convert_state_dict(start.state_dict(), target=layout), tmp_path / "start.safetensors", {})
    model = Camera(**SMALL)
    own = model.camera.weight.clone()
    with pytest.raises(InputError, match=r"camera\.weight"):
        load_weights(model, tmp_path / "start.safetensors")
    assert load_weights(model, tmp_path / "start.safetensors", new_layers_may_start=True) == [
        "camera.weight",
        "camera.bias",
    ]
    assert torch.equal(model.camera.weight, own)
    assert torch.equal(model.proj_out.weight, start.proj_out.weight)


def test_half_of_a_variants_layers_is_refused(tmp_path):
    model = Camera(**SMALL)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "camera.bias"}
    write_file(weights, tmp_path / "half.safetensors", {})
    with pytest.raises(InputError, match=r"camera\.bias"):
        load_weights(model, tmp_path / "half.safetensors", new_layers_may_start=True)


def test_a_class_is_named_by_its_module(tmp_path, monkeypatch):
    (tmp_path / "given_here.py").write_text(
        "from flashi2v_model import FlashI2VTransformer3DModel\n\n\nclass Network(FlashI2VTransformer3DModel):\n"
        "    pass\n\n\nclass Recipe:\n    transformer = Network\n\n\nVALUE = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    network = load_class("given_here:Network", "--recipe")
    assert transformer_class("given_here:Network") is transformer_class("given_here:Recipe") is network
    assert transformer_class(None) is FlashI2VTransformer3DModel
    for name, words in (
        ("given_here", "must be module:Class"),
        ("given_here:VALUE", "has no class VALUE"),
        ("not_there:Network", "No module named"),
        ("collections:Counter", "must be a FlashI2VTransformer3DModel, or a recipe"),
    ):
        with pytest.raises(InputError, match=words):
            transformer_class(name)
