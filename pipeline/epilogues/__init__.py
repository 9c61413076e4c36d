"""What follows the linear layer's product in the same kernel: the epilogue that ships, and what makes a new one.

A file of this package is one epilogue, and nothing outside it knows the function.
"""

from pipeline.epilogues.base import ByFeature, Epilogue, EpilogueCode
from pipeline.epilogues.sigmoid_scale_residual import SigmoidScaleResidual

__all__ = ["DEFAULT_EPILOGUE", "ByFeature", "Epilogue", "EpilogueCode", "SigmoidScaleResidual"]

DEFAULT_EPILOGUE = SigmoidScaleResidual  # that of a layer which names none
