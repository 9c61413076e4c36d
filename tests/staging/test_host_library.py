"""The library in C: that it is there, fits the package, and what happens where it doesn't."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.data import assert_same_bits, random_layer, random_rows

from pipeline import PipelineError, run_pipelined
from pipeline.staging import host_library
from pipeline.staging.native import NativeWorkers

ROOT = Path(__file__).resolve().parents[2]


def test_native_library_is_built_wherever_there_is_a_compiler() -> None:
    """Otherwise every other test here would quietly run NumPy."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    library, reason = host_library.find_library()
    assert library is not None, f"the native copy workers are {reason}; pip install -e . builds them"
    headers = ("copy_workers.h", "file_bytes.h", "move_bytes.h", "mover.h")
    names = sorted(("copy_workers.c", "library.c", "mover.c", *headers))
    sources = [(ROOT / "csrc" / "host" / name).read_bytes() for name in names]
    assert library.host_source().decode() == hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def in_headers() -> dict[str, str]:
    """The structures that cross to Python, with their fields' text, by name."""
    text = "".join((ROOT / "csrc" / "host" / name).read_text() for name in ("copy_workers.h", "mover.h"))
    return {name: fields for fields, name in re.findall(r"typedef struct \{(.*?)\n\} (\w+);", text, re.S)}


def test_every_structure_in_c_has_a_twin_of_its_size_and_its_fields() -> None:
    library, reason = host_library.find_library()
    if library is None:
        pytest.skip(reason)
    assert set(in_headers()) == set(host_library.TWINS)
    for name, fields in in_headers().items():
        twin = host_library.TWINS[name]
        assert library.host_struct_bytes(name.encode()) == ctypes.sizeof(twin)
        at = [re.search(rf"\b{field}\b", fields) for field, *_ in twin._fields_]
        assert None not in at, name
        assert at == sorted(at, key=lambda found: found.start() if found else 0), (
            f"{name}'s fields are in another order"
        )
    assert library.host_struct_bytes(b"no_such_structure") == 0


@pytest.mark.parametrize("kind", ["absent", "broken", "stale", "other structures"])
def test_workers_that_cannot_load_are_replaced_and_the_report_says_why(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pipeline" / "staging"
    package.mkdir(parents=True)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    if kind == "broken":
        (package.parent / "_host.so").write_bytes(b"not a library")
    if kind in ("stale", "other structures"):
        (built,) = (ROOT / "pipeline").glob("_host*.so")
        shutil.copy(built, package.parent)
    if kind == "other structures":
        monkeypatch.setitem(host_library.TWINS, "mover_ring", host_library.MoverDevice)
    if kind == "stale":
        (tmp_path / "csrc" / "host" / "move_bytes.h").write_text("// changed since\n")
    monkeypatch.setattr(host_library, "__file__", str(package / "host_library.py"))
    monkeypatch.setattr(host_library, "find_library", host_library.find_library.__wrapped__)
    reason = {
        "absent": "not built",
        "broken": "can't be loaded",
        "stale": "built from other sources: install the package again",
        "other structures": "built with a mover_ring of 32 bytes, 64 were expected: install the package again",
    }[kind]
    layer, x = random_layer(16, 8), np.asfortranarray(random_rows(100, 16))
    result = run_pipelined(layer, x, devices="cpu")
    assert_same_bits(result.out, layer(x))
    assert "NumPy" in result.stats.copy_workers and reason in result.stats.copy_workers
    with pytest.raises(PipelineError, match=reason):
        NativeWorkers(1)
