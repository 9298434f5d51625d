"""Writing to S3: whole files in one request or in parts, each with its MD5, what has arrived before left as it is.

A file is recognised by its SHA-256 in the object's metadata; parts of an upload that was broken off by their MD5s.
Threads: any.
"""

import base64
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from modelfs.chunks import MIB
from modelfs.errors import ConfigError, ObjectNotFoundError, OriginError
from modelfs.origins.s3 import S3Origin

PART_BYTES = 16 * MIB
MAX_PARTS = 10_000
"""S3's limit, and the default size of a part, in bytes."""
PARTS_AT_ONCE = 4
"""Of one file: what is read ahead of the network, and held in memory."""
SUM_KEY = "sha256"
"""The name of a file's SHA-256 in the object's metadata."""

Sent = Callable[[int, bool], None]
"""Takes bytes that are there now, and whether they had to be sent."""


class S3Target(S3Origin):
    """One bucket to write to; see ``S3Origin``."""

    def find(self, key: str) -> dict[str, Any] | None:
        """Return what the store says of an object, or ``None`` if there is none."""
        try:
            return self._persist(lambda client: self._call(client, "head_object", "head", Key=key), key)
        except ObjectNotFoundError:
            return None

    def delete(self, key: str) -> None:
        """Remove an object, there or not."""
        self._persist(lambda client: self._call(client, "delete_object", "delete", Key=key), key)

    def send(self, key: str, path: Path, sha256: str, pool: ThreadPoolExecutor, sent: Sent) -> None:
        """Write a file, unless the object is it already.

        Args:
            key: The object.
            path: The file; it must not change meanwhile.
            sha256: Its digest, in hex.
            pool: Sends parts.
            sent: Told of every part.

        Raises:
            ConfigError: The file has changed since it was hashed.
            OriginError: It could not be written.
        """
        size = path.stat().st_size
        found = self.find(key)
        if found is not None and found["ContentLength"] == size and found.get("Metadata", {}).get(SUM_KEY) == sha256:
            sent(size, False)
            return
        if size <= PART_BYTES:
            data = path.read_bytes()
            _check_same(path, sha256, hashlib.sha256(data).hexdigest())
            self._persist(
                lambda client: self._call(
                    client, "put_object", "put", Key=key, Body=data, ContentMD5=_md5(data), Metadata={SUM_KEY: sha256}
                ),
                key,
            )
            sent(size, True)
            return
        self._send_parts(key, path, sha256, pool, sent, resume=True)
        made = self.find(key)
        if made is not None and made.get("Metadata", {}).get(SUM_KEY) != sha256:
            # What was broken off was an upload of other bytes, and its metadata are theirs.
            self._send_parts(key, path, sha256, pool, lambda count, was_sent: None, resume=False)

    def _call(self, client: Any, operation: str, word: str, **arguments: object) -> dict[str, Any]:  # noqa: ANN401
        self._count("requests", word, 1)
        answer: dict[str, Any] = getattr(client, operation)(Bucket=self._bucket, **arguments)
        return answer

    # -- in parts -----------------------------------------------------------------------------------

    def _send_parts(
        self, key: str, path: Path, sha256: str, pool: ThreadPoolExecutor, sent: Sent, *, resume: bool
    ) -> None:
        size = path.stat().st_size
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS // MIB) * MIB)
        upload, there = self._begin(key, sha256, part_bytes, resume=resume)
        done: dict[int, str] = {}
        running: set[Future[tuple[int, str, int]]] = set()
        hasher = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            for number, start in enumerate(range(0, size, part_bytes), 1):
                data = os.pread(file.fileno(), part_bytes, start)
                hasher.update(data)
                tag = hashlib.md5(data, usedforsecurity=False).hexdigest()
                if there.get(number) == (len(data), tag):
                    done[number] = tag
                    sent(len(data), False)
                    continue
                running.add(pool.submit(self._send_part, key, upload, number, data))
                running = self._collect(running, done, sent, PARTS_AT_ONCE - 1)
        self._collect(running, done, sent, 0)
        _check_same(path, sha256, hasher.hexdigest())
        parts = [{"PartNumber": number, "ETag": f'"{tag}"'} for number, tag in sorted(done.items())]
        self._persist(
            lambda client: self._call(
                client, "complete_multipart_upload", "put", Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
            ),
            key,
        )

    def _collect(
        self, running: set[Future[tuple[int, str, int]]], done: dict[int, str], sent: Sent, most: int
    ) -> set[Future[tuple[int, str, int]]]:
        """Wait until at most ``most`` parts are on their way; return these."""
        while len(running) > most:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for one in ended:
                number, tag, count = one.result()
                done[number] = tag
                sent(count, True)
        return running

    def _send_part(self, key: str, upload: str, number: int, data: bytes) -> tuple[int, str, int]:
        answer = self._persist(
            lambda client: self._call(
                client,
                "upload_part",
                "put",
                Key=key,
                UploadId=upload,
                PartNumber=number,
                Body=data,
                ContentMD5=_md5(data),
            ),
            key,
        )
        return number, str(answer["ETag"]).strip('"'), len(data)

    def _begin(self, key: str, sha256: str, part_bytes: int, *, resume: bool) -> tuple[str, dict[int, tuple[int, str]]]:
        """Return an upload of this file and its parts that have arrived; others of this key are given up."""
        for upload in list(self._uploads(key)):
            there = dict(self._parts(key, upload))
            regular = all(size == part_bytes for number, (size, _) in there.items() if number < max(there))
            if resume and regular and there:
                return upload, there
            self._persist(
                lambda client, upload=upload: self._call(  # type: ignore[misc]
                    client, "abort_multipart_upload", "delete", Key=key, UploadId=upload
                ),
                key,
            )
        made = self._persist(
            lambda client: self._call(client, "create_multipart_upload", "put", Key=key, Metadata={SUM_KEY: sha256}),
            key,
        )
        return str(made["UploadId"]), {}

    def _uploads(self, key: str) -> Iterator[str]:
        try:
            page = self._persist(lambda client: self._call(client, "list_multipart_uploads", "list", Prefix=key), key)
        except OriginError:
            return  # a store that cannot tell
        for upload in page.get("Uploads", ()):
            if upload["Key"] == key:
                yield upload["UploadId"]

    def _parts(self, key: str, upload: str) -> Iterator[tuple[int, tuple[int, str]]]:
        marker = 0
        while True:
            page = self._persist(
                lambda client, marker=marker: self._call(  # type: ignore[misc]
                    client, "list_parts", "list", Key=key, UploadId=upload, PartNumberMarker=marker
                ),
                key,
            )
            for part in page.get("Parts", ()):
                yield part["PartNumber"], (part["Size"], str(part["ETag"]).strip('"'))
            marker = page.get("NextPartNumberMarker", 0)
            if not page.get("IsTruncated") or not marker:
                return


def _check_same(path: Path, expected: str, found: str) -> None:
    if found != expected:
        raise ConfigError(f"{path} has changed while it was being sent", "push it again when nobody writes to it")


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
