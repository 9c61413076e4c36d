"""Which kernel a problem gets: pure Python, no GPU and no compiler."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import ceil

import pytest

from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from pipeline.errors import DeviceError, DTypeError, OptionError
from pipeline.kernels.choose import (
    ARCHITECTURES,
    Problem,
    alignment,
    all_variants,
    architecture,
    candidates,
    runs_as,
    select,
)
from pipeline.kernels.variant import SHARED_BYTES

BF16 = Problem(BFLOAT16, BFLOAT16, "bfloat16", 8192, 8192)
TF32 = Problem(FLOAT32, FLOAT32, "tf32", 8192, 8192)
IEEE = Problem(FLOAT32, FLOAT32, "ieee", 8192, 8192)
FP32 = Problem(FLOAT32, FLOAT32, "fp32", 8192, 8192)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (BF16, "bfloat16"),
        (replace(BF16, in_dtype=FLOAT16, precision="float16"), "float16"),
        (TF32, "tf32"),
        (IEEE, "ieee"),
        (FP32, "ieee"),
    ],
)
def test_runs_as_names_the_precision(problem: Problem, expected: str) -> None:
    assert runs_as(problem, "sm_86") == expected


def test_runs_as_splits_fp32_where_there_is_a_kernel() -> None:
    assert {arch: runs_as(FP32, arch) for arch in ARCHITECTURES} == {
        arch: "fp32" if arch in ("sm_80", "sm_90a") else "ieee" for arch in ARCHITECTURES
    }
    assert runs_as(replace(FP32, in_features=128), "sm_90a") == "fp32"
    assert runs_as(replace(FP32, in_features=127), "sm_90a") == "ieee", "short sums gain nothing from pairs"
    assert runs_as(IEEE, "sm_90a") == "ieee"
    for load_bytes in (16, 4):
        for rows in (1, 100, 10_000):
            assert select("sm_90a", FP32, rows, load_bytes).kernel == "fused_linear_split_sm90"
            assert select("sm_80", FP32, rows, load_bytes).kernel == "fused_linear_split_sm80"


@pytest.mark.parametrize("side", ["in_dtype", "out_dtype"])
def test_runs_as_refuses_float64_with_a_remedy(side: str) -> None:
    with pytest.raises(DTypeError, match=r"float64.*devices='cpu'"):
        runs_as(replace(IEEE, **{side: FLOAT64}), "sm_90a")


@pytest.mark.parametrize("problem", [replace(BF16, precision="tf32"), replace(IEEE, precision="bfloat16")])
def test_runs_as_refuses_a_precision_the_data_lacks(problem: Problem) -> None:
    with pytest.raises(OptionError, match="expected one of"):
        runs_as(problem, "sm_90a")


def test_select_gives_the_reference_layer_a_large_tile() -> None:
    assert select("sm_90a", BF16, 4096, 16).description == "fused_linear_sm90<bfloat16, 128x168x64, 5 stages>"
    assert select("sm_90a", TF32, 4096, 16).description.startswith("fused_linear_sm90<tf32, 128x168x32,")
    assert select("sm_100a", BF16, 1024, 16).description == "fused_linear_sm80<bfloat16, 128x256x64, 4 stages>"
    assert select("sm_80", TF32, 1024, 16).description == "fused_linear_sm80<tf32, 128x256x32, 3 stages>"
    assert select("sm_86", BF16, 1024, 16).description == "fused_linear_sm80<bfloat16, 128x128x64, 3 stages>"
    assert select("sm_90a", IEEE, 1024, 16).description == "fused_linear_simt<ieee, 128x128x32, 2 stages, sums of 64>"


def test_select_gives_the_split_kernel_the_tile_of_fewest_waves() -> None:
    fp32 = select("sm_90a", FP32, 8192, 16)
    assert fp32.description == "fused_linear_split_sm90<fp32, 128x168x32, 5 stages, sums of 64>"
    short = select("sm_90a", replace(FP32, in_features=1024), 8192, 16)
    assert short.description == "fused_linear_split_sm90<fp32, 128x168x32, 5 stages, sums of 32>"
    widths = {rows: select("sm_90a", FP32, rows, 16).block_n for rows in (64, 256, 512, 1024, 3000, 4096, 16384)}
    assert widths == {64: 64, 256: 128, 512: 128, 1024: 168, 3000: 168, 4096: 168, 16384: 168}
    assert select("sm_90a", replace(FP32, in_features=4096, out_features=4096), 4096, 16).block_n == 128
    assert select("sm_90a", replace(FP32, out_features=1024), 4096, 16).block_n == 128
    assert "128x128x32, 6 stages, sums of 64, direct stores" in select("sm_90a", FP32, 8192, 16, 4).description


def test_select_gives_few_rows_a_small_tile() -> None:
    assert select("sm_90a", BF16, 16, 16).block_m == 64
    assert select("sm_80", BF16, 16, 16).block_m == 64
    assert select("sm_90a", IEEE, 16, 16).block_m == 32


def test_select_gives_ragged_waves_a_tile_that_fits_them() -> None:
    """1152 rows: 9 x 43 tiles of 128 x 192 make 2.9 waves of 132, 9 x 49 of 128 x 168 make 3.3, so four of them."""
    assert select("sm_90a", BF16, 1152, 16).block_n == 192
    assert select("sm_90a", replace(BF16, in_features=4096, out_features=4096), 1024, 16).block_n == 128


@pytest.mark.parametrize("problem", [BF16, TF32, replace(BF16, in_dtype=FLOAT16, precision="float16")])
@pytest.mark.parametrize("load_bytes", [16, 4])
@pytest.mark.parametrize("store_bytes", [16, 4])
def test_select_never_changes_the_kernel_with_the_rows(problem: Problem, load_bytes: int, store_bytes: int) -> None:
    """Kernels may differ in the last bit, and a row's bits must not depend on the rows beside it."""
    rows = [*range(1, 300), 1000, 1024, 1152, 3000, 8192, 100_000]
    kernels = {select("sm_90a", problem, count, load_bytes, store_bytes).kernel for count in rows}
    assert kernels == {"fused_linear_sm90" if load_bytes == 16 else "fused_linear_sm80"}


@pytest.mark.parametrize("change", [{"in_features": 0}, {"precision": "ieee"}, {"precision": "fp32"}])
def test_select_leaves_what_tensor_maps_cannot_hold_to_the_other_kernels(change: dict[str, object]) -> None:
    assert select("sm_90a", replace(TF32, **change), 1024, 16).kernel != "fused_linear_sm90"


def test_select_stores_directly_where_the_output_is_not_aligned() -> None:
    variant = select("sm_90a", BF16, 1024, 16, 2)
    assert variant.kernel == "fused_linear_sm90" and "direct stores" in variant.description


def test_select_describes_output_type_and_narrow_loads() -> None:
    problem = replace(BF16, out_dtype=FLOAT32)
    assert (
        select("sm_90a", problem, 4096, 2).description
        == "fused_linear_sm80<bfloat16 to float32, 128x128x64, 4 stages, 2-byte loads>"
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_select_has_a_variant_for_every_problem_and_alignment(arch: str) -> None:
    compiled = set(all_variants(arch, every_output=True))
    for problem in (BF16, TF32, IEEE, replace(BF16, in_dtype=FLOAT16, precision="float16")):
        for out_dtype in (FLOAT32, BFLOAT16, FLOAT16):
            for load_bytes in (16, 4, 2)[: 3 if problem.in_dtype.itemsize == 2 else 2]:
                for rows in (1, 64, 100, 1024, 100_000):
                    variant = select(arch, replace(problem, out_dtype=out_dtype), rows, load_bytes)
                    assert variant in compiled
                    assert variant.shared_bytes <= SHARED_BYTES[arch]


def test_all_variants_have_distinct_descriptions() -> None:
    descriptions = [variant.description for variant in all_variants("sm_90a", every_output=True)]
    assert len(descriptions) == len(set(descriptions))


def test_candidates_refuses_an_unknown_architecture() -> None:
    with pytest.raises(DeviceError, match=r"sm_75.*sm_80"):
        candidates("sm_75", BF16, 16)


def test_candidates_refuses_data_not_aligned_to_its_elements() -> None:
    with pytest.raises(DTypeError, match="aligned to 2 byte"):
        candidates("sm_90a", IEEE, 2)


def test_architecture_maps_capabilities_and_refuses_others() -> None:
    assert architecture(9, 0) == "sm_90a"
    assert architecture(12, 0) == "sm_120a"
    with pytest.raises(DeviceError, match=r"GeForce has compute capability 7\.5.*devices='cpu'"):
        architecture(7, 5, "GeForce")


@pytest.mark.parametrize(
    ("counts", "expected"), [((16, 32), 16), ((16, 24), 4), ((16, 6), 2), ((32, 3), 1), ((0,), 16)]
)
def test_alignment_is_the_widest_common_load(counts: tuple[int, ...], expected: int) -> None:
    assert alignment(*counts) == expected


def test_variant_blocks_cover_ragged_outputs() -> None:
    variant = select("sm_80", BF16, 1024, 16)
    assert variant.blocks(1024, 8192, 108) == 4 * variant.blocks(512, 4096, 108) == 8 * 32
    assert variant.blocks(1025, 8193, 108) == 9 * 33
    assert variant.blocks(1, 1, 108) == 1


def test_persistent_variants_launch_no_more_blocks_than_they_need() -> None:
    for problem in (BF16, TF32):
        for variant in candidates("sm_90a", problem, 16):
            for rows in (1, 100, 1024, 1025, 3000, 8192):
                blocks, tiles = variant.blocks(rows, 8192, 132), variant.tiles(rows, 8192)
                assert 0 < blocks <= min(tiles, 132)
                assert ceil(tiles / blocks) == ceil(tiles / 132), "as many waves as with every multiprocessor"
    variant = next(v for v in candidates("sm_90a", BF16, 16) if v.block_n == 128 and v.block_m == 128)
    assert variant.blocks(1024, 8192, 132) == 128, "four waves need no more than 128 of 132 multiprocessors"


def test_kernels_import_without_cuda_or_torch() -> None:
    code = (
        "import sys, pipeline.kernels.compile, pipeline.kernels.launch; "
        "sys.exit(any(name == 'torch' or name.startswith('cuda') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
