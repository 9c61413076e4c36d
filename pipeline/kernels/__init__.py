"""How a GPU computes the layer: which kernel (`choose`), its machine code (`compile`, `cache`), its launch (`launch`),
and the launches of a whole layer (`fused_layer`). Each kernel of csrc/gpu has a host twin of its name here.

Importing this package imports nothing, so that `start` can start the driver before anything else is imported; `compile`
and `driver` load their CUDA libraries at the first call.
"""
