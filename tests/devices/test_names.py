"""Devices by their names."""

from __future__ import annotations

import pytest

from pipeline.devices.cuda import count_gpus
from pipeline.devices.names import find_devices, open_device
from pipeline.errors import DeviceNotFoundError, OptionError


def test_find_devices_takes_the_cpu_where_there_is_no_gpu() -> None:
    if count_gpus():
        pytest.skip("there is a GPU")
    assert find_devices(None) == ["cpu"]


def test_find_devices_keeps_names_and_order() -> None:
    assert find_devices("cpu") == ["cpu"]
    assert find_devices(("sim", "cpu")) == ["sim", "cpu"]


@pytest.mark.parametrize("wanted", [[], "", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", ["cpu", "cpu"], 5, [None], {}])
def test_find_devices_refuses_what_is_no_device(wanted: object) -> None:
    with pytest.raises(OptionError, match="device"):
        find_devices(wanted)  # type: ignore[arg-type]


def test_find_devices_refuses_the_same_gpu_under_two_names() -> None:
    with pytest.raises(OptionError, match="different device names"):
        find_devices(["cuda", "cuda:0"])


def test_find_devices_names_a_gpu_that_is_not_there() -> None:
    with pytest.raises(DeviceNotFoundError, match=r"'cuda:99' isn't there; .*devices='cpu'"):
        find_devices("cuda:99")


def test_open_device_opens_by_name() -> None:
    for name in ("cpu", "sim"):
        device = open_device(name)
        assert device.name == name
        device.close()
