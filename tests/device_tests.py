"""The helpers of tests/helpers under their former name."""

from helpers.data import (
    SCALE,
    assert_close,
    assert_same_bits,
    batches_of,
    bits,
    poisoned,
    random_layer,
    random_rows,
)
from helpers.device_tests import DeviceTests, wait
from helpers.leaks import (
    PlannedError,
    nothing_left_behind,
    pipeline_threads,
    small_rings,
    wait_until,
)

__all__ = [
    "SCALE",
    "DeviceTests",
    "PlannedError",
    "assert_close",
    "assert_same_bits",
    "batches_of",
    "bits",
    "nothing_left_behind",
    "pipeline_threads",
    "poisoned",
    "random_layer",
    "random_rows",
    "small_rings",
    "wait",
    "wait_until",
]
