"""How a command ends: exit status, one line for an error or a warning, signals."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from pipeline.errors import CompileError, PipelineError, TraceWarning
from pipeline.kernels.start import start_gpus
from pipeline.options import OPTIONS

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
_FLAGS = ["precision", *(name for name, about in OPTIONS.items() if about.flag is not None)]  # precision: the layer's
_KEYWORD = re.compile(rf"\b({'|'.join(_FLAGS)})=('?)([\w:.]+)\2")


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it: ends a run as Ctrl-C does, so that no partial file stays."""


def run_command(action: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Carry out a command and return the exit status, whatever it raises."""
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = action(args)
            if sys.stdout is not None:  # None where it was closed before the process began
                sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader of our output has gone; Python's own flush at exit would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if getattr(args, "debug", False):
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            terminated = isinstance(error, Terminated)
            print(f"pipeline: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
            return 143 if terminated else 130
        print(f"pipeline: error: {one_line(error)}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def start_for_gpus(devices: list[str] | None) -> None:
    """Start the GPUs that a command asks for (None: all) while it imports NumPy and what else it needs.

    NumPy computes nothing there, so that the threads of its OpenBLAS aren't started: they would spin for a while. That
    is this process's own affair; programs that import the package keep their settings.
    """
    if start_gpus(devices) is not None:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _on_sigterm(*_: Any) -> NoReturn:
    raise Terminated


def one_line(error: BaseException) -> str:
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
    return _KEYWORD.sub(lambda m: f"--{m[1].replace('_', '-')}" + ("" if m[3] == "True" else f" {m[3]}"), text)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"pipeline: warning: {' '.join(str(message).split())}", file=sys.stderr)


@contextmanager
def held_trace_warnings() -> Iterator[list[TraceWarning]]:
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
