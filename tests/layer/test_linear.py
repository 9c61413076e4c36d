"""The layer on the host: in-memory batches, bits, outputs, bad input."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.layers import ROUNDING, TORCH_DTYPES, assert_close, carrier, fresh, new_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import DTypeError, FusedLinear, InputError, OptionError, ShapeError, SigmoidScaleResidual, run_pipelined
from pipeline.arrays import to_float64
from pipeline.layer.checks import check_gpu_out

# in-memory batches

LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda a: a,
    "fortran": np.asfortranarray,
    "every-other": lambda a: np.repeat(np.repeat(a, 2, 0), 2, 1)[::2, ::2],
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "offset": lambda a: np.hstack([a[:, :3], a])[:, 3:],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": lambda a: np.broadcast_to(a, (1, *a.shape))[0],
    "packed-field": lambda a: packed(a),
    "misaligned": lambda a: misaligned(a),
    "torch": lambda a: torch.from_numpy(a),
    "torch-strided": lambda a: torch.from_numpy(np.asfortranarray(a)),
    "requires-grad": lambda a: torch.from_numpy(a).requires_grad_(),
}


def packed(array: Any) -> Any:
    """The same numbers in a field of a packed record, 1 byte off their alignment."""
    records = np.zeros(array.shape, np.dtype([("flag", "i1"), ("value", array.dtype)]))
    records["value"] = array
    return records["value"]


def misaligned(array: Any) -> Any:
    """The same numbers, 1 byte off their alignment."""
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    memory[:] = array
    return memory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16], ids=lambda t: t.__name__)
def test_layer_batches_of_any_layout_give_the_same_bits(dtype: Any, layout: str) -> None:
    layer, x = new_layer(24, 37, dtype), fresh(3, 150, 24, dtype=dtype)
    y = layer(LAYOUTS[layout](x))
    assert isinstance(y, torch.Tensor) == ("torch" in layout or layout == "requires-grad")
    assert y.dtype == (TORCH_DTYPES[np.dtype(dtype).name] if isinstance(y, torch.Tensor) else dtype)
    np.testing.assert_array_equal(np.asarray(y), layer(x))
    assert_close(y, layer.reference(x), layer.dtype.name)


def test_layer_takes_bfloat16_from_torch_and_ml_dtypes() -> None:
    layer, x = new_layer(dtype=ml_dtypes.bfloat16), fresh(3, 7, 8, dtype=ml_dtypes.bfloat16)
    tensor = torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    y, y_torch = layer(x), layer(tensor)
    assert (y.dtype, y_torch.dtype) == (np.dtype(ml_dtypes.bfloat16), torch.bfloat16)
    np.testing.assert_array_equal(carrier(y), carrier(y_torch))
    np.testing.assert_array_equal(carrier(layer(x[::-1])[::-1]), carrier(y))
    np.testing.assert_array_equal(carrier(layer(tensor.t().contiguous().t())), carrier(y))
    assert_close(y, layer.reference(tensor), "bfloat16")


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_layer_of_no_rows_is_empty(dtype: str) -> None:
    layer = FusedLinear(torch.randn(5, 8).to(TORCH_DTYPES[dtype]))
    y = layer(torch.empty(0, 8, dtype=TORCH_DTYPES[dtype]))
    assert y.shape == (0, 5) and y.dtype == TORCH_DTYPES[dtype]
    assert layer.reference(torch.empty(0, 8, dtype=TORCH_DTYPES[dtype])).shape == (0, 5)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_layer_is_as_accurate_as_torch(dtype: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(300, 200, dtype=TORCH_DTYPES[dtype])
    x = torch.randn(500, 300, dtype=TORCH_DTYPES[dtype])
    layer = FusedLinear.from_linear(linear, 2.0)
    expected = layer.reference(x)
    with torch.no_grad():
        z = linear(x)
    theirs = np.linalg.norm(to_float64(2.0 * torch.sigmoid(z) + z) - expected)
    limit = 1e-14 * np.linalg.norm(expected) if dtype == "float64" else 1.05 * theirs
    assert np.linalg.norm(to_float64(layer(x)) - expected) <= limit


def test_layer_ignores_autocast_and_the_default_device() -> None:
    layer, x = new_layer(), fresh(3, 70, 8)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        np.testing.assert_array_equal(new_layer()(x), expected)
        assert layer(torch.from_numpy(x)).device.type == "cpu"


def test_layer_takes_lists_of_its_own_type() -> None:
    layer = new_layer(dtype=np.float64)
    rows = fresh(3, 2, 8, dtype=np.float64)
    np.testing.assert_array_equal(layer(rows.tolist()), layer(rows))


@pytest.mark.parametrize("scaling_factor", [2.0, -3.5, 0.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_layer_puts_nan_and_infinity_where_they_belong(dtype: str, scaling_factor: float) -> None:
    """One feature in and out: the reference rounded to the type is the exact answer up to its last bits."""
    info = torch.finfo(TORCH_DTYPES[dtype])
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), info.max, -info.max, info.tiny, -info.tiny]
    values += [info.tiny / 4, -info.tiny / 4, 1.0, -1.0, 80.0, -80.0, 90.0, -90.0, 104.0, -104.0, 700.0, -750.0]
    x = torch.tensor(values, dtype=torch.float64).to(TORCH_DTYPES[dtype])[:, None]
    for weight in (1.0, -1.0, 2.0):
        layer = FusedLinear(torch.tensor([[weight]], dtype=TORCH_DTYPES[dtype]), None, scaling_factor)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = torch.from_numpy(layer.reference(x)).to(TORCH_DTYPES[dtype])
        torch.testing.assert_close(layer(x), expected, equal_nan=True, rtol=4 * info.eps, atol=float(info.tiny))


def test_layer_scaling_factor_beyond_its_type_gives_infinity() -> None:
    layer = FusedLinear(fresh(1, 4, 8), None, 1e39)
    assert np.isposinf(layer(fresh(2, 3, 8))).all()


def test_layer_nan_stays_in_its_row() -> None:
    layer, x = new_layer(40, 70), fresh(3, 200, 40)
    expected = layer(x)
    x[17, 3], x[60, 0], x[61, 5] = np.nan, np.inf, -np.inf
    y = layer(x)
    assert np.isnan(y[17]).all() and not np.isfinite(y[60:62]).any()
    others = np.delete(np.arange(200), [17, 60, 61])
    np.testing.assert_array_equal(y[others], expected[others])


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros(8, np.float32), ShapeError, r"x has shape \(8,\), expected 2 dimensions \(rows, 8\)"),
        (np.zeros((2, 3, 8), np.float32), ShapeError, r"x has shape \(2, 3, 8\).*reshape\(-1, 8\)"),
        (np.zeros((3, 9), np.float32), ShapeError, "x has 9 features a row .*weight takes 8"),
        (np.zeros((3, 0), np.float32), ShapeError, "x has 0 features a row"),
        (np.zeros((3, 8)), DTypeError, r"x is float64, the layer's weights are float32.*astype\('float32'\)"),
        (np.zeros((3, 8), ml_dtypes.bfloat16), DTypeError, "x is bfloat16, .* are float32.*torch.float32"),
        (np.zeros((3, 8), int), DTypeError, "x dtype is int64, expected one of"),
        (np.zeros((3, 8), object), DTypeError, "x dtype is object"),
        (np.zeros((3, 8), "U4"), DTypeError, "x dtype is <U4"),
        (np.zeros((3, 8), bool), DTypeError, "x dtype is bool"),
        (np.zeros((3, 8), [("a", "f4")]), DTypeError, "x dtype is"),
        (np.ma.masked_array(np.zeros((3, 8), np.float32), mask=True), DTypeError, r"x is a masked array.*\.filled\(\)"),
        (torch.zeros(3, 8, dtype=torch.int64), DTypeError, "x dtype is torch.int64"),
        (torch.zeros(3, 8).to_sparse(), DTypeError, r"x is a torch.sparse_coo tensor.*to_dense"),
        (torch.zeros(3, 8, device="meta"), DTypeError, "x is on meta"),
        (torch.zeros(3, 8, dtype=torch.complex64).conj().imag, DTypeError, "x is a view that torch negates"),
        (np.float32(3), ShapeError, r"x has shape \(\)"),
        (3.0, InputError, "x is a float, expected a NumPy array or a torch tensor"),
        ("x.npy", InputError, "x is a str, .*run_pipelined takes files"),
    ],
)
def test_layer_refuses_bad_batches(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        new_layer()(x)


# out=

OUTPUTS: dict[str, Callable[[], Any]] = {
    "contiguous": lambda: np.full((70, 5), np.nan, np.float32),
    "strided": lambda: np.full((140, 15), np.nan, np.float32)[::2, ::3],
    "reversed": lambda: np.full((70, 5), np.nan, np.float32)[::-1, ::-1],
    "fortran": lambda: np.full((70, 5), np.nan, np.float32, order="F"),
    "big-endian": lambda: np.full((70, 5), np.nan, ">f4"),
    "packed-field": lambda: packed(np.full((70, 5), np.nan, np.float32)),
    "torch": lambda: torch.full((70, 5), torch.nan),
    "torch-strided": lambda: torch.full((5, 70), torch.nan).t(),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_layer_out_of_any_layout_gets_the_same_bits(kind: str) -> None:
    layer, x, out = new_layer(), fresh(3, 70, 8), OUTPUTS[kind]()
    assert layer(x, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), layer(x))


@pytest.mark.parametrize("out_dtype", TORCH_DTYPES)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_layer_out_of_another_type_is_rounded_once(dtype: str, out_dtype: str) -> None:
    """Rounding what comes out in the computing type gives the same bits as asking for the type at once."""
    compute = torch.float64 if dtype == "float64" else torch.float32
    layer = FusedLinear(torch.randn(6, 12).to(TORCH_DTYPES[dtype]), None, 2.0)
    x = torch.randn(80, 12).to(TORCH_DTYPES[dtype])
    wide = layer(x, out=torch.empty(80, 6, dtype=compute))
    out = layer(x, out=torch.full((80, 6), torch.nan, dtype=TORCH_DTYPES[out_dtype]))
    assert torch.equal(out, wide.to(TORCH_DTYPES[out_dtype]))


def test_layer_out_of_ml_dtypes_bfloat16() -> None:
    layer, x = new_layer(), fresh(3, 70, 8)
    out = layer(x, out=np.zeros((70, 5), ml_dtypes.bfloat16))
    expected = layer(torch.from_numpy(x), out=torch.empty(70, 5, dtype=torch.bfloat16))
    np.testing.assert_array_equal(carrier(out), carrier(expected))


def test_layer_out_touches_nothing_around_it() -> None:
    layer, x = new_layer(), fresh(3, 20, 8)
    memory = np.full((24, 9), 7.0, np.float32)
    layer(x, out=memory[2:22, 2:7])
    memory[2:22, 2:7] = 7.0
    assert (memory == 7.0).all()


def test_layer_out_of_no_rows() -> None:
    out = np.empty((0, 5), np.float32)
    assert new_layer()(np.empty((0, 8), np.float32), out=out) is out


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.zeros((20, 6), np.float32), ShapeError, r"out has shape \(20, 6\), expected \(20, 5\)"),
        (np.zeros((19, 5), np.float32), ShapeError, r"out has shape \(19, 5\), expected \(20, 5\)"),
        (np.zeros(100, np.float32), ShapeError, r"out has shape \(100,\)"),
        (np.zeros((20, 5), int), DTypeError, "out dtype is int64"),
        (np.zeros((20, 5), object), DTypeError, "out dtype is object"),
        (np.broadcast_to(np.float32(0), (20, 5)), OptionError, "out is read-only"),
        (torch.zeros(1, 5).expand(20, 5), OptionError, "out has strides .* overlap each other"),
        ([[0.0] * 5] * 20, OptionError, "out is a list, expected a NumPy array or a torch CPU tensor"),
        ("y.npy", OptionError, "out is a str"),
        (torch.zeros(20, 5, device="meta"), DTypeError, "out is on meta"),
    ],
)
def test_layer_refuses_bad_outputs_and_writes_nothing(out: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        new_layer()(fresh(3, 20, 8), out=out)
    if isinstance(out, np.ndarray):
        assert not out.any()


@pytest.mark.parametrize("shift", [0, 1, 50, 159])
def test_layer_refuses_out_that_overlaps_the_batch(shift: int) -> None:
    layer = new_layer(8, 8)
    memory = fresh(3, 400)
    x, out = memory[:160].reshape(20, 8), memory[shift : shift + 160].reshape(20, 8)
    for pair in ((x, out), (torch.from_numpy(x), torch.from_numpy(out)), (torch.from_numpy(x), out)):
        with pytest.raises(OptionError, match="out overlaps x"):
            layer(pair[0], out=pair[1])
    np.testing.assert_array_equal(memory, fresh(3, 400))


def test_layer_refuses_bad_gpu_outputs() -> None:
    """The checks that need no GPU to run."""
    with pytest.raises(OptionError, match="out is on cpu, x is on meta"):
        check_gpu_out(torch.zeros(3, 8, device="meta"), torch.zeros(3, 5), 5)
    with pytest.raises(OptionError, match="out is on ndarray"):
        check_gpu_out(torch.zeros(3, 8, device="meta"), np.zeros((3, 5)), 5)


def test_layer_works_again_after_an_error() -> None:
    layer, x = new_layer(), fresh(3, 7, 8)
    expected = layer(x)
    with pytest.raises(InputError):
        layer(x[:, :7])
    with pytest.raises(InputError):
        layer(x, out=np.empty((7, 6), np.float32))
    np.testing.assert_array_equal(layer(x), expected)


# properties


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 150),
    in_features=st.integers(1, 80),
    out_features=st.integers(1, 80),
    dtype=st.sampled_from(list(TORCH_DTYPES)),
    scaling_factor=st.floats(-10, 10),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_layer_equals_the_reference(
    rows: int, in_features: int, out_features: int, dtype: str, scaling_factor: float, has_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(TORCH_DTYPES[dtype])

    weight = draw(out_features, in_features) / in_features**0.5
    layer = FusedLinear(weight, draw(out_features) if has_bias else None, scaling_factor)
    x = draw(rows, in_features)
    expected = layer.reference(x)
    largest = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(to_float64(layer(x)), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * largest)


def test_layer_can_be_pickled_and_copied() -> None:
    rng = np.random.default_rng()
    layer = FusedLinear(rng.standard_normal((5, 7), np.float32), rng.standard_normal(5, np.float32), 2.0)
    x = rng.standard_normal((3, 7), np.float32)
    y = layer(x)  # fills the caches that aren't pickled
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert np.array_equal(twin(x), y)


def test_layer_takes_another_epilogue_between_calls() -> None:
    layer, x = new_layer(), fresh(3, 7, 8)
    before = layer(x)
    layer.scaling_factor = 3.0
    assert layer.scaling_factor == 3.0 and not np.array_equal(layer(x), before)
    assert_close(layer(x), layer.reference(x), "float32")
    np.testing.assert_array_equal(run_pipelined(layer, x, devices="cpu").out, layer(x))
    layer.epilogue = SigmoidScaleResidual(2.0)
    np.testing.assert_array_equal(layer(x), before)
    with pytest.raises(OptionError, match="epilogue is a float"):
        layer.epilogue = 2.0  # type: ignore[assignment]
    with pytest.raises(OptionError, match="scaling_factor is nan"):
        layer.scaling_factor = math.nan
    np.testing.assert_array_equal(layer(x), before)
