"""Machines: shipped ones, and files of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from pipeline.dtypes import FLOAT32
from pipeline.errors import FileFormatError
from pipeline.plan.machine import Machine
from pipeline.plan.workload import Workload

H200 = Machine.load("h200")
WORK = Workload(500_000, 4096, 4096, FLOAT32, "tf32", "pinned", "pinned")


SHIPPED = json.loads(resources.files("pipeline.plan").joinpath("machines/h200.json").read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "mine", "speed": 3}', r"missing \['architecture'.*unknown \['speed'\]"),
        ("3", "it holds a int, expected an object"),
        ("[]", "it holds a list, expected an object"),
        ("", "expected JSON"),
        ("{", "expected JSON"),
    ],
)
def test_machine_file_that_describes_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=f"mine.json isn't a machine's description: .*{message}|{message}"):
        Machine.load(str(path))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("fill_gb_per_s", 0, "fill_gb_per_s is 0, expected a number above 0"),
        ("fill_gb_per_s", -3.5, "is -3.5, expected a number above 0"),
        ("fill_gb_per_s", float("nan"), "is nan, expected a number above 0"),
        ("drain_gb_per_s", float("inf"), "is inf, expected a number above 0"),
        ("fill_gb_per_s", 10**400, "expected a number above 0"),
        ("disk_read_gb_per_s", "fast", "is 'fast', expected a number above 0"),
        ("copy_pause_us", True, "is True, expected a number above 0"),
        ("fresh_gb_per_s", None, "is None, expected a number above 0"),
        ("gpu_memory_bytes", 1.5e11, "expected a whole number above 0"),
        ("gpu", 7, "gpu is 7, expected text"),
        ("architecture", "sm_1", "architecture is 'sm_1', expected one of sm_80, "),
        ("architecture", [], "expected one of sm_80, "),
        ("kernel_tflops", 300.0, "is 300.0, expected numbers by fp32, ieee, tf32"),
        ("kernel_tflops", {}, "at least one of them"),
        ("kernel_tflops", {"fp8": 1.0}, "expected numbers by fp32, ieee, tf32"),
        ("kernel_tflops", {"tf32": 0}, "kernel_tflops of tf32 is 0, expected a number above 0"),
        ("duplex_gb_per_s", 50.0, 'expected numbers by number of GPUs, "1" among them'),
        ("duplex_gb_per_s", {"2": 72.0}, '"1" among them'),
        ("copy_gb_per_s", {"1": 90.0, "two": 90.0}, "expected numbers by number of GPUs"),
        ("copy_gb_per_s", {"1": "90"}, "copy_gb_per_s of 1 is '90', expected a number above 0"),
    ],
)
def test_machine_file_with_a_wrong_value_is_refused(field: str, value: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**SHIPPED, field: value}))
    with pytest.raises(FileFormatError) as refused:
        Machine.load(str(path))
    assert str(refused.value).startswith(f"{path}: {field}") and expected in str(refused.value)


def test_plan_takes_a_machine_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**SHIPPED, "name": "x"}))
    assert Machine.load(str(path)) == replace(H200, name="x")
