"""Every metric's name, kind, labels and help, in one table; nothing here knows who increments.

Names are ``modelfs_<area>_<thing>_<unit>[_total]`` in base units. Labels have closed sets of values:
never a key, a path or a bucket. One process has one ``Metrics``; tests make their own.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The daemon's metrics on a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=self.registry, buckets=_LATENCY_BUCKETS)

        self.fuse_requests = counter("modelfs_fuse_requests", "FUSE requests answered by the front.", "op")
        self.fuse_errors = counter("modelfs_fuse_errors", "FUSE requests answered with an error.", "op", "errno")
        self.fuse_opens = counter("modelfs_fuse_opens", "Opens of files.", "mode")
        self.read_bytes = counter("modelfs_read_bytes", "Bytes given to readers, by where they lay.", "tier")
        self.reads = counter("modelfs_reads", "READ requests, by the slowest place they waited for.", "tier")
        self.read_wait = seconds("modelfs_read_wait_seconds", "Time a READ waited for bytes not yet local.")
        self.origin_bytes = counter("modelfs_origin_bytes", "Body bytes received, by kind of place.", "scheme")
        self.origin_requests = counter("modelfs_origin_requests", "Requests to the object store.", "op")
        self.origin_errors = counter("modelfs_origin_errors", "Failed requests to the object store.", "kind")
        self.origin_resumes = counter("modelfs_origin_resumes", "Broken bodies resumed at the byte reached.")
        self.fallback_runs = counter(
            "modelfs_fallback_runs", "Downloads that a source's second place was needed for.", "result"
        )
        self.fetch_active = gauge("modelfs_fetch_active_count", "Downloads running now.")
        self.fetch_joined = counter("modelfs_fetch_joined", "Waits that joined a running download.")
        self.fetch_hedged = counter("modelfs_fetch_hedged", "Downloads begun beside one that was late.")
        self.buffer_bytes = gauge("modelfs_buffer_bytes", "Download buffers in use.")
        self.store_bytes = gauge("modelfs_store_resident_bytes", "Bytes in the local store.")
        self.store_limit = gauge("modelfs_store_limit_bytes", "Largest allowed size of the local store.")
        self.store_evicted = counter("modelfs_store_evicted_bytes", "Bytes evicted from the local store.", "reason")
        self.store_skipped = counter(
            "modelfs_store_skipped_chunks", "Fetched chunks that were served but not kept.", "reason"
        )
        self.store_corrupt = counter("modelfs_store_corrupt_chunks", "Stored chunks whose checksum failed.")
        self.verified_files = counter(
            "modelfs_verified_files", "Files hashed, by what came of it; refetched ones are hashed again.", "result"
        )
        self.tree_files = gauge("modelfs_tree_files_count", "Files in the mount.")
        self.tree_skipped = gauge("modelfs_tree_skipped_keys_count", "Keys not shown as files.", "reason")
        self.tree_refreshes = counter("modelfs_tree_refreshes", "Listings taken.", "result")
        self.prefetch_bytes = counter("modelfs_prefetch_bytes", "Bytes downloaded ahead of any reader.")
        self.pages_loaded = counter(
            "modelfs_pages_loaded_bytes", "Bytes of files read into the page cache ahead of use."
        )
        self.worker_starts = gauge("modelfs_worker_starts_count", "How often the worker has been started.")

    def origin_counter(self, scheme: str) -> Callable[[str, str, int], None]:
        """Return what takes the counts of one place; see ``origins.Count``."""

        def count(what: str, kind: str, amount: int) -> None:
            if what == "requests":
                self.origin_requests.labels(op=kind).inc(amount)
            elif what == "errors":
                self.origin_errors.labels(kind=kind).inc(amount)
            elif what == "resumes":
                self.origin_resumes.inc(amount)
            else:
                self.origin_bytes.labels(scheme=scheme).inc(amount)

        return count
