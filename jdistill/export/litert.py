"""LiteRT (TensorFlow Lite) by jax.export and litert-converter: a file for each batch size; int8 by ai-edge-quantizer."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdistill.errors import RunError
from jdistill.export.model import Deployable
from jdistill.export.runtimes import require

CONVERTER = "0.5.0"
SIGNATURE = "serving_default"


def write(deployable: Deployable, folder: Path, int8: str, batches: Sequence[int]) -> dict[str, int | None]:
    """Writes `model_b1.tflite` and so on, weights inside; returns {file name: its batch size}.

    Args:
      int8: `none`; `dynamic`, int8 weights and activations whose ranges are taken at each call; `static`, ranges taken
        from training inputs. Inputs and logits keep their dtypes.
    """
    require("litert")
    files: dict[str, int | None] = {}
    for batch in batches:
        path = folder / f"model_b{batch}.tflite"
        converted = _converted(deployable, batch)
        path.write_bytes(converted if int8 == "none" else _quantized(deployable, converted, int8, batch))
        files[path.name] = batch
    return files


def _converted(deployable: Deployable, batch: int) -> bytes:
    """The float32 flatbuffer. The converter's interface is not documented, therefore the version is checked."""
    import importlib.metadata

    from litert_converter import converter_api_ext as converter
    from litert_converter.mlir import ir, passmanager

    found = importlib.metadata.version("litert-converter")
    if found != CONVERTER:
        raise RunError(
            f"export to litert is made for litert-converter {CONVERTER}, found {found}: "
            f"pip install litert-converter=={CONVERTER}"
        )
    specs = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in deployable.specs.values()]
    text = jax.export.export(jax.jit(deployable.unrolled), platforms=("cpu",))(*specs).mlir_module()
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(text)
        converter.set_signature(module.operation, SIGNATURE, list(deployable.specs), ["logits"])
        converter.run_convert_to_tfl_passes(module, passmanager.PassManager("builtin.module"), converter.ConvertToTFLConfig())
        return converter.export_flatbuffer_to_bytes(module.operation)


def _quantized(deployable: Deployable, converted: bytes, int8: str, batch: int) -> bytes:
    from ai_edge_quantizer import qtyping, quantizer, recipe

    with _quiet():
        made = quantizer.Quantizer(bytearray(converted))
        if int8 == "dynamic":
            made.load_quantization_recipe(recipe.dynamic_wi8_afp32())
            return bytes(made.quantize().quantized_model)
        made.load_quantization_recipe(recipe.static_wi8_ai8())
        for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            made.update_quantization_recipe(".*", end, algorithm_key="no_quantize")
        return bytes(made.quantize(_ranges(deployable, converted, batch, made)).quantized_model)


def _ranges(deployable: Deployable, converted: bytes, batch: int, made: Any) -> dict[str, Any]:
    """Smallest and largest value of each tensor over the calibration rows, so that files of all batch sizes agree.

    The quantizer's own `calibrate` takes moving averages of them, which single rows leave far too narrow.
    """
    from ai_edge_quantizer import calibrator, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    rows = deployable.calibration()
    rows = np.resize(rows, (-(-len(rows) // batch) * batch, *rows.shape[1:]))  # filled up with rows that count already
    parts = (deployable.inputs(rows[i : i + batch]) for i in range(0, len(rows), batch))
    data = [dict(zip(deployable.specs, part, strict=True)) for part in parts]
    wanted = recipe_manager.RecipeManager()
    wanted.load_quantization_recipe(made.get_quantization_recipe())
    found = calibrator.Calibrator(bytes(converted), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    found.calibrate({SIGNATURE: data}, wanted)
    return found.get_model_qsvs()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress that the quantizer prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
