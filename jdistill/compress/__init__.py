"""Compression of a trained student: pruning, quantization, sequences of them, and the artifact that is measured."""

from jdistill.compress.base import Compressor, NoCompression, Quantized, Stored, Training, apply_all, enter, finished
from jdistill.compress.pipeline import Pipeline, pipeline
from jdistill.compress.prune import MagnitudePrune
from jdistill.compress.quantize import Int8Weights

__all__ = [
    "Compressor", "Int8Weights", "MagnitudePrune", "NoCompression", "Pipeline", "Quantized", "Stored", "Training", "apply_all",
    "enter", "finished", "pipeline",
]  # fmt: skip
