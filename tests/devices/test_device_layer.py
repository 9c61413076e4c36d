"""What a layer hands to a device: a second kind of layer, streamed through devices that know nothing about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import poisoned, random_rows
from helpers.other_layer import TorchLayer, TorchOnDevice

from pipeline import DTypeError, FusedLinear, OptionError, Pipeline, run_pipelined
from pipeline.devices.base import HostPlace, host_rows
from pipeline.dtypes import DTYPES, FLOAT32
from pipeline.layer.base import Layer, Place
from pipeline.rows import HOST, DeviceRows


@pytest.fixture
def layer() -> TorchLayer:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(37, 64), torch.nn.GELU(), torch.nn.Linear(64, 29))
    return TorchLayer(module, 37, 29)


def expected(layer: TorchLayer, x: Any) -> Any:
    with torch.no_grad():
        return layer.module(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("out_dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_other_layer_streams_arrays(layer: TorchLayer, device: str, out_dtype: str) -> None:
    x, out = random_rows(333, 37), poisoned((333, 29), out_dtype)
    result = run_pipelined(layer, x, out, devices=device, chunk_rows=40, out_dtype=out_dtype)
    np.testing.assert_allclose(out, expected(layer, x), atol=1e-5 if out_dtype != "float16" else 2e-3)
    assert result.stats.runs_as == "ieee" and result.stats.rows == 333


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_other_layer_streams_files_and_batches(layer: TorchLayer, device: str, tmp_path: Path) -> None:
    x = random_rows(200, 37)
    np.save(tmp_path / "x.npy", x)
    with Pipeline(layer, devices=device, chunk_rows=40) as pipeline:
        pipeline.run(tmp_path / "x.npy", tmp_path / "y.npy")
        parts = list(pipeline.stream([x[:7], x[7:150], x[150:]]))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected(layer, x), atol=1e-5)
    np.testing.assert_allclose(np.concatenate(parts), expected(layer, x), atol=1e-5)


def test_other_layer_takes_its_own_element_type_only(layer: TorchLayer) -> None:
    with pytest.raises(DTypeError, match="float64"):
        run_pipelined(layer, random_rows(10, 37, "float64"), devices="cpu")
    with pytest.raises(OptionError, match="wire_dtype is bfloat16, but a TorchLayer takes rows of float32 only"):
        run_pipelined(layer, random_rows(10, 37), devices="cpu", wire_dtype="bf16")


def test_layer_refuses_a_place_that_it_does_not_know() -> None:
    class Elsewhere(HostPlace):
        kind = "elsewhere"

    with pytest.raises(OptionError, match="place of the kind 'elsewhere'"):
        FusedLinear(random_rows(5, 8)).on(Elsewhere(), FLOAT32, 10)


def test_device_keeps_memory_for_the_layer_in_each_slot(layer: TorchLayer) -> None:
    from pipeline.devices.names import open_device

    seen: set[int] = set()

    class WithScratch(TorchOnDevice):
        def slot_bytes(self, chunk_rows: int) -> int:
            return 4 * chunk_rows

        def queue(self, x: Any, y: Any, first_row: int, stream: int, scratch: int) -> None:
            DeviceRows(HOST, scratch, 1, x.rows, None).tensor(1, FLOAT32).fill_(1.0)
            seen.add(scratch)
            super().queue(x, y, first_row, stream, scratch)

    class Layer(TorchLayer):
        def on(self, place: Place, out_dtype: Any, chunk_rows: int) -> TorchOnDevice:
            return WithScratch(self, place, out_dtype)

    for name in ("cpu", "sim"):
        device = open_device(name)
        device.prepare(Layer(layer.module, 37, 29), FLOAT32, 16)
        device.allocate(16, 3)
        for slot in range(3):
            device.compute(slot, 16, 0, None, None)
        device.synchronize()
        device.close()
    assert len(seen) >= 3 and all(address % 256 == 0 for address in seen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_device_rows_are_a_tensor_on_the_same_memory(rows: int, dtype: str) -> None:
    wide = random_rows(2 * rows + 1, 12, dtype).view(DTYPES[dtype].carrier)
    every_other = DeviceRows(HOST, wide.ctypes.data, 24, rows, wide)
    tensor = every_other.tensor(5, DTYPES[dtype])
    assert tensor.shape == (rows, 5) and tensor.dtype == getattr(torch, dtype)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[wide.itemsize]
    assert tensor.view(bits).tolist() == wide[: 2 * rows : 2, :5].view(f"i{wide.itemsize}").tolist()
    tensor.fill_(3)
    assert (host_rows(wide[:rows]).part(0, min(rows, 1), wide.itemsize).tensor(5, DTYPES[dtype]) == 3).all()


def test_host_place_keeps_what_it_gives() -> None:
    place, array = HostPlace(), random_rows(3, 5)
    assert place.upload(array, "an array") == array.ctypes.data
    rows = place.upload_rows(array, "rows")
    assert (rows.rows, rows.stride, rows.ordinal) == (3, 5, HOST)
    assert place.read(rows.address, 20) == array[0].tobytes()
    assert place.torch_device == "cpu" and place.allocate(100, "memory") % 256 == 0


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_layer_that_gives_no_device_layer_is_named(device: str) -> None:
    class Forgetful(Layer):
        def on(self, place: Any, out_dtype: Any, chunk_rows: int) -> Any:
            return None

    with pytest.raises(OptionError, match=r"Forgetful.on returned a NoneType, expected a DeviceLayer"):
        run_pipelined(Forgetful(4, 4, "float32"), np.ones((9, 4), np.float32), devices=device)
