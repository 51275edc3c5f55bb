"""What diffusers offers to speed a transformer up: it works, or it is refused."""

import pytest
import torch
from diffusers import (
    ContextParallelConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_first_block_cache
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from golden import small_model, tensor
from torch import Tensor

import flashi2v_model.layers
from flashi2v_model import FlashI2VTransformer3DModel, InputError
from flashi2v_model.kernels import known_kernel

hooks = pytest.importorskip("diffusers.hooks")


def inputs(shift: float = 0.0) -> dict[str, Tensor]:
    return {
        "hidden_states": tensor("in:latents", (2, 16, 3, 8, 12), 3**0.5) + shift,
        "timestep": torch.tensor([700.0, 700.0]),
        "encoder_hidden_states": tensor("in:text", (2, 16, 24)),
        "condition": tensor("in:condition", (2, 16, 1, 8, 12)),
    }


def at_500() -> int:
    return 500


CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=10.0),
    "TaylorSeer": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1),
    "TaylorSeer lite": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, use_lite_mode=True),
    "attention broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=at_500
    ),
    "cross attention broadcast": lambda: PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2, current_timestep_callback=at_500
    ),
    "FasterCache": lambda: FasterCacheConfig(unconditional_batch_skip_range=2, current_timestep_callback=at_500),
    "MagCache": lambda: hooks.MagCacheConfig(
        threshold=100.0, retention_ratio=0.0, num_inference_steps=2, mag_ratios=[1.0, 1.0]
    ),
    "SeaCache": lambda: hooks.SeaCacheConfig(threshold=100.0, residual_order=0, cache_end_steps=0),
}


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_a_cache_spares_work_until_it_is_disabled(name):
    if name in ("MagCache", "SeaCache") and not hasattr(hooks, f"{name}Config"):
        pytest.skip("this version of diffusers has none")
    model = small_model().eval()
    exact = [model(**inputs(shift)).sample for shift in (0.0, 0.3)]
    attended = []
    for block in model.blocks:
        for attention in (block.attn1, block.attn2):
            attention.attend = lambda *args, attend=attention.attend: attended.append(1) or attend(*args)
    whole = 2 * len(model.blocks)
    model.enable_cache(CACHES[name]())
    assert model.is_cache_enabled
    steps = [{"step_index": i, "sigma": 0.7 - 0.1 * i, "num_inference_steps": 3} for i in range(2)]
    found = []
    for shift, step in zip((0.0, 0.3), steps):
        with model.cache_context("cond", **(step if name == "SeaCache" else {})):
            found.append(model(**inputs(shift)).sample)
        attended.append(0)
    first, second = attended.index(0), len(attended) - 2 - attended.index(0)
    assert torch.equal(found[0], exact[0])
    # FasterCache computes one branch of the second step alone.
    assert (first, second < whole or name == "FasterCache") == (whole, True)
    assert found[1].shape == exact[1].shape
    assert 0 < (found[1] - exact[1]).abs().max() < 10 * exact[1].abs().max()
    model.disable_cache()
    assert torch.equal(model(**inputs(0.3)).sample, exact[1])


@torch.no_grad()
def test_caches_may_be_applied_from_outside():
    model = small_model().eval()
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=10.0))
    with pytest.raises(ValueError, match="context"):
        model(**inputs())
    with model.cache_context("cond"):
        model(**inputs())


def test_the_text_is_kept_until_the_state_is_reset_and_never_for_gradients():
    model = small_model()
    exact, calls = model(**inputs()).sample, []
    model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    model.enable_cache(hooks.TextKVCacheConfig())
    given = inputs()
    with torch.no_grad():
        assert torch.equal(model(**given).sample, exact)
        model(**given)
        assert len(calls) == 1
        model._reset_stateful_cache()
        model(**given)
        assert len(calls) == 2
    for _ in range(2):
        model(**given).sample.sum().backward()
    assert len(calls) == 4
    model.disable_cache()
    with torch.no_grad():
        model(**given)
        model(**given)
    assert len(calls) == 6
    assert not model.is_cache_enabled


@torch.no_grad()
def test_no_more_texts_are_kept_than_branches():
    model, given = small_model(), inputs()
    model.enable_cache(hooks.TextKVCacheConfig())
    for step in range(5):  # a callback may change the text in every step
        model(**{**given, "encoder_hidden_states": given["encoder_hidden_states"] + step})
    embedder = model.condition_embedder.text_embedder
    assert len(embedder._diffusers_hook.hooks["flashi2v_text"]._texts) == 2


def test_what_is_no_cache_or_cannot_work_is_refused():
    model = small_model()
    with pytest.raises(InputError, match="there is no cache dict: give a configuration of FirstBlockCache, MagCache"):
        model.enable_cache({"threshold": 0.1})
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="already been enabled with FirstBlockCacheConfig: call disable_cache"):
        model.enable_cache(FirstBlockCacheConfig())
    one = _one_block()
    with pytest.raises(InputError, match="FirstBlockCacheConfig needs a first and a last block, this network has one"):
        one.enable_cache(FirstBlockCacheConfig())
    assert not one.is_cache_enabled


def _one_block() -> FlashI2VTransformer3DModel:
    return FlashI2VTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1
    )


def kernels_of(model: FlashI2VTransformer3DModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note by which backend of flashi2v_npu_ops every attention is computed."""
    asked: list[str] = []
    operator = flashi2v_model.layers.attention
    monkeypatch.setattr(
        flashi2v_model.layers,
        "attention",
        lambda *args, backend: asked.append(backend) or operator(*args, backend=backend),
    )
    return asked


@pytest.mark.parametrize(
    ("name", "kernel"), [("native", "torch"), ("_native_math", "reference"), ("reference", "reference"), ("auto",) * 2]
)
@torch.no_grad()
def test_an_attention_backend_chooses_the_kernel(monkeypatch, name, kernel):
    model = small_model()
    exact, asked = model(**inputs()).sample, kernels_of(model, monkeypatch)
    model.set_attention_backend(name)
    torch.testing.assert_close(model(**inputs()).sample, exact, atol=1e-4, rtol=0.0)
    assert set(asked) == {kernel}
    assert len(asked) == 2 * len(model.blocks)
    model.reset_attention_backend()
    asked.clear()
    model(**inputs())
    assert set(asked) == {"auto"}


@torch.no_grad()
def test_a_model_in_fp32_may_attend_in_bf16():
    model = small_model()
    exact = model(**inputs()).sample
    model.set_attention_backend("bf16")
    assert 1e-5 < (model(**inputs()).sample - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize(("name", "kernel"), [("_native_cudnn", "cudnn"), ("_flash_3", "flash3"), ("flash", "cuda")])
def test_diffusers_names_of_kernels_for_gpus_are_known(name, kernel):
    assert known_kernel(name) == kernel
    assert AttentionBackendName(name)


@torch.no_grad()
def test_an_attention_backend_for_all_models_holds_or_is_refused(monkeypatch):
    model = small_model()
    asked = kernels_of(model, monkeypatch)
    with attention_backend("_native_math"):
        model(**inputs())
    assert set(asked) == {"reference"}
    with attention_backend("flex"), pytest.raises(InputError, match="'flex' is not served here: choose one of native"):
        model(**inputs())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_attention_backend("sage"),
        lambda model: model.set_attention_backend("fast"),
        lambda model: model.set_use_memory_efficient_attention_xformers(True),
        lambda model: model.enable_xla_flash_attention(),
    ],
)
def test_a_kernel_that_is_not_served_is_refused(change):
    with pytest.raises(InputError, match=r"is not served here: choose one of native, _native_math, .*auto"):
        change(small_model())


def test_blocks_that_are_computed_again_give_the_same_gradients():
    plain, again = small_model(), small_model()
    calls = []
    again.blocks[0].attn1.attend = lambda *args, attend=again.blocks[0].attn1.attend: calls.append(1) or attend(*args)
    again.enable_gradient_checkpointing()
    for model in (plain, again):
        model(**inputs()).sample.square().mean().backward()
    assert len(calls) == 2
    for (name, one), two in zip(plain.named_parameters(), again.parameters()):
        torch.testing.assert_close(one.grad, two.grad, msg=name)
    with torch.no_grad():
        again(**inputs())
    assert len(calls) == 3


@torch.no_grad()
def test_projections_may_be_fused():
    model = small_model()
    exact = model(**inputs()).sample
    model.fuse_qkv_projections()
    for projection in ("to_q", "to_k", "to_v"):  # which are not used now
        model.blocks[0].attn1.get_submodule(projection).weight.fill_(torch.nan)
    torch.testing.assert_close(model(**inputs()).sample, exact, atol=1e-5, rtol=0.0)
    model.unfuse_qkv_projections()
    assert model(**inputs()).sample.isnan().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"config": ContextParallelConfig(ring_degree=2), "cp_plan": {}}, "leave cp_plan out"),
        ({"config": object()}, r"takes a ContextParallelConfig\(ulysses_degree=..., ring_.*parallelise_tensors"),
    ],
)
def test_processes_share_a_network_by_its_tokens_alone(config, message):
    with pytest.raises(InputError, match=message):
        small_model().enable_parallelism(**config)


def test_processes_have_to_be_started_first():
    with pytest.raises(RuntimeError, match="start by torchrun"):
        small_model().enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
