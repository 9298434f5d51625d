import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.chunks import CHUNK_BYTES, ByteRange, ObjectId, ObjectInfo, chunks_of, split, stable_number

SIZES = st.one_of(st.integers(0, 3), st.integers(0, 5 * CHUNK_BYTES), st.sampled_from([CHUNK_BYTES, 3 * CHUNK_BYTES]))


def info(size: int) -> ObjectInfo:
    return ObjectInfo(ObjectId("s3://b", "k", "v"), size, 0)


@given(SIZES)
def test_chunks_cover_the_object_without_gap_or_overlap(size):
    position = 0
    for index in range(info(size).chunk_count):
        span = info(size).chunk_range(index)
        assert span.start == position
        assert 0 < len(span) <= CHUNK_BYTES
        position = span.stop
    assert position == size


@given(SIZES, st.integers(0, 6 * CHUNK_BYTES), st.integers(0, 3 * CHUNK_BYTES))
def test_split_gives_back_the_clipped_range(size, offset, length):
    span = info(size).clip(offset, length)
    parts = split(span)
    assert [index for index, _ in parts] == list(chunks_of(span))
    assert sum(len(part) for _, part in parts) == len(span) == max(0, min(size, offset + length) - offset)
    for index, part in parts:
        assert index * CHUNK_BYTES <= part.start < part.stop <= (index + 1) * CHUNK_BYTES


def test_number_depends_on_every_part_of_the_identity():
    numbers = {stable_number(*parts) for parts in [("a", "b", "c"), ("a", "b", "d"), ("a", "bc", ""), ("ab", "", "c")]}
    assert len(numbers) == 4
    assert all(1 < number < 2**63 for number in numbers)


def test_number_is_the_same_in_every_process():
    assert (
        ObjectInfo(ObjectId("s3://b", "k", '"e"'), 1, 2).number
        == ObjectInfo(ObjectId("s3://b", "k", '"e"'), 9, 9).number
    )
    assert stable_number("s3://b", "k", "e") == 8855784123368309946


def test_bad_ranges_are_refused():
    with pytest.raises(ValueError, match="bad range"):
        ByteRange(2, 1)
    with pytest.raises(ValueError, match="outside"):
        info(10).chunk_range(1)
