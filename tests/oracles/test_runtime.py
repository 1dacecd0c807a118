"""Sessions of real exports with adapters in memory compute what PEFT computes, without a file."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest

import loraformat
import loraformat.runtime

if TYPE_CHECKING:
    from lab import Lab
    from zoo import Arrays, Trained

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

CASES = (
    ("llama", "dynamo", "torch_data", ["q_proj", "down_proj"]),
    ("llama", "ts", "fp32", ["o_proj"]),
    ("gpt2", "ts", "one_file", ["c_attn"]),
    ("bert", "dynamo", "fp32", ["query"]),
    ("vit", "ts_nofold", "many_files", ["q_proj"]),
    ("convnet", "ts", "fp32", None),
)


def make_settings() -> onnxruntime.SessionOptions:
    """Return the settings of `zoo.run_onnx`."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    return settings


def compute(session: onnxruntime.InferenceSession, trained: "Trained") -> "Arrays":
    wanted = {entry.name for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    names = [name for name in names if name in trained.specimen.outputs] if trained.specimen.outputs else names
    feeds = {name: array for name, array in trained.feeds.items() if name in wanted}
    return dict(zip(names, session.run(names, feeds), strict=True))


def same(one: "Arrays", other: "Arrays") -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize(("model", "exporter", "form", "targets"), CASES)
def test_outputs_are_those_of_the_unmerged_model(
    lab: "Lab", tmp_path: Path, model: str, exporter: str, form: str, targets: list[str] | None
) -> None:
    """A, then an adapter of other modules, then A again: the first outputs bit for bit."""
    from lab import ABSOLUTE_TOLERANCE, difference, note
    from zoo import run_onnx

    trained, base = lab.trained(model), lab.exported(model, exporter, form)
    other = lab.trained(model, targets) if targets else None
    assert trained.effect > 100 * ABSOLUTE_TOLERANCE
    session = loraformat.runtime.session(
        base, [trained.folder], providers=["CPUExecutionProvider"], session_options=make_settings
    )
    outputs = compute(session, trained)
    note(
        f"session {model} {exporter} {form}",
        unmerged=difference(outputs, trained.unmerged),
        seconds=session.cost.seconds,
    )
    assert difference(outputs, trained.unmerged) <= ABSOLUTE_TOLERANCE
    loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx")
    assert same(outputs, run_onnx(tmp_path / "merged.onnx", trained.feeds, trained.specimen.outputs))
    if other is not None:
        session = session.switch([other.folder])
        assert other.effect > 10 * ABSOLUTE_TOLERANCE
        assert difference(compute(session, other), other.unmerged) <= ABSOLUTE_TOLERANCE
    session = session.switch()
    assert same(compute(session, trained), run_onnx(base, trained.feeds, trained.specimen.outputs))
    assert same(compute(session.switch([trained.folder]), trained), outputs)


@pytest.mark.parametrize("form", ["fp16", "half"])
def test_half_precision_is_cast_after_the_weights_are_replaced(lab: "Lab", tmp_path: Path, form: str) -> None:
    """On a processor without float16, onnxruntime casts such weights once, when it makes the session."""
    from zoo import run_onnx

    trained, base = lab.trained("llama"), lab.exported("llama", "ts", form)
    session = loraformat.runtime.session(
        base, [trained.folder], providers=["CPUExecutionProvider"], session_options=make_settings
    )
    loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx")
    merged = run_onnx(tmp_path / "merged.onnx", trained.feeds, trained.specimen.outputs)
    found = compute(session, trained)
    assert same(found, merged)
    plain = run_onnx(base, trained.feeds, trained.specimen.outputs)
    assert max(float(np.abs(found[name] - plain[name]).max()) for name in found) > 1e-2
