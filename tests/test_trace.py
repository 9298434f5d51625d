import json

from hypothesis import given
from hypothesis import strategies as st

from modelfs.chunks import CHUNK_BYTES, ByteRange, ObjectId, ObjectInfo
from modelfs.trace import MAX_TEXT_BYTES, Touch, Trace, model_name


def info(key, version="v", size=3 * CHUNK_BYTES):
    return ObjectInfo(ObjectId("s3://b", key, version), size, 0)


def by_id(*infos):
    return {item.id: item for item in infos}


def a_trace(*parts):
    return Trace(tuple(Touch(item.id, start, stop, 0.5) for item, start, stop in parts))


def test_round_trip_keeps_order_and_spans():
    one, two = info("a"), info("b")
    trace = a_trace((two, 0, CHUNK_BYTES), (one, CHUNK_BYTES, 2 * CHUNK_BYTES), (two, CHUNK_BYTES, 3 * CHUNK_BYTES))
    again = Trace.from_text(trace.to_text(), "s3://b")
    assert again == trace
    assert again.spans(by_id(one, two)) == [
        (two, ByteRange(0, CHUNK_BYTES)),
        (one, ByteRange(CHUNK_BYTES, 2 * CHUNK_BYTES)),
        (two, ByteRange(CHUNK_BYTES, 3 * CHUNK_BYTES)),
    ]


def test_trace_of_other_versions_or_sizes_is_ignored():
    one = info("a")
    trace = a_trace((one, 0, CHUNK_BYTES), (info("b"), 0, CHUNK_BYTES))
    assert trace.spans(by_id(one)) is None
    assert trace.spans(by_id(one, info("b", version="other"))) is None
    assert trace.spans(by_id(one, info("b", size=CHUNK_BYTES - 1))) is None


def test_model_name_depends_on_every_version_and_not_on_the_order():
    one, two = info("a"), info("b")
    assert model_name([one, two]) == model_name([two, one])
    assert model_name([one, two]) != model_name([one, info("b", version="w")])
    assert model_name([info("a", "bc")]) != model_name([info("ab", "c")])


def test_text_too_long_is_refused():
    assert Trace.from_text(b" " * (MAX_TEXT_BYTES + 1), "s3://b") is None


rows = st.lists(st.tuples(st.text(), st.text(), st.integers(), st.integers(), st.floats()))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
anything = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(st.binary() | anything.map(lambda x: json.dumps(x).encode()) | anything.map(
    lambda x: json.dumps({"format": 1, "touches": x}).encode()
) | rows.map(lambda x: json.dumps({"format": 1, "touches": x}).encode()))  # fmt: skip
def test_hostile_text_gives_no_trace_or_spans_inside_the_files(text):
    trace = Trace.from_text(text, "s3://b")
    if trace is not None:
        known = by_id(*(ObjectInfo(touch.id, 10, 0) for touch in trace.touches))
        for item, span in trace.spans(known) or []:
            assert 0 <= span.start < span.stop <= item.size
