"""The command `pipeline`: run, profile, view, plan, info, demo. The only file that prints.

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
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import __version__
from pipeline.errors import CompileError, DeviceError, OptionError, OutputError, PipelineError, TraceWarning

if TYPE_CHECKING:
    from pipeline.api import Progress
    from pipeline.layer.linear import FusedLinear
    from pipeline.report.timeline import Timeline

_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.ELOOP: "check the path",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EROFS: "choose another path",
    errno.EAGAIN: "the system allows no more threads, set PIPELINE_COPY_WORKERS to fewer",
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


def _gb_per_s(text: str) -> float:
    from pipeline.plan.machine import is_rate

    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not is_rate(rate):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected GB/s, a number above 0")
    return rate


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of seconds of at least 0")
    return value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)  # SUPPRESS: a sub-command's default would undo what stood before it
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    parser = _Parser(
        prog="pipeline", description="Stream datasets through one fused linear layer on NVIDIA GPUs.", parents=[common]
    )
    parser.add_argument("--version", action="version", version=f"pipeline {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | profile | view | plan | info | demo")

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
    run.add_argument("--precision", help="for float32 data: fp32 (default), ieee or tf32; not with --wire-dtype")
    auto = {"type": _count_or_auto, "default": "auto", "metavar": "N"}
    run.add_argument("--chunk-rows", **auto, help="rows of one kernel launch (default auto)")  # type: ignore[arg-type]
    run.add_argument("--num-streams", **auto, help="chunks in flight on a device (default auto)")  # type: ignore[arg-type]
    devices(run)
    wire = "bf16 or fp16: float32 rows cross the bus in it, and the layer computes in it (default: the dataset's)"
    run.add_argument("--wire-dtype", metavar="DTYPE", help=wire)
    run.add_argument("--out-dtype", metavar="DTYPE", help="element type of the result (default: the dataset's)")
    run.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    run.add_argument("--no-progress", action="store_true", help="no progress bar, on a terminal either")
    trace = "the run's timeline: .json (Perfetto, Chrome), .png or .html"
    run.add_argument("--trace", metavar="FILE", help=trace)

    profile = command("profile", _profile, "Record a run with Nsight Systems and say where its time went.")
    profile.add_argument(
        "--out", default="profile", metavar="PREFIX", help="of .nsys-rep and .sqlite (default profile)"
    )
    profile.add_argument("--report", metavar="FILE.sqlite", help="read this export of a report instead of recording")
    profile.add_argument("--delay", type=_seconds, metavar="S", help="begin to record after so many seconds")
    profile.add_argument("--duration", type=_seconds, metavar="S", help="record so many seconds")
    profile.add_argument("--trace", metavar="FILE", help=trace)
    words = "what to record: 'run' with its options, or another program: pipeline profile -- run X.npy ..."
    profile.add_argument("command_words", nargs="*", metavar="COMMAND", help=words)

    view = command("view", _view, "Say what a timeline shows, and draw it.")
    view.add_argument("timeline", metavar="RUN.json", help="what --trace RUN.json wrote")
    view.add_argument("--trace", metavar="FILE", help="draw it: .png or .html, or copy it: .json")

    plan = command("plan", _plan, "Predict rate, bound, memory and time of a job on given hardware.")
    plan.add_argument("--rows", type=_count, required=True, metavar="N")
    plan.add_argument("--in", type=_count, required=True, metavar="N", dest="in_features", help="in_features")
    plan.add_argument("--out", type=_count, required=True, metavar="N", dest="out_features", help="out_features")
    plan.add_argument("--gpu", default="h200", metavar="NAME", help="a shipped machine, or a .json (default h200)")
    plan.add_argument("--gpus", type=_count, default=1, metavar="N", help="of all hosts together (default 1)")
    plan.add_argument("--hosts", type=_count, default=1, metavar="N", help="(default 1)")
    plan.add_argument("--dtype", default="float32", help="(default float32)")
    plan.add_argument("--precision", help="for float32 data: fp32 (default), ieee or tf32")
    where = "where the rows are: pinned, array or file (default array)"
    plan.add_argument("--source", default="array", metavar="WHERE", help=where)
    to = "where the result goes: pinned, array, file, or fresh, a new array (default array)"
    plan.add_argument("--to", default="array", metavar="WHERE", help=to)
    plan.add_argument("--wire-dtype", metavar="DTYPE", help=wire)
    plan.add_argument("--out-dtype", metavar="DTYPE", help="element type of the result (default: the dataset's)")
    plan.add_argument("--chunk-rows", **auto, help="rows of one kernel launch (default auto)")  # type: ignore[arg-type]
    plan.add_argument("--num-streams", **auto, help="chunks in flight (default auto)")  # type: ignore[arg-type]
    shared = "files lie on shared storage: GB/s that all hosts together read and write there"
    plan.add_argument("--storage-gb-per-s", type=_gb_per_s, metavar="X", help=shared)
    network = "files lie on shared storage: GB/s each way of a host's network"
    plan.add_argument("--network-gb-per-s", type=_gb_per_s, metavar="X", help=network)

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
    option = r"\b(chunk_rows|devices|num_streams|out_dtype|overwrite|precision|trace|wire_dtype)=('?)([\w:.]+)\2"
    return re.sub(option, lambda m: f"--{m[1].replace('_', '-')}" + ("" if m[3] == "True" else f" {m[3]}"), text)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"pipeline: warning: {' '.join(str(message).split())}", file=sys.stderr)


@contextmanager
def _held_trace_warnings() -> Iterator[list[TraceWarning]]:
    """Those of the block, which are to be shown after the report, as the error that they are to a shell."""
    held: list[TraceWarning] = []
    show = warnings.showwarning

    def hold(message: Warning | str, *rest: Any, **more: Any) -> None:
        if isinstance(message, TraceWarning):
            held.append(message)
        else:
            show(message, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", TraceWarning)
        warnings.showwarning = hold
        yield held


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status.

    Raises:
        SystemExit: --help, --version and usage errors.
    """
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        _Parser(prog=f"pipeline {args.command}").error(f"unrecognized arguments: {' '.join(unknown)}")
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
            text = f"{rate:,.0f} rows/s, {rate * gb_in:.1f} GB/s in, "
            if done.ceiling_rows_per_s is None:
                text += f"{rate * gb_out:.1f} out"
            else:
                text += f"{rate / done.ceiling_rows_per_s:.0%} of ceiling"
            bar.update(task, completed=done.rows_done, total=done.rows_total, description=text)

        yield show


def _run(args: argparse.Namespace) -> int:
    from pipeline.api import run_pipelined
    from pipeline.dtypes import parse_out_dtype
    from pipeline.layer.linear import FusedLinear

    layer = FusedLinear.from_file(args.weights, args.scaling_factor, precision=args.precision)
    out_dtype = parse_out_dtype(args.out_dtype) if args.out_dtype is not None else None
    bar = _progress_bar(layer, (out_dtype or layer.dtype).itemsize, not args.no_progress)
    with _held_trace_warnings() as no_trace, bar as progress:
        result = run_pipelined(
            layer,
            args.source,
            args.out,
            chunk_rows=args.chunk_rows,
            num_streams=args.num_streams,
            devices=args.devices,
            wire_dtype=args.wire_dtype,
            out_dtype=out_dtype,
            overwrite=args.overwrite,
            progress=progress,
            trace=args.trace,
        )
    if args.json:
        print(json.dumps({"out": str(result.out), "stats": result.stats.as_dict()}))
    else:
        print(*result.stats.lines(), f"wrote {result.out}", sep="\n")
        if args.trace is not None and not no_trace:
            print(f"wrote {args.trace}")
    if no_trace:
        raise OutputError(str(no_trace[0]))
    return 0


# -- profile, view, plan ---------------------------------------------------------------------------------------------


def _show_timeline(args: argparse.Namespace, timeline: Timeline, stats: dict[str, Any] | None) -> None:
    """Print the use of the lanes and draw the timeline, as the options say. Drawing may fail, so it comes last."""
    from pipeline.report.timeline import device_use, use_lines
    from pipeline.report.trace import write_trace

    if args.json:
        uses = {device: device_use(operations).as_dict() for device, operations in timeline.devices.items()}
        about = {"origin": timeline.origin, "dropped": timeline.dropped, "unassigned": timeline.unassigned}
        print(json.dumps({"devices": uses, "hardware": timeline.hardware, **about}))
    else:
        print(*use_lines(timeline), sep="\n")
    if args.trace is not None:
        write_trace(args.trace, timeline, stats)
        if not args.json:
            print(f"wrote {args.trace}")


def _profile(args: argparse.Namespace) -> int:
    from pipeline.report.nsys import read_report, record
    from pipeline.report.trace import check_trace

    if args.trace is not None:
        check_trace(args.trace)
    if (args.report is None) == (not args.command_words):
        raise OptionError(
            "profile records a command or reads a report: give it one of them, 'pipeline profile -- run X.npy ...' or "
            "'pipeline profile --report FILE.sqlite'"
        )
    report = args.report
    if report is None:
        if not Path(args.out).parent.is_dir():
            raise OutputError(f"the folder of --out {args.out!r} isn't a directory; create it first")
        words = args.command_words
        words = [sys.executable, "-m", "pipeline", *words] if words[0] in ("run", "demo") else words
        report = record(words, Path(args.out), delay_s=args.delay, duration_s=args.duration, quiet=args.json)
    _show_timeline(args, read_report(report), None)
    return 0


def _view(args: argparse.Namespace) -> int:
    from pipeline.report.trace import check_trace, read_trace

    if args.trace is not None:
        check_trace(args.trace)
    timeline, stats = read_trace(args.timeline)
    _show_timeline(args, timeline, stats)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from pipeline.config import DEFAULT_STREAMS
    from pipeline.dtypes import parse_dtype, parse_out_dtype, parse_precision, wire_dtypes
    from pipeline.kernels.choose import Problem, runs_as
    from pipeline.plan.machine import Machine
    from pipeline.plan.predict import Job, predict

    dtype = parse_dtype(args.dtype, "dtype")
    precision = parse_precision(args.precision, dtype)
    out_dtype = dtype if args.out_dtype is None else parse_out_dtype(args.out_dtype)
    wire, wire_out = wire_dtypes(dtype, args.wire_dtype, out_dtype, precision)
    problem = Problem(wire, wire_out, precision if wire is dtype else wire.name, args.in_features, args.out_features)
    machine = Machine.load(args.gpu)
    job = Job(
        args.rows,
        args.in_features,
        args.out_features,
        dtype,
        runs_as(problem, machine.architecture),
        source=args.source,
        out=args.to,
        gpus=args.gpus,
        hosts=args.hosts,
        chunk_rows=None if args.chunk_rows == "auto" else args.chunk_rows,
        num_streams=DEFAULT_STREAMS if args.num_streams == "auto" else args.num_streams,
        wire_dtype=wire,
        out_dtype=out_dtype,
        storage_gb_per_s=args.storage_gb_per_s,
        network_gb_per_s=args.network_gb_per_s,
    )
    prediction = predict(job, machine)
    if args.json:
        print(json.dumps(prediction.as_dict()))
    else:
        print(*prediction.lines(), sep="\n")
    return 0


# -- info ------------------------------------------------------------------------------------------------------------


def _gpu_info(ordinal: int) -> dict[str, Any]:
    """What one GPU is, and the kernel that each type and precision gets there (selected, not compiled)."""
    import torch

    from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32
    from pipeline.kernels.choose import Problem, select
    from pipeline.kernels.launch import Launcher

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
    from pipeline.devices.cuda import count_gpus
    from pipeline.devices.names import open_device
    from pipeline.tuning import tune

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
    names = [f"{gpu['name']} ({gpu['arch']})" for gpu in devices.values() if "arch" in gpu]
    measured = tune.known(tune.machine_facts(names)) if names else None
    staging = config.Staging.chosen(None if measured is None else measured.staging())
    sizes = [path.stat().st_size for path in (config.cache_dir() / "kernels").rglob("*") if path.is_file()]
    return {
        "versions": versions,
        "devices": devices,
        "cache": {"path": str(config.cache_dir()), "kernels": len(sizes), "bytes": sum(sizes)},
        "host": {
            "copy_workers": staging.workers,
            "piece_bytes": staging.piece_bytes,
            "ring_pieces": staging.ring_pieces,
            "origin": staging.origin,
            "measured": asdict(measured) if measured is not None else None,
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
        f"{host['piece_bytes'] / 2**20:g} MiB in each direction; {host['origin']}"
    )
    if host["measured"] is not None:
        measured = host["measured"]
        print(
            f"GB/s each way: {measured['duplex_gb_per_s']:.1f} with pinned memory at both ends, "
            f"{measured['staged_gb_per_s']:.1f} with ordinary memory, the copy workers alone "
            f"{measured['host_gb_per_s']:.1f}"
        )
    return 0


# -- demo ------------------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from pipeline.demo import run_demo
    from pipeline.devices.names import find_devices

    say = (lambda _: None) if args.json else print
    names = find_devices(args.devices)
    if names == ["cpu"] and args.devices is None:
        say("no NVIDIA GPU is visible: running on the CPU")
    demo = run_demo(names, args.rows, args.in_features, args.out_features, say)
    medians = {"pipeline": statistics.median(demo.seconds), "torch": statistics.median(demo.torch_seconds)}
    if args.json:
        shown = demo.error if math.isfinite(demo.error) else None  # JSON has no NaN
        check = {"rows": demo.sampled_rows, "error": shown, "bound": demo.allowed_error, "passed": demo.passed}
        compared = {"device": demo.torch_device, "median_s": medians, "ratio": demo.ratio}
        compared |= {"all_s": {"pipeline": demo.seconds, "torch": demo.torch_seconds}, "torch_error": demo.torch_error}
        print(json.dumps({"stats": demo.stats.as_dict(), "check": check, "torch_loop": compared}))
    else:
        print(*demo.stats.lines(), sep="\n")
        print(
            f"check: {'right' if demo.passed else 'WRONG'}; {demo.sampled_rows} rows against float64, largest error "
            f"{demo.error:.1e}, allowed {demo.allowed_error:.1e}"
        )
        times = {"pipeline": demo.seconds, "torch": demo.torch_seconds}
        text = {n: f"{medians[n]:.3f} s ({min(t):.3f} to {max(t):.3f})" for n, t in times.items()}
        print(f"pipeline, file to file: {text['pipeline']}")
        print(
            f"plain torch loop on {demo.torch_device}: {text['torch']}, {demo.ratio:.2f} times as long; "
            f"error {demo.torch_error:.1e}"
        )
        print(f"demo figures: median and range of {len(demo.seconds)} interleaved runs, warm, files in the page cache")
    if not demo.passed:
        raise PipelineError(
            f"the demo's result differs from the float64 reference by {demo.error:.1e}, at most "
            f"{demo.allowed_error:.1e} is rounding; run 'pipeline info' and report both"
        )
    return 0
