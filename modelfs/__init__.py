"""modelfs: model weights from object storage as a read-only directory."""

__version__ = "0.1.0"
