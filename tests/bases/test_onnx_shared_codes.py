"""Codes that several nodes read: the adapted one gets a copy with scales and zero points, the others keep theirs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import loraformat
from builders import write_config, write_peft, write_tensors
from graphs import Array, Net, run, stored_weights, torchscript_name, write_model

OUT, IN, BLOCK = 24, 48, 16
ONE, OTHER = "model.layers.0.one", "model.layers.0.other"
RNG = np.random.default_rng(31)
FLOATS = RNG.standard_normal((OUT, IN)).astype(np.float32)
CODES = RNG.integers(0, 256, (OUT, IN)).astype(np.uint8)
SCALES = RNG.uniform(0.01, 0.02, (OUT, IN // BLOCK)).astype(np.float32)
ZEROS = RNG.integers(100, 150, (OUT, IN // BLOCK)).astype(np.uint8)
FACTORS = (RNG.standard_normal((2, IN)).astype(np.float32), RNG.standard_normal((OUT, 2)).astype(np.float32) / 4)
DELTA = FACTORS[1].astype(np.float64) @ FACTORS[0]
X = RNG.standard_normal((5, IN)).astype(np.float32)
IDS = np.array([[3, 0, 23, 7]])
INPUTS = {"x_one": X, "x_other": X}
SIZES = {"x_one_1": IN, "x_other_1": IN}


def node(module: str, op: str) -> str:
    return torchscript_name(module, op)


def blocks_of_rows(net: Net) -> None:
    held = [net.weight("w_Q8", CODES.reshape(OUT, -1, BLOCK)), net.weight("w_scales", SCALES), net.weight("w_z", ZEROS)]
    sizes = {"K": IN, "N": OUT, "bits": 8, "block_size": BLOCK}
    for module, end in ((ONE, "one"), (OTHER, "other")):
        inputs = [net.feed(f"x_{end}"), *held]
        net.op("MatMulNBits", inputs, net.result(end), node(module, "MatMul"), domain="com.microsoft", **sizes)


def one_dequantising(net: Net) -> None:
    """One node dequantises for both; the node is written once more for the one that parts."""
    inputs = [net.weight("w", CODES), net.weight("s", SCALES[:, 0]), net.weight("z", ZEROS[:, 0])]
    wide = net.op("DequantizeLinear", inputs, "wide", axis=0)
    for module, end in ((ONE, "one"), (OTHER, "other")):
        net.op("Gemm", [net.feed(f"x_{end}"), wide], net.result(end), node(module, "Gemm"), transB=1)


def two_dequantising(net: Net) -> None:
    """Each has a node of its own, and all read the same three tensors."""
    inputs = [net.weight("w", CODES), net.weight("s", SCALES[:, 0]), net.weight("z", ZEROS[:, 0])]
    for module, end in ((ONE, "one"), (OTHER, "other")):
        wide = net.op("DequantizeLinear", inputs, f"wide_{end}", axis=0)
        net.op("Gemm", [net.feed(f"x_{end}"), wide], net.result(end), node(module, "Gemm"), transB=1)


def products_of_codes(net: Net) -> None:
    held = [net.weight("w_quantized", CODES.T), net.weight("w_scale", SCALES[:, 0]), net.weight("w_z", ZEROS[:, 0])]
    for module, end in ((ONE, "one"), (OTHER, "other")):
        parts = [f"{end}_q", f"{end}_step", f"{end}_zero"]
        quantise = helper.make_node("DynamicQuantizeLinear", [net.feed(f"x_{end}")], parts)
        net.nodes.append(quantise)
        counts = net.op("MatMulInteger", [parts[0], held[0], parts[2], held[2]], f"{end}_n", node(module, "MatMul"))
        step = net.op("Mul", [parts[1], held[1]], f"{end}_both")
        wide = net.op("Cast", [counts], f"{end}_wide", to=1)
        net.op("Mul", [wide, step], net.result(end))


FORMS = {each.__name__: each for each in (blocks_of_rows, one_dequantising, two_dequantising, products_of_codes)}


def make(folder: Path, form: str, files: str = "") -> Path:
    net = Net()
    FORMS[form](net)
    return write_model(folder / "base.onnx", net.model(check=False), files)


def adapt(folder: Path, *modules: str, scale: float = 1.0) -> Path:
    return write_peft(folder / f"adapter{len(modules)}", dict.fromkeys(modules, FACTORS), alpha=2.0 * scale)


def moved(before: Array, after: Array) -> float:
    """Return how far an output has moved from where the change takes it, in shares of the change."""
    wanted = X.astype(np.float64) @ DELTA.T
    return float(np.linalg.norm(after.astype(np.float64) - before - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("files", "external_data"), [("", "copy"), ("one", "copy"), ("one", "share")])
def test_the_adapted_reader_alone_changes(tmp_path: Path, form: str, files: str, external_data: str) -> None:
    base, merged = make(tmp_path, form, files), tmp_path / "merged.onnx"
    adapter = adapt(tmp_path, ONE)
    receipt = loraformat.merge(base, [adapter], merged, external_data=external_data)
    assert [problem.code for problem in receipt.problems] == ["LF417"]
    before, after = run(base, INPUTS), run(merged, INPUTS)
    np.testing.assert_array_equal(before[1], after[1])
    assert moved(before[0], after[0]) < 0.1
    old, new = stored_weights(base), stored_weights(merged)
    assert len(new) == len(old) + 2, "codes and scales; zero points stay, so that both read them"
    for name, values in old.items():
        np.testing.assert_array_equal(values, new[name])
    assert loraformat.verify(merged, base, [adapter], run=True, sizes=SIZES).holds


@pytest.mark.parametrize("form", FORMS)
def test_both_adapted_part(tmp_path: Path, form: str) -> None:
    """By two adapters that say different things."""
    base, merged = make(tmp_path, form), tmp_path / "merged.onnx"
    adapters = [adapt(tmp_path / "a", ONE), adapt(tmp_path / "b", OTHER, scale=-1.0)]
    loraformat.merge(base, adapters, merged)
    before, after = run(base, INPUTS), run(merged, INPUTS)
    assert moved(before[0], after[0]) < 0.1
    assert moved(-before[1], -after[1]) < 0.1
    assert len(stored_weights(merged)) == len(stored_weights(base)) + 2
    assert loraformat.verify(merged, base, adapters, run=True, sizes=SIZES).holds


@pytest.mark.parametrize("form", FORMS)
def test_both_adapted_alike_change_once_with_their_scales(tmp_path: Path, form: str) -> None:
    base, merged = make(tmp_path, form), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [adapt(tmp_path, ONE, OTHER)], merged)
    assert {problem.code for problem in receipt.problems} == {"LF411"}, "no scales that something else reads"
    before, after = run(base, INPUTS), run(merged, INPUTS)
    assert max(moved(*ends) for ends in zip(before, after, strict=True)) < 0.1
    assert stored_weights(merged).keys() == stored_weights(base).keys()


def test_with_kept_scales_only_the_codes_are_copied(tmp_path: Path) -> None:
    base, merged = make(tmp_path, "blocks_of_rows"), tmp_path / "merged.onnx"
    adapter = adapt(tmp_path, ONE)
    loraformat.merge(base, [adapter], merged, keep_scales=True, min_retained=0.0)
    assert stored_weights(merged).keys() - stored_weights(base).keys() == {f"{ONE}.weight_Q8"}
    assert loraformat.verify(merged, base, [adapter]).holds


def test_a_merge_is_taken_back_by_subtraction(tmp_path: Path) -> None:
    base, merged, back = make(tmp_path, "blocks_of_rows"), tmp_path / "merged.onnx", tmp_path / "back.onnx"
    adapter = adapt(tmp_path, ONE)
    loraformat.merge(base, [adapter], merged)
    loraformat.unmerge(merged, back, adapters=[adapter])
    before, after = run(base, INPUTS), run(back, INPUTS)
    assert np.linalg.norm(after[0] - before[0]) < 0.02 * np.linalg.norm(before[0])
    np.testing.assert_array_equal(before[1], after[1])


def test_verify_names_scales_of_a_copy_that_were_tampered_with(tmp_path: Path) -> None:
    base, merged = make(tmp_path, "blocks_of_rows"), tmp_path / "merged.onnx"
    adapter = adapt(tmp_path, ONE)
    loraformat.merge(base, [adapter], merged)
    scales, data = stored_weights(merged)[f"{ONE}.weight_Q8_scales"], bytearray(merged.read_bytes())
    data[data.index(scales.tobytes())] ^= 1
    merged.write_bytes(data)
    (problem,) = loraformat.verify(merged, base, [adapter]).problems
    assert problem.code == "LF802"
    assert problem.where.endswith(f"{ONE}.weight_Q8_scales")


def test_a_session_computes_what_the_merged_model_does(tmp_path: Path) -> None:
    from loraformat import runtime

    base, merged = make(tmp_path, "one_dequantising"), tmp_path / "merged.onnx"
    adapter = adapt(tmp_path, ONE)
    loraformat.merge(base, [adapter], merged)
    found = runtime.session(base, [adapter]).run(None, INPUTS)
    for one, other in zip(found, run(merged, INPUTS), strict=True):
        np.testing.assert_array_equal(one, other)


def test_codes_with_two_sets_of_scales_are_refused(tmp_path: Path) -> None:
    net = Net()
    codes = net.weight("w", CODES)
    for number, (module, end) in enumerate(((ONE, "one"), (OTHER, "other"))):
        inputs = [codes, net.weight(f"s{number}", SCALES[:, number]), net.weight(f"z{number}", ZEROS[:, number])]
        wide = net.op("DequantizeLinear", inputs, f"wide_{end}", axis=0)
        net.op("Gemm", [net.feed(f"x_{end}"), wide], net.result(end), node(module, "Gemm"), transB=1)
    base = write_model(tmp_path / "base.onnx", net.model())
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapt(tmp_path, ONE)], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF403",)


# --- tied tables of 4 bits, as onnxruntime-genai's builder has them ---------------------------------------------------

HEAD, TABLE = "lm_head", "model.embed_tokens"
ROWS, WIDTH = 40, 40
"""The last block of a row is padded; the builder cuts what is looked up to size again."""
TIED = RNG.standard_normal((ROWS, WIDTH)).astype(np.float32)


def quantise(weight: Array, block: int) -> tuple[Array, Array]:
    """Return packed codes and scales by onnxruntime's rule: the number furthest from zero gets the first code."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block))).reshape(len(weight), -1, block)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(axis=2)[..., None], 2)
    scales = largest / np.float32(-8)
    codes = (np.clip(np.rint(padded / scales), -8, 7) + 8).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales[..., 0]


def make_tied(folder: Path) -> Path:
    net = Net()
    codes, scales = quantise(TIED, 32)
    held = [net.weight("lm_head.MatMul.weight_Q4", codes), net.weight("lm_head.MatMul.weight_scales", scales)]
    flat = net.op("Reshape", [held[0], net.weight("flat", np.array([ROWS, 32]))], "flat_codes", "/model/embed/Reshape")
    sizes = {"bits": 4, "block_size": 32}
    name = "/model/embed_tokens/GatherBlockQuantized"
    inputs = [flat, net.feed("ids", 7), held[1]]
    axes = {"gather_axis": 0, "quantize_axis": 1}
    whole = net.op("GatherBlockQuantized", inputs, "whole", name, domain="com.microsoft", **sizes, **axes)
    cuts = [net.weight(f"cut{number}", np.array([number])) for number in (0, WIDTH, -1)]
    net.op("Slice", [whole, *cuts], net.result("embedded", rank=3), "/model/embed_tokens/Slice")
    inputs = [net.feed("x"), *held]
    sizes |= {"K": WIDTH, "N": ROWS}
    net.op("MatMulNBits", inputs, net.result("logits"), "/lm_head/MatMul_Q4", domain="com.microsoft", **sizes)
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "model.safetensors", {f"{TABLE}.weight": TIED})
    (folder / "config.json").write_text('{"tie_word_embeddings": true, "architectures": ["XForCausalLM"]}')
    return write_model(folder / "base.onnx", net.model(check=False))


def tied_factors(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, WIDTH)).astype(np.float32), rng.standard_normal((ROWS, 2)).astype(np.float32)


def adapt_ends(folder: Path, factors: Any) -> Path:
    """Write an adapter of the two ends; of the table PEFT keeps the factors the other way round."""
    arrays = {}
    for end, (down, up) in factors.items():
        roles = ("lora_A.weight", "lora_B.weight") if end == HEAD else ("lora_embedding_B", "lora_embedding_A")
        pair = (down, up) if end == HEAD else (down.T, up.T)
        arrays |= {f"base_model.model.{end}.{role}": values for role, values in zip(roles, pair, strict=True)}
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", {k: np.ascontiguousarray(v) for k, v in arrays.items()})
    write_config(folder, {"r": 2, "lora_alpha": 2.0})
    return folder


@pytest.mark.parametrize("ends", [(HEAD,), (TABLE,), (HEAD, TABLE)])
def test_a_tied_table_of_4_bits(tmp_path: Path, ends: tuple[str, ...]) -> None:
    """Codes and scales of each end are those of the quantiser that saw its own merged table."""
    base, merged = make_tied(tmp_path / "base"), tmp_path / "merged.onnx"
    factors = {end: tied_factors(len(end)) for end in ends}
    adapter = adapt_ends(tmp_path / "adapter", factors)
    options: Any = {"base_checkpoint": tmp_path / "base"}
    loraformat.merge(base, [adapter], merged, **options)
    new = {end: TIED + up @ down for end, (down, up) in factors.items()}
    expected = {end: quantise(np.asarray(new.get(end, TIED), np.float32), 32) for end in (HEAD, TABLE)}
    held, readers = stored_weights(merged), {}
    for each in onnx.load(merged).graph.node:
        if each.op_type in ("MatMulNBits", "Reshape", "GatherBlockQuantized"):
            readers[each.op_type] = list(each.input)
    found = {
        HEAD: (held[readers["MatMulNBits"][1]], held[readers["MatMulNBits"][2]]),
        TABLE: (held[readers["Reshape"][0]], held[readers["GatherBlockQuantized"][2]]),
    }
    for end, (codes, scales) in expected.items():
        np.testing.assert_allclose(found[end][1], scales, rtol=1e-5)
        whole = found[end][0].reshape(codes.shape)
        np.testing.assert_array_equal(whole[:, 0], codes[:, 0])
        np.testing.assert_array_equal(whole[:, 1, :4], codes[:, 1, :4])
    feeds = {"x": X[:, :WIDTH], "ids": IDS}
    before, after = run(base, feeds), run(merged, feeds)
    assert (np.abs(after[0] - before[0]).max() > 0.1) == (TABLE in ends)
    assert (np.abs(after[1] - before[1]).max() > 0.1) == (HEAD in ends)
    assert loraformat.verify(merged, base, [adapter], **options).holds


def test_a_tied_table_of_4_bits_needs_its_float_numbers(tmp_path: Path) -> None:
    base = make_tied(tmp_path / "base")
    adapter = write_peft(tmp_path / "adapter", {HEAD: tied_factors(1)})
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF440",)


@pytest.mark.parametrize("ends", [(HEAD,), (TABLE,), (HEAD, TABLE)])
def test_an_end_of_a_tied_table_of_4_bits_stands_in_floats(tmp_path: Path, ends: tuple[str, ...]) -> None:
    """The other end reads the codes as before; codes that nobody reads any more go."""
    base, merged = make_tied(tmp_path / "base"), tmp_path / "merged.onnx"
    factors = {end: tied_factors(len(end)) for end in ends}
    adapter = adapt_ends(tmp_path / "adapter", factors)
    loraformat.merge(base, [adapter], merged, on_quantized="dequantize")
    feeds = {"x": X[:, :WIDTH], "ids": IDS}
    before, after = run(base, feeds), run(merged, feeds)
    change = {end: up @ down for end, (down, up) in factors.items()}
    looked_up = before[0] + (change[TABLE][IDS].reshape(before[0].shape) if TABLE in ends else 0)
    product = before[1] + (X[:, :WIDTH] @ change[HEAD].T if HEAD in ends else 0)
    np.testing.assert_allclose(after[0], looked_up, atol=1e-4)
    np.testing.assert_allclose(after[1], product, atol=1e-4)
    kinds = {each.op_type for each in onnx.load(merged).graph.node}
    assert ("MatMulNBits" in kinds, "GatherBlockQuantized" in kinds) == (HEAD not in ends, TABLE not in ends)
    sizes = {name: values.nbytes for name, values in stored_weights(merged).items()}
    assert any("Q4" in name for name in sizes) == (len(ends) == 1)
    assert loraformat.verify(merged, base, [adapter]).holds


@pytest.mark.parametrize("form", FORMS)
def test_the_adapted_reader_alone_stands_in_floats(tmp_path: Path, form: str) -> None:
    base, merged = make(tmp_path, form), tmp_path / "merged.onnx"
    adapter = adapt(tmp_path, ONE)
    if "dequantising" in form:
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.merge(base, [adapter], merged, on_quantized="dequantize")
        assert caught.value.codes == ("LF619",)
        return
    loraformat.merge(base, [adapter], merged, on_quantized="dequantize")
    before, after = run(base, INPUTS), run(merged, INPUTS)
    np.testing.assert_array_equal(before[1], after[1])
    assert moved(before[0], after[0]) < (0.1 if form == "products_of_codes" else 1e-4)
    assert loraformat.verify(merged, base, [adapter]).holds


def test_a_model_of_an_old_version_says_what_would_help(tmp_path: Path) -> None:
    net = Net()
    blocks_of_rows(net)
    model = net.model(check=False)
    model.ir_version = 3
    base = write_model(tmp_path / "base.onnx", model, "one")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapt(tmp_path, ONE)], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF402",)
    assert "ir_version" in str(caught.value)
    base = write_model(tmp_path / "inline.onnx", model)
    receipt = loraformat.merge(base, [adapt(tmp_path, ONE)], tmp_path / "merged.onnx")
    assert [weight.copied_from for weight in receipt.weights] != [""]
