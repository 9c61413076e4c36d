"""Adds the native copy workers to the build; all else is in pyproject.toml.

The library is optional: where there is no C compiler the install goes through, and copies are done by NumPy.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

SOURCES = ["csrc/host_copy.c", "csrc/host_lanes.c", "csrc/host_copy.h", "csrc/host_move.h"]
DIGEST = hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in SOURCES)).hexdigest()[:16]

setup(
    ext_modules=[
        Extension(
            "pipeline._host_copy",  # loaded with ctypes: nothing in it is Python's
            [name for name in SOURCES if name.endswith(".c")],
            depends=SOURCES,
            define_macros=[("HOST_COPY_SOURCE", f'"{DIGEST}"')],
            extra_compile_args=["-std=c11", "-O3", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
