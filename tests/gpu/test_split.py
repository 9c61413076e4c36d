"""fp32 accuracy from pairs of fp16: errors beside the vendor's fp32 product, rows that need exact fp32, bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
from benches.errors import BIASED, DATA, errors, problem, product

from pipeline import FusedLinear, Pipeline, fused_gemm_sigmoid_scale_add
from pipeline.devices.cuda import CudaDevice, count_gpus
from pipeline.dtypes import FLOAT32
from pipeline.epilogues import SigmoidScaleResidual
from pipeline.kernels.choose import Problem, Variant, candidates
from pipeline.kernels.fused_layer import Weights, prepare, prepare_split, split_weights
from pipeline.kernels.fused_linear import Matrix
from pipeline.kernels.launch import Launcher

torch = pytest.importorskip("torch")
if not count_gpus():
    pytest.skip("no NVIDIA GPU is visible", allow_module_level=True)
if Launcher.for_device(0).arch != "sm_90a":
    pytest.skip("the split kernel runs on Hopper GPUs", allow_module_level=True)


def normal(*shape: int) -> Any:
    return torch.randn(*shape, device="cuda")


def weights(out_features: int, in_features: int) -> Any:
    bound = 1 / math.sqrt(in_features)
    return torch.empty(out_features, in_features, device="cuda").uniform_(-bound, bound)


def bits(v: Any) -> Any:
    return v.contiguous().view(torch.int32)


@pytest.mark.parametrize("in_features", [8, 100, 1024, 8192, 65536])
@pytest.mark.parametrize("kind", DATA)
def test_split_is_as_accurate_as_the_vendors_fp32(kind: str, in_features: int) -> None:
    torch.manual_seed(in_features)
    torch.set_float32_matmul_precision("highest")
    x, w = problem(kind, 512, 768, in_features)
    ours, vendors = errors(product(x, w, "fp32"), x, w), errors(x @ w.T, x, w)
    allowed = 2.0 if kind in BIASED else 1.0
    for name, mine, theirs in zip(("Frobenius", "worst element"), ours, vendors, strict=True):
        # Two roundings to fp32, of the sum and of z, are allowed in any case; of denormals what their grid takes.
        least = max(2.0**-23, 1.001 * theirs)
        assert mine <= max(allowed * theirs, least), f"{name}: {mine:.2e}, cuBLAS {theirs:.2e}"


@pytest.mark.parametrize("in_features", [1024, 2048, 8192, 65536])
def test_split_error_does_not_grow_with_in_features(in_features: int) -> None:
    """Sums are folded every 512 of k, so that the total's size doesn't matter (csrc/gpu/operands.cuh)."""
    torch.manual_seed(in_features)
    x, w = problem("normal", 256, 256, in_features)
    frobenius, _ = errors(product(x, w, "fp32"), x, w)
    assert frobenius <= 1.7e-7


@pytest.mark.parametrize("in_features", [300, 5000])
def test_split_sums_of_small_integers_are_exact(in_features: int) -> None:
    """As in fp32: nothing needs rounding, so nothing is."""
    torch.manual_seed(in_features)
    x, w = (torch.randint(-20, 21, (rows, in_features), device="cuda").float() for rows in (200, 300))
    assert torch.equal(product(x, w, "fp32").double(), x.double() @ w.double().T)


@pytest.mark.parametrize("out_features", [1, 131, 512])
@pytest.mark.parametrize("rows", [1, 63, 130, 1000])
def test_split_layer_on_ragged_sizes(rows: int, out_features: int) -> None:
    torch.manual_seed(rows)
    for in_features in (1, 127, 128, 129, 200):
        x, w, b = normal(rows, in_features), weights(out_features, in_features), normal(out_features)
        z = x.double() @ w.double().T + b.double()
        y = FusedLinear(w, b, 2.0)(x)
        torch.testing.assert_close(y.double(), 2 * torch.sigmoid(z) + z, rtol=2e-6, atol=2e-6)


def test_split_bits_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(1)
    x, layer = normal(1100, 520), FusedLinear(weights(600, 520), normal(600), 2.0)
    x[::7] *= torch.exp(9 * normal(158, 520))  # some of these rows need exact fp32
    full = layer(x)
    for rows in (1, 2, 63, 64, 65, 128, 500, 1024):
        start = 7 * rows % (1100 - rows)
        assert torch.equal(bits(layer(x[start : start + rows])), bits(full[start : start + rows])), rows


def test_split_computes_exact_rows_in_exact_fp32() -> None:
    """Rows whose elements lie far below one of them, that aren't finite, are subnormal or have few elements other than
    0 get the ieee kernel's bits; rows of zeros don't need it."""
    torch.manual_seed(2)
    x, w = normal(300, 1000), weights(400, 1000)  # at most 1024 in_features: ieee sums as the exact rows do
    ordinary = torch.ones(300, dtype=torch.bool)
    x[5], x[70, 3], x[150] = x[5] * 1e-42, 1e12, torch.exp(9 * normal(1000))
    x[200, 9], x[201, 9], x[202, 9] = math.inf, -math.inf, math.nan
    x[250], x[251], x[252, 128:], x[253, 127:] = 0, -0.0, 0, 0
    ordinary[[5, 70, 150, 200, 201, 202, 253]] = False
    y, exact = product(x, w, "fp32"), product(x, w, "ieee")
    special = ~ordinary.cuda()
    assert torch.equal(bits(y[special]), bits(exact[special]))
    assert not torch.equal(bits(y[~special]), bits(exact[~special])), "ordinary rows come from the tensor cores"


def test_split_with_exact_rows_of_weights_is_exact_everywhere() -> None:
    torch.manual_seed(3)
    x, w = normal(150, 640), weights(200, 640)
    w[7] *= 2.0**70
    assert torch.equal(bits(product(x, w, "fp32")), bits(product(x, w, "ieee")))


@pytest.mark.parametrize("in_features", [160, 161])
@pytest.mark.parametrize("bad_weights", [False, True])
def test_split_infinities_and_nans_are_where_float64_has_them(in_features: int, bad_weights: bool) -> None:
    torch.manual_seed(4)
    x, w = normal(90, in_features), weights(150, in_features)
    x[3, 0], x[17, 5], x[40, 5], x[41, 1], x[41, 2] = math.inf, -math.inf, math.nan, math.inf, -math.inf
    w[11, :] = 0
    if bad_weights:
        w[9, 3], w[77, 6] = math.inf, math.nan
    else:
        x[50], x[51] = 3e38, -3e38  # partial sums beyond fp32's range; with bad weights exact fp32 would overflow there
    z, expected = product(x, w, "fp32"), (x.double() @ w.double().T).float()
    assert torch.equal(z.isnan(), expected.isnan())
    assert torch.equal(z.isinf(), expected.isinf()) and torch.equal(z.sign().nan_to_num(), expected.sign().nan_to_num())


def test_split_runs_everywhere_with_the_same_bits() -> None:
    """Layer, operator and executor, from the host and from the device; the report counts the exact rows."""
    torch.manual_seed(5)
    x, w, b = normal(3000, 256), weights(320, 256), normal(320)
    x[10::100] = torch.exp(12 * normal(30, 256))
    layer = FusedLinear(w, b, 2.0)
    y = layer(x)
    assert torch.equal(bits(fused_gemm_sigmoid_scale_add(x, w, b, 2.0)), bits(y))
    out = torch.empty_like(y)
    assert torch.equal(bits(layer(x, out=out)), bits(y)) and torch.equal(bits(layer(x, out=out)), bits(y))
    with Pipeline(layer, devices="cuda:0", chunk_rows=700) as pipe:
        for source in (x.cpu().numpy(), x):
            result = pipe.run(source)
            assert result.stats.runs_as == "fp32" and result.stats.exact_rows == 30
            assert "30 rows in exact fp32" in str(result.stats)
            assert torch.equal(bits(torch.as_tensor(result.out).cuda()), bits(y))


def product_by(variant: Variant, x: Any, w: Any) -> Any:
    """z = x w^T by this variant of a split kernel."""
    launcher, stream = Launcher.for_device(0), torch.cuda.current_stream().cuda_stream
    (rows, in_features), out_features = x.shape, w.shape[0]
    fp32 = Problem(FLOAT32, FLOAT32, "fp32", in_features, out_features)
    split = split_weights(launcher, fp32)
    assert split is not None
    parts = torch.empty(split.n_bytes, dtype=torch.uint8, device="cuda")
    split = split._replace(address=parts.data_ptr())
    prepare_split(launcher, matrix(w), split).queue(stream)
    layer = Weights(matrix(w), 0, SigmoidScaleResidual(0.0).pack({}), split)
    scratch = torch.empty(layer.scratch_bytes(rows), dtype=torch.uint8, device="cuda")
    y = torch.full((rows, out_features), torch.nan, device="cuda")
    launch = prepare(launcher, fp32, layer, matrix(x), matrix(y), scratch.data_ptr(), variant=variant)
    assert launch is not None
    launch.queue(stream)
    torch.cuda.synchronize()
    return y


def matrix(tensor: Any) -> Matrix:
    return Matrix(tensor.data_ptr(), *tensor.shape, tensor.stride(0))


@pytest.mark.parametrize("in_features", [128, 1000, 4100, 8200])
@pytest.mark.parametrize("rows", [1, 130, 515])
def test_split_tiles_give_the_same_bits(rows: int, in_features: int) -> None:
    """Every tile and way to store."""
    torch.manual_seed(rows)
    x, w = normal(rows, in_features), weights(520, in_features)
    fp32 = Problem(FLOAT32, FLOAT32, "fp32", in_features, 520)
    variants = candidates("sm_90a", fp32, 16) + candidates("sm_90a", fp32, 16, 4)
    first, *others = [product_by(variant, x, w) for variant in variants]
    assert len(others) == 3 and not first.isnan().any()
    for variant, y in zip(variants[1:], others, strict=True):
        assert torch.equal(bits(y), bits(first)), variant.description


@pytest.mark.parametrize("kind", ["normal", "mean 10", "log-normal rows"])
@pytest.mark.parametrize("rows", [1, 130, 515])
def test_split_through_mma_sync_is_as_accurate(kind: str, rows: int) -> None:
    """The kernel of older GPUs runs on this one, too; its tiles give the same bits."""
    torch.manual_seed(rows)
    for out_features, in_features in ((300, 128), (513, 1000), (256, 4100)):
        x, w = problem(kind, rows, out_features, in_features)
        fp32 = Problem(FLOAT32, FLOAT32, "fp32", in_features, out_features)
        results = [product_by(variant, x, w) for variant in candidates("sm_80", fp32, 16)]
        assert len(results) == 2 and torch.equal(bits(results[0]), bits(results[1]))
        frobenius, worst = errors(results[0], x, w)
        hopper_frobenius, hopper_worst = errors(product(x, w, "fp32"), x, w)
        assert frobenius <= 1.3 * hopper_frobenius and worst <= 2 * hopper_worst


def test_device_names_the_split_kernel() -> None:
    device = CudaDevice(0)
    layer = FusedLinear(weights(64, 128).cpu().numpy())
    device.prepare(layer, layer.dtype, 128)
    assert device.runs_as == "fp32" and "fused_linear_split_sm90" in device.kernel
    device.close()
