"""The one protocol of all benches: a `Case` says what it needs, measures, and gives its figures as JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benches.common import context, write_json


@dataclass(frozen=True)
class Need:
    """Something that a machine has or lacks. `missing` completes the sentence "scripts/bench NAME needs ..."."""

    missing: str
    is_there: Callable[[], bool]


def _gpus() -> int:
    import torch

    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


GPU = Need("a GPU, and torch sees none here", lambda: _gpus() > 0)
SEVERAL_GPUS = Need("several GPUs, and torch sees one here", lambda: _gpus() > 1)


@dataclass
class Outcome:
    """What was found, ready for JSON. `right`: every result that was checked is. `facts` go beside the results."""

    results: Any
    right: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


class Case(Protocol):
    """One thing that is measured."""

    @property
    def name(self) -> str:
        """On the command line and in the report."""

    @property
    def about(self) -> str:
        """A line for --help."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the machine must have."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its options, by itself none. `--json` is everyone's."""
        return None

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        """Build the contenders, time them in turns, check what they computed and print it. Yields all that has been
        found so far, as often as there is something new: the report is written each time."""


def lacks(case: Case) -> Need | None:
    """The first thing that a case needs and this machine lacks."""
    return next((need for need in case.needs if not need.is_there()), None)


def run(case: Case, options: argparse.Namespace) -> int:
    """Measure a case and write its report. The status is 1 where something is missing, or a result is wrong."""
    if need := lacks(case):
        print(f"scripts/bench {case.name} needs {need.missing}", file=sys.stderr)
        return 1
    outcome = Outcome(None, right=False)
    for outcome in case.measure(options):
        write_json(
            options.json, {"bench": case.name, "context": context(), **outcome.facts, "results": outcome.results}
        )
    return int(not outcome.right)


def main(cases: list[Case], description: str, arguments: list[str]) -> int:
    """The command line over several cases, one subcommand each."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=description)
    commands = parser.add_subparsers(required=True)
    for case in cases:
        command = commands.add_parser(case.name, help=case.about)
        command.add_argument("--json", "--out", metavar="FILE", help="write results and context there")
        case.add_arguments(command)
        command.set_defaults(measured=case)
    options = parser.parse_args(arguments)
    report = Path(options.json or "report.json")
    if report.is_dir() or not report.parent.is_dir():  # found out now, not when all has been measured
        parser.error(f"--json is {str(report)!r}, expected a file in a folder that exists")
    return run(options.measured, options)
