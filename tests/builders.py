"""Small files for tests: tensors, PEFT folders, an ONNX model as torch's TorchScript exporter writes it."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

from loraformat.adapter import Adapter
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.errors import LoraformatError
from loraformat.problems import Problem
from loraformat.rules import check_adapter

Factors = tuple[NDArray[Any], NDArray[Any]]
"""A `(rank, in, *kernel)` and B `(out, rank, 1 ...)`."""


def write_tensors(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file with the safetensors package, which must not be handed strided arrays."""
    contiguous = {name: np.array(array, order="C", copy=True) for name, array in arrays.items()}
    save_file(contiguous, str(path), metadata=dict(metadata) if metadata is not None else None)
    return path


def lora_factors(
    rng: np.random.Generator, out: int, inner: int, rank: int, dtype: np.typing.DTypeLike = np.float32
) -> Factors:
    """Return random A `(rank, inner)` and B `(out, rank)`."""
    down = rng.standard_normal((rank, inner)).astype(dtype)
    return down, rng.standard_normal((out, rank)).astype(dtype)


def write_peft(
    folder: Path,
    factors: Mapping[str, Factors],
    *,
    r: int | None = None,
    alpha: float | None = 16,
    prefix: str = "base_model.model.",
    **config_fields: Any,
) -> Path:
    """Write a PEFT folder of linear or convolution targets; `r` of None is the rank of the first target."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for target, (down, up) in factors.items():
        arrays[f"{prefix}{target}.lora_A.weight"] = down
        arrays[f"{prefix}{target}.lora_B.weight"] = up
    write_tensors(folder / "adapter_model.safetensors", arrays, {"format": "pt"})
    rank = r if r is not None else next((down.shape[0] for down, _ in factors.values()), 8)
    write_config(folder, {"r": rank, "lora_alpha": alpha, **config_fields})
    return folder


def write_config(folder: Path, fields: Mapping[str, Any]) -> Path:
    """Write `adapter_config.json`; a field of `...` is left out, and so is `lora_alpha` of None."""
    known = {"peft_type": "LORA", "base_model_name_or_path": "a/base", "bias": "none", "fan_in_fan_out": False}
    given = {name: value for name, value in (known | dict(fields)).items() if value is not ...}
    if given.get("lora_alpha", ...) is None:
        del given["lora_alpha"]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    return path


def make_onnx(weights: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """Return a model in the TorchScript exporter's style: one linear module without bias for each weight.

    Args:
        weights: module path to `(out, in)`; module `a.b` has the input `in.a.b` and the output `out.a.b`. The stored
            weight is `(in, out)` and anonymous (`onnx::MatMul_100`); only the node's name tells the module.
    """
    nodes, initializers, inputs, outputs = [], [], [], []
    for position, (module, weight) in enumerate(weights.items()):
        anonymous = f"onnx::MatMul_{100 + position}"
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), anonymous))
        # The exporter keeps the index of a ModuleList behind its name: /model/layers.0/mlp/MatMul
        path = re.sub(r"\.(?!\d+(\.|$))", "/", module)
        node_inputs = [f"in.{module}", anonymous]
        nodes.append(helper.make_node("MatMul", node_inputs, [f"out.{module}"], name=f"/{path}/MatMul"))
        kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
        inputs.append(helper.make_tensor_value_info(f"in.{module}", kind, ["rows", weight.shape[1]]))
        outputs.append(helper.make_tensor_value_info(f"out.{module}", kind, ["rows", weight.shape[0]]))
    graph = helper.make_graph(nodes, "main_graph", inputs, outputs, initializers)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
        producer_name="pytorch",
        producer_version="2.9.0",
    )
    onnx.checker.check_model(model)
    return model


def write_onnx(path: Path, weights: Mapping[str, NDArray[Any]], *, external: bool = False) -> Path:
    """Write `make_onnx(weights)`; with `external`, its weights into `<name>.data` beside it."""
    model = make_onnx(weights)
    if external:
        onnx.save_model(
            model,
            str(path),
            save_as_external_data=True,
            location=f"{path.name}.data",
            size_threshold=0,
            convert_attribute=False,
        )
    else:
        onnx.save_model(model, str(path))
    return path


def read_onnx(path: Path) -> dict[str, NDArray[Any]]:
    """Return every initializer of a model as onnx reads it."""
    model = onnx.load(str(path))
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@dataclass(frozen=True, eq=False)
class MemoryFactor:
    """A `loraformat.adapter.Factor` that lives in memory; one that is `sealed` fails the test that reads it."""

    name: str
    array: NDArray[Any]
    sealed: bool = False

    @property
    def dtype(self) -> Dtype:
        return BY_NAME[self.array.dtype.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def elements(self) -> int:
        return self.array.size

    def read(self) -> NDArray[Any]:
        assert not self.sealed, f"{self.name} was read"
        return self.array.copy()


def find_errors(read: Callable[[], Adapter]) -> list[Problem]:
    """Return everything that stands against merging what `read` returns, whether it raises or lists it."""
    try:
        adapter = read()
    except LoraformatError as error:
        return list(error.problems)
    return [problem for problem in check_adapter(adapter) if problem.severity == "error"]
