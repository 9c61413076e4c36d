"""`pipeline profile` and `pipeline view`: what a run's timeline shows, recorded by Nsight Systems or by the run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.parser import Commands, add_options, seconds
from pipeline.errors import OptionError, OutputError

if TYPE_CHECKING:
    from pipeline.report.timeline import Timeline


def add_commands(commands: Commands) -> None:
    profile = commands.add("profile", _profile, "Record a run with Nsight Systems and say where its time went.")
    profile.add_argument(
        "--out", default="profile", metavar="PREFIX", help="of .nsys-rep and .sqlite (default profile)"
    )
    profile.add_argument("--report", metavar="FILE.sqlite", help="read this export of a report instead of recording")
    profile.add_argument("--delay", type=seconds, metavar="S", help="begin to record after so many seconds")
    profile.add_argument("--duration", type=seconds, metavar="S", help="record so many seconds")
    add_options(profile, ["trace"])
    words = "what to record: 'run' with its options, or another program: pipeline profile -- run X.npy ..."
    profile.add_argument("command_words", nargs="*", metavar="COMMAND", help=words)

    view = commands.add("view", _view, "Say what a timeline shows, and draw it.")
    view.add_argument("timeline", metavar="RUN.json", help="what --trace RUN.json wrote")
    view.add_argument("--trace", metavar="FILE", help="draw it: .png or .html, or copy it: .json")


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
