import pytest
import torch

import flashi2v_infer.load
from flashi2v_data.config import load_config
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import load_from_config, load_from_pretrained
from flashi2v_npu_ops import set_backend


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


@pytest.mark.parametrize(("fused", "backend"), [(True, "auto"), (False, "reference")])
def test_use_fused_rmsnorm_chooses_the_operator(config, monkeypatch, fused, backend):
    chosen = []
    monkeypatch.setattr(flashi2v_infer.load, "set_backend", lambda *choice: chosen.append(choice))
    load_from_config(config(predictor={"use_fused_rmsnorm": fused}))
    assert chosen == [("rms_norm", backend)]
    set_backend(*chosen[0])  # the choice exists
    set_backend("rms_norm", "auto")


def test_settings_of_the_parts_reach_the_pipeline(config):
    pipeline = load_from_config(
        config(
            text_encoder={"use_attention_mask": False},
            ae={"enable_tiling": True},
            diffusion={"shift": 3.0},
            predictor={"fft_return_abs": False, "low_freq_proj": True},
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
