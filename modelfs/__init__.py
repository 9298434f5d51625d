"""modelfs: model weights from object storage as a read-only directory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelfs.cache import CachedModel, CacheStats, ModelCache

__version__ = "0.1.0"
__all__ = ["CacheStats", "CachedModel", "ModelCache", "__version__"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module has
    """Import the Python interface when it is asked for: a start of the daemon is imports."""
    if name in {"CacheStats", "CachedModel", "ModelCache"}:
        from modelfs import cache  # noqa: PLC0415

        return getattr(cache, name)
    raise AttributeError(f"module 'modelfs' has no attribute '{name}'")
