"""`RunOptions`: what each option takes, and that functions, command line and plans read the same fields."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import assert_same_bits
from helpers.leaks import nothing_left_behind
from helpers.pipelines import LAYER, X, open_pipeline

from pipeline import Pipeline, run_pipelined
from pipeline.cli import main, parse
from pipeline.cli.parser import flag_of, options_of
from pipeline.cli.shell import one_line
from pipeline.dtypes import BFLOAT16, FLOAT16
from pipeline.errors import InputError, OptionError
from pipeline.options import ONE_RUN_OPTIONS, OPTIONS, PIPELINE_OPTIONS, RunOptions


@pytest.mark.parametrize("value", [0, -1, 1.0, "many", "4", "", True, False, None, [1], np.float32(2), np.bool_(True)])
@pytest.mark.parametrize("name", ["chunk_rows", "num_streams"])
def test_pipeline_refuses_sizes_that_are_none(name: str, value: Any) -> None:
    with nothing_left_behind(), pytest.raises(OptionError, match=f"{name} is .*expected 'auto' or a whole number"):
        Pipeline(LAYER, devices="cpu", **{name: value})


@pytest.mark.parametrize("value", [1, 17, np.int64(5), "auto"])
@pytest.mark.parametrize("name", ["chunk_rows", "num_streams"])
def test_pipeline_takes_whole_numbers_and_auto(name: str, value: Any) -> None:
    with Pipeline(LAYER, devices="cpu", **{name: value}) as pipeline:
        result = pipeline.run(X)
    assert_same_bits(result.out, LAYER(X))
    if value != "auto":
        assert getattr(result.stats, name) == int(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"progress": 3}, "progress is 3, expected a function that takes a Progress, or None"),
        ({"trace": 3}, "trace is 3, expected a path"),
        ({"trace": b"run.json"}, "trace is b'run.json', expected a path"),
        ({"overwrite": "no"}, "overwrite is 'no', expected True or False"),
    ],
)
def test_run_refuses_options_before_it_starts(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "y.npy").write_bytes(b"precious")
    with nothing_left_behind(tmp_path), open_pipeline() as pipeline:
        with pytest.raises(OptionError, match=message):
            pipeline.run(X, tmp_path / "y.npy", **options)
    assert (tmp_path / "y.npy").read_bytes() == b"precious"


def test_pipeline_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        Pipeline(LAYER, 16)  # type: ignore[misc]
    with pytest.raises(TypeError):
        run_pipelined(LAYER, X, None, 16)  # type: ignore[misc]


@pytest.mark.parametrize(("cpu_alone", "most"), [(True, 2**20), (False, 65_536)])
@pytest.mark.parametrize("row_bytes", [4, 1200, 32_768, 4_000_000])
def test_auto_chunk_is_about_32_mib_of_the_wider_side(row_bytes: int, cpu_alone: bool, most: int) -> None:
    rows = RunOptions().most_chunk_rows(row_bytes, cpu_alone=cpu_alone)
    assert rows % 128 == 0 and 128 <= rows <= most
    assert rows == 128 or rows * row_bytes <= 32 * 2**20
    assert RunOptions(chunk_rows=17).most_chunk_rows(row_bytes, cpu_alone=cpu_alone) == 17


def test_auto_chunks_of_a_short_run_are_several_for_each_device() -> None:
    options = RunOptions()
    assert options.rows_per_chunk(None, 1, 65_536) == 65_536, "how short it is will be known at its end"
    assert options.rows_per_chunk(10**9, 1, 65_536) == 65_536
    assert options.rows_per_chunk(8 * 1024, 1, 65_536) == 1024 and options.rows_per_chunk(8 * 1024, 2, 65_536) == 512
    assert options.rows_per_chunk(8 * 1024, 1, 65_536, cpu_alone=True) == 4096
    assert options.rows_per_chunk(10, 1, 65_536) == 256 and options.rows_per_chunk(10, 1, 128) == 128
    assert RunOptions(chunk_rows=65_536).rows_per_chunk(8 * 1024, 1, 65_536) == 65_536


# -- one field an option -----------------------------------------------------------------------------------------------

# What a new option is tried with here: a value, and its normal form. Its field is all else that it needs.
VALUES: dict[str, tuple[Any, Any]] = {
    "chunk_rows": (np.int64(5), 5),
    "num_streams": (2, 2),
    "devices": ("cuda", ("cuda:0",)),
    "wire_dtype": ("bf16", BFLOAT16),
    "out_dtype": (torch.float16, FLOAT16),
    "overwrite": (np.True_, True),
    "progress": (print, print),
    "trace": ("run.json", "run.json"),
}
FUNCTIONS: list[tuple[Any, tuple[str, ...]]] = [
    (Pipeline, PIPELINE_OPTIONS),
    (Pipeline.run, ONE_RUN_OPTIONS),
    (run_pipelined, tuple(OPTIONS)),
]


def test_options_are_all_tried_here() -> None:
    assert set(VALUES) == set(OPTIONS) == {each.name for each in fields(RunOptions)}
    assert sorted([*PIPELINE_OPTIONS, *ONE_RUN_OPTIONS]) == sorted(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_option_has_a_normal_form(name: str) -> None:
    value, normal = VALUES[name]
    options = RunOptions(**{name: value})
    assert getattr(options, name) == normal
    assert RunOptions(**options.as_keywords()) == options == RunOptions().with_values({name: value})


@pytest.mark.parametrize(("function", "names"), FUNCTIONS)
def test_options_are_in_the_signature(function: Any, names: tuple[str, ...]) -> None:
    shown = inspect.signature(function).parameters
    keywords = {name: each.default for name, each in shown.items() if each.kind is each.KEYWORD_ONLY}
    assert keywords == {each.name: each.default for each in fields(RunOptions) if each.name in names}
    assert not any(each.kind is each.VAR_KEYWORD for each in shown.values())


@pytest.mark.parametrize(("function", "names"), FUNCTIONS)
def test_options_are_in_the_docstring(function: Any, names: tuple[str, ...]) -> None:
    text = function.__doc__
    assert "{options}" not in text and max(map(len, text.splitlines())) <= 120
    for name in names:
        assert f"{name}: {OPTIONS[name].text}" in " ".join(text.split())


@pytest.mark.parametrize(("function", "names"), FUNCTIONS)
def test_function_refuses_other_keywords_as_python_does(function: Any, names: tuple[str, ...]) -> None:
    for name in names:
        with pytest.raises(TypeError) as caught:
            function(LAYER, X, **{f"{name}s": 1})
        called = f"{function.__qualname__}{'.__init__' if isinstance(function, type) else ''}"
        assert str(caught.value) == (f"{called}() got an unexpected keyword argument '{name}s'. Did you mean '{name}'?")
    with pytest.raises(TypeError, match=r"\(\) got an unexpected keyword argument 'colour'$"):
        function(LAYER, X, colour="red")


@pytest.mark.parametrize("command", ["run", "plan"])
def test_options_are_flags_of_the_command_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, about in OPTIONS.items():
        wanted = about.flag is not None and (command == "run" or about.planned)
        assert (f"{flag_of(name)} " in text) == wanted
        if about.flag is not None and wanted:
            assert f"{about.flag.metavar or ''} {about.flag.help}".strip() in text


@pytest.mark.parametrize("name", [*(name for name, about in OPTIONS.items() if about.flag), "precision"])
def test_option_is_said_in_a_shells_words(name: str) -> None:
    assert one_line(OptionError(f"pass {name}='cuda:0', or leave {name} out")) == (
        f"pass {flag_of(name)} cuda:0, or leave {name} out"
    )
    assert one_line(OptionError(f"pass {name}=True")) == f"pass {flag_of(name)}"


def test_command_line_gives_the_options_it_read() -> None:
    words = ["run", "x.npy", "--weights", "w", "--out", "y.npy"]
    assert options_of(parse(words)) == RunOptions()
    given = [*words, "--chunk-rows", "5", "--devices", "cpu, sim", "--out-dtype", "bf16", "--overwrite"]
    expected = RunOptions(chunk_rows=5, devices=["cpu", "sim"], out_dtype="bfloat16", overwrite=True)
    assert options_of(parse(given)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 5}, "devices is 5, expected None, a device name or a list of device names"),
        ({"devices": ["cuda", "cuda:0"]}, "devices is .'cuda', 'cuda:0'., expected one or several different device"),
        ({"wire_dtype": "int8"}, "wire_dtype is 'int8', expected 'bf16' or 'fp16'; or leave it out"),
        ({"out_dtype": "int8"}, "out_dtype is int8, expected one of float64, .*; leave it out for that of the source"),
    ],
)
def test_options_refuse_what_no_machine_could_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunOptions(**options)


def test_options_and_the_command_lines_help_need_no_numpy() -> None:
    code = "import sys, pipeline.options, pipeline.cli; print({'numpy', 'torch', 'cuda'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


ONE_MORE = '''
import importlib.util, inspect, pathlib, sys, types
spec = importlib.util.find_spec("pipeline.options")
one_field = """    colour: str = field(
        default="red",
        metadata=_about(_as_is, "what it is painted in.", flag=Flag("the paint", "PAINT"), of_one_run=True),
    )

    def __post_init__"""
source = pathlib.Path(spec.origin).read_text()
assert source.count("    def __post_init__") == 1
module = sys.modules["pipeline.options"] = types.ModuleType("pipeline.options")
exec(source.replace("    def __post_init__", one_field), vars(module))

import numpy as np
from pipeline import FusedLinear, Pipeline, run_pipelined
from pipeline.cli import parse
from pipeline.cli.parser import options_of
from pipeline.cli.shell import one_line
from pipeline.errors import OptionError

for function in (run_pipelined, Pipeline.run):
    assert inspect.signature(function).parameters["colour"].default == "red"
    assert "colour: what it is painted in." in function.__doc__
assert "colour" not in inspect.signature(Pipeline).parameters
layer, x = FusedLinear(np.ones((3, 4), np.float32)), np.ones((5, 4), np.float32)
assert run_pipelined(layer, x, devices="cpu", colour="blue").out.shape == (5, 3)
read = options_of(parse(["run", "x.npy", "--weights", "w", "--out", "y.npy", "--colour", "blue"]))
assert read.colour == "blue"
assert one_line(OptionError("pass colour='blue'")) == "pass --colour blue"
'''


def test_a_new_option_is_one_field() -> None:
    """Python's functions, their documentation, the command line and its messages have it from there."""
    done = subprocess.run([sys.executable, "-c", ONE_MORE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
