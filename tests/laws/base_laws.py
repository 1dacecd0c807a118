"""What every base that is a state dict keeps. Its test class inherits `StateDictLaws` and says how to write and read.

The class has no `Test` prefix, so that it is collected only where it is inherited.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat
from graphs import (
    Array,
    dyadic,
    dyadic_factors,
    make_adapter,
    make_target,
    product,
    round_once,
    same_bits,
)
from laws.container_laws import STRANGERS
from loraformat.adapter import SlotKind
from loraformat.bases import BASES, BaseFormat, BaseModel, NewContents
from loraformat.dtypes import BY_NAME
from loraformat.errors import LoraformatError
from loraformat.images import NewOutput, OutputTensor
from loraformat.loading import open_base
from outputs import rewrite_spans, write_images

FORMS: dict[str, Any] = {
    name: BY_NAME[name].numpy()
    for name in (
        *("float64", "float32", "float16", "bfloat16"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
}
"""The number forms that are merged."""

Q, HEAD = "model.layers.0.self_attn.q_proj", "lm_head"


def make_state(form: Any = np.float32) -> dict[str, Array]:
    """Return a small state dict: matrices, a kernel, vectors, integers, a scalar."""
    rng = np.random.default_rng(7)
    return {
        "model.embed_tokens.weight": dyadic(rng, 11, 8).astype(form),
        f"{Q}.weight": dyadic(rng, 12, 8).astype(form),
        f"{Q}.bias": dyadic(rng, 12).astype(form),
        "model.layers.1.conv.weight": dyadic(rng, 4, 3, 2, 5).astype(form),
        "model.layers.1.norm.weight": dyadic(rng, 8).astype(form),
        "model.steps": np.array(3, np.int64),
        f"{HEAD}.weight": dyadic(rng, 11, 8).astype(form),
    }


class StateDictLaws:
    """The laws.

    Attributes:
        base: the base format.
        forms: number forms that its container has.
    """

    base: BaseFormat
    forms: ClassVar[tuple[str, ...]] = tuple(FORMS)

    @abstractmethod
    def write(self, folder: Path, arrays: Mapping[str, Array]) -> Path:
        """Write a base into an empty or missing folder, without our code where that can be; return what to open."""

    @abstractmethod
    def read(self, path: Path) -> dict[str, Array]:
        """Return the tensors of a base or output, without our code where that can be, and check all checksums."""

    def output(self, path: Path, name: str = "out") -> Path:
        """Return where an output of the base at `path` would stand."""
        return path.with_name(name + path.suffix)

    @pytest.fixture
    def opened(self, tmp_path: Path) -> BaseModel:
        return open_base(self.write(tmp_path / "base", make_state()))

    def copy(self, base: BaseModel, receipt: str = '{"version":"1.0"}', blank_bytes: int = 40) -> Path:
        """Write the output of a merge that changes nothing."""
        images = base.describe_images(NewOutput(self.output(base.path), blank_bytes, "0"))
        write_images(images, base.encode_receipt(receipt))
        return self.output(base.path)

    def test_the_room_has_it_and_it_knows_its_own(self, opened: BaseModel) -> None:
        assert self.base in [member for _, member in BASES]
        path = opened.path
        head, size = (b"", 0) if path.is_dir() else (path.read_bytes()[:64], path.stat().st_size)
        accepting = [member for _, member in BASES if member.accepts(path, head, size)]
        assert accepting == [self.base]
        assert opened.format == self.base.name

    @pytest.mark.parametrize("kind", STRANGERS)
    def test_it_does_not_claim_strangers(self, kind: str, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(STRANGERS[kind])
        assert not self.base.accepts(tmp_path / "x", STRANGERS[kind][:64], len(STRANGERS[kind]))
        assert not self.base.accepts(tmp_path, b"", 0)

    def test_tensors_are_those_of_the_files(self, opened: BaseModel) -> None:
        found = {tensor.name: tensor.read() for tensor in opened.list_tensors()}
        expected = make_state()
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)

    def test_sites_are_the_parameters(self, opened: BaseModel) -> None:
        sites = {site.id: site for site in opened.sites}
        assert sites.keys() == make_state().keys() - {"model.steps"}
        assert sites[f"{Q}.bias"].parameter == "bias"
        for name, site in sites.items():
            assert site.obstacle is None
            assert site.weight is not None
            assert (site.weight.name, site.weight.consumers) == (name, {name})
        kinds = {name: set(site.transposed) for name, site in sites.items()}
        assert SlotKind.CONV in kinds["model.layers.1.conv.weight"]
        assert kinds[f"{Q}.weight"] >= {SlotKind.LINEAR, SlotKind.EMBEDDING}

    def test_integers_are_obstacles(self, tmp_path: Path) -> None:
        arrays = {"a.weight": np.ones((3, 2), np.int8), "b.weight": np.ones((3, 2), np.float32)}
        sites = {site.id: site for site in open_base(self.write(tmp_path / "base", arrays)).sites}
        assert sites["a.weight"].weight is None
        assert sites["a.weight"].obstacle is not None
        assert sites["a.weight"].obstacle.code == "LF403"

    def test_a_copy_is_the_base_with_a_receipt(self, opened: BaseModel) -> None:
        copy = self.copy(opened)
        found, expected = self.read(copy), make_state()
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)
        again = open_base(copy)
        assert again.structure_sha256 == opened.structure_sha256
        assert again.parent_receipt == {"version": "1.0"}
        assert opened.parent_receipt is None
        assert not again.problems

    def test_a_copy_of_a_copy_has_the_newer_receipt(self, opened: BaseModel) -> None:
        again = open_base(self.copy(opened))
        images = again.describe_images(NewOutput(self.output(opened.path, "twice"), 60, "0"))
        write_images(images, again.encode_receipt('{"é":2}'))
        assert open_base(self.output(opened.path, "twice")).parent_receipt == {"é": 2}

    def test_a_receipt_that_is_not_json_is_a_note(self, opened: BaseModel) -> None:
        again = open_base(self.copy(opened, "{"))
        assert again.parent_receipt is None
        assert [(problem.code, problem.severity) for problem in again.problems] == [("LF104", "note")]

    def test_the_receipt_s_blank_is_in_the_last_file(self, opened: BaseModel) -> None:
        images = opened.describe_images(NewOutput(self.output(opened.path), 40, "0"))
        lengths = [[piece.length for _, piece in image.placed() if type(piece).__name__ == "Blank"] for image in images]
        assert lengths[-1] == [40]
        assert not any(lengths[:-1])

    def test_rewritten_spans_are_found_by_other_readers(self, opened: BaseModel) -> None:
        """Checksums of touched members are true again, and nothing else changes."""
        copy = self.copy(opened)
        images = opened.describe_images(NewOutput(copy, 40, "0"))
        expected = make_state()
        for name in (f"{Q}.weight", "model.layers.1.norm.weight"):
            expected[name] = expected[name] + np.float32(1)
        changed = {
            name: array.tobytes() for name, array in expected.items() if not np.array_equal(array, make_state()[name])
        }
        assert len(changed) == 2
        rewrite_spans(opened, images, changed)
        found = self.read(copy)
        assert all(same_bits(found[name], expected[name]) for name in expected)

    def test_finishing_an_output_without_changes_changes_nothing(self, opened: BaseModel) -> None:
        copy = self.copy(opened)
        images = opened.describe_images(NewOutput(copy, 40, "0"))
        before = [image.path.read_bytes() for image in images]
        rewrite_spans(opened, images, {})
        assert [image.path.read_bytes() for image in images] == before

    def test_each_form_is_merged(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(3)
        for name in self.forms:
            base = self.write(tmp_path / name, make_state(FORMS[name]))
            factors = dyadic_factors(rng, 12, 8, 2)
            output = self.output(base, f"out-{name}")
            loraformat.merge(base, [make_adapter(make_target(Q, factors))], output, min_retained=-9.0)
            tensors = {tensor.name: tensor for tensor in open_base(output).list_tensors()}
            expected = make_state(FORMS[name])
            wanted = round_once(expected[f"{Q}.weight"].astype(np.float64) + product(factors), FORMS[name])
            assert not same_bits(expected[f"{Q}.weight"], wanted)
            expected[f"{Q}.weight"] = wanted
            for tensor, array in expected.items():
                assert same_bits(tensors[tensor].read(), array), (name, tensor)

    def merge(self, tmp_path: Path, **options: Any) -> tuple[Path, dict[str, Array]]:
        """Merge an adapter; return the output and what it must hold."""
        base = self.write(tmp_path / "base", make_state())
        factors = dyadic_factors(np.random.default_rng(3), 12, 8, 2)
        output = self.output(base) if "to" not in options else base.with_name(f"out{open_base(base).rewriter.suffix}")
        loraformat.merge(base, [make_adapter(make_target(Q, factors))], output, **options)
        expected = make_state()
        expected[f"{Q}.weight"] = (expected[f"{Q}.weight"] + product(factors)).astype(np.float32)
        return output, expected

    def test_a_merged_model_is_read_by_others(self, tmp_path: Path) -> None:
        output, expected = self.merge(tmp_path)
        found = self.read(output)
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("dtype", [None, "float16"])
    def test_a_merge_into_safetensors(self, dtype: str | None, tmp_path: Path) -> None:
        output, expected = self.merge(tmp_path, to="safetensors", dtype=dtype)
        if dtype is not None:
            floats = {name: array.astype(dtype) for name, array in expected.items() if array.dtype.kind == "f"}
            expected |= floats
        found = self.read_safetensors(open_base(output))
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("name", ["a\x1b[2J.weight", "a\u202eb.weight", "a\n.weight"])
    def test_names_that_could_drive_a_terminal_are_refused(self, name: str, tmp_path: Path) -> None:
        path = self.write(tmp_path / "base", {name: np.ones((3, 2), np.float32), "b.weight": np.ones(3, np.float32)})
        with pytest.raises(LoraformatError) as caught:
            open_base(path)
        assert caught.value.codes[0] in {"LF301", "LF902"}
        assert "\x1b" not in str(caught.value)

    # --- rewriting -----------------------------------------------------------------------------------------------

    def rewritten(self, base: BaseModel, tensors: list[OutputTensor], fresh: Mapping[str, bytes] = {}) -> BaseModel:
        """Write the base anew with these tensors and open the output."""
        assert base.rewriter is not None
        output = base.path.with_name(f"rewritten{base.rewriter.suffix}")
        images = base.rewriter.describe_rewritten(NewOutput(output, 40, "0"), NewContents(tensors))
        write_images(images, base.rewriter.encode_receipt('{"version":"1.0"}'), fresh)
        again = open_base(output)
        assert again.format == base.rewriter.format
        assert again.folder_mark == base.rewriter.folder_mark
        assert again.parent_receipt == {"version": "1.0"}
        return again

    def read_safetensors(self, base: BaseModel) -> dict[str, Array]:
        paths = base.path.glob("*.safetensors") if base.path.is_dir() else [base.path]
        return {name: array for path in paths for name, array in load_file(path).items()}

    def test_rewriting_that_changes_nothing(self, opened: BaseModel) -> None:
        assert opened.rewriter is not None
        assert not opened.rewriter.problems
        found = self.read_safetensors(self.rewritten(opened, opened.rewriter.output_tensors()))
        expected = make_state()
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)

    def test_rewriting_with_new_larger_cast_and_missing_tensors(self, opened: BaseModel) -> None:
        assert opened.rewriter is not None
        tensors = {tensor.name: tensor for tensor in opened.rewriter.output_tensors()}
        embedding, bias = np.full((13, 8), 2, np.float32), np.arange(8, dtype=np.float32)
        half = make_state()[f"{Q}.weight"].astype(ml_dtypes.bfloat16)
        source = tensors.pop(f"{Q}.weight").source
        del tensors["model.steps"]
        edited = [
            OutputTensor("model.embed_tokens.weight", BY_NAME["float32"], (13, 8), None),
            OutputTensor("model.layers.1.norm.bias", BY_NAME["float32"], (8,), None),
            OutputTensor(f"{Q}.weight", BY_NAME["bfloat16"], (12, 8), source),
        ]
        fresh = {tensor.name: array.tobytes() for tensor, array in zip(edited, (embedding, bias, half), strict=True)}
        tensors |= {tensor.name: tensor for tensor in edited}
        found = self.read_safetensors(self.rewritten(opened, list(tensors.values()), fresh))
        expected = make_state() | {"model.layers.1.norm.bias": bias, "model.embed_tokens.weight": embedding}
        expected[f"{Q}.weight"] = half
        del expected["model.steps"]
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)

    def test_the_checksums_of_a_rewritten_file_are_left_alone(self, opened: BaseModel) -> None:
        assert opened.rewriter is not None
        output = opened.path.with_name(f"rewritten{opened.rewriter.suffix}")
        images = opened.rewriter.describe_rewritten(
            NewOutput(output, 40, "0"), NewContents(opened.rewriter.output_tensors())
        )
        paths = write_images(images)
        before = [path.read_bytes() for path in paths]
        touched = [tensor.span for tensor in opened.list_tensors()]
        for image in images:
            with image.path.open("r+b") as stream:
                opened.finish_output(image, stream.fileno(), touched)
        assert [path.read_bytes() for path in paths] == before
