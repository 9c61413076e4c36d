"""Every kernel variant compiles for every architecture, without spills; the cache can be trusted. Needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import pytest
from helpers.needs import without

from pipeline.errors import CompileError
from pipeline.kernels.choose import ARCHITECTURES, Variant, all_variants
from pipeline.kernels.compile import (
    CompiledKernel,
    PtxasReport,
    _program_options,
    compile_source,
    compile_variant,
    csrc_dir,
    parse_report,
)

PRECISIONS = ("bfloat16", "float16", "tf32", "ieee", "fp32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty kernel cache; the fixture's value is where its entries go."""
    monkeypatch.setenv("PIPELINE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def shared_cache(cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel cache that this session's tests share, in whichever worker: each variant is compiled once."""
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    monkeypatch.setenv("PIPELINE_CACHE_DIR", str(session / "shared-cache"))


def small_variant() -> Variant:
    """The variant that compiles fastest."""
    return next(v for v in all_variants("sm_90a") if "ieee, 32x64" in v.description)


def check_code(variant: Variant, arch: str) -> None:
    report = compile_variant(variant, arch).report
    where = f"{variant.description} for {arch}: {report}"
    assert report.spill_bytes == 0 and report.stack_bytes == 0, where
    assert report.complaints == (), where
    # The register file holds 65,536; each launch must find room for the blocks its bounds promise.
    registers_per_block = -(-report.registers // 8) * 8 * variant.threads
    assert 0 < registers_per_block * variant.min_blocks <= 65_536, where


@pytest.mark.usefixtures("shared_cache")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_variants_compile_without_spills(arch: str, precision: str) -> None:
    variants = [v for v in all_variants(arch) if f"<{precision}," in v.description]
    if precision == "fp32" and arch not in ("sm_80", "sm_90a"):
        assert not variants, "runs as ieee"
        return
    assert len(variants) >= (2 if precision == "fp32" else 4)
    for variant in variants:
        check_code(variant, arch)


@pytest.mark.usefixtures("shared_cache")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_variants_with_another_output_type_compile_without_spills(precision: str) -> None:
    """The tiles shortest of registers, for each way to store; the others differ in nothing else."""
    mixed = [v for v in all_variants("sm_90a", every_output=True) if f"<{precision} to " in v.description]
    direct = [v for v in mixed if "direct stores" in v.description]
    others = [v for v in mixed if not any(text in v.description for text in ("direct", "byte loads", "exact rows"))]
    chosen = []
    for group in (direct, others):
        largest = max((v.block_m * v.block_n for v in group), default=0)
        chosen += [v for v in group if v.block_m * v.block_n == largest]
    assert len(chosen) == (8 if precision == "fp32" else 4), "two output types, two ways to store; fp32: two to sum"
    for variant in chosen:
        check_code(variant, "sm_90a")


def cuobjdump() -> str:
    wheels = (Path(folder) / "nvidia" / "cu13" / "bin" / "cuobjdump" for folder in site.getsitepackages())
    found = next((str(path) for path in wheels if path.is_file()), None) or shutil.which("cuobjdump")
    if found is None:
        without("cuobjdump", "sass")
    return found


def operations(compiled: CompiledKernel, folder: Path) -> list[str]:
    """SASS operations in the order of the code, with their suffixes."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.cubin)
    listing = subprocess.run([cuobjdump(), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True)
    line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9][A-Z0-9a-z_.]*)"
    return re.findall(line, listing.stdout, re.MULTILINE)


def instructions(compiled: CompiledKernel, folder: Path, *, suffixes: bool = False) -> Counter[str]:
    """How often each SASS operation occurs, with or without its suffixes."""
    names = operations(compiled, folder)
    return Counter(names if suffixes else (name.partition(".")[0] for name in names))


@pytest.mark.usefixtures("shared_cache")
@pytest.mark.parametrize(
    ("arch", "name", "operation", "least"),
    [
        ("sm_80", "bfloat16, 128x256", "HMMA", 128),
        ("sm_80", "float16, 128x256", "HMMA", 128),
        ("sm_80", "tf32, 128x256", "HMMA", 128),
        ("sm_80", "fp32, 128x128", "HMMA", 96),
        ("sm_90a", "tf32, 128x128x32, 4 stages, 4-byte loads", "HMMA", 64),
        ("sm_90a", "ieee, 128x128", "FFMA", 7 * 256),
    ],
)
def test_machine_code_keeps_the_pipeline(arch: str, name: str, operation: str, least: int, tmp_path: Path) -> None:
    """The right arithmetic, asynchronous copies, and nothing in local memory."""
    variant = next(v for v in all_variants(arch) if name in v.description)
    found = instructions(compile_variant(variant, arch), tmp_path)
    assert found[operation] >= least
    assert found["LDGSTS"] > 0
    assert found["LDL"] == found["STL"] == 0
    assert found["LDSM" if operation == "HMMA" else "LDS"] > 0


@pytest.mark.usefixtures("shared_cache")
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32"])
def test_machine_code_of_hopper_variants(precision: str, tmp_path: Path) -> None:
    """wgmma fed and drained by the copy engine, registers moved to the consumers, nothing in local memory."""
    variants = [v for v in all_variants("sm_90a") if f"fused_linear_sm90<{precision}," in v.description]
    assert len(variants) >= 9
    for variant in variants:
        compiled = compile_variant(variant, "sm_90a")
        found, where = instructions(compiled, tmp_path), variant.description
        assert found["HGMMA"] >= 4 and found["UTMALDG"] == 2, where
        assert (found["UTMASTG"] > 0) == ("direct stores" not in where), where
        assert found["LDL"] == found["STL"] == found["HMMA"] == 0, where
        # A device-wide fence in the loop would cost a third of the speed (measured).
        assert instructions(compiled, tmp_path, suffixes=True)["MEMBAR.ALL.GPU"] == 0, where
        assert found["USETMAXREG"] == 2, where
        assert variant.threads * compiled.report.registers * variant.min_blocks <= 65_536, where


@pytest.mark.usefixtures("shared_cache")
def test_machine_code_of_split_variants(tmp_path: Path) -> None:
    """Six wgmmas for 32 of k, unrolled by the k-tiles between promotions, each of which is one addition an accumulator.
    Totals are folded while products are in flight; the rest as in the other Hopper kernel."""
    variants = [v for v in all_variants("sm_90a") if v.kernel == "fused_linear_split_sm90"]
    assert len(variants) == 8
    for variant in variants:
        compiled = compile_variant(variant, "sm_90a")
        found, where = instructions(compiled, tmp_path), variant.description
        assert found["HGMMA"] == (12 if "sums of 64" in where else 6), where
        assert found["UTMALDG"] == 2 and found["USETMAXREG"] == 2, where
        assert found["LDL"] == found["STL"] == 0, where
        names = [name.partition(".")[0] for name in operations(compiled, tmp_path)]
        queued = names[len(names) - names[::-1].index("HGMMA") :]
        waited = queued.index("WARPGROUP")
        in_flight, loop_end = queued[:waited], queued[waited:]
        assert in_flight.count("FADD") >= 3 * variant.block_n // 2 - 8, where  # the compiler may hold some back
        additions = in_flight.count("FADD") + loop_end[: loop_end.index("BRA")].count("FADD")
        assert additions == 4 * variant.block_n // 2, where


@pytest.mark.usefixtures("shared_cache")
def test_split_rows_compiles_without_spills() -> None:
    (variant,) = (v for v in all_variants("sm_90a") if v.kernel == "split_rows")
    check_code(variant, "sm_90a")


def test_compile_variant_keeps_cubin_and_report_in_the_cache(cache: Path) -> None:
    first, second = (compile_variant(small_variant(), "sm_90a") for _ in range(2))
    assert not first.from_cache and second.from_cache
    assert (second.cubin, second.report) == (first.cubin, first.report)
    assert first.cubin.startswith(b"\x7fELF")
    assert cache.stat().st_mode & 0o777 == 0o700


def test_compile_variant_distinguishes_architectures() -> None:
    codes = {compile_variant(small_variant(), arch).cubin for arch in ("sm_80", "sm_90a")}
    assert len(codes) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_compile_variant_recompiles_a_damaged_entry(cache: Path, damage: str) -> None:
    good = compile_variant(small_variant(), "sm_90a")
    (entry,) = (path for path in cache.rglob("*") if path.is_file() and good.cubin in path.read_bytes())
    content = bytearray(entry.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    entry.write_bytes({"flip": content, "truncate": content[: len(content) // 2], "empty": b""}[damage])
    again = compile_variant(small_variant(), "sm_90a")
    assert not again.from_cache
    assert again.cubin == good.cubin
    assert compile_variant(small_variant(), "sm_90a").from_cache, "the damaged entry was replaced"


def test_compile_variant_does_not_use_a_linked_directory(cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cache.parent.mkdir()
    cache.symlink_to(elsewhere)
    with pytest.warns(RuntimeWarning, match="it is a link.*PIPELINE_CACHE_DIR"):
        compiled = compile_variant(small_variant(), "sm_90a")
    assert compiled.cubin and not list(elsewhere.iterdir())


def test_compile_variant_does_not_use_a_directory_others_may_write(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="others may write to it"):
        compiled = compile_variant(small_variant(), "sm_90a")
    assert compiled.cubin and not list(cache.iterdir())


def test_compile_variant_does_not_use_a_directory_of_another_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(mode=0o700, parents=True)
    monkeypatch.setattr("os.geteuid", lambda: cache.stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="it belongs to user"):
        compiled = compile_variant(small_variant(), "sm_90a")
    assert compiled.cubin and not list(cache.iterdir())


def test_compile_variant_works_where_the_cache_is_a_file(cache: Path) -> None:
    cache.parent.write_text("in the way")
    with pytest.warns(RuntimeWarning, match="can't be used"):
        assert compile_variant(small_variant(), "sm_90a").cubin


def test_compile_variant_is_silent_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_variant(small_variant(), "sm_90a")


def test_compile_source_error_carries_log_and_options() -> None:
    with pytest.raises(CompileError) as caught:
        compile_source("__global__ void k() { undeclared = 1; }", "sm_90a", (csrc_dir(),))
    assert "undeclared" in caught.value.log
    assert "--gpu-architecture=sm_90a" in caught.value.options
    assert "undeclared" in str(caught.value) and "sm_90a" in str(caught.value)


def test_parse_report_reads_spills_and_warnings() -> None:
    log = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas warning : something else
"""
    report = parse_report(log)
    assert report == PtxasReport(255, 20, 16, report.complaints)
    assert [("C7510" in line, "warning" in line) for line in report.complaints] == [(True, False), (False, True)]


def test_csrc_dir_holds_every_kernel() -> None:
    for variant in all_variants("sm_90a"):
        assert (csrc_dir() / variant.header).is_file()


def test_compile_bypasses_the_compilers_own_cache() -> None:
    """Its hits, which only a machine with a GPU gives, carry no report of registers and spills."""
    assert _program_options("sm_90a", (csrc_dir(),)).no_cache
