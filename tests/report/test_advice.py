"""The bound, what is said of it, and the advice that goes with it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.instrument import STAGES, Ceilings, Recorder
from pipeline.report.advice import DISK, FINISH, NEAR, NONE, SET_UP, advice, bound, bound_text, largest
from pipeline.report.record import Ends, Parts
from pipeline.report.stages import StageStats, nearness, stage_stats

WARM = Parts(setup_s=0.0, run_s=1.0, finish_s=0.0)
FILE = Ends("file", "file")


def stages(**busy_shares: float) -> dict[str, StageStats]:
    """Stages of a run; those that were busy most of the time were near their ceilings."""
    return {
        name: StageStats(1, 0, 0.0, busy_shares[name], ceiling_share=0.95 if busy_shares[name] > 0.9 else None)
        if name in busy_shares
        else StageStats(0, 0, 0.0, 0.0)
        for name in STAGES
    }


@pytest.mark.parametrize(
    ("busy", "runs_as", "said"),
    [
        ({"H2D": 0.99}, "tf32", "bfloat16 or float16"),
        ({"D2H": 0.99}, "bfloat16", "the bus is used up: another GPU"),
        ({"kernel": 0.99, "H2D": 0.2}, "ieee", "precision='tf32'"),
        ({"kernel": 0.99}, "bfloat16", "arithmetic is used up: another GPU"),
        ({"fill": 0.99}, "tf32", "copying from the source"),
        ({"drain": 0.99}, "tf32", "storing the result"),
        ({"H2D": 0.3, "kernel": 0.2}, "tf32", "no stage is at its limit all along"),
        ({}, "tf32", ""),
    ],
)
def test_advice_goes_by_the_bound(busy: dict[str, float], runs_as: str, said: str) -> None:
    text = advice(stages(**busy), WARM, runs_as, on_cpu=False)
    assert said in text and "\n" not in text
    assert bool(text) == bool(busy)


def test_advice_tells_a_busy_bus_from_a_used_up_one() -> None:
    slow = {**stages(), "H2D": StageStats(1, 0, 0.0, 0.98, ceiling_share=0.5)}
    assert "only 50% of what it can" in advice(slow, WARM, "tf32", on_cpu=False)
    assert "a GPU" in advice(stages(kernel=0.99), WARM, "ieee", on_cpu=True)


@pytest.mark.parametrize(
    ("busy", "ends", "said"),
    [
        ("fill", Ends("file"), "reading the file"),
        ("fill", Ends("batches"), "gathering batches"),
        ("drain", Ends("file", "file"), "writing the file"),
        ("drain", Ends("memory", "fresh memory"), "written before"),
    ],
)
def test_advice_goes_by_where_rows_come_from_and_go(busy: str, ends: Ends, said: str) -> None:
    assert said in advice(stages(**{busy: 0.99}), WARM, "tf32", on_cpu=False, ends=ends)


@pytest.mark.parametrize(
    ("parts", "ends", "name", "said", "advised"),
    [
        (
            Parts(3.0, 1.0, 0.0),
            Ends(),
            SET_UP,
            "bound by set-up, which took 75% of the time, before",
            "keep a Pipeline open",
        ),
        (Parts(3.0, 1.0, 0.0), Ends("batches"), SET_UP, "bound by set-up", "give its first batch sooner"),
        (Parts(3.0, 1.0, 0.0, room_s=1.4), FILE, SET_UP, "bound by set-up", "keep a Pipeline open"),
        (Parts(3.0, 1.0, 0.0, room_s=1.6), FILE, SET_UP, "bound by set-up", "makes the pages of the whole output"),
        (
            Parts(0.0, 1.0, 4.0),
            FILE,
            DISK,
            "bound by disk, which took 80% of the time, after the last row",
            "faster disk",
        ),
        (Parts(0.0, 1.0, 4.0), Ends(), FINISH, "bound by finish, which took 80% of the time, after", "pass an `out`"),
    ],
)
def test_part_that_takes_most_of_the_seconds_is_the_bound(
    parts: Parts, ends: Ends, name: str, said: str, advised: str
) -> None:
    found = stages(H2D=0.99)
    assert bound(found, parts, ends) == name
    assert bound_text(name, found, parts, ends).startswith(said)
    assert advised in advice(found, parts, "tf32", on_cpu=False, ends=ends)


def test_part_that_took_less_than_a_stage_is_not_the_bound() -> None:
    assert bound(stages(H2D=0.99), Parts(0.4, 1.0, 0.4), FILE) == "H2D"


@pytest.mark.parametrize(
    ("parts", "said", "advised"),
    [
        (WARM, "the largest part is H2D, which was busy 73% of the time in which rows moved", "more rows"),
        (
            Parts(0.45, 0.4, 0.15),
            "the largest part is set-up, which took 45% of the time, before the first row moved",
            "keep a Pipeline open",
        ),
    ],
)
def test_nothing_is_called_a_bound_that_is_none(parts: Parts, said: str, advised: str) -> None:
    found = stages(H2D=0.73)
    assert bound(found, parts) == NONE
    assert bound_text(NONE, found, parts) == f"bound by none: nothing is at its limit all along; {said}"
    assert advised in advice(found, parts, "tf32", on_cpu=False)


def test_empty_run_has_neither_bound_nor_advice() -> None:
    cold = Parts(3.0, 0.0, 0.0)
    assert bound(stages(), cold) == NONE and bound_text(NONE, stages(), cold) == ""
    assert advice(stages(), cold, "tf32", on_cpu=False) == ""


def test_copy_workers_at_their_ceiling_are_the_bound_though_neither_fill_nor_drain_is_always_busy() -> None:
    found = {
        **stages(),
        "fill": StageStats(1, 0, 0.0, 0.64, ceiling_share=0.88),
        "H2D": StageStats(1, 0, 0.0, 0.79, ceiling_share=0.71),
        "drain": StageStats(1, 0, 0.0, 0.45, ceiling_share=0.87),
    }
    assert bound(found, WARM) == "fill" and "copy workers" in advice(found, WARM, "tf32", on_cpu=False)


def test_bound_text_names_the_ceiling_and_where_it_comes_from() -> None:
    found = {**stages(), "H2D": StageStats(1, 0, 0.0, 0.98, rate=45.0, ceiling=50.0, ceiling_share=0.9)}
    text = bound_text("H2D", found, WARM, origin="measured at noon")
    assert text == (
        "bound by H2D, which was busy 98% of the time in which rows moved, at 90% of its ceiling of 50.0 GB/s "
        "(measured at noon)"
    )


# -- of any run --------------------------------------------------------------------------------------------------------

seconds = st.floats(0.0, 100.0)
parts_of = st.builds(Parts, seconds, st.floats(1e-3, 100.0), seconds)
rates = st.floats(1e-3, 1e3)
operations = st.lists(
    st.tuples(st.sampled_from(STAGES), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 10**11)), max_size=12
)


@given(parts_of, operations, st.builds(Ceilings, rates, rates, rates, rates, rates), st.sampled_from([Ends(), FILE]))
def test_shares_are_at_most_all_and_the_bound_has_the_greatest(
    parts: Parts, made: list[tuple[str, float, float, int]], ceilings: Ceilings, ends: Ends
) -> None:
    recorder = Recorder("a")
    for chunk, (stage, one, other, n_bytes) in enumerate(sorted(made, key=lambda each: min(each[1:3]))):
        recorder.add(stage, chunk, min(one, other) * parts.run_s, max(one, other) * parts.run_s, n_bytes)
    found = stage_stats([recorder], parts.run_s, (), {"a": ceilings}, flop=1e12)
    assert all(stage.busy_share <= 1 and (stage.ceiling_share or 0) <= 1 for stage in found.values())
    assert all(stage.ceiling is None or stage.rate <= stage.ceiling for stage in found.values())

    finish = DISK if ends.target == "file" else FINISH
    shares_s = {SET_UP: parts.setup_s, finish: parts.finish_s}
    shares_s |= {name: nearness(stage) * parts.run_s for name, stage in found.items()}
    name, text = bound(found, parts, ends), advice(found, parts, "tf32", on_cpu=False, ends=ends)
    assert bool(text) == bool(made) == bool(bound_text(name, found, parts, ends))
    if name in found:
        assert nearness(found[name]) >= NEAR
    elif name != NONE:
        assert shares_s[name] > parts.seconds / 2
    if made:
        top = name if name != NONE else largest(found, parts, ends)
        assert shares_s[top] == max(shares_s.values())
        assert f"bound by {name}" in bound_text(name, found, parts, ends)
        assert ("set-up" in text) == (top == SET_UP) and ("the disk" in text) == (top == DISK)
        assert ("no stage is at its limit" in text) == (name == NONE and top in found)


@given(parts_of)
def test_parts_are_all_of_the_seconds_and_shown_where_they_matter(parts: Parts) -> None:
    assert parts.seconds == pytest.approx(parts.setup_s + parts.run_s + parts.finish_s)
    assert bool(parts.text()) == (parts.run_s < 0.99 * parts.seconds)
