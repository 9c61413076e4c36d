"""The command line's words: commands, their arguments, and the flags that a run's options have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from pipeline import __version__
from pipeline.options import OPTIONS, RunOptions

Action = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Options must be written out, and a usage error is one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pipeline: error: {message}; '{self.prog} --help' lists the options\n")


class Commands:
    """The parser of the whole command line, which each command adds its own to."""

    def __init__(self) -> None:
        self._common = Parser(add_help=False)  # SUPPRESS: a sub-command's default would undo what stood before it
        self._common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        description = "Stream datasets through one fused linear layer on NVIDIA GPUs."
        self.parser = Parser(prog="pipeline", description=description, parents=[self._common])
        self.parser.add_argument("--version", action="version", version=f"pipeline {__version__}")
        self._added = self.parser.add_subparsers(dest="command", required=True)

    def add(self, name: str, action: Action, summary: str) -> argparse.ArgumentParser:
        """The parser of a new command, which `action` carries out."""
        made: argparse.ArgumentParser = self._added.add_parser(
            name, help=summary, description=summary, parents=[self._common]
        )
        made.set_defaults(action=action)
        made.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        self._added.metavar = " | ".join(self._added.choices)
        return made


# -- a run's options ---------------------------------------------------------------------------------------------------


def flag_of(name: str) -> str:
    """How a shell writes the option of that name."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, names: Sequence[str] = tuple(OPTIONS)) -> None:
    """Add those of the options that have a flag."""
    for option in fields(RunOptions):
        flag = OPTIONS[option.name].flag
        if option.name not in names or flag is None:
            continue
        if isinstance(option.default, bool):
            parser.add_argument(flag_of(option.name), action="store_true", help=flag.help)
        else:
            read = _early(option.name) if flag.early else flag.read
            parser.add_argument(
                flag_of(option.name), type=read, default=option.default, metavar=flag.metavar, help=flag.help
            )


def options_of(args: argparse.Namespace, names: Sequence[str] = tuple(OPTIONS)) -> RunOptions:
    """What `add_options` has read, as the options of a run.

    Raises:
        OptionError, DTypeError: a value that isn't allowed.
    """
    return RunOptions(**{name: getattr(args, name) for name in names if OPTIONS[name].flag is not None})


def _early(name: str) -> Callable[[str], Any]:
    """Reads the option's word, and refuses a value that it can't have as a usage error."""
    about = OPTIONS[name]

    def read(text: str) -> Any:
        assert about.flag is not None
        try:
            return about.parse(about.flag.read(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"got {text!r}, {error}") from None

    return read


# -- other arguments ---------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def gb_per_s(text: str) -> float:
    from pipeline.plan.machine import is_rate

    rate = _number(text)
    if not is_rate(rate):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected GB/s, a number above 0")
    return rate


def seconds(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of seconds of at least 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
