"""The table and the plots of bench/ttft, from its JSON record."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

Document = dict[str, Any]


def _groups(document: Document) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in document["records"]:
        groups.setdefault((record["engine"], record["shape"]), {})[record["contender"]] = record
    return groups


def _median(record: dict[str, Any] | None, name: str = "ttft_seconds") -> float | None:
    return statistics.median(record[name]) if record and record[name] else None


def markdown(document: Document) -> str:
    """Return one table per engine and shape: medians, range, and the ratio to the local disk."""
    lines = [
        f"{document['machine']}; {', '.join(document['devices'])}; {document['runs']} runs, medians (least to most)",
        "",
    ]
    lines += [f"- {name}: {text}" for name, text in document["contenders"].items()]
    lines += [f"- shape {name}: {text}" for name, text in document["shapes"].items()]
    for (engine, shape), records in _groups(document).items():
        local = _median(records.get("local"))
        lines += [
            "",
            f"### {engine}, {shape}",
            "",
            "| | TTFT, s | of which before the engine, s | ÷ local disk |",
            "|---|---|---|---|",
        ]
        for name, record in records.items():
            times = record["ttft_seconds"]
            middle = statistics.median(times)
            ratio = f"{middle / local:.2f}" if local else ""
            span = f"{middle:.2f} ({min(times):.2f} to {max(times):.2f})"
            lines.append(f"| {name} | {span} | {statistics.median(record['start_seconds']):.2f} | {ratio} |")
    return "\n".join(lines) + "\n"


def plots(document: Document, output: Path) -> None:
    """Write ttft.png (bars) and, where runs were watched, timeline.png (bytes over time)."""
    groups = _groups(document)
    figure, axes = plt.subplots(len(groups), 1, figsize=(8, 2.6 * len(groups)), squeeze=False)
    for axis, ((engine, shape), records) in zip(axes[:, 0], groups.items(), strict=True):
        names = list(records)
        before = [_median(records[name], "start_seconds") or 0 for name in names]
        after = [(_median(records[name]) or 0) - start for name, start in zip(names, before, strict=True)]
        axis.barh(names, before, color="#d97706", label="before the engine")
        axis.barh(names, after, left=before, color="#2563eb", label="engine, to the first token")
        local = _median(records.get("local"))
        if local:
            axis.axvline(local, color="black", linewidth=0.8, linestyle=":")
        axis.invert_yaxis()
        axis.set_title(f"{engine}, {shape}: {document['shapes'][shape]}", fontsize=9)
        axis.set_xlabel("seconds", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(output / "ttft.png", dpi=110)
    plt.close(figure)
    if document["timelines"]:
        _timelines(document["timelines"], output)


def _timelines(timelines: dict[str, list[dict[str, float]]], output: Path) -> None:
    figure, axes = plt.subplots(len(timelines), 1, figsize=(8, 2.6 * len(timelines)), squeeze=False)
    for axis, (title, samples) in zip(axes[:, 0], timelines.items(), strict=True):
        seconds = [sample["seconds"] for sample in samples]
        for name, color in (("origin", "#d97706"), ("resident", "#059669"), ("engine", "#2563eb")):
            label = {
                "origin": "received from the origin",
                "resident": "on the local disk",
                "engine": "engine's memory",
            }[name]
            axis.plot(seconds, [sample[name] / 1e9 for sample in samples], color=color, label=label)
        if samples:
            axis.axvline(samples[0]["first_token"], color="black", linewidth=0.8, linestyle=":")
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("GB", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0, 0].legend(fontsize=7)
    axes[-1, 0].set_xlabel("seconds since the first command", fontsize=8)
    figure.tight_layout()
    figure.savefig(output / "timeline.png", dpi=110)
    plt.close(figure)
