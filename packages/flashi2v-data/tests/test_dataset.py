import logging
import pickle
import re
import sys

import numpy as np
import pytest
import torch

from flashi2v_data.captions.tokenizer import TextTokens
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.loading.config import DatasetParam
from flashi2v_data.loading.dataset import FlashI2VDataset
from flashi2v_data.loading.loader import collate
from flashi2v_data.loading.sampler import SampleKey
from flashi2v_data.store.reader import open_store, write_store
from flashi2v_data.video.decode import read_frames
from flashi2v_data.video.write import write_video


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
    assert torch.equal(second[(1, 4)]["video"], one["video"])


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
    captions = [data._caption(data.store[0], SampleKey(epoch, 0)) for epoch in range(400)]
    assert set(captions) == {"", data.store[0]["cap"]}
    assert 0.22 < captions.count("") / 400 < 0.38
    dropped = next(epoch for epoch, caption in enumerate(captions) if caption == "")
    sample = data[SampleKey(dropped, 0)]
    assert sample["caption"] == ""
    assert sample["prompt_mask"].sum() == 0


def test_one_of_several_captions_is_drawn_and_cleaned(dataset, store_path):
    record = {**open_store(store_path)[0], "cap": ["One  DOG", "two cats www.pets.com"]}
    data = dataset([record], text_drop_ratio=0)
    drawn = [data._caption(record, SampleKey(epoch, 0)) for epoch in range(200)]
    assert set(drawn) == {"one dog", "two cats"}
    assert 70 < drawn.count("one dog") < 130
    raw = dataset([record], text_drop_ratio=0, clean_captions=False)
    assert {raw._caption(record, SampleKey(epoch, 0)) for epoch in range(50)} == set(record["cap"])


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


def test_another_readable_clip_stands_in_for_an_unreadable_one(dataset, store_path, tmp_path):
    records = [dict(record) for record in open_store(store_path)]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    bad = (3, 4, 7, 8, 9)
    for number in bad:
        records[number]["path"] = str(tmp_path / ("missing.mp4" if number % 2 else "broken.mp4"))
    records[11]["num_frames"] = 500  # more than the file has
    stood_in = set()
    for epoch in range(6):
        key = SampleKey(epoch, 3)
        # What was met before does not matter, nor whether the quarantine knows already.
        fresh = dataset(records, quarantine_path=str(tmp_path / f"{epoch}.jsonl"))
        sample = fresh[key]
        assert sample["path"] in {record["path"] for number, record in enumerate(records) if number not in bad}
        assert sample["index"] == 3
        assert sample["skipped"][0] == f"cannot read video {records[3]['path']}: No such file or directory"
        for data in (fresh, dataset(records, quarantine_path=str(tmp_path / f"{epoch}.jsonl")), dataset(records)):
            again = data[key]
            assert torch.equal(sample["video"], again["video"])
            assert sample["skipped"] == again["skipped"]
        stood_in.add(sample["path"])
    assert len(stood_in) > 2  # not always the neighbour


def test_a_clip_that_ends_too_early_is_replaced_where_its_crop_needs_it_whatever_was_met_before(
    dataset, store_path, tmp_path
):
    records = [dict(record) for record in open_store(store_path)]
    records[0]["num_frames"] = 24  # the file has 13
    data = dataset(records)
    replaced = [bool(data[SampleKey(epoch, 0)]["skipped"]) for epoch in range(30)]
    assert 0 < sum(replaced) < 30
    for epoch in range(30):
        fresh = dataset(records, quarantine_path=str(tmp_path / f"{epoch}.jsonl"))
        assert bool(fresh[SampleKey(epoch, 0)]["skipped"]) == replaced[epoch]
    assert len(data.quarantine) == 1


def test_a_clip_that_is_too_short_is_skipped(dataset, store_path):
    records = [dict(record) for record in open_store(store_path)]
    records[0]["num_frames"] = 4
    sample = dataset(records)[0]
    assert sample["path"] != records[0]["path"]
    assert "has 4 frames at the training rate, 5 are needed" in sample["skipped"][0]


@pytest.mark.parametrize(("num_records", "num_tried"), [(150, 101), (7, 7)])
def test_too_many_unreadable_clips_in_a_row_stop_the_run(dataset, store_path, num_records, num_tried, tmp_path):
    record = dict(open_store(store_path)[0], path=str(tmp_path / "unmounted.mp4"))
    with pytest.raises(DecodeError, match=rf"nor can {num_tried - 1} others; see `flashi2v-data inspect"):
        dataset([record] * num_records)[0]


def test_the_one_readable_clip_of_a_store_is_found(dataset, store_path, tmp_path):
    records = [dict(record, path=str(tmp_path / "missing.mp4")) for record in open_store(store_path)]
    records[8] = open_store(store_path)[8]
    assert {dataset(records)[number]["path"] for number in range(12)} == {records[8]["path"]}


def _video_of(directory, name, height, width, num_frames=13):
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (num_frames, height // 8, width // 8, 3), dtype=np.uint8)
    write_video(directory / name, noise.repeat(8, 1).repeat(8, 2), 16)
    return str(directory / name)


def test_a_crop_is_cut_out_before_the_resize(dataset, store_path, tmp_path):
    path = _video_of(tmp_path, "large.mp4", 96, 160)
    record = dict(open_store(store_path)[0], path=path, resolution={"height": 96, "width": 160}, crop=[40, 136, 16, 80])
    data = dataset([record])
    start = data[0]["first_frame"]
    expected = data.transform(read_frames(path, range(start, start + 5))[:, 16:80, 40:136])
    assert torch.equal(data[0]["video"], expected)
    assert torch.equal(
        dataset([dict(record, crop=[None] * 4)])[0]["video"], dataset([{**record, "crop": None}])[0]["video"]
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"crop": [0, 161, 0, 96]}, "is 96x160, its crop .* is"),
        ({"crop": [40, 40, 0, 96]}, "is 96x160, its crop .* is"),
        ({"crop": "all"}, "its crop is not"),
        ({"resolution": {"height": 720, "width": 1280}, "path": "small.mp4"}, "is 16x24, smaller than the sample"),
        ({"num_frames": 40}, "frames, frame .* was asked for"),
        ({"path": "one.mp4"}, "has 1 frames, frame .* was asked for"),
    ],
)
def test_a_file_that_is_not_what_its_record_says_is_skipped(dataset, store_path, tmp_path, changes, reason):
    good = open_store(store_path)[0]
    _video_of(tmp_path, "small.mp4", 16, 24)
    _video_of(tmp_path, "one.mp4", 32, 48, num_frames=1)
    record = dict(good, path=_video_of(tmp_path, "large.mp4", 96, 160), resolution={"height": 96, "width": 160})
    record |= {key: str(tmp_path / value) if key == "path" else value for key, value in changes.items()}
    data = dataset([record, good])
    sample = next(sample for epoch in range(50) if (sample := data[SampleKey(epoch, 0)])["skipped"])
    assert re.search(reason, sample["skipped"][0])
    assert sample["path"] == good["path"]


def _faulty_records(directory, store_path):
    """Records that are at fault though their files are not; the same, fixed."""
    good = open_store(store_path)[0]
    large = _video_of(directory, "large.mp4", 96, 160)
    crops = {**good, "path": large, "resolution": {"height": 96, "width": 160}}
    small = {**good, "path": _video_of(directory, "small.mp4", 16, 24)}
    faulty = [{**good, "num_frames": 4}, {**crops, "crop": [0, 161, 0, 96]}, {**crops, "crop": "all"}, small]
    fixed = [good, {**crops, "crop": [0, 160, 0, 96]}, crops, {**small, "resolution": {"height": 16, "width": 24}}]
    return faulty, fixed


def test_a_fixed_record_is_read_again_with_the_same_quarantine(dataset, store_path, tmp_path):
    faulty, fixed = _faulty_records(tmp_path, store_path)
    other = open_store(store_path)[1]
    data = dataset([*faulty, other])
    assert all(data[index]["skipped"] for index in range(4))
    assert len(data.quarantine) == 0
    assert not data.quarantine.path.exists()
    data = dataset([*fixed, other])
    assert not any(data[index]["skipped"] for index in range(4))


def test_a_record_at_fault_is_not_read_twice_and_stands_for_no_other_record_of_its_file(
    dataset, store_path, tmp_path, monkeypatch
):
    faulty, fixed = _faulty_records(tmp_path, store_path)
    data = dataset([*faulty[1:2], *fixed[1:2]])  # one file and first frame, two crops
    first = data[0]
    opened = []
    monkeypatch.setattr(
        "flashi2v_data.loading.dataset.read_frames",
        lambda *given, **named: opened.append(given) or read_frames(*given, **named),
    )
    again = data[0]
    assert len(opened) == 1
    assert again["skipped"] == first["skipped"]
    assert torch.equal(again["video"], first["video"])
    assert data[1]["skipped"] == []


def test_a_record_of_the_public_code_need_not_say_its_resolution(dataset, store_path):
    record = {key: value for key, value in open_store(store_path)[0].items() if key != "resolution"}
    assert dataset([record])[0]["skipped"] == []


def test_another_size_that_is_large_enough_is_used(dataset, store_path, tmp_path):
    """A record may be out of date: what counts is that nothing must be enlarged."""
    record = dict(open_store(store_path)[0], path=_video_of(tmp_path, "large.mp4", 96, 160))
    assert dataset([record])[0]["skipped"] == []


def test_another_clip_stands_in_for_a_record_that_is_no_clip(store_path, data_config, tmp_path):
    good = open_store(store_path)[0]
    changes = [{"fps": 0}, {"fps": 1e-6}, {"num_frames": 10**12}, {"cap": []}, {"resolution": [64, 96]}, {"path": 3}]
    records = [{**good, **change} for change in changes]
    records += [{key: value for key, value in good.items() if key != "start_frame_idx"}, good]
    path = write_store(tmp_path / "a.lmdb", records, {})
    data = FlashI2VDataset(open_store(path), data_config().dataset_param, seed=0, tokenizer=_tokenize)
    for index in range(7):
        sample = data[index]
        assert sample["path"] == good["path"]
        assert all(message.startswith("record at fault, ") for message in sample["skipped"])
        with pytest.raises(DecodeError, match=r"^record at fault, "):
            data.clip_key(index)
    assert "a.lmdb: record 0 is not a clip that can be trained on" in data[0]["skipped"][0]
    assert "frames at fps 1e-06 are no clip" in data[1]["skipped"][0]
    assert data.captions(7) == [good["cap"]]
    assert not data.quarantine.path.exists()
    bad = FlashI2VDataset(
        open_store(write_store(tmp_path / "b.lmdb", records[:1] * 3, {})), data.config, seed=0, tokenizer=_tokenize
    )
    with pytest.raises(DecodeError, match=r"^record at fault, .*b\.lmdb: as are 2 others; see `flashi2v-data inspect"):
        bad[0]


def test_clips_are_mirrored_at_the_stated_rate_and_by_seed_and_key_alone(dataset, raw_data_config):
    pipeline = raw_data_config["dataset_param"]["transform_pipeline"]["video"]
    flip = {"trans_type": "RandomHorizontalFlipVideo", "param": {"p": 0.3}}
    plain, flipped = dataset(), dataset(transform_pipeline={"video": [flip, *pipeline]})
    count = 0
    for epoch in range(60):
        key = SampleKey(epoch, 2)
        one, other = plain[key]["video"], flipped[key]["video"]
        is_mirrored = torch.equal(one.flip(-1), other)
        assert flipped[key]["flipped"] is is_mirrored
        assert is_mirrored or torch.equal(one, other)
        count += is_mirrored
    assert 8 <= count <= 28


def test_a_caption_of_100000_characters_is_read(dataset, store_path):
    record = dict(open_store(store_path)[0], cap="a large dog runs. " * 5600)
    sample = dataset([record], tokenizer=None, text_drop_ratio=0)[0]
    assert len(sample["caption"]) > 100_000
    assert sample["prompt_mask"].tolist() == [1] * 8


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


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_decoders_give_equal_samples(dataset, decoder):
    try:
        data = dataset(decoder=decoder)
    except InputError as error:
        pytest.skip(str(error))
    assert torch.equal(data[2]["video"], dataset(decoder="pyav")[2]["video"])


def test_nothing_is_logged_for_a_readable_clip(dataset, caplog):
    caplog.set_level(logging.WARNING)
    dataset()[0]
    assert caplog.messages == []


def test_iterating_ends_with_the_store(dataset):
    assert [sample["index"] for sample in dataset()] == list(range(12))


def test_further_keys_of_records_come_as_columns(dataset, store_path):
    records = [
        {**record, "score": 3, "camera": [1, 2.5, -1e6]} for record in map(open_store(store_path).__getitem__, (0, 1))
    ]
    data = dataset(records, columns={"score": None, "camera": 3})
    columns = data[0]["columns"]
    assert (columns["score"].item(), columns["camera"].tolist()) == (3.0, [1.0, 2.5, -1e6])
    assert {tensor.dtype for tensor in columns.values()} == {torch.float32}
    batch = collate([data[0], data[1]])["columns"]
    assert (batch["score"].shape, batch["camera"].shape) == ((2,), (2, 3))
    assert "columns" not in dataset(records)[0]


@pytest.mark.parametrize(
    ("length", "value", "words"),
    [
        (None, ..., "its score must be a number .*, and is not there"),
        (None, "0.5", "its score must be a number .*, and is '0.5'"),
        (None, True, "must be a number"),
        (None, None, "must be a number"),
        (None, [1.0], "must be a number"),
        (2, 1.0, "must be a list of 2 numbers"),
        (2, [1.0, 2.0, 3.0], "must be a list of 2 numbers"),
        (1, [[1.0]], "must be a list of 1 numbers"),
        (None, 2**24 + 1, "whole numbers are exact up to 16777216 only"),
        (None, float("nan"), "not finite in float32"),
        (2, [0, 1e300], "not finite in float32"),
    ],
)
def test_a_record_whose_column_is_missing_or_another_is_stood_in_for_and_named(
    dataset, store_path, length, value, words
):
    whole, other = (open_store(store_path)[index] for index in (0, 1))
    good = {**other, "score": [1.0] * length if length else 1.0}
    data = dataset([{**whole} if value is ... else {**whole, "score": value}, good], columns={"score": length})
    sample = data[0]
    assert sample["path"] == other["path"]
    [message] = sample["skipped"]
    assert re.search(words, message), message
    assert not data.quarantine.path.exists(), "the file itself is whole"
