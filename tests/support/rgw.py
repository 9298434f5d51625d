"""Ceph RGW on loopback: one monitor, one in-memory OSD, one gateway; up in about a second.

A real S3 implementation. Faster than a production cluster (memory store, no message checksums).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from modelfs.cli.embedded import ObjectStore, await_http, free_port

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph-authtool", "ceph")
ACCESS_KEY, SECRET_KEY = "AKRGWTEST", "SKRGWTESTSECRET"
_QUICK_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
    "MALLOC_ARENA_MAX": "4",
}


def _settings(home: Path, fsid: str, mon_port: int) -> str:
    common = {
        "fsid": fsid,
        "mon_host": f"[v2:127.0.0.1:{mon_port}]",
        "public_addr": "127.0.0.1",
        "cluster_addr": "127.0.0.1",
        "auth_cluster_required": "cephx",
        "auth_service_required": "cephx",
        "auth_client_required": "cephx",
        "cephx_sign_messages": "false",
        "keyring": home / "keyring",
        "ms_crc_data": "false",
        "run_dir": home / "run",
        "admin_socket": home / "run" / "$name.asok",
        "log_file": home / "$name.log",
        "pid_file": home / "$name.pid",
        "osd_pool_default_size": 1,
        "osd_pool_default_min_size": 1,
        "osd_pool_default_pg_num": 4,
        "osd_pool_default_pgp_num": 4,
        "osd_pool_default_pg_autoscale_mode": "off",
        "rgw_rados_pool_pg_num_min": 4,
        "rgw_rados_pool_autoscale_bias": 1,
        "mon_allow_pool_size_one": "true",
        "mon_max_pg_per_osd": 1000,
        "osd_crush_chooseleaf_type": 0,
        "paxos_propose_interval": 0.02,
        "paxos_min_wait": 0.01,
        **{f"debug_{part}": "0/0" for part in ("ms", "osd", "rgw", "mon", "paxos", "objecter", "memstore")},
    }
    sections = {
        "global": common,
        "mon": {"mon_data": home / "mon", "mon_data_avail_crit": 1, "mon_data_avail_warn": 2},
        "osd": {
            "osd_data": home / "osd",
            "osd_objectstore": "memstore",
            "memstore_device_bytes": 12 * 2**30,
            "memstore_page_size": 65536,
            "osd_tick_interval": 0.2,
            "osd_op_num_shards": 2,
            "osd_op_num_threads_per_shard": 1,
        },
        "client.rgw": {
            "rgw_thread_pool_size": 64,
            "rgw_enable_usage_log": "false",
            "rgw_enable_ops_log": "false",
            "rgw_dns_name": "localhost",
            "rgw_run_sync_thread": "false",
        },
    }
    return "".join(
        f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in section.items())
        for name, section in sections.items()
    )


class Rgw:
    """A small cluster in a directory of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self.store = ObjectStore(f"http://127.0.0.1:{self.port}", ACCESS_KEY, SECRET_KEY)

    def _run(self, *command: str, text: str | None = None) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **_QUICK_MALLOC},
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr[-500:]}")
        return done.stdout

    def start(self) -> None:
        home, fsid = self.home, str(uuid.uuid4())
        for name in ("mon", "osd", "run"):
            (home / name).mkdir()
        mon_port = free_port()
        (home / "ceph.conf").write_text(_settings(home, fsid, mon_port))
        conf, keyring, monmap = (str(home / name) for name in ("ceph.conf", "keyring", "monmap"))
        self._run(
            "monmaptool", "--create", "--clobber", "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", "--fsid", fsid, monmap
        )
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        for name in ("client.admin", "client.rgw"):
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *everything)
        osd_caps = ("--cap", "mon", "allow profile osd", "--cap", "osd", "allow *", "--cap", "mgr", "allow profile osd")
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "osd.0", *osd_caps)
        owner = ("--setuser", "root", "--setgroup", "root") if os.geteuid() == 0 else ()
        self._run("ceph-mon", "-c", conf, "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._run("ceph-mon", "-c", conf, "-i", "a", *owner)
        secret = self._run("ceph-authtool", "-p", "-n", "osd.0", keyring).strip()
        osd = str(uuid.uuid4())
        self._run("ceph", "-c", conf, "osd", "new", osd, "-i", "-", text=f'{{"cephx_secret": "{secret}"}}')
        self._run("ceph-osd", "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._run("ceph-osd", "-c", conf, "-i", "0")
        self.start_gateway()
        self._run(
            "radosgw-admin", "-c", conf, "-n", "client.rgw", "user", "create", "--uid=test", "--display-name=test",
            f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}",
        )  # fmt: skip

    def start_gateway(self, certificate: Path | None = None, **environment: str) -> None:
        """Start radosgw alone; the objects stay in the OSD. With a ``certificate`` (and key) it speaks TLS."""
        owner = ("--setuser", "root", "--setgroup", "root") if os.geteuid() == 0 else ()
        plain, tls = (
            f"endpoint=127.0.0.1:{self.port}",
            f"ssl_endpoint=127.0.0.1:{self.port} ssl_certificate={certificate}",
        )
        front = f"--rgw-frontends=beast {tls if certificate else plain} tcp_nodelay=1"
        self.store = dataclasses.replace(
            self.store, endpoint_url=f"http{'s' if certificate else ''}://127.0.0.1:{self.port}"
        )
        command = ["radosgw", "-c", str(self.home / "ceph.conf"), "-n", "client.rgw", front, *owner]
        subprocess.run(
            command, check=True, timeout=60, capture_output=True, env={**os.environ, **_QUICK_MALLOC, **environment}
        )
        await_http(self.store.endpoint_url)

    def counters(self) -> dict[str, int]:
        """Return the gateway's own counts of requests and bytes."""
        document = self._run("ceph", "--admin-daemon", str(self.home / "run/client.rgw.asok"), "perf", "dump", "rgw")
        counts: dict[str, int] = json.loads(document)["rgw"]
        return counts

    def pids(self) -> list[int]:
        found = []
        for name in ("client.rgw", "osd.0", "mon.a"):
            with contextlib.suppress(OSError, ValueError):
                found.append(int((self.home / f"{name}.pid").read_text()))
        return found

    def stop_gateway(self) -> None:
        _end([int((self.home / "client.rgw.pid").read_text())])

    def stop(self) -> None:
        _end(self.pids())


def _end(pids: list[int]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(_alive(pid) for pid in pids):
            time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def rgw() -> Iterator[Rgw]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} missing: run make test, which installs radosgw, ceph-osd and ceph-mon"
        )
    home = Path(tempfile.mkdtemp(prefix="mfs-rgw-"))
    server = Rgw(home)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
