"""Every key of the release's inference_model.json: it is honoured, or refused with a reason."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

import flashi2v_model
from flashi2v_data.loading.transforms import center_crop_resize
from flashi2v_data.settings import load_config
from flashi2v_infer import InputError
from flashi2v_infer.commands.batch import Batch, read_batch
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.execution import Execution
from flashi2v_infer.files.pictures import read_image
from flashi2v_infer.load import ConfiguredModel, load_from_config


class Run:
    """What a file leads to, as far as it is asked for."""

    def __init__(self, path: Path) -> None:
        self.config = load_config(path, InferenceConfig)

    @cached_property
    def batch(self) -> Batch:
        return read_batch(self.config, ConfiguredModel(self.config, Execution()).source())

    @cached_property
    def job(self) -> Any:
        return self.batch.jobs[0]

    @cached_property
    def settings(self) -> Any:
        return self.job.request.settings

    @cached_property
    def pipe(self) -> Any:
        return load_from_config(self.config)

    def build(self) -> None:
        assert self.job
        assert self.pipe

    def trunk(self, key: str) -> Any:
        return self.pipe.transformer.config[key]

    def cropped(self, **changes: Any) -> bool:
        """Whether the image is the picture cropped with these settings, and they matter."""
        picture = read_image("first.png", "image")[None]
        expected, default = (center_crop_resize(picture, 32, 48, **how)[0] for how in (changes, {}))
        return np.array_equal(self.job.image, expected) and not np.array_equal(expected, default)


CROP = "data_transform.video.0.param."
NORM = "data_transform.video.2.param."


MISFIT = "transformer"  # the weights are of another network: the message names keys and shapes

# Key, another value than the usual one, and what comes of it: a message, or a check.
PROOFS: list[tuple[str, Any, str | Callable[[Run], bool]]] = [
    ("pipeline_class", "WanPipeline", "pipeline_class: input should be 'FlashI2VPipeline'"),
    ("prompt", "other.txt", lambda run: run.job.request.prompt == "A cat at http://cat.com"),
    ("image", "swapped.txt", lambda run: run.job.request.image == "second.jpg"),
    ("save_path", "a/b", lambda run: run.job.path == Path("a/b/video_0.mp4")),
    ("use_prompt_preprocess", True, lambda run: run.job.request.prompt == "capitals"),
    ("dtype", "bf16", lambda run: run.pipe.transformer.dtype == run.pipe.text_encoder.dtype == torch.bfloat16),
    ("device", "npu", "device 'npu': torch_npu is not installed"),
    ("frame_interval", 2, lambda run: run.job.request.fps == 4),
    ("fps", 24, lambda run: run.job.request.fps == 24),
    ("pipeline_config.input_size", [9, 32, 48], lambda run: run.settings.num_frames == 9),
    ("pipeline_config.input_size", [5, 64, 48], "transform_size [32, 48] differs from height and width"),
    ("data_transform.video.0.trans_type", "ResizeToFill", "ResizeToFill pads pictures"),
    (CROP + "transform_size", [64, 48], "set it to [32, 48]"),
    (CROP + "align_corners", True, lambda run: run.cropped(align_corners=True)),
    (CROP + "antialias", False, lambda run: run.cropped(antialias=False)),
    (CROP + "interpolation_mode", "bicubic", lambda run: run.cropped(interpolation="bicubic")),
    (CROP + "interpolation_mode", "nearest", "input should be 'bilinear' or 'bicubic'"),
    ("data_transform.video.1.trans_type", "Flip", "data_transform.video.1: "),
    ("data_transform.video.2.trans_type", "ToTensorVideo", "data_transform.video.2"),
    (NORM + "mean", 0.0, "norm_fun with mean 0.0 and std 0.5 cannot be honoured, as the VAE reads [-1, 1]"),
    (NORM + "std", [0.5, 0.5, 1.0], "mean 0.5 and std [0.5, 0.5, 1.0] cannot be honoured"),
    ("ae.model_id", "vae", "ae.model_id: input should be 'wan_video_vae'"),
    ("ae.from_pretrained", "nowhere", "ae.from_pretrained: no directory 'nowhere'"),
    ("ae.dtype", "bf16", lambda run: run.pipe.vae.dtype == torch.bfloat16),
    ("ae.do_sample", True, "ae.do_sample: sampling takes the mode"),
    ("ae.enable_tiling", True, lambda run: run.pipe.vae.use_tiling),
    ("ae.norm_latents", False, "input should be True, got false; the transformer is trained on normalised latents"),
    ("ae.norm_mode", "shift_scale", "statistics of Wan's VAE are given per channel"),
    ("tokenizer.autotokenizer_name", "T5Tokenizer", "input should be 'AutoTokenizer'"),
    ("tokenizer.hub_backend", "modelers", "other hubs are not read: name a local directory instead"),
    ("tokenizer.from_pretrained", "nowhere", "tokenizer.from_pretrained: no directory 'nowhere'"),
    ("text_encoder.model_id", "T5", "text_encoder.model_id: input should be 'UMT5'"),
    ("text_encoder.hub_backend", "modelers", "other hubs are not read: name a local directory instead"),
    ("text_encoder.from_pretrained", "nowhere", "text_encoder.from_pretrained: no directory 'nowhere'"),
    ("text_encoder.dtype", "bf16", lambda run: run.pipe.text_encoder.dtype == torch.bfloat16),
    ("predictor.model_id", "wandit", "predictor.model_id: input should be 'flashi2vdit'"),
    ("predictor.dtype", "bf16", lambda run: run.pipe.transformer.dtype == torch.bfloat16),
    ("predictor.fft_return_abs", False, lambda run: run.trunk("fft_return_abs") is False),
    ("predictor.conv3x3x3_proj", False, MISFIT),
    ("predictor.low_freq_proj", True, lambda run: run.trunk("low_freq_proj") is True),
    ("predictor.low_freq_energy_ratio", 0.3, lambda run: run.settings.low_freq_energy_ratio == 0.3),
    ("predictor.patch_size", [2, 4, 4], "predictor.patch_size: [2, 4, 4] does not divide the latent grid [2, 4, 6]"),
    ("predictor.patch_size", [1, 4, 2], MISFIT),
    ("predictor.patch_size", [1, 0, 2], "predictor.patch_size.1: input should be greater than 0"),
    ("predictor.text_len", 24, lambda run: run.pipe.encode_prompt("a cat")[0].shape == (1, 24, 64)),
    ("predictor.in_dim", 48, "in_dim 48 and out_dim 16 are both the VAE's latent channels"),
    ("predictor.hidden_size", 256, MISFIT),
    ("predictor.ffn_dim", 256, MISFIT),
    ("predictor.freq_dim", 128, MISFIT),
    ("predictor.text_dim", 128, MISFIT),
    ("predictor.img_dim", 1280, lambda run: "img_dim has no effect" in run.config.predictor.notes()[0]),
    ("predictor.out_dim", 48, "in_dim 16 and out_dim 48 are both the VAE's latent channels"),
    ("predictor.num_heads", 8, lambda run: run.trunk("num_attention_heads") == 8),
    ("predictor.num_layers", 3, MISFIT),
    ("predictor.qk_norm", False, MISFIT),
    ("predictor.qk_norm_type", "layernorm", "predictor.qk_norm_type: input should be 'rmsnorm'"),
    ("predictor.cross_attn_norm", False, MISFIT),
    ("predictor.eps", 1e-3, lambda run: run.trunk("eps") == 1e-3),
    ("predictor.max_seq_len", 16, lambda run: run.trunk("rope_max_seq_len") == 16),
    ("predictor.max_seq_len", 2, "predictor.max_seq_len: 2 is less than the longest side of the token grid [2, 2, 3]"),
    (
        "predictor.use_fused_rmsnorm",
        False,
        lambda run: run.pipe.transformer.blocks[0].attn1.norm_q.backend == "reference",
    ),
    ("predictor.from_pretrained", "nowhere.pt", "nowhere.pt"),
    ("diffusion.model_id", "ddpm", "diffusion.model_id: input should be 'flow_matching'"),
    ("diffusion.num_inference_steps", 7, lambda run: run.settings.num_inference_steps == 7),
    ("diffusion.shift", 3.0, lambda run: run.pipe.scheduler.config.shift == 3.0),
    ("diffusion.guidance_scale", 2.0, lambda run: run.settings.guidance_scale == 2.0),
]


@pytest.fixture
def run(job) -> Callable[[str, Any], Run]:
    """Read the file with one key changed, "data_transform.video.0.param.antialias" for example."""
    Path("prompts.txt").write_text("Capitals\na dark object\n")
    Path("other.txt").write_text("A cat at http://cat.com\nb\n")
    Path("swapped.txt").write_text("second.jpg\nfirst.png\n")

    def read(key: str, value: Any) -> Run:
        path = job()
        settings = YAML(typ="safe", pure=True).load(path.read_text())
        *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        part = settings
        for parent in parents:
            part = part[parent]
        part[last] = value
        return Run(job(**settings))

    return read


@pytest.mark.parametrize(("key", "value", "outcome"), PROOFS, ids=[f"{key}={value}" for key, value, _ in PROOFS])
def test_every_key_is_honoured_or_refused_with_a_reason(run, key, value, outcome):
    if callable(outcome):
        assert outcome(run(key, value))
        return
    with pytest.raises((InputError, flashi2v_model.InputError)) as error:
        run(key, value).build()
    assert outcome in str(error.value)
    assert "\n" not in str(error.value)


def test_no_key_of_the_release_is_left_out():
    text = Path(__file__).with_name("inference_model.json").read_text()
    keys = set(_keys(YAML(typ="safe", pure=True).load(text)))
    assert keys <= {key for key, *_ in PROOFS}


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, list) and isinstance(value[0], dict):
        value = {str(number): part for number, part in enumerate(value)}
    if not isinstance(value, dict):
        yield prefix.removesuffix(".")
        return
    for key, part in value.items():
        yield from _keys(part, f"{prefix}{key}.")


def test_the_file_may_hold_comments_trailing_commas_and_tabs(job):
    path = job()
    text = path.read_text().replace("    ", "\t").replace("\n}", ", # the last\n}")
    assert text.count(", # the last") == 1
    path.write_text("\ufeff# of the release\n" + text)
    assert load_config(path, InferenceConfig).seed == 3
