"""Model folders whose weights are torch's: the same laws and cases as for safetensors, and becoming such a folder."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import loraformat
from folders import read_index, write_model_folder
from graphs import Array, dyadic_factors, make_adapter, make_target, product, same_bits
from laws.base_laws import Q, StateDictLaws, make_state
from loraformat.bases import NewContents
from loraformat.bases.checkpoint_folder import BASE as SAFETENSORS_FOLDER
from loraformat.bases.torch_folder import BASE
from loraformat.containers.torch_zip import CONTAINER
from loraformat.images import NewOutput
from loraformat.loading import open_base
from outputs import write_images
from torch_zips import read_checked, write_torch

SINGLE = "pytorch_model.bin"


def write_folder(folder: Path, arrays: Mapping[str, Array], shards: int = 2, single: str = SINGLE) -> Path:
    return write_model_folder(folder, arrays, single, shards, write_torch)


class TestTorchFolderLaws(StateDictLaws):
    base = BASE
    shards = 3

    def write(self, folder: Path, arrays: Mapping[str, Array]) -> Path:
        return write_folder(folder, arrays, self.shards)

    def read(self, path: Path) -> dict[str, Array]:
        return {name: array for shard in sorted(path.glob("*.bin")) for name, array in read_checked(shard).items()}


class TestOneFileLaws(TestTorchFolderLaws):
    shards = 0


def test_safetensors_go_first(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "m", make_state())
    assert open_base(base).format == "torch folder"
    (base / "model.safetensors").write_bytes(b"x")
    assert not BASE.accepts(base, b"", 0)
    assert SAFETENSORS_FOLDER.accepts(base, b"", 0)


@pytest.mark.parametrize("single", ["diffusion_pytorch_model.bin", SINGLE])
@pytest.mark.parametrize("shards", [0, 2])
def test_shards_are_merged_and_everything_travels(tmp_path: Path, shards: int, single: str) -> None:
    base = write_folder(tmp_path / "m", make_state(), shards, single)
    factors = dyadic_factors(np.random.default_rng(1), 12, 8, 2)
    loraformat.merge(base, [make_adapter(make_target(Q, factors))], tmp_path / "out")
    names = sorted(path.name for path in base.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "merge_receipt.json"])
    found = {
        name: t.read() for path in (tmp_path / "out").glob("*.bin") for name, t in CONTAINER.open(path).tensors.items()
    }
    expected = make_state()
    expected[f"{Q}.weight"] = (expected[f"{Q}.weight"] + product(factors)).astype(np.float32)
    assert all(same_bits(found[name], expected[name]) for name in expected)
    for name in {"config.json", f"{single}.index.json"} & set(names):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize(
    ("single", "shards", "names"),
    [
        (SINGLE, 0, {"model.safetensors"}),
        ("diffusion_pytorch_model.bin", 0, {"diffusion_pytorch_model.safetensors"}),
        (
            SINGLE,
            2,
            {
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            },
        ),
    ],
)
def test_it_becomes_a_safetensors_folder(tmp_path: Path, single: str, shards: int, names: set[str]) -> None:
    base = open_base(write_folder(tmp_path / "m", make_state(), shards, single))
    assert base.rewriter is not None
    tensors = base.rewriter.output_tensors()
    write_images(base.rewriter.describe_rewritten(NewOutput(tmp_path / "out", 9, "0"), NewContents(tensors)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "config.json", "merge_receipt.json"}
    if shards:
        old, new = read_index(tmp_path / "m", single), read_index(tmp_path / "out")
        assert new["metadata"] == old["metadata"]
        renamed = {
            name: shard.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            for name, shard in old["weight_map"].items()
        }
        assert new["weight_map"] == renamed
    for path in (tmp_path / "out").glob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert header["__metadata__"] == {"format": "pt"}


def test_a_shard_with_other_names_than_usual_keeps_them(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "m", make_state(), 2)
    text = (base / f"{SINGLE}.index.json").read_text().replace("pytorch_model-00001", "first")
    (base / f"{SINGLE}.index.json").write_text(text)
    (base / "pytorch_model-00001-of-00002.bin").rename(base / "first-of-00002.bin")
    rewriter = open_base(base).rewriter
    assert rewriter is not None
    write_images(
        rewriter.describe_rewritten(NewOutput(tmp_path / "out", 9, "0"), NewContents(rewriter.output_tensors()))
    )
    assert set(read_index(tmp_path / "out")["weight_map"].values()) == {
        "first-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize("place", ["../secret.bin", "/etc/passwd", "sub/x.bin", "c:x.bin", ""])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    base = write_folder(tmp_path / "m", make_state())
    index = read_index(base, SINGLE)
    index["weight_map"][f"{Q}.weight"] = place
    (base / f"{SINGLE}.index.json").write_text(json.dumps(index))
    (tmp_path / "secret.bin").write_bytes((base / "pytorch_model-00001-of-00002.bin").read_bytes())
    with pytest.raises(loraformat.RefusedError) as caught:
        open_base(base)
    assert caught.value.codes == ("LF903",)


def test_a_hub_cache_is_merged_from_its_links(tmp_path: Path) -> None:
    """Files of a snapshot are links into a store of blobs, where they have other names."""
    real = write_folder(tmp_path / "real", make_state())
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(real.iterdir())):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    factors = dyadic_factors(np.random.default_rng(1), 12, 8, 2)
    receipt = loraformat.merge(snapshot, [make_adapter(make_target(Q, factors))], tmp_path / "out")
    assert not [problem for problem in receipt.problems if problem.code == "LF609"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*(path.name for path in snapshot.iterdir()), "merge_receipt.json"]
    )
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    found = {n: a for path in (tmp_path / "out").glob("*.bin") for n, a in read_checked(path).items()}
    np.testing.assert_array_equal(found[f"{Q}.weight"], make_state()[f"{Q}.weight"] + product(factors))
