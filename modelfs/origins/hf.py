"""The Hugging Face Hub, through huggingface_hub: its API for listings and tokens, plain ranged GETs for bytes.

A revision is resolved to a commit by every listing; the bytes are read at the commit that was listed. A version is
the file's SHA-256 where it is kept as LFS or Xet, its git blob id otherwise: what a new commit leaves alone stays in
the cache. The token comes from huggingface_hub's own chain (HF_TOKEN, or a login). Threads: any.
"""

import functools
import importlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import HfApi, RepoFile, constants, hf_hub_url, set_client_factory
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from modelfs.chunks import ObjectId, ObjectInfo
from modelfs.config import OriginConfig
from modelfs.digests import Digest
from modelfs.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    EndpointUnreachableError,
    ObjectChangedError,
    ObjectNotFoundError,
    OriginError,
    TransientOriginError,
)
from modelfs.origins import Count
from modelfs.origins.web import HttpOrigin, StatusError
from modelfs.source import Source

ANSWER_SECONDS = 30.0
_MEND = "set HF_TOKEN, and accept the repository's conditions on its page if it is gated"


@functools.cache
def _limit_waits() -> None:
    """Give the library's HTTP client a deadline: its own has none."""
    client = importlib.import_module(HTTPError.__module__.partition(".")[0]).Client  # httpx, or what follows it
    set_client_factory(lambda: client(follow_redirects=True, timeout=ANSWER_SECONDS))


class HubOrigin(HttpOrigin):
    """One repository at one revision."""

    def __init__(self, *, source: Source, config: OriginConfig, count: Count) -> None:
        super().__init__(count, _MEND)
        kind, _, rest = source.bucket.partition("/")
        types = {"models": "model", "datasets": "dataset", "spaces": "space"}
        known = kind in types and "/" in rest
        self._type, self._repository = (types[kind], rest) if known else ("model", source.bucket)
        self._revision = source.revision or "main"
        self._token: bool | None = False if config.no_sign_request else None
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        _limit_waits()
        self._api = HfApi(endpoint=self._endpoint, token=self._token, library_name="modelfs")
        custom = "" if self._endpoint == "https://huggingface.co" else f"@{self._endpoint}"
        self.name = f"hf://{source.bucket}{custom}"

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the files of the commit that the revision means now; see ``Origin.list``."""
        commit, modified = self._persist(self._resolve, prefix)

        def tree(_: object) -> list[RepoFile]:
            self._count("requests", "list", 1)
            found = self._api.list_repo_tree(self._repository, recursive=True, revision=commit, repo_type=self._type)
            return [entry for entry in found if isinstance(entry, RepoFile)]

        for file in self._persist(tree, prefix):
            if file.path.startswith(prefix):
                version = file.lfs.sha256 if file.lfs else file.blob_id
                yield ObjectInfo(ObjectId(self.name, file.path, version), file.size, modified, commit)

    def _resolve(self, _: object) -> tuple[str, int]:
        """Return the commit of the revision, and the time of the repository's last change in ns."""
        self._count("requests", "list", 1)
        found: Any = self._api.repo_info(
            self._repository, revision=self._revision, repo_type=self._type, timeout=ANSWER_SECONDS
        )
        modified = found.last_modified
        return str(found.sha), int(modified.timestamp()) * 10**9 if modified else 0

    def get_small(self, key: str, limit: int) -> bytes | None:
        """See ``Origin.get_small``."""
        url, headers = self._url(key, self._revision), self._headers()
        try:
            return self._persist(lambda _: self._text(url, headers, limit), key)
        except ObjectNotFoundError:
            return None

    def digest(self, info: ObjectInfo) -> Digest | None:
        """See ``Origin.digest``: the version is the SHA-256 of large files."""
        large = re.fullmatch("[0-9a-f]{64}", info.id.version)
        return Digest("sha256", info.id.version, "the Hub") if large else None

    def _address(self, info: ObjectInfo) -> tuple[str, dict[str, str]]:
        return self._url(info.id.key, info.locator or self._revision), self._headers()

    def _url(self, key: str, revision: str) -> str:
        return str(hf_hub_url(self._repository, key, repo_type=self._type, revision=revision, endpoint=self._endpoint))

    def _headers(self) -> dict[str, str]:
        return dict(build_hf_headers(token=self._token, library_name="modelfs"))

    def _check_version(self, info: ObjectInfo, headers: Mapping[str, str]) -> None:
        # Where the bytes lie in the end, ETags are another store's.
        tag = headers.get("X-Linked-ETag") or (headers.get("ETag") if "X-Repo-Commit" in headers else None)
        if tag is not None and tag.removeprefix("W/").strip('"') != info.id.version:
            raise ObjectChangedError(f"{self._where(info.id.key)} was overwritten", "open it again")

    def _where(self, key: str) -> str:
        return f"hf://{self._repository}@{self._revision}/{key}"

    def _translate(self, error: Exception, key: str) -> OriginError:
        repository = f"repository '{self._repository}'"
        if isinstance(error, GatedRepoError):
            return AccessDeniedError(f"{repository} is gated", _MEND)
        if isinstance(error, RepositoryNotFoundError):
            return BucketNotFoundError(
                f"{repository} does not exist, or is private", "check the name; for a private one set HF_TOKEN"
            )
        if isinstance(error, RevisionNotFoundError):
            return ObjectNotFoundError(f"{repository} has no revision '{self._revision}'", "check what follows the @")
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return super()._translate(StatusError(error.response.status_code, "", {}), key)
        if isinstance(error, HTTPError):  # of httpx: no answer, or a broken one
            if "Connect" in type(error).__name__:
                return EndpointUnreachableError(
                    f"cannot connect to {self._endpoint}", "check the network and HF_ENDPOINT"
                )
            return TransientOriginError(f"the connection to {self._endpoint} broke")
        if isinstance(error, OfflineModeIsEnabled):
            return OriginError("HF_HUB_OFFLINE forbids asking the Hub", "unset it for modelfs")
        return super()._translate(error, key)
