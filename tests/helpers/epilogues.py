"""An epilogue from outside of the package, with a scalar and a vector."""

from __future__ import annotations

from typing import Any

import pipeline


class ScaledShift(pipeline.Epilogue):
    scale: float
    shift: pipeline.ByFeature
    cuda = "return parameters.scale * z + parameters.shift[column];"

    def numpy(self, z: Any) -> Any:
        return self.scale * z + self.shift

    torch = numpy
