"""What `run_pipelined` keeps on a GPU between calls, and what gives it back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.data import assert_same_bits, random_layer, random_rows
from helpers.leaks import nothing_left_behind, wait_until

import pipeline
from pipeline import FusedLinear, Pipeline, run_pipelined
from pipeline.config import MIB
from pipeline.devices.cuda import count_gpus

torch = pytest.importorskip("torch")
if not count_gpus():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

X = random_rows(5000, 2048)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    pipeline.release()
    yield
    pipeline.release()


def layer_of(precision: str = "tf32", seed: int = 0) -> FusedLinear:
    """Of 16 MiB of weights: these go through the pinned ring."""
    made = random_layer(2048, 2048, seed=seed)
    return FusedLinear(made.weight, made.bias, 2.0, precision=precision)


def free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0])


@pytest.mark.parametrize("precision", ["tf32", "fp32", "ieee"])
def test_kept_fleet_gives_the_same_bits(precision: str) -> None:
    layer = layer_of(precision)
    with Pipeline(layer, devices="cuda:0") as warm:
        expected = warm.run(X).out
    for _ in range(3):
        assert_same_bits(run_pipelined(layer, X, devices="cuda:0").out, expected)
    layer.scaling_factor = 1.0
    changed = run_pipelined(layer, X, devices="cuda:0").out
    assert not np.array_equal(changed, expected)
    with Pipeline(layer, devices="cuda:0") as warm:
        assert_same_bits(changed, warm.run(X).out)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("features", [2048, 2047, 1500])
def test_weights_reach_the_gpu_through_the_ring_whole(
    features: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The staged copy against the driver's own, for rows that follow each other and for rows that are padded."""
    monkeypatch.setenv("PIPELINE_PIECE_BYTES", str(MIB))
    weight = torch.randn(3000, features).to(getattr(torch, dtype))
    x = torch.randn(700, features).to(getattr(torch, dtype))
    layer = FusedLinear(weight, None, 2.0)
    out = run_pipelined(layer, x, devices="cuda:0").out
    assert torch.equal(out, layer(x.cuda()).cpu())


def test_release_gives_the_memory_back() -> None:
    layer = layer_of()
    run_pipelined(layer, X, devices="cuda:0")
    with nothing_left_behind():
        pipeline.release()
        before = free_bytes()
        for _ in range(3):
            run_pipelined(layer, X, devices="cuda:0")
            assert before - free_bytes() > 16 * MIB, "the weights are there"
            pipeline.release()
            assert before - free_bytes() < 2 * MIB


def test_layer_that_dies_frees_its_memory() -> None:
    layer = layer_of()
    run_pipelined(layer, X, devices="cuda:0")
    held = free_bytes()
    del layer
    gc.collect()
    assert wait_until(lambda: free_bytes() - held > 16 * MIB)


def test_new_fleet_takes_the_place_of_kept_ones_where_memory_is_short() -> None:
    first, second = layer_of(seed=1), layer_of(seed=2)
    run_pipelined(first, X, devices="cuda:0")
    with Pipeline(second, devices="cuda:0") as needs:
        needed = needs.fleet.device_bytes
    torch.cuda.empty_cache()
    hog = torch.empty(free_bytes() - needed // 2, dtype=torch.uint8, device="cuda")
    try:
        out = run_pipelined(second, X, devices="cuda:0").out
        assert_same_bits(out, second(torch.from_numpy(X).cuda()).cpu().numpy())
    finally:
        del hog
        torch.cuda.empty_cache()


def test_process_with_kept_fleets_ends_in_silence() -> None:
    program = """
import numpy as np
from pipeline import FusedLinear, run_pipelined
layer = FusedLinear(np.ones((2048, 2048), np.float32), None, 2.0)
for _ in range(2):
    run_pipelined(layer, np.ones((3000, 2048), np.float32), devices="cuda:0")
print("end")
"""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["end"], "")
