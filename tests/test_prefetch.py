import json
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from modelfs.chunks import CHUNK_BYTES, ObjectId, ObjectInfo
from modelfs.config import TreeConfig
from modelfs.prefetch import (
    PAUSE_SECONDS,
    RANK_ENDS,
    RANK_SMALL,
    RANK_WEIGHTS,
    Prefetch,
    is_model,
    model_files,
    model_of,
    parse_index,
    plan,
    wanted_files,
)
from modelfs.tree import Listing, Tree

BIG = 3 * CHUNK_BYTES


def tree(**sizes: int) -> Tree:
    objects = tuple(ObjectInfo(ObjectId("s3://b", key, "v"), size, 0) for key, size in sizes.items())
    return Tree([Listing("", (("s3://b", ""),), objects)], TreeConfig())


def names(files):
    return [file.path for file in files]


def test_plan_of_a_sharded_model():
    built = tree(**{
        "model-00010-of-00010.safetensors": BIG, "model-00002-of-00010.safetensors": BIG, "config.json": 100,
        "tokenizer.json": 5000, "pytorch_model.bin": BIG, "consolidated.00.pth": BIG, "original/params.json": 10,
        "original/consolidated.00.pth": BIG,
    })  # fmt: skip
    files = model_files(built.root)
    assert names(files) == [
        "config.json", "model-00002-of-00010.safetensors", "model-00010-of-00010.safetensors", "tokenizer.json",
    ]  # fmt: skip
    ranked = plan(files)
    assert [(entry.rank, entry.item.info.id.key, entry.item.span.start // CHUNK_BYTES) for entry in ranked] == [
        (RANK_SMALL, "config.json", 0),
        (RANK_SMALL, "tokenizer.json", 0),
        (RANK_ENDS, "model-00002-of-00010.safetensors", 0),
        (RANK_ENDS, "model-00002-of-00010.safetensors", 2),
        (RANK_ENDS, "model-00010-of-00010.safetensors", 0),
        (RANK_ENDS, "model-00010-of-00010.safetensors", 2),
        (RANK_WEIGHTS, "model-00002-of-00010.safetensors", 0),
        (RANK_WEIGHTS, "model-00010-of-00010.safetensors", 0),
    ]


def test_shards_outside_the_index_come_last():
    built = tree(**{"a.safetensors": BIG, "b.safetensors": BIG})
    ranked = plan(model_files(built.root), {"b.safetensors"})
    assert [entry.item.info.id.key for entry in ranked if entry.rank >= RANK_WEIGHTS] == [
        "b.safetensors",
        "a.safetensors",
    ]


def test_pickles_are_weights_where_nothing_better_lies():
    assert names(model_files(tree(**{"pytorch_model.bin": BIG, "config.json": 3}).root)) == [
        "config.json",
        "pytorch_model.bin",
    ]


def test_one_gguf_is_fetched_and_many_quantizations_are_not():
    assert names(model_files(tree(**{"m-Q4.gguf": BIG}).root)) == ["m-Q4.gguf"]
    shards = {f"m-0000{n}-of-00002.gguf": BIG for n in (1, 2)}
    assert len(model_files(tree(**shards).root)) == 2
    assert names(model_files(tree(**{"m-Q4.gguf": BIG, "m-Q8.gguf": BIG, "r.md": 1}).root)) == ["r.md"]


def test_composed_model_is_one_model():
    built = tree(
        **{"sd/model_index.json": 5, "sd/unet/u.safetensors": BIG, "sd/vae/v.safetensors": BIG, "other/x.txt": 1}
    )
    unet = built.find("sd/unet")
    assert model_of(unet) is built.find("sd")
    assert names(model_files(built.find("sd"))) == [
        "sd/model_index.json",
        "sd/unet/u.safetensors",
        "sd/vae/v.safetensors",
    ]
    assert model_of(built.find("other")) is None
    assert not is_model(built.root)
    assert len(wanted_files(built.root)) == 3


def test_index_parsing():
    assert parse_index(json.dumps({"weight_map": {"a": "x", "b": "y"}}).encode()) == {"x", "y"}
    for bad in (b"", b"{}", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b"\xff", b"[" * 100000):
        assert parse_index(bad) is None


TREES = st.recursive(st.none() | st.text(), lambda inner: st.dictionaries(st.text(), inner))
INDEXES = TREES.map(lambda value: json.dumps({"weight_map": value}).encode())


@given(st.binary(max_size=300) | INDEXES)
def test_any_index_is_a_set_of_names_or_nothing(data):
    found = parse_index(data)
    assert found is None or all(isinstance(name, str) for name in found)


def test_files_are_taken_into_memory_at_the_first_touch_and_after_a_pause(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("modelfs.prefetch.time", SimpleNamespace(monotonic=lambda: now[0]))
    built = tree(**{"a.safetensors": BIG})
    taken = []
    made = Prefetch(
        mode="auto",
        store=SimpleNamespace(object=lambda info: info.id.key),
        fetch=None,
        pages=SimpleNamespace(want=lambda files: taken.append(list(files))),
        traces=None,
    )
    made.start(built)
    for seconds, times in [(5, 1), (1, 1), (PAUSE_SECONDS - 2, 1), (PAUSE_SECONDS, 2)]:
        now[0] += seconds
        made.touch(built.root)
        assert taken == [["a.safetensors"]] * times
