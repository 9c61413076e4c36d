"""What people add from outside: an epilogue, a source, a sink, a layer, an element type, in at most 25 lines each.

What stands between the imports and the first test is all that is added, through public names only; docs/extending.md
explains it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.data import assert_same_bits, random_rows
from helpers.registries import registries_restored

import pipeline

MOST_LINES = 25


class GatedShift(pipeline.Epilogue):
    """y = scale * z * sigmoid(z) + shift: a scalar and a vector."""

    scale: float
    shift: pipeline.ByFeature
    cuda = "return parameters.scale * z / (1.0f + expf(-z)) + parameters.shift[column];"

    def numpy(self, z: Any) -> Any:
        return self.scale * z / (1 + np.exp(-z)) + self.shift

    def torch(self, z: Any) -> Any:
        return self.scale * z * z.sigmoid() + self.shift


class CsvSource(pipeline.Source):
    """Rows of a .csv file."""

    kind = ".csv file"

    def __init__(self, path: Any, request: pipeline.SourceRequest) -> None:
        self._values = np.loadtxt(path, np.float32, delimiter=",", ndmin=2)
        self.rows, self.features = self._values.shape
        self.dtype = pipeline.parse_dtype("float32")

    def read(self, first: int, piece: Any) -> None:
        piece[...] = self._values[first : first + len(piece)]


class CsvSink(pipeline.Sink):
    """A .csv file of the result, written when it is complete."""

    def __init__(self, path: Any, request: pipeline.SinkRequest) -> None:
        self._path, self._values = Path(path), np.empty((request.rows or 0, request.out_features), np.float32)

    def write(self, first: int, piece: Any) -> None:
        self._values[first : first + len(piece)] = piece

    def finish(self, rows: int) -> Path:
        np.savetxt(self._path, self._values, fmt="%.9g", delimiter=",")
        return self._path


class Rms(pipeline.Layer):
    """y = x / sqrt(mean(x^2)) of each row, by torch where the rows are."""

    def on(self, place: Any, out_dtype: pipeline.DType, chunk_rows: int) -> pipeline.DeviceLayer:
        return RmsThere(self, place, out_dtype)


class RmsThere(pipeline.DeviceLayer):
    kernel, runs_as = "torch", "ieee"

    def __init__(self, layer: Rms, place: Any, out_dtype: pipeline.DType) -> None:
        self._layer, self._place, self._out_dtype = layer, place, out_dtype

    def queue(self, x: Any, y: Any, first_row: int, stream: int, scratch: int) -> None:
        with self._place.torch_stream(stream):
            rows = x.tensor(self._layer.in_features, self._layer.dtype)
            length = rows.square().mean(1, keepdim=True).sqrt()
            y.tensor(self._layer.out_features, self._out_dtype).copy_(rows / length)


def add_fp8() -> pipeline.DType:
    """8-bit floating point with 4 bits of exponent, as ml_dtypes and torch have it."""
    fp8 = ml_dtypes.float8_e4m3fn

    def widen(carrier: Any) -> Any:
        return carrier.view(fp8).astype(np.float32)

    def narrow(values: Any) -> Any:
        return values.astype(fp8).view(np.uint8)

    return pipeline.register_dtype(
        pipeline.DType("float8_e4m3fn", np.dtype("uint8"), "fp8", widen=widen, narrow=narrow)
    )


ADDED: dict[str, tuple[Callable[..., Any], ...]] = {
    "epilogue": (GatedShift,),
    "source": (CsvSource,),
    "sink": (CsvSink,),
    "layer": (Rms, RmsThere),
    "element type": (add_fp8,),
}


@pytest.mark.parametrize("kind", ADDED)
def test_extending_takes_few_lines_and_public_names(kind: str) -> None:
    source = "\n".join(inspect.getsource(each) for each in ADDED[kind])
    assert len([line for line in source.splitlines() if line.strip()]) <= MOST_LINES
    used = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute) and is_package(node)}
    assert used and used <= set(pipeline.__all__)


def is_package(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "pipeline"


def test_extending_needs_no_module_of_the_package() -> None:
    imports = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imports if (node.module or "").startswith("pipeline")] == []


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with registries_restored():
        pipeline.register_source(".csv", CsvSource)
        pipeline.register_sink(".csv", CsvSink)
        add_fp8()
        yield


def a_layer(**options: Any) -> pipeline.FusedLinear:
    weight = random_rows(19, 37) / np.sqrt(37, dtype=np.float32)
    return pipeline.FusedLinear(weight, random_rows(1, 19)[0], **options)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_extending_by_an_epilogue(device: str) -> None:
    layer, x = a_layer(epilogue=GatedShift(0.5, random_rows(1, 19, seed=1)[0])), random_rows(500, 37)
    z = a_layer(scaling_factor=0.0).reference(x)
    expected = 0.5 * z / (1 + np.exp(-z)) + random_rows(1, 19, seed=1)[0]
    np.testing.assert_allclose(layer.reference(x), expected, rtol=1e-12)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert_same_bits(pipeline.run_pipelined(layer, x, devices=device, chunk_rows=64).out, layer(x))


@pytest.mark.parametrize("wire_dtype", [None, "bf16"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_extending_by_a_source_and_a_sink(device: str, wire_dtype: str | None, tmp_path: Path) -> None:
    layer, x = a_layer(), random_rows(300, 37)
    np.savetxt(tmp_path / "x.csv", x, fmt="%.9g", delimiter=",")
    options: dict[str, Any] = {"devices": device, "chunk_rows": 32, "wire_dtype": wire_dtype}
    result = pipeline.run_pipelined(layer, tmp_path / "x.csv", tmp_path / "y.csv", **options)
    assert result.out == tmp_path / "y.csv" and result.stats.source == ".csv file"
    written = np.loadtxt(result.out, np.float32, delimiter=",")
    assert_same_bits(written, pipeline.run_pipelined(layer, x, **options).out)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_extending_by_a_layer(device: str) -> None:
    x = random_rows(500, 37)
    result = pipeline.run_pipelined(Rms(37, 37, "float32"), x, devices=device, chunk_rows=64)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True))
    np.testing.assert_allclose(result.out, expected, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_extending_by_an_element_type(device: str) -> None:
    fp8 = ml_dtypes.float8_e4m3fn
    weight, x = (random_rows(19, 37) / 6).astype(fp8), random_rows(500, 37).astype(fp8)
    layer = pipeline.FusedLinear(weight, None, 2.0)
    result = pipeline.run_pipelined(layer, x, devices=device, chunk_rows=64)
    expected = layer.reference(x)
    assert result.out.dtype == fp8 and result.stats.runs_as == "float8_e4m3fn"
    np.testing.assert_allclose(result.out.astype(np.float64), expected, rtol=2**-4, atol=2**-9)
    wide = pipeline.run_pipelined(layer, x, devices=device, out_dtype="fp8").out
    assert_same_bits(wide, result.out)
