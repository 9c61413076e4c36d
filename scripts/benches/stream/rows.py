"""The layer that a stream bench runs, its rows in pinned and in ordinary memory, and the result in float64."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benches.ceilings import Copier, bare_copies
from benches.common import GIB
from benches.layers import larger, random_layer
from benches.pages import free_bytes

BUS_BYTES = 2 * GIB  # pinned memory each way where the arrays take most of what there is: beyond all caches
LATER = 3  # arrays that cases make: in torch's small pages, both ends, and a fresh result


@dataclass(frozen=True)
class Memory:
    """Four flat float32 arrays, taken as they come: two ordinary ones, and two that are pinned, as long as these where
    there is room for that. All are NumPy's, which asks for huge pages, and written before."""

    ordinary: list[Any]
    pinned: list[Any]

    @classmethod
    def take(cls, length: int) -> Memory:
        """Ends the program where memory is short even for two long arrays, two short ones and a result."""
        import torch

        free = free_bytes()
        pinned_length = length if (4 + LATER) * 4 * length <= free else min(length, BUS_BYTES // 4)
        need = 4 * (3 * length + 2 * pinned_length)
        if need > free:
            raise SystemExit(
                f"the arrays of this bench take {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free for it: pass a "
                f"smaller --gib"
            )
        arrays = [np.empty(n, np.float32) for n in (length, length, pinned_length, pinned_length)]
        for array in arrays:
            torch.from_numpy(array).zero_()
        for array in arrays[2:]:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0))
        return cls(arrays[:2], arrays[2:])

    @property
    def roomy(self) -> bool:
        """Whether the pinned arrays are as long as the others, and there is memory for more of that length."""
        return len(self.pinned[0]) == len(self.ordinary[0])

    def close(self) -> None:
        import torch

        torch.cuda.synchronize()
        for array in self.pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(array.ctypes.data))


@dataclass(frozen=True)
class Rows:
    """The layer, x and y as torch's views of pinned and of ordinary memory, and the float64 result, rounded to float32,
    on the GPU. The pinned ones have fewer rows where `memory` isn't roomy."""

    layer: Any
    precision: str
    memory: Memory
    copier: Copier
    x: Any
    y: Any
    x_pinned: Any
    y_pinned: Any
    want: Any

    @classmethod
    def make(cls, memory: Memory, copier: Copier, rows: int, widths: tuple[int, int], precision: str) -> Rows:
        """Rows for a layer of `widths`, in_features and out_features, at the beginning of that memory."""
        import torch

        def view(flat: Any, features: int) -> Any:
            there = min(rows, len(flat) // features)
            return torch.from_numpy(flat[: there * features]).view(there, features)

        in_features, out_features = widths
        made = cls(
            random_layer(in_features, precision, out_features),
            precision,
            memory,
            copier,
            view(memory.ordinary[0], in_features),
            view(memory.ordinary[1], out_features),
            view(memory.pinned[0], in_features),
            view(memory.pinned[1], out_features),
            torch.empty(rows, out_features, device="cuda"),
        )
        made.fill()
        return made

    def fill(self) -> None:
        """Give x its rows, the same every time. Another layer in the same memory leaves its own there."""
        import torch

        torch.manual_seed(0)
        w, b = (torch.from_numpy(array).cuda().double() for array in (self.layer.weight, self.layer.bias))
        for row in range(0, len(self.x), 8192):
            part = torch.randn(min(8192, len(self.x) - row), self.x.shape[1], device="cuda")
            staged = self.x_pinned[: len(part)]  # the GPU copies to pinned memory several times faster
            self.x[row : row + 8192].copy_(staged.copy_(part))
            z = torch.addmm(b, part.double(), w.T)
            self.want[row : row + 8192] = 2.0 * torch.sigmoid(z) + z
        self.x_pinned.copy_(self.x[: len(self.x_pinned)])

    def first(self, rows: int) -> Rows:
        """The first of these rows."""
        parts = {name: getattr(self, name)[:rows] for name in ("x", "y", "x_pinned", "y_pinned", "want")}
        return replace(self, **parts)

    def without_precision(self) -> Any:
        """The same layer without a precision of its own: the wire's element type is its precision."""
        from pipeline import FusedLinear

        return FusedLinear(self.layer.weight, self.layer.bias, self.layer.scaling_factor)

    def ceiling_s(self) -> float:
        """Seconds of the bare copies of as many bytes as x and y have, again and again over the pinned ones."""
        share = len(self.x) / len(self.x_pinned)
        return bare_copies(self.x_pinned, self.y_pinned, math.ceil(share)) * share / math.ceil(share)

    def copied_gb_per_s(self) -> float:
        """The rate of the copy workers alone, from array to array."""
        return int(self.x.nbytes) / self.copier.seconds(self.y.numpy().reshape(-1), self.x.numpy().reshape(-1)) / 1e9

    def worst_difference(self, y: Any) -> float:
        """The largest |y - reference| / (1 + |reference|) over all rows. NaN where y has one."""
        import torch

        y = torch.as_tensor(y)
        worst = 0.0
        for row in range(0, len(self.want), 65536):
            want = self.want[row : row + 65536]
            difference = ((y[row : row + 65536].cuda() - want).abs() / (1 + want.abs())).max().item()
            worst = larger(worst, difference)
        return worst


_made: dict[tuple[float, int, str], Rows] = {}


def rows_for(options: argparse.Namespace, *, whole_pinned: bool = True) -> Rows:
    """The rows that the options ask for, made once a process and shared by its cases.

    Raises:
        SystemExit: memory is short, for all of them in pinned memory too if the case needs that.
    """
    key = options.gib, options.features, options.precision
    if key not in _made:
        rows, widths = int(options.gib * GIB) // (options.features * 4), (options.features, options.features)
        _made[key] = Rows.make(Memory.take(rows * options.features), Copier(), rows, widths, options.precision)
    if whole_pinned and not _made[key].memory.roomy:
        raise SystemExit(
            f"this case takes more arrays of {options.gib:g} GiB than fit into memory: pass a smaller --gib; the cases "
            f"memory, short and pin can do with fewer"
        )
    return _made[key]


def release() -> None:
    """Give back what `rows_for` made."""
    while _made:
        _, rows = _made.popitem()
        rows.memory.close()
        rows.copier.close()
