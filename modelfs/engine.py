"""When the engine gave its first token, from the metrics that it publishes.

Engines count generated tokens on a Prometheus page. The page is asked for twice a second while a load has begun and
has no first token yet; when the count has grown from nothing, the load has. Knows no model format and no cache.
"""

import logging
import re
import time
import urllib.request
from http.client import HTTPException

import trio

from modelfs.loads import Load, Loads

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
GIVE_UP_SECONDS = 3600.0
"""A load whose engine has not answered by then never will."""
_TIMEOUT_SECONDS = 2.0
_LIMIT_BYTES = 1024 * 1024
_PART_BYTES = 64 * 1024
_TOKENS = re.compile(
    rb"^(?:vllm:generation_tokens_total|sglang:generation_tokens_total|llamacpp:tokens_predicted_total"
    rb"|tgi_request_generated_tokens_sum)(?:\{[^\n]*\})? ([0-9.eE+]+)",
    re.MULTILINE,
)
"""Counters of vLLM, SGLang, llama.cpp's server and TGI, as their documentation names them."""


def tokens(page: bytes) -> float:
    """Return the number of generated tokens that a metrics page tells of; 0 if it tells of none."""
    return sum(float(found) for found in _TOKENS.findall(page))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Follow none: the page is where the user said."""


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
"""Without the proxies of the environment: an engine is on this node, or its sidecar's."""


class Engine:
    """Watches one engine.

    Args:
        url: Its metrics page.
        loads: Where first tokens are noted.
    """

    def __init__(self, *, url: str, loads: Loads) -> None:
        self._url = url
        self._loads = loads

    async def run(self) -> None:
        """Watch until cancelled."""
        before = 0.0
        watched: Load | None = None
        while True:
            await trio.sleep(LOOK_SECONDS)
            load = self._loads.recent[-1] if self._loads.recent else None
            if load is None or load.first_token or time.monotonic() - load.began > GIVE_UP_SECONDS:
                continue
            now = await trio.to_thread.run_sync(self._ask, abandon_on_cancel=True)
            if now is None:
                continue
            if now > before and load is watched:
                load.first_token = time.monotonic()
            before, watched = now, load  # what an engine had generated before this load is not its first token

    def _ask(self) -> float | None:
        """Return the engine's count: 0 while it has not started, ``None`` if it cannot be had now."""
        try:
            until, page = time.monotonic() + _TIMEOUT_SECONDS, b""
            with _opener.open(self._url, timeout=_TIMEOUT_SECONDS) as answer:
                while len(page) < _LIMIT_BYTES and time.monotonic() < until and (part := answer.read1(_PART_BYTES)):
                    page += part
            return tokens(page)
        except (OSError, HTTPException, ValueError) as error:
            log.debug("the engine's metrics cannot be read: %s", error)
            return 0.0 if isinstance(getattr(error, "reason", error), ConnectionRefusedError) else None
