import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashi2v_data.settings import load_config
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import ConfiguredModel, load_from_config, load_from_pretrained
from flashi2v_infer.placement import home
from flashi2v_model import InputError
from flashi2v_model.layers import RMSNorm


@pytest.fixture
def config(job):
    return lambda **changes: load_config(job(**changes), InferenceConfig)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_file_and_directory_give_the_same_pipeline(config, model_directory, dtype):
    ours = load_from_config(config(dtype=dtype, text_encoder={"dtype": dtype}))
    theirs = load_from_pretrained(str(model_directory), Execution(device="cpu", dtype=dtype))
    for name in ("transformer", "text_encoder", "vae"):
        first, second = (getattr(pipeline, name).state_dict() for pipeline in (ours, theirs))
        assert list(first) == list(second)
        for key, tensor in first.items():
            assert tensor.dtype == second[key].dtype, key
            assert torch.equal(tensor, second[key]), key
        assert not getattr(ours, name).training
    assert theirs.vae.dtype == torch.float32
    assert ours.scheduler.config.shift == theirs.scheduler.config.shift == 7
    assert dict(ours.transformer.config)["attention_head_dim"] == theirs.transformer.config.attention_head_dim


def test_every_weight_that_a_pipeline_directory_lacks_is_named(model_directory, tmp_path):
    model = shutil.copytree(model_directory, tmp_path / "model")
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    lost = [key for key in weights if key.startswith(("blocks.1.attn2.", "condition_embedder."))]
    save_file({key: tensor for key, tensor in weights.items() if key not in lost}, path)
    with pytest.raises(InputError, match=r"^--model: .*model does not fit the transformer: missing ") as caught:
        load_from_pretrained(str(model), Execution(device="cpu"))
    assert len(str(caught.value)) > 600  # none is cut off
    assert [key for key in lost if f"missing {key}" not in str(caught.value)] == []


@pytest.mark.parametrize(("fused", "backend"), [(True, "auto"), (False, "reference")])
def test_use_fused_rmsnorm_chooses_the_operator_of_this_pipeline(config, fused, backend):
    transformer = load_from_config(config(predictor={"use_fused_rmsnorm": fused})).transformer
    norms = [module for module in transformer.modules() if isinstance(module, RMSNorm)]
    assert {norm.backend for norm in norms} == {backend}
    assert len(norms) == 4 * len(transformer.blocks)


def test_settings_of_the_parts_reach_the_pipeline(config, model_directory, tmp_path):
    # A copy without the config.json that would contradict the file.
    weights = shutil.copy(model_directory / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path)
    pipeline = load_from_config(
        config(
            text_encoder={"use_attention_mask": False},
            ae={"enable_tiling": True},
            diffusion={"shift": 3.0},
            predictor={"fft_return_abs": False, "low_freq_proj": True, "from_pretrained": str(weights)},
        )
    )
    assert pipeline.config.use_attention_mask is False
    assert pipeline.vae.use_tiling is True
    assert pipeline.scheduler.config.shift == 3
    assert (pipeline.transformer.config.fft_return_abs, pipeline.transformer.config.low_freq_proj) == (False, True)


def test_half_precision_on_the_cpu_is_warned_about(config, caplog):
    load_from_config(config(predictor={"dtype": "bf16"}))
    assert "bf16 is slow on most CPUs: set predictor.dtype to fp32" in caplog.text
    caplog.clear()
    load_from_config(config(predictor={"dtype": "float32"}))
    assert not caplog.text


KEPT = ("scale_shift_table", "norm2", "time_embedder", "time_proj")


@pytest.mark.parametrize("way", ["file", "directory"])
def test_a_bf16_model_keeps_its_fp32_parameters(config, model_directory, way):
    execution = Execution(device="cpu", dtype="bf16", vae_dtype="bf16")
    pipe = (
        load_from_config(config(), execution)
        if way == "file"
        else load_from_pretrained(str(model_directory), execution)
    )
    dtypes = {name: parameter.dtype for name, parameter in pipe.transformer.named_parameters()}
    kept = {name for name in dtypes if any(part in KEPT for part in name.split("."))}
    assert (
        len(kept) == 4 * 3 + 1 + 2 * 2 + 2
    )  # a table and an affine norm in each block; the head's table; the time MLPs
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == kept
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16


@torch.no_grad()
def test_the_islands_of_a_bf16_model_compute_in_fp32(model_directory):
    half = load_from_pretrained(str(model_directory), Execution(device="cpu", dtype="bf16")).transformer
    exact = copy.deepcopy(half).float()  # the same weights, once rounded
    outputs = {}

    def record(name):
        return lambda module, args, output: outputs.setdefault(name, []).append((args, output))

    names = ("time_embedder", "time_proj", "proj_out", "blocks.0.norm2", "blocks.0.attn1.norm_q")
    for model in (half, exact):
        for name, module in model.named_modules():
            if any(name.endswith(wanted) for wanted in names):
                module.register_forward_hook(record(name))
    generator = torch.Generator().manual_seed(0)
    latents, features = (torch.randn(1, 16, 2, 4, 6, generator=generator) for _ in range(2))
    text = torch.randn(1, 8, 64, generator=generator)
    ours, theirs = (model.trunk(latents, torch.tensor([437.0]), text, features) for model in (half, exact))

    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).norm() / theirs.norm() < 2e-2
    for name, ((args, output), (_, expected)) in outputs.items():
        if "time" in name:  # nothing in bf16 comes before them
            assert output.dtype == torch.float32
            assert torch.equal(output, expected), name
        elif name == "proj_out":
            assert output.dtype == args[0].dtype == torch.float32
        else:  # norms: exact on what they are given, rounded once
            exactly = exact.get_submodule(name)(args[0].float())
            assert torch.equal(output, exactly.bfloat16()), name
    assert len(outputs) == 5


def test_a_part_goes_where_it_is_going_to_be(model_directory):
    pipe = load_from_pretrained(str(model_directory), Execution(device="cpu", dtype="fp32"))
    for name in ("transformer", "text_encoder", "vae"):
        module = getattr(pipe, name)
        assert {parameter.device for parameter in module.parameters()} == {torch.device("cpu")}
        assert not hasattr(module, "_hf_hook")
        assert not any(parameter.requires_grad for parameter in module.parameters())
    for offload in ("model", "group"):
        assert home(Execution(device="cuda", offload=offload), torch.device("cuda:0")) == torch.device("cpu")
    assert home(Execution(device="cuda"), torch.device("cuda:0")) == torch.device("cuda:0")


def test_what_the_command_says_comes_before_the_file(config, monkeypatch):
    pipe = load_from_config(config(ae={"dtype": "fp32"}), Execution(vae_dtype="bf16", dtype="bf16"))
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    asked = []
    monkeypatch.setattr(
        "flashi2v_infer.load.resolve_device", lambda name, index=None: asked.append(name) or torch.device("cpu")
    )
    for execution in (Execution(), Execution(device="cuda:1")):
        ConfiguredModel(config(device="npu"), execution).settle()
    assert asked == ["npu", "cuda:1"]
