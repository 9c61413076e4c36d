"""The host twin of csrc/gpu/fused_linear_sm80.cuh: tensor cores through mma.sync, for any layout on sm_80 and later.

Operands as they are (bf16, fp16, tf32), or fp32 split into fp16 pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.kernels.fused_linear import argument_type, pack
from pipeline.kernels.variant import ROW_BYTES, SHARED_BYTES, Problem, Variant, described


@dataclass(frozen=True)
class _Tile:
    """A tile of y. `rate` is its speed on a full GPU against the kernel's best tile, all multiprocessors busy."""

    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    stages: int
    min_blocks: int
    rate: float
    any_alignment: bool = True  # also instantiated for loads narrower than 16 bytes, which take more registers


# Where the rates come from: docs/notes/kernels.md. Those of 3 stages and of split operands are estimates.
_TILES = (
    _Tile(128, 256, 2, 4, 4, 1, 1.0, any_alignment=False),
    _Tile(128, 256, 2, 4, 3, 1, 0.95, any_alignment=False),
    _Tile(128, 128, 2, 4, 4, 1, 0.85),
    _Tile(128, 128, 2, 4, 3, 1, 0.8),
    _Tile(64, 64, 2, 2, 4, 2, 0.65),
)
_SPLIT_TILES = (
    _Tile(128, 128, 4, 2, 3, 1, 1.0),
    _Tile(64, 64, 2, 2, 4, 2, 0.7),
)


def variants(arch: str, problem: Problem, load_bytes: int) -> Iterator[Variant]:
    """Those that fit the architecture, fastest tile first; of one tile's stage counts the first that fits."""
    split = problem.precision == "fp32"
    if split:
        load_bytes = 16  # the parts are aligned
    found: set[tuple[int, int]] = set()
    for tile in _SPLIT_TILES if split else _TILES:
        variant = _variant(problem, tile, load_bytes)
        size = (tile.block_m, tile.block_n)
        fits = variant.shared_bytes <= SHARED_BYTES[arch] and (tile.any_alignment or load_bytes == 16)
        if fits and size not in found:
            found.add(size)
            yield variant


def _variant(problem: Problem, tile: _Tile, load_bytes: int) -> Variant:
    if problem.precision == "fp32":
        kernel, operands, epilogue, sums = "fused_linear_split_sm80", "SplitFp16<1>", "Exact", ", sums of 32"
    else:
        kernel, operands, sums = "fused_linear_sm80", f"Plain<{problem.in_dtype.cuda_name}>", ""
        epilogue = "Fast"
    numbers = f"{tile.block_m}, {tile.block_n}, {tile.warps_m}, {tile.warps_n}, {tile.stages}, {load_bytes}"
    block_k = ROW_BYTES // problem.in_dtype.itemsize
    loads = "" if load_bytes == 16 else f", {load_bytes}-byte loads"
    return Variant(
        kernel=kernel,
        header="fused_linear_sm80.cuh",
        template=f"FusedLinearSm80<{operands}, {problem.out_dtype.cuda_name}, epilogue::{epilogue}, {numbers}>",
        description=(
            f"{kernel}<{described(problem, problem.precision)}, {tile.block_m}x{tile.block_n}x{block_k}, "
            f"{tile.stages} stages{sums}{loads}>"
        ),
        block_m=tile.block_m,
        block_n=tile.block_n,
        threads=tile.warps_m * tile.warps_n * 32,
        min_blocks=tile.min_blocks,
        shared_bytes=tile.stages * (tile.block_m + tile.block_n) * ROW_BYTES,
        rate=tile.rate,
        epilogue=problem.epilogue,
        argument=argument_type(problem.epilogue.parameters),
        pack=pack,
    )
