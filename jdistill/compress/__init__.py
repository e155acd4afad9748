"""Compression of a student: pruning, quantization, low rank, sharing, sequences of them; and the artifact that is measured."""

from jdistill.compress.activations import Activations
from jdistill.compress.base import Compressor, NoCompression, Quantized, Stored, Training, apply_all, enter, finished
from jdistill.compress.embeddings import EmbeddingDims, EmbeddingRows, HashEmbedding, PQEmbedding, QREmbedding
from jdistill.compress.extreme import Binary, Ternary
from jdistill.compress.integer import integer_model
from jdistill.compress.learned import MovementPrune, SoftThreshold
from jdistill.compress.low_rank import LowRank
from jdistill.compress.pipeline import Pipeline, pipeline
from jdistill.compress.prune import MagnitudePrune, NMPrune
from jdistill.compress.quantize import IntegerWeights
from jdistill.compress.rewinding import Ticket
from jdistill.compress.row_quantize import RowInt4, RowInt8
from jdistill.compress.sensitivity import MixedPrecision
from jdistill.compress.sharing import WeightSharing
from jdistill.compress.structured import StructuredPrune

__all__ = [
    "Activations", "Binary", "Compressor", "EmbeddingDims", "EmbeddingRows", "HashEmbedding", "IntegerWeights", "LowRank",
    "MagnitudePrune", "MixedPrecision", "MovementPrune", "NMPrune", "NoCompression", "PQEmbedding", "Pipeline", "QREmbedding",
    "Quantized", "RowInt4", "RowInt8", "SoftThreshold", "Stored", "StructuredPrune", "Ternary", "Ticket", "Training",
    "WeightSharing", "apply_all", "enter", "finished", "integer_model", "pipeline",
]  # fmt: skip
