"""Weights that lie in a file: what of it is shared, and that all a layer does works on them."""

from __future__ import annotations

import copy
import json
import mmap
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layers import TORCH_DTYPES
from safetensors.torch import save_file

from pipeline import DTypeError, FusedLinear, ShapeError, run_pipelined
from pipeline.dtypes import BFLOAT16


def save_layer(path: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = torch.randn(6, 8).to(dtype), torch.randn(6).to(dtype)
    save_file({"weight": weight, "bias": bias}, path)
    return weight, bias


def memory_of(array: Any) -> Any:
    """What an array is a view of in the end."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_weights_from_a_file_are_read_only_maps_of_it(tmp_path: Path, dtype: str) -> None:
    weight, bias = save_layer(tmp_path / "l.safetensors", TORCH_DTYPES[dtype])
    layer = FusedLinear.from_file(tmp_path / "l.safetensors", 2.0)
    in_memory = FusedLinear(weight, bias, 2.0)
    assert layer.bias is not None and in_memory.bias is not None
    for mapped, own in ((layer.weight, in_memory.weight), (layer.bias, in_memory.bias)):
        assert isinstance(memory_of(mapped), mmap.mmap) and not mapped.flags.writeable
        assert mapped.dtype == own.dtype and mapped.tobytes() == own.tobytes()
    x = torch.randn(9, 8).to(TORCH_DTYPES[dtype])
    np.testing.assert_array_equal(layer.reference(x), in_memory.reference(x))


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_weights_from_a_file_survive_pickle_and_deep_copies(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "l.safetensors"
    save_layer(path, TORCH_DTYPES[dtype])
    layer, x = FusedLinear.from_file(path, 2.0), torch.randn(9, 8).to(TORCH_DTYPES[dtype])
    expected, shallow = layer(x), copy.copy(layer)
    others = [pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)]
    for other in others:
        assert not isinstance(memory_of(other.weight), mmap.mmap)
    path.unlink()  # the maps keep what they map
    for other in (*others, shallow, layer):
        assert other.dtype is layer.dtype and torch.equal(other(x), expected)


def test_weights_from_a_file_are_rounded_for_the_wire(tmp_path: Path) -> None:
    weight, bias = save_layer(tmp_path / "l.safetensors")
    layer, x = FusedLinear.from_file(tmp_path / "l.safetensors", 2.0), torch.randn(70, 8).numpy()
    results = [
        run_pipelined(each, x, devices="cpu", wire_dtype="bf16").out for each in (layer, FusedLinear(weight, bias, 2.0))
    ]
    np.testing.assert_array_equal(*results)


def write_raw(path: Path, dtype: str, data: bytes, shape: tuple[int, ...], shift: int = 0) -> None:
    """A file whose header is not padded, so that tensors lie at any position; `shift` moves them on."""
    about = {"weight": {"dtype": dtype, "shape": shape, "data_offsets": (0, len(data))}}
    header = json.dumps(about).encode() + b" " * shift
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("shift", range(8))
def test_weights_at_any_position_in_the_file(tmp_path: Path, shift: int) -> None:
    """Where they don't lie at a multiple of their size they are copied: no array of their type can lie there."""
    weight = np.random.default_rng(shift).standard_normal((5, 8), np.float32)
    write_raw(tmp_path / "l.safetensors", "F32", weight.tobytes(), weight.shape, shift)
    layer = FusedLinear.from_file(tmp_path / "l.safetensors")
    np.testing.assert_array_equal(layer.weight, weight)
    assert layer.weight.ctypes.data % 4 == 0


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_weights_without_elements_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    write_raw(tmp_path / "l.safetensors", "F32", b"", shape)
    with pytest.raises(ShapeError, match="at least 1 feature in and out"):
        FusedLinear.from_file(tmp_path / "l.safetensors")


def test_weights_of_bfloat16_keep_their_bits(tmp_path: Path) -> None:
    carrier = np.arange(24, dtype=np.uint16).reshape(3, 8) + 0x3F80
    write_raw(tmp_path / "l.safetensors", "BF16", carrier.tobytes(), carrier.shape)
    layer = FusedLinear.from_file(tmp_path / "l.safetensors")
    assert layer.dtype is BFLOAT16
    np.testing.assert_array_equal(layer.weight, carrier)


@pytest.mark.parametrize(
    ("stored", "itemsize", "named"),
    [
        ("I64", 8, "int64"),
        ("U8", 1, "uint8"),
        ("BOOL", 1, "bool"),
        ("F8_E4M3", 1, "float8_e4m3fn"),
        ("C64", 8, "complex64"),
    ],
)
def test_weights_of_types_that_layers_lack_are_refused_by_name(
    tmp_path: Path, stored: str, itemsize: int, named: str
) -> None:
    write_raw(tmp_path / "l.safetensors", stored, bytes(8 * itemsize), (2, 4))
    with pytest.raises(DTypeError, match=rf"weight dtype is {named}, expected one of float64.*") as caught:
        FusedLinear.from_file(tmp_path / "l.safetensors")
    assert caught.value.__notes__ == [f"pipeline: in {tmp_path / 'l.safetensors'}"]


def test_weights_in_a_folder_that_is_read_only(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    weight, _ = save_layer(folder / "l.safetensors")
    (folder / "l.safetensors").chmod(0o444)
    folder.chmod(0o555)
    try:
        assert os.access(folder, os.R_OK)
        assert FusedLinear.from_file(folder / "l.safetensors").weight.tobytes() == weight.numpy().tobytes()
    finally:
        folder.chmod(0o755)
