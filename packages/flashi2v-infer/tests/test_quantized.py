"""Weights of 8 bits: by diffusers' configurations and by --quantize, beside diffusers' Wan with the same."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import QuantoConfig, TorchAoConfig, WanTransformer3DModel
from safetensors.torch import save_file

from flashi2v_data import read_frames
from flashi2v_infer import cli, demo, read_record
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import ModelDirectory
from flashi2v_model import FlashI2VTransformer3DModel, InputError
from flashi2v_model.quantization import quantize

pytest.importorskip("torchao")
pytest.importorskip("optimum.quanto")
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow

CONFIGURATIONS = {
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao float8": lambda: TorchAoConfig(Float8WeightOnlyConfig()),
    "quanto int8": lambda: QuantoConfig("int8"),
    "quanto float8": lambda: QuantoConfig("float8"),
}
DTYPE = {"torch_dtype": torch.bfloat16}
DEMO = {"pretrained_model_name_or_path": demo.DIRECTORY, "subfolder": "transformer"}


def inputs(config) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    shapes = ((1, 16, 3, 8, 8), (1, 8, config.text_dim), (1, 16, 1, 8, 8))
    return tuple(torch.randn(shape, generator=random) for shape in shapes)


@torch.no_grad()
def ours(model, **more) -> torch.Tensor:
    latents, text, condition = inputs(model.config)
    return model(latents, torch.tensor([500.0]), text, condition, **more).sample.float()


@torch.no_grad()
def theirs(model) -> torch.Tensor:
    latents, text, _ = inputs(model.config)
    return model(latents.bfloat16(), torch.tensor([500.0]), text.bfloat16()).sample.float()


def error(given: torch.Tensor, exact: torch.Tensor) -> float:
    return float((given - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """The demo's trunk, as diffusers' Wan."""
    model = FlashI2VTransformer3DModel.from_pretrained(**DEMO)
    trunk = {key: t for key, t in model.state_dict().items() if not key.startswith(("fourier_", "learnable_"))}
    known = inspect.signature(WanTransformer3DModel.__init__).parameters
    wan = WanTransformer3DModel(**{key: value for key, value in model.config.items() if key in known})
    wan.load_state_dict(trunk)
    wan.save_pretrained(directory := tmp_path_factory.mktemp("wan"))
    return directory


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_by_configurations_of_diffusers_the_error_is_that_of_wan(name, wan, make_adapter):
    exact = ours(FlashI2VTransformer3DModel.from_pretrained(**DEMO, **DTYPE))
    exact_wan = theirs(WanTransformer3DModel.from_pretrained(wan, **DTYPE))
    made = {**DTYPE, "quantization_config": CONFIGURATIONS[name]()}
    model = FlashI2VTransformer3DModel.from_pretrained(**DEMO, **made)
    our_error = error(ours(model), exact)
    wan_error = error(theirs(WanTransformer3DModel.from_pretrained(wan, **made)), exact_wan)
    print(f"{name}: {our_error:.4f}, Wan {wan_error:.4f}")
    assert 1e-4 < our_error < 1.5 * wan_error < 0.1
    adapter = make_adapter(FlashI2VTransformer3DModel.from_pretrained(**DEMO))
    plain = ours(model)
    model.load_lora_adapter(adapter)
    exact_model = FlashI2VTransformer3DModel.from_pretrained(**DEMO, **DTYPE)
    exact_model.load_lora_adapter(adapter)
    assert error(ours(model), ours(exact_model)) < 0.1
    assert error(ours(model), plain) > 0.1, "the adapter has its effect"
    if "torchao" in name:
        with pytest.raises(InputError, match="not fused into quantised weights"):
            model.fuse_lora()
    model.unload_lora()
    assert torch.equal(ours(model), plain)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int8_dynamic"])
@pytest.mark.parametrize("offload", [None, "block_level", "leaf_level"])
def test_quantised_in_place(kind, offload):
    model = FlashI2VTransformer3DModel.from_pretrained(**DEMO, **DTYPE)
    exact, cpu = ours(model), torch.device("cpu")
    quantize(model, kind)
    plain = ours(model)
    assert 1e-4 < error(plain, exact) < 0.05
    if offload is not None:
        model.enable_group_offload(cpu, cpu, offload_type=offload, num_blocks_per_group=1)
        torch.testing.assert_close(ours(model), plain)


def test_products_in_fp8_by_the_kernel_that_a_cpu_has(monkeypatch):
    """torchao gives them to newer GPUs alone; PyTorch's product itself runs here, too."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    stored, multiplied = (FlashI2VTransformer3DModel.from_pretrained(**DEMO, **DTYPE) for _ in range(2))
    exact = ours(stored)
    quantize(stored, "fp8")
    quantize(multiplied, "fp8_dynamic", torch.device("cuda"))
    assert multiplied.blocks[0].ffn.net[2].weight.act_quant_kwargs.granularity == PerRow()
    assert error(ours(stored), exact) < error(ours(multiplied), exact) < 0.06


def test_without_such_a_device_the_command_says_what_runs_instead(monkeypatch, capsys, tmp_path):
    arguments = ("--model", "demo", "--device", "cpu", "--quantize", "fp8_dynamic", "-o", str(tmp_path / "out.mp4"))
    monkeypatch.setattr(sys, "argv", ["flashi2v-infer", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "quantize fp8_dynamic needs a GPU of compute capability 8.9, not cpu: fp8 stores in 8 bits alone" in line


@pytest.mark.parametrize("kind", ["int8", "fp8", "int8_dynamic"])
def test_the_command_samples_with_8_bits_and_says_so(kind, own_directory, monkeypatch, capsys):
    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["flashi2v-infer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    one = ("--model", "demo", "--num-inference-steps", "2", "--device", "cpu")
    command(*one, "-o", "exact.mp4")
    command(*one, "-o", "small.mp4", "--quantize", kind, "--lora", "style.safetensors:0")
    exact, small = (read_frames(f"{name}.mp4", range(17)).astype(int) for name in ("exact", "small"))
    assert 0 < abs(exact - small).mean() < 8
    assert read_record("small.mp4")["model_settings"]["quantize"] == kind
    assert "quantize" not in read_record("exact.mp4")["model_settings"]
    plans = [command(*one, "--plan", "--dry-run", *more) for more in ((), ("--quantize", kind))]
    weights = [re.search(r"denoising \| [^|]+\| ([\d.]+) MiB", plan)[1] for plan in plans]
    model = ModelDirectory(str(demo.DIRECTORY), Execution(device="cpu", quantize=kind))
    pipeline = model.load(model.settle())
    stored = sum(
        t.numel() for t in pipeline.transformer.parameters() if type(t).dequantize is not torch.Tensor.dequantize
    )
    # Of fp32 on the CPU three bytes of four are spared.
    assert float(weights[0]) - float(weights[1]) == pytest.approx(3 * stored / 2**20, rel=0.05)


@pytest.fixture
def own_directory(make_adapter, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(make_adapter(FlashI2VTransformer3DModel.from_pretrained(**DEMO)), "style.safetensors")
