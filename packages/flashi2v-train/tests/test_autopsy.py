"""The batch of a bad step, on disk and back."""

import pytest
import torch

from flashi2v_data.errors import InputError
from flashi2v_train.autopsy import load_autopsy, save_autopsy
from flashi2v_train.step import Inputs

ORIGIN = ([(0, 3), (1, 2)], ["a.mp4", "b/ü.mp4"], ["a red circle", ""])


@pytest.fixture
def batch() -> tuple[Inputs, torch.Tensor]:
    latents = torch.randn(2, 16, 2, 4, 4)
    latents[1, 0, 0, 0, 0] = torch.nan
    condition, text = latents[:, :, :1], torch.randn(2, 16, 64, dtype=torch.bfloat16)
    return Inputs(latents, torch.rand(2), text, condition, torch.rand(1).expand(2)), latents


def test_a_bad_batch_comes_back_bit_for_bit_with_where_it_is_from(tmp_path, batch):
    path = save_autopsy(tmp_path / "autopsy", 7, batch, *ORIGIN, rank=3)
    assert path == tmp_path / "autopsy/step_0000007_rank_3.safetensors"
    loaded, velocity, origin = load_autopsy(path)
    inputs, wanted = batch
    for ours, theirs in zip((*loaded.tensors(), velocity), (*inputs.tensors(), wanted)):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    keys, paths, captions = ORIGIN
    assert origin == {"step": 7, "rank": 3, "keys": keys, "paths": paths, "captions": captions}


def test_the_newest_few_batches_of_each_process_are_kept(tmp_path, batch):
    for step in range(1, 8):
        for rank in (0, 10):
            save_autopsy(tmp_path, step, batch, *ORIGIN, rank=rank)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"step_{step:07d}_rank_{rank}.safetensors" for step in (4, 5, 6, 7) for rank in (0, 10)
    }


def test_a_disk_that_takes_nothing_is_told_and_does_not_end_the_run(tmp_path, batch, caplog):
    (tmp_path / "autopsy").write_text("a file where the directory should be")
    assert save_autopsy(tmp_path / "autopsy", 7, batch, *ORIGIN, rank=0) is None
    assert "step 7: its batch could not be written" in caplog.text


def test_another_file_is_no_batch(tmp_path):
    (tmp_path / "other").write_bytes(b"no tensors")
    for name in ("other", "missing"):
        with pytest.raises(InputError, match="does not hold the batch of a step"):
            load_autopsy(tmp_path / name)
