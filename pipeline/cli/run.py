"""`pipeline run`: a .npy file through a layer into another."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.parser import Commands, add_options, options_of
from pipeline.cli.shell import held_trace_warnings, start_for_gpus
from pipeline.errors import OutputError

if TYPE_CHECKING:
    from pipeline.layer.linear import FusedLinear
    from pipeline.options import Progress

_STARTTIME = 22 - 3  # proc(5): ticks since the system's start; the third field is the first behind the name


def add_commands(commands: Commands) -> None:
    run = commands.add("run", _run, "Stream a .npy file through the layer into another.")
    run.add_argument("source", metavar="X.npy", help="the dataset (rows, in_features)")
    run.add_argument("--weights", required=True, metavar="L.safetensors", help="the tensors weight and, if any, bias")
    scale = "scaling_factor of the layer (default 1)"
    run.add_argument("--scale", "--scaling-factor", type=float, default=1.0, dest="scaling_factor", help=scale)
    run.add_argument("--out", required=True, metavar="Y.npy", help="the result (rows, out_features)")
    run.add_argument("--precision", help="for float32 data: fp32 (default), ieee or tf32; not with --wire-dtype")
    add_options(run)
    run.add_argument("--no-progress", action="store_true", help="no progress bar, on a terminal either")


def _run(args: argparse.Namespace) -> int:
    start_for_gpus(args.devices)  # before NumPy is imported
    from pipeline.api import run_pipelined
    from pipeline.layer.linear import FusedLinear

    options = options_of(args)
    layer = FusedLinear.from_file(args.weights, args.scaling_factor, precision=args.precision)
    bar = _progress_bar(layer, options.result_dtype(layer.dtype).itemsize, not args.no_progress)
    with held_trace_warnings() as no_trace, bar as progress:
        result = run_pipelined(layer, args.source, args.out, **{**options.as_keywords(), "progress": progress})
    if args.json:
        stats = result.stats.as_dict()
        print(json.dumps({"out": str(result.out), "stats": stats, "process_seconds": process_seconds()}))
    else:
        print(*result.stats.lines(), f"wrote {result.out}", sep="\n")
        if options.trace is not None and not no_trace:
            print(f"wrote {options.trace}")
        process_s = process_seconds()
        if process_s is not None:
            run_s = result.stats.seconds
            print(
                f"the process took {process_s:.2f} s so far: {run_s:.2f} s for this run, {process_s - run_s:.2f} s "
                f"before and after it (Python's start, imports, the weights file, this report)"
            )
    if no_trace:
        raise OutputError(str(no_trace[0]))
    return 0


def process_seconds() -> float | None:
    """Seconds since this process was started, to some hundredths; None where the system doesn't tell."""
    try:
        fields = (
            Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        )  # behind the name, which may be anything
        started_s = int(fields[_STARTTIME]) / os.sysconf("SC_CLK_TCK")
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux, or not all of /proc
        return None
    return now_s - started_s if started_s > 0 else None  # some sandboxes give 0


@contextmanager
def _progress_bar(layer: FusedLinear, out_itemsize: int, wanted: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A callback that draws rows/s, GB/s and the time left on standard error; None where that is no terminal."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    gb_in = layer.in_features * layer.dtype.itemsize / 1e9
    gb_out = layer.out_features * out_itemsize / 1e9
    columns = (
        progress.TaskProgressColumn(),
        progress.BarColumn(bar_width=16),  # the line fits 80 columns
        progress.TextColumn("{task.description}"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("starting", total=None)

        def show(done: Progress) -> None:
            rate = done.rows_per_s
            text = f"{rate:,.0f} rows/s, {rate * gb_in:.1f} GB/s in, "
            if done.ceiling_rows_per_s is None or rate > done.ceiling_rows_per_s:  # what a run beats is no ceiling
                text += f"{rate * gb_out:.1f} out"
            else:
                text += f"{rate / done.ceiling_rows_per_s:.0%} of ceiling"
            bar.update(task, completed=done.rows_done, total=done.rows_total, description=text)

        yield show
