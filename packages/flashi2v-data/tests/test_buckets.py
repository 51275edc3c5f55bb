"""Which shape a clip is brought to, and what the loader makes of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashi2v_data.errors import InputError
from flashi2v_data.loading.buckets import Bucket, BucketTable, Shape, choose, propose_buckets

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
    table = BucketTable(shapes, buckets, "these")  # each is gone to
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
        BucketTable(shapes, [WIDE, TALL, IMAGE], "store")
    table = BucketTable(shapes, [WIDE], "store")
    assert table.number_of.tolist() == [0, -1, -1]
    assert table.num_left_out == 2


def test_clips_of_a_bucket_are_found():
    shapes = [Shape(60, 1080, 1920), Shape(1, 9, 9), Shape(60, 1920, 1080), Shape(60, 1080, 1920)]
    table = BucketTable(shapes, [TALL, IMAGE, WIDE], "store")
    assert table.members(WIDE).tolist() == [0, 3]
    members, place = table.like(3)
    assert (members.tolist(), place) == ([0, 3], 1)
    assert table.fullest == WIDE
    assert table.counts == [1, 1, 2]
