"""The batch of a bad step, on disk and back."""

import pytest
import torch

from flashi2v_data.errors import InputError
from flashi2v_data.loading.sampler import SampleKey
from flashi2v_train.autopsy import load_autopsy, save_autopsy
from flashi2v_train.batch import Batch
from flashi2v_train.features import Origin

ORIGINS = [Origin(SampleKey(0, 3), "a.mp4", "a red circle"), Origin(SampleKey(1, 2), "b/ü.mp4", "")]


@pytest.fixture
def batch() -> Batch:
    latents = torch.randn(2, 16, 2, 4, 4)
    latents[1, 0, 0, 0, 0] = torch.nan
    text = torch.randn(2, 16, 64, dtype=torch.bfloat16)
    return {"latents": latents, "condition": latents[:, :, :1], "text": text, "sigma": torch.rand(1).expand(2)}


def test_a_bad_batch_comes_back_bit_for_bit_with_where_it_is_from(tmp_path, batch):
    other = {name: tensor[:1] for name, tensor in batch.items()}
    path = save_autopsy(tmp_path / "autopsy", 7, [batch, other], ORIGINS, rank=3)
    assert path == tmp_path / "autopsy/step_0000007_rank_3.safetensors"
    loaded, origins = load_autopsy(path)
    for ours, theirs in zip(loaded, (batch, other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert origins == ORIGINS


def test_the_newest_few_batches_of_each_process_are_kept(tmp_path, batch):
    for step in range(1, 8):
        for rank in (0, 10):
            save_autopsy(tmp_path, step, [batch], ORIGINS, rank=rank)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"step_{step:07d}_rank_{rank}.safetensors" for step in (4, 5, 6, 7) for rank in (0, 10)
    }


def test_a_disk_that_takes_nothing_is_told_and_does_not_end_the_run(tmp_path, batch, caplog):
    (tmp_path / "autopsy").write_text("a file where the directory should be")
    assert save_autopsy(tmp_path / "autopsy", 7, [batch], ORIGINS, rank=0) is None
    assert "step 7: its batch could not be written" in caplog.text


def test_another_file_is_no_batch(tmp_path):
    (tmp_path / "other").write_bytes(b"no tensors")
    for name in ("other", "missing"):
        with pytest.raises(InputError, match="does not hold the batch of a step"):
            load_autopsy(tmp_path / name)
