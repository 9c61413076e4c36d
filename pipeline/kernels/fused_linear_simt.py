"""The host twin of csrc/gpu/fused_linear_simt.cuh: exact fp32 on CUDA cores, for all rows or for some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.kernels.fused_linear import argument_type, pack
from pipeline.kernels.variant import (
    FINE_SUMS_UP_TO,
    ROW_BYTES,
    SHARED_BYTES,
    Problem,
    Variant,
    described,
)

_STAGES = 2
_PITCH_BYTES = ROW_BYTES + 16  # from one row to the next in shared memory


@dataclass(frozen=True)
class _Tile:
    """A tile of y. `rate` is its speed on a full GPU against the best tile's, all multiprocessors busy."""

    block_m: int
    block_n: int
    threads_m: int
    threads_n: int
    min_blocks: int
    rate: float


# Where the rates come from: docs/notes/kernels.md.
_TILES = (
    _Tile(128, 128, 16, 16, 1, 1.0),
    _Tile(32, 64, 8, 16, 2, 0.93),
)


def variants(arch: str, problem: Problem, load_bytes: int) -> Iterator[Variant]:
    """Those that fit the architecture, fastest tile first."""
    sum_block = 8 if problem.in_features <= FINE_SUMS_UP_TO else 64
    for tile in _TILES:
        variant = _variant(problem, tile, load_bytes, sum_block)
        if variant.shared_bytes <= SHARED_BYTES[arch]:
            yield variant


def exact_rows_variant(problem: Problem, load_bytes: int) -> Variant:
    """The kernel for exact rows, those that pairs of fp16 can't hold: with the finer sums for any in_features."""
    return _variant(problem, _TILES[0], load_bytes, 8, exact_rows=True)


def _variant(problem: Problem, tile: _Tile, load_bytes: int, sum_block: int, exact_rows: bool = False) -> Variant:
    numbers = f"{tile.block_m}, {tile.block_n}, {tile.threads_m}, {tile.threads_n}, {_STAGES}, {load_bytes}"
    some = "true" if exact_rows else "false"
    block_k = ROW_BYTES // problem.in_dtype.itemsize
    loads = "" if load_bytes == 16 else f", {load_bytes}-byte loads"
    return Variant(
        kernel="fused_linear_simt",
        header="fused_linear_simt.cuh",
        template=f"FusedLinearSimt<{problem.out_dtype.cuda_name}, epilogue::Exact, {numbers}, {sum_block}, {some}>",
        description=(
            f"fused_linear_simt<{described(problem, 'ieee')}, {tile.block_m}x{tile.block_n}x{block_k}, "
            f"{_STAGES} stages, sums of {sum_block}{', exact rows' if exact_rows else ''}{loads}>"
        ),
        block_m=tile.block_m,
        block_n=tile.block_n,
        threads=tile.threads_m * tile.threads_n,
        min_blocks=tile.min_blocks,
        shared_bytes=_STAGES * (tile.block_m + tile.block_n) * _PITCH_BYTES,
        rate=tile.rate,
        epilogue=problem.epilogue,
        argument=argument_type(problem.epilogue.parameters),
        pack=pack,
    )
