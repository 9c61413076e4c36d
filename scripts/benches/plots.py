"""Pictures of what scripts/bench and scripts/capture measured, by matplotlib."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benches.common import GIB

OURS, PEER = "#0077BB", "#BBBBBB"  # told apart without colour vision, too
PRECISIONS = {  # colour and marker
    "bfloat16": ("#0072B2", "o"),
    "float16": ("#D55E00", "^"),
    "tf32": ("#009E73", "s"),
    "fp32": ("#CC79A7", "v"),
    "ieee": ("#444444", "D"),
}


def draw_kernel(document: dict[str, Any], axes: Any) -> None:
    """The whole layer's rate against cuBLAS mm's, for each shape and precision."""
    ours = [row for row in document["results"] if row["name"].startswith("fused_linear")]
    shapes = list(dict.fromkeys((row["rows"], row["in_features"], row["out_features"]) for row in ours))
    precisions = [name for name in PRECISIONS if any(row["precision"] == name for row in ours)]
    for row in ours:
        place = shapes.index((row["rows"], row["in_features"], row["out_features"]))
        shift = (precisions.index(row["precision"]) - (len(precisions) - 1) / 2) * 0.24
        ratio, (colour, marker) = row["ratio"], PRECISIONS[row["precision"]]
        axes.plot([ratio["min"], ratio["max"]], [place + shift] * 2, color=colour, linewidth=1, alpha=0.5)
        axes.plot(ratio["median"], place + shift, marker=marker, color=colour, markersize=5)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_yticks(range(len(shapes)), [f"{rows:,} x {inner} -> {outer}" for rows, inner, outer in shapes])
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    axes.set_xlabel("rate of the whole layer against cuBLAS mm, median with range")
    handles = [
        mpl.lines.Line2D([], [], linestyle="", marker=PRECISIONS[name][1], color=PRECISIONS[name][0])
        for name in precisions
    ]
    axes.legend(handles=handles, labels=precisions, fontsize=8, frameon=False, loc="lower right")


def draw_stream(document: dict[str, Any], axes: Any) -> None:
    """Each contender's rate as a share of the bare copies of the same bytes in the same rounds."""
    bars = [
        (
            f"{case}: {name}",
            row["of_ceiling"],
            found["ceiling_s"]["median"] / row["seconds"]["max"],
            found["ceiling_s"]["median"] / row["seconds"]["min"],
            name.startswith("pipeline"),
        )
        for cases in document["results"].values()
        for case, found in cases.items()
        if isinstance(found, dict) and "ceiling_s" in found
        for name, row in found["contenders"].items()
    ]
    for i, (_, share, low, high, ours) in enumerate(bars):
        colour = OURS if ours else PEER
        axes.barh(i, share, 0.7, color=colour, xerr=[[share - low], [high - share]], capsize=2, ecolor="#444444")
        inside = max(high, share) > 0.9
        at, tint = (0.01, "white") if inside else (max(high, share) + 0.01, "black")
        axes.text(at, i, f"{share:.2f}", va="center", fontsize=8, color=tint)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#CC3311", linestyle="--")
    axes.set_xlabel("share of the bare copies' rate, median and range")
    if all(ours for *_, ours in bars):
        return
    patches = [mpl.patches.Patch(color=PEER), mpl.patches.Patch(color=OURS)]
    axes.legend(
        handles=patches, labels=["what people write", "pipeline"], loc="center", bbox_to_anchor=(0.75, 0.42), fontsize=8
    )


def draw_file(document: dict[str, Any], axes: Any) -> None:
    """Resident memory of the process through the run."""
    resident = document["results"]["resident_bytes_at_quarters"]
    axes.plot([0, 25, 50, 75, 100], [value / GIB for value in resident], color=OURS, marker="o")
    axes.axhline(2, color="#CC3311", linestyle="--")
    axes.text(2, 2.05, "2 GiB", color="#CC3311")
    axes.set_ylim(0, 2.4)
    axes.set_xlabel("share of the run, %")
    axes.set_ylabel("resident memory, GiB")


def roofline_of(document: dict[str, Any]) -> dict[str, Any]:
    """The rows of a kernel bench for 8192 -> 8192 as the roofline of scripts/capture has them. The memory's rate wasn't
    measured there: the most bytes a second that any of them moved stands for it."""
    points: dict[tuple[str, int], dict[str, Any]] = {}
    for row in document["results"]:
        features, rows, precision = row["in_features"], row["rows"], row["precision"]
        if (features, row["out_features"]) != (8192, 8192) or precision == "float16":  # which bfloat16 stands for
            continue
        moved = (2 if precision == "bfloat16" else 4) * (2 * rows * features + features**2)
        point = points.setdefault((precision, rows), {"precision": precision, "rows": rows})
        point["flop_per_byte"] = 2 * rows * features**2 / moved
        point["layer" if row["name"].startswith("fused_linear") else "cuBLAS mm"] = row["tflops"]["median"]
    found = [point for point in points.values() if "layer" in point and "cuBLAS mm" in point]
    fastest = max(point[name] / point["flop_per_byte"] for point in found for name in ("layer", "cuBLAS mm"))
    return {**document, "points": found, "memory_gb_per_s": 1e3 * fastest, "memory": "most bytes moved"}


def draw_roofline(document: dict[str, Any], axes: Any) -> None:
    """The layer's and cuBLAS mm's rates by arithmetic intensity, under the memory's rate and the best product."""
    points, memory = document["points"], document["memory_gb_per_s"]
    colours = {name: colour for name, (colour, _) in PRECISIONS.items() if any(p["precision"] == name for p in points)}
    intensities = [point["flop_per_byte"] for point in points]
    left, right = min(intensities) * 0.7, max(intensities) * 1.4
    for precision, colour in colours.items():
        mine = [point for point in points if point["precision"] == precision]
        roof = max(max(point["cuBLAS mm"], point["layer"]) for point in mine)
        ridge = roof * 1e3 / memory
        axes.plot([ridge, right], [roof, roof], color=colour, linewidth=1)
        axes.text(right * 1.1, roof, f"{precision}\nbest {roof:.0f}", color=colour, fontsize=9, va="center")
        for name, marker, fill in (("cuBLAS mm", "s", "none"), ("layer", "o", colour)):
            at = [point["flop_per_byte"] for point in mine], [point[name] for point in mine]
            axes.plot(*at, linestyle="", marker=marker, markerfacecolor=fill, markeredgecolor=colour, markersize=6)
    top = max(max(point["cuBLAS mm"], point["layer"]) for point in points)
    axes.plot([left, top * 1e3 / memory], [left * memory / 1e3, top], color="#444444", linewidth=1)
    slope = f"{document.get('memory', 'device memory')},\n{memory:,.0f} GB/s"
    axes.text(28, 36 * memory / 1e3, slope, fontsize=9, color="#444444", ha="right", va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right * 4)
    axes.set_ylim(top=top * 1.6)
    rows = [point["rows"] for point in points]
    span = f"rows from {min(rows):,} on the left to {max(rows):,}"
    axes.set_xlabel(f"FLOP per byte of x, W and y (8192 -> 8192; {span})")
    axes.set_ylabel("TFLOP/s")
    markers = [mpl.lines.Line2D([], [], linestyle="", marker="o", color="#444444")]
    markers.append(mpl.lines.Line2D([], [], linestyle="", marker="s", markerfacecolor="none", color="#444444"))
    axes.legend(handles=markers, labels=["layer", "cuBLAS mm"], loc="lower right", fontsize=8, frameon=False)


DRAWN = {  # function and height in inches
    "kernel": (draw_kernel, 3.0),
    "stream": (draw_stream, 6.5),
    "file": (draw_file, 3.0),
    "roofline": (draw_roofline, 5.0),
}


def draw(document: dict[str, Any], kind: str, target: Path) -> None:
    """Draw a report as a picture of that kind, under its command, machine and commit."""
    function, height = DRAWN[kind]
    if kind == "kernel":
        height = max(height, 0.06 * len(document["results"]))
    figure, axes = plt.subplots(figsize=(8.5, height))
    function(document, axes)
    context = document["context"]
    gpu = ", ".join(gpu.split(",")[0] for gpu in context["gpus"])
    command = textwrap.shorten(context["command"], 100, placeholder=" ...")
    figure.suptitle(f"{command}\n{gpu}, commit {context['commit'][:7]}", fontsize=9, x=0.02, ha="left")
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main(arguments: list[str]) -> int:
    paths = [argument for argument in arguments if argument != "--roofline"]
    if len(paths) != 1:
        print(
            "usage: scripts/plot [--roofline] FILE.json, a file that scripts/bench or scripts/capture wrote",
            file=sys.stderr,
        )
        return 2
    path = Path(paths[0])
    document = json.loads(path.read_text())
    kind, target = document["bench"], path.with_suffix(".png")
    if kind not in DRAWN:
        print(f"{path} is of the bench {kind!r}, expected one of {', '.join(DRAWN)}: nothing to draw", file=sys.stderr)
        return 2
    if "--roofline" in arguments:
        if kind != "kernel":
            print(f"{path} is of the bench {kind!r}, --roofline draws those of 'kernel'", file=sys.stderr)
            return 2
        document, kind, target = roofline_of(document), "roofline", path.with_name(f"{path.stem}-roofline.png")
    draw(document, kind, target)
    return 0
