"""A second kind of layer, made of public names only: a torch module, wherever devices compute."""

from __future__ import annotations

import copy
from typing import Any

import pipeline


class TorchLayer(pipeline.Layer):
    def __init__(self, module: Any, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, "float32")
        self.module = module

    def on(self, place: Any, out_dtype: Any, chunk_rows: int) -> pipeline.DeviceLayer:
        return TorchOnDevice(self, place, out_dtype)


class TorchOnDevice(pipeline.DeviceLayer):
    kernel, runs_as = "a torch module", "ieee"

    def __init__(self, layer: TorchLayer, place: Any, out_dtype: Any) -> None:
        self.layer, self.place, self.out_dtype = layer, place, out_dtype
        with place.torch_stream(place.stream):
            self.module = copy.deepcopy(layer.module).to(place.torch_device).requires_grad_(False)

    def queue(self, x: Any, y: Any, first_row: int, stream: int, scratch: int) -> None:
        with self.place.torch_stream(stream):
            rows = x.tensor(self.layer.in_features, self.layer.dtype)
            y.tensor(self.layer.out_features, self.out_dtype).copy_(self.module(rows))
