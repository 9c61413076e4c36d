"""Views of arrays and tensors, and the ranges of memory that they take up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import DTypeError
from pipeline.arrays import byte_range, host_tensor, host_view, overlaps
from pipeline.dtypes import DTYPES, parse_dtype


@settings(max_examples=100, deadline=None)
@given(
    rows=st.slices(12), columns=st.slices(12), order=st.sampled_from("<>"), dtype=st.sampled_from(["f2", "f4", "f8"])
)
def test_host_view_and_tensor_keep_every_value(rows: slice, columns: slice, order: str, dtype: str) -> None:
    """Any slicing and byte order arrives in torch as the same numbers."""
    view = np.arange(144).reshape(12, 12).astype(order + dtype)[rows, columns]
    array, element = host_view(view, "view")
    assert array is view
    native = array if array.dtype.isnative else array.astype(element.carrier)
    np.testing.assert_array_equal(host_tensor(native, element).numpy(), view.astype(np.float64))


def test_host_tensor_shares_writable_memory() -> None:
    array = np.zeros((4, 6), np.float32)
    host_tensor(array[::2, ::3], DTYPES["float32"])[:] = 1
    assert array.sum() == 4


@pytest.mark.parametrize(
    ("shape", "stride", "expected"), [((2, 3), (3, 1), 24), ((2, 3), (10, 1), 52), ((0, 3), (3, 1), 0)]
)
def test_byte_range_covers_the_elements(shape: tuple[int, int], stride: tuple[int, int], expected: int) -> None:
    first, last = byte_range(torch.zeros(100).as_strided(shape, stride))
    assert last - first == expected


def test_overlaps_is_about_shared_bytes() -> None:
    assert overlaps((0, 4), (3, 8)) and overlaps((3, 8), (0, 4)) and overlaps((0, 9), (4, 5))
    assert not overlaps((0, 4), (4, 8)) and not overlaps((4, 8), (0, 4))


def test_parse_dtype_refuses_none() -> None:
    with pytest.raises(DTypeError, match="None"):
        parse_dtype(None)
