"""The layer's products on the CPU: a row's bits depend on nothing but the row and the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice, pairwise

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.dtypes import DTYPES
from pipeline.epilogues import SigmoidScaleResidual
from pipeline.layer.host import HostWeights

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}


@st.composite
def cut_problems(draw: st.DrawFn) -> tuple[int, int, int, str, list[int], int]:
    """rows, in_features, out_features, dtype, where the rows are cut, a seed."""
    rows = draw(st.one_of(st.integers(1, 200), st.integers(500, 1100)))
    in_features = draw(st.one_of(st.integers(1, 40), st.integers(41, 700), st.sampled_from([256, 512, 1024])))
    out_features = draw(
        st.one_of(
            st.integers(1, 10),
            st.sampled_from([31, 32, 33, 63, 64, 65]),
            st.integers(66, 200),
            st.sampled_from([512, 768, 769, 1100]),
        )
    )
    cuts = draw(st.lists(st.integers(0, rows), max_size=6))
    dtype = draw(st.sampled_from(list(TORCH_DTYPES)))
    return rows, in_features, out_features, dtype, [0, *sorted(cuts), rows], draw(st.integers(0, 2**32 - 1))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cut_problems())
@example((1016, 58, 65, "float64", [0, 1016], 0))
@example((130, 300, 1, "float32", [0, 1, 65, 66, 130], 1))
@example((600, 512, 10, "float64", [0, 7, 64, 599, 600], 2))
@example((600, 512, 64, "float64", [0, 7, 64, 599, 600], 0))
@example((600, 512, 200, "float64", [0, 7, 64, 192, 599, 600], 1))
@example((600, 4096, 200, "float32", [0, 7, 64, 599, 600], 2))
@example((900, 700, 1100, "float32", [0, 1, 65, 200, 900], 0))
@example((514, 1, 37, "float32", [0, 134, 514], 1))
def test_host_weights_row_bits_do_not_depend_on_neighbours(
    problem: tuple[int, int, int, str, list[int], int],
) -> None:
    """However rows are cut, wherever they lie in memory, and however many threads torch has: the same bits."""
    rows, in_features, out_features, dtype, cuts, seed = problem
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator).to(TORCH_DTYPES[dtype])
    weight = torch.randn(out_features, in_features, generator=generator).to(TORCH_DTYPES[dtype])
    bias = torch.randn(out_features, generator=generator).to(TORCH_DTYPES[dtype])
    weights = HostWeights(weight, bias, SigmoidScaleResidual(2.0))
    whole = torch.full((rows, out_features), torch.nan, dtype=TORCH_DTYPES[dtype])
    threads = islice(cycle((1, 2, 16)), seed % 3, None)
    with torch_threads(next(threads)):
        weights.forward(x, whole)
    parts = torch.full_like(whole, torch.nan)
    for start, stop in pairwise(cuts):
        with torch_threads(next(threads)):
            weights.forward(x[start:stop], parts[start:stop], start)
    assert torch.equal(parts, whole)
    padding = seed % 5
    stride = in_features + padding
    moved = torch.empty(rows * stride + 8, dtype=x.dtype).as_strided((rows, in_features), (stride, 1), seed % 8)
    moved.copy_(x)
    again = torch.full((rows, out_features + 1), torch.nan, dtype=whole.dtype)[:, 1:]
    weights.forward(moved, again)
    assert torch.equal(again, whole)


@settings(max_examples=40, deadline=None)
@given(cut_problems(), st.integers(0, 500))
def test_host_weights_row_bits_do_not_depend_on_other_rows_values(
    problem: tuple[int, int, int, str, list[int], int], row: int
) -> None:
    rows, in_features, out_features, dtype, _, seed = problem
    row %= rows
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator).to(TORCH_DTYPES[dtype])
    weights = HostWeights(
        torch.randn(out_features, in_features, generator=generator).to(x.dtype), None, SigmoidScaleResidual(2.0)
    )
    first, second = (torch.empty(rows, out_features, dtype=x.dtype) for _ in range(2))
    weights.forward(x, first)
    other = torch.full_like(x, torch.nan)
    other[row] = x[row]
    weights.forward(other, second)
    assert torch.equal(first[row], second[row])
