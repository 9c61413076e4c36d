"""What people write instead, host to host through torch's own layer.

Every recipe is a function of the source x and the result y, torch tensors on the host, and the layer on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

Forward = Callable[[Any], Any]


def torch_layer(layer: Any) -> Forward:
    """The layer as torch code runs it: a linear layer with bias, in tf32 if ours is, then two elementwise kernels."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = layer.precision == "tf32"
    weight, bias = torch.from_numpy(layer.weight).cuda(), torch.from_numpy(layer.bias).cuda()

    def forward(x: Any) -> Any:
        z = torch.nn.functional.linear(x, weight, bias)
        return torch.add(z, torch.sigmoid(z), alpha=layer.scaling_factor)

    return forward


def naive_loop(forward: Forward, x: Any, y: Any, rows: int) -> None:
    """One line a chunk: to the GPU, through the layer, back, into the result."""
    for row in range(0, len(x), rows):
        y[row : row + rows] = forward(x[row : row + rows].cuda()).cpu()


def copied_back(forward: Forward, x: Any, y: Any, rows: int) -> None:
    """The same with the result copied straight into its place."""
    for row in range(0, len(x), rows):
        y[row : row + rows].copy_(forward(x[row : row + rows].cuda()))


def double_buffered(forward: Forward, x: Any, y: Any, rows: int) -> None:
    """What a good engineer writes: two pinned buffers each way, two streams, copies on all threads, events."""
    import torch

    host_in = [torch.empty(rows, x.shape[1], pin_memory=True) for _ in range(2)]
    host_out = [torch.empty(rows, y.shape[1], pin_memory=True) for _ in range(2)]
    streams, done = [torch.cuda.Stream() for _ in range(2)], [torch.cuda.Event() for _ in range(2)]
    starts = list(range(0, len(x), rows))

    def collect(i: int) -> None:
        done[i % 2].synchronize()
        part = y[starts[i] : starts[i] + rows]
        part.copy_(host_out[i % 2][: len(part)])

    for i, row in enumerate(starts):
        if i >= 2:
            collect(i - 2)
        part = x[row : row + rows]
        host_in[i % 2][: len(part)].copy_(part)
        with torch.cuda.stream(streams[i % 2]):
            result = forward(host_in[i % 2][: len(part)].to("cuda", non_blocking=True))
            host_out[i % 2][: len(part)].copy_(result, non_blocking=True)
            done[i % 2].record()
    for i in range(max(0, len(starts) - 2), len(starts)):
        collect(i)


def data_loader(forward: Forward, x: Any, y: Any, rows: int, workers: int) -> None:
    """torch's DataLoader with pin_memory; batches are slices, results are copied into their place."""
    import torch

    parts = [(row, x[row : row + rows]) for row in range(0, len(x), rows)]
    loader: Any = torch.utils.data.DataLoader(cast("Any", parts), batch_size=None, pin_memory=True, num_workers=workers)
    for row, part in loader:
        y[row : row + len(part)].copy_(forward(part.to("cuda", non_blocking=True)))


def dali_source(forward: Forward, x: Any, y: Any, rows: int) -> None:
    """DALI's external source, which copies blocks of rows to the GPU ahead; results are copied into their place."""
    import torch
    from nvidia import dali

    array, starts = x.numpy(), list(range(0, len(x), rows))

    def block(info: Any) -> Any:
        if info.iteration == len(starts):
            raise StopIteration
        return array[starts[info.iteration] : starts[info.iteration] + rows]

    @dali.pipeline_def(batch_size=1, num_threads=4, device_id=0, prefetch_queue_depth=2)  # type: ignore[untyped-decorator]
    def blocks() -> Any:
        return dali.fn.external_source(source=block, batch=False, dtype=dali.types.FLOAT, ndim=2).gpu()

    pipe = blocks()
    pipe.build()
    for row in starts:
        (batch,) = pipe.run()
        part = torch.utils.dlpack.from_dlpack(batch.as_tensor())[0]
        y[row : row + len(part)].copy_(forward(part))


def kvikio_file(forward: Forward, path: str, offset: int, y: Any, rows: int) -> None:
    """KvikIO reads a file's rows into the GPU, two chunks in turns; results go to pinned memory."""
    import kvikio
    import torch

    width = y.shape[1]
    buffers = [torch.empty(rows, width, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    starts = list(range(0, len(y), rows))
    with kvikio.CuFile(path, "r") as file:

        def read(i: int) -> Any:
            count = min(rows, len(y) - starts[i])
            streams[i % 2].synchronize()
            return file.pread(buffers[i % 2][:count], count * width * 4, offset + starts[i] * width * 4)

        pending = read(0)
        for i, row in enumerate(starts):
            pending.get()
            if i + 1 < len(starts):
                pending = read(i + 1)
            with torch.cuda.stream(streams[i % 2]):
                part = y[row : row + rows]
                part.copy_(forward(buffers[i % 2][: len(part)]), non_blocking=True)
    torch.cuda.synchronize()
