"""The command line, the only part that prints."""

from pipeline.cli.commands import main

__all__ = ["main"]
