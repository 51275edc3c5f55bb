"""Which shape a clip is brought to, and what the loader makes of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashi2v_data.errors import InputError
from flashi2v_data.loading.buckets import BucketTable, Shape, choose, propose_buckets
from flashi2v_data.loading.config import Bucket
from flashi2v_data.loading.dataset import FlashI2VDataset
from flashi2v_data.loading.loader import build_dataloader
from flashi2v_data.loading.sampler import SampleKey
from flashi2v_data.shapes.scenes import write_shapes
from flashi2v_data.store.reader import open_store, write_store

WIDE, TALL, SQUARE, IMAGE = Bucket(49, 480, 832), Bucket(49, 832, 480), Bucket(49, 640, 640), Bucket(1, 480, 832)
SHORT, SMALL = Bucket(13, 480, 832), Bucket(49, 240, 416)
ALL = [WIDE, TALL, SQUARE, IMAGE, SHORT, SMALL]
SHAPES = st.builds(Shape, st.integers(1, 200), st.integers(100, 2000), st.integers(100, 2000))


@pytest.mark.parametrize(
    ("shape", "bucket"),
    [
        (Shape(60, 1080, 1920), WIDE),
        (Shape(60, 1920, 1080), TALL),
        (Shape(60, 1080, 1080), SQUARE),
        (Shape(60, 470, 840), WIDE),  # enlarged by a fiftieth, which nobody sees
        (Shape(60, 240, 426), SMALL),  # as the larger ones would enlarge it
        (Shape(30, 1080, 1920), SHORT),
        (Shape(30, 1920, 1080), SHORT),  # cropped to a third, but there is none of its length and shape
        (Shape(1, 1080, 1920), IMAGE),
        (Shape(1, 60, 60), IMAGE),
        (Shape(5, 1080, 1920), None),  # a video, and no bucket is as short
    ],
)
def test_a_clip_goes_where_it_is_cropped_least(shape, bucket):
    number = choose(shape, ALL)
    assert (None if number is None else ALL[number]) == bucket


@given(SHAPES, st.permutations(ALL))
def test_the_order_of_buckets_does_not_matter(shape, buckets):
    chosen, expected = choose(shape, buckets), choose(shape, ALL)
    assert (None if chosen is None else buckets[chosen]) == (None if expected is None else ALL[expected])


@given(st.lists(SHAPES, min_size=1, max_size=60))
def test_auto_leaves_no_clip_out_that_is_long_enough(shapes):
    largest = Bucket(49, 480, 832)
    buckets = propose_buckets(shapes, largest)
    table = BucketTable(shapes, buckets, "these")
    table.check_filled()
    for shape, number in zip(shapes, table.number_of):
        assert (number >= 0) == (shape.num_frames == 1 or shape.num_frames >= 13)
    for frames, height, width in buckets:
        assert frames % 4 == 1
        assert height % 16 == width % 16 == 0
        assert frames <= largest.num_frames
        assert height * width <= largest.height * largest.width


def test_a_bucket_that_no_clip_goes_to_is_named():
    shapes = [Shape(60, 1080, 1920), None, Shape(3, 100, 100)]
    with pytest.raises(InputError, match=r"buckets: no clip of store goes to 49x832x480 or 1x480x832: take it out"):
        BucketTable(shapes, [WIDE, TALL, IMAGE], "store").check_filled()
    table = BucketTable(shapes, [WIDE], "store")
    assert table.number_of.tolist() == [0, -1, -1]
    assert table.num_left_out == 2


def test_clips_of_a_bucket_are_found():
    shapes = [Shape(60, 1080, 1920), Shape(1, 9, 9), Shape(60, 1920, 1080), Shape(60, 1080, 1920)]
    table = BucketTable(shapes, [TALL, IMAGE, WIDE], "store")
    assert table.members(WIDE) == [0, 3]
    assert table.counts == [1, 1, 2]


def test_auto_names_the_fullest_first_and_images_last():
    shapes = [Shape(1, 480, 832)] * 5 + [Shape(60, 832, 480)] * 3 + [Shape(60, 480, 832)]
    assert propose_buckets(shapes, WIDE) == [TALL, WIDE, IMAGE]


SIZES = [(13, 32, 48), (13, 48, 32), (5, 32, 48), (1, 32, 48)]  # three clips of each, and one that is too short
BUCKETS = [[9, 32, 48], [9, 48, 32], [5, 32, 48], [1, 32, 32]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A store of clips of several shapes, of which an image and a tall clip cannot be read."""
    root = tmp_path_factory.mktemp("mixed")
    records = []
    for number, (frames, height, width) in enumerate([*SIZES, (3, 32, 48)]):
        folder = root / str(number)
        write_shapes(folder, 3, number, height, width, frames)
        for name in ("00000", "00001", "00002")[: 1 if frames == 3 else 3]:
            record = {"path": str(next(folder.glob(f"**/*{name}*.mp4"))), "cap": f"a red circle {number}", "fps": 16.0}
            size = {"height": height, "width": width}
            records.append({**record, "num_frames": frames, "start_frame_idx": 0, "resolution": size})
    for index in (4, 9):
        records[index]["path"] += ".gone"
    return write_store(root / "mixed.lmdb", records, {"train_fps": 16})


@pytest.fixture
def mixed_config(mixed, data_config):
    """A data.json over it."""

    def make(num_workers: int = 0, **changes):
        named = {"metafile_or_dir_path": str(mixed), "buckets": BUCKETS, "sample_num_frames": 9}
        return data_config(num_workers, **named, **changes)

    return make


def test_every_clip_comes_in_the_shape_of_its_bucket_and_is_stood_in_for_by_its_like(mixed, mixed_config):
    dataset = FlashI2VDataset(open_store(mixed), mixed_config().dataset_param, seed=0)
    assert dataset.indices == [*range(12)]  # the last one fits nowhere
    for index in dataset.indices:
        sample = dataset[SampleKey(3, index)]
        assert list(sample["video"].shape[1:]) == BUCKETS[index // 3]
        assert (sample["index"], f"a red circle {index // 3}") == (
            index,
            sample["caption"] or f"a red circle {index // 3}",
        )
        assert len(sample["skipped"]) == (index in (4, 9))
        if sample["skipped"]:
            assert sample["path"] in {
                open_store(mixed)[other]["path"] for other in range(index // 3 * 3, index // 3 * 3 + 3)
            }


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_reads_one_clip_of_any_shape_at_a_time(mixed, mixed_config, num_workers):
    loader = build_dataloader(mixed_config(num_workers), seed=0, batch_size=1)
    dataset = FlashI2VDataset(open_store(mixed), mixed_config().dataset_param, seed=0)
    try:
        for _, batch in zip(range(12), loader):
            sample = dataset[SampleKey(int(batch["epoch"][0]), int(batch["index"][0]))]
            assert batch["video"][0].equal(sample["video"])
    finally:
        loader.close()
    with pytest.raises(InputError, match="do not fit into one batch: set batch_size to 1"):
        build_dataloader(mixed_config(), seed=0, batch_size=2)


def test_clips_of_one_bucket_may_be_asked_for_and_those_held_out_are_of_the_samples_shape(mixed, mixed_config):
    store, param = open_store(mixed), mixed_config(held_out_clips=2).dataset_param

    def indices(**options):
        return FlashI2VDataset(store, param, seed=0, **options).indices

    assert indices(held_out=True) == [0, 2]
    assert indices(held_out=False) == [1, *range(3, 12)]
    assert indices(held_out=False, bucket=Bucket(5, 32, 48)) == [6, 7, 8]
    loader = build_dataloader(mixed_config(), seed=0, batch_size=3, bucket=Bucket(9, 48, 32))
    assert next(iter(loader))["video"].shape == (3, 3, 9, 48, 32)
    with pytest.raises(InputError, match=r"held_out_clips is 3, and .* holds 3 of the shape 9x32x48: set fewer"):
        FlashI2VDataset(store, mixed_config(held_out_clips=3).dataset_param, seed=0, held_out=False)


def test_auto_suits_the_store(mixed, mixed_config):
    config = mixed_config().dataset_param.model_copy(update={"buckets": "auto"})
    dataset = FlashI2VDataset(open_store(mixed), config, seed=0)
    assert dataset.table.counts == [3, 3, 3, 3]
    assert dataset.config.main_bucket == (9, 32, 48)
    assert [*dataset.table.buckets] == [(5, 32, 48), (9, 32, 48), (9, 48, 32), (1, 32, 48)]


def test_an_empty_bucket_ends_the_run_before_it_begins(mixed, mixed_config):
    config = mixed_config().dataset_param.model_copy(
        update={"buckets": [Bucket(*one) for one in [*BUCKETS, [17, 32, 48]]]}
    )
    with pytest.raises(InputError, match=r"no clip of .*mixed.lmdb goes to 17x32x48: take it out"):
        FlashI2VDataset(open_store(mixed), config, seed=0)
