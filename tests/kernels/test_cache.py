"""The cache of compiled kernels: when an entry is right, what a hit imports, what it takes on the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.kernels import cache
from pipeline.kernels.cache import Entry, FileState, entry_path, kept_bytes, load, save


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A file that an entry depends on."""
    path = tmp_path / "compiler.so"
    path.write_bytes(b"compiles")
    return path


def entry_of(compiler: Path, cubin: bytes = b"\x7fELF\n\n code") -> Entry:
    return Entry(cubin, {"registers": 12}, (FileState.of(compiler),))


def test_cache_gives_back_what_was_saved(tmp_path: Path, compiler: Path) -> None:
    path, entry = entry_path(tmp_path, "source"), entry_of(compiler)
    assert load(path) is None
    save(path, entry)
    assert load(path) == entry
    assert kept_bytes(tmp_path) == [path.stat().st_size]


def test_cache_names_entries_after_every_part() -> None:
    folder = Path("kernels")
    names = [entry_path(folder, *parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("ab", b"c", ""))]
    assert len(set(names)) == 4
    assert entry_path(folder, "ab", "c") == entry_path(folder, b"ab", "c")


def test_cache_names_entries_after_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them may have two compilers."""
    here = entry_path(Path("kernels"), "source")
    monkeypatch.setattr("sys.prefix", "another")
    assert entry_path(Path("kernels"), "source") != here


@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_cache_entry_is_right_only_while_the_compiler_is_the_same(tmp_path: Path, compiler: Path, change: str) -> None:
    path = entry_path(tmp_path, "source")
    save(path, entry_of(compiler))
    before = compiler.stat()
    if change == "gone":
        compiler.unlink()
    else:
        compiler.write_bytes(b"compiles better" if change == "size" else b"COMPILES")
        os.utime(compiler, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "time")))
    assert load(path) is None


def test_cache_keeps_no_more_than_its_bound(tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MOST_BYTES", 4500)
    (tmp_path / "another's file").write_bytes(bytes(10_000))
    left_behind = tmp_path / "killed.partial"
    left_behind.write_bytes(bytes(1000))
    os.utime(left_behind, ns=(0, 0))
    paths = [entry_path(tmp_path, str(number)) for number in range(6)]
    for number, path in enumerate(paths):
        save(path, entry_of(compiler, bytes(1000)))
        os.utime(path, ns=(1, 1 + number))
    assert [path.exists() for path in paths] == [False, False, False, True, True, True]
    assert not left_behind.exists() and (tmp_path / "another's file").exists()


def test_cache_leaves_nothing_where_it_cannot_write(
    tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(OSError, match="no space"):
        save(entry_path(tmp_path, "source"), entry_of(compiler))
    assert [path.name for path in tmp_path.iterdir()] == [compiler.name]


COMPILE = """
import sys
from pipeline.kernels.choose import all_variants
from pipeline.kernels.compile import compile_variant
variant = next(each for each in all_variants("sm_90a") if "ieee, 32x64" in each.description)
assert compile_variant(variant, "sm_90a").from_cache == (sys.argv[1] == "hit")
print(*sorted({"cuda", "cuda.core", "cuda.pathfinder", "cuda.bindings.nvrtc", "torch"} & set(sys.modules)))
"""


def test_cache_hit_looks_for_no_compiler(tmp_path: Path) -> None:
    environment = os.environ | {"PIPELINE_CACHE_DIR": str(tmp_path)}
    imported = []
    for expected in ("miss", "hit"):
        command = [sys.executable, "-c", COMPILE, expected]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
        imported.append(done.stdout.split())
    assert "cuda.core" in imported[0] and imported[1] == []
