"""Compiles a kernel variant with NVRTC to a cubin, or finds the cubin in a cache directory of the user's own (`cache`).

Compiling needs no GPU and no driver. An entry of the cache stands for the source (of which the epilogue's is a part),
our headers, the architecture and the options, and for the compiler's files as they were: CUDA's headers and NVRTC's
library. A kernel that is found there imports neither cuda.core nor cuda.pathfinder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import cache_dir
from pipeline.errors import CompileError, DeviceError
from pipeline.kernels.cache import Entry, FileState, entry_path, load, own_directory, save
from pipeline.kernels.variant import Variant

_CUDA_HEADERS = ("cuda_bf16.h", "cuda_bf16.hpp", "cuda_fp16.h", "cuda_fp16.hpp")
# NOTE: where there is a GPU, NVRTC keeps a cache of its own, and its hits come without ptxas's report
# (docs/notes/kernels.md).
_OPTIONS: dict[str, Any] = {"std": "c++17", "ptxas_options": ["-v"], "no_cache": True}


@dataclass(frozen=True)
class PtxasReport:
    """What ptxas says about a kernel. `complaints` are its warnings and the performance notes C7508 to C7515."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    complaints: tuple[str, ...]


@dataclass(frozen=True)
class CompiledKernel:
    """A variant's machine code for one architecture. Its entry is the plain C name `variant.kernel`."""

    cubin: bytes
    report: PtxasReport
    from_cache: bool = False


def csrc_dir() -> Path:
    """The folder of CUDA sources: inside the package when installed, beside it in a checkout.

    Raises:
        DeviceError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc" / "gpu", package.parent / "csrc" / "gpu"):
        if (folder / "fused_linear.cuh").is_file():
            return folder
    raise DeviceError(f"the CUDA sources are missing from {package / 'csrc' / 'gpu'}; install the package again")


@functools.cache
def _cuda_include_dir() -> Path:
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found is None:
        raise DeviceError("the CUDA headers weren't found; pip install 'cuda-toolkit[nvrtc,cudart]>=13.0,<14'")
    return Path(found)


def _compiler_files() -> tuple[FileState, ...]:
    """What a kernel is made of besides our sources: CUDA's headers, and the compiler.

    Raises:
        OSError: one of them isn't there.
    """
    from cuda.pathfinder import load_nvidia_dynamic_lib

    compiler = load_nvidia_dynamic_lib("nvrtc").abs_path
    if compiler is None:
        raise OSError("it isn't known which file NVRTC was loaded from")
    return tuple(FileState.of(path) for path in (compiler, *(_cuda_include_dir() / name for name in _CUDA_HEADERS)))


@functools.cache
def _csrc_digest() -> bytes:
    """A digest of our headers. Computed once a process: sources don't change under a run."""
    digest = hashlib.sha256()
    for path in sorted(csrc_dir().glob("*.cuh")):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


def parse_report(log: str) -> PtxasReport:
    """Reads the log of `ptxas -v` for one kernel."""

    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, log))

    complaints = [line.strip() for line in log.splitlines() if re.search(r"\bwarning\b|\bC75\d\d\b", line)]
    return PtxasReport(
        registers=total(r"Used (\d+) registers"),
        spill_bytes=total(r"(\d+) bytes spill"),
        stack_bytes=total(r"(\d+) bytes stack frame"),
        complaints=tuple(complaints),
    )


def compile_source(source: str, arch: str, include_dirs: tuple[Path, ...]) -> CompiledKernel:
    """Compiles C++ to a cubin for `arch` ("sm_90a").

    Raises:
        CompileError: with NVRTC's log and options.
    """
    import io

    from cuda.core import Program

    options = _program_options(arch, include_dirs)
    log = io.StringIO()
    try:
        code = Program(source, "c++", options=options).compile("cubin", logs=log).code
    except Exception as error:  # cuda.core raises classes of its own, which differ between versions
        text = log.getvalue() or str(error)
        shown = (f"--gpu-architecture={arch}", "--std=c++17", "-v", *(f"-I{folder}" for folder in include_dirs))
        raise CompileError(f"NVRTC can't compile a kernel for {arch}", text, shown) from error
    return CompiledKernel(bytes(code), parse_report(log.getvalue()))


def _program_options(arch: str, include_dirs: tuple[Path, ...]) -> Any:
    from cuda.core import ProgramOptions

    return ProgramOptions(arch=arch, include_path=[str(folder) for folder in include_dirs], **_OPTIONS)


def compile_variant(variant: Variant, arch: str) -> CompiledKernel:
    """The machine code of `variant` for `arch`, from the cache if it is there.

    Blocks for about a second when it isn't. Threads and processes may call it at once. A cache directory that can't
    be trusted, read or written is reported as a RuntimeWarning and left alone.

    Raises:
        CompileError: with NVRTC's log and options.
    """
    directory = own_directory(cache_dir() / "kernels")
    if directory is None:
        return compile_source(variant.source, arch, (csrc_dir(), _cuda_include_dir()))
    path = entry_path(directory, variant.source, _csrc_digest(), arch, json.dumps(_OPTIONS))
    try:
        kept = load(path)
        if kept is not None:
            report = PtxasReport(**{**kept.report, "complaints": tuple(kept.report["complaints"])})
            return CompiledKernel(kept.cubin, report, from_cache=True)
        files = _compiler_files()  # as they are before they are read
    except OSError as error:
        _warn_of(directory, error)
        return compile_source(variant.source, arch, (csrc_dir(), _cuda_include_dir()))
    compiled = compile_source(variant.source, arch, (csrc_dir(), _cuda_include_dir()))
    try:
        save(path, Entry(compiled.cubin, asdict(compiled.report), files))
    except OSError as error:
        _warn_of(directory, error)
    return compiled


def _warn_of(directory: Path, error: OSError) -> None:
    warnings.warn(f"the kernel cache {directory} can't be used: {error}", RuntimeWarning, stacklevel=3)
