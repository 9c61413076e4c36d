"""The torch operator and module on the CPU: torch's own checks, values, gradients, compilation, bad input."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import (
    DTypeError,
    FusedLinear,
    GemmSigmoidScalingResidualAdd,
    InputError,
    OptionError,
    ShapeError,
    fused_gemm_sigmoid_scale_add,
    torch_op,
)
from pipeline.layer.gpu import rows_for_kernel

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def operator() -> Any:
    return torch.ops.pipeline.fused_gemm_sigmoid_scale_add.default


def tensors(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, requires_grad: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fresh random A, B, C; B and C as torch.nn.Linear draws them."""
    bound = in_features**-0.5
    A = torch.randn(rows, in_features, dtype=dtype)
    B = torch.empty(out_features, in_features).uniform_(-bound, bound).to(dtype)
    C = torch.empty(out_features).uniform_(-bound, bound).to(dtype)
    return A.requires_grad_(requires_grad), B.requires_grad_(requires_grad), C.requires_grad_(requires_grad)


def reference(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, scaling_factor: float) -> Any:
    return FusedLinear(B, C, scaling_factor).reference(A)


def eager(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """The layer as people write it in torch."""
    z = torch.nn.functional.linear(A, B, C)
    return scaling_factor * torch.sigmoid(z) + z


class ReferenceModel(torch.nn.Module):
    """Gemm_Sigmoid_Scaling_ResidualAdd as it is usually written."""

    def __init__(self, input_size: int, hidden_size: int, scaling_factor: float) -> None:
        super().__init__()
        self.gemm = torch.nn.Linear(input_size, hidden_size)
        self.scaling_factor = scaling_factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gemm(x)
        original_x = x
        x = torch.sigmoid(x)
        x = x * self.scaling_factor
        return x + original_x


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    yield
    torch._dynamo.reset()


# torch's own checks


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_op_passes_opcheck(dtype: torch.dtype, requires_grad: bool) -> None:
    torch.library.opcheck(operator(), (*tensors(7, 12, 5, dtype, requires_grad), 2.0))


@pytest.mark.parametrize("rows", [0, 1])
def test_torch_op_passes_opcheck_with_few_rows(rows: int) -> None:
    torch.library.opcheck(operator(), (*tensors(rows, 12, 5, torch.float32, requires_grad=True), 2.0))


def test_torch_op_passes_opcheck_with_strides_and_precision() -> None:
    A, B, C = tensors(14, 24, 10, torch.float32)
    views = (A[::2, ::2].requires_grad_(), B.t()[::2].t().requires_grad_(), C)
    torch.library.opcheck(operator(), (*views, -0.5, "tf32"))


def test_torch_op_gradients_match_finite_differences_twice() -> None:
    args = tensors(6, 9, 5, torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda A, B, C: fused_gemm_sigmoid_scale_add(A, B, C, 1.7), args)
    assert torch.autograd.gradgradcheck(lambda A, B, C: fused_gemm_sigmoid_scale_add(A, B, C, 1.7), args)


def test_torch_op_gradients_of_strided_inputs_and_no_rows() -> None:
    A, B, C = tensors(12, 18, 10, torch.float64, requires_grad=True)

    def function(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        return fused_gemm_sigmoid_scale_add(A[::2, ::2], B[:, ::2], C, -3.0)

    assert torch.autograd.gradcheck(function, (A, B, C))
    fused_gemm_sigmoid_scale_add(A[:0], B, C, 2.0).sum().backward()
    assert A.grad is not None and not A.grad.any()
    assert C.grad is not None and not C.grad.any()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_torch_op_computes_only_the_gradients_asked_for(wanted: tuple[bool, bool, bool]) -> None:
    args = tensors(8, 6, 4, torch.float32)
    for tensor, need in zip(args, wanted, strict=True):
        tensor.requires_grad_(need)
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            products.append(func) if func in (torch.ops.aten.mm.default, torch.ops.aten.sum.dim_IntList) else None
            return func(*args, **(kwargs or {}))

    y = fused_gemm_sigmoid_scale_add(*args, 2.0)
    with Count():
        y.backward(torch.randn_like(y))
    assert [tensor.grad is not None for tensor in args] == list(wanted)
    assert len(products) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_op_gradients_are_as_accurate_as_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = tensors(128, 96, 130, dtype, requires_grad=True)
    wide = [tensor.detach().double().requires_grad_() for tensor in args]
    grad = torch.randn(128, 130, dtype=dtype)
    expected = torch.autograd.grad(eager(*wide, 2.0), wide, grad.double())
    ours = torch.autograd.grad(fused_gemm_sigmoid_scale_add(*args, 2.0), args, grad)
    theirs = torch.autograd.grad(eager(*args, 2.0), args, grad)
    # The bias has few elements: the ratio of two errors there is largely chance.
    for our, their, right, ratio in zip(ours, theirs, expected, (1.05, 1.05, 2.0), strict=True):
        assert our.dtype == dtype
        limit = ratio * (their - right).norm() if dtype != torch.float64 else 1e-13 * right.norm()
        assert (our - right).norm() <= limit


# values


@pytest.mark.parametrize("shape", [(1024, 300, 77), (333, 1000, 130), (8192, 7, 9), (257, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_op_is_as_accurate_as_torch(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    A, B, C = tensors(*shape, dtype)
    expected = torch.from_numpy(reference(A, B, C, 2.0))
    error = (fused_gemm_sigmoid_scale_add(A, B, C, 2.0) - expected).norm()
    limit = 1.05 * (eager(A, B, C, 2.0) - expected).norm() if dtype != torch.float64 else 1e-14 * expected.norm()
    assert error <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_op_equals_the_layer_bit_for_bit(dtype: torch.dtype) -> None:
    A, B, C = tensors(100, 33, 20, dtype)
    y = fused_gemm_sigmoid_scale_add(A, B, C, 2.0)
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y, FusedLinear(B, C, 2.0)(A))


def test_torch_op_takes_strided_operands() -> None:
    A, B, C = tensors(60, 40, 30, torch.float32)
    expected = fused_gemm_sigmoid_scale_add(A[::3, ::2].clone(), B[::2, ::2].clone(), C[::2].clone(), 2.0)
    assert torch.equal(fused_gemm_sigmoid_scale_add(A[::3, ::2], B[::2, ::2], C[::2], 2.0), expected)
    assert torch.allclose(
        fused_gemm_sigmoid_scale_add(A[:1].expand(9, 40), B, C, 2.0), eager(A[:1], B, C, 2.0), atol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_op_of_no_rows_is_empty(dtype: torch.dtype) -> None:
    assert fused_gemm_sigmoid_scale_add(*tensors(0, 12, 5, dtype), 2.0).shape == (0, 5)


@pytest.mark.parametrize("precision", [None, "fp32", "ieee", "tf32"])
def test_torch_op_accepts_the_precisions_of_float32(precision: str | None) -> None:
    args = tensors(5, 8, 3, torch.float32)
    assert torch.equal(
        fused_gemm_sigmoid_scale_add(*args, 2.0, precision=precision), fused_gemm_sigmoid_scale_add(*args, 2.0)
    )


def test_torch_op_puts_nan_and_infinity_where_they_belong() -> None:
    A = torch.tensor([[1.0], [float("inf")], [float("-inf")], [float("nan")], [-1e30], [0.0]])
    B, C = torch.tensor([[1.0], [-1.0], [0.0]]), torch.zeros(3)
    with np.errstate(invalid="ignore"):
        expected = reference(A, B, C, 2.0).astype(np.float32)
    np.testing.assert_allclose(fused_gemm_sigmoid_scale_add(A, B, C, 2.0), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torch_op_under_autocast_casts_like_linear(dtype: torch.dtype) -> None:
    A, B, C = tensors(64, 32, 16, torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = fused_gemm_sigmoid_scale_add(A.to(dtype), B, C, 2.0, precision="tf32")
        assert torch.nn.functional.linear(A.to(dtype), B, C).dtype == y.dtype == dtype
    assert torch.equal(y, fused_gemm_sigmoid_scale_add(A.to(dtype), B.to(dtype), C.to(dtype), 2.0))
    y.sum().backward()
    assert B.grad is not None and B.grad.dtype == torch.float32


def test_torch_op_under_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        args = tensors(3, 4, 5, torch.float64)
        y = fused_gemm_sigmoid_scale_add(*args, 2.0)
    np.testing.assert_allclose(y, reference(*args, 2.0), rtol=1e-13)


def test_torch_op_works_in_inference_mode_and_on_the_meta_device() -> None:
    args = tensors(6, 4, 3, torch.float32, requires_grad=True)
    with torch.inference_mode():
        y = fused_gemm_sigmoid_scale_add(*args, 2.0)
    assert torch.equal(y, fused_gemm_sigmoid_scale_add(*args, 2.0).detach())
    meta = fused_gemm_sigmoid_scale_add(*(tensor.to("meta") for tensor in args), 2.0)
    assert meta.shape == (6, 3) and meta.device.type == "meta"


def test_torch_op_ignores_the_default_device() -> None:
    args = tensors(6, 4, 3, torch.float32)
    with torch.device("meta"):
        y = fused_gemm_sigmoid_scale_add(*args, 2.0)
    assert y.device.type == "cpu"


# the CUDA side, as far as a machine without a GPU can show it


def test_torch_op_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        A, B, C = torch.empty(6, 8, device="cuda"), torch.empty(5, 8, device="cuda"), torch.empty(5, device="cuda")
        y = fused_gemm_sigmoid_scale_add(A, B, C, 2.0, precision="tf32")
        assert (y.shape, y.device.type, y.dtype) == ((6, 5), "cuda", torch.float32)
        with pytest.raises(DTypeError, match=r"A is float64 on a GPU.*A\.float\(\)"):
            fused_gemm_sigmoid_scale_add(A.double(), B.double(), C.double(), 2.0)
        with pytest.raises(InputError, match="B is on cpu, A is on cuda:0"):
            fused_gemm_sigmoid_scale_add(A, torch.empty(5, 8), C, 2.0)


def test_torch_op_gives_the_launch_its_operands_and_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CUDA implementation asks of launch_on_gpu, with host tensors and the launch recorded."""
    launches = []
    monkeypatch.setattr(torch_op, "launch_on_gpu", lambda *args: launches.append(args))
    A, B, C = tensors(12, 16, 10, torch.float32)
    out = torch_op._cuda(A[::2, :8], B[::2, ::2], C[::2], 3.0, "tf32")
    ((x, weight, bias, epilogue, precision, target),) = launches
    assert x.stride() == (32, 1) and bias.is_contiguous()
    assert torch.equal(weight, B[::2, ::2]) and torch.equal(bias, C[::2])
    assert (epilogue.parameters.scaling_factor, precision) == (3.0, "tf32")
    assert target is out and out.shape == (6, 5) and out.is_contiguous()


def test_rows_for_kernel_copies_what_the_copy_engine_cannot_read() -> None:
    """Rows that aren't contiguous, repeat or aren't aligned get a copy with aligned rows; others none."""
    A = torch.randn(12, 24)
    for rows in (A, A[::2], A[:, 4:12], A[:, :7]):
        assert rows_for_kernel(rows) is rows
    for rows in (A.t(), A[:, ::2], A[:1].expand(5, 24), A[:, 1:9], A.flatten()[:275].view(25, 11)):
        copy = rows_for_kernel(rows)
        assert copy is not rows and torch.equal(copy, rows)
        assert copy.stride(1) == 1 and copy.stride(0) >= copy.shape[1]
        assert copy.data_ptr() % 16 == 0 and copy.stride(0) * 4 % 16 == 0


# torch.compile


def test_torch_op_compiles_to_one_graph_with_dynamic_rows_and_scales() -> None:
    compiled = torch.compile(fused_gemm_sigmoid_scale_add, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, scaling_factor in ((5, 2.0), (9, 2.0), (1, -0.5), (0, 3.25)):
        args = tensors(rows, 12, 7, torch.float32)
        assert torch.equal(compiled(*args, scaling_factor), fused_gemm_sigmoid_scale_add(*args, scaling_factor))
    with pytest.raises(Exception, match="scaling_factor is nan"):
        compiled(*args, float("nan"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_op_compiles_with_its_backward(dtype: torch.dtype) -> None:
    compiled = torch.compile(fused_gemm_sigmoid_scale_add, fullgraph=True, backend="aot_eager")
    args = tensors(9, 12, 7, dtype, requires_grad=True)
    grad = torch.randn(9, 7, dtype=dtype)
    ours = torch.autograd.grad(compiled(*args, 2.0), args, grad)
    expected = torch.autograd.grad(fused_gemm_sigmoid_scale_add(*args, 2.0), args, grad)
    for our, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, right)


def test_torch_op_compiles_once_for_all_row_counts() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fused_gemm_sigmoid_scale_add, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 50, 7):
        compiled(*tensors(rows, 12, 5, torch.float32), 2.0)
    assert len(graphs) == 1


def test_torch_op_compiles_under_autocast() -> None:
    compiled = torch.compile(fused_gemm_sigmoid_scale_add, fullgraph=True, backend="aot_eager")
    args = tensors(9, 12, 7, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(*args, 2.0), fused_gemm_sigmoid_scale_add(*args, 2.0))


def test_module_compiles_with_inductor_and_trains() -> None:
    """The default compiler, forward and backward; it builds C++, which takes some seconds."""
    module = GemmSigmoidScalingResidualAdd(24, 16, 2.0)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for rows in (32, 7):
        x = torch.randn(rows, 24)
        for model in (compiled, twin):
            model(x).square().mean().backward()
        torch.testing.assert_close(module.gemm.weight.grad, twin.gemm.weight.grad)
        torch.testing.assert_close(module.gemm.bias.grad, twin.gemm.bias.grad)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))


def test_module_exports_to_one_node() -> None:
    module = GemmSigmoidScalingResidualAdd(24, 16, 2.0)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(8, 24),), dynamic_shapes=({0: rows},))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [operator()]
    x = torch.randn(33, 24)
    assert torch.equal(program.module()(x), module(x))


# the module


def test_module_state_dict_round_trips_with_the_reference_model() -> None:
    theirs, ours = ReferenceModel(40, 30, 2.0), GemmSigmoidScalingResidualAdd(40, 30, 2.0)
    assert list(ours.state_dict()) == ["gemm.weight", "gemm.bias"]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(20, 40)
    torch.testing.assert_close(ours(x), theirs(x))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    again = ReferenceModel(40, 30, 2.0)
    again.load_state_dict(torch.load(file))
    assert torch.equal(again(x), theirs(x))


def test_module_starts_with_the_weights_of_the_reference_model() -> None:
    torch.manual_seed(3)
    theirs = ReferenceModel(12, 9, 2.0)
    torch.manual_seed(3)
    ours = GemmSigmoidScalingResidualAdd(12, 9, 2.0)
    assert torch.equal(ours.gemm.weight, theirs.gemm.weight) and torch.equal(ours.gemm.bias, theirs.gemm.bias)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_module_copies_and_pickles(duplicate: Callable[[Any], Any]) -> None:
    module = GemmSigmoidScalingResidualAdd(12, 9, 2.5, precision="ieee")
    twin = duplicate(module)
    x = torch.randn(4, 12)
    assert torch.equal(twin(x), module(x))
    assert (twin.scaling_factor, twin.precision) == (2.5, "ieee")
    assert twin.gemm.weight.data_ptr() != module.gemm.weight.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_converts_to_other_types(dtype: torch.dtype) -> None:
    module = GemmSigmoidScalingResidualAdd(12, 9, 2.0).to(dtype)
    x = torch.randn(4, 12, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        y.detach().double(), reference(x, module.gemm.weight, module.gemm.bias, 2.0), rtol=2**-7, atol=2**-7
    )


def test_module_learns() -> None:
    torch.manual_seed(0)
    teacher, student = ReferenceModel(8, 4, 2.0), GemmSigmoidScalingResidualAdd(8, 4, 2.0)
    x = torch.randn(256, 8)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (student(x) - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 1000


def test_module_shows_its_options() -> None:
    text = repr(GemmSigmoidScalingResidualAdd(12, 9, 2.0, precision="tf32"))
    assert "scaling_factor=2.0" in text and "precision='tf32'" in text and "in_features=12" in text


# bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"C": torch.zeros(6, 5)}, ShapeError, r"C \(the bias\) has shape \(6, 5\).*no residual tensor is passed"),
        ({"C": torch.zeros(4)}, ShapeError, r"C \(the bias\) has shape \(4,\), expected \(5,\)"),
        ({"C": torch.zeros(())}, ShapeError, r"C \(the bias\) has shape \(\)"),
        ({"A": torch.zeros(8)}, ShapeError, r"A has shape \(8,\), expected 2 dimensions"),
        ({"A": torch.zeros(2, 3, 8)}, ShapeError, r"A has shape \(2, 3, 8\).*A.reshape\(-1, 8\)"),
        ({"A": torch.zeros(6, 9)}, ShapeError, "A has 9 features a row .*takes 8"),
        ({"B": torch.zeros(5)}, ShapeError, r"B has shape \(5,\), expected 2 dimensions"),
        ({"B": torch.zeros(5, 0), "A": torch.zeros(6, 0)}, ShapeError, r"B has shape \(5, 0\).*at least 1 feature"),
        ({"B": torch.zeros(0, 8), "C": torch.zeros(0)}, ShapeError, r"B has shape \(0, 8\).*at least 1 feature"),
        ({"B": torch.zeros(5, 8, dtype=torch.float64)}, DTypeError, "B is float64, A is float32"),
        ({"C": torch.zeros(5, dtype=torch.bfloat16)}, DTypeError, "C is bfloat16, A is float32"),
        ({"A": torch.zeros(6, 8, dtype=torch.int32)}, DTypeError, "A dtype is torch.int32"),
        ({"B": torch.zeros(5, 8, dtype=torch.bool)}, DTypeError, "B dtype is torch.bool"),
        ({"A": torch.zeros(6, 8, dtype=torch.complex64)}, DTypeError, "A dtype is torch.complex64"),
        ({"A": torch.zeros(6, 8).to_sparse()}, DTypeError, "A is a torch.sparse_coo tensor"),
        ({"B": torch.zeros(5, 8, device="meta")}, InputError, "B is on meta, A is on cpu"),
        ({"C": torch.zeros(5, device="meta")}, InputError, "C is on meta, A is on cpu"),
        ({"A": np.zeros((6, 8), np.float32)}, InputError, "A is a ndarray, expected a torch tensor"),
        ({"C": None}, InputError, "C is a NoneType"),
        ({"scaling_factor": float("nan")}, OptionError, "scaling_factor is nan"),
        ({"scaling_factor": float("-inf")}, OptionError, "scaling_factor is -inf"),
        ({"scaling_factor": "two"}, OptionError, "scaling_factor is 'two'"),
        ({"scaling_factor": None}, OptionError, "scaling_factor is None"),
        ({"precision": "fp16"}, OptionError, "precision is 'fp16'"),
        (
            {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in (("A", (6, 8)), ("B", (5, 8)), ("C", 5))}
            | {"precision": "tf32"},
            OptionError,
            "precision='tf32' is for float32 data",
        ),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_torch_op_refuses_bad_input_by_name(
    changes: dict[str, Any], error: type[Exception], message: str, requires_grad: bool
) -> None:
    args: dict[str, Any] = {"A": torch.zeros(6, 8), "B": torch.zeros(5, 8), "C": torch.zeros(5)}
    args |= {"scaling_factor": 2.0} | changes
    if requires_grad:
        args = {
            name: value.clone().requires_grad_()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in args.items()
        }
    with pytest.raises(error, match=message):
        fused_gemm_sigmoid_scale_add(**args)


@pytest.mark.parametrize(
    ("scaling_factor", "precision", "message"),
    [(float("nan"), None, "scaling_factor is nan"), ([2.0, 1.0], None, "scaling_factor"), (2.0, "half", "'half'")],
)
def test_module_refuses_bad_options(scaling_factor: Any, precision: str | None, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GemmSigmoidScalingResidualAdd(8, 5, scaling_factor, precision=precision)


def test_module_refuses_a_batch_of_another_type_or_width() -> None:
    module = GemmSigmoidScalingResidualAdd(8, 5, 2.0)
    with pytest.raises(DTypeError, match="B is float32, A is bfloat16"):
        module(torch.zeros(3, 8, dtype=torch.bfloat16))
    with pytest.raises(ShapeError, match="A has 9 features"):
        module(torch.zeros(3, 9))


def test_torch_op_names_bad_shapes_while_compiling() -> None:
    compiled = torch.compile(fused_gemm_sigmoid_scale_add, fullgraph=True, backend="eager")
    A, B, _ = tensors(6, 8, 5, torch.float32)
    with pytest.raises(Exception, match="no residual tensor is passed"):
        compiled(A, B, torch.zeros(6, 5), 2.0)
