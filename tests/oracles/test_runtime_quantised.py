"""Run-time inputs beside the weights of onnxruntime's own quantisers: the codes lose nothing of an adapter."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

pytestmark = pytest.mark.oracle
pytest.importorskip("onnxruntime.quantization")

from quantised import FLOATS_BETWEEN, Case, compute, nbits, quantise  # noqa: E402


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("quantised"))


@pytest.mark.parametrize("path", [*FLOATS_BETWEEN, "QDQ", "QDQ per channel", "MatMulNBits 4"])
def test_the_change_of_outputs_is_that_of_the_float_model(case: Case, tmp_path: Path, path: str) -> None:
    """The float model's outputs, but for what the codes make of the base's own; idle, the base's bits."""
    from loraformat import runtime

    base, model = tmp_path / "base.onnx", tmp_path / "base.lora.onnx"
    if path == "MatMulNBits 4":
        nbits(4, block_size=32, is_symmetric=True)(case.float_base, base)
    else:
        base = quantise(case, path, case.float_base)
    runtime.export_runtime(base, [case.adapter], model, accept_ranges=path.startswith("QDQ"))
    np.testing.assert_array_equal(compute(model, case.x), compute(base, case.x))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (active,) = session.run(None, {"x": case.x, **runtime.adapter_feeds(model, [case.adapter])})
    wanted, before = compute(case.float_merged, case.x), compute(case.float_base, case.x)
    noise = np.linalg.norm(compute(base, case.x) - before)
    assert np.linalg.norm(active - wanted) < 1.1 * noise < 0.9 * np.linalg.norm(wanted - before)
