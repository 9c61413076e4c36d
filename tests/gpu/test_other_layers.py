"""Epilogues and layers from outside of the package, on a GPU."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, poisoned, random_rows
from helpers.epilogues import ScaledShift
from helpers.other_layer import TorchLayer

import pipeline
from pipeline import FusedLinear, Pipeline, run_pipelined
from pipeline.devices.cuda import count_gpus

torch = pytest.importorskip("torch")
if not count_gpus():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)


class RowParity(pipeline.Epilogue):
    """What tells whether a kernel gives the functor the row and the column that z belongs to."""

    cuda = "return z + static_cast<float>(row % 64) + static_cast<float>(column % 64) / 64.0f;"

    def numpy(self, z: Any) -> Any:
        rows, columns = np.indices(z.shape)
        return z + rows % 64 + (columns % 64) / 64

    def torch(self, z: Any) -> Any:
        raise NotImplementedError


def shifted(in_features: int, out_features: int, dtype: Any, **options: Any) -> FusedLinear:
    weight, bias = torch.randn(out_features, in_features), torch.randn(out_features)
    epilogue = ScaledShift(2.0, torch.randn(out_features))
    return FusedLinear((weight / in_features**0.5).to(dtype), bias.to(dtype), epilogue=epilogue, **options)


TOLERANCES = {"fp32": 1e-5, "ieee": 1e-5, "tf32": 2e-2, "bfloat16": 1e-1, "float16": 2e-2}
SIZES = [(200, 264), (333, 131), (64, 1), (1024, 520)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("precision", TOLERANCES)
def test_new_epilogue_on_cuda_tensors(precision: str, sizes: tuple[int, int]) -> None:
    """Aligned and odd widths, so stores of both kinds; one row that needs exact fp32."""
    torch.manual_seed(sum(sizes))
    dtype = getattr(torch, precision, torch.float32)
    layer = shifted(*sizes, dtype, precision=precision)
    for rows in (1, 130, 700):
        x = torch.randn(rows, sizes[0], device="cuda").to(dtype)
        if precision == "fp32" and rows > 1:
            x[7] = torch.exp(9 * torch.randn(sizes[0], device="cuda"))
        y, expected = layer(x), layer.reference(x)
        scale = max(1.0, float(np.abs(expected).max())) if precision == "fp32" else 8.0
        np.testing.assert_allclose(y.double().cpu().numpy(), expected, rtol=2e-2, atol=TOLERANCES[precision] * scale)
        out = torch.full_like(y, torch.nan)
        for _ in range(2):  # the second call is a prepared launch
            assert torch.equal(layer(x, out=out), y)


@pytest.mark.parametrize("precision", ["fp32", "ieee", "tf32", "bfloat16"])
def test_epilogue_gets_its_row_and_column(precision: str) -> None:
    dtype = getattr(torch, precision, torch.float32)
    for out_features in (520, 131):
        layer = FusedLinear(torch.zeros(out_features, 256, dtype=dtype), epilogue=RowParity(), precision=precision)
        x = torch.randn(700, 256, device="cuda").to(dtype)
        x[13, 1:] = 0  # in fp32 an exact row
        out = torch.empty(700, out_features, device="cuda")
        np.testing.assert_array_equal(layer(x, out=out).cpu().numpy(), layer.reference(x).astype(np.float32))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bfloat16"])
def test_new_epilogue_streams_on_the_gpu(precision: str) -> None:
    dtype = getattr(torch, precision, torch.float32)
    layer = shifted(256, 192, dtype, precision=precision)
    x = torch.randn(3000, 256).to(dtype)
    expected = layer(x.cuda())
    with Pipeline(layer, devices="cuda:0", chunk_rows=256) as run:
        assert_same_bits(run.run(x).out, expected)
        assert_same_bits(run.run(x.cuda()).out, expected)


def test_two_epilogues_of_one_class_share_kernels_and_keep_their_parameters() -> None:
    weight, x = torch.randn(130, 64), torch.randn(50, 64, device="cuda")
    layers = [
        FusedLinear(weight, epilogue=ScaledShift(scale, np.full(130, shift))) for scale, shift in ((1, 0.0), (0, 5.0))
    ]
    first, second = (layer(x) for layer in layers)
    assert (second == 5).all()
    assert_same_bits(copy.deepcopy(layers[0])(x), first)
    del layers
    gc.collect()


# -- a layer of another kind -------------------------------------------------------------------------------------------


@pytest.fixture
def layer() -> TorchLayer:
    torch.manual_seed(0)
    return TorchLayer(torch.nn.Sequential(torch.nn.Linear(37, 64), torch.nn.GELU(), torch.nn.Linear(64, 29)), 37, 29)


def on_cpu(layer: TorchLayer, x: Any) -> Any:
    with torch.no_grad():
        return layer.module(torch.as_tensor(x).cpu()).numpy()


@pytest.mark.parametrize("kind", ["array", "pinned", "CUDA tensor", "misaligned CUDA tensor", "batches"])
def test_other_layer_streams_on_the_gpu(layer: TorchLayer, kind: str) -> None:
    x = random_rows(3000, 37)
    source = {
        "array": lambda: x,
        "pinned": lambda: torch.from_numpy(x).pin_memory(),
        "CUDA tensor": lambda: torch.nn.functional.pad(torch.from_numpy(x), (0, 3)).cuda()[:, :37],
        "misaligned CUDA tensor": lambda: torch.from_numpy(x).cuda(),
        "batches": lambda: iter([x[:7], x[7:1000], x[1000:]]),
    }[kind]()
    out = None if kind == "batches" else poisoned((3000, 29))
    result = run_pipelined(layer, source, out, devices="cuda:0", chunk_rows=256)
    np.testing.assert_allclose(result.out, on_cpu(layer, x), atol=1e-4)
    assert result.stats.runs_as == "ieee"


def test_other_layer_writes_a_cuda_tensor(layer: TorchLayer) -> None:
    x, out = random_rows(3000, 37), torch.full((3000, 29), torch.nan, device="cuda:0")
    run_pipelined(layer, x, out, devices="cuda:0", chunk_rows=256)
    np.testing.assert_allclose(out.cpu().numpy(), on_cpu(layer, x), atol=1e-4)
