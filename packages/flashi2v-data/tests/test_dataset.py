import logging
import pickle
import sys

import pytest
import torch

from flashi2v_data.config import DatasetParam
from flashi2v_data.dataset import FlashI2VDataset
from flashi2v_data.decode import read_frames
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.sampler import SampleKey
from flashi2v_data.store import open_store, write_store
from flashi2v_data.tokenizer import TextTokens


def _tokenize(text: str) -> TextTokens:
    ids = torch.tensor([len(word) for word in text.split()][:8] + [0] * 8)[:8]
    return TextTokens(ids, (ids > 0).long())


@pytest.fixture
def dataset(store_path, data_config):
    """FlashI2VDataset with some settings changed, over the shapes or other records."""

    def make(records=None, seed=0, tokenizer=_tokenize, **changes):
        store = open_store(store_path) if records is None else _Records(records, store_path)
        return FlashI2VDataset(store, data_config(**changes).dataset_param, seed=seed, tokenizer=tokenizer)

    return make


class _Records(list):
    """Records in a list, where a test needs others than the store has."""

    def __init__(self, records, path):
        super().__init__(records)
        self.paths, self.config = [path], {}


def test_a_sample_has_its_shapes_types_and_range(dataset):
    sample = dataset(text_drop_ratio=0)[SampleKey(2, 3)]
    assert sample["video"].shape == (3, 5, 32, 48)
    assert sample["video"].dtype == torch.float32
    assert -1 <= sample["video"].min() < sample["video"].max() <= 1
    assert sample["prompt_ids"].shape == sample["prompt_mask"].shape == (8,)
    assert sample["prompt_ids"].dtype == sample["prompt_mask"].dtype == torch.int64
    assert sample["caption"].startswith("a ")
    assert (sample["epoch"], sample["index"], sample["skipped"]) == (2, 3, [])
    assert sample["path"].endswith("000003.mp4")


def test_a_sample_depends_on_seed_and_key_alone(dataset):
    first, second = dataset(), dataset()
    for index in (5, 2, 9):
        first[SampleKey(0, index)]  # what was read before must not matter
    one, other = first[SampleKey(1, 4)], second[SampleKey(1, 4)]
    assert torch.equal(one["video"], other["video"])
    assert one["caption"] == other["caption"]
    assert torch.equal(second[4]["video"], second[SampleKey(0, 4)]["video"])


def test_the_video_is_a_run_of_consecutive_frames_that_varies_with_epoch_and_seed(dataset, store_path):
    starts = set()
    for seed in range(3):
        data = dataset(seed=seed)
        record = data.store[0]
        everything = data.transform(read_frames(record["path"], range(13)))
        for epoch in range(10):
            video = data[SampleKey(epoch, 0)]["video"]
            matches = [start for start in range(9) if torch.equal(video, everything[:, start : start + 5])]
            assert matches
            starts.add((seed, matches[0]))
    assert {start for _, start in starts} == set(range(8))


def test_the_training_rate_skips_frames(store_path, dataset):
    record = {**open_store(store_path)[0], "fps": 32, "num_frames": 10, "start_frame_idx": 2}
    data = dataset([record])
    expected = data.transform(read_frames(record["path"], [2, 4, 6, 8, 10]))
    assert torch.equal(data[0]["video"], expected)


def test_text_is_dropped_at_the_stated_rate(dataset):
    data = dataset(text_drop_ratio=0.3)
    captions = [data._caption(data.store[0], epoch, 0) for epoch in range(400)]
    assert set(captions) == {"", data.store[0]["cap"]}
    assert 0.22 < captions.count("") / 400 < 0.38
    dropped = next(epoch for epoch, caption in enumerate(captions) if caption == "")
    sample = data[SampleKey(dropped, 0)]
    assert sample["caption"] == ""
    assert sample["prompt_mask"].sum() == 0


def test_one_of_several_captions_is_drawn_and_cleaned(dataset, store_path):
    record = {**open_store(store_path)[0], "cap": ["One  DOG", "two cats www.pets.com"]}
    data = dataset([record], text_drop_ratio=0)
    drawn = [data._caption(record, epoch, 0) for epoch in range(200)]
    assert set(drawn) == {"one dog", "two cats"}
    assert 70 < drawn.count("one dog") < 130
    raw = dataset([record], text_drop_ratio=0, clean_captions=False)
    assert {raw._caption(record, epoch, 0) for epoch in range(50)} == set(record["cap"])


def test_the_mask_is_returned_where_asked_for(dataset):
    assert "prompt_mask" not in dataset(return_prompt_mask=False)[0]


def test_the_tokenizer_directory_is_used(dataset, tokenizer_path):
    data = dataset(tokenizer=None, text_drop_ratio=0, tokenizer_max_length=20)
    sample = data[0]
    assert sample["prompt_ids"].shape == (20,)
    num_words = len(sample["caption"].split())
    assert sample["prompt_mask"].tolist() == [1] * num_words + [0] * (20 - num_words)
    assert sample["prompt_ids"][0] == 3  # "a" in the vocabulary
    assert (sample["prompt_ids"][num_words:] == 0).all()
    copy = pickle.loads(pickle.dumps(data))[0]  # as a worker started by spawn gets it
    assert torch.equal(copy["prompt_ids"], sample["prompt_ids"])
    short = dataset(tokenizer=None, text_drop_ratio=0, tokenizer_max_length=4)[0]
    assert short["prompt_mask"].tolist() == [1] * 4


def test_a_missing_tokenizer_says_what_to_do(dataset, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="text_tokenizer_path: no such directory"):
        dataset(tokenizer=None, text_tokenizer_path=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="holds no tokenizer"):
        dataset(tokenizer=None, text_tokenizer_path=str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'flashi2v-data\[tokenizer\]'"):
        dataset(tokenizer=None, text_tokenizer_path=str(tmp_path))


def test_the_next_readable_clip_stands_in_for_an_unreadable_one(dataset, store_path, tmp_path):
    records = [dict(record) for record in open_store(store_path)]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    records[3]["path"] = str(tmp_path / "missing.mp4")
    records[4]["path"] = str(tmp_path / "broken.mp4")
    records[11]["num_frames"] = 500  # more than the file has
    data = dataset(records)
    sample = data[SampleKey(1, 3)]
    assert sample["path"] == records[5]["path"]
    assert sample["index"] == 3
    assert [message.split(":")[0] for message in sample["skipped"]] == [
        f"cannot read video {records[3]['path']}",
        f"cannot read video {records[4]['path']}",
    ]
    assert torch.equal(sample["video"], data[SampleKey(1, 3)]["video"])
    around_the_end = {data[SampleKey(epoch, 11)]["path"] for epoch in range(6)}
    assert around_the_end == {records[11]["path"], records[0]["path"]} or around_the_end == {records[0]["path"]}


def test_a_clip_that_is_too_short_is_skipped(dataset, store_path):
    records = [dict(record) for record in open_store(store_path)]
    records[0]["num_frames"] = 4
    sample = dataset(records)[0]
    assert sample["path"] == records[1]["path"]
    assert "has 4 frames at the training rate, 5 are needed" in sample["skipped"][0]


@pytest.mark.parametrize(("num_records", "num_tried"), [(150, 101), (7, 7)])
def test_too_many_unreadable_clips_in_a_row_stop_the_run(dataset, store_path, num_records, num_tried, tmp_path):
    record = dict(open_store(store_path)[0], path=str(tmp_path / "unmounted.mp4"))
    with pytest.raises(DecodeError, match=rf"nor the {num_tried - 1} before it; see `flashi2v-data inspect"):
        dataset([record] * num_records)[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_fps": 24}, "was filtered with train_fps 16.0, data.json says 24.0"),
        ({"train_fps": None, "sample_stride": 2}, "was filtered with train_fps 16.0, data.json says None"),
        ({"sample_num_frames": 9}, "was filtered for 5 frames, data.json asks for 9"),
    ],
)
def test_a_store_that_was_filtered_for_something_else_is_refused(dataset, changes, expected):
    with pytest.raises(InputError, match=expected):
        dataset(**changes)


def test_an_empty_store_is_refused(tmp_path, data_config):
    store = open_store(write_store(tmp_path / "empty.lmdb", [], {}))
    param: DatasetParam = data_config().dataset_param
    with pytest.raises(InputError, match="holds no records"):
        FlashI2VDataset(store, param, seed=0, tokenizer=_tokenize)


def test_decoders_give_equal_samples(dataset):
    pytest.importorskip("decord")
    assert torch.equal(dataset(decoder="decord")[2]["video"], dataset(decoder="pyav")[2]["video"])


def test_nothing_is_logged_for_a_readable_clip(dataset, caplog):
    caplog.set_level(logging.WARNING)
    dataset()[0]
    assert caplog.messages == []


def test_iterating_ends_with_the_store(dataset):
    assert [sample["index"] for sample in dataset()] == list(range(12))
