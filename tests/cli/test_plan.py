"""`pipeline plan`."""

from __future__ import annotations

import json

import pytest
from helpers.command_line import error_line

from pipeline.cli import main


def test_plan_prints_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--rows", "1000000", "--in", "8192", "--out", "8192", "--precision", "tf32"]
    assert main([*args, "--wire-dtype", "bf16"]) == 1
    assert "leave precision out" in error_line(capsys), "as a run says"
    assert main([*args, "--source", "pinned", "--to", "pinned"]) == 0
    text = capsys.readouterr().out
    for expected in ("rows/s", "bound by", "H2D", "GiB on each GPU", "hardware: 1 x NVIDIA H200"):
        assert expected in text
    assert main([*args, "--json", "--gpus", "1000", "--hosts", "125"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows_per_s"] > 0 and printed["limits"]["kernel"] > 0
    assert main([*args, "--gpu", "abacus"]) == 1
    assert "expected one of h200" in error_line(capsys)


def test_plan_takes_the_options_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--rows", "1000000", "--in", "8192", "--out", "8192", "--json"]
    for options in ([], ["--wire-dtype", "bf16"], ["--out-dtype", "bf16"], ["--to", "fresh"], ["--chunk-rows", "256"]):
        assert main([*args, *options]) == 0
    plain, narrow, half, fresh, small = map(json.loads, capsys.readouterr().out.splitlines())
    assert narrow["limits"]["H2D"] == pytest.approx(2 * plain["limits"]["H2D"])
    assert narrow["limits"]["kernel"] > 2 * plain["limits"]["kernel"]  # it runs as bfloat16
    assert half["gb_per_s_out"] == pytest.approx(half["gb_per_s_in"] / 2)
    assert fresh["bound"] == "drain" and fresh["rows_per_s"] < 0.6 * plain["rows_per_s"]
    assert (plain["chunk_rows"], small["chunk_rows"]) == (1024, 256)


@pytest.mark.parametrize("option", ["--storage-gb-per-s", "--network-gb-per-s"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast"])
def test_plan_rates_that_can_not_be_are_usage_errors(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--rows", "10", "--in", "8", "--out", "8", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: got '{value}', expected GB/s, a number above 0" in error_line(capsys)


@pytest.mark.parametrize("option", ["--chunk-rows", "--in"])
def test_plan_of_something_huge_says_that_it_does_not_fit(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--rows", "1000", "--in", "8192", "--out", "8192", option, "999999999999"]) == 0
    text = capsys.readouterr().out
    assert "it would not run: weights and 6 chunks" in text and "a GPU has 139.7" in text
