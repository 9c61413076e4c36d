"""The kernels against the float64 layer on fresh random inputs: values, bits, guards. Needs a GPU and torch."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest

from pipeline.dtypes import parse_dtype
from pipeline.epilogues import SigmoidScaleResidual
from pipeline.errors import DTypeError
from pipeline.kernels.choose import Problem, Variant, candidates
from pipeline.kernels.fused_layer import Weights, describe, prepare
from pipeline.kernels.fused_linear import Matrix
from pipeline.kernels.launch import Launcher

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE_SHAPES = [(1024, 2048, 2048), (257, 8192, 515), (2000, 129, 3001), (64, 8192, 8192), (4096, 1024, 1024)]
MIN_ELEMENTS = 8192  # below this many outputs a ratio of errors is noise


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    return Launcher.for_device(0)


def strided(rows: int, columns: int, dtype: Any, padding: int = 0, offset: int = 0) -> Any:
    """An uninitialised (rows, columns) view with `padding` elements after each row, `offset` before the first."""
    stride = columns + padding
    return torch.empty(offset + rows * stride, dtype=dtype, device="cuda").as_strided(
        (rows, columns), (stride, 1), offset
    )


def normal(rows: int, columns: int, dtype: Any, padding: int = 0, offset: int = 0) -> Any:
    view = strided(rows, columns, dtype, padding, offset)
    return view.copy_(torch.randn(rows, columns, device="cuda"))


def weights(out_features: int, in_features: int, dtype: Any, padding: int = 0, offset: int = 0) -> tuple[Any, Any]:
    """Weight and bias as torch.nn.Linear draws them."""
    bound = 1 / math.sqrt(in_features)
    w = strided(out_features, in_features, dtype, padding, offset)
    w.copy_(torch.empty(out_features, in_features, device="cuda").uniform_(-bound, bound))
    return w, torch.empty(out_features, device="cuda").uniform_(-bound, bound).to(dtype)


def problem_of(x: Any, w: Any, precision: str, out_dtype: Any) -> Problem:
    return Problem(parse_dtype(x.dtype), parse_dtype(out_dtype), precision, w.shape[1], w.shape[0])


def matrix(tensor: Any) -> Matrix:
    return Matrix(tensor.data_ptr(), *tensor.shape, tensor.stride(0))


def run(
    launcher: Launcher,
    x: Any,
    w: Any,
    bias: Any,
    *,
    precision: str,
    scaling_factor: float = 2.0,
    out_dtype: Any = None,
    padding: int = 0,
    offset: int = 0,
    variant: Variant | None = None,
) -> Any:
    """The layer's output, computed into poisoned memory; fails where a byte around the output was written."""
    rows, out_features = x.shape[0], w.shape[0]
    out_dtype = out_dtype or x.dtype
    guard, stride = 256, out_features + padding
    memory = torch.full((2 * guard + offset + rows * stride,), math.nan, dtype=out_dtype, device="cuda")
    y = memory.as_strided((rows, out_features), (stride, 1), guard + offset)
    parameters = SigmoidScaleResidual(scaling_factor).pack({})
    layer_weights = Weights(matrix(w), 0 if bias is None else bias.data_ptr(), parameters)
    problem = problem_of(x, w, precision, out_dtype)
    launch = prepare(launcher, problem, layer_weights, matrix(x), matrix(y), variant=variant)
    if launch is not None:
        launch.queue(torch.cuda.current_stream().cuda_stream)
    result = y.clone()
    y.fill_(math.nan)
    assert memory.isnan().all(), "the kernel wrote outside its output"
    return result


def layer(x: Any, w: Any, bias: Any, scaling_factor: float = 2.0) -> Any:
    """The layer as people write it in torch, in the inputs' type."""
    z = torch.nn.functional.linear(x, w, bias)
    return scaling_factor * torch.sigmoid(z) + z


def reference(x: Any, w: Any, bias: Any, scaling_factor: float = 2.0) -> Any:
    return layer(x.double(), w.double(), None if bias is None else bias.double(), scaling_factor)


def to_tf32(v: Any) -> Any:
    """fp32 rounded to tf32, to nearest with ties away from zero."""
    return ((v.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def squared(v: Any) -> float:
    return float((v.double() ** 2).sum())


def bits(v: Any) -> Any:
    return v.contiguous().view(torch.int32 if v.dtype == torch.float32 else torch.int16)


def random_case(seed: int) -> tuple[int, int, int, dict[str, int]]:
    """rows, in_features, out_features and how the arrays lie in memory."""
    choose = random.Random(seed)

    def size() -> int:
        return choose.choice([choose.randint(1, 40), choose.randint(1, 700), choose.randint(1, 88) * 8])

    layout = {
        "x_padding": choose.choice([0, 0, 1, 2, 8]),
        "w_padding": choose.choice([0, 0, 1, 4, 16]),
        "x_offset": choose.choice([0, 0, 1, 2, 8]),
        "w_offset": choose.choice([0, 0, 1, 4, 16]),
        "y_padding": choose.choice([0, 0, 1, 4]),
        "y_offset": choose.choice([0, 0, 1, 4]),
    }
    return size(), size(), size(), layout


def check_accuracy(launcher: Launcher, precision: str, shape: tuple[int, int, int], layout: dict[str, int]) -> None:
    """The relative Frobenius error stays within 1.05 of torch's own layer in the same type.

    NOTE: torch answers some tf32 requests (few rows or columns) with exact fp32 kernels. What tf32 costs at least,
    operands rounded and everything else exact, is therefore the limit where it is larger.
    """
    rows, in_features, out_features = shape
    dtype = PRECISIONS[precision]
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    w, bias = weights(out_features, in_features, dtype, layout["w_padding"], layout["w_offset"])
    draws = math.ceil(MIN_ELEMENTS / (rows * out_features))
    ours = eager = least = total = 0.0
    for _ in range(min(draws, 64)):
        batch = math.ceil(draws / 64)
        xs = [normal(rows, in_features, dtype, layout["x_padding"], layout["x_offset"]) for _ in range(batch)]
        outputs = [
            run(launcher, x, w, bias, precision=precision, padding=layout["y_padding"], offset=layout["y_offset"])
            for x in xs
        ]
        expected = reference(torch.cat(xs), w, bias)
        ours += squared(torch.cat(outputs) - expected)
        eager += squared(torch.cat([layer(x, w, bias) for x in xs]) - expected)
        total += squared(expected)
        if precision == "tf32":
            least += squared(reference(to_tf32(torch.cat(xs)), to_tf32(w), bias) - expected)
    limit = 1.05 * math.sqrt(max(eager, least) / total)
    error = math.sqrt(ours / total)
    assert error <= limit, f"{precision} {shape} {layout}: error {error:.3e}, limit {limit:.3e}"


@pytest.mark.parametrize("seed", range(300))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_are_as_accurate_as_torch(launcher: Launcher, precision: str, seed: int) -> None:
    torch.manual_seed(seed)
    rows, in_features, out_features, layout = random_case(seed)
    check_accuracy(launcher, precision, (rows, in_features, out_features), layout)


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_are_as_accurate_as_torch_at_size(
    launcher: Launcher, precision: str, shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(sum(shape))
    check_accuracy(launcher, precision, shape, random_case(0)[3] | dict.fromkeys(("x_offset", "w_offset"), 0))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_without_bias_and_with_other_scales(launcher: Launcher, precision: str) -> None:
    torch.manual_seed(1)
    dtype = PRECISIONS[precision]
    x, (w, bias) = normal(70, 90, dtype), weights(130, 90, dtype)
    tolerance = {"ieee": 1e-6, "tf32": 2e-3, "bfloat16": 1e-2, "float16": 2e-3}[precision]
    for b in (None, bias):
        for scaling_factor in (0.0, -1.5, 1000.0):
            y = run(launcher, x, w, b, precision=precision, scaling_factor=scaling_factor)
            expected = reference(x, w, b, scaling_factor)
            assert math.sqrt(squared(y - expected) / squared(expected)) < tolerance


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out_features", [301, 304], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_output_type_is_one_rounding(
    launcher: Launcher, precision: str, out_features: int, out_dtype: Any
) -> None:
    torch.manual_seed(2)
    dtype = PRECISIONS[precision]
    x, (w, bias) = normal(150, 200, dtype), weights(out_features, 200, dtype)
    full = run(launcher, x, w, bias, precision=precision, out_dtype=torch.float32)
    y = run(launcher, x, w, bias, precision=precision, out_dtype=out_dtype)
    assert torch.equal(bits(y), bits(full.to(out_dtype)))


@pytest.mark.parametrize("in_features", [512, 520, 333])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_bits_of_a_row_do_not_depend_on_the_launch(
    launcher: Launcher, precision: str, in_features: int
) -> None:
    torch.manual_seed(3)
    dtype = PRECISIONS[precision]
    x, (w, bias) = normal(1100, in_features, dtype), weights(4096, in_features, dtype)
    full = run(launcher, x, w, bias, precision=precision)
    counts = [*range(1, 20), 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300, 1024]
    for rows in counts:
        y = run(launcher, x[:rows], w, bias, precision=precision)
        assert torch.equal(bits(y), bits(full[:rows])), f"{rows} rows differ from the same rows among 1100"
        start = 7 * rows % (1100 - rows)
        y = run(launcher, x[start : start + rows], w, bias, precision=precision)
        assert torch.equal(bits(y), bits(full[start : start + rows])), f"{rows} rows from {start} differ"


@pytest.mark.parametrize("rows", [1, 64, 65, 333])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_variants_agree_to_the_bit(launcher: Launcher, precision: str, rows: int) -> None:
    """Every tile, load width and way to store of each kernel, on data that all of them can read."""
    torch.manual_seed(4)
    dtype = PRECISIONS[precision]
    x, (w, bias) = normal(rows, 1000, dtype), weights(776, 1000, dtype)
    problem = problem_of(x, w, precision, dtype)
    widths = (16, 4) if dtype == torch.float32 else (16, 4, 2)
    found = [variant for width in widths for variant in candidates(launcher.arch, problem, width)]
    found += [variant for variant in candidates(launcher.arch, problem, 16, 4) if variant not in found]
    outputs: dict[str, tuple[str, Any]] = {}
    for variant in found:
        y = run(launcher, x, w, bias, precision=precision, variant=variant)
        assert not y.isnan().any(), variant.description
        name, first = outputs.setdefault(variant.kernel, (variant.description, y))
        assert torch.equal(bits(y), bits(first)), f"{variant.description} differs from {name}"


@pytest.mark.parametrize("out_features", [8, 520, 523, 1040])
@pytest.mark.parametrize("in_features", [8, 64, 72, 4104])
@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_kernels_every_hopper_tile_is_right_on_ragged_sizes(
    launcher: Launcher, precision: str, in_features: int, out_features: int
) -> None:
    """Rows and columns that end inside a tile, a cluster or a slice; k shorter than the ring; several waves."""
    dtype = PRECISIONS[precision]
    for rows in (1, 63, 200, 2500):
        x, (w, bias) = normal(rows, in_features, dtype), weights(out_features, in_features, dtype)
        expected = reference(x, w, bias) if precision != "tf32" else reference(to_tf32(x), to_tf32(w), bias)
        problem = problem_of(x, w, precision, dtype)
        for variant in candidates(launcher.arch, problem, 16, 16 if out_features % 8 == 0 else 2):
            y = run(launcher, x, w, bias, precision=precision, variant=variant)
            error = math.sqrt(squared(y - expected) / squared(expected))
            limit = {"tf32": 3e-5, "bfloat16": 4e-3, "float16": 5e-4}[precision]
            assert error < limit, f"{variant.description}, {rows} rows: {error:.2e}"


@pytest.mark.parametrize("in_features", [64, 65, 100])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_infinities_and_nans_come_out_as_ieee_has_them(
    launcher: Launcher, precision: str, in_features: int
) -> None:
    torch.manual_seed(5)
    dtype = PRECISIONS[precision]
    x, (w, bias) = normal(90, in_features, dtype), weights(150, in_features, dtype)
    x[3, 0], x[17, in_features - 1], x[40, 5] = math.inf, -math.inf, math.nan
    x[41, 1], x[41, 2] = math.inf, math.inf
    w[9, 3], w[77, in_features - 1], w[78, 0] = math.inf, math.nan, -math.inf
    w[11, :] = 0
    bias[20], bias[21], bias[22] = math.inf, -math.inf, math.nan
    if dtype == torch.float32:  # the NaN that GPUs make; adding to its bits would turn it into -0
        x.view(torch.int32)[55, 7] = 0x7FFFFFFF
        x.view(torch.int32)[56, 7] = -1
    y, expected = run(launcher, x, w, bias, precision=precision), reference(x, w, bias)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y == math.inf, expected == math.inf)
    assert torch.equal(y == -math.inf, expected == -math.inf)
    finite = expected.isfinite()
    assert torch.allclose(y[finite].double(), expected[finite], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_huge_z_saturates_the_sigmoid(launcher: Launcher, precision: str) -> None:
    dtype = PRECISIONS[precision]
    z = torch.tensor([0.0, 1.0, -1.0, 50.0, -50.0, 88.0, -88.0, 200.0, -200.0, 3e4, -3e4], device="cuda").to(dtype)
    x, w = z[:, None].contiguous(), torch.ones(1, 1, dtype=dtype, device="cuda")
    y = run(launcher, x, w, None, precision=precision)
    assert torch.allclose(y.double(), reference(x, w, None), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)


def test_kernels_empty_launches_do_nothing(launcher: Launcher) -> None:
    x, (w, bias) = normal(4, 8, torch.float32), weights(5, 8, torch.float32)
    assert run(launcher, x[:0], w, bias, precision="ieee").shape == (0, 5)
    assert run(launcher, x, w[:0], bias[:0], precision="ieee").shape == (4, 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_without_input_features_give_the_epilogue_of_the_bias(launcher: Launcher, precision: str) -> None:
    dtype = PRECISIONS[precision]
    bias = torch.randn(33, device="cuda").to(dtype)
    x, w = torch.empty(3, 0, dtype=dtype, device="cuda"), torch.empty(33, 0, dtype=dtype, device="cuda")
    y = run(launcher, x, w, bias, precision=precision)
    assert torch.allclose(y.double(), reference(x, w, bias), rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6)


def test_describe_names_the_kernel(launcher: Launcher) -> None:
    problem = Problem(parse_dtype("bfloat16"), parse_dtype("bfloat16"), "bfloat16", 8192, 8192)
    assert re.match(r"fused_linear_sm\d+<bfloat16, 128x", describe(launcher, problem, 1024))
    assert "2-byte loads" in describe(launcher, replace(problem, in_features=8191), 1024)


def test_describe_refuses_float64(launcher: Launcher) -> None:
    float64 = parse_dtype("float64")
    with pytest.raises(DTypeError, match="devices='cpu'"):
        describe(launcher, Problem(float64, float64, "float64", 8, 8), 4)
