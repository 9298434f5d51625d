import os

from hypothesis import given
from hypothesis import strategies as st

from modelfs.chunks import ObjectId, ObjectInfo
from modelfs.config import TreeConfig
from modelfs.tree import Directory, File, Listing, Tree, natural_key


def info(key: str, size: int = 5, version: str = "v1", mtime: int = 7) -> ObjectInfo:
    return ObjectInfo(ObjectId("s3://b", key, version), size, mtime)


def tree(*keys: str, prefix: str = "p/", **filters: tuple[str, ...]) -> Tree:
    return Tree([Listing("", (("s3://b", prefix),), tuple(info(prefix + key) for key in keys))], TreeConfig(**filters))


def paths(built: Tree) -> list[str]:
    return [file.path for file in built.root.walk()]


def test_natural_order():
    names = ["model-10.x", "model-2.x", "a", "model-1.x"]
    assert sorted(names, key=natural_key) == ["a", "model-1.x", "model-2.x", "model-10.x"]
    assert paths(tree(*names)) == ["a", "model-1.x", "model-2.x", "model-10.x"]


def test_nesting_spaces_and_unicode():
    built = tree("a/b/c d.txt", "ä/模型.bin")
    assert paths(built) == ["a/b/c d.txt", "ä/模型.bin"]
    assert isinstance(built.find("a/b"), Directory)
    assert isinstance(built.find("ä/模型.bin"), File)
    assert built.find("a/x") is None
    assert built.find("a/b/c d.txt/x") is None


def test_keys_that_are_no_path_are_counted_not_shown():
    built = tree("ok", "a//b", "/lead", "../up", "x/./y", "nul\0x", "l" * 256, "dir", "dir/f", "data/")
    assert paths(built) == ["dir/f", "ok"]
    assert built.skipped == {"empty_part": 3, "dot_part": 2, "nul": 1, "name_too_long": 1, "shadowed": 1}


def test_directory_wins_over_object_in_either_order():
    for keys in (["a", "a/b"], ["a/b", "a"]):
        built = tree(*keys)
        assert paths(built) == ["a/b"]
        assert built.skipped["shadowed"] == 1


def test_empty_marker_is_a_directory():
    built = Tree([Listing("", (("s3://b", "p/"),), (info("p/", 0), info("p/empty/", 0), info("p/f")))], TreeConfig())
    assert isinstance(built.find("empty"), Directory)
    assert paths(built) == ["f"]
    assert not built.skipped


def test_filters():
    keys = ("a.safetensors", "b.bin", "original/c.safetensors", "config.json")
    assert paths(tree(*keys, include=("*.safetensors", "*.json"))) == [
        "a.safetensors",
        "config.json",
        "original/c.safetensors",
    ]
    assert paths(tree(*keys, exclude=("original/*", "*.bin"))) == ["a.safetensors", "config.json"]


def test_named_sources_are_directories():
    built = Tree(
        [Listing("x", (("s3://b", "p/"),), (info("p/f"),)), Listing("y", (("s3://b", "q/"),), (info("q/f"),))],
        TreeConfig(),
    )
    assert paths(built) == ["x/f", "y/f"]
    assert built.file_count == 2
    assert built.total_bytes == 10


def test_a_changed_object_is_another_inode_and_an_equal_one_the_same():
    first, again, changed = (
        Tree([Listing("", (("s3://b", ""),), (info("k", version=v),))], TreeConfig()) for v in ("1", "1", "2")
    )
    number = first.find("k").inode
    assert again.find("k").inode == number
    assert changed.find("k").inode != number


def test_deep_keys():
    built = tree("/".join(["d"] * 500) + "/f")
    assert len(paths(built)[0].split("/")) == 501


@given(st.lists(st.text(max_size=40), max_size=30))
def test_any_keys_give_a_sound_tree(keys):
    built = Tree([Listing("", (("s3://b", ""),), tuple(info(key) for key in dict.fromkeys(keys)))], TreeConfig())
    shown = paths(built)
    assert len(shown) == len(set(shown))
    for path in shown:
        assert path in keys
        assert all(part and part not in {".", ".."} and "\0" not in part for part in path.split("/"))
        assert all(len(os.fsencode(part)) <= 255 for part in path.split("/"))
        assert built.find(path).path == path
    assert len(shown) + sum(built.skipped.values()) == len(set(keys))
    for node in built.nodes.values():
        assert built.nodes[node.inode] is node


def test_filters_of_a_source_hold_for_it_alone():
    own = {"include": ("*.json", "sub/"), "exclude": ("secret*",)}
    listings = [
        Listing("x", (("s3://b", "p/"),), tuple(info(f"p/{name}") for name in ("a.json", "b.bin", "sub/c.bin")), **own),
        Listing("y", (("s3://b", "q/"),), (info("q/b.bin"), info("q/secret.json"))),
        Listing("z", (("s3://b", "r/"),), (info("r/secret.json"),), **own),
    ]
    assert paths(Tree(listings, TreeConfig())) == ["x/a.json", "x/sub/c.bin", "y/b.bin", "y/secret.json"]


def test_odd_answers_of_a_server_are_not_shown():
    built = tree("ok", "\ud800")
    assert paths(built) == ["ok"]
    assert built.skipped["not_text"] == 1
    built = Tree([Listing("", (("s3://b", ""),), (info("big", size=10**30), info("less", size=-1)))], TreeConfig())
    assert (paths(built), built.skipped["bad_size"]) == ([], 2)


def test_directories_nested_deeper_than_calls():
    assert len(paths(tree("/".join("d" * 2000)))) == 1
