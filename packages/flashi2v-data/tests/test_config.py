import json
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.errors import InputError
from flashi2v_data.loading.config import DataConfig
from flashi2v_data.settings import load_config

FILTER = """\
ann_txt_path: 'examples/videos.txt' # Annotation txt of video jsons.
save_path: 'lmdb/all_videos'
sample_height: 480
sample_width: 832 # Sample width.
sample_num_frames: 49
min_hxw: 921600 # 720x1280: 921600, 480x832: 399360
train_fps: 16
max_h_div_w_ratio: 1.2
min_h_div_w_ratio: 0.4
"""


def _load(tmp_path, text: str, schema: Any = FilterConfig) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, schema)


def _fault(tmp_path, text: str, schema: Any = FilterConfig) -> str:
    with pytest.raises(InputError) as caught:
        _load(tmp_path, text, schema)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(tmp_path / "config.yaml"))
    return message


def _change(config: dict[str, Any], path: str, value: Any) -> str:
    *parents, last = path.split(".")
    for key in parents:
        config = config[int(key) if key.isdigit() else key]
    config[last] = value
    return last


def test_filter_config_has_the_defaults_of_the_reference(tmp_path):
    config = _load(tmp_path, FILTER)
    assert config.min_hxw == 921600
    assert (config.too_long_factor, config.min_motion_value, config.max_motion_value) == (5.0, 0.0, 1.0)


def test_json_with_comments_trailing_commas_tabs_and_exponents_is_read(tmp_path):
    class Numbers(BaseModel):
        eps: float
        sizes: list[int]

    config = _load(tmp_path, '# top\n{\n\t"eps": 1e-6, # why\n\t"sizes": [1, 2,],\n}\n', Numbers)
    assert config == Numbers(eps=1e-6, sizes=[1, 2])


def test_data_json_with_comments_loads(tmp_path, raw_data_config):
    text = "# data.json\n" + json.dumps(raw_data_config, indent=4).replace('"flashi2v",', '"flashi2v", # which', 1)
    config = _load(tmp_path, text, DataConfig)
    assert config.dataset_param.transform_pipeline.size == (32, 48)
    assert config.dataset_param.clean_captions
    assert config.dataset_param.decoder == "auto"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml", FilterConfig)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "line 3"),
        ("a: 1\na: 2\n", "line 2: found duplicate key"),
        ("", "must hold settings"),
        ("- 1\n", "must hold settings"),
    ],
)
def test_a_syntax_error_names_its_line(tmp_path, text, expected):
    assert expected in _fault(tmp_path, text)


LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: " + "[" * 50_000, "is nested too deeply"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "is nested too deeply"),
        (LAUGHS, "more than 100000 values"),
        (MERGES, "more than 100000 values"),
        ("a: &a [*a]\n", "or one within itself"),
        (FILTER.replace("480", "9" * 5000), "a number of 5000 digits, in line 3"),
        (FILTER.replace("480", "0x" + "f" * 5000), "a number of 5002 digits, in line 3"),
        (FILTER.replace("480", "1e999999"), "sample_height: input should be a valid integer, got Infinity"),
        (FILTER.replace("480", "2020-13-45"), "holds what no setting can be: month must be in 1..12"),
        (FILTER.replace("480", "{[1]: 2}"), "sample_height: input should be a valid integer, got {}"),
        ("- " * 2000 + "1", "is nested too deeply"),
        (FILTER.replace("480", "!!python/object/apply:os.system [true]"), "line 3: could not determine a constructor"),
        (FILTER.replace("480", "!!binary '%'"), 'input should be a valid integer, got "b'),
        ("a: \x1b[2J\n", "special characters are not allowed"),
        ("# " + "x" * 70_000, "holds more than 64 KiB"),
    ],
)
def test_a_bomb_is_refused_before_it_goes_off(tmp_path, text, expected):
    assert expected in _fault(tmp_path, text)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (FILTER.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (FILTER.replace("videos", "vidéos").encode("latin-1"), ", line 1: is not UTF-8"),
    ],
)
def test_a_file_in_another_encoding_says_so(tmp_path, data, expected):
    (tmp_path / "config.yaml").write_bytes(data)
    with pytest.raises(InputError, match=expected):
        load_config(tmp_path / "config.yaml", FilterConfig)


def test_anchors_that_name_a_few_values_are_read(tmp_path):
    class Sizes(BaseModel):
        a: list[int]
        b: list[int]

    assert _load(tmp_path, "a: &size [4, 5]\nb: *size\n", Sizes) == Sizes(a=[4, 5], b=[4, 5])


def test_an_unknown_key_names_the_nearest(tmp_path):
    message = _fault(tmp_path, FILTER + "sample_hight: 3\n")
    assert "sample_hight: unknown key, did you mean 'sample_height'?" in message


def test_several_faults_stand_in_one_line(tmp_path):
    message = _fault(tmp_path, FILTER.replace("480", '"480"').replace("min_hxw", "min_hw"))
    assert 'sample_height: input should be a valid integer, got "480"' in message
    assert "; min_hxw: missing key" in message
    assert "; min_hw: unknown key, did you mean 'min_hxw'?" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FILTER + "sample_stride: 2\n", "set one of train_fps and sample_stride"),
        (FILTER.replace("train_fps: 16\n", ""), "set one of train_fps and sample_stride"),
        (FILTER.replace("0.4", "1.4"), "min_h_div_w_ratio exceeds max_h_div_w_ratio"),
        (FILTER + "min_motion_value: 2\n", "min_motion_value exceeds max_motion_value"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, text, expected):
    assert expected in _fault(tmp_path, text)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("dataset_param.sample_num_frames", 50, "must be 4k+1 for the VAE, got 50: use 49 or 53"),
        ("dataset_param.sample_height", 40, "sample_height must be divisible by 16, got 40: use 32 or 48"),
        ("dataset_param.sample_width", 64, "set it to [32, 64]"),
        ("dataset_param.buckets", [[5, 40, 48]], "buckets: height of 5x40x48 must be divisible by 16, got 40: use 32"),
        ("dataset_param.buckets", [[6, 32, 48]], "buckets: frames of 6x32x48 must be 4k+1 for the VAE, got 6: use 5"),
        ("dataset_param.buckets", [[9, 32, 48]], "buckets must name the sample's own shape, [5, 32, 48], too"),
        ("dataset_param.buckets", [[5, 32, 48], [5, 32, 48]], "buckets: one is named twice"),
        ("dataset_param.buckets", [], 'buckets: must be "auto", or a list of [frames, height, width]'),
        ("dataset_param.buckets", [[5, 32]], 'buckets: must be "auto", or a list of [frames, height, width]'),
        ("dataset_param.buckets", "all", 'buckets: must be "auto", or a list of [frames, height, width]'),
        ("dataset_param.text_drop_ratio", 1.5, "dataset_param.text_drop_ratio: input should be less than"),
        ("dataset_param.return_prompt_mask", "yes", "dataset_param.return_prompt_mask"),
        (
            "dataset_param.decoder",
            "ffmpeg",
            "decoder: input should be 'auto', 'decord', 'pyav' or 'torchcodec'",
        ),
        ("dataset_param.text_droop_ratio", 0.1, "text_droop_ratio: unknown key, did you mean 'text_drop_ratio'?"),
        ("dataloader_param.drop_last", False, "dataloader_param.drop_last: input should be True, got false; the order"),
        ("dataloader_param.sampler_type", "Other", "dataloader_param.sampler_type"),
        ("dataloader_param.num_workers", -1, "dataloader_param.num_workers"),
        ("dataloader_param.decode_timeout_seconds", 9.0, "decode_timeout_seconds needs a worker that can be stopped"),
        ("dataset_param.load_video_features", True, "features_path goes with load_video_features"),
        ("dataset_param.features_path", "features", "features_path goes with load_video_features"),
        (
            "dataset_param.transform_pipeline.video.0.param.antialiass",
            True,
            "dataset_param.transform_pipeline.video.0.param.antialiass: unknown key, did you mean 'antialias'?",
        ),
        (
            "dataset_param.transform_pipeline.video.0.param.transform_size",
            [32],
            "dataset_param.transform_pipeline.video.0.param.transform_size: ",
        ),
        (
            "dataset_param.transform_pipeline.video",
            [{"trans_type": "ToTensorVideo"}],
            "list CenterCropResizeVideo, ToTensorVideo and norm_fun once each, in this order",
        ),
    ],
)
def test_a_fault_in_data_json_says_where_and_what_to_change(tmp_path, raw_data_config, path, value, expected):
    raw = json.loads(json.dumps(raw_data_config))
    _change(raw, path, value)
    assert expected in _fault(tmp_path, json.dumps(raw), DataConfig)


def test_an_unknown_key_without_a_near_one_lists_the_known(tmp_path):
    class Small(BaseModel):
        model_config = ConfigDict(extra="forbid")
        alpha: int = 1

    assert "zzz: unknown key, known are: alpha" in _fault(tmp_path, "zzz: 1\n", Small)
    # Once for all keys beside each other.
    assert "zzz: unknown key, known are: alpha; yyy: unknown key" in _fault(tmp_path, "zzz: 1\nyyy: 2\n", Small)
