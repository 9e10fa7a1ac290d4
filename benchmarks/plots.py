"""The plots of docs/performance.md, small SVG files that are the same for the same results."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

STYLE = {
    "svg.hashsalt": "strop",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
}
OURS, PEER = "#1f6f8b", "#b8b8b8"


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A white background, for dark pages.
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    # Path data has trailing spaces.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def _bars(axis, found: dict[str, float], unit: str, floor: float | None = None) -> None:
    names = list(reversed(found))
    colors = [OURS if name.startswith("Strop") else PEER for name in names]
    bars = axis.barh(names, [found[name] for name in names], color=colors, height=0.7)
    axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axis.margins(x=0.12)
    axis.set_xlabel(unit)
    if floor is not None:
        axis.axvline(floor, color="#c0392b", linewidth=1, linestyle="--")


def dpo(result: dict, folder: Path) -> Path | None:
    """Time and peak memory of the DPO loss, the floor as a dashed line."""
    cases = [case for case in result["cases"].values() if case["family"] == "dpo"]
    if not cases:
        return None
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(len(cases), 2, figsize=(8.5, 2.6 * len(cases)), squeeze=False, sharey="row")
        for (left, right), case in zip(axes, cases, strict=True):
            found = {name: f for name, f in case["contenders"].items() if "seconds" in f}
            _bars(left, {name: f["seconds"] * 1e3 for name, f in found.items()}, "ms", case["floor"]["seconds"] * 1e3)
            _bars(right, {name: f["peak_bytes"] / 2**20 for name, f in found.items()}, "MiB beyond the inputs")
            left.set_title(f"{case['preset']}, {case['variant']}", loc="left", fontsize=9)
        return _save(figure, folder / f"{result['folder']}-dpo.svg")


def head(result: dict, folder: Path) -> Path | None:
    """Time of the trained head for each preset."""
    cases = [case for case in result["cases"].values() if case["family"] == "head" and case["variant"] == "trained"]
    if not cases:
        return None
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(-(-len(cases) // 2), 2, figsize=(8.5, 1.9 * -(-len(cases) // 2)), squeeze=False)
        for axis, case in zip(axes.flat, cases, strict=False):
            found = {name: f["seconds"] * 1e3 for name, f in case["contenders"].items() if "seconds" in f}
            _bars(axis, found, "ms", case["floor"]["seconds"] * 1e3)
            axis.set_title(f"{case['preset']}, N={case['shape']['N']}", loc="left", fontsize=9)
        for axis in axes.flat[len(cases) :]:
            axis.set_visible(False)
        figure.tight_layout()
        return _save(figure, folder / f"{result['folder']}-head.svg")


def train_step(result: dict, path: Path) -> Path:
    """Seconds per training step and peak memory, both sides of every case."""
    cases = list(result["cases"].values())
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(len(cases), 2, figsize=(8.5, 1.2 * len(cases)), squeeze=False, sharey="row")
        for (left, right), case in zip(axes, cases, strict=True):
            sides = {"Strop": case["strop"], case["side"].replace("trl", "TRL,"): case["peer"]}
            _bars(left, {name: side["seconds"] for name, side in sides.items()}, "")
            _bars(right, {name: side["peak_bytes"] / 2**30 for name, side in sides.items()}, "")
            title = f"{case['model']}, {case['task'].upper()} {case['prompt']}:{case['completion']}"
            left.set_title(title, loc="left", fontsize=9)
        axes[-1][0].set_xlabel("seconds a step")
        axes[-1][1].set_xlabel("GiB at the peak")
        figure.tight_layout()
        return _save(figure, path)
