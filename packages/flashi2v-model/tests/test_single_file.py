"""A transformer from one file of weights."""

import pickle
from pathlib import Path

import pytest
import torch
from diffusers import GGUFQuantizationConfig
from golden import small_model, tensor
from safetensors.torch import save_file

from flashi2v_model import FlashI2VTransformer3DModel, InputError, convert_state_dict


def inputs() -> tuple[torch.Tensor, ...]:
    shape = (1, 16, 2, 8, 8)
    return (
        tensor("in:latents", shape),
        torch.tensor([700.0]),
        tensor("in:text", (1, 16, 24)),
        tensor("in:condition", (1, 16, 1, 8, 8)),
    )


def heads() -> int:
    return int(small_model().config.num_attention_heads)


@pytest.mark.parametrize("name", ["main.safetensors", "npu.pt", "comfy.safetensors", "whole.safetensors", "weights"])
@torch.no_grad()
def test_every_published_file_gives_the_same_model(tmp_path, name):
    model = small_model()
    layout = "npu" if name == "npu.pt" else "main"
    weights = {key: value.clone() for key, value in convert_state_dict(model.state_dict(), target=layout).items()}
    if name.startswith(("comfy", "whole")):
        weights = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
    if name.startswith("whole"):
        weights["first_stage_model.decoder.conv1.weight"] = torch.zeros(3)
    given: str | dict[str, torch.Tensor] = weights
    if name != "weights":
        given = str(tmp_path / name)
        (torch.save if name.endswith(".pt") else save_file)(weights, given)
    loaded = FlashI2VTransformer3DModel.from_single_file(given, num_heads=heads())
    assert not loaded.training
    assert all(torch.equal(one, two) for one, two in zip(loaded.state_dict().values(), model.state_dict().values()))
    # Kernels round otherwise where a file's tensors do not lie at even addresses.
    torch.testing.assert_close(loaded(*inputs()).sample, model(*inputs()).sample, atol=1e-5, rtol=0.0)


def test_a_dtype_is_that_of_a_directory(tmp_path):
    save_file(convert_state_dict(small_model().state_dict(), target="main"), tmp_path / "a.safetensors")
    loaded = FlashI2VTransformer3DModel.from_single_file(
        tmp_path / "a.safetensors", num_heads=heads(), torch_dtype=torch.bfloat16
    )
    small_model().save_pretrained(tmp_path / "model")
    other = FlashI2VTransformer3DModel.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: p.dtype for name, p in other.named_parameters()
    }


def write_gguf(path: Path, weights: dict[str, torch.Tensor], quantised: bool = True) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "wan")
    for name, value in weights.items():
        array = value.numpy()
        if quantised and value.ndim == 2 and value.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_file_is_loaded_by_diffusers(tmp_path):
    model = small_model()
    weights = convert_state_dict(model.state_dict(), target="main")
    write_gguf(tmp_path / "a.gguf", {f"model.diffusion_model.{key}": value for key, value in weights.items()})
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    loaded = FlashI2VTransformer3DModel.from_single_file(
        tmp_path / "a.gguf", num_heads=heads(), quantization_config=config
    )
    assert type(loaded.blocks[0].attn1.to_q).__name__ == "GGUFLinear"
    exact, found = model(*inputs()).sample, loaded(*inputs()).sample
    assert 0 < (found - exact).norm() < 0.02 * exact.norm()
    half = FlashI2VTransformer3DModel.from_single_file(
        tmp_path / "a.gguf", num_heads=heads(), quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    )
    assert (half(*inputs()).sample - exact).norm() < 0.05 * exact.norm()


def test_what_does_not_fit_is_one_line(tmp_path):
    pytest.importorskip("gguf")
    weights = convert_state_dict(small_model().state_dict(), target="main")
    load = FlashI2VTransformer3DModel.from_single_file
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    with pytest.raises(InputError, match=r"give quantization_config=diffusers.GGUFQuantizationConfig\(compute_dtype"):
        load(tmp_path / "a.gguf")
    with pytest.raises(InputError, match=r"with a \.gguf file, and only so"):
        load(weights, quantization_config=config)
    with pytest.raises(InputError, match=r"a\.gguf is not there"):
        load(tmp_path / "a.gguf", quantization_config=config)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(InputError, match=r"a\.gguf is damaged, or no GGUF"):
        load(tmp_path / "a.gguf", quantization_config=config)
    del weights["blocks.0.self_attn.q.bias"]
    write_gguf(tmp_path / "b.gguf", weights)
    with pytest.raises(InputError, match=r"missing blocks.0.self_attn.q.bias"):
        load(tmp_path / "b.gguf", num_heads=heads(), quantization_config=config)
    trunk = {key: value for key, value in weights.items() if not key.startswith(("fourier", "learnable"))}
    with pytest.raises(InputError):
        load(trunk, num_heads=heads())

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(InputError, match=r"evil\.pt is damaged or holds more than tensors"):
        load(tmp_path / "evil.pt")
