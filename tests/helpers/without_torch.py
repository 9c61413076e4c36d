"""A program that runs every kind of NumPy data and file through a layer on one device, with torch out of reach.

    python without_torch.py DEVICE FOLDER

On "sim", where the host computes, NumPy stands for the products, which torch makes otherwise. It ends with one line of
JSON: what tried to import torch, and which of the modules in HEAVY the command line's run had loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import json
import sys
from pathlib import Path
from typing import Any

tried: list[str] = []
# What takes milliseconds to import, and no run to a file on one device has a use for.
HEAVY = {"torch", "rich", "cuda.core", "ml_dtypes", "asyncio", "email", "multiprocessing", "numpy.testing", "numpy.ma"}
HEAVY |= {"importlib.metadata", "http", "ssl", "socket", "sqlite3", "matplotlib", "bokeh", "pipeline.plan.simulate"}


class NoTorch:
    """Refuses torch, also to those who would take its failure for an answer."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "torch":
            tried.append(name)
            raise ImportError("torch is out of reach here")


sys.meta_path.insert(0, NoTorch())  # type: ignore[arg-type]  # all that is asked of it here


def command(*words: str | Path) -> dict[str, Any]:
    """What the command line prints with --json."""
    from pipeline.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main([*map(str, words), "--json"])
    assert status == 0, words
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def use_numpy_for_products() -> None:
    from pipeline.arrays import TypedArray
    from pipeline.layer.base import DeviceLayer
    from pipeline.layer.linear import FusedLinear

    class OnHost(DeviceLayer):
        kernel, runs_as = "numpy", "ieee"

        def __init__(self, layer: FusedLinear, _place: Any, out_dtype: Any, _chunk_rows: int) -> None:
            self.layer, self.out_dtype = layer, out_dtype

        def queue(self, x: Any, y: Any, first_row: int, stream: int, scratch: int) -> None:
            rows = host_array(x, self.layer.in_features, self.layer.dtype)
            results = self.layer.reference(TypedArray(rows, self.layer.dtype)).astype("float32")
            narrow = self.out_dtype.narrow
            target = host_array(y, self.layer.out_features, self.out_dtype)
            target[...] = results if narrow is None else narrow(results)

    FusedLinear.on = lambda self, *there: OnHost(self, *there)  # type: ignore[method-assign]


def host_array(rows: Any, features: int, dtype: Any) -> Any:
    import numpy as np

    n_bytes = rows.rows * features * dtype.itemsize
    memory = (ctypes.c_char * n_bytes).from_address(rows.address)
    return np.frombuffer(memory, dtype.carrier).reshape(rows.rows, features)


def run_files(device: str, folder: Path) -> list[str]:
    """The command line on files. What it has loaded of HEAVY comes back."""
    x, weights = folder / "x.npy", folder / "layer.safetensors"
    common = ("--weights", weights, "--devices", device, "--precision", "tf32", "--chunk-rows", "128")
    command("run", x, *common, "--out", folder / "plain.npy")
    loaded = sorted(HEAVY & set(sys.modules))
    command("run", x, *common, "--out", folder / "traced.npy", "--trace", folder / "trace.json")
    sys.stderr.isatty = lambda: True  # type: ignore[method-assign]
    command("run", x, *common, "--out", folder / "bar.npy")
    narrow = ("--weights", weights, "--devices", device, "--wire-dtype", "bf16", "--chunk-rows", "128")
    command("run", x, *narrow, "--out", folder / "wire.npy")
    assert "torch" in command("info")["versions"]
    return loaded


def run_arrays(device: str, folder: Path) -> None:
    """Python's own face, with the same results as the files'."""
    import numpy as np

    from pipeline import FusedLinear, Pipeline, RawFile, pin, run_pipelined
    from pipeline.arrays import TypedArray
    from pipeline.dtypes import BFLOAT16, narrow_bfloat16, widen_bfloat16

    layer = FusedLinear.from_file(folder / "layer.safetensors", precision="tf32")
    x, expected = np.load(folder / "x.npy"), np.load(folder / "plain.npy")

    def check(source: Any, out: Any = None) -> None:
        result = run_pipelined(layer, source, out, devices=device, chunk_rows=128)
        got = result.out if isinstance(result.out, np.ndarray) else np.load(result.out)
        np.testing.assert_array_equal(got, expected)
        assert result.stats.lines() and result.stats.as_dict()

    check(x)
    check(x, np.empty_like(expected))
    check(folder / "x.npy", folder / "again.npy")
    check(np.load(folder / "x.npy", mmap_mode="r"))
    x.tofile(folder / "x.bin")
    check(RawFile(folder / "x.bin", "float32", x.shape))
    check(iter(np.array_split(x, 7)))
    if device != "sim":
        with pin(x):
            check(x)
    with Pipeline(layer, devices=device, chunk_rows=128) as pipeline:
        streamed = np.concatenate(list(pipeline.stream(np.array_split(x, 7))))
    np.testing.assert_array_equal(streamed, expected)
    in_bf16 = FusedLinear.from_file(folder / "bf16.safetensors")
    narrow_bfloat16(x).tofile(folder / "x16.bin")
    done = run_pipelined(
        in_bf16, RawFile(folder / "x16.bin", "bf16", x.shape), RawFile(folder / "y16.bin"), devices=device
    )
    results = widen_bfloat16(np.fromfile(done.out.path, np.uint16).reshape(x.shape))
    np.testing.assert_allclose(results, in_bf16.reference(TypedArray(narrow_bfloat16(x), BFLOAT16)), 1e-2, 1e-2)


def make_files(folder: Path) -> None:
    import numpy as np

    from pipeline.dtypes import narrow_bfloat16

    random = np.random.default_rng(5)
    weight, bias = random.standard_normal((64, 64), np.float32) / 8, random.standard_normal(64, np.float32)
    write_safetensors(folder / "layer.safetensors", "F32", {"weight": weight, "bias": bias})
    rounded = {"weight": narrow_bfloat16(weight), "bias": narrow_bfloat16(bias)}
    write_safetensors(folder / "bf16.safetensors", "BF16", rounded)
    np.save(folder / "x.npy", random.standard_normal((1000, 64), np.float32))


def write_safetensors(path: Path, dtype: str, tensors: dict[str, Any]) -> None:
    """The format's own layout: its NumPy face writes no bfloat16 without the package ml_dtypes."""
    header, end = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (end, end + array.nbytes)}
        end += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values()))


if __name__ == "__main__":
    device, folder = sys.argv[1], Path(sys.argv[2])
    make_files(folder)
    if device == "sim":
        use_numpy_for_products()
    loaded = run_files(device, folder)
    run_arrays(device, folder)
    atexit.register(lambda: sys.stdout.write(json.dumps({"tried": tried, "loaded": loaded})))
