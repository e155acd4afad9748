"""ONNX by jax2onnx, for ONNX Runtime: one file for any batch size; int8 by ONNX Runtime's own quantizer."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdistill.errors import RunError
from jdistill.export.model import Deployable
from jdistill.export.runtimes import require

FILE = "model.onnx"
JAX2ONNX = "0.17.1"
CALIBRATION_BATCH = 256


def write(deployable: Deployable, folder: Path, int8: str) -> dict[str, int | None]:
    """Writes `model.onnx`, weights inside; returns {file name: its batch size, None for any}.

    Args:
      int8: `none`; `dynamic`, int8 weights and activations whose ranges are taken at each call; `static`, ranges
        taken from training inputs (QDQ, uint8 activations, int8 weights with a scale for each output channel).
    """
    require("onnx")
    from onnxruntime.quantization import quant_pre_process

    with tempfile.TemporaryDirectory() as temporary:
        raw, clean = Path(temporary) / "raw.onnx", Path(temporary) / "clean.onnx"
        raw.write_bytes(_converted(deployable))
        with _quiet():
            quant_pre_process(
                str(raw), str(clean), skip_symbolic_shape=True
            )  # folds BatchNorm and constants, removes pairs of transposes
        if int8 == "none":
            (folder / FILE).write_bytes(clean.read_bytes())
        else:
            with _quiet():
                _quantized(deployable, clean, folder / FILE, int8)
    return {FILE: None}


def _converted(deployable: Deployable) -> bytes:
    import jax2onnx

    specs = [jax.ShapeDtypeStruct(("B", *shape), dtype) for shape, dtype in deployable.specs.values()]  # type: ignore[arg-type]
    with _without_transpose_pairs(), _quiet():
        proto = jax2onnx.to_onnx(
            deployable.unrolled, specs, model_name="jdistill", input_names=list(deployable.specs), output_names=["logits"],
            normalization_mode="prefer_native",
        )  # fmt: skip
    _drop_scalar_biases(proto.graph)
    return proto.SerializeToString()


def _drop_scalar_biases(graph: Any) -> None:
    """Gemm without its third input where that is a scalar 0, which ONNX Runtime's static quantizer cannot read."""
    from onnx import numpy_helper

    zero = {one.name for one in graph.initializer if not one.dims and not numpy_helper.to_array(one).any()}
    for node in graph.node:
        if node.op_type == "Gemm" and len(node.input) == 3 and node.input[2] in zero:
            del node.input[2]


@contextlib.contextmanager
def _without_transpose_pairs() -> Iterator[None]:
    """jax2onnx without the pass that breaks residual networks.

    In 0.17.1 it removes transposes around a strided projection that are no pair: ONNX Runtime then refuses the file. What
    is left of them `quant_pre_process` removes. The name is private, therefore the version is checked.
    """
    import importlib.metadata

    import jax2onnx.converter.ir_optimizations as passes

    found = importlib.metadata.version("jax2onnx")
    if found != JAX2ONNX or not any("transpose_pairs" in one.name for one in passes._OPTIMIZER_PASSES):
        raise RunError(f"export to onnx is made for jax2onnx {JAX2ONNX}, found {found}: pip install jax2onnx=={JAX2ONNX}")
    every = passes._OPTIMIZER_PASSES
    passes._OPTIMIZER_PASSES = tuple(one for one in every if "transpose_pairs" not in one.name)
    try:
        yield
    finally:
        passes._OPTIMIZER_PASSES = every


def _quantized(deployable: Deployable, source: Path, target: Path, int8: str) -> None:
    from onnxruntime import quantization as q

    if int8 == "dynamic":
        q.quantize_dynamic(str(source), str(target), weight_type=q.QuantType.QInt8, per_channel=True)
        return
    q.quantize_static(
        str(source), str(target), _reader(deployable), quant_format=q.QuantFormat.QDQ, per_channel=True,
        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,  # int8 activations are slower than float32 here
    )  # fmt: skip


def _reader(deployable: Deployable) -> Any:
    """Training inputs in batches, as ONNX Runtime asks for them."""
    from onnxruntime.quantization import CalibrationDataReader

    rows = deployable.calibration()
    batches = [
        dict(zip(deployable.specs, deployable.inputs(rows[i : i + CALIBRATION_BATCH]), strict=True))
        for i in range(0, len(rows), CALIBRATION_BATCH)
    ]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries write about their progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
