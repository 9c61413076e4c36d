"""What a careful engineer writes in ten minutes: a .npy through the layer into another, with torch alone.

Memory maps at both ends, two pinned buffers each way, a stream for each, events, torch's copies on all threads. It
never waits for more than it needs, and chunks stay small enough that the buffers lie in the processor's cache. It
prints where its time went, as JSON.
"""

import argparse
import json
import time
import warnings

moments = {"begin": time.perf_counter()}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

moments["imported"] = time.perf_counter()

parser = argparse.ArgumentParser()
parser.add_argument("source")
parser.add_argument("--weights", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--scale", type=float, required=True)
parser.add_argument("--precision", required=True, choices=("tf32", "ieee", "fp32"))
parser.add_argument("--device", required=True)
parser.add_argument("--chunk-mib", type=float, required=True)
options = parser.parse_args()

torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"
tensors = load_file(options.weights, device=options.device)
weight, bias = tensors["weight"], tensors["bias"]
on_gpu = options.device != "cpu"
if on_gpu:
    torch.cuda.synchronize()
moments["weights there"] = time.perf_counter()

x = np.load(options.source, mmap_mode="r")
y = np.lib.format.open_memmap(options.out, "w+", np.float32, (len(x), len(weight)))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the source can't be written to, and isn't
    source, target = torch.from_numpy(x), torch.from_numpy(y)
rows = max(1, int(options.chunk_mib * 2**20) // (4 * x.shape[1]))
starts = list(range(0, len(x), rows))


def layer(part: torch.Tensor) -> torch.Tensor:
    z = torch.nn.functional.linear(part, weight, bias)
    return torch.add(z, torch.sigmoid(z), alpha=options.scale)


def through_the_gpu() -> None:
    host_in = [torch.empty(rows, x.shape[1], pin_memory=True) for _ in range(2)]
    host_out = [torch.empty(rows, y.shape[1], pin_memory=True) for _ in range(2)]
    streams, done = [torch.cuda.Stream() for _ in range(2)], [torch.cuda.Event() for _ in range(2)]

    def collect(i: int) -> None:
        done[i % 2].synchronize()
        part = target[starts[i] : starts[i] + rows]
        part.copy_(host_out[i % 2][: len(part)])

    for i, row in enumerate(starts):
        if i >= 2:
            collect(i - 2)
        part = source[row : row + rows]
        host_in[i % 2][: len(part)].copy_(part)
        with torch.cuda.stream(streams[i % 2]):
            result = layer(host_in[i % 2][: len(part)].to(options.device, non_blocking=True))
            host_out[i % 2][: len(part)].copy_(result, non_blocking=True)
            done[i % 2].record()
    for i in range(max(0, len(starts) - 2), len(starts)):
        collect(i)


def on_the_processor() -> None:
    for row in starts:
        target[row : row + rows] = layer(source[row : row + rows])


with torch.inference_mode():
    through_the_gpu() if on_gpu else on_the_processor()
moments["rows there"] = time.perf_counter()
y.flush()
moments["flushed"] = time.perf_counter()
names = ("import torch", "context and weights", "loop", "flush")
times = list(moments.values())
print(json.dumps({name: times[i + 1] - times[i] for i, name in enumerate(names)}))
