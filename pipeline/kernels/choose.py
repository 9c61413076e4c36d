"""Which kernel and which tile compute a problem on an architecture. Pure Python: no CUDA library, no GPU.

These kernels cover every shape: `fused_linear_sm90` (Hopper's tensor cores: bf16, fp16, tf32), `fused_linear_sm80` (the
same through instructions that sm_80 and later have, for any layout), `fused_linear_split_sm90` and `..._sm80` (fp32
accuracy from fp16 pairs, which `split_rows` makes) and `fused_linear_simt` (exact fp32). Each source of csrc/gpu has a
host twin of its name here. A `Variant` is one instantiation of a kernel's template. Variants of one kernel differ in
speed only: an output's bits are the same whatever the tile, hence whatever the number of rows. Different kernels may
differ in the last bit, so which kernel runs is decided by element types, sizes of the layer, addresses and strides,
never by rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipeline.dtypes import BFLOAT16, DTYPES, FLOAT16, FLOAT32, DType
from pipeline.epilogues import EpilogueCode
from pipeline.errors import DeviceError, DTypeError, OptionError
from pipeline.kernels import fused_linear_simt, fused_linear_sm80, fused_linear_sm90, split_rows
from pipeline.kernels.variant import (
    ARCHITECTURES,
    DEFAULT_CODE,
    FINE_SUMS_UP_TO,
    Problem,
    Variant,
    alignment,
    architecture,
)

__all__ = [
    "ARCHITECTURES",
    "Problem",
    "Variant",
    "alignment",
    "all_variants",
    "architecture",
    "candidates",
    "runs_as",
    "select",
]

# GPUs with a split kernel, where three fp16 products are faster than one of fp32. By NVIDIA's data sheets the A100 does
# 16 in the time of one (312 TFLOP/s against 19.5), the RTX 3090, RTX 4090 and L40S 2 to 4.
_SPLIT_ARCHITECTURES = ("sm_80", "sm_90a")
_SPLIT_FROM = 128  # in_features; sums of fewer products are exact fp32 (csrc/gpu/split_rows.cuh says why)


def runs_as(problem: Problem, arch: str) -> str:
    """The precision that really runs on `arch`: "fp32", "ieee", "tf32", "bfloat16" or "float16".

    "fp32" is exact fp32 ("ieee") where there is no split kernel, and for fewer than 128 in_features.

    Raises:
        DTypeError: float64 data, or an output type without a kernel.
        OptionError: a precision that the data's type doesn't have.
    """
    for what, dtype in (("data", problem.in_dtype), ("output", problem.out_dtype)):
        if dtype.cuda_name is None:
            raise DTypeError(
                f"{what} is {dtype}, GPU kernels take float32, bfloat16 and float16; convert it, or use devices='cpu'"
            )
    allowed = ("ieee", "fp32", "tf32") if problem.in_dtype is FLOAT32 else (problem.in_dtype.name,)
    if problem.precision not in allowed:
        raise OptionError(
            f"precision is {problem.precision!r}, expected one of {', '.join(map(repr, allowed))} for "
            f"{problem.in_dtype} data"
        )
    if problem.precision == "fp32" and (arch not in _SPLIT_ARCHITECTURES or problem.in_features < _SPLIT_FROM):
        return "ieee"
    return problem.precision


def _runs_on_tma(arch: str, problem: Problem, load_bytes: int) -> bool:
    """Whether a Hopper kernel computes the problem; the same for any number of rows."""
    precision = runs_as(problem, arch)
    if arch != "sm_90a" or precision == "ieee":
        return False
    return precision == "fp32" or (load_bytes == 16 and problem.in_features > 0)  # parts are always aligned


def candidates(arch: str, problem: Problem, load_bytes: int, store_bytes: int = 16) -> list[Variant]:
    """Every variant that can compute `problem` on `arch`, fastest tile first; all give the same bits.

    `load_bytes` and `store_bytes` are the widest access (16, 4 or 2) that divides all addresses and row strides of
    x and w, and of y.

    Raises:
        DeviceError: unknown architecture.
        DTypeError, OptionError: as `runs_as`, or data not aligned to its own elements.
    """
    if arch not in ARCHITECTURES:
        raise DeviceError(f"architecture is {arch!r}, kernels exist for {', '.join(ARCHITECTURES)}; use devices='cpu'")
    precision = runs_as(problem, arch)
    if load_bytes < problem.in_dtype.itemsize:
        raise DTypeError(
            f"data is aligned to {load_bytes} byte, {problem.in_dtype} needs {problem.in_dtype.itemsize}; copy it to "
            f"an aligned array first"
        )
    if _runs_on_tma(arch, problem, load_bytes):
        return list(fused_linear_sm90.variants(problem, store_bytes))
    if problem.in_features == 0:
        load_bytes = min(load_bytes, 4)  # nothing is loaded; these variants exist on every architecture
    twin = fused_linear_simt if precision == "ieee" else fused_linear_sm80
    return list(twin.variants(arch, replace(problem, precision=precision), load_bytes))


def select(
    arch: str, problem: Problem, rows: int, load_bytes: int, store_bytes: int = 16, *, multiprocessors: int = 132
) -> Variant:
    """The variant that should compute `rows` rows fastest; `load_bytes` and `store_bytes` as in `candidates`.

    Raises:
        DeviceError, DTypeError, OptionError: as `candidates`.
    """
    variants = candidates(arch, problem, load_bytes, store_bytes)
    in_bytes = problem.in_features * problem.in_dtype.itemsize
    return min(variants, key=lambda v: v.cost(rows, problem.out_features, in_bytes, multiprocessors))


def all_variants(arch: str, *, every_output: bool = False, epilogue: EpilogueCode = DEFAULT_CODE) -> Iterator[Variant]:
    """Every variant that runs on `arch`; outputs of the input's type only, unless `every_output`."""
    for precision, in_dtype in (("bfloat16", BFLOAT16), ("float16", FLOAT16), ("tf32", FLOAT32), ("ieee", FLOAT32)):
        for out_dtype in _outputs(in_dtype, every_output):
            for in_features in (8192, FINE_SUMS_UP_TO)[: 2 if precision == "ieee" else 1]:
                problem = Problem(in_dtype, out_dtype, precision, in_features, 8192, epilogue)
                for load_bytes in (16, 4, 2)[: 3 if in_dtype.itemsize == 2 else 2]:
                    yield from candidates(arch, problem, load_bytes)
                if _runs_on_tma(arch, problem, 16):
                    yield from candidates(arch, problem, 16, store_bytes=4)
    if arch not in _SPLIT_ARCHITECTURES:
        return
    yield split_rows.VARIANT
    for out_dtype in _outputs(FLOAT32, every_output):
        for in_features in (8192, FINE_SUMS_UP_TO)[: 2 if arch == "sm_90a" else 1]:
            for store_bytes in (16, 4)[: 2 if arch == "sm_90a" else 1]:
                problem = Problem(FLOAT32, out_dtype, "fp32", in_features, 8192, epilogue)
                yield from candidates(arch, problem, 16, store_bytes)
        for load_bytes in (16, 4):
            problem = Problem(FLOAT32, out_dtype, "fp32", 8192, 8192, epilogue)
            yield fused_linear_simt.exact_rows_variant(problem, load_bytes)


def _outputs(in_dtype: DType, every_output: bool) -> list[DType]:
    return [dtype for dtype in DTYPES.values() if dtype is in_dtype or (every_output and dtype.cuda_name is not None)]
