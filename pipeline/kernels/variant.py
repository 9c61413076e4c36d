"""What is computed, and one instantiation of a kernel that computes it. Pure Python: no CUDA library, no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

from pipeline.dtypes import DType
from pipeline.epilogues import DEFAULT_EPILOGUE, EpilogueCode
from pipeline.errors import DeviceError

# Shared memory one block may use, bytes (CUDA C++ Programming Guide, table of technical specifications).
SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_120a": 99 * 1024,
}
ARCHITECTURES = tuple(SHARED_BYTES)
_CAPABILITIES = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a", (10, 0): "sm_100a"}
_CAPABILITIES[12, 0] = "sm_120a"
DEFAULT_CODE = DEFAULT_EPILOGUE.code()
ROW_BYTES = 128  # a row of a k-tile in shared memory
# in_features up to which SIMT sums in compensated blocks of 8 (csrc/gpu/fused_linear_simt.cuh), and the split kernel
# promotes its accumulators every 32 of k, not 64: the vendor's library splits short sums finely.
FINE_SUMS_UP_TO = 1024


@dataclass(frozen=True)
class Problem:
    """What is computed: element types, precision ("ieee", "fp32", "tf32" or the dtype's name), the layer's size, and
    the kind of epilogue."""

    in_dtype: DType
    out_dtype: DType
    precision: str
    in_features: int
    out_features: int
    epilogue: EpilogueCode = DEFAULT_CODE


@dataclass(frozen=True)
class Variant:
    """One instantiation of a kernel, and what launching it takes."""

    kernel: str  # the entry's name
    header: str  # csrc/gpu/<header>
    template: str  # the C++ type whose run() is the kernel
    description: str  # for reports, for example "fused_linear_sm80<bfloat16, 128x256x64, 4 stages>"
    block_m: int
    block_n: int
    threads: int
    min_blocks: int  # blocks a multiprocessor must hold at once; bounds the registers
    shared_bytes: int
    argument: type[ctypes.Structure]  # the host twin of its one argument
    rate: float = 1.0  # the tile's speed on a full GPU against the kernel's best tile
    epilogue: EpilogueCode | None = None
    pack: Callable[[Variant, Any], ctypes.Structure] | None = None  # the argument for a launch's `Operands`
    # The Hopper kernels' blocks walk over tiles; only these set what follows.
    persistent: bool = False
    band_rows: int = 1  # rows of tiles in a band (FusedLinearSm90::Walk)
    store_cost: float = 0.0  # for each output of a tile, from the end of its products, in units of `cost`

    @property
    def source(self) -> str:
        """The translation unit to compile: the kernel's header, the epilogue, and an entry with a plain name."""
        return (
            f'#include "{self.header}"\n'
            f"{self.epilogue.source if self.epilogue else ''}"
            f"using Kernel = {self.template};\n"
            f'static_assert(Kernel::kNumThreads == {self.threads}, "host twin");\n'
            f'static_assert(Kernel::kSharedBytes == {self.shared_bytes}, "host twin");\n'
            f'static_assert(sizeof(Kernel::Args) == {ctypes.sizeof(self.argument)}, "host twin");\n'
            f'extern "C" __global__ void __launch_bounds__(Kernel::kNumThreads, {self.min_blocks})\n'
            f"{self.kernel}(const __grid_constant__ Kernel::Args args) {{ Kernel::run(args); }}\n"
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
        product = ceil(in_bytes / ROW_BYTES) * self.block_m * self.block_n / 32 / self.rate
        store = self.store_cost * self.block_m * self.block_n
        # One warpgroup stores while the other multiplies, but for the last tile.
        return self.waves(rows, out_features, multiprocessors) * max(product, store) + store / 2


def described(problem: Problem, precision: str) -> str:
    """How descriptions begin: the precision, and the output's type where it isn't the data's."""
    return precision if problem.out_dtype is problem.in_dtype else f"{precision} to {problem.out_dtype}"


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


def alignment(*byte_counts: int) -> int:
    """The widest load, 16, 4, 2 or 1 bytes, that divides every address and row stride given in bytes."""
    combined = 0
    for count in byte_counts:
        combined |= count
    return next(width for width in (16, 4, 2, 1) if combined % width == 0)
