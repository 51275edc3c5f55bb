"""inference_model.json: the reference's own file, and every setting that cannot be honoured."""

from pathlib import Path

import pytest

from flashi2v_data.settings import load_config
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.settings import InputError, SamplingSettings


def test_the_file_of_the_reference_is_read_as_it_stands():
    config = load_config(Path(__file__).with_name("inference_model.json"), InferenceConfig)
    assert config.sampling == SamplingSettings()  # whose defaults are the released model's
    assert (config.save_fps, config.seed, config.negative_prompt) == (16, 0, "")
    assert (config.predictor.dtype, config.text_encoder.dtype, config.ae.dtype) == ("bf16", "bf16", "float32")


def test_dtype_is_that_of_parts_which_name_none(job):
    config = load_config(job(dtype="fp16"), InferenceConfig)
    assert (config.predictor.dtype, config.text_encoder.dtype, config.ae.dtype) == ("fp16", "fp16", "fp32")


def test_frame_interval_slows_the_file_down_to_the_rate_that_the_model_saw(job):
    config = load_config(job(fps=24, frame_interval=3), InferenceConfig)
    assert config.save_fps == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsp": 16}, "fsp: unknown key, did you mean 'fps'?"),
        ({"predictor": {"num_layer": 3}}, "predictor.num_layer: unknown key, did you mean 'num_layers'?"),
        ({"fps": "16"}, 'fps: input should be a valid number, got "16"'),
        ({"fps": 0}, "fps: input should be greater than 0"),
        ({"frame_interval": 0}, "frame_interval: input should be greater than 0"),
        ({"pipeline_class": "WanPipeline"}, "pipeline_class: input should be 'FlashI2VPipeline'"),
        ({"pipeline_config": {"input_size": [6, 32, 48]}}, "pipeline_config.input_size: num_frames must be 4k + 1"),
        ({"pipeline_config": {"input_size": [5, 30, 48]}}, "height must be divisible by 16, got 30: use 16 or 32"),
        ({"pipeline_config": {"input_size": [5, 64, 48]}}, "set it to [64, 48]"),
        ({"ae": {"do_sample": True}}, "ae.do_sample"),
        ({"predictor": {"from_pretrained": None}}, "predictor.from_pretrained: missing key"),
        ({"predictor": {"low_freq_energy_ratio": [0.05, 0.95]}}, "is a range to draw from in training"),
        ({"diffusion": {"use_dynamic_shifting": True}}, "diffusion.use_dynamic_shifting belongs to training"),
        ({"diffusion": {"use_logitnorm_time_sampling": True}}, "use_logitnorm_time_sampling belongs to training"),
        ({"diffusion": {"training_shift": 4}}, "training_shift belongs to training"),
        ({"diffusion": {"guidance_scale": 1.0}, "negative_prompt": "dark"}, "negative_prompt has no effect"),
        ({"data_transform": {"video": []}}, "list CenterCropResizeVideo, ToTensorVideo and norm_fun once each"),
    ],
)
def test_what_cannot_be_honoured_is_one_line_that_says_why(job, changes, message):
    with pytest.raises(InputError) as error:
        load_config(job(**changes), InferenceConfig)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_another_normalisation_than_the_vaes_is_refused(job):
    path = job()
    path.write_text(path.read_text().replace('"std": 0.5', '"std": 1.0'))
    with pytest.raises(InputError, match=r"mean 0.5 and std 1.0 cannot be honoured, as the VAE reads \[-1, 1\]"):
        load_config(path, InferenceConfig)
    path.write_text(path.read_text().replace('"std": 1.0', '"std": [0.5, 0.4, 0.5]'))
    with pytest.raises(InputError, match=r"mean 0.5 and std \[0.5, 0.4, 0.5\] cannot be honoured"):
        load_config(path, InferenceConfig)


def test_images_are_not_mirrored(job):
    steps = [
        {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [32, 48]}},
        {"trans_type": "RandomHorizontalFlipVideo"},
        {"trans_type": "ToTensorVideo"},
        {"trans_type": "norm_fun"},
    ]
    with pytest.raises(InputError, match="RandomHorizontalFlipVideo belongs to training: leave it out"):
        load_config(job(data_transform={"video": steps}), InferenceConfig)
