"""What a test registers with the package is for that test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.dtypes import DTYPES
from pipeline.io.registry import SINKS, SOURCES


@contextmanager
def registries_restored() -> Iterator[None]:
    """Element types, sources and sinks registered inside are forgotten afterwards."""
    registries: list[dict] = [DTYPES, SOURCES._openers, SINKS._openers]  # type: ignore[type-arg]
    before = [dict(each) for each in registries]
    try:
        yield
    finally:
        for registry, kept in zip(registries, before, strict=True):
            registry.clear()
            registry.update(kept)
