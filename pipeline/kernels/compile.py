"""Compiles a kernel variant with NVRTC to a cubin, and keeps cubins in a cache directory of the user's own.

Compiling needs no GPU and no driver. The cache is keyed by source (of which the epilogue's is a part), headers, options
and compiler version; each entry carries a digest, so a damaged one is compiled again.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import stat
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import cache_dir
from pipeline.errors import CompileError, DeviceError
from pipeline.kernels.variant import Variant

_CUDA_HEADERS = ("cuda_bf16.h", "cuda_bf16.hpp", "cuda_fp16.h", "cuda_fp16.hpp")
_DIGEST_BYTES = hashlib.sha256().digest_size


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


@functools.cache
def _header_digest(*folders: Path) -> bytes:
    """A digest of every file a kernel may include. Computed once a process: sources don't change under a run."""
    csrc, cuda = folders
    digest = hashlib.sha256()
    for path in [*sorted(csrc.glob("*.cuh")), *(cuda / name for name in _CUDA_HEADERS)]:
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

    # NOTE: where there is a GPU, NVRTC keeps a cache of its own, and its hits come without ptxas's report
    # (docs/notes/kernels.md).
    return ProgramOptions(
        arch=arch,
        std="c++17",
        ptxas_options=["-v"],
        include_path=[str(folder) for folder in include_dirs],
        no_cache=True,
    )


def compile_variant(variant: Variant, arch: str) -> CompiledKernel:
    """The machine code of `variant` for `arch`, from the cache if it is there.

    Blocks for about a second when it isn't. Threads and processes may call it at once. A cache directory that can't
    be trusted or written is reported as a RuntimeWarning and left alone.

    Raises:
        CompileError: with NVRTC's log and options.
    """
    folders = (csrc_dir(), _cuda_include_dir())
    directory = _own_directory(cache_dir() / "kernels")
    if directory is None:
        return compile_source(variant.source, arch, folders)

    from cuda.core.utils import FileStreamProgramCache, make_program_cache_key

    key = make_program_cache_key(
        code=variant.source,
        code_type="c++",
        options=_program_options(arch, folders),
        target_type="cubin",
        extra_digest=_header_digest(*folders),
    )
    try:
        with FileStreamProgramCache(directory) as cache:
            kept = _unpack(cache.get(key))
            if kept is not None:
                return kept
            compiled = compile_source(variant.source, arch, folders)
            cache[key] = _pack(compiled)
            return compiled
    except OSError as error:
        warnings.warn(f"the kernel cache {directory} can't be used: {error}", RuntimeWarning, stacklevel=2)
        return compile_source(variant.source, arch, folders)


def _own_directory(directory: Path) -> Path | None:
    """`directory`, made if missing, or None with a warning where others could plant machine code in it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        problem = str(error)
    else:
        if not stat.S_ISDIR(status.st_mode):
            problem = "it is a link"
        elif status.st_uid != os.geteuid():
            problem = f"it belongs to user {status.st_uid}"
        elif status.st_mode & 0o022:
            problem = f"others may write to it (mode {status.st_mode & 0o777:o})"
        else:
            return directory
    warnings.warn(
        f"kernels are compiled anew, because the cache {directory} can't be used: {problem}; remove it or set "
        f"PIPELINE_CACHE_DIR to a folder of your own",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _pack(compiled: CompiledKernel) -> bytes:
    """A cache entry: digest of the rest, the report as a line of JSON, the cubin."""
    body = json.dumps(asdict(compiled.report)).encode() + b"\n" + compiled.cubin
    return hashlib.sha256(body).digest() + body


def _unpack(entry: bytes | None) -> CompiledKernel | None:
    """What `_pack` packed, or None for a missing or damaged entry."""
    if entry is None or hashlib.sha256(entry[_DIGEST_BYTES:]).digest() != entry[:_DIGEST_BYTES]:
        return None
    line, _, cubin = entry[_DIGEST_BYTES:].partition(b"\n")
    report = PtxasReport(**json.loads(line))
    return CompiledKernel(cubin, replace(report, complaints=tuple(report.complaints)), from_cache=True)
