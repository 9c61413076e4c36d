"""A timeline as a file: Chrome and Perfetto trace JSON, written here and read back, and by suffix a picture or page."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from pathlib import Path
from typing import Any

from pipeline.errors import FileFormatError, OptionError, OutputError
from pipeline.instrument import STAGE_COLORS, STAGES, Interval
from pipeline.report.timeline import Timeline, lanes_of

_LIBRARIES = {".json": None, ".png": "matplotlib", ".html": "bokeh"}
_FORMAT = "pipeline trace 1"


def check_trace(path: str | os.PathLike[str]) -> Path:
    """Check before a run that its timeline can be written there afterwards. Leaves no file.

    Raises:
        OptionError: not a .json, .png or .html, or the library that draws it isn't installed.
        OutputError: the folder isn't there or can't be written, or the name is taken by something that is no file.
    """
    target = _checked(path)
    _new_file_beside(target).unlink()  # only trying shows whether a file can be made there
    return target


def _checked(path: str | os.PathLike[str]) -> Path:
    """What `check_trace` checks without making a file."""
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"trace is {path!r}, expected a path that ends in {', '.join(_LIBRARIES)}, or None")
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in _LIBRARIES:
        raise OptionError(f"trace is {str(path)!r}, expected a path that ends in {', '.join(_LIBRARIES)}")
    library = _LIBRARIES[suffix]
    if library is not None and importlib.util.find_spec(library) is None:
        raise OptionError(
            f"trace is {str(path)!r}, which needs {library}, which isn't installed: install the extra, pip install "
            f"'pipeline[plot]', or write a .json and draw it elsewhere with 'pipeline view'"
        )
    if not os.path.isdir(target.parent):
        raise OutputError(f"the folder {str(target.parent)!r} of trace {str(path)!r} doesn't exist; make it first")
    if os.path.exists(target) and not os.path.isfile(target):
        raise OutputError(f"trace is {str(path)!r}, which exists and isn't a file; choose another path")
    return target


def _new_file_beside(target: Path) -> Path:
    """An empty file that is to become `target`.

    Raises:
        OutputError: it can't be made.
    """
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(exist_ok=False)
    except OSError as error:
        raise OutputError(
            f"can't write trace {str(target)!r}: no file can be made in its folder ({error.strerror}); choose a path "
            f"that can be written"
        ) from error
    return partial


def write_trace(path: str | os.PathLike[str], timeline: Timeline, stats: dict[str, Any] | None = None) -> None:
    """Write the timeline, with the figures of its run (`Stats.as_dict()`), as the path's suffix says.

    It is written beside its path as `<name>.<random>.partial` and renamed when it is complete.

    Raises:
        OptionError, OutputError: as `check_trace`, or writing failed; what was there before is still there.
    """
    target = _checked(path)
    partial = _new_file_beside(target)
    try:
        if target.suffix.lower() == ".png":
            from pipeline.report.picture import draw_png

            draw_png(partial, timeline, stats)
        elif target.suffix.lower() == ".html":
            from pipeline.report.page import draw_html

            draw_html(partial, timeline, stats)
        else:
            partial.write_text(json.dumps(to_json(timeline, stats), separators=(",", ":")) + "\n")
        os.replace(partial, target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(
                f"can't write trace {str(target)!r}: {error.strerror or error}; free space, or choose another path"
            ) from error
        raise


def to_json(timeline: Timeline, stats: dict[str, Any] | None = None) -> dict[str, Any]:
    """The timeline in Chrome's trace event format: a process a device, a thread a lane, microseconds.

    Fills and drains that overlap get a lane each, since a thread's events may not.
    """
    events: list[dict[str, Any]] = []
    for pid, (device, operations) in enumerate(timeline.devices.items()):
        about = f"{device} {timeline.hardware.get(device, '')}".strip()
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": about}})
        tid = 0
        for stage in STAGES:
            rows = lanes_of(operations, stage)
            for number, row in enumerate(rows):
                name = f"{stage} {number + 1}" if len(rows) > 1 else stage
                events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}})
                events.append(
                    {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
                )
                events.extend(_event(interval, pid, tid) for interval in row)
                tid += 1
    about_run = {"origin": timeline.origin, "dropped": timeline.dropped, "unassigned": timeline.unassigned}
    other = {"format": _FORMAT, **about_run, "devices": list(timeline.devices), "hardware": timeline.hardware}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {**other, "stats": stats}}


def _event(interval: Interval, pid: int, tid: int) -> dict[str, Any]:
    stage, chunk, start_s, end_s, n_bytes = interval
    seconds = end_s - start_s
    args: dict[str, Any] = {"chunk": chunk, "bytes": n_bytes}
    if n_bytes and seconds > 0:
        args["GB/s"] = round(n_bytes / seconds / 1e9, 2)
    return {
        "ph": "X",
        "name": stage,
        "cat": stage,
        "pid": pid,
        "tid": tid,
        "ts": round(start_s * 1e6, 3),
        "dur": round(seconds * 1e6, 3),
        "args": args,
    }


def read_trace(path: str | os.PathLike[str]) -> tuple[Timeline, dict[str, Any] | None]:
    """The timeline and the run's figures from a .json that `write_trace` wrote.

    Raises:
        FileNotFoundError: no such file.
        FileFormatError: not such a file.
    """
    try:
        document = json.loads(Path(path).read_text())
        other = document["otherData"]
        if other["format"] != _FORMAT:
            raise ValueError(f"format {other['format']!r}")
        devices: dict[str, list[Interval]] = {device: [] for device in other["devices"]}
        for event in document["traceEvents"]:
            if event["ph"] == "X" and event["name"] in STAGE_COLORS:
                start_s, args = event["ts"] / 1e6, event["args"]
                interval = Interval(event["name"], args["chunk"], start_s, start_s + event["dur"] / 1e6, args["bytes"])
                devices[other["devices"][event["pid"]]].append(interval)
        kept = {name: other[name] for name in ("origin", "hardware", "dropped", "unassigned")}
        return Timeline(devices, **kept), other["stats"]
    except (ValueError, KeyError, TypeError, IndexError) as error:  # ValueError: not JSON, not text
        raise FileFormatError(
            f"{path} isn't a timeline ({type(error).__name__}: {error}); expected a .json that trace= or --trace wrote"
        ) from error
