import json
from pathlib import Path

import pytest
import torch

from flashi2v_data.loading.dataset import temporal_crop
from flashi2v_data.video.frames import frame_indices, frame_interval

CASES = json.loads(Path(__file__).with_name("data_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES["frame_indices"], ids=lambda case: case["name"])
def test_frames_at_the_training_rate_equal_the_reference(case):
    meta = case["meta"]
    indices = frame_indices(meta.get("start_frame_idx", 0), meta["num_frames"], frame_interval(meta["fps"], 16, None))
    assert indices[:9].tolist() == case["indices"]


def test_a_stride_takes_every_nth_frame():
    assert frame_indices(3, 7, frame_interval(24, None, 3)).tolist() == [3, 6, 9]


@pytest.mark.parametrize("case", CASES["temporal_crop"], ids=lambda case: f"{case[1]} of {case[0]}")
def test_temporal_crops_cover_the_range_of_the_reference(case):
    available, wanted, first, last, num_positions = case
    generator = torch.Generator().manual_seed(0)
    drawn = {temporal_crop(available, wanted, generator) for _ in range(300)}
    assert min(drawn) == tuple(first)
    assert max(drawn) == tuple(last)
    assert len(drawn) == num_positions
