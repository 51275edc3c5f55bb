import logging

import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchHeunDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from torch.testing import assert_close

from flashi2v_data.loading.config import TransformPipeline
from flashi2v_data.loading.transforms import build_transform
from flashi2v_infer import FlashI2VPipeline, InputError
from flashi2v_infer.arguments import prepare_image
from flashi2v_infer.execution import Execution


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def encoded(pipe, prompts, length: int | None = None) -> torch.Tensor:
    states, negative = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    assert negative is None
    return states


def test_frames_come_as_images_arrays_tensors_or_latents(sampled, photograph):
    images = sampled(image=photograph, output_type="pil")
    arrays = sampled(image=photograph, output_type="np")
    tensors = sampled(image=photograph, output_type="pt")
    assert len(images) == 1
    assert [image.size for image in images[0]] == [(48, 32)] * 5
    assert arrays.shape == (1, 5, 32, 48, 3)
    assert 0 <= arrays.min() < arrays.max() <= 1
    assert_close(tensors, torch.from_numpy(arrays).permute(0, 1, 4, 2, 3))
    assert_close(torch.from_numpy(np.stack(images[0])), torch.from_numpy((arrays[0] * 255).round().astype(np.uint8)))
    assert sampled(image=photograph).shape == (1, 16, 2, 4, 6)


def test_a_batch_equals_its_items(sampled, photograph):
    images = [photograph, photograph[::-1], photograph[:, ::-1]]
    prompts, negatives = ["a red circle", "something longer than that", ""], ["blurry", "", "text"]
    batch = sampled(image=images, prompt=prompts, negative_prompt=negatives, generator=generators(1, 2, 3))
    items = [
        sampled(image=image, prompt=prompt, negative_prompt=negative, generator=torch.Generator().manual_seed(seed))
        for seed, (image, prompt, negative) in enumerate(zip(images, prompts, negatives), start=1)
    ]
    assert_close(batch, torch.cat(items), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("change", ["image", "prompt", "negative_prompt", "generator", "low_freq_energy_ratio"])
def test_everything_given_matters(sampled, photograph, change):
    first = {
        "image": photograph,
        "prompt": "a red circle",
        "negative_prompt": "blurry",
        "generator": torch.Generator().manual_seed(1),
        "low_freq_energy_ratio": 0.1,
    }
    other = {
        "image": photograph[::-1],
        "prompt": "a blue square",
        "negative_prompt": "dark",
        "generator": torch.Generator().manual_seed(2),
        "low_freq_energy_ratio": 0.95,
    }
    plain = sampled(**first)
    first["generator"] = torch.Generator().manual_seed(1)
    assert torch.equal(sampled(**first), plain)
    first["generator"] = torch.Generator().manual_seed(1)
    assert (sampled(**{**first, change: other[change]}) - plain).abs().max() > 1e-4


def test_latents_take_the_place_of_drawn_noise(sampled, photograph):
    noise = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sampled(image=photograph, latents=noise, generator=None), sampled(image=photograph))


def test_encoded_prompts_take_the_place_of_prompts(pipe, sampled, photograph):
    text, negative = pipe.encode_prompt("a red circle", "blurry", max_sequence_length=24)
    assert text.shape == (1, 24, 64)  # a string is one prompt
    plain = sampled(image=photograph, negative_prompt="blurry")
    encoded = sampled(image=photograph, prompt=None, prompt_embeds=text, negative_prompt_embeds=negative)
    assert torch.equal(encoded, plain)


def test_each_distinct_prompt_is_encoded_once(pipe):
    rows = []
    handle = pipe.text_encoder.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    states = encoded(pipe, ["a cat", "a dog", " a  cat ", "a dog"], 24)
    handle.remove()
    assert rows == [2]
    assert torch.equal(states[[0, 1]], states[[2, 3]])
    assert torch.equal(states[0], encoded(pipe, ["a cat"], 24)[0])


def test_without_a_text_encoder_encoded_prompts_are_sampled(pipe, sampled, photograph, tmp_path):
    text, negative = pipe.encode_prompt(["a red circle"], max_sequence_length=24)
    bare = FlashI2VPipeline(**{**pipe.components, "tokenizer": None, "text_encoder": None})
    bare.save_pretrained(tmp_path / "bare")
    bare = FlashI2VPipeline.from_pretrained(tmp_path / "bare")
    bare.set_progress_bar_config(disable=True)
    arguments = {"image": photograph, "num_frames": 5, "height": 32, "width": 48, "num_inference_steps": 2}
    arguments |= {"output_type": "latent", "return_dict": False}
    with pytest.raises(InputError, match="there is no text encoder: give prompt_embeds and negative_prompt_embeds"):
        bare(prompt_embeds=text, **arguments)
    (video,) = bare(
        prompt_embeds=text, negative_prompt_embeds=negative, generator=torch.Generator().manual_seed(1), **arguments
    )
    assert torch.equal(video, sampled(image=photograph))


def test_a_callback_sees_changes_and_ends_the_run(pipe, sampled, photograph):
    seen = []

    def watch(pipeline, step, timestep, values):
        seen.append((pipeline is pipe, step, float(timestep), values["latents"].shape))
        return None

    def zero(pipeline, step, timestep, values):
        return {"latents": torch.zeros_like(values["latents"])} if step == 2 else {}

    def stop(pipeline, step, timestep, values):
        pipeline._interrupt = step == 0
        seen.append(step)
        return values

    plain = sampled(image=photograph, num_inference_steps=3)
    assert torch.equal(sampled(image=photograph, num_inference_steps=3, callback_on_step_end=watch), plain)
    assert [(same, step) for same, step, *_ in seen] == [(True, 0), (True, 1), (True, 2)]
    assert seen[0][2:] == (1000.0, (1, 16, 2, 4, 6))
    assert (sampled(image=photograph, num_inference_steps=3, callback_on_step_end=zero) == 0).all()
    seen.clear()
    ended = sampled(image=photograph, num_inference_steps=3, callback_on_step_end=stop)
    assert seen == [0]
    assert not torch.allclose(ended, plain)
    assert torch.equal(sampled(image=photograph, num_inference_steps=3), plain)  # nothing of it stays


def test_branches_of_guidance_in_one_batch_give_the_same_video(sampled, photograph):
    assert_close(sampled(image=photograph, cfg_batch=True), sampled(image=photograph), atol=1e-4, rtol=0.0)


def test_branches_run_in_one_batch_where_the_execution_says_so(shared_pipe, sampled, photograph, monkeypatch):
    monkeypatch.setattr(shared_pipe, "execution", Execution(cfg_batch=True))
    sizes: list[int] = []
    handle = shared_pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: sizes.append(len(given["hidden_states"])), with_kwargs=True
    )
    sampled(image=photograph)
    sampled(image=photograph, cfg_batch=False)
    handle.remove()
    assert sizes == [2, 2, 1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore")  # of the compiler, about this machine
def test_compiled_blocks_give_the_same_video_from_two_graphs(pipe, sampled, photograph):
    plain = sampled(image=photograph, num_inference_steps=3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which a reset does not
    pipe.transformer.compile_repeated_blocks()
    try:
        compiled = sampled(image=photograph, num_inference_steps=3)
        # One that fills the cache of a prompt, one that reads it.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    finally:
        for block in pipe.transformer.blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
    assert_close(compiled, plain, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(("guidance_scale", "per_step"), [(5.0, 2), (1.0, 1), (0.0, 1)])
def test_the_network_runs_once_per_step_without_guidance(pipe, sampled, photograph, guidance_scale, per_step):
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    sampled(image=photograph, guidance_scale=guidance_scale, num_inference_steps=3)
    handle.remove()
    assert len(calls) == 3 * per_step


def test_another_scheduler_may_be_set(pipe, sampled, photograph):
    default = sampled(image=photograph)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=7.0)
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    other = sampled(image=photograph, guidance_scale=1.0)
    handle.remove()
    assert len(calls) == 3  # two in every step but the last
    assert other.isfinite().all()
    assert not torch.allclose(other, default)


def test_a_saved_pipeline_samples_the_same_video(pipe, sampled, photograph, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = FlashI2VPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    arguments = {
        "image": photograph,
        "prompt": "a red circle",
        "num_frames": 5,
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "max_sequence_length": 24,
        "output_type": "latent",
    }
    (frames,) = again(**arguments, generator=torch.Generator().manual_seed(1), return_dict=False)
    assert torch.equal(frames, sampled(image=photograph))
    assert again.config.use_attention_mask is True


def test_the_attention_mask_of_the_text_encoder_is_a_setting(pipe):
    masked = encoded(pipe, ["a red circle"], 24)
    plain = encoded(FlashI2VPipeline(**pipe.components, use_attention_mask=False), ["a red circle"], 24)
    assert not torch.allclose(masked, plain)
    assert (plain[:, 13:] == 0).all()  # 12 letters and the end


def test_prompts_are_padded_to_the_length_of_training_unless_told(pipe):
    assert encoded(pipe, ["a red circle"]).shape[1] == pipe.transformer.config.text_len == 512
    assert encoded(pipe, ["a red circle"], 24).shape[1] == 24


def test_images_of_every_kind_are_cropped_as_in_training(photograph):
    training = build_transform(
        TransformPipeline(
            video=[
                {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [32, 48]}},
                {"trans_type": "ToTensorVideo"},
                {"trans_type": "norm_fun"},
            ]
        )
    )
    expected = training(photograph[None])
    tensor = torch.from_numpy(photograph).permute(2, 0, 1)
    for image in (photograph, photograph / 255, Image.fromarray(photograph), tensor, tensor.float() / 255):
        assert torch.equal(prepare_image(image, 32, 48), expected)


def test_prompts_are_unescaped_and_their_spaces_made_plain(pipe):
    assert torch.equal(encoded(pipe, [" cat &amp;amp;\n dog "], 24), encoded(pipe, ["cat & dog"], 24))
    assert not torch.equal(encoded(pipe, ["Cat"], 24), encoded(pipe, ["cat"], 24))


def test_a_prompt_that_is_cut_is_reported(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        encoded(pipe, ["exactly 15 byte"], 16)
        assert not caplog.records
        encoded(pipe, ["exactly 16 bytes"], 16)
    assert "17 tokens, of which the first 16 are read: exactly 16" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 50}, "height must be divisible by 16, got 50: use 48 or 64"),
        ({"width": 8}, "width must be divisible by 16, got 8: use 16"),
        ({"num_frames": 16}, r"num_frames must be 4k \+ 1, got 16: use 13 or 17"),
        ({"num_frames": 0}, r"got 0: use 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"guidance_scale": -1.0}, "guidance_scale must be 0 or more, got -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be 0 or more, got nan"),
        ({"low_freq_energy_ratio": 1.5}, r"low_freq_energy_ratio must lie in \[0, 1\], got 1.5"),
        ({"max_sequence_length": 0}, "max_sequence_length must be at least 1"),
        ({"output_type": "mp4"}, "output_type must be 'pil', 'np', 'pt' or 'latent', got 'mp4'"),
        ({"image": [np.zeros((20, 20, 3))] * 2, "prompt": ["a", "b", "c"]}, "got 2 images and 3 prompts"),
        (
            {"image": [np.zeros((20, 20, 3))] * 2},
            "one image for all prompts, or one for each, got 2 images and 1 prompts",
        ),
        ({"prompt": None}, "give one of prompt and prompt_embeds"),
        ({"prompt": b"a cat"}, "prompt must be a string or a list of them, got bytes"),
        ({"prompt": [7]}, "prompt must be a string or a list of them, got int"),
        ({"negative_prompt": [None]}, "negative_prompt must be a string or a list of them, got NoneType"),
        ({"prompt_embeds": torch.zeros(1, 24, 64)}, "give one of prompt and prompt_embeds"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1, got 0"),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 24, 64)},
            "give one of negative_prompt and negative_prompt_embeds",
        ),
        (
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["sigmas"]},
            "there are latents, denoised, prompt_embeds, negative_prompt_embeds, not sigmas",
        ),
        ({"image": [], "prompt": []}, "got 0 images and 0 prompts"),
        ({"negative_prompt": ["a", "b"]}, "one for each of 1 prompts, got 2"),
        ({"generator": generators(1, 2)}, "one for each of the 1 videos, got 2"),
        ({"latents": torch.zeros(1, 16, 2, 4, 4)}, r"latents must be \(1, 16, 2, 4, 6\).*got \(1, 16, 2, 4, 4\)"),
        ({"image": np.zeros((20, 20))}, r"must be \(H, W, 3\), got \(20, 20\)"),
        ({"image": np.full((20, 20, 3), 200.0)}, r"must lie in \[0, 1\], got \[200, 200\]"),
        ({"image": np.zeros((20, 20, 3), np.int64)}, "uint8, or floats in .* got int64"),
        ({"image": torch.zeros(20, 20, 3)}, r"must be \(3, H, W\), got \(20, 20, 3\)"),
        ({"image": 7}, "PIL image, an array or a tensor, got int"),
        ({"image": "cat.png"}, "image: cat.png: no such file"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_can(sampled, photograph, changes, message):
    with pytest.raises(InputError, match=message):
        sampled(**{"image": photograph, **changes})


def test_a_text_to_video_transformer_is_refused(pipe):
    wan = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, ffn_dim=16, num_layers=1, text_dim=8)
    with pytest.raises(InputError, match="WanTransformer3DModel, which no first frame can guide"):
        FlashI2VPipeline(**{**pipe.components, "transformer": wan})


def test_an_image_may_be_a_path_and_stand_before_several_prompts(sampled, photograph, tmp_path):
    Image.fromarray(photograph).save(tmp_path / "first.png")
    prompts = ["a red circle", "something longer than that"]
    both = sampled(image=str(tmp_path / "first.png"), prompt=prompts, generator=generators(1, 2))
    each = sampled(image=[photograph, photograph], prompt=prompts, generator=generators(1, 2))
    assert_close(both, each, atol=1e-4, rtol=0.0)


def test_videos_of_one_prompt_lie_side_by_side(sampled, photograph):
    prompts = ["a red circle", "something longer than that"]
    videos = sampled(image=photograph, prompt=prompts, num_videos_per_prompt=2, generator=generators(1, 2, 3, 4))
    repeated = [prompts[0], prompts[0], prompts[1], prompts[1]]
    one_by_one = sampled(image=photograph, prompt=repeated, generator=generators(1, 2, 3, 4))
    assert_close(videos, one_by_one, atol=1e-4, rtol=0.0)


def test_prompts_are_encoded_apart_from_the_rest(pipe, sampled, photograph):
    parts = pipe.components | {"transformer": None, "vae": None}
    alone = FlashI2VPipeline(**parts)
    text, negative = alone.encode_prompt("a red circle", "blurry", num_videos_per_prompt=2, max_sequence_length=24)
    assert torch.equal(text[0], text[1])
    assert torch.equal(alone.encode_prompt("a")[1], alone.encode_prompt("")[0])
    with pytest.raises(InputError, match="there is no transformer and no vae: this pipeline can encode_prompt alone"):
        alone(photograph, "a red circle")
    rest = FlashI2VPipeline(**pipe.components | {"tokenizer": None, "text_encoder": None})
    rest.set_progress_bar_config(disable=True)
    size = {"num_frames": 5, "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}
    given = {"prompt_embeds": text[:1], "negative_prompt_embeds": negative[:1], "generator": generators(1)[0]}
    assert torch.equal(rest(photograph, **given, **size).frames, sampled(image=photograph, negative_prompt="blurry"))


def test_a_callback_is_told_where_the_run_is(pipe, sampled, photograph):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((float(pipe.current_timestep), pipe.num_timesteps, pipe.do_classifier_free_guidance))
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            "latents": (1, 16, 2, 4, 6),
            "denoised": (1, 16, 2, 4, 6),
            "prompt_embeds": (1, 24, 64),
            "negative_prompt_embeds": (1, 24, 64),
        }

    sampled(
        image=photograph, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs
    )
    assert seen == [(1000.0, 2, True), (pytest.approx(875.0), 2, True)]
    assert pipe.current_timestep is None
    assert pipe.guidance_scale == 5.0


@pytest.mark.parametrize("scheduler", [None, FlowMatchHeunDiscreteScheduler(shift=7.0)])
def test_the_estimate_of_the_end_is_where_euler_would_go_in_one_step(pipe, sampled, photograph, scheduler):
    seen: list[torch.Tensor] = []

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["denoised"])
        return tensors

    direct = sampled(image=photograph, num_inference_steps=1)
    pipe.scheduler = scheduler or pipe.scheduler
    end = sampled(
        image=photograph,
        num_inference_steps=3,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["denoised"],
    )
    assert_close(seen[0], direct)
    assert_close(seen[-1], end)
    assert not torch.allclose(seen[0], end)


def test_callbacks_of_diffusers_end_the_guidance(pipe, sampled, photograph):
    calls: list[int] = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    cut = sampled(
        image=photograph, num_inference_steps=3, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.0)
    )
    handle.remove()
    assert len(calls) == 2 + 1 + 1
    assert not torch.allclose(cut, sampled(image=photograph, num_inference_steps=3))


def test_a_callback_may_change_the_prompt(pipe, sampled, photograph):
    other, _ = pipe.encode_prompt("a blue square", max_sequence_length=24)

    def change(pipe, step, timestep, tensors):
        return {"prompt_embeds": other}

    for name in ("denoised", "latent"):
        with pytest.raises(InputError, match=f"changed {name}: it may change latents, prompt_embeds, negative"):
            sampled(image=photograph, callback_on_step_end=lambda *_, name=name: {name: other})
    names = ["prompt_embeds"]
    changed = sampled(image=photograph, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    assert not torch.allclose(changed, sampled(image=photograph))
    for wrong, message in (
        (lambda pipe, *_: {"prompt_embeds": other[0]}, r"prompt_embeds must stay \(1, 24, 64\), got \(24, 64\)"),
        (lambda pipe, *_: setattr(pipe, "_guidance_scale", 3.0), "may rise above 1 only where it began above 1"),
    ):
        with pytest.raises(InputError, match=message):
            sampled(image=photograph, guidance_scale=1.0, callback_on_step_end=wrong)


def test_a_negative_prompt_without_guidance_is_warned_of(sampled, photograph, caplog):
    plain = sampled(image=photograph, guidance_scale=1.0)
    assert not caplog.records
    assert torch.equal(sampled(image=photograph, guidance_scale=1.0, negative_prompt="dark"), plain)
    assert "the negative prompt has no effect with guidance_scale 1" in caplog.text


def test_adapters_are_weighed_by_attention_kwargs(sampled, photograph):
    with pytest.raises(ValueError, match="attention_kwargs: there is only 'scale', not 'scales'"):
        sampled(image=photograph, attention_kwargs={"scales": 1.0})


def test_tiles_and_slices_are_switched_by_the_names_of_diffusers(pipe):
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    assert (pipe.execution.vae_tiling, pipe.execution.vae_slicing) == (True, True)
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert pipe.execution == Execution()


def test_a_scheduler_made_of_the_configuration_of_the_flow_follows_it(pipe, sampled, photograph):
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    made = sampled(image=photograph)
    assert pipe.scheduler.config.flow_shift == 7.0
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0)
    assert torch.equal(made, sampled(image=photograph))
    pipe.scheduler = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="UniPCMultistepScheduler is set up for 'epsilon'"):
        sampled(image=photograph)


@pytest.mark.parametrize(
    ("cache", "sizes"),
    [
        (lambda: FirstBlockCacheConfig(threshold=10.0), [1] * 8),
        (lambda: PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2), [2] * 4),
        (lambda: FasterCacheConfig(unconditional_batch_skip_range=2), [2] * 4),
    ],
)
def test_caches_keep_the_branches_of_guidance_apart(pipe, sampled, photograph, cache, sizes):
    """A cache that keeps one state for all calls is given both branches at once."""
    settings = {"image": photograph, "num_inference_steps": 4}
    plain, config = sampled(**settings), cache()
    if hasattr(config, "current_timestep_callback"):
        config.current_timestep_callback = lambda: pipe.current_timestep
    seen: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(len(given["hidden_states"])), with_kwargs=True
    )
    pipe.transformer.enable_cache(config)
    try:
        first, second = sampled(**settings), sampled(**settings)
    finally:
        handle.remove()
        pipe.transformer.disable_cache()
    assert seen == sizes * 2
    assert torch.equal(first, second), "nothing of a run stays"
    assert 0 < (first - plain).abs().max() < plain.abs().max()
    assert torch.equal(sampled(**settings), plain)


def test_a_cache_that_skips_a_branch_needs_one(pipe, sampled, photograph):
    pipe.transformer.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: pipe.current_timestep))
    try:
        with pytest.raises(ValueError, match="FasterCache skips the branch of the negative prompt, and there is none"):
            sampled(image=photograph, guidance_scale=1.0)
    finally:
        pipe.transformer.disable_cache()
