"""The parts of `scripts/bench stream` that need no GPU: cold calls, turns, fresh memory and its ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benches import pages
from benches.stream import cold, compare, memory, rows
from benches.stream.cold import Kind, run_kind, summarized


def test_cold_process_times_each_call_and_checks_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_kind(Kind(3000, "ordinary", "no context"), 64, "ieee", "cpu")
    assert found["right"] and len(found["calls_s"]) == 5 and len(found["warm_runs_s"]) == 5
    assert found["first_beyond_warm_s"] == pytest.approx(found["calls_s"][0] - found["warm_s"])
    assert 0 < found["first_chunk_s"] <= found["calls_s"][0] and found["modules_imported_by_first_call"] > 0
    cold.show("3,000 rows", summarized([found, found]))
    assert "second call beyond" in capsys.readouterr().out


def test_cold_summary_is_wrong_where_a_process_was() -> None:
    times = {"calls_s": [3.0, 2.0, 1.0, 1.0, 1.0], "first_s": 3.0, "second_s": 2.0, "later_s": 1.0, "warm_s": 1.0}
    beyond = {"first_beyond_warm_s": 2.0, "second_beyond_warm_s": 1.0, "torch_imported": False}
    one = {
        **times,
        **beyond,
        **dict.fromkeys((*cold.BESIDE, *cold.RESIDENT), 1),
        "worst_difference": 0.0,
        "right": True,
    }
    found = summarized([one, {**one, "worst_difference": float("nan"), "right": False}, one])
    assert not found["right"] and found["worst_difference"] != found["worst_difference"]
    assert found["first_beyond_warm_s"]["median"] == 2.0 and found["processes"] == 3


def test_touch_fresh_writes_to_every_page_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def empty(n: int, dtype: Any) -> Any:
        taken.append(np.zeros(n, dtype))
        return taken[-1]

    n_bytes = 3 * pages.BLOCK_BYTES + 5000
    monkeypatch.setattr(pages, "np", SimpleNamespace(empty=empty, uint8=np.uint8))
    assert pages.touch_fresh(n_bytes, 3) > 0
    (array,) = taken
    assert array[:: pages.PAGE_BYTES].all() and array.sum() == -(-n_bytes // pages.PAGE_BYTES)


def test_touch_first_takes_no_more_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "free_bytes", lambda: 2**24)
    assert pages.touch_first(100).startswith("touched 0.0 GiB of memory at ")


def test_thread_counts_are_at_most_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "cores", lambda: 10)
    assert pages.thread_counts() == [4, 8, 10]


@dataclass
class FakeRows:
    """What `compare` asks of rows, with a bus that copies them in a given time."""

    ceiling: float = 0.5
    precision: str = "ieee"
    x: Any = None
    y: Any = None

    def __post_init__(self) -> None:
        self.x = self.y = torch.ones(1000, 64)

    def ceiling_s(self) -> float:
        return self.ceiling

    def worst_difference(self, _: Any) -> float:
        return 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `timed` sees: [now]."""
    now = [0.0]
    monkeypatch.setattr("benches.turns.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_compare_counts_the_first_run_of_a_turn_and_tells_the_second_apart(clock: list[float]) -> None:
    took, measured = iter([2.0, 1.0] * 5), iter([4.0, 3.0, 5.0, 9.0, 1.0])

    def run() -> None:
        clock[0] += next(took)

    found = compare.compare(
        FakeRows(), {"pipeline": compare.Contender(run)}, 5, alone={"alone": lambda: next(measured)}
    )  # type: ignore[arg-type]
    row = found["contenders"]["pipeline"]
    assert row["seconds"]["median"] == 2.0 and row["of_ceiling"] == 0.25
    assert row["again_seconds"]["median"] == 1.0 and row["again_of_ceiling"] == 0.5
    assert found["alone_gb_per_s"] == {"alone": {"median": 4.0, "min": 1.0, "max": 9.0}}


@pytest.mark.parametrize(("clearing_s", "expected_s"), [(4.0, 4.0), (0.1, 0.5)])
def test_fresh_result_is_compared_with_the_slower_of_bus_and_clearing(
    clearing_s: float, expected_s: float, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "thread_counts", lambda: [2, 4])
    monkeypatch.setattr(memory, "touch_fresh", lambda _, threads: clearing_s * (1 if threads == 4 else 2))

    def run(_: Any) -> Any:
        clock[0] += 5.0
        return SimpleNamespace(out=None, stats=SimpleNamespace(as_dict=dict))

    found = memory.to_fresh(FakeRows(), SimpleNamespace(run=run), 3)  # type: ignore[arg-type]
    assert found["fresh"]["of_ceiling"]["pipeline"] == pytest.approx(expected_s / 5.0)
    assert found["contenders"]["pipeline"]["of_ceiling"] == pytest.approx(0.5 / 5.0)


def test_the_bus_is_measured_over_short_pinned_rows_as_if_they_were_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "bare_copies", lambda x, _, times: len(x) * times / 100)
    x, short = torch.ones(1000, 8), torch.ones(300, 8)
    made = rows.Rows(None, "ieee", None, None, x, x, short, short, None)  # type: ignore[arg-type]
    assert made.ceiling_s() == pytest.approx(10.0)


def test_cold_kinds_are_of_two_sizes_and_start_in_both_ways() -> None:
    found = cold.kinds(8, 8192)
    assert found["8 GiB pinned"] == Kind(262144, "pinned") and found["1,024 rows pinned"].rows == 1024
    assert found["2 GiB ordinary, CUDA not started"] == Kind(65536, "ordinary", "no context")


def test_memory_is_refused_where_even_two_arrays_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "free_bytes", lambda: 2**20)
    with pytest.raises(SystemExit, match="pass a smaller --gib"):
        rows.Memory.take(2**20)


def test_cases_that_need_long_pinned_rows_are_refused_where_they_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    short = rows.Memory([np.ones(8), np.ones(8)], [np.ones(2), np.ones(2)])
    options = SimpleNamespace(gib=32.0, features=8, precision="ieee")
    monkeypatch.setattr(rows, "_made", {(32.0, 8, "ieee"): SimpleNamespace(memory=short)})
    assert rows.rows_for(options, whole_pinned=False).memory is short  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match=r"more arrays of 32 GiB than fit .*: pass a smaller --gib"):
        rows.rows_for(options)  # type: ignore[arg-type]
