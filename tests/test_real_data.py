"""Real data through trained weights: scikit-learn's handwritten digits, against torch.nn.Linear in eager torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pipeline import FusedLinear, GemmSigmoidScalingResidualAdd, Pipeline, run_pipelined

SCALE = 2.0
HIDDEN = 150
DEVICES = ["cpu", "sim"]


class EagerModel(torch.nn.Module):
    """The network as people write it: torch.nn.Linear, the tail in eager torch, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.gemm = torch.nn.Linear(64, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, 10)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        z = self.gemm(x)
        return SCALE * torch.sigmoid(z) + z

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(x))


@dataclass
class Digits:
    """All 1797 digits, which of them the model never saw, and the model trained on the others."""

    x: Any  # (1797, 64) float32, 0 to 1
    y: Any  # (1797,) the digit
    unseen: Any  # row numbers
    model: EagerModel

    def eager(self, dtype: torch.dtype = torch.float32) -> Any:
        """The hidden layer of all digits in eager torch, as float64."""
        with torch.no_grad():
            x = torch.from_numpy(self.x).to(dtype)
            z = torch.nn.functional.linear(x, self.model.gemm.weight.to(dtype), self.model.gemm.bias.to(dtype))
            return (SCALE * torch.sigmoid(z) + z).double().numpy()

    def predicted(self, hidden: Any) -> Any:
        """The digit the head reads from the hidden layer's output."""
        with torch.no_grad():
            return self.model.head(torch.as_tensor(np.asarray(hidden, np.float32))).argmax(1).numpy()

    def accuracy(self, hidden: Any) -> float:
        return float((self.predicted(hidden) == self.y)[self.unseen].mean())


def train(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss = torch.zeros(())
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
    return loss.item()


@pytest.fixture(scope="module")
def digits() -> Digits:
    x, y = load_digits(return_X_y=True)
    x = np.ascontiguousarray(x / 16, np.float32)
    seen, unseen = train_test_split(np.arange(len(x)), test_size=0.25, random_state=0, stratify=y)
    torch.manual_seed(0)
    model = EagerModel()
    train(model, torch.from_numpy(x[seen]), torch.from_numpy(y[seen]), epochs=12)
    return Digits(x, y, unseen, model)


@pytest.fixture(scope="module")
def layer(digits: Digits) -> FusedLinear:
    return FusedLinear.from_linear(digits.model.gemm, SCALE)


def memmap(x: Any, folder: Path) -> Any:
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def npy_path(x: Any, folder: Path) -> Path:
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


def fortran_path(x: Any, folder: Path) -> Path:
    np.save(folder / "x.npy", np.asfortranarray(x))
    return folder / "x.npy"


def batches(x: Any) -> Iterator[Any]:
    """Batches of 1 to 300 rows."""
    at, sizes = 0, np.random.default_rng(0)
    while at < len(x):
        rows = int(sizes.integers(1, 300))
        yield x[at : at + rows].copy()
        at += rows


SOURCES: dict[str, Callable[[Any, Path], Any]] = {
    "array": lambda x, folder: x,
    "fortran-array": lambda x, folder: np.asfortranarray(x),
    "big-endian-array": lambda x, folder: x.astype(">f4"),
    "columns-of-a-table": lambda x, folder: np.hstack([x, x])[:, 32:96][:, np.r_[32:64, 0:32]],
    "memmap": memmap,
    "path": npy_path,
    "fortran-path": fortran_path,
    "tensor": lambda x, folder: torch.from_numpy(x),
    "generator": lambda x, folder: batches(x),
    "list-of-batches": lambda x, folder: list(batches(x)),
}


def test_real_data_model_reads_the_digits(digits: Digits) -> None:
    """The weights are trained ones: what follows is about a network that works."""
    assert digits.x.shape == (1797, 64)
    assert digits.accuracy(digits.eager()) > 0.95


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("source", SOURCES)
def test_real_data_from_every_source_equals_eager(
    digits: Digits, layer: FusedLinear, tmp_path: Path, source: str, device: str
) -> None:
    result = run_pipelined(layer, SOURCES[source](digits.x, tmp_path), devices=device, chunk_rows=256)
    out = np.asarray(result.out)
    assert out.shape == (1797, HIDDEN) and out.dtype == np.float32
    np.testing.assert_array_equal(out, layer(digits.x))
    np.testing.assert_allclose(out, digits.eager(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(digits.predicted(out), digits.predicted(digits.eager()))
    assert digits.accuracy(out) == digits.accuracy(digits.eager())
    assert result.stats.rows == 1797


@pytest.mark.parametrize("device", DEVICES)
def test_real_data_error_is_no_larger_than_eager(digits: Digits, layer: FusedLinear, device: str) -> None:
    expected = layer.reference(digits.x)
    ours = np.linalg.norm(run_pipelined(layer, digits.x, devices=device).out - expected)
    assert ours <= 1.05 * np.linalg.norm(digits.eager() - expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_real_data_in_other_types_equals_eager(digits: Digits, dtype: torch.dtype, device: str) -> None:
    gemm = torch.nn.Linear(64, HIDDEN, dtype=dtype)
    gemm.load_state_dict(digits.model.gemm.state_dict())
    layer = FusedLinear.from_linear(gemm, SCALE)
    x = torch.from_numpy(digits.x).to(dtype)
    result = run_pipelined(layer, x, devices=device, chunk_rows=300)
    assert result.out.dtype == dtype
    out, expected = result.out.double().numpy(), layer.reference(x)
    if dtype == torch.float64:
        np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)
    else:
        assert np.linalg.norm(out - expected) <= 1.05 * np.linalg.norm(digits.eager(dtype) - expected)
    # 16-bit rounding may move a digit on the border between two: at most one in 200.
    assert abs(digits.accuracy(out) - digits.accuracy(digits.eager())) <= 0.005


@pytest.mark.parametrize("device", DEVICES)
def test_real_data_from_weights_file_and_path_to_path(digits: Digits, tmp_path: Path, device: str) -> None:
    save_file({f"gemm.{name}": value for name, value in digits.model.gemm.state_dict().items()}, tmp_path / "l.st")
    layer = FusedLinear.from_file(tmp_path / "l.st", SCALE)
    run_pipelined(layer, npy_path(digits.x, tmp_path), tmp_path / "y.npy", devices=device, chunk_rows=100)
    out = np.load(tmp_path / "y.npy")
    np.testing.assert_allclose(out, digits.eager(), rtol=1e-5, atol=1e-5)
    assert digits.accuracy(out) == digits.accuracy(digits.eager())


@pytest.mark.parametrize("device", DEVICES)
def test_real_data_streams_batch_by_batch(digits: Digits, layer: FusedLinear, device: str) -> None:
    expected = digits.eager()
    at = 0
    with Pipeline(layer, devices=device, chunk_rows=128) as pipeline:
        for out in pipeline.stream(batches(digits.x)):
            np.testing.assert_allclose(out, expected[at : at + len(out)], rtol=1e-5, atol=1e-5)
            at += len(out)
    assert at == 1797


def test_real_data_chunk_sizes_and_devices_do_not_change_a_bit(digits: Digits, layer: FusedLinear) -> None:
    expected = layer(digits.x)
    for chunk_rows in (1, 63, 64, 1000, 5000):
        for device in DEVICES if chunk_rows > 1 else ["cpu"]:
            out = run_pipelined(layer, digits.x, devices=device, chunk_rows=chunk_rows, num_streams=3).out
            np.testing.assert_array_equal(out, expected)


def test_real_data_module_trains_to_the_same_accuracy(digits: Digits) -> None:
    """The fused module with its own backward learns the digits; its weights then serve the pipeline."""
    torch.manual_seed(0)
    module = GemmSigmoidScalingResidualAdd(64, HIDDEN, SCALE)
    network = torch.nn.Sequential(module, torch.nn.Linear(HIDDEN, 10))
    seen = np.setdiff1d(np.arange(1797), digits.unseen)
    train(network, torch.from_numpy(digits.x[seen]), torch.from_numpy(digits.y[seen]), epochs=12)
    hidden = run_pipelined(FusedLinear.from_linear(module.gemm, SCALE), digits.x, devices="cpu").out
    with torch.no_grad():
        predicted = network[1](torch.from_numpy(hidden)).argmax(1).numpy()
    accuracy = (predicted == digits.y)[digits.unseen].mean()
    assert abs(accuracy - digits.accuracy(digits.eager())) <= 0.02
