"""Functions whose keywords are options: what their signatures and docstrings show comes from `RunOptions`."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from pipeline.options import OPTIONS, RunOptions

T = TypeVar("T", bound=Callable[..., Any])


def takes_options(names: Sequence[str]) -> Callable[[T], T]:
    """Shows what the `**options` of a function, or of a class's `__init__`, are.

    Its signature gets these options as keyword-only parameters, its docstring their texts in place of a line
    `{options}`, and another keyword is a TypeError as Python raises it.
    """

    def decorate(target: T) -> T:
        if isinstance(target, type):
            setattr(target, "__init__", _checking(vars(target)["__init__"], names))  # noqa: B010
            target.__doc__ = _documented(target.__doc__ or "", names)
            return target
        shown = _checking(target, names)
        shown.__doc__ = _documented(target.__doc__ or "", names)
        return shown

    return decorate


def _checking(function: T, names: Sequence[str]) -> T:
    """The function, that refuses keywords it doesn't know before it does anything."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(RunOptions)
        if each.name in names
    ]
    known = [*names, *(each.name for each in own)]

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        for keyword in keywords:
            if keyword not in known:
                near = difflib.get_close_matches(keyword, known, n=1)
                hint = f". Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {keyword!r}{hint}")
        return function(*args, **keywords)

    checked.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def _documented(docstring: str, names: Sequence[str]) -> str:
    """The docstring with the options' texts in place of its line `{options}`."""

    def texts(match: re.Match[str]) -> str:
        indent = match[1]
        return "\n".join(
            textwrap.fill(
                f"{name}: {OPTIONS[name].text}", 120, initial_indent=indent, subsequent_indent=indent + "    "
            )
            for name in names
        )

    return re.sub(r"^( *)\{options\}$", texts, docstring, flags=re.MULTILINE)
