"""`scripts/bench job`: whole processes, from before they are started until they have ended: `pipeline run`, the script
that people write with torch, and what neither can do without.

Contenders take turns. A process's first run in a case is apart: kernels are compiled and the machine is measured then,
once. Every result is checked, and removed before the next process starts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches.case import Outcome
from benches.common import output_of
from benches.job.contenders import Contender, all_contenders, run_whole
from benches.job.dataset import MEMORY_FILE_SYSTEMS, Dataset, file_system, lacks_room
from benches.job.table import Processes, show, summarized
from benches.layers import random_layer
from benches.turns import turns

SHARED_MEMORY = Path("/dev/shm")


def default_folders() -> list[str]:
    """Memory, where the system has a file system in it, and the folder for temporary files."""
    in_memory = SHARED_MEMORY.is_dir() and file_system(SHARED_MEMORY) == "tmpfs"
    return [*([str(SHARED_MEMORY)] if in_memory else []), tempfile.gettempdir()]


class Job:
    name = "job"
    about = "whole processes, .npy to .npy: pipeline run, a plain torch script, a bare CUDA context"
    needs = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--gib", type=float, action="append", help="GiB each way; repeatable, default 0.25, 4, 32")
        where = "where files go; repeatable, default /dev/shm where that is memory, and the system's temporary folder"
        parser.add_argument("--directory", action="append", help=where)
        parser.add_argument("--cold", action="store_true", help="drop inputs from the page cache before each process")
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--only", action="append", help="the contenders of that name; repeatable, default all")
        parser.add_argument("--features", type=int, default=8192, help="width of the layer, in and out")
        parser.add_argument("--precision", default="tf32", choices=("tf32", "ieee", "fp32"))
        parser.add_argument("--devices", default="cuda:0")
        parser.add_argument("--plain-mib", type=float, default=32, help="MiB of the plain script's chunks")
        parser.add_argument("--touch-gib", type=float, help="touched first; default what the largest case takes")

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        begin = time.perf_counter()
        taking_part = chosen(options)
        sizes, folders = sorted(options.gib or [0.25, 4.0, 32.0]), options.directory or default_folders()
        layer = random_layer(options.features, options.precision)
        touched = touch(2 * max(sizes) if options.touch_gib is None else options.touch_gib)
        names = ("features", "precision", "devices", "cold", "plain_mib")
        facts = {**{name: getattr(options, name) for name in names}, "touched": touched}
        results: dict[str, Any] = {}
        right, alone = True, True  # those that move no rows run once, beside the first case
        for gib in sizes:
            for folder in folders:
                kind = file_system(Path(folder))
                title = f"{gib:g} GiB, {kind}, {'cold' if options.cold else 'warm'}"
                if title in results:  # two folders of one type; reports name no folders
                    title += f", {folders.index(folder) + 1}. folder"
                reason = lacks_room(Path(folder), gib, layer.weight.nbytes)
                if options.cold and kind in MEMORY_FILE_SYSTEMS:
                    reason = "files in memory are never cold"
                if reason is not None:
                    print(f"{title}: left out, {reason}", flush=True)
                    results[title] = {"left_out": reason}
                    yield Outcome(results, right, facts)
                    continue
                case = {name: one for name, one in taking_part.items() if alone or one.moves_rows}
                alone = False
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    data = Dataset(Path(place), layer)
                    for found in measured(data, gib, case, options):
                        results[title] = found
                        yield Outcome(results, right and found["right"], facts)
                right = right and results[title]["right"]
                show(title, results[title])
                print(f"-- {time.perf_counter() - begin:.0f} s since the start", flush=True)


def chosen(options: argparse.Namespace) -> dict[str, Contender]:
    """The contenders that take part.

    Raises:
        SystemExit: `--only` names one that there isn't.
    """
    found = all_contenders(options)
    for name in options.only or ():
        if name not in found:
            raise SystemExit(f"--only is {name!r}, expected one of {', '.join(map(repr, found))}")
    return {name: one for name, one in found.items() if name in (options.only or found)}


def touch(gib: float) -> str:
    """Touch memory in a process of its own, so that this one stays small."""
    text = output_of(sys.executable, str(Path(__file__).parents[1] / "pages.py"), str(gib))
    if not text:
        raise SystemExit(f"{gib:g} GiB of memory couldn't be touched before measuring: pass a smaller --touch-gib")
    print(text, flush=True)
    return text


def measured(
    data: Dataset, gib: float, taking_part: dict[str, Contender], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The processes of one size in one folder, summarized anew after each round."""
    data.write(gib)
    found = {name: Processes(contender) for name, contender in taking_part.items()}
    for name in taking_part:
        take_turn(data, found[name], options, counts=False)
    last = 0
    for n, name in turns(taking_part, options.rounds):
        if n > last:
            last = n
            yield summarized(data, found)
        take_turn(data, found[name], options, counts=True)
    yield summarized(data, found)


def take_turn(data: Dataset, found: Processes, options: argparse.Namespace, *, counts: bool) -> None:
    """Run a contender's process and check its result."""
    data.settle()
    if options.cold:
        data.drop_cache()
    cached = data.cached_share()
    process = run_whole(found.contender, data)
    worst = data.worst_difference() if found.contender.moves_rows else 0.0
    found.add(process, cached, worst, counts=counts)
