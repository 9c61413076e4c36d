"""How rows are staged on this machine, and what its copies reach: measured once, kept in a file, shown in reports.

A measurement takes a second or two, so it is made where much is moved, once on a machine, and kept in
`cache_dir()/tuning/`, one JSON file a kind of machine. Environment variables go before what was measured (see
`Staging.chosen`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.arrays import HostArray
from pipeline.config import GIB, MIB, Staging, cache_dir, cores, tuning
from pipeline.devices.base import Device
from pipeline.errors import DeviceMemoryError
from pipeline.instrument import Ceilings, bus_rates, host_rates
from pipeline.staging.native import workers_kind
from pipeline.tuning.measure import RING_BYTES, Copies

# A measurement takes a second, as long as a bus takes for some 80 GiB, in and out together. It is made once the runs of
# a fleet, with the next one, have moved so much: a job that is over sooner would only wait for it.
PAYS_BYTES = 256 * GIB
SUSTAINED_BYTES = 8 * GIB  # a run that moves as much is a measurement itself: caches hold little of its rows
_ROUNDED_UP = 1 + 1e-9  # of a ceiling that was raised to a rate, the rate is at most all
_BUDGET_S, _TRIAL_S = 1.5, 0.03
_ROUNDS = 3
_BETTER = 1.1  # by less than that, trials differ from each other: what suits most machines stays
_RINGS = ((8, 4), (8, 6), (4, 8), (2, 12), (16, 4))  # MiB a piece, pieces each way


@dataclass(frozen=True)
class Measured:
    """What one measurement found. GB/s are 1e9 bytes per second, each way, of all the machine's devices that were used.

    `h2d` and `d2h` are a direction's alone and `duplex` both at once, from and to pinned memory; `host` is what the
    copy workers fill and at the same time drain without a bus; `staged` is all of it together, ordinary memory to
    ordinary memory, with the pieces and workers that were chosen.
    """

    piece_bytes: int
    ring_pieces: int
    workers: int
    h2d_gb_per_s: float
    d2h_gb_per_s: float
    duplex_gb_per_s: float
    host_gb_per_s: float
    staged_gb_per_s: float
    seconds: float  # that the measurement took
    time: str  # when it was made, ISO 8601
    raised: str = ""  # when a run last beat it and raised its ceilings, ISO 8601; "" where none did

    @property
    def origin(self) -> str:
        return f"measured on this machine at {self.time}"

    @property
    def ceilings_origin(self) -> str:
        return f"{self.origin}, raised by a run at {self.raised}" if self.raised else self.origin

    def staging(self) -> Staging:
        return Staging(self.piece_bytes, self.ring_pieces, self.workers, origin=self.origin)

    def ceilings(self, moved_bytes: Mapping[str, float], devices: int) -> Ceilings:
        """Those of one of `devices` devices that were measured together, for rows of which each stage moves so many
        bytes; None for a stage that moves none."""
        n = moved_bytes
        bus = (self.h2d_gb_per_s, self.d2h_gb_per_s, self.duplex_gb_per_s)
        rates = (*bus_rates(n["H2D"], n["D2H"], *bus), *host_rates(n["fill"], n["drain"], self.host_gb_per_s))
        moves = (n["H2D"], n["D2H"], n["fill"], n["drain"])
        h2d, d2h, fill, drain = (rate / devices if moved else None for rate, moved in zip(rates, moves, strict=True))
        return Ceilings(h2d, d2h, fill, drain, origin=self.ceilings_origin)

    def raised_to(self, moved_bytes: Mapping[str, float], run_s: float, when: str) -> Measured:
        """With the rates raised that a run beat whose stages moved so many bytes in `run_s` seconds; itself where it
        beat none.

        The least that it proves: a direction of the bus moved as many bytes with the other one busy as that one moved,
        and the rest alone; the rates that this takes are raised by the same factor, so that it would have taken just
        `run_s`. A direction alone is at least as fast as with the other one busy. Copy workers: see `host_rates`.
        """
        gb = {stage: n / 1e9 for stage, n in moved_bytes.items()}
        both = min(gb["H2D"], gb["D2H"])
        h2d, d2h, duplex = self.h2d_gb_per_s, self.d2h_gb_per_s, self.duplex_gb_per_s
        h2d_load = (both / duplex + (gb["H2D"] - both) / h2d) / run_s
        d2h_load = (both / duplex + (gb["D2H"] - both) / d2h) / run_s
        host_load = (gb["fill"] + gb["drain"]) / (2 * self.host_gb_per_s) / run_s
        if max(h2d_load, d2h_load, host_load) <= 1:
            return self
        factor, host_factor = (load * _ROUNDED_UP if load > 1 else 1.0 for load in (max(h2d_load, d2h_load), host_load))
        if both:
            duplex *= factor
        if gb["H2D"] > both:
            h2d *= factor
        if gb["D2H"] > both:
            d2h *= factor
        return replace(
            self,
            h2d_gb_per_s=max(h2d, duplex),
            d2h_gb_per_s=max(d2h, duplex),
            duplex_gb_per_s=duplex,
            host_gb_per_s=self.host_gb_per_s * host_factor,
            raised=when,
        )


class Tuning:
    """What is known of the copies of some opened devices, and what could still be measured."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = list(devices)
        self.measured: Measured | None = None
        self._asked_bytes = 0
        self._why_not = ""
        if all(device.has_bus for device in devices):
            self._facts = machine_facts([device.description for device in devices])
            self.measured = known(self._facts)
        else:
            self._why_not = "no bus to measure"

    @property
    def staging(self) -> Staging:
        """How rows should be staged, as far as it is known now."""
        found = Staging.default() if self.measured is None else self.measured.staging()
        return Staging.chosen(replace(found, origin=found.origin + (f" ({self._why_not})" if self._why_not else "")))

    def pays(self, n_bytes: int) -> bool:
        """Whether a run that moves `n_bytes` in and out together should start with a measurement. To be asked once
        before each run."""
        when = tuning()
        if self._why_not or self.measured is not None or when == "never":
            return False
        self._asked_bytes += n_bytes
        return when == "always" or self._asked_bytes >= PAYS_BYTES

    def measure(self, source: HostArray | None = None) -> None:
        """Measure, and keep what was found for later processes. Blocks for a second or two.

        `source` is contiguous memory whose reading tells more than that of scratch memory, which a large cache holds.
        Where a device lacks the memory for it nothing is measured, and `staging` says so.
        """
        try:
            copies = Copies(self._devices, _TRIAL_S, source)
        except DeviceMemoryError as error:
            self._why_not = f"not measured: {error}"
            return
        with copies:
            self.measured = measured_with(copies, time.perf_counter, _BUDGET_S)
        save(self._facts, self.measured)

    def raise_to(self, moved_bytes: Mapping[str, float], run_s: float) -> bool:
        """Raise what was measured where a run beat it whose stages moved so many bytes in `run_s` seconds, here and in
        the file; whether it did.

        Only a run of 8 GiB over the bus counts: rows of a smaller one may have come out of a cache. It counts over all
        of the time in which rows moved, so its rates are no bursts.
        """
        if self.measured is None or moved_bytes["H2D"] + moved_bytes["D2H"] < SUSTAINED_BYTES:
            return False
        raised = self.measured.raised_to(moved_bytes, run_s, _now())
        if raised == self.measured:
            return False
        kept = load(self._facts)  # other processes may have raised it, or measured anew
        self.measured = raised if kept is None else kept.raised_to(moved_bytes, run_s, _now())
        if self.measured != kept:
            save(self._facts, self.measured)
        return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def measured_with(copies: Copies, now: Callable[[], float], budget_s: float) -> Measured:
    """Ceilings first, then the search in what is left of the budget."""
    start_s = now()
    first = Staging.default()
    h2d, d2h, duplex = (rate / 1e9 for rate in copies.bus(first))
    best, staged = search(copies.staged, first, lambda: now() - start_s < budget_s)
    host = copies.host(best) / 1e9
    rates = (h2d, d2h, duplex, host, staged / 1e9)
    return Measured(best.piece_bytes, best.ring_pieces, best.workers, *rates, now() - start_s, _now())


def search(rate: Callable[[Staging], float], first: Staging, time_left: Callable[[], bool]) -> tuple[Staging, float]:
    """The staging with the best rate, and that rate: first the number of workers, then piece and ring.

    `first` is tried in any case, and stays where nothing is better by more than trials differ.
    """
    more = dict.fromkeys(min(n, max(1, cores() - 1)) for n in (first.workers * 3 // 2, 2 * first.workers))
    counts = {first.workers: None} | more  # fewer move less, though a short trial can make it seem more
    best, _ = _best([replace(first, workers=n) for n in counts], rate, time_left)
    rings = {(first.piece_bytes, first.ring_pieces): None} | {(mib * MIB, pieces): None for mib, pieces in _RINGS}
    candidates = [replace(best, piece_bytes=size, ring_pieces=pieces) for size, pieces in rings]
    return _best([each for each in candidates if each.piece_bytes * each.ring_pieces <= RING_BYTES], rate, time_left)


def _best(
    candidates: list[Staging], rate: Callable[[Staging], float], time_left: Callable[[], bool]
) -> tuple[Staging, float]:
    """The best by the median of its rounds, so that one trial that something else on the machine held up doesn't count,
    nor one lucky trial. A round that the time cuts short counts where no candidate had a whole one; what wasn't tried
    can't win.

    The best of several is likely to have been lucky, so it takes the first one's place only after it has won as many
    rounds against it alone, each of them; for these there is always time (docs/notes/runs.md has a case).
    """
    first = candidates[0]
    rates = _rounds(candidates, rate, time_left)
    rounds = min(len(found) for found in rates if found)
    middle = [statistics.median(found[:rounds]) if found else 0.0 for found in rates]
    winner = max(range(len(candidates)), key=lambda i: middle[i])
    if middle[winner] >= _BETTER * middle[0]:
        ones, others = _rounds([first, candidates[winner]], rate, lambda: True)
        if all(other >= _BETTER * one for one, other in zip(ones, others, strict=True)):
            return candidates[winner], statistics.median(others)
    return first, middle[0]


def _rounds(
    candidates: list[Staging], rate: Callable[[Staging], float], time_left: Callable[[], bool]
) -> list[list[float]]:
    """The rates of each candidate, who take turns while there is time; the first one has one in any case."""
    rates: list[list[float]] = [[] for _ in candidates]
    for number in range(_ROUNDS):
        for candidate, found in zip(candidates, rates, strict=True):
            if (candidate is candidates[0] and number == 0) or time_left():
                found.append(rate(candidate))
    return rates


# -- the file ----------------------------------------------------------------------------------------------------------


def machine_facts(devices: Sequence[str]) -> dict[str, Any]:
    """What a measurement with devices of these descriptions depends on. One that was made on another machine of which
    all this is the same may stand for it."""
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "devices": list(devices),
        "copy_workers": workers_kind(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:  # long where there are many cores, and made while it is read
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.machine()


def path_of(facts: dict[str, Any]) -> Path:
    """The file for a machine with these facts."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "tuning" / f"{digest}.json"


def known(facts: dict[str, Any]) -> Measured | None:
    """What was measured on this kind of machine, where PIPELINE_TUNE lets it be used; None where nothing was."""
    return load(facts) if tuning() == "once" else None


def load(facts: dict[str, Any]) -> Measured | None:
    """What was measured on this kind of machine, or None. A file that can't be used is reported as a RuntimeWarning."""
    path = path_of(facts)
    try:
        document = json.loads(path.read_text())
        if document["machine"] != facts:
            raise ValueError("it is of another machine")
        return _checked(document["measured"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(
            f"the measurement in {path} can't be used: {error!r}; it will be measured again, or remove it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _checked(values: dict[str, Any]) -> Measured:
    """`values` as a `Measured`.

    Raises:
        ValueError, TypeError: fields are missing or unknown, or numbers aren't positive.
    """
    measured = Measured(**values)
    for field in fields(Measured):
        value, kind = getattr(measured, field.name), str(field.type)
        allowed: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
        right = isinstance(value, allowed[kind]) and not isinstance(value, bool)
        if not right or (kind != "str" and not 0 < value < float("inf")):
            raise ValueError(f"{field.name} is {value!r}, expected a positive {kind}")
    return measured


def save(facts: dict[str, Any], measured: Measured) -> None:
    """Keep a measurement. A folder that can't be written is reported as a RuntimeWarning: later processes measure."""
    path, text = path_of(facts), json.dumps({"machine": facts, "measured": asdict(measured)}, indent=2) + "\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
        try:
            with open(fd, "w") as file:
                file.write(text)
            os.replace(name, path)  # whole or not at all, also where several processes measure
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(
            f"the measurement of this machine can't be kept in {path}: {error}; set PIPELINE_CACHE_DIR to a folder of "
            f"your own",
            RuntimeWarning,
            stacklevel=2,
        )
