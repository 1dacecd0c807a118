"""A state dict as a base: which tensors are sites, how they are oriented, what `config.json` says about them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import loraformat
from folders import write_loose_state
from graphs import (
    FORMS,
    Array,
    dyadic,
    dyadic_factors,
    make_adapter,
    make_target,
    product,
    read_state,
    round_once,
    same_bits,
    write_state,
)
from laws.base_laws import StateDictLaws
from loraformat.adapter import SlotKind
from loraformat.bases import BaseModel, NewContents
from loraformat.bases.checkpoint import BASE
from loraformat.images import NewOutput
from loraformat.receipt import RECEIPT_KEY
from outputs import write_images


def open_with(folder: Path, arrays: dict[str, Array], config: object = None, **metadata: str) -> BaseModel:
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return BASE.open(write_state(folder / "model.safetensors", arrays, metadata or None))


def matrix(*shape: int, form: Any = np.float32) -> Array:
    return np.ones(shape, form)


class TestCheckpointLaws(StateDictLaws):
    base = BASE

    def write(self, folder: Path, arrays: Mapping[str, Array]) -> Path:
        folder.mkdir(parents=True)
        return write_loose_state(folder / "model.safetensors", arrays)

    def read(self, path: Path) -> dict[str, Array]:
        return load_file(path)


def test_sites_are_the_parameters_of_one_to_five_dimensions(tmp_path: Path) -> None:
    """A weight of one dimension, and whatever is no weight, can only be replaced."""
    arrays = {
        "a.weight": matrix(3, 2),
        "b.weight": matrix(3, 2, 4),
        "c.weight": matrix(3, 2, 4, 4),
        "d.weight": matrix(3, 2, 2, 2, 2),
        "norm.weight": matrix(3),
        "six.weight": matrix(1, 1, 1, 1, 1, 2),
        "a.bias": matrix(3),
        "odd.bias": matrix(3, 2),
        "empty.weight": matrix(0, 2),
        "weight": matrix(3, 2),
        "a.weight.extra": matrix(3, 2),
    }
    base = open_with(tmp_path, arrays)
    found = {f"{site.module} {site.parameter}": set(site.transposed) for site in base.sites}
    kernel, vector = {SlotKind.CONV, SlotKind.PARAMETER}, {SlotKind.PARAMETER}
    assert found == {
        "a weight": {SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.EMBEDDING, SlotKind.PARAMETER},
        **dict.fromkeys(("b weight", "c weight", "d weight"), kernel),
        **dict.fromkeys(("norm weight", "a bias", "odd bias", "a.weight extra"), vector),
        # A matrix that is a parameter of its own: an adapter calls it by its whole name.
        "a.weight.extra weight": {SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.PARAMETER},
    }
    assert not any(site.transposed[SlotKind.PARAMETER] for site in base.sites)
    assert sorted(tensor.name for tensor in base.list_tensors()) == sorted(arrays)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slot", list(SlotKind)[:4], ids=str)
def test_each_slot_is_merged_in_its_orientation(tmp_path: Path, form: str, slot: SlotKind) -> None:
    """Linear (out, in); Conv1D and embeddings stored transposed; conv (out, in, *kernel). The last step is rounding."""
    rng = np.random.default_rng(1)
    out, inner, rank = 6, 6, 2
    if slot is SlotKind.CONV:
        weight = dyadic(rng, out, inner, 3, step=0.5)
        factors = dyadic(rng, rank, inner, 3, reach=2), dyadic(rng, out, rank, 1, reach=2)
        delta = product(factors, 2.0).reshape(weight.shape)
    else:
        weight = dyadic(rng, out, inner, step=0.5)
        factors = dyadic(rng, rank, inner, reach=2), dyadic(rng, out, rank, reach=2)
        delta = product(factors, 2.0)
        delta = delta if slot is SlotKind.LINEAR else delta.T
    stored = weight.astype(FORMS[form])
    base = write_state(tmp_path / "base.safetensors", {"m.weight": stored, "other": matrix(3)})
    output = tmp_path / "out.safetensors"
    loraformat.merge(base, [make_adapter(make_target("m", factors, slot, 2.0))], output, min_retained=-9.0)
    expected = round_once(stored.astype(np.float64) + delta, FORMS[form])
    assert same_bits(read_state(output)["m.weight"], expected)
    assert not same_bits(stored, expected)


@pytest.mark.parametrize("family", ["gpt2", "imagegpt", "openai-gpt"])
def test_conv1d_families_store_their_matrices_transposed(tmp_path: Path, family: str) -> None:
    """An adapter trained with fan_in_fan_out unset still means the module's own `(out, in)`."""
    rng = np.random.default_rng(2)
    arrays = {"h.0.attn.c_attn.weight": dyadic(rng, 6, 6), "lm_head.weight": dyadic(rng, 6, 6)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    base = write_state(tmp_path / "base.safetensors", arrays)
    factors = dyadic_factors(rng, 6, 6, 2)
    targets = [make_target(name.removesuffix(".weight"), factors) for name in arrays]
    loraformat.merge(base, [make_adapter(*targets)], tmp_path / "out.safetensors")
    merged = read_state(tmp_path / "out.safetensors")
    attention, head = arrays.values()
    np.testing.assert_array_equal(merged["h.0.attn.c_attn.weight"], attention + product(factors).T)
    np.testing.assert_array_equal(merged["lm_head.weight"], head + product(factors))


def test_other_families_do_not(tmp_path: Path) -> None:
    base = open_with(tmp_path, {"h.0.attn.c_attn.weight": matrix(6, 6)}, {"model_type": "llama"})
    assert base.sites[0].transposed[SlotKind.LINEAR] is False


@pytest.mark.parametrize("tied", [True, False, None, 1, "true"])
def test_tied_embeddings_are_shared_when_the_configuration_says_so(tmp_path: Path, tied: object) -> None:
    arrays = {"model.embed_tokens.weight": matrix(9, 4), "model.layers.0.fc.weight": matrix(3, 2)}
    base = open_with(tmp_path, arrays, {"tie_word_embeddings": tied})
    by_module = {site.module: site.weight for site in base.sites}
    embedding, other = by_module["model.embed_tokens"], by_module["model.layers.0.fc"]
    assert embedding is not None
    assert other is not None
    assert len(embedding.consumers) == (2 if tied is True else 1)
    assert len(other.consumers) == 1


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"llm_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}, True),
        ({"text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": True}, False),
        ({"text_config": {}, "tie_word_embeddings": True}, True),
        ({"text_config": None, "tie_word_embeddings": True}, True),
        ({"vision_config": {"tie_word_embeddings": True}}, False),
        ({"architectures": ["BertForMaskedLM"], "tie_word_embeddings": True}, True),
        ({"architectures": ["BertModel"], "tie_word_embeddings": True}, True),
        ({"architectures": ["BertForSequenceClassification"], "tie_word_embeddings": True}, False),
        ({}, False),
    ],
)
def test_the_language_model_s_own_word_on_ties_counts(tmp_path: Path, config: object, tied: bool) -> None:
    base = open_with(tmp_path, {"model.embed_tokens.weight": matrix(9, 4)}, config)
    assert base.sites[0].weight is not None
    assert len(base.sites[0].weight.consumers) == (2 if tied else 1)


def test_a_target_on_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    open_with(tmp_path, {"model.embed_tokens.weight": matrix(9, 4)}, {"tie_word_embeddings": True})
    adapter = make_adapter(make_target("model.embed_tokens", dyadic_factors(rng, 4, 9, 2), SlotKind.EMBEDDING))
    with pytest.raises(loraformat.FindingError) as caught:
        loraformat.merge(tmp_path / "model.safetensors", [adapter], tmp_path / "out.safetensors")
    assert caught.value.codes == ("LF402",)
    assert "tie_word_embeddings" in str(caught.value)


@pytest.mark.parametrize("form", [np.int8, np.uint8, np.int32, np.bool_, ml_dtypes.float8_e8m0fnu], ids=str)
def test_forms_that_are_no_plain_floats_are_refused(tmp_path: Path, form: Any) -> None:
    rng = np.random.default_rng(4)
    path = write_state(tmp_path / "model.safetensors", {"m.weight": matrix(3, 2, form=form)})
    with pytest.raises(loraformat.FindingError) as caught:
        loraformat.merge(path, [make_adapter(make_target("m", dyadic_factors(rng, 3, 2, 1)))], tmp_path / "o")
    assert caught.value.codes == ("LF403",)
    assert np.dtype(form).name in str(caught.value)


def test_the_structure_digest_ignores_numbers_and_our_receipt_alone(tmp_path: Path) -> None:
    def digest(value: float, shape: tuple[int, ...] = (3, 2), name: str = "a.weight", **metadata: str) -> str:
        return open_with(tmp_path, {name: np.full(shape, value, np.float32)}, **metadata).structure_sha256

    assert digest(1.0) == digest(2.0) == digest(1.0, **{RECEIPT_KEY: "{}"})
    assert len({digest(1.0), digest(1.0, (2, 3)), digest(1.0, name="b.weight"), digest(1.0, author="x")}) == 4


def test_its_receipt_is_read(tmp_path: Path) -> None:
    base = open_with(tmp_path, {"a.weight": matrix(3, 2)}, **{RECEIPT_KEY: '{"version":"1.0"}'})
    assert base.parent_receipt == {"version": "1.0"}
    assert list(base.problems) == []


def test_a_receipt_that_is_not_json_is_a_note(tmp_path: Path) -> None:
    base = open_with(tmp_path, {"a.weight": matrix(3, 2)}, **{RECEIPT_KEY: "{"})
    assert base.parent_receipt is None
    assert [(problem.code, problem.severity) for problem in base.problems] == [("LF104", "note")]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": NaN}', '{"a": 1, "a": 2}'])
def test_a_broken_configuration_is_an_error_not_a_guess(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(loraformat.InputError):
        open_with(tmp_path, {"a.weight": matrix(3, 2)})


def test_its_own_metadata_stays_when_it_is_rewritten(tmp_path: Path) -> None:
    base = open_with(tmp_path, {"a.weight": matrix(3, 2)}, **{RECEIPT_KEY: "{}", "format": "pt"})
    assert base.rewriter is not None
    images = base.rewriter.describe_rewritten(
        NewOutput(tmp_path / "out", 13, "0"), NewContents(base.rewriter.output_tensors())
    )
    write_images(images, base.rewriter.encode_receipt('{"a":"b"}'))
    with safe_open(tmp_path / "out", "np") as theirs:
        assert theirs.metadata() == {RECEIPT_KEY: '{"a":"b"}', "format": "pt"}


def test_a_single_file_says_that_no_configuration_follows(tmp_path: Path) -> None:
    base = open_with(tmp_path, {"a.weight": matrix(3, 2)}, {"vocab_size": 3})
    assert base.rewriter is not None
    assert base.rewriter.check_config({}) == []
    (problem,) = base.rewriter.check_config({"vocab_size": 4})
    assert (problem.code, problem.severity) == ("LF614", "warning")
    assert "vocab_size = 4" in problem.found
