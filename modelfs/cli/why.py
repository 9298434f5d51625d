"""``modelfs why``: where the time of the last load went, and what to change."""

import argparse
import json
from pathlib import Path
from typing import Any

from modelfs.cli.client import locate, status_of
from modelfs.cli.progress import human_bytes
from modelfs.errors import ConfigError, ObjectNotFoundError
from modelfs.fuse.tuning import mounts

_NOTABLE = 0.1
"""Least share of a load that is worth advice."""
_SLOW_SHARE = 0.6
"""Below this part of the network card's rate the card is not the limit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path", nargs="?", metavar="PATH", help="a mountpoint or a model in it (default: the one mount)"
    )
    parser.add_argument("--json", action="store_true", help="the figures as the daemon has them")


def run(arguments: argparse.Namespace) -> int:
    """Explain the last load of a model.

    Raises:
        ConfigError: Several mounts, and none named.
        ObjectNotFoundError: Nothing has been loaded yet.
    """
    if arguments.path:
        mount, inside = locate(arguments.path)
    else:
        found = mounts()
        if len(found) != 1:
            raise ConfigError(f"{len(found)} modelfs mounts", "name one: modelfs why MOUNTPOINT")
        mount, inside = found[0], ""
    status = status_of(mount)
    loads = [load for load in status["loads"] if f"{load['model']}/".startswith(f"{inside}/" if inside else "")]
    if not loads:
        raise ObjectNotFoundError(
            f"no model under {arguments.path or mount.mountpoint} has been loaded yet", "open one"
        )
    print(json.dumps(loads[-1]) if arguments.json else explain(status, loads[-1], card_rate()))
    return 0


def explain(status: dict[str, Any], load: dict[str, Any], card: float) -> str:
    """Return a few lines for people.

    Args:
        status: The daemon's status document.
        load: One of its loads.
        card: Bytes per second of the fastest network card, 0 if unknown.
    """
    began, last = load["first_open_seconds"], load["last_read_seconds"]
    whole = max(last - began, 0.001)
    waits = load["waited_seconds"]
    rest = max(0.0, whole - sum(waits.values()))
    fetch = status["fetch"]
    rate = fetch["received_bytes"] / fetch["busy_seconds"] if fetch["busy_seconds"] else 0.0
    of_card = f" of the {human_bytes(card)}/s of the network card" if card else ""
    download = f"{human_bytes(fetch['received_bytes'])} came at {human_bytes(rate)}/s{of_card}" if rate else "nothing"
    opens = load["opens"]
    lines = [
        f"{status['mountpoint']}/{load['model']}".rstrip("/") + f": weights of {human_bytes(load['size'])}",
        f"  {status['ready_seconds']:7.2f} s  the mount answered",
        f"  {began:7.2f} s  first file opened",
    ]
    if load["first_weights_seconds"] is not None:
        lines.append(f"  {load['first_weights_seconds']:7.2f} s  first weight file opened")
    unseen = f"{opens['passthrough']} of {sum(opens.values())} opens of weights were complete files"
    shares = {cause: seconds / whole for cause, seconds in waits.items()}
    lines += [
        f"  {last:7.2f} s  last open or read seen here ({unseen}, which the kernel reads without us)",
        *([f"  {first:7.2f} s  first token, says the engine"] if (first := load["first_token_seconds"]) else []),
        f"of the {whole:.2f} s from the first open to the last read:",
        f"  {waits['origin']:7.2f} s {shares['origin']:5.0%}  waiting for the bucket ({download})",
        f"  {waits['store']:7.2f} s {shares['store']:5.0%}  reading the cache disk",
        f"  {rest:7.2f} s {rest / whole:5.0%}  the engine's own work, and files read without us",
    ]
    return "\n".join([*lines, *(f"- {line}" for line in advice(status, shares, rate, card))])


def advice(status: dict[str, Any], shares: dict[str, float], rate: float, card: float) -> list[str]:
    """Return what to change, the weightiest first.

    Args:
        status: The daemon's status document.
        shares: Parts of the load's time that were spent waiting, by cause.
        rate: Bytes per second of the download.
        card: See ``explain``.
    """
    origin, store = shares["origin"], shares["store"]
    found = []
    if origin > _NOTABLE and status["prefetch"] == "off":
        found.append("nothing is downloaded before it is read: mount without --prefetch off")
    elif origin > _NOTABLE:
        if card and rate > _SLOW_SHARE * card:
            found.append(
                "the network card was the limit: keep the model on the node (modelfs warm, a larger --cache-size)"
            )
        else:
            found.append(
                "the download was behind the engine: mount earlier, keep the cache between starts, or modelfs warm"
            )
    if status["origin"]["errors"]:
        found.append(f"{status['origin']['errors']} requests to the bucket failed and were repeated: see the log")
    if any(status["cache"]["skipped_chunks"].values()):
        found.append("chunks were served but not kept: the cache is too small or its disk too slow; see modelfs doctor")
    if store > _NOTABLE:
        found.append("the cache disk was waited for: put --cache-dir on a faster one")
    hints = status["kernel"]["hints"] if origin + store > _NOTABLE else []
    return found + hints


def card_rate() -> float:
    """Return the bytes per second of the fastest network card that is up; 0 if no driver says."""
    fastest = 0
    for path in Path("/sys/class/net").glob("*/speed"):
        try:
            fastest = max(fastest, int(path.read_text()))  # Mbit/s; -1 or an error where it is unknown
        except (OSError, ValueError):
            continue
    return fastest * 1e6 / 8
