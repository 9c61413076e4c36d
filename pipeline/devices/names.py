"""Devices by their names: which there are, and how one is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import DeviceNotFoundError, OptionError
from pipeline.options import parsed

if TYPE_CHECKING:
    from pipeline.devices.base import Device


def import_gpu_code() -> None:
    """Import now what the first run on a GPU would import: where there is none, it is small beside torch."""
    from pipeline.devices import cuda  # noqa: F401
    from pipeline.kernels.driver import import_bindings
    from pipeline.layer import gpu  # noqa: F401

    import_bindings()


def find_devices(wanted: str | list[str] | tuple[str, ...] | None) -> list[str]:
    """The names of the devices to use: every visible GPU where `wanted` is None, or the CPU where there is none.

    Raises:
        OptionError: not a device name, none at all, or one named twice.
        DeviceNotFoundError: a GPU that isn't there.
    """
    from pipeline.devices.cuda import count_gpus

    names: tuple[str, ...] | None = parsed("devices", wanted)
    if names is None:
        return [f"cuda:{i}" for i in range(count_gpus())] or ["cpu"]
    for name in names:
        kind, _, ordinal = name.partition(":")
        if name in ("cpu", "sim"):
            continue
        if kind != "cuda" or not ordinal.isdecimal():
            raise OptionError(f"device {name!r} isn't known, expected 'cpu', 'cuda', 'cuda:<number>' or 'sim'")
        count = count_gpus()
        if int(ordinal) >= count:
            there = f"there are {count}: cuda:0 to cuda:{count - 1}" if count else "no NVIDIA GPU is visible here"
            raise DeviceNotFoundError(f"device {name!r} isn't there; {there}. Use devices='cpu' to run without a GPU")
    return list(names)


def open_device(name: str) -> Device:
    """The device of that name, opened."""
    if name == "cpu":
        from pipeline.devices.cpu import CpuDevice

        return CpuDevice()
    if name == "sim":
        from pipeline.devices.sim import SimDevice

        return SimDevice()
    from pipeline.devices.cuda import CudaDevice

    return CudaDevice(int(name.partition(":")[2]))
