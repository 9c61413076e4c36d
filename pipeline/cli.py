"""The command `pipeline`: run, info, demo. The only file that prints.

Results go to standard output, all else (errors, warnings, the progress bar) to standard error. Exit status: 0, 1 for a
failure, 2 for a usage error, 130 after Ctrl-C, 143 after SIGTERM. Torch and CUDA are imported by the command that
needs them, so `pipeline --help` is quick.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import __version__
from pipeline.errors import CompileError, DeviceError, PipelineError

if TYPE_CHECKING:
    import torch

    from pipeline.api import Progress
    from pipeline.layer import FusedLinear

_DEMO_SAMPLED_ROWS = 64
_DEMO_REPEATS = 3
_DEMO_SLOW_S = 4.0  # of one run: from there on one timed repeat has to do
_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "check the permissions, or choose another path",
    errno.EPERM: "check the permissions, or choose another path",
    errno.EISDIR: "expected a file",
    errno.ENOSPC: "free space, or set TMPDIR to another folder for temporary files",
    errno.EDQUOT: "free space, or set TMPDIR to another folder for temporary files",
}


# -- the parser ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Options must be written out, and a usage error is one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pipeline: error: {message}; '{self.prog} --help' lists the options\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def _count_or_auto(text: str) -> int | str:
    if text != "auto" and (not text.isdecimal() or int(text) < 1):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 'auto' or a whole number of at least 1")
    return text if text == "auto" else int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)  # SUPPRESS: a sub-command's default would undo what stood before it
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    parser = _Parser(
        prog="pipeline", description="Stream datasets through one fused linear layer on NVIDIA GPUs.", parents=[common]
    )
    parser.add_argument("--version", action="version", version=f"pipeline {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | info | demo")

    def command(name: str, action: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, parents=[common])
        made.set_defaults(action=action)
        made.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return made

    def devices(made: argparse.ArgumentParser) -> None:
        text = "cpu, or GPUs such as cuda:0,cuda:1 (default: every GPU, or the CPU where there is none)"
        made.add_argument("--devices", type=_names, metavar="NAMES", help=text)

    run = command("run", _run, "Stream a .npy file through the layer into another.")
    run.add_argument("source", metavar="X.npy", help="the dataset (rows, in_features)")
    run.add_argument("--weights", required=True, metavar="L.safetensors", help="the tensors weight and, if any, bias")
    scale = "scaling_factor of the layer (default 1)"
    run.add_argument("--scale", "--scaling-factor", type=float, default=1.0, dest="scaling_factor", help=scale)
    run.add_argument("--out", required=True, metavar="Y.npy", help="the result (rows, out_features)")
    run.add_argument("--precision", help="for float32 data: fp32 (default), ieee or tf32")
    auto = {"type": _count_or_auto, "default": "auto", "metavar": "N"}
    run.add_argument("--chunk-rows", **auto, help="rows of one kernel launch (default auto)")  # type: ignore[arg-type]
    run.add_argument("--num-streams", **auto, help="chunks in flight on a device (default auto)")  # type: ignore[arg-type]
    devices(run)
    run.add_argument("--out-dtype", metavar="DTYPE", help="element type of the result (default: the dataset's)")
    run.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    run.add_argument("--no-progress", action="store_true", help="no progress bar, on a terminal either")

    command("info", _info, "Show devices, the kernels they get, versions and caches.")

    demo = command("demo", _demo, "Stream a random dataset, check the result and time it against a plain torch loop.")
    for name, default in (("rows", "65536 on a GPU, else 4096"), ("in-features", "4096, else 1024")):
        demo.add_argument(f"--{name}", type=_count, metavar="N", help=f"(default {default})")
    demo.add_argument("--out-features", type=_count, metavar="N", help="(default 4096, else 1024)")
    devices(demo)
    return parser


# -- errors ----------------------------------------------------------------------------------------------------------


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it: ends a run as Ctrl-C does, so that no partial file stays."""


def _on_sigterm(*_: Any) -> NoReturn:
    raise _Terminated


def _one_line(error: BaseException) -> str:
    """What was wrong and what to do, in a shell user's words: `devices='cpu'` becomes `--devices cpu`."""
    text = str(error)
    if isinstance(error, CompileError):
        text = f"{text.splitlines()[0]}; --debug shows the compiler's log"
    elif isinstance(error, PipelineError):
        pass
    elif isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename is not None else ""
        remedy = _REMEDIES.get(error.errno or (errno.ENOENT if isinstance(error, FileNotFoundError) else 0))
        text = f"{name}{error.strerror or error}; {remedy or '--debug shows where it happened'}"
    elif isinstance(error, MemoryError):
        text = f"out of memory: {text or 'no details'}; use smaller --chunk-rows or --num-streams, or free memory"
    else:
        text = f"unexpected {type(error).__name__}: {text}; --debug shows where, please report it"
    notes = [note.removeprefix("pipeline: ") for note in getattr(error, "__notes__", ())]
    text = " ".join(" ".join([text, *(f"({note})" for note in notes)]).split())
    option = r"\b(chunk_rows|devices|num_streams|out_dtype|overwrite|precision)=('?)([\w:.]+)\2"
    return re.sub(option, lambda m: f"--{m[1].replace('_', '-')}" + ("" if m[3] == "True" else f" {m[3]}"), text)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"pipeline: warning: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status.

    Raises:
        SystemExit: --help, --version and usage errors.
    """
    args = _parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status: int = args.action(args)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader of our output has gone; Python's own flush at exit would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if getattr(args, "debug", False):
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            terminated = isinstance(error, _Terminated)
            print(f"pipeline: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
            return 143 if terminated else 130
        print(f"pipeline: error: {_one_line(error)}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


# -- run -------------------------------------------------------------------------------------------------------------


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
            text = f"{rate:,.0f} rows/s, {rate * gb_in:.1f} GB/s in, {rate * gb_out:.1f} out"
            bar.update(task, completed=done.rows_done, total=done.rows_total, description=text)

        yield show


def _run(args: argparse.Namespace) -> int:
    from pipeline.api import run_pipelined
    from pipeline.config import parse_dtype
    from pipeline.layer import FusedLinear

    layer = FusedLinear.from_file(args.weights, args.scaling_factor, precision=args.precision)
    out_dtype = parse_dtype(args.out_dtype, "out_dtype") if args.out_dtype is not None else None
    with _progress_bar(layer, (out_dtype or layer.dtype).itemsize, not args.no_progress) as progress:
        result = run_pipelined(
            layer,
            args.source,
            args.out,
            chunk_rows=args.chunk_rows,
            num_streams=args.num_streams,
            devices=args.devices,
            out_dtype=out_dtype,
            overwrite=args.overwrite,
            progress=progress,
        )
    if args.json:
        print(json.dumps({"out": str(result.out), "stats": result.stats.as_dict()}))
    else:
        print(*result.stats.lines(), f"wrote {result.out}", sep="\n")
    return 0


# -- info ------------------------------------------------------------------------------------------------------------


def _gpu_info(ordinal: int) -> dict[str, Any]:
    """What one GPU is, and the kernel that each type and precision gets there (selected, not compiled)."""
    import torch

    from pipeline.config import BFLOAT16, FLOAT16, FLOAT32
    from pipeline.kernels.launch import Launcher
    from pipeline.kernels.select import Problem, select

    try:
        gpu = Launcher.for_device(ordinal)
    except DeviceError as error:
        return {"error": _one_line(error)}
    kernels = {}
    for dtype, precision in ((FLOAT32, "fp32"), (FLOAT32, "ieee"), (FLOAT32, "tf32"), (BFLOAT16, ""), (FLOAT16, "")):
        problem = Problem(dtype, dtype, precision or dtype.name, 4096, 4096)
        chosen = select(gpu.arch, problem, 4096, 16, multiprocessors=gpu.multiprocessors)
        kernels[f"{dtype} {precision}".strip()] = chosen.description
    info = {"name": gpu.name, "arch": gpu.arch, "multiprocessors": gpu.multiprocessors}
    if torch.cuda.is_available():
        info["free_bytes"], info["memory_bytes"] = torch.cuda.mem_get_info(ordinal)
    else:
        info["note"] = (
            f"torch {torch.__version__} has no CUDA: files and host arrays stream, CUDA tensors can't be used"
        )
    return {**info, "kernels": kernels}


def _collect_info() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from pipeline import config
    from pipeline.devices.base import open_device
    from pipeline.devices.cuda import count_gpus

    versions = {"pipeline": __version__, "python": sys.version.split()[0]}
    for package in ("numpy", "torch", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch's CUDA"] = torch.version.cuda or "none"
    devices: dict[str, Any] = {}
    try:
        devices = {f"cuda:{i}": _gpu_info(i) for i in range(count_gpus())}
    except DeviceError as error:  # there is a driver, and it doesn't work
        devices["cuda"] = {"error": _one_line(error)}
    cpu = open_device("cpu")
    devices["cpu"] = {"name": cpu.description, "kernels": {"all": f"torch {torch.__version__} and NumPy"}}
    cpu.close()
    sizes = [path.stat().st_size for path in (config.cache_dir() / "kernels").rglob("*") if path.is_file()]
    return {
        "versions": versions,
        "devices": devices,
        "cache": {"path": str(config.cache_dir()), "kernels": len(sizes), "bytes": sum(sizes)},
        "host": {
            "copy_workers": config.copy_workers(),
            "piece_bytes": config.piece_bytes(),
            "ring_pieces": config.ring_pieces(),
        },
    }


def _info(args: argparse.Namespace) -> int:
    info = _collect_info()
    if args.json:
        print(json.dumps(info))
        return 0
    print(", ".join(f"{name} {version}" for name, version in info["versions"].items()))
    if next(iter(info["devices"])) == "cpu":
        print("no NVIDIA GPU is visible: runs take the CPU")
    for name, device in info["devices"].items():
        about = [device.get("name", device.get("error"))]
        if "arch" in device:
            about.append(f"{device['arch']}, {device['multiprocessors']} multiprocessors")
        if "memory_bytes" in device:
            about.append(f"{device['free_bytes'] / 2**30:.1f} of {device['memory_bytes'] / 2**30:.1f} GiB free")
        print(f"{name}: {'; '.join([*about, *filter(None, [device.get('note')])])}")
        for data, kernel in device.get("kernels", {}).items():
            print(f"  {data:<14}{kernel}")
    cache, host = info["cache"], info["host"]
    print(f"cache: {cache['path']}, {cache['kernels']} kernels, {cache['bytes'] / 2**20:.1f} MiB")
    print(
        f"host path: {host['copy_workers']} copy workers, {host['ring_pieces']} pinned pieces of "
        f"{host['piece_bytes'] / 2**20:g} MiB in each direction"
    )
    return 0


# -- demo ------------------------------------------------------------------------------------------------------------


def _write_random_npy(path: Path, rows: int, features: int) -> None:
    import numpy as np

    random = np.random.default_rng()
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, features)})
        for row in range(0, rows, 1024):
            file.write(random.standard_normal((min(1024, rows - row), features), np.float32).data)


def _torch_loop(linear: torch.nn.Linear, scaling_factor: float, source: Path, out: Path, chunk_rows: int) -> None:
    """The job as a plain loop over chunks: read, copy to the device, compute, copy back, write."""
    import numpy as np
    import torch

    x, device = np.load(source, mmap_mode="c"), linear.weight.device
    with out.open("wb") as file, torch.no_grad():
        shape = (len(x), linear.out_features)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for row in range(0, len(x), chunk_rows):
            z = linear(torch.from_numpy(x[row : row + chunk_rows]).to(device))
            file.write((scaling_factor * torch.sigmoid(z) + z).cpu().numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _largest_error(layer: FusedLinear, source: Path, out: Path) -> tuple[int, float]:
    """Sampled rows of a result against float64: how many, and the largest error by the largest value.

    The first row, the last, and a random one in each of 62 equal parts.
    """
    import numpy as np

    x, y = np.load(source, mmap_mode="r"), np.load(out, mmap_mode="r")
    if y.shape != (len(x), layer.out_features):
        return 0, float("inf")
    edges = np.linspace(0, len(x), min(_DEMO_SAMPLED_ROWS - 2, len(x)) + 1).astype(int)
    rows = np.unique([0, *np.random.default_rng().integers(edges[:-1], edges[1:]), len(x) - 1])
    expected = layer.reference(x[rows])
    return len(rows), float(np.abs(y[rows] - expected).max() / np.abs(expected).max())


def _demo(args: argparse.Namespace) -> int:
    import torch
    from safetensors.torch import save_file

    from pipeline.api import Pipeline
    from pipeline.devices.base import find_devices
    from pipeline.layer import FusedLinear

    say = (lambda *_: None) if args.json else print
    names = find_devices(args.devices)
    on_gpu = names[0].startswith("cuda")
    if names == ["cpu"] and args.devices is None:
        say("no NVIDIA GPU is visible: running on the CPU")
    rows = args.rows or (65_536 if on_gpu else 4_096)
    in_features, out_features = (n or (4_096 if on_gpu else 1_024) for n in (args.in_features, args.out_features))
    small = rows * max(in_features, out_features) < 2**26  # fewer than 8 chunks of the automatic size
    torch_device = names[0] if on_gpu and torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")  # NOTE: some containers turn tf32 on by an environment variable

    with tempfile.TemporaryDirectory(prefix="pipeline-demo-") as folder:
        source, weights, out, torch_out = (
            Path(folder, f) for f in ("x.npy", "layer.safetensors", "y.npy", "torch.npy")
        )
        _write_random_npy(source, rows, in_features)
        linear = torch.nn.Linear(in_features, out_features)
        save_file(linear.state_dict(), weights)
        layer, linear = FusedLinear.from_file(weights, scaling_factor=2.0), linear.to(torch_device)
        gib_in, gib_out = (rows * n * 4 / 2**30 for n in (in_features, out_features))
        say(f"dataset: {rows:,} random rows, {gib_in:.3g} GiB in, {gib_out:.3g} GiB out")
        say(f"layer: {in_features} -> {out_features}, float32, scaling_factor {layer.scaling_factor}")

        seconds: dict[str, list[float]] = {"pipeline": [], "torch": []}
        with Pipeline(layer, devices=names, chunk_rows=max(1, rows // 8) if small else "auto") as pipe:
            repeats = _DEMO_REPEATS
            while len(seconds["torch"]) <= repeats:  # the first of each warms up
                out.unlink(missing_ok=True)
                torch_out.unlink(missing_ok=True)
                start = time.perf_counter()
                stats = pipe.run(source, out).stats
                middle = time.perf_counter()
                _torch_loop(linear, layer.scaling_factor, source, torch_out, pipe.chunk_rows)
                seconds["pipeline"].append(middle - start)
                seconds["torch"].append(time.perf_counter() - middle)
                if max(max(times) for times in seconds.values()) > _DEMO_SLOW_S:
                    repeats = 1
        sampled, error = _largest_error(layer, source, out)
        _, torch_error = _largest_error(layer, source, torch_out)

    # Rounding errors of a sum of n terms in order grow like sqrt(n), here counted from float32's 2**-23 (Higham,
    # Accuracy and Stability of Numerical Algorithms, 2.8); twice that leaves room for the largest of many results.
    bound = 2 * 2**-23 * max(in_features, 64) ** 0.5
    passed = error <= bound
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratio = medians["torch"] / medians["pipeline"]
    if args.json:
        shown = error if math.isfinite(error) else None  # JSON has no NaN
        check = {"rows": sampled, "error": shown, "bound": bound, "passed": passed}
        compared = {"median_s": medians, "all_s": seconds, "ratio": ratio, "torch_error": torch_error}
        print(
            json.dumps({"stats": stats.as_dict(), "check": check, "torch_loop": {"device": torch_device, **compared}})
        )
    else:
        print(*stats.lines(), sep="\n")
        verdict = "right" if passed else "WRONG"
        print(f"check: {verdict}; {sampled} rows against float64, largest error {error:.1e}, allowed {bound:.1e}")
        text = {n: f"{medians[n]:.3f} s ({min(t[1:]):.3f} to {max(t[1:]):.3f})" for n, t in seconds.items()}
        print(f"pipeline, file to file: {text['pipeline']}")
        print(
            f"plain torch loop on {torch_device}: {text['torch']}, {ratio:.2f} times as long; error {torch_error:.1e}"
        )
        runs = len(seconds["torch"]) - 1
        print(f"demo figures: median and range of {runs} interleaved runs, warm, files in the page cache")
    if not passed:
        raise PipelineError(
            f"the demo's result differs from the float64 reference by {error:.1e}, at most {bound:.1e} is rounding; "
            f"run 'pipeline info' and report both"
        )
    return 0
