import time

import pytest
import trio

from modelfs.chunks import ObjectId, ObjectInfo
from modelfs.config import TreeConfig
from modelfs.engine import LOOK_SECONDS, Engine, tokens
from modelfs.loads import Loads
from modelfs.tree import Listing, Tree
from tests.support.served import Quiet, served

VLLM = b"""# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} %d.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 4.0
"""


@pytest.mark.parametrize(
    ("page", "count"),
    [
        (VLLM % 0, 0),
        (VLLM % 12, 12),
        (b'sglang:generation_tokens_total{model_name="m"} 1e+03\n', 1000),
        (b"llamacpp:tokens_predicted_total 3\n", 3),
        (b"tgi_request_generated_tokens_sum 5\n", 5),
        (b"<html>nothing</html>", 0),
        (b"", 0),
    ],
)
def test_tokens(page, count):
    assert tokens(page) == count


class Page(Quiet):
    count = 0

    def respond(self):
        self.answer(VLLM % type(self).count)


async def test_first_token_is_noted_when_the_count_grows():
    objects = (ObjectInfo(ObjectId("s3://b", "a.safetensors", "v"), 10, 0),)
    file = Tree([Listing("", "", objects)], TreeConfig()).find("a.safetensors")
    loads = Loads()
    with served(Page) as url:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Engine(url=f"{url}/metrics", loads=loads).run)
            loads.opened(file, "cached")
            (load,) = loads.recent
            await trio.sleep(3 * LOOK_SECONDS)
            assert not load.first_token
            Page.count = 1
            began = time.monotonic()
            with trio.fail_after(10):
                while not load.first_token:
                    await trio.sleep(0.05)
            assert began <= load.first_token <= began + 5
            assert load.document(load.began)["first_token_seconds"] > LOOK_SECONDS
            Page.count = 5000
            load.last -= 100
            loads.opened(file, "cached")
            _, second = loads.recent
            await trio.sleep(3 * LOOK_SECONDS)
            assert not second.first_token, "what had been generated before is not this load's"
            Page.count = 5001
            with trio.fail_after(10):
                while not second.first_token:
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()


async def test_an_engine_that_is_not_there_yet_is_no_failure(autojump_clock):
    objects = (ObjectInfo(ObjectId("s3://b", "a.safetensors", "v"), 10, 0),)
    loads = Loads()
    loads.opened(Tree([Listing("", "", objects)], TreeConfig()).find("a.safetensors"), "cached")
    with trio.move_on_after(5 * LOOK_SECONDS):
        await Engine(url="http://127.0.0.1:9/metrics", loads=loads).run()
    assert not loads.recent[0].first_token
