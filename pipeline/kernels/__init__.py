"""How a GPU computes the layer: which kernel (`select`), its machine code (`compile`) and its launch (`launch`).

Importing this package imports no CUDA library; `compile` and `launch` load theirs at the first call.
"""

from pipeline.kernels.choose import ARCHITECTURES, Problem, Variant, all_variants, runs_as, select

__all__ = ["ARCHITECTURES", "Problem", "Variant", "all_variants", "runs_as", "select"]
