"""The exception tree: one place that says what an error means to a reader, a script and a person.

Every class carries three facts: ``errno`` (what a file operation on the mount returns), ``exit_code``
(what a command exits with; the list stands in README.md) and ``retryable`` (whether the same request
may succeed a moment later). Messages are one line: what happened, to which thing, then the mend.
Nothing here knows who raises or who catches.
"""

import errno
from typing import ClassVar


class ModelfsError(Exception):
    """Base of all domain errors.

    Args:
        what: What happened and to which bucket, key, path or option; no secrets.
        mend: What the person can do about it; may be empty.
    """

    errno: ClassVar[int] = errno.EIO
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what, mend)
        self.what = what
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.what}: {self.mend}" if self.mend else self.what


class ConfigError(ModelfsError):
    """A bad option, environment variable or configuration file."""

    errno = errno.EINVAL
    exit_code = 2


class OriginError(ModelfsError):
    """The object store did not give what was asked for."""

    exit_code = 5


class BucketNotFoundError(OriginError):
    """The bucket does not exist at this endpoint."""

    errno = errno.ENOENT
    exit_code = 3


class ObjectNotFoundError(OriginError):
    """The object, or everything under the prefix, does not exist (any more)."""

    errno = errno.ENOENT
    exit_code = 3


class ObjectChangedError(OriginError):
    """The object has another version now than the one that was listed."""

    errno = errno.ESTALE
    exit_code = 3


class AccessDeniedError(OriginError):
    """The store refused these credentials."""

    errno = errno.EACCES
    exit_code = 4


class NoCredentialsError(OriginError):
    """The credential chain ended without credentials."""

    errno = errno.EACCES
    exit_code = 4


class WrongRegionError(OriginError):
    """The bucket lives in another region."""

    exit_code = 4


class EndpointUnreachableError(OriginError):
    """No connection to the endpoint."""

    exit_code = 5
    retryable = True


class TransientOriginError(OriginError):
    """A fault that usually passes: 5xx, a reset, a body that ended early, no progress."""

    retryable = True


class ThrottledError(TransientOriginError):
    """The store asks for fewer requests (503 SlowDown, 429)."""


class ReadTimeoutError(ModelfsError):
    """A read got no byte for longer than its deadline."""

    errno = errno.EIO
    exit_code = 9


class MountpointError(ModelfsError):
    """The mountpoint is missing, not empty, busy or not ours."""

    exit_code = 6


class FuseUnavailableError(ModelfsError):
    """/dev/fuse or the mount helper is missing or forbidden."""

    exit_code = 7


class CacheError(ModelfsError):
    """The cache directory cannot be used."""

    exit_code = 8


class CacheBusyError(CacheError):
    """Another process is using the cache directory."""


class IntegrityError(ModelfsError):
    """A file's bytes are not those that its publisher has signed for."""

    exit_code = 10


class NotReadyError(ModelfsError):
    """A ``wait`` or ``warm`` ended before the files were local."""

    exit_code = 9


class DaemonUnreachableError(ModelfsError):
    """No modelfs daemon answers for this path."""

    exit_code = 6
