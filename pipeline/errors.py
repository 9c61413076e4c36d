"""Every exception the package raises on purpose.

    PipelineError
    ├── InputError (ValueError)             what was passed in can't be used
    │   ├── ShapeError                      rank, feature count, row width
    │   ├── DTypeError (TypeError)          element type
    │   ├── OptionError                     a keyword's value
    │   └── FileFormatError                 a .npy or .safetensors file that isn't what it says
    ├── OutputError                         the result can't go where it was asked to go
    │   └── OutputExistsError (FileExistsError)
    └── DeviceError (RuntimeError)          the machine can't do it
        ├── DeviceNotFoundError
        ├── DeviceMemoryError (MemoryError) it doesn't fit
        ├── DriverError                     a CUDA driver call failed
        └── CompileError                    NVRTC refused a kernel; carries its log and options

    TraceWarning (RuntimeWarning)           a run is complete, but its timeline couldn't be written

Messages say what was wrong, what was got, what was expected and what to do. An exception raised by the
caller's own source or sink is passed on as it is, with a note that names the chunk and the stage.
"""

from __future__ import annotations

from collections.abc import Callable


class PipelineError(Exception):
    """Base of all errors raised by this package."""


class InputError(PipelineError, ValueError):
    """An argument or a dataset can't be used."""


class ShapeError(InputError):
    """A rank, a feature count or a row width doesn't match."""


class DTypeError(InputError, TypeError):
    """An element type is unsupported or differs from the layer's."""


class OptionError(InputError):
    """A keyword argument has a value that isn't allowed."""


class FileFormatError(InputError):
    """A file isn't what its header says."""


class OutputError(PipelineError):
    """The result can't be written where it was asked to go."""


class OutputExistsError(OutputError, FileExistsError):
    """The output path exists and `overwrite` wasn't given."""


class TraceWarning(RuntimeWarning):
    """The timeline of a run that is complete couldn't be written. No error: the result isn't lost with it."""


class DeviceError(PipelineError, RuntimeError):
    """A device can't do what was asked."""


class DeviceNotFoundError(DeviceError):
    """The device asked for isn't on this machine."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A chunk, the weights or the pinned ring don't fit in memory."""


class DriverError(DeviceError):
    """A CUDA driver call failed. `code` is the driver's own name of the error."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class CompileError(DeviceError):
    """NVRTC refused a kernel. `log` and `options` are the compiler's."""

    def __init__(self, message: str, log: str = "", options: tuple[str, ...] = ()) -> None:
        details = f"{message}\n  options: {' '.join(options)}\n  log:\n{log}"
        super().__init__(details)
        self.log = log
        self.options = options


def uninterrupted(do: Callable[[], object]) -> None:
    """Call `do`, which must not be left half done, again until no interrupt cuts it short; then raise the first one."""
    interrupt: BaseException | None = None
    while True:
        try:
            do()
            break
        except Exception:
            raise
        except BaseException as error:
            interrupt = interrupt or error
    if interrupt is not None:
        raise interrupt
