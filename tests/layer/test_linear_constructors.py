"""The layer's constructors: weights, files, precisions, and what they refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.layers import TORCH_DTYPES, assert_close, fresh, new_layer
from safetensors.torch import save_file

from pipeline import DTypeError, FileFormatError, FusedLinear, InputError, OptionError, ShapeError


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda t: t.__name__)
def test_layer_takes_numpy_weights_of_every_type(dtype: Any) -> None:
    layer = new_layer(dtype=dtype)
    assert (layer.dtype.name, layer.in_features, layer.out_features) == (np.dtype(dtype).name, 8, 5)
    assert_close(layer(fresh(3, 7, 8, dtype=dtype)), layer.reference(fresh(3, 7, 8, dtype=dtype)), layer.dtype.name)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: np.repeat(np.repeat(a, 2, 0), 3, -1)[::2, ::3] if a.ndim == 2 else np.repeat(a, 2)[::2],
        lambda a: a[::-1].copy()[::-1],
        np.asfortranarray,
        lambda a: a.astype(">f4"),
        lambda a: np.broadcast_to(a, (1, *a.shape))[0],  # read-only
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a).t().contiguous().t() if a.ndim == 2 else torch.from_numpy(a),
        lambda a: torch.nn.Parameter(torch.from_numpy(a)),
    ],
    ids=["strided", "reversed", "fortran", "big-endian", "read-only", "torch", "torch-strided", "parameter"],
)
def test_layer_weights_of_any_layout_give_the_same_bits(change: Callable[[Any], Any]) -> None:
    weight, bias, x = fresh(1, 5, 8), fresh(2, 5), fresh(3, 70, 8)
    expected = FusedLinear(weight, bias, 2.0)(x)
    np.testing.assert_array_equal(FusedLinear(change(weight), change(bias), 2.0)(x), expected)


def test_layer_without_bias_adds_none() -> None:
    weight, x = fresh(1, 5, 8), fresh(3, 7, 8)
    layer = FusedLinear(weight, scaling_factor=2.0)
    np.testing.assert_array_equal(layer(x), FusedLinear(weight, np.zeros(5, np.float32), 2.0)(x))
    assert "bias=False" in repr(layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_layer_from_linear_equals_the_linear(dtype: str, bias: bool) -> None:
    linear = torch.nn.Linear(16, 10, bias=bias, dtype=TORCH_DTYPES[dtype])
    layer = FusedLinear.from_linear(linear, 2.0)
    x = torch.randn(9, 16, dtype=TORCH_DTYPES[dtype])
    assert_close(layer(x), FusedLinear(linear.weight, linear.bias, 2.0).reference(x), dtype)
    assert (layer.bias is not None) == bias


@pytest.mark.parametrize("prefix", ["", "gemm.", "model.layers.0."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_layer_from_file_reads_weight_and_bias(tmp_path: Path, dtype: str, bias: bool, prefix: str) -> None:
    weight, bias_tensor = torch.randn(5, 8).to(TORCH_DTYPES[dtype]), torch.randn(5).to(TORCH_DTYPES[dtype])
    tensors = {f"{prefix}weight": weight} | ({f"{prefix}bias": bias_tensor} if bias else {})
    save_file(tensors, tmp_path / "layer.safetensors")
    for path in (tmp_path / "layer.safetensors", str(tmp_path / "layer.safetensors")):
        layer = FusedLinear.from_file(path, 2.0)
        x = torch.randn(3, 8).to(TORCH_DTYPES[dtype])
        assert torch.equal(layer(x), FusedLinear(weight, bias_tensor if bias else None, 2.0)(x))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.weight", "b.weight"], r"a.weight, b.weight, expected exactly one .*found 2"),
        (["weight", "a.weight"], "found 2"),
        (["bias"], "found 0"),
        (["weights"], "found 0"),
        ([], r"\(none\)"),
    ],
)
def test_layer_from_file_refuses_none_or_several_candidates(tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "layer.safetensors")
    with pytest.raises(FileFormatError, match=message):
        FusedLinear.from_file(tmp_path / "layer.safetensors")


def test_layer_from_file_refuses_what_is_no_safetensors_file(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"weight": torch.zeros(4, 4)}, good)
    contents = {"empty": b"", "text": b"hello, these are no tensors", "cut": good.read_bytes()[:-3]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileFormatError, match=rf"{name} isn't a readable .safetensors file"):
            FusedLinear.from_file(tmp_path / name)
    with pytest.raises(FileFormatError, match="is a directory"):
        FusedLinear.from_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        FusedLinear.from_file(tmp_path / "missing.safetensors")


def test_layer_from_file_that_may_not_be_read_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors calls it missing."""
    path = tmp_path / "layer.safetensors"
    save_file({"weight": torch.zeros(4, 4)}, path)
    path.chmod(0)
    monkeypatch.chdir(tmp_path)  # whose parents are closed to others
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            tmp_path.chmod(0o755)
            os.seteuid(65534)
        with pytest.raises(PermissionError, match=path.name):
            FusedLinear.from_file(path.name)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("path", [None, 3, {"weight": 0}])
def test_layer_from_file_refuses_what_is_no_path(path: Any) -> None:
    with pytest.raises(InputError, match=r"path is a .*, expected the path of a \.safetensors file"):
        FusedLinear.from_file(path)


@pytest.mark.parametrize("linear", [np.zeros((5, 8)), torch.nn.Sequential(torch.nn.Linear(8, 5)), None])
def test_layer_from_linear_refuses_what_is_none(linear: Any) -> None:
    with pytest.raises(InputError, match=r"linear is a .*, expected a torch\.nn\.Linear"):
        FusedLinear.from_linear(linear)


def test_layer_from_file_refuses_other_shapes_and_types(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save_file({"weight": torch.zeros(4, 4, dtype=torch.int8)}, path)
    with pytest.raises(DTypeError, match=r"weight dtype is int8, expected one of float64"):
        FusedLinear.from_file(path)
    save_file({"weight": torch.zeros(4)}, path)
    with pytest.raises(ShapeError, match=r"weight has shape \(4,\)"):
        FusedLinear.from_file(path)
    save_file({"weight": torch.zeros(4, 4), "bias": torch.zeros(3)}, path)
    with pytest.raises(ShapeError, match=r"bias has shape \(3,\), expected \(4,\)"):
        FusedLinear.from_file(path)


@pytest.mark.parametrize(
    ("weight", "bias", "error", "message"),
    [
        (np.zeros(8, np.float32), None, ShapeError, r"weight has shape \(8,\), expected 2 dimensions"),
        (np.zeros((2, 3, 4), np.float32), None, ShapeError, r"weight has shape \(2, 3, 4\)"),
        (np.zeros((0, 8), np.float32), None, ShapeError, "at least 1 feature in and out"),
        (np.zeros((5, 0), np.float32), None, ShapeError, "at least 1 feature in and out"),
        (np.zeros((5, 8), np.float32), np.zeros(8, np.float32), ShapeError, r"bias has shape \(8,\), expected \(5,\)"),
        (np.zeros((5, 8), np.float32), np.zeros((7, 5), np.float32), ShapeError, "no residual tensor is passed"),
        (np.zeros((5, 8), np.float32), np.zeros(5), DTypeError, "bias is float64, the weight is float32"),
        (np.zeros((5, 8), int), None, DTypeError, "weight dtype is int64"),
        (np.zeros((5, 8), object), None, DTypeError, "weight dtype is object"),
        (np.zeros((5, 8), np.complex64), None, DTypeError, "weight dtype is complex64"),
        (np.zeros((5, 8), np.longdouble), None, DTypeError, "weight dtype is"),
        (np.ma.masked_array(np.zeros((5, 8), np.float32)), None, DTypeError, "weight is a masked array"),
        (torch.zeros(5, 8, dtype=torch.int32), None, DTypeError, "weight dtype is torch.int32"),
        (torch.zeros(5, 8).to_sparse(), None, DTypeError, "weight is a torch.sparse_coo tensor"),
        (None, None, InputError, "weight is a NoneType, expected a NumPy array"),
        ("layer.safetensors", None, InputError, "weight is a str, .*from_file reads files"),
        (torch.nn.Linear(8, 5), None, InputError, "weight is a Linear, .*from_linear takes a Linear"),
        ([[1.0], [1.0, 2.0]], None, ShapeError, "weight is a list of rows that differ in length"),
        (np.zeros((5, 8), np.float32), 2.0, InputError, "bias is a float, expected a NumPy array"),
    ],
)
def test_layer_refuses_bad_weights(weight: Any, bias: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedLinear(weight, bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "two", None, [1.0, 2.0], 1j, 10**400])
def test_layer_refuses_scaling_factors_that_are_not_finite_numbers(value: Any) -> None:
    with pytest.raises(OptionError, match="scaling_factor is"):
        FusedLinear(np.zeros((5, 8), np.float32), None, value)


@pytest.mark.parametrize("value", [2, np.float32(2), np.array(2.0), torch.tensor(2.0)], ids=lambda v: type(v).__name__)
def test_layer_takes_scaling_factors_of_any_number_type(value: Any) -> None:
    assert FusedLinear(np.zeros((5, 8), np.float32), None, value).scaling_factor == 2.0


@pytest.mark.parametrize(
    ("precision", "dtype", "message"),
    [
        ("fp16", np.float32, "precision is 'fp16', expected one of 'fp32', 'ieee', 'tf32'"),
        ("bfloat16", np.float32, "precision is 'bfloat16'"),
        (3, np.float32, "precision is 3"),
        ("tf32", np.float64, "precision='tf32' is for float32 data, the layer is float64"),
        ("ieee", np.float16, "precision='ieee' is for float32 data, the layer is float16"),
    ],
)
def test_layer_refuses_unknown_precisions(precision: Any, dtype: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FusedLinear(np.zeros((5, 8), dtype), precision=precision)


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        (None, np.float32, "fp32"),
        ("tf32", np.float32, "tf32"),
        ("ieee", np.float32, "ieee"),
        (None, np.float16, "float16"),
        ("float16", np.float16, "float16"),
        (None, np.float64, "float64"),
    ],
)
def test_layer_names_its_precision(precision: str | None, dtype: Any, expected: str) -> None:
    assert FusedLinear(np.zeros((5, 8), dtype), precision=precision).precision == expected
