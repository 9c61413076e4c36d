"""The command line, the only part that prints: run, profile, view, plan, info, demo.

Results go to standard output, all else (errors, warnings, the progress bar) to standard error. Exit status: 0, 1 for a
failure, 2 for a usage error, 130 after Ctrl-C, 143 after SIGTERM. Torch and CUDA are imported by the command that
needs them, so `pipeline --help` is quick.
"""

from __future__ import annotations

import argparse

from pipeline.cli import demo, info, plan, run, timelines
from pipeline.cli.parser import Commands, Parser
from pipeline.cli.shell import run_command

__all__ = ["main", "parse"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status.

    Raises:
        SystemExit: --help, --version and usage errors.
    """
    args = parse(argv)
    return run_command(args.action, args)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line, with its command's `action`.

    Raises:
        SystemExit: --help, --version and usage errors.
    """
    commands = Commands()
    for group in (run, timelines, plan, info, demo):
        group.add_commands(commands)
    args, unknown = commands.parser.parse_known_args(argv)
    if unknown:
        Parser(prog=f"pipeline {args.command}").error(f"unrecognized arguments: {' '.join(unknown)}")
    return args
