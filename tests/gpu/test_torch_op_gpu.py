"""The torch operator, the module and `FusedLinear` on CUDA tensors. Needs a GPU and torch."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from pipeline import (  # noqa: E402  (the operator registers itself with torch, which may be missing)
    DTypeError,
    FusedLinear,
    GemmSigmoidScalingResidualAdd,
    InputError,
    OptionError,
    ShapeError,
    fused_gemm_sigmoid_scale_add,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(4096, 1024, 1024), (257, 515, 300), (1000, 700, 33), (8192, 7, 10)]


@pytest.fixture(autouse=True)
def strict_float32() -> Any:
    """torch's own products in IEEE float32, and no compiled program left from another test."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch._dynamo.reset()


def operator() -> Any:
    return torch.ops.pipeline.fused_gemm_sigmoid_scale_add.default


def tensors(rows: int, in_features: int, out_features: int, dtype: Any, requires_grad: bool = False) -> Any:
    """Fresh random A, B, C; B and C as torch.nn.Linear draws them."""
    bound = 1 / math.sqrt(in_features)
    A = torch.randn(rows, in_features, device="cuda").to(dtype)
    B = torch.empty(out_features, in_features, device="cuda").uniform_(-bound, bound).to(dtype)
    C = torch.empty(out_features, device="cuda").uniform_(-bound, bound).to(dtype)
    return A.requires_grad_(requires_grad), B.requires_grad_(requires_grad), C.requires_grad_(requires_grad)


def eager(A: Any, B: Any, C: Any, scaling_factor: float = 2.0) -> Any:
    """The layer as people write it in torch, in the inputs' type."""
    z = torch.nn.functional.linear(A, B, C)
    return scaling_factor * torch.sigmoid(z) + z


def wide(*args: Any) -> list[Any]:
    return [tensor.detach().double() for tensor in args]


def option(precision: str) -> str | None:
    return precision if PRECISIONS[precision] == torch.float32 else None


def to_tf32(v: Any) -> Any:
    """fp32 rounded to tf32, to nearest with ties away from zero."""
    return ((v.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def error_limit(A: Any, B: Any, C: Any, precision: str, expected: Any) -> float:
    """1.05 of the error of torch's eager layer at the same precision.

    NOTE: torch answers some tf32 requests (few rows or columns) with exact fp32 kernels. What tf32 costs at least,
    operands rounded and everything else exact, is therefore the limit where it is larger.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    errors = [(eager(A, B, C).double() - expected).norm()]
    torch.backends.cuda.matmul.allow_tf32 = False
    if precision == "tf32":
        errors.append((eager(*wide(to_tf32(A), to_tf32(B), C)) - expected).norm())
    return 1.05 * max(float(error) for error in errors)


class ReferenceModel(torch.nn.Module):
    """Gemm_Sigmoid_Scaling_ResidualAdd as it is usually written."""

    def __init__(self, input_size: int, hidden_size: int, scaling_factor: float) -> None:
        super().__init__()
        self.gemm = torch.nn.Linear(input_size, hidden_size)
        self.scaling_factor = scaling_factor

    def forward(self, x: Any) -> Any:
        x = self.gemm(x)
        original_x = x
        x = torch.sigmoid(x)
        x = x * self.scaling_factor
        return x + original_x


# torch's own checks


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_op_passes_opcheck(dtype: Any, requires_grad: bool) -> None:
    torch.library.opcheck(operator(), (*tensors(70, 96, 50, dtype, requires_grad), 2.0))


@pytest.mark.parametrize("precision", ["fp32", "ieee", "tf32"])
def test_torch_op_passes_opcheck_at_every_precision(precision: str) -> None:
    torch.library.opcheck(operator(), (*tensors(33, 40, 20, torch.float32, requires_grad=True), -0.5, precision))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_op_passes_opcheck_with_strides_and_no_rows(dtype: Any) -> None:
    A, B, C = tensors(66, 80, 40, dtype)
    torch.library.opcheck(operator(), (A[::2, :40], B[::2, ::2], C[::2], 2.0))
    torch.library.opcheck(operator(), (A[:0], B, C, 2.0))


# values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_torch_op_is_as_accurate_as_torch(precision: str, shape: tuple[int, int, int]) -> None:
    args = tensors(*shape, PRECISIONS[precision])
    y = fused_gemm_sigmoid_scale_add(*args, 2.0, precision=option(precision))
    expected = eager(*wide(*args))
    assert y.dtype == PRECISIONS[precision] and y.is_contiguous()
    assert float((y.double() - expected).norm()) <= error_limit(*args, precision, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_torch_op_takes_strided_operands(precision: str) -> None:
    A, B, C = tensors(300, 260, 200, PRECISIONS[precision])
    cases = {
        "rows of a wider array": (A[::3, 5:135], B[:, :130], C),
        "every other column": (A[:, ::2], B[:, ::2], C),
        "every other output": (A, B[::2], C[::2]),
        "transposed": (A.t().contiguous().t(), B.t().contiguous().t(), C),
        "one row for all": (A[:1].expand(90, 260), B, C),
        "overlapping rows": (A.as_strided((90, 260), (8, 1)), B, C),
        "misaligned rows": (A[:, 1:257], B[:, 1:257], C),
        "misaligned weight": (A, torch.cat([C[:1], B.flatten()])[1:].view_as(B), C),
        "one row": (A[7:8], B, C),
        "one output": (A, B[3:4], C[3:4]),
        "one feature": (A[:, 3:4], B[:, 3:4], C),
    }
    for name, case in cases.items():
        y = fused_gemm_sigmoid_scale_add(*case, 2.0, precision=option(precision))
        copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in case]
        assert torch.equal(y, fused_gemm_sigmoid_scale_add(*copies, 2.0, precision=option(precision))), name
        torch.testing.assert_close(y.double(), eager(*wide(*case)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_op_of_no_rows_is_empty(dtype: Any) -> None:
    y = fused_gemm_sigmoid_scale_add(*tensors(0, 12, 5, dtype), 2.0)
    assert y.shape == (0, 5) and y.is_cuda


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torch_op_under_autocast_casts_like_linear(dtype: Any) -> None:
    A, B, C = tensors(64, 32, 16, torch.float32, requires_grad=True)
    with torch.autocast("cuda", dtype):
        y = fused_gemm_sigmoid_scale_add(A.to(dtype), B, C, 2.0, precision="tf32")
        assert torch.nn.functional.linear(A.to(dtype), B, C).dtype == y.dtype == dtype
    assert torch.equal(y, fused_gemm_sigmoid_scale_add(A.to(dtype), B.to(dtype), C.to(dtype), 2.0))
    y.sum().backward()
    assert B.grad.dtype == torch.float32


# gradients


@pytest.mark.parametrize("precision", PRECISIONS)
def test_torch_op_gradients_are_as_accurate_as_torch(precision: str) -> None:
    torch.manual_seed(0)
    args = tensors(512, 300, 260, PRECISIONS[precision], requires_grad=True)
    grad = torch.randn(512, 260, device="cuda").to(PRECISIONS[precision])
    right = [tensor.requires_grad_() for tensor in wide(*args)]
    expected = torch.autograd.grad(eager(*right), right, grad.double())
    ours = torch.autograd.grad(fused_gemm_sigmoid_scale_add(*args, 2.0, precision=option(precision)), args, grad)
    theirs = torch.autograd.grad(eager(*args), args, grad)
    # The bias has few elements: the ratio of two errors there is largely chance.
    for our, their, exact, ratio in zip(ours, theirs, expected, (1.05, 1.05, 2.0), strict=True):
        assert our.dtype == PRECISIONS[precision]
        assert float((our.double() - exact).norm()) <= ratio * float((their.double() - exact).norm())


def test_torch_op_differentiates_twice() -> None:
    args = tensors(20, 12, 8, torch.float32, requires_grad=True)
    right = [tensor.requires_grad_() for tensor in wide(*args)]
    second = []
    for function, inputs in ((fused_gemm_sigmoid_scale_add, args), (eager, right)):
        first = torch.autograd.grad(function(*inputs, 2.0).sum(), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for our, exact in zip(*second, strict=True):
        torch.testing.assert_close(our.double(), exact, rtol=1e-4, atol=1e-4)


# torch.compile


@pytest.mark.parametrize("precision", PRECISIONS)
def test_torch_op_compiles_with_dynamic_rows_and_backward(precision: str) -> None:
    def function(A: Any, B: Any, C: Any) -> Any:
        return fused_gemm_sigmoid_scale_add(A, B, C, 2.0, precision=option(precision))

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    # The compiler may leave out roundings of 16-bit intermediate results.
    tolerance = 1e-4 if PRECISIONS[precision] == torch.float32 else 2e-2
    for rows in (64, 257, 1):
        args = tensors(rows, 48, 40, PRECISIONS[precision], requires_grad=True)
        grad = torch.randn(rows, 40, device="cuda").to(PRECISIONS[precision])
        y, y_eager = compiled(*args), function(*args)
        assert torch.equal(y, y_eager)
        ours, expected = torch.autograd.grad(y, args, grad), torch.autograd.grad(y_eager, args, grad)
        for our, right in zip(ours, expected, strict=True):
            assert float((our - right).double().norm()) <= tolerance * float(right.double().norm())


def test_torch_op_compiles_beside_other_operators() -> None:
    """Strided inputs that other nodes make, and an output that others read, in one graph with the operator."""

    def function(x: Any, B: Any, C: Any) -> Any:
        return fused_gemm_sigmoid_scale_add(x.relu()[:, ::2], B.t().exp().t(), C * 3, 2.0).sum(1)

    x, B, C = tensors(100, 64, 30, torch.float32)
    args = (x, B[:, :32], C)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(*args), function(*args), rtol=1e-5, atol=1e-4)


def test_torch_op_replays_in_a_cuda_graph() -> None:
    A, B, C = tensors(256, 128, 64, torch.bfloat16)
    fused_gemm_sigmoid_scale_add(A, B, C, 2.0)  # compiles and loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused_gemm_sigmoid_scale_add(A, B, C, 2.0)
    A.copy_(torch.randn_like(A))
    y.fill_(math.nan)
    graph.replay()
    assert torch.equal(y, fused_gemm_sigmoid_scale_add(A, B, C, 2.0))


# the module


@pytest.mark.parametrize("precision", PRECISIONS)
def test_module_is_as_accurate_as_the_reference_model(precision: str) -> None:
    dtype = PRECISIONS[precision]
    theirs = ReferenceModel(1024, 1024, 2.0)
    ours = GemmSigmoidScalingResidualAdd(1024, 1024, 2.0, precision=option(precision))
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.to("cuda", dtype), ours.to("cuda", dtype)
    x = torch.randn(4096, 1024, device="cuda").to(dtype)
    with torch.no_grad():
        y, expected = ours(x), copy.deepcopy(theirs).double()(x.double())
        limit = error_limit(x, theirs.gemm.weight, theirs.gemm.bias, precision, expected)
    assert float((y.double() - expected).norm()) <= limit


def test_module_state_dict_round_trips_between_devices(tmp_path: Any) -> None:
    ours = GemmSigmoidScalingResidualAdd(40, 30, 2.0).cuda()
    assert list(ours.state_dict()) == ["gemm.weight", "gemm.bias"]
    torch.save(ours.state_dict(), tmp_path / "model.pt")
    theirs = ReferenceModel(40, 30, 2.0)
    theirs.load_state_dict(torch.load(tmp_path / "model.pt", map_location="cpu"))
    x = torch.randn(20, 40)
    torch.testing.assert_close(ours(x.cuda()).cpu(), theirs(x))


def test_module_compiles_and_trains() -> None:
    torch.manual_seed(0)
    teacher, student = ReferenceModel(64, 32, 2.0).cuda(), GemmSigmoidScalingResidualAdd(64, 32, 2.0).cuda()
    compiled = torch.compile(student, fullgraph=True)
    x = torch.randn(512, 64, device="cuda")
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (compiled(x) - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 100


# FusedLinear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_equals_the_operator(dtype: Any) -> None:
    A, B, C = tensors(300, 128, 70, dtype)
    layer = FusedLinear(B, C, 2.0)
    expected = fused_gemm_sigmoid_scale_add(A, B, C, 2.0)
    assert torch.equal(layer(A), expected)
    assert torch.equal(layer(A.clone().requires_grad_()), expected)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(A.cpu()).cuda(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_out_of_any_type_and_row_stride(dtype: Any, out_dtype: Any) -> None:
    A, B, C = tensors(300, 128, 70, dtype)
    layer = FusedLinear(B, C, 2.0)
    expected = layer(A, out=torch.full((300, 70), math.nan, device="cuda")).to(out_dtype)
    memory = torch.full((302, 75), math.nan, dtype=out_dtype, device="cuda")
    out = memory[1:301, 2:72]
    assert layer(A, out=out) is out
    assert torch.equal(out, expected)
    out.fill_(math.nan)
    assert memory.isnan().all()


def test_layer_of_no_rows_on_the_gpu() -> None:
    _, B, C = tensors(1, 16, 8, torch.float32)
    layer, out = FusedLinear(B, C), torch.empty(0, 8, device="cuda")
    assert layer(torch.empty(0, 16, device="cuda")).shape == (0, 8)
    assert layer(torch.empty(0, 16, device="cuda"), out=out) is out


@pytest.mark.parametrize("with_out", [False, True])
def test_layer_runs_on_the_callers_current_stream(with_out: bool) -> None:
    """The input is written late on a side stream, where the call and the copy of its result are queued as well.

    Anything queued on another stream would read the poison, or be copied before it was written.
    """
    A, B, C = tensors(2048, 1024, 1024, torch.bfloat16)
    layer = FusedLinear(B, C, 2.0)
    expected = layer(A)
    side = torch.cuda.Stream()
    for function in (layer, lambda x, **kw: fused_gemm_sigmoid_scale_add(x, B, C, 2.0)):
        x, out, result = torch.full_like(A, math.nan), torch.full_like(expected, math.nan), torch.empty_like(expected)
        with torch.cuda.stream(side):
            function(x)  # memory of the side stream is allocated now: that may wait for the GPU
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            x.copy_(A)
            y = function(x, out=out) if with_out else function(x)
            result.copy_(y)
            assert not side.query(), "the call waited for the GPU"
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(result, expected)


def test_layer_memory_is_freed() -> None:
    gc.collect()
    A, B, C = tensors(1024, 1024, 1024, torch.float32)
    before = torch.cuda.memory_allocated()
    layer = FusedLinear(B, C, 2.0)
    for _ in range(5):
        y = layer(A)
    assert torch.cuda.memory_allocated() - before < 4 * 1024 * 1024 * 4, "weights, their split parts, y"
    del layer, y
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layer_and_operator_leave_the_current_device_alone() -> None:
    A, B, C = (tensor.to("cuda:1") for tensor in tensors(100, 64, 32, torch.bfloat16))
    with torch.cuda.device(0):
        y = FusedLinear(B, C, 2.0)(A)
        assert torch.cuda.current_device() == 0
        assert torch.equal(fused_gemm_sigmoid_scale_add(A, B, C, 2.0), y)
        assert torch.cuda.current_device() == 0
        assert torch.empty(1, device="cuda").device.index == 0
    with pytest.raises(InputError, match="B is on cuda:0, A is on cuda:1"):
        fused_gemm_sigmoid_scale_add(A, B.to("cuda:0"), C, 2.0)
    with pytest.raises(OptionError, match="out is on cuda:0, x is on cuda:1"):
        FusedLinear(B, C)(A, out=torch.empty(100, 32, dtype=torch.bfloat16, device="cuda:0"))


# bad input


def bad_arguments() -> list[Any]:
    A, B, C = tensors(6, 8, 5, torch.float32)
    return [
        ((A, B, C.expand(6, 5)), ShapeError, "no residual tensor is passed"),
        ((A[0], B, C), ShapeError, r"A has shape \(8,\)"),
        ((A[:, :7], B, C), ShapeError, "A has 7 features"),
        ((A.double(), B.double(), C.double()), DTypeError, r"A is float64 on a GPU.*A.float\(\)"),
        ((A, B.half(), C), DTypeError, "B is float16, A is float32"),
        ((A.int(), B, C), DTypeError, "A dtype is torch.int32"),
        ((A, B.cpu(), C), InputError, "B is on cpu, A is on cuda:0"),
        ((A.cpu(), B, C), InputError, "B is on cuda:0, A is on cpu"),
        ((A, B, C.cpu()), InputError, "C is on cpu, A is on cuda:0"),
        ((A, B, C, float("nan")), OptionError, "scaling_factor is nan"),
        ((A, B, C, 2.0, "fp16"), OptionError, "precision is 'fp16'"),
        ((A.half(), B.half(), C.half(), 2.0, "tf32"), OptionError, "precision='tf32' is for float32 data"),
    ]


@pytest.mark.parametrize("number", range(12))
def test_torch_op_refuses_bad_input_by_name(number: int) -> None:
    args, error, message = bad_arguments()[number]
    args, precision = (*args, 2.0)[:4], args[4] if len(args) == 5 else None
    for requires_grad in (False, True):
        case = [
            value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())
            if isinstance(value, torch.Tensor)
            else value
            for value in args
        ]
        with pytest.raises(error, match=message):
            fused_gemm_sigmoid_scale_add(*case, precision=precision)


def test_layer_refuses_bad_batches_and_outputs() -> None:
    A, B, C = tensors(20, 8, 8, torch.float32)
    layer = FusedLinear(B, C, 2.0)
    memory = torch.zeros(20, 24, device="cuda")
    cases = [
        (A[:, :7], None, ShapeError, "x has 7 features"),
        (A[0], None, ShapeError, r"x has shape \(8,\)"),
        (A.double(), None, DTypeError, "x is float64"),
        (A.int(), None, DTypeError, "x dtype is torch.int32"),
        (A, torch.zeros(20, 7, device="cuda"), ShapeError, r"out has shape \(20, 7\), expected \(20, 8\)"),
        (A, torch.zeros(20, 8), OptionError, "out is on cpu, x is on cuda:0"),
        (A, [[0.0] * 8] * 20, OptionError, "out is on list"),
        (A, torch.zeros(20, 8, dtype=torch.float64, device="cuda"), DTypeError, "out is float64"),
        (A, torch.zeros(20, 8, dtype=torch.int32, device="cuda"), DTypeError, "out dtype is torch.int32"),
        (A, memory[:, ::3], OptionError, "expected contiguous rows"),
        (A, memory[:1, :8].expand(20, 8), OptionError, "rows overlap each other"),
        (A, A, OptionError, "out overlaps x"),
        (A.cpu(), memory[:, :8], DTypeError, "out is on cuda:0, expected a host tensor"),
    ]
    for x, out, error, message in cases:
        with pytest.raises(error, match=message):
            layer(x, out=out)
    assert torch.equal(layer(A), fused_gemm_sigmoid_scale_add(A, B, C, 2.0))
