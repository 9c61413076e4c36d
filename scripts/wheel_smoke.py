"""Checks an installed wheel: the CUDA sources and the copy workers are inside it, a kernel compiles, a run is right."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

import pipeline
from pipeline.dtypes import FLOAT32
from pipeline.kernels.choose import Problem, select
from pipeline.kernels.compile import compile_variant, csrc_dir
from pipeline.plan.predict import Machine, predict
from pipeline.plan.workload import Workload


def check_sources() -> str:
    folder, package = csrc_dir(), Path(pipeline.__file__).resolve().parent
    if Path(sys.prefix).resolve() not in package.parents:
        raise SystemExit(f"error: pipeline was imported from {package}, expected the wheel in {sys.prefix}")
    if folder != package / "csrc" / "gpu":
        raise SystemExit(f"error: the CUDA sources were found in {folder}, expected them in the wheel")
    return f"{len(list(folder.glob('*.cuh')))} kernel files in the wheel"


def check_compile() -> str:
    variant = select("sm_90a", Problem(FLOAT32, FLOAT32, "tf32", 512, 256), 1024, 16)
    compiled = compile_variant(variant, "sm_90a")
    return f"{variant.description} compiles: {len(compiled.cubin)} bytes, {compiled.report.registers} registers"


def check_native() -> str:
    """The wheel carries the copy workers, so that installing it needs no compiler."""
    from pipeline.staging.native import NativeWorkers

    workers = NativeWorkers(2)
    workers.close()
    return workers.description


def check_run() -> str:
    random = np.random.default_rng()
    weight, bias = random.standard_normal((96, 64), np.float32), random.standard_normal(96, np.float32)
    layer = pipeline.FusedLinear(weight, bias, scaling_factor=2.0)
    x = random.standard_normal((3000, 64), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "x.npy"), Path(folder, "y.npy")
        np.save(source, x)
        pipeline.run_pipelined(layer, source, out, chunk_rows=512)
        difference = float(np.abs(np.load(out) - layer.reference(x)).max())
    if not difference < 1e-3:
        raise SystemExit(f"error: the result is {difference} away from the reference")
    return f"a run from file to file is right (largest difference {difference:.1e})"


def check_plan() -> str:
    machine = Machine.load("h200")
    found = predict(Workload(10**6, 4096, 4096, FLOAT32, "tf32"), machine)
    return f"a plan for {machine.gpu} is bound by {found.bound}"


if __name__ == "__main__":
    for check in (check_sources, check_compile, check_native, check_run, check_plan):
        print(f"wheel: {check()}")
