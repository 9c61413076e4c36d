"""Ceilings that a run beat: raised where it was large enough to tell, here and for later processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import FusedLinear, Pipeline
from pipeline.arrays import HostArray
from pipeline.config import GIB, MIB
from pipeline.devices.cpu import CpuDevice
from pipeline.instrument import STAGES, Recorder
from pipeline.report.stages import stage_stats
from pipeline.tuning import tune

MEASURED = tune.Measured(4 * MIB, 5, 3, 55.0, 54.0, 50.0, 60.0, 45.0, 0.9, "2026-11-22T20:00:00+00:00")
NOON = "2026-11-30T12:00:00+00:00"
BUS = ("h2d_gb_per_s", "d2h_gb_per_s", "duplex_gb_per_s")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPELINE_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("PIECE_BYTES", "RING_PIECES", "COPY_WORKERS", "TUNE"):
        monkeypatch.delenv(f"PIPELINE_{name}", raising=False)
    return tmp_path / "cache"


def moved(in_gb: float, out_gb: float, *, staged: bool = False) -> dict[str, float]:
    host = {"fill": in_gb * 1e9 * staged, "drain": out_gb * 1e9 * staged}
    return {"H2D": in_gb * 1e9, "kernel": 0, "D2H": out_gb * 1e9, **host}


def bus(measured: tune.Measured) -> list[float]:
    return [getattr(measured, name) for name in BUS]


# -- by how much -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (moved(50, 50), [55, 54, 50]),
        (moved(52, 52), [55, 54, 52]),  # both ways at once
        (moved(60, 60), [60, 60, 60]),  # and a direction alone is no slower
        (moved(58, 0), [58, 54, 50]),  # one way alone tells nothing of both
        (moved(0, 58), [55, 58, 50]),
        (moved(30, 58), [50 * 1.118519, 54 * 1.118519, 50 * 1.118519]),
    ],
)
def test_run_raises_the_rates_that_it_used(run: dict[str, float], expected: list[float]) -> None:
    raised = MEASURED.raised_to(run, 1.0, NOON)
    assert bus(raised) == pytest.approx(expected, rel=1e-4) and raised.host_gb_per_s == 60
    assert (raised is MEASURED) == (bus(raised) == bus(MEASURED))
    assert (f"raised by a run at {NOON}" in raised.ceilings_origin) == (raised is not MEASURED)
    assert "raised" not in raised.origin, "how rows are staged is as it was measured"


def test_run_raises_the_copy_workers_rate_by_fills_and_drains_together() -> None:
    one_way = moved(40, 10, staged=True)
    assert MEASURED.raised_to({**one_way, "fill": 110e9}, 1.0, NOON).host_gb_per_s == 60
    raised = MEASURED.raised_to({**one_way, "fill": 120e9}, 1.0, NOON)
    assert raised.host_gb_per_s == pytest.approx(65) and bus(raised) == bus(MEASURED)


gigabytes = st.floats(0.0, 1000.0).map(lambda gb: gb if gb > 1e-3 else 0.0)


@given(gigabytes, gigabytes, gigabytes, gigabytes, st.integers(1, 4))
def test_no_share_of_a_raised_ceiling_is_more_than_all(
    h2d: float, d2h: float, fill: float, drain: float, devices: int
) -> None:
    each = {"H2D": int(h2d * 1e9), "D2H": int(d2h * 1e9), "fill": int(fill * 1e9), "drain": int(drain * 1e9)}
    run = {stage: devices * each.get(stage, 0) for stage in STAGES}
    raised = MEASURED.raised_to(run, 1.0, NOON)
    recorders = [Recorder(f"cuda:{number}") for number in range(devices)]
    for recorder in recorders:
        for stage, n_bytes in each.items():
            if n_bytes:
                recorder.add(stage, 0, 0.0, 1.0, n_bytes)
    ceilings = {recorder.device: raised.ceilings(run, devices) for recorder in recorders}
    for name, stage in stage_stats(recorders, 1.0, (), ceilings).items():
        if each.get(name):
            assert stage.ceiling_share is not None and stage.ceiling_share <= 1, name
    assert min(raised.h2d_gb_per_s, raised.d2h_gb_per_s) >= raised.duplex_gb_per_s
    assert all(after >= before for after, before in zip(bus(raised), bus(MEASURED), strict=True))
    assert raised.raised_to(run, 1.0, "later") is raised, "once is enough"


# -- in a Pipeline -----------------------------------------------------------------------------------------------------


class Bus(CpuDevice):
    """Rows go through its slots as a GPU's do."""

    has_bus, description = True, "a device with a bus"

    def __init__(self) -> None:
        super().__init__()
        self.description = type(self).description

    def in_place(self, rows: HostArray) -> bool:
        return False

    def own_rows(self, rows: HostArray) -> None:
        return None


LAYER = FusedLinear(np.eye(48, 64, dtype=np.float32), None, 2.0)
X = np.random.default_rng(1).standard_normal((1000, 64), np.float32)
X, OUT = np.asfortranarray(X), np.empty((1000, 48), np.float32, order="F")  # neither end can be used in place
FACTS = tune.machine_facts([Bus.description])
SLOW = tune.Measured(4 * MIB, 5, 3, 1.1e-6, 1.1e-6, 1e-6, 1e-6, 1e-6, 0.9, "2026-11-22T20:00:00+00:00")


@pytest.fixture(autouse=True)
def slow_measurement(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was measured on this machine is far too slow."""
    monkeypatch.setattr("pipeline.fleet.open_device", lambda name: Bus())
    tune.save(FACTS, SLOW)
    yield


def test_large_run_that_beats_the_measurement_raises_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SUSTAINED_BYTES", 1000 * (64 + 48) * 4)
    with Pipeline(LAYER, devices="cpu") as pipe:
        assert pipe.ceilings["cpu"].h2d_gb_per_s is not None and pipe.ceilings["cpu"].h2d_gb_per_s < 2e-6
        stats = pipe.run(X, OUT).stats
        shares = {name: stats.stages[name].ceiling_share for name in ("fill", "H2D", "D2H", "drain")}
        assert all(share is not None and share <= 1 for share in shares.values()), shares
        assert max(share for share in shares.values() if share is not None) == pytest.approx(1)
        assert "raised by a run at" in stats.ceilings["cpu"].origin and stats.staging_origin == SLOW.origin
        assert pipe.ceilings["cpu"].h2d_gb_per_s > 2e-6, "the next run's progress goes by it"
    kept = tune.load(FACTS)
    assert kept is not None and kept.raised and kept.duplex_gb_per_s > SLOW.duplex_gb_per_s
    with Pipeline(LAYER, devices="cpu") as pipe:
        assert pipe.ceilings["cpu"].origin == kept.ceilings_origin, "and later processes"


def test_smaller_run_that_beats_the_measurement_is_not_compared_with_it() -> None:
    with Pipeline(LAYER, devices="cpu") as pipe:
        stats = pipe.run(X, OUT).stats
    for stage in stats.stages.values():
        assert stage.ceiling is None and stage.ceiling_share is None
    assert tune.load(FACTS) == SLOW and "of its ceiling" not in str(stats)


def test_raising_keeps_what_another_process_raised_or_measured_meanwhile() -> None:
    tuning = tune.Tuning([Bus()])
    other = SLOW.raised_to(moved(500, 500), 1.0, NOON)
    tune.save(FACTS, other)
    assert tuning.raise_to(moved(100, 100), 1.0)
    assert tuning.measured == tune.load(FACTS) == other, "it was raised by more"
    assert tuning.raise_to(moved(600, 600), 1.0)
    assert tuning.measured == tune.load(FACTS) and tuning.measured.duplex_gb_per_s == pytest.approx(600)
    assert not tuning.raise_to(moved(600, 600), 1.0)


def test_raising_needs_a_sustained_run() -> None:
    tuning = tune.Tuning([Bus()])
    just_less = (tune.SUSTAINED_BYTES / 2 - 1) / 1e9
    assert tune.SUSTAINED_BYTES == 8 * GIB and not tuning.raise_to(moved(just_less, just_less), 1e-3)
    assert tuning.measured == tune.load(FACTS) == SLOW


def test_measurement_of_an_earlier_version_is_read(own_cache: Path) -> None:
    path = tune.path_of(FACTS)
    document = json.loads(path.read_text())
    del document["measured"]["raised"]
    path.write_text(json.dumps(document))
    assert tune.load(FACTS) == SLOW


def test_run_of_some_devices_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is all devices' together: one alone may have more than its part."""
    monkeypatch.setattr(tune, "SUSTAINED_BYTES", 1)
    with Pipeline(LAYER, devices="cpu") as pipe:
        recorder = Recorder("cpu")
        recorder.add("H2D", 0, 0.0, 1.0, 10**12)
        pipe.fleet._devices.append(Bus())
        assert pipe.fleet.ceilings_of([recorder], 1.0)["cpu"].h2d_gb_per_s == pytest.approx(SLOW.h2d_gb_per_s / 2)
        pipe.fleet._devices.pop()
        assert pipe.fleet.ceilings_of([recorder], 1.0)["cpu"].h2d_gb_per_s == pytest.approx(1000)
