"""Rings of pinned pieces."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.arrays import HostArray
from pipeline.dtypes import FLOAT32
from pipeline.errors import DeviceMemoryError
from pipeline.staging.ring import Ring


def test_ring_goes_on_where_an_allocation_failed() -> None:
    allocated: list[int] = []

    def allocate(n_bytes: int) -> HostArray:
        allocated.append(n_bytes)
        if len(allocated) in (3, 4):
            raise DeviceMemoryError("no more")
        return np.empty(n_bytes, np.uint8)

    ring = Ring(allocate, 4, 640, 16, FLOAT32)
    for _ in range(2):
        with pytest.raises(DeviceMemoryError):
            ring.take()
    assert sorted(ring.take() for _ in range(4)) == [0, 1, 2, 3] and not ring.available
    assert allocated == 6 * [640] and ring.allocated_bytes == 4 * 640, "what it had is used"
    assert ring.rows(3, 10).shape == (10, 16)
