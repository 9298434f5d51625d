"""What processes cost: CPU seconds and peak memory, a contender's daemon with all its children together."""

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def daemon_pids(word: str) -> list[int]:
    """Return the processes whose command line contains ``word``, and their descendants; without ourselves."""
    children: dict[int, list[int]] = {}
    named = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
        if word.encode() in command and int(entry.name) != os.getpid():
            named.append(int(entry.name))
    found: list[int] = []
    while named:
        pid = named.pop()
        if pid not in found:
            found.append(pid)
            named += children.get(pid, [])
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Return user and system time of processes that run, in all their threads."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def peak_mib(pids: list[int]) -> float:
    """Return the sum of the processes' largest resident sets so far."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
    return total / 1024
