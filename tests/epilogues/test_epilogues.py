"""Epilogues: those that ship, a new one from outside of the package, and what isn't one."""

from __future__ import annotations

import copy
import ctypes
import pickle
from typing import Any

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.data import assert_same_bits, random_layer, random_rows
from helpers.epilogues import ScaledShift
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from pipeline import FusedLinear, OptionError, Pipeline, ShapeError
from pipeline.epilogues import SigmoidScaleResidual
from pipeline.kernels.choose import ARCHITECTURES, all_variants
from pipeline.kernels.compile import compile_variant


class Silu(pipeline.Epilogue):
    """Without parameters; on the CPU torch's vector and scalar code differ in its last bit."""

    cuda = "return z / (1.0f + expf(-z));"

    def numpy(self, z: Any) -> Any:
        return z / (1 + np.exp(-z))

    def torch(self, z: Any) -> Any:
        return z / (1 + torch.exp(-z))


def shifted(in_features: int, out_features: int, dtype: Any = np.float32, **options: Any) -> FusedLinear:
    rng = np.random.default_rng(in_features)
    weight, bias = rng.standard_normal((out_features, in_features)), rng.standard_normal(out_features)
    shift = rng.standard_normal(out_features)
    return FusedLinear(weight.astype(dtype), bias.astype(dtype), epilogue=ScaledShift(2.0, shift), **options)


# -- the one that ships ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(width=32)),
    st.floats(-1e6, 1e6),
)
def test_sigmoid_scale_residual_in_torch_equals_float64_for_every_float32(z: Any, scaling_factor: float) -> None:
    epilogue = SigmoidScaleResidual(scaling_factor)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = epilogue.numpy(z.astype(np.float64)).astype(np.float32)
    y = np.full(z.shape, np.nan, np.float32)
    epilogue.write(torch.from_numpy(z), torch.from_numpy(y), torch.empty(z.size))
    smallest = np.finfo(np.float32).smallest_subnormal  # two roundings of a subnormal may differ by one step
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * abs(scaling_factor) + smallest)
    np.testing.assert_array_equal(epilogue.torch(torch.from_numpy(z)).numpy(), y)


@pytest.mark.parametrize("epilogue", [SigmoidScaleResidual(-1.7), Silu(), ScaledShift(3.0, np.ones(5))])
def test_epilogue_derivative_is_that_of_its_function(epilogue: Any) -> None:
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    there = epilogue.on_columns(slice(0, 5), torch.float64)
    (expected,) = torch.autograd.grad(there.torch(z).sum(), z)
    torch.testing.assert_close(there.derivative(z.detach()), expected)
    torch.testing.assert_close(there.derivative(z), expected)
    if not isinstance(epilogue, ScaledShift):  # whose slope is constant
        (second,) = torch.autograd.grad(there.derivative(z).sum(), z)
        assert second.abs().min() > 0, "the derivative can be differentiated"


def test_layer_scaling_factor_is_short_for_its_epilogue() -> None:
    weight, x = random_rows(5, 8), random_rows(9, 8)
    short, long = FusedLinear(weight, None, 2.0), FusedLinear(weight, epilogue=SigmoidScaleResidual(2.0))
    assert_same_bits(short(x), long(x))
    assert short.scaling_factor == long.scaling_factor == 2.0
    assert repr(short) == repr(long) == "FusedLinear(8 -> 5, float32, bias=False, scaling_factor=2.0, precision='fp32')"


# -- a new one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda t: t.__name__)
@pytest.mark.parametrize("sizes", [(7, 5), (64, 300), (8, 1)], ids=str)
def test_new_epilogue_computes_what_its_reference_says(sizes: tuple[int, int], dtype: Any) -> None:
    layer, x = shifted(*sizes, dtype), random_rows(150, sizes[0]).astype(dtype)
    y, expected = layer(x).astype(np.float64), layer.reference(x)
    tolerance = {"float64": 1e-12, "float32": 1e-4, "float16": 0.2, "bfloat16": 1.5}[np.dtype(dtype).name]
    assert y.shape == expected.shape == (150, sizes[1])
    np.testing.assert_allclose(y, expected, atol=tolerance, rtol=2**-7)


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("wire_dtype", [None, "bf16"])
def test_new_epilogue_streams(device: str, wire_dtype: str | None) -> None:
    layer, x = shifted(24, 70), random_rows(500, 24)
    with Pipeline(layer, devices=device, chunk_rows=64, wire_dtype=wire_dtype) as run:
        out = run.run(x).out
    if wire_dtype is None:
        assert_same_bits(out, layer(x))
    np.testing.assert_allclose(out, layer.reference(x), atol=1e-4 if wire_dtype is None else 0.5)


@pytest.mark.parametrize("threads", [1, 2])
def test_new_epilogue_row_bits_do_not_depend_on_neighbours_or_threads(threads: int) -> None:
    weight, x = random_rows(700, 33), random_rows(700, 33)
    layer = FusedLinear(weight, epilogue=Silu())
    expected, before = layer(x), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weights, out = layer.host_weights(), torch.full((700, 700), torch.nan)
        for first, last in ((0, 1), (1, 65), (65, 200), (200, 700)):
            weights.forward(torch.from_numpy(x[first:last]), out[first:last], first)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(out.numpy(), expected)


def test_layer_with_a_new_epilogue_can_be_pickled_and_copied() -> None:
    layer, x = shifted(8, 5), random_rows(3, 8)
    y = layer(x)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert_same_bits(twin(x), y)
        assert twin.epilogue.code() is layer.epilogue.code()
    assert "epilogue=ScaledShift(scale=2.0" in repr(layer)


@pytest.mark.parametrize("kind", [ScaledShift, Silu])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_new_epilogue_compiles_into_every_kernel(
    arch: str, kind: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tile of each kernel: exact and fast, stores of both kinds, exact rows."""
    monkeypatch.setenv("PIPELINE_CACHE_DIR", str(tmp_path))
    kernels: dict[str, Any] = {}
    for variant in all_variants(arch, epilogue=kind.code()):
        if variant.epilogue is not None:
            texts = ("direct" in variant.description, "exact rows" in variant.description)
            kernels[f"{variant.kernel} {texts}"] = variant  # the last tile of each is small
    assert len(kernels) >= 2
    for variant in kernels.values():
        report = compile_variant(variant, arch).report
        assert report.spill_bytes == 0, variant.description


def test_epilogues_of_one_class_share_their_kernels() -> None:
    one, other = ScaledShift(1.0, np.ones(3)), ScaledShift(2.0, np.ones(4))
    assert one.code() is other.code() is not Silu.code()
    blob: Any = other.pack({"shift": 4096})
    assert (blob.scale, blob.shift.values, blob.shift.last) == (2.0, 4096, 3)
    assert len({blob, other.pack({"shift": 4096})}) == 2, "launches are remembered by them"
    assert ctypes.sizeof(blob) == ctypes.sizeof(other.code().parameters) == 24


def test_kernels_of_two_epilogues_are_different_variants() -> None:
    """What the cache of compiled kernels goes by, on disk and in the process."""
    shipped, own = (next(all_variants("sm_90a", epilogue=code)) for code in (SigmoidScaleResidual.code(), Silu.code()))
    assert shipped.description == own.description and shipped != own and shipped.source != own.source


def test_epilogue_parameters_by_feature_are_taken_from_anywhere() -> None:
    values = np.array([1.5, -2.0, 3.25])
    for given_values in (values, values.astype(np.float32), torch.tensor(values).bfloat16(), values.tolist()):
        shift = ScaledShift(1, given_values).shift
        assert shift.dtype == np.float32 and shift.tolist() == values.tolist()
        assert not shift.flags.writeable
    source = values.astype(np.float32)
    epilogue = ScaledShift(1.0, source)
    source[:] = 0
    assert epilogue.shift.tolist() == values.tolist(), "a copy"


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ScaledShift("two", np.ones(5)), OptionError, "scale is 'two', expected one finite number"),
        (lambda: ScaledShift(np.nan, np.ones(5)), OptionError, "scale is nan, expected a finite number"),
        (lambda: ScaledShift(1.0, np.ones((5, 1))), ShapeError, r"shift has shape \(5, 1\)"),
        (lambda: ScaledShift(1.0, np.ones(5, int)), pipeline.DTypeError, "shift dtype is int64"),
        (lambda: random_layer(8, 5, epilogue=ScaledShift(1.0, np.ones(4)), scaling_factor=1.0), ShapeError, r"\(5,\)"),
        (lambda: random_layer(8, 5, epilogue=Silu()), OptionError, "scaling_factor is 2.0 beside an epilogue .Silu"),
        (lambda: FusedLinear(np.ones((5, 8)), epilogue=Silu), OptionError, "epilogue is the class Silu"),
        (lambda: FusedLinear(np.ones((5, 8)), epilogue=2.0), OptionError, "epilogue is a float"),
    ],
)
def test_epilogue_bad_parameters_are_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_epilogue_of_an_unknown_kind_of_parameter_is_refused() -> None:
    class Residual(pipeline.Epilogue):
        residual: pipeline.Matrix  # type: ignore[name-defined]
        cuda = "return z;"

        def numpy(self, z: Any) -> Any:
            return z

        torch = numpy

    with pytest.raises(
        OptionError, match=r"Residual\.residual is of the kind Matrix.*expected one of float, ByFeature"
    ):
        Residual(np.ones((3, 3)))


def test_epilogue_without_cuda_source_is_for_the_cpu() -> None:
    class Twice(pipeline.Epilogue):
        def numpy(self, z: Any) -> Any:
            return 2 * z

        torch = numpy

    layer, x = FusedLinear(random_rows(5, 8), epilogue=Twice()), random_rows(3, 8)
    np.testing.assert_allclose(layer(x), layer.reference(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(OptionError, match="Twice has no CUDA source"):
        Twice.code()


def test_layer_of_another_epilogue_has_no_scaling_factor() -> None:
    with pytest.raises(AttributeError, match="epilogue ScaledShift has no scaling_factor"):
        _ = shifted(8, 5).scaling_factor
