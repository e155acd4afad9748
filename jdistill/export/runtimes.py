"""An exported model, loaded into its runtime: NumPy in, NumPy out."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdistill.errors import UsageError
from jdistill.export.card import Card, read_card

MODULES = {
    "onnx": ("onnx", "onnxruntime", "jax2onnx"),
    "litert": ("ai_edge_litert", "litert_converter", "ai_edge_quantizer"),
}
LOADING = {"onnx": ("onnxruntime",), "litert": ("ai_edge_litert",)}
Call = Callable[..., np.ndarray]


class Runner:
    """An exported model.

    Attributes:
      card: what its card says.
      names: of its inputs, in order.
    """

    def __init__(self, folder: Path, card: Card, threads: int):
        self.card, self.names = card, tuple(given["name"] for given in card["inputs"])
        open_file = {"stablehlo": _stablehlo, "onnx": _onnx, "litert": _litert}[card["runtime"]]
        self._calls = {about["batch"]: open_file(folder / name, self.names, threads) for name, about in card["files"].items()}

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that were checked; of files that take any, others work too."""
        return tuple(verdict["batch"] for verdict in self.card["parity"])

    def passed(self, batch: int) -> bool:
        """Whether the outputs at this batch size were compared with JAX's, and were close enough: see `parity`."""
        return any(verdict["batch"] == batch and verdict["passed"] for verdict in self.card["parity"])

    def inputs(self, raw: np.ndarray) -> tuple[np.ndarray, ...]:
        """What to call it with for raw rows of the data: images, rows of a table, or requests [B, 1 + L] int32."""
        if self.names == ("inputs",):
            return (raw,)
        parts = {"user": raw[:, 0], "history": raw[:, 1:]}
        return tuple(np.ascontiguousarray(parts[name], np.int32) for name in self.names)

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """Logits [B, K] float32 of inputs [B, ...], in the order of `names`.

        Raises:
          UsageError: a batch size that no file was made for.
        """
        call = self._calls.get(None) or self._calls.get(len(inputs[0]))
        if call is None:
            sizes = ", ".join(str(size) for size in self._calls)
            raise UsageError(f"no file for batches of {len(inputs[0])}, only of {sizes}; export with --batch {len(inputs[0])}")
        return call(*inputs)


def load(folder: Path, threads: int = 1) -> Runner:
    """The model in a folder that `jdistill export` wrote, once its files are found to be those that were checked.

    `threads` counts for ONNX Runtime and LiteRT; XLA on a CPU takes all cores that the process may use.

    Raises:
      UsageError: no card there, or the runtime is not installed.
      RunError: a file is missing or was changed.
    """
    card = read_card(folder)
    require(card["runtime"], LOADING)
    return Runner(folder, card, threads)


def require(runtime: str, modules: Mapping[str, tuple[str, ...]] = MODULES) -> None:
    """Raises `UsageError` naming the extra to install where a runtime's modules are missing."""
    for module in modules.get(runtime, ()):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"{runtime} needs {module}, which is not installed: pip install 'jdistill[{runtime}]'")


def _stablehlo(path: Path, names: tuple[str, ...], threads: int) -> Call:
    import jax

    del names, threads
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    call = jax.jit(exported.call)
    return lambda *inputs: np.asarray(call(*inputs))


def _onnx(path: Path, names: tuple[str, ...], threads: int) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))[0]


def _litert(path: Path, names: tuple[str, ...], threads: int) -> Call:
    from ai_edge_litert.interpreter import Interpreter

    interpreter: Any = Interpreter(model_path=str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (signature,) = interpreter.get_signature_list()
    places = interpreter.get_signature_runner(signature).get_input_details()
    given = [places[name]["index"] for name in names]
    (output,) = (about["index"] for about in interpreter.get_output_details())

    def call(*inputs: np.ndarray) -> np.ndarray:
        for index, array in zip(given, inputs, strict=True):
            interpreter.set_tensor(index, array)
        interpreter.invoke()
        return interpreter.get_tensor(output)

    return call
