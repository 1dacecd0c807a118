"""Models that onnxruntime-genai's builder makes, merged by names alone and compared with PEFT's unmerged model.

The builder packs q, k and v, splits gate and up, has experts in the operator MoE with gate and up in turns, and calls
modules by names of its own.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxruntime", "onnxruntime_genai"):
    pytest.importorskip(_package, reason=f"these tests need {_package}")

COARSE = {"built_phi": 2e-3}
"""The builder's GELU is another one."""
OWN = {"built_gpt_oss": "MoE", "built_lfm2_moe": "MoE"}


@pytest.mark.parametrize(
    "model",
    ["built_llama", "built_qwen2_tied", "built_qwen3", "built_phi", "built_phi3", "built_gpt_oss", "built_lfm2_moe"],
)
def test_every_target_by_its_name(lab: "Lab", tmp_path: Path, model: str) -> None:
    import zoo_built  # noqa: F401 - more models
    import zoo_wide  # noqa: F401 - more models
    from builders_of_graphs import build_genai, list_domains, run_cached
    from lab import ABSOLUTE_TOLERANCE

    import loraformat

    trained = lab.trained(model)
    base = build_genai(trained.specimen, lab.root / f"genai-{model}")
    assert {"GroupQueryAttention", OWN.get(model, "GroupQueryAttention")} <= list_domains(base)
    receipt = loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx")
    assert {target for weight in receipt.weights for target in weight.targets} == set(trained.deltas)
    first = {name: values[:1] for name, values in trained.feeds.items()}  # The row without padding.
    found = run_cached(tmp_path / "merged.onnx", first)
    allowed = COARSE.get(model, ABSOLUTE_TOLERANCE)
    assert np.abs(found - trained.unmerged["logits"][:1]).max() <= allowed < trained.effect / 100


def test_whisper_in_two_models(lab: "Lab", tmp_path: Path) -> None:
    """The encoder's model also computes the keys and values that the decoder makes of its states."""
    import zoo_built
    from builders_of_graphs import build_genai

    import loraformat

    trained = lab.trained(zoo_built.WHISPER)
    folder = build_genai(trained.specimen, lab.root / "genai-whisper").parent
    allowed = {"encoder": ["*.decoder.*self_attn*", "*.decoder.*fc*", "*encoder_attn.q_proj", "*encoder_attn.out_proj"]}
    allowed["decoder"] = ["*.encoder.*", "*encoder_attn.k_proj", "*encoder_attn.v_proj"]
    found: list[str] = []
    for half, left_out in allowed.items():
        receipt = loraformat.merge(
            folder / f"{half}.onnx", [trained.folder], tmp_path / f"{half}.onnx", allow_unmatched=left_out
        )
        found += [target for weight in receipt.weights for target in weight.targets]
    assert sorted(found) == sorted(trained.deltas)
    check_whisper(tmp_path, trained)


def check_whisper(folder: Path, trained: Any) -> None:
    """Compare what the two models of a folder compute with PEFT's unmerged model."""
    from builders_of_graphs import run_cached
    from lab import ABSOLUTE_TOLERANCE
    from zoo import run_onnx

    states = run_onnx(folder / "encoder.onnx", {"audio_features": trained.feeds["input_features"]})
    cache = {name.replace("present", "past"): value for name, value in states.items() if "cross" in name}
    logits = run_cached(folder / "decoder.onnx", {"input_ids": trained.feeds["decoder_input_ids"], **cache})
    apart = np.abs(logits - trained.unmerged["logits"]).max()
    assert apart <= ABSOLUTE_TOLERANCE < trained.effect / 100


def test_whisper_as_a_folder(lab: "Lab", tmp_path: Path) -> None:
    import zoo_built
    from builders_of_graphs import build_genai

    import loraformat

    trained = lab.trained(zoo_built.WHISPER)
    folder = build_genai(trained.specimen, lab.root / "genai-whisper").parent
    receipt = loraformat.merge(folder, [trained.folder], tmp_path / "out")
    assert sorted(target for weight in receipt.weights for target in weight.targets) == sorted(trained.deltas)
    assert (tmp_path / "out" / "genai_config.json").read_bytes() == (folder / "genai_config.json").read_bytes()
    check_whisper(tmp_path / "out", trained)


@pytest.mark.parametrize("ends", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_tied_table_in_codes_of_4_bits(lab: "Lab", tmp_path: Path, ends: list[str]) -> None:
    """Head and lookup read the same codes, the latter behind a Reshape; each that is adapted gets its own."""
    import onnx
    import zoo_built  # noqa: F401 - more models
    from builders_of_graphs import build_genai, run_cached
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from safetensors.numpy import load_file

    import loraformat

    trained = lab.trained("built_qwen2_tied", ends)
    folder = lab.root / "genai-shared"
    base = folder / "int4" / "model.onnx"
    if not base.exists():
        build_genai(trained.specimen, folder, "int4", "shared_embeddings=true")
    merged = tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [trained.folder], merged, base_checkpoint=folder / "torch")
    assert sum(bool(weight.copied_from) for weight in receipt.weights) == 1
    assert loraformat.verify(merged, base, [trained.folder], base_checkpoint=folder / "torch").holds
    held = {each.name: numpy_helper.to_array(each) for each in onnx.load(merged).graph.initializer}
    nodes = {each.op_type: list(each.input) for each in onnx.load(merged).graph.node if "embed" in each.name}
    head = next(each.input for each in onnx.load(merged).graph.node if each.name.startswith("/lm_head"))
    found = {"lm_head": list(head[1:3]), "embed_tokens": [nodes["Reshape"][0], nodes["GatherBlockQuantized"][2]]}
    table = load_file(folder / "torch" / "model.safetensors")["model.embed_tokens.weight"]
    for end, (codes, scales) in found.items():
        delta = next((each for name, each in trained.deltas.items() if name.endswith(end)), np.zeros(1))
        weight = table + (delta if delta.shape in (table.shape, (1,)) else delta.T)
        value = helper.make_tensor_value_info
        net = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [value("x", TensorProto.FLOAT, [1, weight.shape[1]])],
            [value("y", TensorProto.FLOAT, [1, len(weight)])],
            [numpy_helper.from_array(np.ascontiguousarray(weight.T, np.float32), "w")],
        )
        made = MatMulNBitsQuantizer(helper.make_model(net), bits=4, block_size=32, is_symmetric=True)
        made.process()
        afresh = {each.name: numpy_helper.to_array(each) for each in made.model.model.graph.initializer}
        np.testing.assert_allclose(held[scales].ravel(), afresh["w_scales"].ravel(), rtol=1e-4, atol=1e-6)
        width = weight.shape[1] // 2
        np.testing.assert_array_equal(held[codes][:, 0, :width], afresh["w_Q4"][:, 0, :width])
    first = {name: values[:1] for name, values in trained.feeds.items()}
    exact = trained.unmerged["logits"][:1]
    assert np.linalg.norm(run_cached(merged, first) - exact) < np.linalg.norm(run_cached(base, first) - exact)


def test_a_decoder_in_codes_of_4_bits(lab: "Lab", tmp_path: Path) -> None:
    """Refused by itself, however weights are found; quantised afresh or in floats by the mend's options."""
    import zoo_built  # noqa: F401 - more models
    from builders_of_graphs import HEAD_DIM, build_genai, run_cached

    import loraformat

    trained = lab.trained("built_qwen3")
    folder = lab.root / "genai-few"
    base = build_genai(trained.specimen, folder, "int4")
    refused: list[dict[str, Any]] = [{}, {"resolve": "structure"}]
    for options in refused:
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.merge(base, [trained.folder], tmp_path / "no.onnx", **options)
        assert {problem.code for problem in caught.value.problems} == {"LF440"}
    first = {name: values[:1] for name, values in trained.feeds.items()}

    def measure(path: Path) -> float:
        return float(np.linalg.norm(run_cached(path, first) - trained.unmerged["logits"][:1]))

    checkpoint, sizes = folder / "torch", {"kv_cache_dim": HEAD_DIM}
    ways: dict[str, dict[str, Any]] = {
        "afresh": {"base_checkpoint": checkpoint},
        "floats": {"on_quantized": "dequantize"},
    }
    apart = {}
    for name, options in ways.items():
        merged = tmp_path / f"{name}.onnx"
        receipt = loraformat.merge(base, [trained.folder], merged, **options)
        assert {target for weight in receipt.weights for target in weight.targets} == set(trained.deltas)
        known = {key: value for key, value in options.items() if key == "base_checkpoint"}
        found = loraformat.verify(merged, base, [trained.folder], run=True, sizes=sizes, **known)
        assert found.runs
        assert found.holds
        apart[name] = measure(merged)
    assert max(apart.values()) < 0.7 * measure(base)


def test_experts_in_codes_of_4_bits(lab: "Lab", tmp_path: Path) -> None:
    """LFM2's experts in a QMoE, down with rows of 20 numbers, less than a block; what changes is quantised once."""
    import onnx
    import zoo_built  # noqa: F401 - more models
    import zoo_wide  # noqa: F401 - more models
    from builders_of_graphs import build_genai, list_domains, run_cached
    from onnx import numpy_helper
    from safetensors.numpy import load_file

    import loraformat

    trained = lab.trained("built_lfm2_moe")
    folder = lab.root / "genai-built_lfm2_moe"
    base, merged = build_genai(trained.specimen, folder, "int4"), tmp_path / "merged.onnx"
    assert "QMoE" in list_domains(base)
    receipt = loraformat.merge(base, [trained.folder], merged, base_checkpoint=folder / "torch")
    assert {target for weight in receipt.weights for target in weight.targets} == set(trained.deltas)
    assert loraformat.verify(merged, base, [trained.folder], base_checkpoint=folder / "torch").holds
    held = {each.name: numpy_helper.to_array(each) for each in onnx.load(merged).graph.initializer}
    state = load_file(folder / "torch" / "model.safetensors")
    experts = "model.layers.1.feed_forward.experts"
    seen = 0
    for target, delta in trained.deltas.items():
        owner, _, name = target.rpartition(".")
        if not owner.startswith(f"{experts}."):
            continue
        number = int(owner.rpartition(".")[2])
        whole = _read_expert(state, experts, number, name) + delta
        if name == "gate_up_proj":  # The builder has gate and up in turns.
            whole = np.stack(np.split(whole, 2), axis=1).reshape(whole.shape)
        packed, scales = (held[f"model.layers.1.moe.experts.{name}.{part}"][number] for part in ("qweight", "scales"))
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(whole.shape).astype(np.float64)
        steps = np.repeat(scales.astype(np.float64), 32, axis=1)[:, : whole.shape[1]]
        apart = np.where(codes == 15, 1, 0.51)  # What lies beyond the last code is cut off.
        assert (np.abs((codes - 8) * steps - whole) <= apart * np.abs(steps) + 1e-6).all()
        seen += 1
    assert seen == len([target for target in trained.deltas if target.startswith(experts)]) > 1
    first = {name: values[:1] for name, values in trained.feeds.items()}
    exact = trained.unmerged["logits"][:1]
    assert np.linalg.norm(run_cached(merged, first) - exact) < np.linalg.norm(run_cached(base, first) - exact)


def _read_expert(state: dict[str, NDArray[Any]], experts: str, number: int, name: str) -> NDArray[Any]:
    """Return an expert's matrix of a checkpoint that has experts packed, or each apart."""
    if f"{experts}.{name}" in state:
        return state[f"{experts}.{name}"][number]
    members = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[name]
    return np.concatenate([state[f"{experts}.{number}.{member}.weight"] for member in members])


FORMS = {
    "k-quant": ("int4", "algo_config=k_quant"),
    "zero points, blocks of 16": ("int4", "is_symmetric=false", "block_size=16"),
    "DequantizeLinear": ("int4", "use_qdq=true"),
    "a table in codes": ("int4", "op_types_to_quantize=MatMul/Gather"),
    "gate and up in one": ("int4", "fuse_mlp_gate_up=true", "algo_config=rtn"),
    "8 bits": ("int8", "is_symmetric=false"),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_that_the_builder_quantises(lab: "Lab", tmp_path: Path, form: str) -> None:
    """In floats from the checkpoint it is PEFT's unmerged model; in codes, off by what these are off in the base."""
    import zoo_built
    from builders_of_graphs import HEAD_DIM, build_genai, run_cached
    from lab import ABSOLUTE_TOLERANCE

    import loraformat

    trained = lab.trained(zoo_built.WIDE)
    folder = lab.root / f"genai-{form.replace(' ', '-')}"
    base = build_genai(trained.specimen, folder, *FORMS[form])
    first = {name: values[:1] for name, values in trained.feeds.items()}
    known: dict[str, Any] = {"base_checkpoint": folder / "torch"}
    usual = np.linalg.norm(run_cached(base, first) - trained.base["logits"][:1])
    apart = {}
    for name, options in {"codes": {}, "floats": {"on_quantized": "dequantize"}}.items():
        merged = tmp_path / f"{name}.onnx"
        receipt = loraformat.merge(base, [trained.folder], merged, **known, **options)
        assert {target for weight in receipt.weights for target in weight.targets} == set(trained.deltas)
        found = loraformat.verify(merged, base, [trained.folder], run=True, sizes={"kv_cache_dim": HEAD_DIM}, **known)
        assert found.holds, found.problems
        apart[name] = run_cached(merged, first) - trained.unmerged["logits"][:1]
    assert np.linalg.norm(apart["codes"]) <= 1.5 * usual
    if FORMS[form][0] == "int4":  # Of 8 bits, the codes' own numbers become floats.
        assert np.abs(apart["floats"]).max() <= ABSOLUTE_TOLERANCE < trained.effect / 100
    else:
        assert np.linalg.norm(apart["floats"]) <= 1.1 * usual


def test_q_k_and_v_that_the_builder_takes_apart(lab: "Lab", tmp_path: Path) -> None:
    import zoo_built  # noqa: F401 - more models
    from builders_of_graphs import build_genai, run_cached
    from lab import ABSOLUTE_TOLERANCE

    import loraformat

    trained = lab.trained("built_phi3")
    base = build_genai(trained.specimen, lab.root / "genai-apart", "fp32", "fuse_qkv=false")
    receipt = loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx")
    assert {target for weight in receipt.weights for target in weight.targets} == set(trained.deltas)
    first = {name: values[:1] for name, values in trained.feeds.items()}
    found = run_cached(tmp_path / "merged.onnx", first)
    apart = np.abs(found - trained.unmerged["logits"][:1]).max()
    assert apart <= ABSOLUTE_TOLERANCE < trained.effect / 100
