"""A torch checkpoint as a base: checksums, tied and sliced tensors, what a trainer puts around the state dict."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from graphs import Array, dyadic_factors, make_adapter, make_target
from laws.base_laws import StateDictLaws
from loraformat.bases import BaseModel
from loraformat.bases.torch_checkpoint import BASE
from loraformat.containers.torch_zip import CONTAINER
from loraformat.images import NewOutput
from loraformat.loading import open_base
from torch_zips import checkpoint, number, pairs, read_checked, view, write_torch

SIX = np.arange(6, dtype=np.float32).reshape(3, 2)


class TestTorchCheckpointLaws(StateDictLaws):
    base = BASE

    def write(self, folder: Path, arrays: Mapping[str, Array]) -> Path:
        folder.mkdir(parents=True)
        return write_torch(folder / "pytorch_model.bin", arrays)

    def read(self, path: Path) -> dict[str, Array]:
        return read_checked(path)


def consumers(base: BaseModel) -> dict[str, set[str]]:
    return {site.id: set(site.weight.consumers) for site in base.sites if site.weight is not None}


def say(name: str) -> str:
    return f"the tensor {name!r}, whose bytes overlap its own"


def test_tied_tensors_are_sites_of_one_weight(tmp_path: Path) -> None:
    arrays = {"embed.weight": SIX, "other.weight": SIX + 1}
    base = open_base(write_torch(tmp_path / "m.bin", arrays, {"head.weight": ("embed.weight", (3, 2), (2, 1))}))
    tied = {"embed.weight", "head.weight"}
    assert consumers(base) == {"embed.weight": tied, "head.weight": tied, "other.weight": {"other.weight"}}
    keys = {site.id: site.weight.key for site in base.sites if site.weight is not None}
    assert keys == {"embed.weight": "embed.weight", "head.weight": "embed.weight", "other.weight": "other.weight"}
    rng = np.random.default_rng(1)
    adapter = make_adapter(make_target("head", dyadic_factors(rng, 3, 2, 1)))
    with pytest.raises(loraformat.FindingError) as caught:
        loraformat.merge(tmp_path / "m.bin", [adapter], tmp_path / "out.bin")
    assert caught.value.codes == ("LF402",)
    assert "embed.weight" in str(caught.value)


def test_tensors_that_overlap_are_consumers_of_one_another(tmp_path: Path) -> None:
    views = {
        "whole.bias": ("a.weight", (6,), (1,)),
        "upper.weight": ("a.weight", (2, 2), (2, 1)),
        "turned.weight": ("a.weight", (2, 3), (1, 2)),
        "none.weight": ("a.weight", (0, 2), (2, 1)),
    }
    base = open_base(write_torch(tmp_path / "m.pt", {"a.weight": SIX, "b.weight": SIX}, views))
    found = consumers(base)
    assert found["a.weight"] == {"a.weight", say("whole.bias"), say("upper.weight"), say("turned.weight")}
    assert found["upper.weight"] >= {"upper.weight", say("a.weight")}
    assert len(found["whole.bias"]) > 1
    assert found["b.weight"] == {"b.weight"}
    obstacles = {site.id: site.obstacle for site in base.sites if site.obstacle is not None}
    assert obstacles.keys() == {"turned.weight"}
    assert obstacles["turned.weight"].code == "LF150"
    assert "contiguous()" in obstacles["turned.weight"].advice


def test_a_target_on_a_view_is_refused(tmp_path: Path) -> None:
    write_torch(tmp_path / "m.pt", {"a.weight": SIX}, {"turned.weight": ("a.weight", (2, 3), (1, 2))})
    adapter = make_adapter(make_target("turned", dyadic_factors(np.random.default_rng(1), 2, 3, 1)))
    with pytest.raises(loraformat.FindingError) as caught:
        loraformat.merge(tmp_path / "m.pt", [adapter], tmp_path / "out.pt")
    assert caught.value.codes == ("LF150",)


def test_many_views_of_one_storage_take_linear_time_and_room(tmp_path: Path) -> None:
    """Every pair of n overlapping tensors would be n² words."""
    count = 3000
    form, big = np.dtype(np.float32), np.zeros(count + 8, np.float32)
    slices = [(f"m{i}.bias", view(form, "0", big.nbytes, (8,), None, i)) for i in range(count)]
    same = [(f"s{i}.bias", view(form, "0", big.nbytes, (count,))) for i in range(count)]
    (tmp_path / "m.pt").write_bytes(checkpoint(pairs([*slices, *same]), {"0": big.tobytes()}))
    weights = [site.weight for site in open_base(tmp_path / "m.pt").sites if site.weight is not None]
    assert len(weights) == 2 * count
    assert all(len(weight.consumers) > 1 for weight in weights)
    assert sum(len(shared) for shared in {id(w.consumers): w.consumers for w in weights}.values()) < 20 * count


def test_only_members_with_touched_spans_get_another_checksum(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "m.pt", {"a.weight": SIX, "b.weight": SIX})
    data = bytearray(path.read_bytes())
    base = open_base(path)
    images = base.describe_images(NewOutput(tmp_path / "out.pt", 10, "0"))
    spans = {tensor.name: tensor.span for tensor in base.list_tensors()}
    for span in spans.values():
        data[span.offset] ^= 1
    (tmp_path / "out.pt").write_bytes(data)
    with (tmp_path / "out.pt").open("r+b") as stream:
        base.finish_output(images[0], stream.fileno(), [spans["a.weight"]])
    with zipfile.ZipFile(tmp_path / "out.pt") as theirs:
        assert theirs.testzip() == "m/data/1"


def test_a_trainer_s_checkpoint_keeps_what_is_around_the_state_dict(tmp_path: Path) -> None:
    held = pairs([("a.weight", view(SIX.dtype, "0", SIX.nbytes, SIX.shape))])
    path = tmp_path / "last.ckpt"
    path.write_bytes(checkpoint(pairs([("state_dict", held), ("epoch", number(3))]), {"0": SIX.tobytes()}))
    factors = dyadic_factors(np.random.default_rng(1), 3, 2, 1)
    loraformat.merge(path, [make_adapter(make_target("a", factors))], tmp_path / "out.ckpt")
    merged = CONTAINER.open(tmp_path / "out.ckpt")
    np.testing.assert_array_equal(merged.tensors["a.weight"].read(), SIX + factors[1] @ factors[0])
    assert merged.metadata == CONTAINER.open(path).metadata
    assert (tmp_path / "out.ckpt.merge_receipt.json").is_file()


def test_values_beside_the_tensors_are_named_when_they_are_left_out(tmp_path: Path) -> None:
    held = pairs([("a.weight", view(SIX.dtype, "0", SIX.nbytes, SIX.shape))])
    path = tmp_path / "last.ckpt"
    path.write_bytes(checkpoint(pairs([("state_dict", held), ("epoch", number(3))]), {"0": SIX.tobytes()}))
    rewriter = open_base(path).rewriter
    assert rewriter is not None
    assert [(problem.code, problem.severity) for problem in rewriter.problems] == [("LF613", "note")]
    assert "epoch" in rewriter.problems[0].found


@pytest.mark.parametrize("tied", [True, False])
def test_tied_tensors_are_written_once_where_the_configuration_ties_them(tmp_path: Path, tied: bool) -> None:
    views: dict[str, Any] = {
        "lm_head.weight": ("model.embed_tokens.weight", (3, 2), (2, 1)),
        "encoder.embed_tokens.weight": ("model.embed_tokens.weight", (3, 2), (2, 1)),
    }
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    rewriter = open_base(write_torch(tmp_path / "m.bin", {"model.embed_tokens.weight": SIX}, views)).rewriter
    assert rewriter is not None
    names = ["model.embed_tokens.weight", *(() if tied else ("lm_head.weight",)), "encoder.embed_tokens.weight"]
    assert [tensor.name for tensor in rewriter.output_tensors()] == names
    codes = ["LF611", "LF612"] if tied else ["LF612"]
    assert [problem.code for problem in rewriter.problems] == codes
    assert all(problem.severity == "note" for problem in rewriter.problems)


def test_an_older_receipt_is_the_parent(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "m.bin", {"a.weight": SIX})
    (tmp_path / "m.bin.merge_receipt.json").write_text('{"version":"1.0"}')
    assert open_base(path).parent_receipt == {"version": "1.0"}
