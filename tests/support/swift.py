"""OpenStack Swift with its S3 interface on loopback: one of each server, one device; up in some seconds.

Another code base than Ceph's: for correctness, not for speed. From Debian: swift-proxy swift-account swift-container
swift-object memcached.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from modelfs.cli.embedded import ObjectStore, await_http, free_port
from tests.support.places import running

USER, SECRET = "AKSWIFT", "SKSWIFTTESTSECRET"
KINDS = ("account", "container", "object")
PIPELINE = (
    "catch_errors gatekeeper proxy-logging cache listing_formats bulk tempurl s3api tempauth copy dlo slo symlink "
    "proxy-logging proxy-server"
)
FILTERS = {
    "catch_errors": "catch_errors", "gatekeeper": "gatekeeper", "proxy-logging": "proxy_logging", "cache": "memcache",
    "listing_formats": "listing_formats", "bulk": "bulk", "tempurl": "tempurl", "s3api": "s3api",
    "tempauth": "tempauth", "copy": "copy", "dlo": "dlo", "slo": "slo", "symlink": "symlink",
}  # fmt: skip


def _ini(**sections: dict[str, object]) -> str:
    return "".join(
        f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in section.items())
        for name, section in sections.items()
    )


def _write_settings(home: Path, ports: dict[str, int]) -> None:
    etc = home / "etc"
    etc.mkdir(parents=True)
    (home / "dev" / "sdb1").mkdir(parents=True)
    common = {
        "bind_ip": "127.0.0.1", "workers": 1, "swift_dir": etc, "log_level": "WARNING",
        "user": os.environ.get("USER", "root"),
    }  # fmt: skip
    (etc / "swift.conf").write_text(
        _ini(**{
            "swift-hash": {"swift_hash_path_prefix": "a", "swift_hash_path_suffix": "b"},
            "storage-policy:0": {"name": "gold", "default": "yes"},
        })
    )  # fmt: skip
    for kind in KINDS:
        default = {
            **common,
            "devices": home / "dev",
            "mount_check": "false",
            "bind_port": ports[kind],
            "disable_fallocate": "true",
        }
        (etc / f"{kind}-server.conf").write_text(
            _ini(**{
                "DEFAULT": default, "pipeline:main": {"pipeline": f"{kind}-server"},
                f"app:{kind}-server": {"use": f"egg:swift#{kind}"},
            })
        )  # fmt: skip
        ring = f"{kind}.builder"
        place = (
            "--region",
            "1",
            "--zone",
            "1",
            "--ip",
            "127.0.0.1",
            "--port",
            str(ports[kind]),
            "--device",
            "sdb1",
            "--weight",
            "1",
        )
        for words in (("create", "4", "1", "1"), ("add", *place), ("rebalance",)):
            subprocess.run(["swift-ring-builder", ring, *words], cwd=etc, capture_output=True, check=False)
    special: dict[str, dict[str, object]] = {
        "cache": {"memcache_servers": f"127.0.0.1:{ports['memcache']}"},
        "s3api": {"s3_acl": "no", "location": "us-east-1", "check_bucket_owner": "no"},
        "tempauth": {f"user_{USER}_admin": f"{SECRET} .admin .reseller_admin"},
        "slo": {"rate_limit_after_segment": 100_000},
    }
    filters = {f"filter:{name}": {"use": f"egg:swift#{egg}", **special.get(name, {})} for name, egg in FILTERS.items()}
    (etc / "proxy-server.conf").write_text(
        _ini(**{
            "DEFAULT": {**common, "bind_port": ports["proxy"]},
            "pipeline:main": {"pipeline": PIPELINE},
            "app:proxy-server": {
                "use": "egg:swift#proxy", "allow_account_management": "true", "account_autocreate": "true"
            },
            **filters,
        })
    )  # fmt: skip


@contextlib.contextmanager
def swift(home: Path) -> Iterator[ObjectStore]:
    """Run Swift while in the block."""
    shutil.rmtree(home, ignore_errors=True)
    ports = {name: free_port() for name in (*KINDS, "proxy", "memcache")}
    _write_settings(home, ports)
    with contextlib.ExitStack() as stack:
        user = ("-u", "root") if os.geteuid() == 0 else ()
        stack.enter_context(running("memcached", "-l", "127.0.0.1", "-p", str(ports["memcache"]), "-m", "64", *user))
        for kind in (*KINDS, "proxy"):
            process = stack.enter_context(running(f"swift-{kind}-server", home / "etc" / f"{kind}-server.conf"))
        await_http(f"http://127.0.0.1:{ports['proxy']}/", process)
        yield ObjectStore(f"http://127.0.0.1:{ports['proxy']}", f"{USER}:admin", SECRET)
