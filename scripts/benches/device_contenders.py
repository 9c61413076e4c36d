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


def _split_memory(matrix: Any) -> tuple[Any, Any]:
    """Memory for a matrix's parts and what describes it; keep the first as long as the second is used."""
    import torch

    from pipeline.kernels.split import SplitRows

    rows, columns = matrix.shape
    memory = torch.empty(SplitRows(0, rows, columns).n_bytes, dtype=torch.uint8, device="cuda")
    return memory, SplitRows(memory.data_ptr(), rows, columns)


class Ours:
    """The package's kernels on some operands: the one that it selects, or any other."""

    def __init__(self, operands: Operands) -> None:
        import torch

        from pipeline.dtypes import parse_dtype
        from pipeline.kernels.choose import Problem, runs_as
        from pipeline.kernels.launch import Launcher
        from pipeline.kernels.split import PreparedSplit

        self._operands = operands
        self._launcher = Launcher.for_device(torch.cuda.current_device())
        dtype = parse_dtype(operands.dtype)
        self._problem = Problem(dtype, dtype, operands.precision, operands.in_features, operands.out_features)
        self.split = runs_as(self._problem, self._launcher.arch) == "fp32"
        if self.split:
            self._x_split, self._w_splits = _split_memory(operands.x[0]), [_split_memory(w) for w in operands.w]
            for w, (_, target) in zip(operands.w, self._w_splits, strict=True):
                PreparedSplit(self._launcher, w.data_ptr(), operands.in_features, operands.out_features, target).queue(
                    0
                )
        self._split_launch = functools.cache(self._prepare_split)

    def selected(self) -> str:
        """The description of the kernel that the package selects, which is made ready."""
        return self._launcher.prepare(self._problem, self._operands.rows)

    def variants(self) -> dict[str, Any]:
        """All kernels that could run, by their descriptions."""
        from pipeline.kernels.choose import candidates

        return {variant.description: variant for variant in candidates(self._launcher.arch, self._problem, 16)}

    def queue(self, i: int, variant: Any = None) -> None:
        """Queue the whole layer, by the selected kernel where no variant is given."""
        if self.split:
            self._split_launch(i % BUFFERS, variant).queue(_stream())
        else:
            place = i % BUFFERS
            self._launcher.launch(_stream(), self._problem, variant=variant, **self._pointers(place))

    def queue_part(self, i: int, first: int, last: int) -> None:
        """Queue some of the launches that a layer at fp32 accuracy consists of."""
        for operation in self._split_launch(i % BUFFERS, None).operations[first:last]:
            operation.queue(_stream())

    def _prepare_split(self, place: int, variant: Any) -> Any:
        from pipeline.kernels.split import PreparedSplitLaunch

        splits = {"x_split": self._x_split[1], "w_split": self._w_splits[place][1]}
        return PreparedSplitLaunch(self._launcher, self._problem, variant=variant, **splits, **self._pointers(place))

    def _pointers(self, place: int) -> dict[str, Any]:
        operands = self._operands
        return {
            "rows": operands.rows,
            "x": operands.x[place].data_ptr(),
            "x_stride": operands.in_features,
            "w": operands.w[place].data_ptr(),
            "w_stride": operands.in_features,
            "bias": operands.bias.data_ptr(),
            "y": operands.y[place].data_ptr(),
            "y_stride": operands.out_features,
            "scaling_factor": 2.0,
        }


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
