"""Adds the native copy workers and the mover to the build; all else is in pyproject.toml.

The library is optional: where there is no C compiler the install goes through, and copies are done by NumPy.
"""

import hashlib
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
SOURCES = [f"csrc/host/{path.name}" for path in sorted((ROOT / "csrc" / "host").glob("*.[ch]"))]
DIGEST = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in SOURCES)).hexdigest()[:16]


def nvtx_include() -> list[str]:
    """The folder of NVTX's headers, from the wheel nvidia-nvtx or a CUDA toolkit; none where neither is there. Without
    them profilers couldn't name the copies that C queues: Python queues those of a profiled run then."""
    roots = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    folders = [folder for path in sys.path for folder in sorted(Path(path).glob("nvidia/*/include"))]
    folders += [Path(root) / "include" for root in roots if root]
    return [str(folder) for folder in folders if (folder / "nvtx3" / "nvToolsExt.h").is_file()][:1]


NVTX = nvtx_include()

setup(
    ext_modules=[
        Extension(
            "pipeline._host",  # loaded with ctypes: nothing in it is Python's
            [name for name in SOURCES if name.endswith(".c")],
            depends=SOURCES,
            define_macros=[("HOST_SOURCE", f'"{DIGEST}"')] + [("HOST_NVTX", "1") for _ in NVTX],
            include_dirs=NVTX,
            extra_compile_args=["-std=c11", "-O3", "-pthread"],
            extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else [])],  # which NVTX's headers need
            optional=True,
        )
    ]
)
