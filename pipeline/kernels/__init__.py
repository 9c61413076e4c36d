"""How a GPU computes the layer: which kernel (`choose`), its machine code (`compile`), its launch (`launch`), and the
launches of a whole layer (`fused_layer`). Each kernel of csrc/gpu has a host twin of its name here.

Importing this package imports no CUDA library; `compile` and `launch` load theirs at the first call.
"""

from pipeline.kernels.choose import ARCHITECTURES, Problem, Variant, all_variants, runs_as, select

__all__ = ["ARCHITECTURES", "Problem", "Variant", "all_variants", "runs_as", "select"]
