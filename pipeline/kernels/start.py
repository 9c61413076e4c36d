"""Starts the CUDA driver in a thread, while the rest of the program is imported.

Initialising the driver and making a GPU's context take a tenth of a second each, in which Python can do other things
(docs/notes/start.md). This module imports neither NumPy nor cuda.bindings, which would come first otherwise.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

process: int | None = None  # the one that started the driver, here or through cuda.bindings


def start_gpus(names: Sequence[str] | None) -> threading.Thread | None:
    """Begin to make the contexts of the GPUs among `names` ("cuda:1"), of all where it is None; gives back the thread.

    Whoever uses a GPU then finds its context made, or waits for it inside the driver. What fails here fails there
    again, and is reported there. Python waits at its end for the thread, under which the driver must not be unloaded.
    """
    wanted = None if names is None else [_ordinal(name) for name in names if name.startswith("cuda")]
    if wanted == []:
        return None
    thread = threading.Thread(target=_make_contexts, args=(wanted,), name="pipeline-cuda-start")
    thread.start()
    return thread


def _ordinal(name: str) -> int:
    number = name.partition(":")[2] or "0"
    return int(number) if number.isdecimal() else -1  # no name of a GPU


def _make_contexts(ordinals: Sequence[int] | None) -> None:
    global process
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver here
        return
    if library.cuInit(0) != 0:
        return
    process = os.getpid()
    count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return
    for ordinal in range(count.value) if ordinals is None else ordinals:
        if library.cuDeviceGet(ctypes.byref(device), ordinal) == 0:
            # Kept until the process ends: torch and the driver API share this context.
            library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
