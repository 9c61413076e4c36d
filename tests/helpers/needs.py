"""What a test needs that may not be installed. Without it a test is skipped; in CI, which installs it, it fails."""

from __future__ import annotations

import importlib.util
import os
from typing import NoReturn

import pytest

IN_CI = bool(os.environ.get("CI"))


def needs(library: str, extra: str) -> pytest.MarkDecorator:
    """Marks a test that uses `library`, which the project's `extra` brings."""
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing and not IN_CI, reason=f"needs {library}: pip install '.[{extra}]'")


def without(what: str, extra: str) -> NoReturn:
    """Ends a test that found out that `what` is missing, which the project's `extra` brings."""
    text = f"{what} isn't installed: pip install '.[{extra}]'"
    if IN_CI:
        pytest.fail(text)
    pytest.skip(text)
