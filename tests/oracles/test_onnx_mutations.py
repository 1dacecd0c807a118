"""Graphs that compute the same in another way, as tools and people leave them: merged right, or refused; never wrong.

Each draw takes an exported model through a few changes that keep its results. Whatever the merge does then, it must be
PEFT's unmerged model, or a refusal with a reason.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxruntime"):
    pytest.importorskip(_package, reason=f"these tests need {_package}")

Draw = random.Random
DRAWS = 8


def _matrices(model: onnx.ModelProto, draw: Draw, count: int = 3) -> list[onnx.TensorProto]:
    found = [
        each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT and len(each.dims) == 2
    ]
    return draw.sample(found, min(count, len(found)))


def _replace_reads(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new


def _store(tensor: onnx.TensorProto, array: Any) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def _behind(model: onnx.ModelProto, tensor: onnx.TensorProto, kind: str, *beside: str, **more: Any) -> None:
    """Put a node between a tensor and all that reads it."""
    name = f"{tensor.name}_{kind}"
    _replace_reads(model, tensor.name, name)
    model.graph.node.insert(0, helper.make_node(kind, [tensor.name, *beside], [name], **more))


def _constant(model: onnx.ModelProto, name: str, array: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def rename_values(model: onnx.ModelProto, draw: Draw) -> None:
    fixed = {each.name for each in (*model.graph.input, *model.graph.output)}
    names: dict[str, str] = {}
    for tensor in model.graph.initializer:
        tensor.name = names.setdefault(tensor.name, f"t{len(names)}")
    for node in model.graph.node:
        for values in (node.input, node.output):
            for position, name in enumerate(values):
                if name and name not in fixed:
                    values[position] = names.setdefault(name, f"t{len(names)}")
    del model.graph.value_info[:]


def drop_node_names(model: onnx.ModelProto, draw: Draw) -> None:
    for node in model.graph.node:
        if draw.random() < 0.5:
            node.ClearField("name")


def drop_metadata(model: onnx.ModelProto, draw: Draw) -> None:
    for node in model.graph.node:
        node.ClearField("metadata_props")


def to_constants(model: onnx.ModelProto, draw: Draw) -> None:
    for tensor in _matrices(model, draw):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        model.graph.initializer.remove(tensor)


def behind_identity(model: onnx.ModelProto, draw: Draw) -> None:
    for tensor in _matrices(model, draw):
        _behind(model, tensor, "Identity")


def behind_transpose(model: onnx.ModelProto, draw: Draw) -> None:
    for tensor in _matrices(model, draw):
        _store(tensor, numpy_helper.to_array(tensor).T)
        _behind(model, tensor, "Transpose", perm=[1, 0])


def behind_reshape(model: onnx.ModelProto, draw: Draw) -> None:
    for tensor in _matrices(model, draw):
        shape = _constant(model, f"{tensor.name}_shape", np.array(tensor.dims, np.int64))
        _store(tensor, numpy_helper.to_array(tensor).reshape(draw.choice([(-1,), tuple(tensor.dims)[::-1]])))
        _behind(model, tensor, "Reshape", shape)


def behind_product(model: onnx.ModelProto, draw: Draw) -> None:
    for tensor in _matrices(model, draw):
        half = _constant(model, f"{tensor.name}_half", np.float32(0.5))
        _store(tensor, numpy_helper.to_array(tensor) * np.float32(2))
        _behind(model, tensor, "Mul", half)


def behind_gather(model: onnx.ModelProto, draw: Draw) -> None:
    for tensor in _matrices(model, draw, 1):
        order = np.array(draw.sample(range(tensor.dims[1]), tensor.dims[1]))
        back = _constant(model, f"{tensor.name}_back", np.argsort(order))
        _store(tensor, numpy_helper.to_array(tensor)[:, order])
        _behind(model, tensor, "Gather", back, axis=1)


def in_two_pieces(model: onnx.ModelProto, draw: Draw) -> None:
    for tensor in _matrices(model, draw, 1):
        array, name = numpy_helper.to_array(tensor), tensor.name
        model.graph.initializer.remove(tensor)
        pieces = [_constant(model, f"{name}_{part}", half) for part, half in enumerate((array[:5], array[5:]))]
        model.graph.node.insert(0, helper.make_node("Concat", pieces, [name], axis=0))


def in_a_function(model: onnx.ModelProto, draw: Draw) -> None:
    """Some products become calls of a function that is handed the weight."""
    known = {tensor.name for tensor in model.graph.initializer}
    opset = next(each for each in model.opset_import if each.domain in ("", "ai.onnx"))
    inner = helper.make_node("MatMul", ["a", "w"], ["b"])
    model.functions.append(helper.make_function("own", "Product", ["a", "w"], ["b"], [inner], [opset]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in known and draw.random() < 0.3:
            node.op_type, node.domain = "Product", "own"


def typed_fields(model: onnx.ModelProto, draw: Draw) -> None:
    for tensor in _matrices(model, draw):
        numbers = numpy_helper.to_array(tensor).ravel().tolist()
        tensor.ClearField("raw_data")
        tensor.float_data.extend(numbers)


def decoys(model: onnx.ModelProto, draw: Draw) -> None:
    """Tensors that nothing reads, under the names of modules."""
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        name = f"{node.name[1:].rpartition('/')[0].replace('/', '.')}.weight"
        if node.op_type == "MatMul" and node.name and node.input[1] in known and name not in known:
            _constant(model, name, 3 * numpy_helper.to_array(known[node.input[1]]).T.copy())


def as_inputs(model: onnx.ModelProto, draw: Draw) -> None:
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


CHANGES: list[Callable[[onnx.ModelProto, Draw], None]] = [
    *(rename_values, drop_node_names, drop_metadata, to_constants, behind_identity),
    *(behind_transpose, behind_reshape, behind_product, behind_gather, in_two_pieces, in_a_function, typed_fields),
    *(decoys, as_inputs),
]


@pytest.mark.parametrize(("model", "exporter"), [("llama", "ts"), ("llama", "dynamo"), ("bert", "ts")])
def test_right_or_refused(lab: "Lab", tmp_path: Path, model: str, exporter: Any) -> None:
    from lab import merged_right_or_refused

    source, trained = lab.exported(model, exporter), lab.trained(model)
    right = 0
    for seed in range(DRAWS):
        draw = Draw(f"{model} {exporter} {seed}")
        changed = onnx.load(source)
        chosen = draw.sample(CHANGES, draw.randrange(1, 4))
        if as_inputs in chosen:  # Last, as it says shapes; and functions need a later version of the IR.
            chosen.remove(as_inputs)
            chosen.extend([] if in_a_function in chosen else [as_inputs])
        for change in chosen:
            change(changed, draw)
        del changed.graph.value_info[:]  # Shapes of what has moved.
        base = tmp_path / f"{seed}" / "base.onnx"
        base.parent.mkdir()
        onnx.save_model(changed, base, save_as_external_data=draw.random() < 0.3, size_threshold=64)
        right += merged_right_or_refused(base, trained, base.with_name("merged.onnx"))
    assert right >= 2
