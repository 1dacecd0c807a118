"""What the oracle tests share: models and adapters made once in a run, and what must hold after every merge."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import zoo
from numpy.typing import NDArray

import loraformat
from loraformat.receipt import Receipt

ABSOLUTE_TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5


@dataclass
class Lab:
    """Trained adapters and exported models by name, made when they are first asked for."""

    root: Path
    _trained: dict[str, zoo.Trained] = field(default_factory=dict)
    _exported: dict[tuple[str, zoo.Exporter, str], Path] = field(default_factory=dict)

    def trained(self, name: str, targets: list[str] | str | None = None) -> zoo.Trained:
        """Return the adapter of a specimen, or one like it for other target modules: their names, or one pattern."""
        key = "-".join([name, *([targets] if isinstance(targets, str) else targets or ())])
        if key not in self._trained:
            specimen = zoo.SPECIMENS[name]
            lora = specimen.lora()
            if targets is not None:
                lora.target_modules = targets if isinstance(targets, str) else set(targets)
            folder = self.root / f"adapter-{len(self._trained)}"
            self._trained[key] = zoo.train(specimen, folder, seed=len(key), lora=lora)
        return self._trained[key]

    def exported(self, name: str, exporter: zoo.Exporter, form: str = "fp32") -> Path:
        """Return the base model of a specimen as ONNX.

        `form` is fp32; fp16 or fp16_common, converted from it; half, exported from a torch model in float16; one_file
        or many_files, saved with external data; or torch_data, the newer exporter's default, external data as well.
        """
        key = (name, exporter, form)
        if key not in self._exported:
            self._exported[key] = self._make(name, exporter, form)
        return self._exported[key]

    def _make(self, name: str, exporter: zoo.Exporter, form: str) -> Path:
        specimen = zoo.SPECIMENS[name]
        path = self.root / f"{name}-{exporter}-{form}" / "base.onnx"
        if form == "fp32":
            return zoo.export(specimen, path, exporter)
        if form == "torch_data":
            return zoo.export(specimen, path, exporter, external_data=True)
        if form == "half":
            return zoo.export(specimen, path, exporter, specimen.make().half())
        source = self.exported(name, exporter)
        if form.startswith("fp16"):
            return zoo.to_float16(source, path, common=form == "fp16_common")
        return zoo.to_external(source, path, one_file=form == "one_file")


def merge_checked(base: Path, trained: zoo.Trained, output: Path, **options: Any) -> Receipt:
    """Merge one adapter and check all that must hold for any merge, whatever the outputs are."""
    receipt = loraformat.merge(base, [trained.folder], output, **options)
    assert_same_graph(base, output)
    assert_only_these_changed(base, output, receipt)
    assert_deltas(base, output, receipt, trained.deltas)
    return receipt


def merged_right_or_refused(base: Path, trained: zoo.Trained, output: Path, **options: Any) -> bool:
    """Merge if it can be done and say whether; a merge that is done must equal PEFT's unmerged model."""
    assert trained.effect > 100 * ABSOLUTE_TOLERANCE
    try:
        loraformat.merge(base, [trained.folder], output, **options)
    except loraformat.LoraformatError:
        assert not output.exists()
        return False
    found = zoo.run_onnx(output, trained.feeds, trained.specimen.outputs)
    assert difference(found, trained.unmerged) <= ABSOLUTE_TOLERANCE, "merged into another weight"
    return True


def assert_same_graph(base: Path, merged: Path) -> None:
    """Check that nothing but numbers differs: nodes, inputs, outputs, and names, forms and shapes of the weights."""
    before, after = (onnx.load(path, load_external_data=False) for path in (base, merged))
    assert len(before.graph.node) == len(after.graph.node)
    for name in ("node", "input", "output", "value_info", "sparse_initializer", "quantization_annotation"):
        assert list(getattr(before.graph, name)) == list(getattr(after.graph, name)), name
    assert list(before.opset_import) == list(after.opset_import)
    assert list(before.functions) == list(after.functions)
    assert [_headed(t) for t in before.graph.initializer] == [_headed(t) for t in after.graph.initializer]


def _headed(tensor: onnx.TensorProto) -> tuple[str, int, tuple[int, ...]]:
    return tensor.name, tensor.data_type, tuple(tensor.dims)


def changed_initializers(base: Path, merged: Path) -> set[str]:
    """Return the names of the initializers whose bytes differ."""
    before, after = zoo.initializers(base), zoo.initializers(merged)
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


def assert_only_these_changed(base: Path, merged: Path, receipt: Receipt) -> None:
    """Check that the receipt names all weights that changed, and no other."""
    assert changed_initializers(base, merged) == {weight.name for weight in receipt.weights}


def assert_deltas(base: Path, merged: Path, receipt: Receipt, deltas: zoo.Arrays) -> None:
    """Check that each weight took in what PEFT would add to it, up to one rounding, and that no target is left."""
    before, after = zoo.initializers(base), zoo.initializers(merged)
    assert sorted(target for weight in receipt.weights for target in weight.targets) == sorted(deltas)
    for weight in receipt.weights:
        (target,) = weight.targets
        old, new = before[weight.name].astype(np.float64), after[weight.name]
        # Exporters store a matrix either way round; which one is right is for the outputs to show.
        errors = [np.abs(new - (old + turned)) for turned in _orientations(deltas[target], old.shape)]
        allowed = np.spacing(np.abs(new)).astype(np.float64) * 0.51 + 2e-7
        assert any((error <= allowed).all() for error in errors), (target, [float(e.max()) for e in errors])
        assert weight.retained > (0.999 if new.dtype == np.float32 else 0.9)


def _orientations(delta: NDArray[Any], shape: tuple[int, ...]) -> list[NDArray[Any]]:
    """Return the delta as it fits the shape: as it is, transposed, or both for a square one."""
    fitting = [turned for turned in (delta, delta.T) if turned.shape == shape]
    assert fitting, (delta.shape, shape)
    return fitting


def difference(found: zoo.Arrays, expected: zoo.Arrays) -> float:
    """Return the largest absolute difference over all outputs."""
    return max(float(np.abs(found[name] - expected[name]).max()) for name in found)


def peak(arrays: zoo.Arrays) -> float:
    """Return the largest absolute value."""
    return max(float(np.abs(array).max()) for array in arrays.values())


def scale_of(arrays: zoo.Arrays) -> float:
    """Return the largest absolute value, at least one."""
    return max(1.0, peak(arrays))


def note(record: str, **numbers: float) -> None:
    """Append measured differences to the file that LORAFORMAT_ORACLE_LOG names, for reports; a no-op without it."""
    path = os.environ.get("LORAFORMAT_ORACLE_LOG")
    if path:
        with Path(path).open("a") as log:
            log.write(f"{record} {' '.join(f'{name}={number:.2e}' for name, number in numbers.items())}\n")
