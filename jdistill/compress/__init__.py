"""Compression of a trained student: pruning, quantization, and the artifact that is measured."""

from jdistill.compress.base import Compressor, NoCompression, Quantized, apply_all
from jdistill.compress.prune import MagnitudePrune
from jdistill.compress.quantize import Int8Weights

__all__ = ["Compressor", "Int8Weights", "MagnitudePrune", "NoCompression", "Quantized", "apply_all"]
