"""The CUDA driver API through cuda-python, with every call checked."""

from __future__ import annotations

import functools
import os
from typing import Any

from pipeline.errors import DeviceError, DeviceMemoryError, DeviceNotFoundError, DriverError
from pipeline.kernels import start


@functools.cache
def driver() -> Any:
    """The initialised driver API, `cuda.bindings.driver`.

    Raises:
        DeviceNotFoundError: no cuda-bindings, no driver or no GPU.
    """
    try:
        bindings, code = _start()
    except (ImportError, RuntimeError) as error:  # bindings raise RuntimeError where libcuda is missing
        raise DeviceNotFoundError(
            f"the CUDA driver can't be loaded: {error}; install an NVIDIA driver and cuda-bindings, or use "
            f"devices='cpu'"
        ) from error
    if code != 0:
        label = _error_text(bindings.cuGetErrorName, code)
        raise DeviceNotFoundError(f"cuInit failed: {label}; check nvidia-smi, or use devices='cpu'")
    return bindings


def _start() -> tuple[Any, Any]:
    """The bindings, and what cuInit returned."""
    bindings = _bindings()
    (code,) = bindings.cuInit(0)
    if code == 0:
        start.process = os.getpid()
    return bindings, code


def _bindings() -> Any:
    from cuda.bindings import driver as bindings

    return bindings


def import_bindings() -> None:
    """Import now what the first use of the driver would import. Where it isn't installed, that use says so."""
    try:
        _bindings()
    except (ImportError, RuntimeError):
        pass


def check_not_forked() -> None:
    """Check that this is the process that started CUDA.

    Raises:
        DeviceError: this process was forked after CUDA had been started.
    """
    if start.process not in (None, os.getpid()):
        raise DeviceError(
            "this process was forked after CUDA had started, and CUDA doesn't survive a fork: start worker processes "
            "with the 'spawn' method, or fork before the first use of a GPU"
        )


def call(name: str, *arguments: Any) -> Any:
    """Call a driver function by its name and return its result: None, one value or a list.

    Raises:
        DeviceMemoryError: out of memory. DriverError: any other failure. Both name the call and the error.
    """
    code, *results = getattr(driver(), name)(*arguments)
    if code != 0:
        raise call_error(name, code)
    return (results[0] if len(results) == 1 else results) if results else None


def call_error(what: str, code: Any) -> DriverError | DeviceMemoryError:
    """The exception for a call, or an asynchronous operation, that ended with an error code."""
    label = _error_text(driver().cuGetErrorName, code)
    message = f"{what} failed: {label} ({_error_text(driver().cuGetErrorString, code)})"
    if label == "CUDA_ERROR_OUT_OF_MEMORY":
        return DeviceMemoryError(f"{message}; use smaller chunk_rows or num_streams, or free memory on the GPU")
    return DriverError(message, label)


def _error_text(lookup: Any, code: Any) -> str:
    status, text = lookup(code)
    return text.decode() if status == 0 and text else str(code)


def count_gpus() -> int:
    """Visible NVIDIA GPUs; 0 where there is no driver or no GPU.

    Raises:
        DriverError: there is a driver, but it doesn't work.
    """
    check_not_forked()
    try:
        bindings, code = _start()
    except (ImportError, RuntimeError):  # no cuda-bindings, or no libcuda on this machine
        return 0
    if code in (bindings.CUresult.CUDA_ERROR_NO_DEVICE, bindings.CUresult.CUDA_ERROR_STUB_LIBRARY):
        return 0
    if code != 0:
        raise DriverError(f"cuInit failed: {_error_text(bindings.cuGetErrorName, code)}; check nvidia-smi")
    return int(call("cuDeviceGetCount"))
