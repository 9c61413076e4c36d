"""Which kernel and which tile compute a problem on an architecture. Pure Python: no CUDA library, no GPU.

These kernels cover every shape: `fused_linear_sm90` (Hopper's tensor cores: bf16, fp16, tf32), `fused_linear_sm80` (the
same through instructions that sm_80 and later have, for any layout), `fused_linear_split_sm90` and `..._sm80` (fp32
accuracy from fp16 pairs, which `split_rows` makes) and `fused_linear_simt` (exact fp32). A `Variant` is one
instantiation of a kernel's template. The variants of one kernel differ in speed only: an output's bits are the same
whatever the tile, hence whatever the number of rows. Different kernels may differ in the last bit, so which kernel runs
is decided by element types, sizes of the layer, addresses and strides, never by rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from pipeline.dtypes import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, DType
from pipeline.errors import DeviceError, DTypeError, OptionError

# Shared memory one block may use, bytes (CUDA C++ Programming Guide, table of technical specifications).
_SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_120a": 99 * 1024,
}
ARCHITECTURES = tuple(_SHARED_BYTES)
_CAPABILITIES = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a", (10, 0): "sm_100a"}
_CAPABILITIES[12, 0] = "sm_120a"
_CXX_TYPES = {FLOAT32: "float", FLOAT16: "__half", BFLOAT16: "__nv_bfloat16"}
_ROW_BYTES = 128  # one k-tile's row in shared memory
# in_features up to which SIMT sums in compensated blocks of 8 (csrc/gpu/fused_linear_simt.cu), and the split kernel
# promotes its accumulators every 32 of k, not 64: the vendor's library splits short sums finely.
_FINE_SUMS_UP_TO = 1024


@dataclass(frozen=True)
class Problem:
    """What is computed: element types, precision ("ieee", "fp32", "tf32" or the dtype's name) and the layer's size."""

    in_dtype: DType
    out_dtype: DType
    precision: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class _Tile:
    """A tile of y. `rate` is its speed on a full GPU against the kernel's best tile, all multiprocessors busy."""

    block_m: int
    block_n: int
    threads_m: int  # warps along M (tensor cores) or threads along M (SIMT)
    threads_n: int
    stages: int
    min_blocks: int  # blocks a multiprocessor must hold at once; bounds the registers
    rate: float
    any_alignment: bool  # also instantiated for loads narrower than 16 bytes, which take more registers


# Rates: H200, 1024 x 8192 x 8192 (`scripts/bench kernel --every-tile`); those of 3 stages are estimates.
_TENSOR_TILES = (
    _Tile(128, 256, 2, 4, 4, 1, 1.0, any_alignment=False),
    _Tile(128, 256, 2, 4, 3, 1, 0.95, any_alignment=False),
    _Tile(128, 128, 2, 4, 4, 1, 0.85, any_alignment=True),
    _Tile(128, 128, 2, 4, 3, 1, 0.8, any_alignment=True),
    _Tile(64, 64, 2, 2, 4, 2, 0.65, any_alignment=True),
)
_SIMT_TILES = (
    _Tile(128, 128, 16, 16, 2, 1, 1.0, any_alignment=True),
    _Tile(32, 64, 8, 16, 2, 2, 0.93, any_alignment=True),
)


@dataclass(frozen=True)
class _HopperTile:
    """A tile of y (fused_linear_sm90); `rate` is its speed inside a tile against the best tile's."""

    block_m: int
    block_n: int
    stages: int
    rate: float
    any_store: bool = False  # also instantiated for outputs that TMA can't write


# Rates: H200, from bursts of 25 ms, in which widths hardly differ (`scripts/bench kernel --every-tile`), and of 0.45 s,
# in which power favours wide ones (profiles/README.md). Widths differ more in how evenly their tiles divide among 132
# multiprocessors: 8192 columns are 48.8 tiles of 168. That of 64 x 64 is an estimate, low so that few outputs get it.
_HOPPER_TILES = (
    _HopperTile(128, 192, 5, 1.0),
    _HopperTile(128, 168, 5, 0.985),
    _HopperTile(128, 160, 5, 0.97),
    _HopperTile(128, 144, 6, 0.957),
    _HopperTile(128, 128, 6, 0.945, any_store=True),
    _HopperTile(64, 128, 8, 0.83),
    _HopperTile(64, 64, 12, 0.4, any_store=True),
)
# Two consumers side by side, each with 64 rows and two and a half sets of accumulators. Rates: H200, 0.4 s at a time,
# before there was the half set; at 8192 rows 168 wide is 1.055 times as fast as 128 wide, of which 1.016 are fewer
# waves. That of 64 wide is an estimate.
_SPLIT_TILES = (
    _HopperTile(128, 168, 5, 1.0),
    _HopperTile(128, 128, 6, 0.963, any_store=True),
    _HopperTile(128, 64, 8, 0.86),
)
# The same through mma.sync. Rates are estimates.
_SPLIT_MMA_TILES = (
    _Tile(128, 128, 4, 2, 3, 1, 1.0, any_alignment=True),
    _Tile(64, 64, 2, 2, 4, 2, 0.7, any_alignment=True),
)
# GPUs with a split kernel, where three fp16 products are faster than one of fp32. By NVIDIA's data sheets the A100 does
# 16 in the time of one (312 TFLOP/s against 19.5), the RTX 3090, RTX 4090 and L40S 2 to 4.
_SPLIT_ARCHITECTURES = ("sm_80", "sm_90a")
_SPLIT_FROM = 128  # in_features; sums of fewer products are exact fp32 (csrc/gpu/split_rows.cu says why)
_BAND_ROWS = 2048  # rows of x that pass through L2 together: as many as columns of y in a wave of 132 tiles
_STORE_CYCLES = 0.16  # for each output of a tile, from the end of its products; measured, H200


@dataclass(frozen=True)
class Variant:
    """One instantiation of a kernel, and what launching it takes."""

    kernel: str  # csrc/gpu/<kernel>.cu; also the entry's name
    template: str  # the C++ type whose run() is the kernel
    description: str  # for reports, for example "fused_linear_sm80<bfloat16, 128x256x64, 4 stages>"
    block_m: int
    block_n: int
    threads: int
    min_blocks: int
    shared_bytes: int
    rate: float
    arguments: str = "FusedLinearArgs"  # the struct its entry takes
    # Of the Hopper kernels, whose blocks walk over tiles:
    persistent: bool = False
    band_rows: int = 1  # rows of tiles in a band (FusedLinearSm90::Walk)

    @property
    def source(self) -> str:
        """The translation unit to compile: the kernel's file and an entry with a plain name."""
        return (
            f'#include "{self.kernel}.cu"\n'
            f"using Kernel = {self.template};\n"
            f'static_assert(Kernel::kNumThreads == {self.threads}, "host twin");\n'
            f'static_assert(Kernel::kSharedBytes == {self.shared_bytes}, "host twin");\n'
            f'extern "C" __global__ void __launch_bounds__(Kernel::kNumThreads, {self.min_blocks})\n'
            f"{self.kernel}(const __grid_constant__ {self.arguments} args) {{ Kernel::run(args); }}\n"
        )

    def tiles(self, rows: int, out_features: int) -> int:
        """Tiles of the output."""
        return ceil(rows / self.block_m) * ceil(out_features / self.block_n)

    def waves(self, rows: int, out_features: int, resident_blocks: int) -> int:
        """Tiles of the busiest of `resident_blocks` blocks."""
        return ceil(self.tiles(rows, out_features) / resident_blocks)

    def blocks(self, rows: int, out_features: int, multiprocessors: int) -> int:
        """Blocks of the one-dimensional grid: one a tile, or as few persistent ones as take the same time."""
        tiles = self.tiles(rows, out_features)
        if not self.persistent:
            return tiles
        return ceil(tiles / self.waves(rows, out_features, multiprocessors * self.min_blocks))

    def cost(self, rows: int, out_features: int, in_bytes: int, multiprocessors: int) -> float:
        """Time on a GPU, in arbitrary units: the tiles of the busiest multiprocessor, at this tile's speed.

        `in_bytes` is the length of a row of x.
        """
        if not self.persistent:
            return self.waves(rows, out_features, multiprocessors) * self.block_m * self.block_n / self.rate
        product = ceil(in_bytes / _ROW_BYTES) * self.block_m * self.block_n / 32 / self.rate
        store = _STORE_CYCLES * self.block_m * self.block_n
        # One warpgroup stores while the other multiplies, but for the last tile.
        return self.waves(rows, out_features, multiprocessors) * max(product, store) + store / 2


def architecture(major: int, minor: int, name: str = "this GPU") -> str:
    """The architecture to compile for, from a device's compute capability.

    Raises:
        DeviceError: none of the kernels runs there.
    """
    try:
        return _CAPABILITIES[major, minor]
    except KeyError:
        known = ", ".join(f"{a}.{b}" for a, b in _CAPABILITIES)
        raise DeviceError(
            f"{name} has compute capability {major}.{minor}, kernels exist for {known}; use devices='cpu'"
        ) from None


def runs_as(problem: Problem, arch: str) -> str:
    """The precision that really runs on `arch`: "fp32", "ieee", "tf32", "bfloat16" or "float16".

    "fp32" is exact fp32 ("ieee") where there is no split kernel, and for fewer than 128 in_features.

    Raises:
        DTypeError: float64 data, or an output type without a kernel.
        OptionError: a precision that the data's type doesn't have.
    """
    for what, dtype in (("data", problem.in_dtype), ("output", problem.out_dtype)):
        if dtype is FLOAT64 or dtype not in _CXX_TYPES:
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


def alignment(*byte_counts: int) -> int:
    """The widest load, 16, 4, 2 or 1 bytes, that divides every address and row stride given in bytes."""
    combined = 0
    for count in byte_counts:
        combined |= count
    return next(width for width in (16, 4, 2, 1) if combined % width == 0)


def _variant(problem: Problem, tile: _Tile, load_bytes: int, listed: bool = False) -> Variant:
    """The host twin of FusedLinearSm80 and FusedLinearSimt: their template arguments and constants.

    `listed` is SIMT's for listed rows, with the finer sums for any in_features.
    """
    out = _CXX_TYPES[problem.out_dtype]
    numbers = f"{tile.block_m}, {tile.block_n}, {tile.threads_m}, {tile.threads_n}, {tile.stages}, {load_bytes}"
    block_k = _ROW_BYTES // problem.in_dtype.itemsize
    precision, sums = problem.precision, ""
    threads, row_bytes = tile.threads_m * tile.threads_n * 32, _ROW_BYTES
    if precision == "ieee":
        kernel = "fused_linear_simt"
        sum_block = 8 if listed or problem.in_features <= _FINE_SUMS_UP_TO else 64
        sums = f", sums of {sum_block}" + (", listed rows" if listed else "")
        rows = "true" if listed else "false"
        template = f"FusedLinearSimt<{out}, epilogue::SigmoidScaleResidual, {numbers}, {sum_block}, {rows}>"
        threads, row_bytes = tile.threads_m * tile.threads_n, _ROW_BYTES + 16
    elif precision == "fp32":
        kernel, sums = "fused_linear_split_sm80", ", sums of 32"
        template = f"FusedLinearSm80<SplitFp16<1>, {out}, epilogue::SigmoidScaleResidual, {numbers}>"
    else:
        kernel = "fused_linear_sm80"
        operands = f"Plain<{_CXX_TYPES[problem.in_dtype]}>"
        template = f"FusedLinearSm80<{operands}, {out}, epilogue::FastSigmoidScaleResidual, {numbers}>"
    loads = "" if load_bytes == 16 else f", {load_bytes}-byte loads"
    to = "" if problem.out_dtype is problem.in_dtype else f" to {problem.out_dtype}"
    return Variant(
        kernel=kernel,
        template=template,
        description=(
            f"{kernel}<{precision}{to}, {tile.block_m}x{tile.block_n}x{block_k}, {tile.stages} stages{sums}{loads}>"
        ),
        block_m=tile.block_m,
        block_n=tile.block_n,
        threads=threads,
        min_blocks=tile.min_blocks,
        shared_bytes=tile.stages * (tile.block_m + tile.block_n) * row_bytes,
        rate=tile.rate,
    )


def _hopper_variant(problem: Problem, tile: _HopperTile, tma_store: bool) -> Variant:
    """The host twin of FusedLinearSm90: its template arguments and constants."""
    precision, sums = problem.precision, ""
    if precision == "fp32":
        promote_every = 1 if problem.in_features <= _FINE_SUMS_UP_TO else 2
        kernel, operands = "fused_linear_split_sm90", f"SplitFp16<{promote_every}>"
        tail, sums = "SigmoidScaleResidual", f", sums of {32 * promote_every}"
    else:
        kernel, operands = "fused_linear_sm90", f"Plain<{_CXX_TYPES[problem.in_dtype]}>"
        tail = "FastSigmoidScaleResidual"
    numbers = f"{tile.block_m}, {tile.block_n}, {tile.stages}"
    block_k = _ROW_BYTES // problem.in_dtype.itemsize
    ring_bytes = tile.stages * ((tile.block_m + tile.block_n) * _ROW_BYTES + 16) + 16
    buffer_bytes = 8 * 16 * _ROW_BYTES
    store_bytes = buffer_bytes * (2 if ring_bytes + 2 * buffer_bytes <= _SHARED_BYTES["sm_90a"] else 1)
    to = "" if problem.out_dtype is problem.in_dtype else f" to {problem.out_dtype}"
    stores = "" if tma_store else ", direct stores"
    return Variant(
        kernel=kernel,
        template=(
            f"FusedLinearSm90<{operands}, {_CXX_TYPES[problem.out_dtype]}, epilogue::{tail}, {numbers}, "
            f"{'true' if tma_store else 'false'}>"
        ),
        description=(
            f"{kernel}<{precision}{to}, {tile.block_m}x{tile.block_n}x{block_k}, {tile.stages} stages{sums}{stores}>"
        ),
        block_m=tile.block_m,
        block_n=tile.block_n,
        threads=3 * 128,
        min_blocks=1,
        shared_bytes=ring_bytes + (store_bytes if tma_store else 0),
        rate=tile.rate,
        arguments="FusedLinearSm90Args",
        persistent=True,
        band_rows=_BAND_ROWS // tile.block_m,
    )


def split_rows_variant() -> Variant:
    """The kernel that splits fp32 rows."""
    return Variant(
        kernel="split_rows",
        template="SplitRows",
        description="split_rows",
        block_m=1,
        block_n=1,
        threads=256,
        min_blocks=1,
        shared_bytes=0,
        rate=1.0,
        arguments="SplitRowsArgs",
    )


def listed_rows_variant(problem: Problem, load_bytes: int) -> Variant:
    """The kernel that computes listed rows in exact fp32, for those that pairs of fp16 can't hold."""
    return _variant(replace(problem, precision="ieee"), _SIMT_TILES[0], load_bytes, listed=True)


def runs_on_tma(arch: str, problem: Problem, load_bytes: int) -> bool:
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
    if arch not in _SHARED_BYTES:
        raise DeviceError(f"architecture is {arch!r}, kernels exist for {', '.join(ARCHITECTURES)}; use devices='cpu'")
    precision = runs_as(problem, arch)
    if load_bytes < problem.in_dtype.itemsize:
        raise DTypeError(
            f"data is aligned to {load_bytes} byte, {problem.in_dtype} needs {problem.in_dtype.itemsize}; copy it to "
            f"an aligned array first"
        )
    if runs_on_tma(arch, problem, load_bytes):
        return [
            _hopper_variant(problem, tile, store_bytes == 16)
            for tile in (_SPLIT_TILES if precision == "fp32" else _HOPPER_TILES)
            if tile.any_store or store_bytes == 16
        ]
    if problem.in_features == 0:
        load_bytes = min(load_bytes, 4)  # nothing is loaded; these variants exist on every architecture
    tiles = {"ieee": _SIMT_TILES, "fp32": _SPLIT_MMA_TILES}.get(precision, _TENSOR_TILES)
    if precision == "fp32":
        load_bytes = 16  # the parts are aligned
    found: dict[tuple[int, int], Variant] = {}
    for tile in tiles:
        variant = _variant(replace(problem, precision=precision), tile, load_bytes)
        if variant.shared_bytes <= _SHARED_BYTES[arch] and (tile.any_alignment or load_bytes == 16):
            found.setdefault((tile.block_m, tile.block_n), variant)  # of one tile's stage counts, the first that fits
    return list(found.values())


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


def all_variants(arch: str, *, every_output: bool = False) -> Iterator[Variant]:
    """Every variant that runs on `arch`; outputs of the input's type only, unless `every_output`."""
    for precision, in_dtype in (("bfloat16", BFLOAT16), ("float16", FLOAT16), ("tf32", FLOAT32), ("ieee", FLOAT32)):
        for out_dtype in _outputs(in_dtype, every_output):
            for in_features in (8192, _FINE_SUMS_UP_TO)[: 2 if precision == "ieee" else 1]:
                problem = Problem(in_dtype, out_dtype, precision, in_features, 8192)
                for load_bytes in (16, 4, 2)[: 3 if in_dtype.itemsize == 2 else 2]:
                    yield from candidates(arch, problem, load_bytes)
                if runs_on_tma(arch, problem, 16):
                    yield from candidates(arch, problem, 16, store_bytes=4)
    if arch not in _SPLIT_ARCHITECTURES:
        return
    yield split_rows_variant()
    for out_dtype in _outputs(FLOAT32, every_output):
        for in_features in (8192, _FINE_SUMS_UP_TO)[: 2 if arch == "sm_90a" else 1]:
            for store_bytes in (16, 4)[: 2 if arch == "sm_90a" else 1]:
                yield from candidates(arch, Problem(FLOAT32, out_dtype, "fp32", in_features, 8192), 16, store_bytes)
        for load_bytes in (16, 4):
            yield listed_rows_variant(Problem(FLOAT32, out_dtype, "fp32", 8192, 8192), load_bytes)


def _outputs(in_dtype: DType, every_output: bool) -> list[DType]:
    return [dtype for dtype in DTYPES.values() if dtype is in_dtype or (every_output and dtype is not FLOAT64)]
