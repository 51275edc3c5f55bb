import logging

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    WanTransformer3DModel,
    apply_pyramid_attention_broadcast,
)
from diffusers.models.attention_dispatch import attention_backend
from PIL import Image
from torch.testing import assert_close

from flashi2v_data.loading.config import TransformPipeline
from flashi2v_data.loading.transforms import build_transform
from flashi2v_infer import FlashI2VPipeline, InputError
from flashi2v_infer.execution import Execution
from flashi2v_infer.pipeline import prepare_image


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


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
    text, negative = pipe.encode_prompt("a red circle", 24), pipe.encode_prompt(["blurry"], 24)
    assert text.shape == (1, 24, 64)  # a string is one prompt
    plain = sampled(image=photograph, negative_prompt="blurry")
    encoded = sampled(image=photograph, prompt=None, prompt_embeds=text, negative_prompt_embeds=negative)
    assert torch.equal(encoded, plain)


def test_each_distinct_prompt_is_encoded_once(pipe):
    rows = []
    handle = pipe.text_encoder.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    states = pipe.encode_prompt(["a cat", "a dog", " a  cat ", "a dog"], 24)
    handle.remove()
    assert rows == [2]
    assert torch.equal(states[[0, 1]], states[[2, 3]])
    assert torch.equal(states[0], pipe.encode_prompt(["a cat"], 24)[0])


def test_without_a_text_encoder_encoded_prompts_are_sampled(pipe, sampled, photograph, tmp_path):
    text, negative = pipe.encode_prompt(["a red circle"], 24), pipe.encode_prompt([""], 24)
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
    handle = shared_pipe.transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
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
    masked = pipe.encode_prompt(["a red circle"], 24)
    plain = FlashI2VPipeline(**pipe.components, use_attention_mask=False).encode_prompt(["a red circle"], 24)
    assert not torch.allclose(masked, plain)
    assert (plain[:, 13:] == 0).all()  # 12 letters and the end


def test_prompts_are_padded_to_the_length_of_training_unless_told(pipe):
    assert pipe.encode_prompt(["a red circle"]).shape[1] == pipe.transformer.config.text_len == 512
    assert pipe.encode_prompt(["a red circle"], 24).shape[1] == 24


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
    assert torch.equal(pipe.encode_prompt([" cat &amp;amp;\n dog "], 24), pipe.encode_prompt(["cat & dog"], 24))
    assert not torch.equal(pipe.encode_prompt(["Cat"], 24), pipe.encode_prompt(["cat"], 24))


def test_a_prompt_that_is_cut_is_reported(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt(["exactly 15 byte"], 16)
        assert not caplog.records
        pipe.encode_prompt(["exactly 16 bytes"], 16)
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
        ({"prompt": ["a", "b"]}, "got 1 images and 2 prompts"),
        ({"prompt": None}, "give one of prompt and prompt_embeds"),
        ({"prompt": b"a cat"}, "prompt must be a string or a list of them, got bytes"),
        ({"prompt": [7]}, "prompt must be a string or a list of them, got int"),
        ({"negative_prompt": [None]}, "negative_prompt must be a string or a list of them, got NoneType"),
        ({"prompt_embeds": torch.zeros(1, 24, 64)}, "give one of prompt and prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 24, 64)}, "got 1 images and 2 prompts"),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 24, 64)},
            "give one of negative_prompt and negative_prompt_embeds",
        ),
        (
            {"negative_prompt_embeds": torch.zeros(1, 24, 64), "guidance_scale": 1.0},
            "negative_prompt_embeds have no effect with guidance_scale 1.0",
        ),
        (
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            r"there is only 'latents', not \['prompt_embeds'\]",
        ),
        ({"image": [], "prompt": []}, "got 0 images and 0 prompts"),
        ({"negative_prompt": ["a", "b"]}, "one for each of 1 prompts, got 2"),
        ({"negative_prompt": "dark", "guidance_scale": 1.0}, "negative_prompt has no effect with guidance_scale 1.0"),
        ({"generator": generators(1, 2)}, "one for each of the 1 videos, got 2"),
        ({"latents": torch.zeros(1, 16, 2, 4, 4)}, r"latents must be \(1, 16, 2, 4, 6\).*got \(1, 16, 2, 4, 4\)"),
        ({"image": np.zeros((20, 20))}, r"must be \(H, W, 3\), got \(20, 20\)"),
        ({"image": np.full((20, 20, 3), 200.0)}, r"must lie in \[0, 1\], got \[200, 200\]"),
        ({"image": np.zeros((20, 20, 3), np.int64)}, "uint8, or floats in .* got int64"),
        ({"image": torch.zeros(20, 20, 3)}, r"must be \(3, H, W\), got \(20, 20, 3\)"),
        ({"image": "cat.png"}, "PIL image, an array or a tensor, got str"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_can(sampled, photograph, changes, message):
    with pytest.raises(InputError, match=message):
        sampled(**{"image": photograph, **changes})


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.transformer.set_attention_backend("native"),
        lambda pipe: pipe.enable_xformers_memory_efficient_attention(),
        lambda pipe: pipe.transformer.enable_npu_flash_attention(),
        lambda pipe: pipe.transformer.enable_xla_flash_attention(),
        lambda pipe: apply_pyramid_attention_broadcast(
            pipe.transformer,
            PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=int),
        ),
    ],
)
def test_what_would_have_no_effect_on_attention_is_refused(pipe, change):
    with pytest.raises(NotImplementedError, match=r"flashi2v_npu_ops.set_backend\('attention', |sample without them"):
        change(pipe)


def test_an_attention_backend_for_all_models_is_warned_of(sampled, photograph, caplog):
    with attention_backend("_native_math"):
        sampled(image=photograph)
    assert "diffusers' attention backend _native_math has no effect here" in caplog.text


def test_a_text_to_video_transformer_is_refused(pipe):
    wan = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, ffn_dim=16, num_layers=1, text_dim=8)
    with pytest.raises(InputError, match="WanTransformer3DModel, which no first frame can guide"):
        FlashI2VPipeline(**{**pipe.components, "transformer": wan})
