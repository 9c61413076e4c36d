"""Planted faults in C: bugs put into the mover and the copy workers on purpose, which the movers' checks must notice.

All of them are planted in one copy of the sources, each behind a number that a variable of the library must have: one
build serves all, and with no fault's number it is the control, which must pass every check.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.grounds import native_ground
from helpers.mover_tests import CHECKS, CHUNK, IN, Ground
from helpers.native_device import compiler, fake_driver

from pipeline.staging import host_library
from pipeline.staging.native_mover import NativeMover

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "host"


@dataclass(frozen=True)
class Fault:
    """`right` stands in the file exactly once; `wrong` takes its place where the fault is switched on."""

    right: str
    wrong: str
    check: str  # that notices it
    file: str = "mover.c"


FAULTS = {
    "a piece freed before its event": Fault(
        "int state = m->device.query(p->event);",
        "int state = PLANTED && !p->of->request.out ? 0 : m->device.query(p->event);",
        "pieces are used again after their event only",
    ),
    "a lost wake-up": Fault(
        "if (m->sleeping) pthread_cond_signal(&m->work);",
        "if (m->sleeping && !(PLANTED && request->out)) pthread_cond_signal(&m->work);",
        "what rests wakes up",
    ),
    "a cancel that races with the last piece": Fault(
        "      give_up(m, &m->out);\n",
        "      give_up(m, &m->out);\n"
        "      if (PLANTED) {\n"
        "        pthread_mutex_lock(&m->lock);\n"
        "        atomic_store(&m->cancelling, 0);\n"
        "        pthread_cond_broadcast(&m->calm);\n"
        "        pthread_mutex_unlock(&m->lock);\n"
        "      }\n",
        "cancelling waits for the last piece",
    ),
    "a transfer reported before its drain": Fault(
        "if (!failed(p->of)) begin(m, p, !d->out);",
        "if (!failed(p->of)) begin(m, p, !d->out);\n"
        "    if (PLANTED && d->out && p->number == p->of->pieces - 1) end_transfer(p->of);",
        "pieces are drained before they are used again",
    ),
    "a queue overtaken": Fault(
        "  if (d->last) {\n    d->last->after = t;\n",
        "  if (PLANTED && d->last) {\n    t->after = d->first;\n    d->first = t;\n    t = d->last;\n"
        "  } else if (d->last) {\n    d->last->after = t;\n",
        "transfers end in the order in which they were begun",
    ),
    "a store ahead of its kernel": Fault(
        "int state = t->request.after ? m->device.query(t->request.after) : 0;",
        "int state = t->request.after && !PLANTED ? m->device.query(t->request.after) : 0;",
        "a store waits for its kernel",
    ),
    "queued when the first copy is": Fault(
        "} else if (!r->out && p->number == p->of->pieces - 1) {",
        "} else if (!r->out && p->number == (PLANTED ? 0 : p->of->pieces - 1)) {",
        "pieces are used again after their event only",
    ),
    "a piece that goes to other rows": Fault(
        "uint64_t device = r->device + (uint64_t)(p->first * r->row_bytes);",
        "uint64_t device = r->device + (uint64_t)((p->first - (PLANTED && p->number == 2)) * r->row_bytes);",
        "chunks come through",
    ),
    "a piece that is not poisoned": Fault(
        "if (m->poison) memset", "if (m->poison && !PLANTED) memset", "used pieces are poisoned"
    ),
    "a refused copy taken for made": Fault(
        "if (error || recorded) {",
        "if ((error && !PLANTED) || recorded) {",
        "copies that fail on the device are reported",
    ),
    "an error of the device lost": Fault(
        "if (state) fail_on_device(p->of, state);",
        "if (state && !PLANTED) fail_on_device(p->of, state);",
        "copies that fail on the device are reported",
    ),
    "the position of an error lost": Fault(
        "t->result.position = result.position;",
        "if (!PLANTED) t->result.position = result.position;",
        "rows that cannot be copied fail alone",
    ),
    "a cancelled transfer taken for done": Fault(
        "t->result.cancelled = 1;",
        "t->result.cancelled = !PLANTED;",
        "cancelling at any moment leaves nothing under way",
    ),
    "times of another piece": Fault(
        "mover_span* span = &t->request.spans[p->number];",
        "mover_span* span = &t->request.spans[PLANTED ? 0 : p->number];",
        "every piece is recorded",
    ),
    "an error of the copy workers lost": Fault(
        "if (error) fail(j, error, position);",
        "if (error && !PLANTED) fail(j, error, position);",
        "rows that cannot be copied fail alone",
        "copy_workers.c",
    ),
}


def planted(name: str, text: str) -> str:
    """A source file with all of its faults."""
    for number, fault in enumerate(FAULTS.values(), 1):
        if fault.file == name:
            assert text.count(fault.right) == 1, f"{name} has {text.count(fault.right)} times: {fault.right}"
            text = text.replace(fault.right, fault.wrong.replace("PLANTED", f"(host_fault == {number})"))
    return f"extern int host_fault;\n{text}"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library with all faults."""
    fake_driver()  # skips where there is no C compiler
    folder = tmp_path_factory.mktemp("faulty")
    for file in SOURCES.iterdir():
        text = file.read_text()
        (folder / file.name).write_text(planted(file.name, text) if file.suffix == ".c" else text)
    (folder / "fault.c").write_text("int host_fault;\n")
    built = folder / "_host.so"
    options = ["-std=c11", "-O1", "-pthread", "-shared", "-fPIC", '-DHOST_SOURCE="faulty"']
    sources = [str(file) for file in sorted(folder.glob("*.c"))]
    subprocess.run([str(compiler()), *options, "-o", str(built), *sources], check=True)
    library, reason = host_library.load_library(built, "faulty")
    assert library is not None, reason
    return library


@contextmanager
def ground_with(library: Any, fault: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    """A ground with that library, in which a fault is switched on."""
    monkeypatch.setattr(host_library, "find_library", lambda: (library, ""))
    switch = ctypes.c_int.in_dll(library, "host_fault")
    ground = native_ground()
    if fault:
        ground.patience_s = 1.0
    switch.value = fault
    try:
        yield ground
    finally:
        switch.value = 0
        # Wakes the mover's thread, should it have missed a call.
        ground.mover.load(_some_rows(), CHUNK, 0, 0)
        ground.close()


def _some_rows() -> Any:
    from helpers.data import random_rows

    from pipeline.io.memory import ArrayRows

    return ArrayRows(random_rows(CHUNK, IN))


def test_control_without_a_fault_passes_all_checks(faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for check in CHECKS.values():
        with ground_with(faulty, 0, monkeypatch) as ground:
            check(ground)


TRIES = 10  # of a check: most faults are races, which a busy machine can hide once


@pytest.mark.parametrize("name", FAULTS)
def test_fault_in_c_is_caught(name: str, faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    noticed: list[BaseException] = []  # with the frames of the check, and so the memory that C may still write to
    for _ in range(TRIES):
        with ground_with(faulty, list(FAULTS).index(name) + 1, monkeypatch) as ground:
            try:
                CHECKS[FAULTS[name].check](ground)
            except (AssertionError, pytest.fail.Exception) as error:
                noticed.append(error)
                break
    assert noticed, f"{name}: not noticed"


class Forgetful(set[Any]):
    """Takes transfers in and forgets them, but for what C writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Any] = []

    def add(self, transfer: Any) -> None:
        self.memory.append((transfer.memory, transfer.spans_ns))


def test_fault_that_the_memory_of_transfers_is_not_kept_is_caught() -> None:
    ground = native_ground()
    assert isinstance(ground.mover, NativeMover)
    ground.mover._transfers = Forgetful()
    with pytest.raises(AssertionError, match="has been freed"):
        CHECKS["what is under way is kept alive"](ground)
    ground.close()
