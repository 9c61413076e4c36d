"""Who takes part in `scripts/bench kernel`: our kernels, cuBLAS's bare product, and the layer as torch runs it.

`Ours` is the one place of the benches that knows how the package's kernels are chosen and launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

MM = "cuBLAS mm"  # the bare product, which every ratio is against
PEERS = ("linear", "eager", "compile", "parts")  # parts: ours as fp32, without some of its launches
BUFFERS = 3  # operands rotate over so many, together larger than L2

Contenders = dict[str, Callable[[int], object]]
"""Name -> what queues one product or layer on the current stream, with the operands of a given turn."""


class Operands:
    """Random operands of one product, rotating over `BUFFERS` places. `sizes`: rows, out_features, in_features."""

    def __init__(self, precision: str, sizes: tuple[int, int, int]) -> None:
        import torch

        self.precision, (self.rows, self.out_features, self.in_features) = precision, sizes
        dtype = getattr(torch, "float32" if precision in ("tf32", "fp32", "ieee") else precision)
        bound = self.in_features**-0.5
        shape = self.out_features, self.in_features
        self.dtype = dtype
        self.x = [torch.randn(self.rows, self.in_features, device="cuda").to(dtype) for _ in range(BUFFERS)]
        self.w = [torch.empty(shape, device="cuda").uniform_(-bound, bound).to(dtype) for _ in self.x]
        self.bias = torch.empty(self.out_features, device="cuda").uniform_(-bound, bound).to(dtype)
        self.y = [torch.empty(self.rows, self.out_features, device="cuda", dtype=dtype) for _ in self.x]


class Ours:
    """The package's kernels on some operands: the one that it selects, or any other."""

    def __init__(self, operands: Operands) -> None:
        import torch

        from pipeline.dtypes import parse_dtype
        from pipeline.epilogues import SigmoidScaleResidual
        from pipeline.kernels.choose import Problem
        from pipeline.kernels.fused_layer import Weights, prepare_split, split_weights
        from pipeline.kernels.launch import Launcher

        self._operands = operands
        self._memory: list[Any] = []  # what addresses below point to
        self._launcher = Launcher.for_device(torch.cuda.current_device())
        dtype = parse_dtype(operands.dtype)
        self._problem = Problem(dtype, dtype, operands.precision, operands.in_features, operands.out_features)
        split = split_weights(self._launcher, self._problem)
        self.split = split is not None
        parameters = SigmoidScaleResidual(2.0).pack({})
        self._weights = []
        for w in operands.w:
            parts = None if split is None else split._replace(address=self._allocated(split.n_bytes))
            if parts is not None:
                prepare_split(self._launcher, _matrix(w), parts).queue(0)
            self._weights.append(Weights(_matrix(w), operands.bias.data_ptr(), parameters, parts))
        self._scratch = self._allocated(self._weights[0].scratch_bytes(operands.rows))
        self._launch = functools.cache(self._prepare)

    def _allocated(self, n_bytes: int) -> int:
        import torch

        self._memory.append(torch.empty(n_bytes, dtype=torch.uint8, device="cuda"))
        return int(self._memory[-1].data_ptr())

    def selected(self) -> str:
        """The description of the kernel that the package selects, which is made ready."""
        from pipeline.kernels.fused_layer import describe

        return describe(self._launcher, self._problem, self._operands.rows)

    def variants(self) -> dict[str, Any]:
        """All kernels that could run, by their descriptions."""
        from pipeline.kernels.choose import candidates

        return {variant.description: variant for variant in candidates(self._launcher.arch, self._problem, 16)}

    def queue(self, i: int, variant: Any = None) -> None:
        """Queue the whole layer, by the selected kernel where no variant is given."""
        self._launch(i % BUFFERS, variant).queue(_stream())

    def queue_part(self, i: int, first: int, last: int) -> None:
        """Queue some of the launches that a layer at fp32 accuracy consists of."""
        for operation in self._launch(i % BUFFERS, None).operations[first:last]:
            operation.queue(_stream())

    def _prepare(self, place: int, variant: Any) -> Any:
        from pipeline.kernels.fused_layer import prepare

        x, y = _matrix(self._operands.x[place]), _matrix(self._operands.y[place])
        return prepare(self._launcher, self._problem, self._weights[place], x, y, self._scratch, variant=variant)


def _matrix(tensor: Any) -> Any:
    from pipeline.kernels.fused_linear import Matrix

    rows, columns = tensor.shape
    return Matrix(tensor.data_ptr(), rows, columns, tensor.stride(0))


def _stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)


def eager_layer(x: Any, w: Any, b: Any) -> Any:
    import torch

    z = torch.nn.functional.linear(x, w, b)
    return 2.0 * torch.sigmoid(z) + z


def contenders(operands: Operands, *, every_tile: bool = False, peers: tuple[str, ...] = ()) -> Contenders:
    """cuBLAS's product, ours, and the `peers` that are asked for."""
    import torch

    xs, ws, ys, bias = operands.x, operands.w, operands.y, operands.bias
    ours = Ours(operands)
    found: Contenders = {MM: lambda i: torch.mm(xs[i % BUFFERS], ws[i % BUFFERS].T, out=ys[i % BUFFERS])}
    if every_tile:
        for description, variant in ours.variants().items():
            found[description] = lambda i, variant=variant: ours.queue(i, variant)  # type: ignore[misc]
    else:
        found[ours.selected()] = ours.queue
    if "parts" in peers and ours.split:
        found["without the exact rows"] = lambda i: ours.queue_part(i, 0, 2)
        found["without the split of x, either"] = lambda i: ours.queue_part(i, 1, 2)
    if "linear" in peers:
        linear = torch.nn.functional.linear
        found["cuBLAS linear with bias"] = lambda i: linear(xs[i % BUFFERS], ws[i % BUFFERS], bias)
    if "eager" in peers:
        found["eager layer"] = lambda i: eager_layer(xs[i % BUFFERS], ws[i % BUFFERS], bias)
    if "compile" in peers:
        torch._dynamo.reset()
        compiled = torch.compile(eager_layer, mode="max-autotune-no-cudagraphs", dynamic=False)
        found["torch.compile'd layer"] = lambda i: compiled(xs[i % BUFFERS], ws[i % BUFFERS], bias)
    return found
