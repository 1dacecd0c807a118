"""From a path to an adapter or a base: what people hand us, and what they are told."""

import hashlib
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from builders import lora_factors, write_config, write_onnx, write_peft, write_tensors
from loraformat.errors import LoraformatError
from loraformat.loading import is_base, load_adapter, open_base, open_bundle
from loraformat.loading.readers import choose_scheme
from loraformat.problems import Problem
from loraformat.rules import check_adapter
from loraformat.schemes import SCHEMES, StatedScale

DICE = np.random.default_rng(0)
FACTORS = {"model.q": lora_factors(DICE, 6, 4, 2), "model.v": lora_factors(DICE, 3, 4, 2)}
FILE = "adapter_model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def refusal(path: Path, **options: Any) -> Problem:
    with pytest.raises(LoraformatError) as caught:
        load_adapter(path, **options)
    (problem,) = caught.value.problems
    return problem


def torch_zip(path: Path) -> Path:
    """Write what torch.save writes, as far as anyone looks: a zip without compression that holds a pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("adapter_model/data.pkl", pickle.dumps({"lora_A": [1.0]}, protocol=2))
        archive.writestr("adapter_model/version", "3\n")
    return path


def torch_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write float32 tensors 0, 1, 2 ... as torch.save does; the pickle is put together opcode by opcode."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def sizes(*values: int) -> bytes:
        return b"(" + b"".join(b"J" + value.to_bytes(4, "little") for value in values) + b"t"

    body, parts = b"", {}
    for index, (key, shape) in enumerate(shapes.items()):
        elements = int(np.prod(shape))
        parts[f"data/{index}"] = np.arange(elements, dtype="<f4").tobytes()
        held = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(index)) + text("cpu")
        held += b"J" + elements.to_bytes(4, "little") + b"tQ"
        made = held + b"J" + bytes(4) + sizes(*shape) + sizes(shape[1], 1) + b"\x89ccollections\nOrderedDict\n)R"
        body += text(key) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + made + b"tR"
    parts |= {"data.pkl": b"\x80\x02}(" + body + b"u.", "byteorder": b"little", "version": b"3\n"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(f"adapter_model/{name}", data)
    return path


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_folder_and_its_file_are_one_adapter(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", FACTORS)
    one, other = load_adapter(folder), load_adapter(folder / FILE)
    assert [target.name for target in one.targets] == [target.name for target in other.targets] == sorted(FACTORS)
    assert [target.scaling for target in one.targets] == [target.scaling for target in other.targets]
    assert one.source == str(folder)
    assert one.sha256 == other.sha256 == hashlib.sha256((folder / FILE).read_bytes()).hexdigest()


def test_the_digest_is_that_of_a_large_file_too(tmp_path: Path) -> None:
    factors = {"m.q": (DICE.standard_normal((8, 300_000)), DICE.standard_normal((3, 8)))}  # 19 MB: several steps
    folder = write_peft(tmp_path / "a", factors)
    assert load_adapter(folder).sha256 == hashlib.sha256((folder / FILE).read_bytes()).hexdigest()


def test_another_name_has_no_configuration(tmp_path: Path) -> None:
    """Beside any other file the configuration may be that of a neighbour."""
    folder = write_peft(tmp_path / "a", FACTORS)
    (folder / FILE).rename(folder / "epoch-2.safetensors")
    (folder / "epoch-1.safetensors").write_bytes(b"")
    assert refusal(folder / "epoch-2.safetensors").code == "LF211"
    adapter = load_adapter(folder / "epoch-2.safetensors", stated=StatedScale(alpha=4.0))
    assert {target.scale for target in adapter.targets} == {2.0}


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", FACTORS)
    (folder / "adapter_config.json").unlink()
    assert refusal(folder).code == "LF211"
    assert load_adapter(folder, stated=StatedScale(multiplier=0.5)).targets[0].scale == 0.5


def test_a_link_is_followed(tmp_path: Path) -> None:
    """As in a hub cache, whose blobs have no suffix."""
    folder = write_peft(tmp_path / "a", FACTORS)
    blob = (folder / FILE).rename(tmp_path / "0a1b2c")
    (folder / FILE).symlink_to(blob)
    assert len(load_adapter(folder).targets) == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"peft_type": "LORA", "peft_type": "IA3"}', "LF105"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "LF104"),
        ('{"peft_type": "LORA",', "LF104"),
        ("[1]", "LF104"),
        ('{"r": 8}', "LF121"),
        (LFS.decode(), "LF111"),
        ('{"peft_type": "PSOFT"}', "LF209"),
    ],
)
def test_a_configuration_that_is_none(tmp_path: Path, text: str, code: str) -> None:
    folder = write_peft(tmp_path / "a", FACTORS)
    (folder / "adapter_config.json").write_text(text)
    assert refusal(folder).code == code


def test_a_configuration_that_is_too_large(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", FACTORS)
    os.truncate(folder / "adapter_config.json", 10_000_001)
    assert refusal(folder).code == "LF110"


# --- what is not -----------------------------------------------------------------------------------------------------


def test_no_such_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path / "absent" / FILE, tmp_path / ("x" * 5000), tmp_path / "a\0b"):
        assert refusal(path).code == "LF100"
        for call in (open_base, is_base):
            with pytest.raises(LoraformatError) as caught:
                call(path)
            assert caught.value.codes == ("LF100",)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").code == "LF905"


def test_an_empty_folder(tmp_path: Path) -> None:
    problem = refusal(tmp_path)
    assert problem.code == "LF121"
    assert "an empty folder" in problem.found
    assert FILE in problem.expected


def test_a_folder_without_factors_says_what_is_in_it(tmp_path: Path) -> None:
    write_config(tmp_path, {"r": 2})
    (tmp_path / "README.md").touch()
    problem = refusal(tmp_path)
    assert problem.code == "LF121"
    assert "README.md, adapter_config.json" in problem.found


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_called_one(tmp_path: Path, name: str) -> None:
    """Alone it is refused unread; in torch's zip format it is read without being run, and may hold no tensor."""
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}, protocol=2))
    problem = refusal(tmp_path)
    assert (problem.code, problem.where) == ("LF111", str(tmp_path / name))
    assert "pickle" in problem.found
    assert "safetensors" in problem.advice
    torch_zip(tmp_path / name)
    problem = refusal(tmp_path)
    assert (problem.code, problem.where) == ("LF121", str(tmp_path))
    assert "without tensors" in problem.found


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_torch_checkpoint_beside_its_configuration_is_an_adapter(tmp_path: Path, name: str) -> None:
    """The bytes are what torch.save writes, as far as a reader looks; the numbers are float32 in order."""
    shapes = {"m.q.lora_A.weight": (2, 3), "m.q.lora_B.weight": (4, 2)}
    write_config(tmp_path, {"r": 2, "lora_alpha": 4})
    torch_tensors(tmp_path / name, {f"base_model.model.{key}": shape for key, shape in shapes.items()})
    (target,) = load_adapter(tmp_path).targets
    assert (target.name, target.kind, target.scale) == ("m.q", "lora", 2.0)
    assert {f"m.q.{role}": factor.shape for role, factor in target.factors.items()} == shapes
    assert target.factors["lora_B.weight"].read().ravel().tolist() == list(range(8))


def test_a_pickle_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(LFS)
    problem = refusal(tmp_path)
    assert problem.code == "LF111"
    assert "git lfs pull" in problem.advice


def test_a_pickle_of_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"?" * 100)
    assert refusal(tmp_path).code == "LF121"


def test_the_factors_come_before_an_old_pickle(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", FACTORS)
    torch_zip(folder / "adapter_model.bin")
    assert load_adapter(folder).targets


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (LFS, "LF111", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "LF111", ""),
        (b"PK\x03\x04" + bytes(60), "LF111", ""),
        (b'{"r": 8}' + b" " * 60, "LF111", ""),
        (b"", "LF101", ""),
        (b"\xff" * 100, "LF102", ""),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_factors_that_are_something_else(tmp_path: Path, content: bytes, code: str, words: str, folder: bool) -> None:
    (tmp_path / FILE).write_bytes(content)
    problem = refusal(tmp_path if folder else tmp_path / FILE)
    assert problem.code == code
    assert words in problem.advice


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.bin", LFS, "LF111"),
        ("a.html", b"<html>", "LF111"),
        ("adapter_config.json", b'{"peft_type": "LORA"}', "LF111"),
        ("a.txt", b"Dear reader, these are words.", "LF111"),
        ("a.safetensors", b"Entry not found", "LF111"),
        ("a.dat", b"\x00\x01 no text", "LF121"),
        ("a.pkl", b"\x80\x04\x95" + bytes(60), "LF111"),
        ("a", b"", "LF121"),
    ],
)
def test_files_of_other_names(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).code == code
    with pytest.raises(LoraformatError) as caught:
        open_base(tmp_path / name)
    assert caught.value.codes == (code,)


def test_a_gguf_file_of_no_version_is_refused_as_an_adapter_and_as_a_base(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    assert refusal(tmp_path / "a.gguf").code == "LF131"
    with pytest.raises(LoraformatError) as caught:
        open_base(tmp_path / "a.gguf")
    assert caught.value.codes == ("LF131",)


# --- schemes ---------------------------------------------------------------------------------------------------------

FOREIGN = {
    "m.hada_w1_a": "LyCORIS LoHa",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_scheme_that_is_known_but_not_read(tmp_path: Path, key: str) -> None:
    path = write_tensors(tmp_path / "a.safetensors", {key: np.ones((2, 3), np.float32)})
    problem = refusal(path)
    assert problem.code == "LF121"
    assert FOREIGN[key] in problem.found
    assert key in problem.found
    assert {"native", "peft"} <= set(problem.expected.removeprefix("a scheme among ").split(", "))
    assert not is_base(path)


def test_tensors_of_no_known_scheme(tmp_path: Path) -> None:
    tensors = {f"t{index}": np.ones(2, np.float32) for index in range(9)}
    problem = refusal(write_tensors(tmp_path / "a.safetensors", tensors))
    assert (problem.code, problem.found) == ("LF121", "9 tensors such as t0, t1, t2")
    problem = refusal(write_tensors(tmp_path / "b.safetensors", {}))
    assert (problem.code, problem.found) == ("LF121", "a file without tensors")


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    assert refusal(write_onnx(tmp_path / "m.onnx", {"m.q": np.ones((3, 2), np.float32)})).code == "LF835"


def test_a_scheme_by_name(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", FACTORS)
    assert load_adapter(folder, "peft").scheme == "peft"
    assert choose_scheme(open_bundle(folder)[0], "peft")[1] == "named by the user"
    assert refusal(folder, scheme="native").code == "LF122"
    problem = refusal(folder, scheme="civitai")
    assert problem.code == "LF305"
    assert {"native", "peft"} <= set(problem.expected.removeprefix("one of ").split(", "))


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second scheme that takes everything for its own."""
    member = SimpleNamespace(name="twin", title="twin", detect=lambda bundle: "it looks so")
    monkeypatch.setitem(sys.modules, "a_twin_scheme", SimpleNamespace(SCHEME=member))
    SCHEMES.names()
    monkeypatch.setitem(SCHEMES.__dict__["_locations"], "twin", "a_twin_scheme:SCHEME")


@pytest.mark.usefixtures("twin")
def test_two_readings_are_not_chosen_between(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"lora_down.weight": (2, 5), "lora_up.weight": (6, 2), "alpha": ()}
    module = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{module}.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    path = write_tensors(tmp_path / "a.safetensors", tensors)
    problem = refusal(path)
    assert problem.code == "LF303"
    assert "kohya (" in problem.found
    assert "twin (it looks so)" in problem.found
    assert "--scheme" in problem.advice
    assert load_adapter(path, "kohya").targets


# --- bases -----------------------------------------------------------------------------------------------------------


def test_what_is_a_base(tmp_path: Path) -> None:
    weights = {"model.q": np.ones((3, 2), np.float32)}
    assert is_base(write_onnx(tmp_path / "m.onnx", weights))
    assert is_base(write_tensors(tmp_path / "m.safetensors", {"model.q.weight": weights["model.q"]}))
    folder = write_peft(tmp_path / "a", FACTORS)
    assert not is_base(folder)
    assert not is_base(folder / FILE)
    (folder / "adapter_config.json").unlink()
    assert not is_base(folder / FILE)


def test_a_base_by_its_content(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", {"model.q": np.ones((3, 2), np.float32)})
    assert open_base(path).format == "onnx"
    assert open_base(path.rename(tmp_path / "m.bin")).format == "onnx"


def test_a_base_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"x")
    with pytest.raises(LoraformatError) as caught:
        open_base(tmp_path)
    assert caught.value.codes == ("LF121",)
    assert "m.safetensors" in caught.value.problems[0].found


def test_a_base_whose_name_says_more_than_its_content(tmp_path: Path) -> None:
    """The reader of that name says best what is wrong."""
    (tmp_path / "m.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(LoraformatError) as caught:
        open_base(tmp_path / "m.safetensors")
    assert caught.value.codes == ("LF102",)


def test_loading_reads_no_numbers(tmp_path: Path) -> None:
    """The file may be cut off behind its header and nobody notices, until a number is asked for."""
    folder = write_peft(tmp_path / "a", FACTORS)
    bundle, (file,) = open_bundle(folder)
    adapter = SCHEMES.find("peft").read(bundle, StatedScale())  # type: ignore[union-attr]
    os.truncate(folder / FILE, file.size_bytes - 1)
    assert len(adapter.targets) == 2
    with pytest.raises(LoraformatError) as caught:
        check_adapter(adapter)
    assert caught.value.codes == ("LF906",)


def test_the_configuration_of_peft_is_read_strictly(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", FACTORS, use_rslora="yes")
    problem = refusal(folder)
    assert problem.code == "LF213"
    assert "use_rslora" in problem.where
    assert json.loads((folder / "adapter_config.json").read_text())["use_rslora"] == "yes"


def test_a_scale_that_nobody_needed_is_said(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", {"m.q": lora_factors(np.random.default_rng(0), 5, 7, 2)}, alpha=4)
    assert load_adapter(folder).problems == ()
    (note,) = load_adapter(folder, stated=StatedScale(alpha=32.0)).problems
    assert (note.code, note.severity) == ("LF222", "note")


def test_alpha_and_scale_together_are_refused() -> None:
    with pytest.raises(LoraformatError) as caught:
        StatedScale(alpha=1.0, multiplier=1.0)
    assert caught.value.codes == ("LF705",)


# --- files beside an adapter -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_peft(tmp_path / "adapter", FACTORS)


def test_modules_that_a_script_saved_whole_beside_the_adapter(folder: Path) -> None:
    """LLaVA's projector, without which the merged model would not see."""
    alone = load_adapter(folder)
    torch_tensors(folder / "non_lora_trainables.bin", {"base_model.model.model.projector.0.weight": (4, 3)})
    for path in (folder, folder / FILE):
        adapter = load_adapter(path)
        assert {target.name: target.kind for target in adapter.targets} == {
            "model.projector.0": "replace",
            **dict.fromkeys(FACTORS, "lora"),
        }
        assert adapter.sha256 != alone.sha256 == hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    torch_tensors(folder / "non_lora_trainables.bin", {"base_model.model.model.q.lora_A.weight": (2, 4)})
    assert refusal(folder).code == "LF302"


def test_a_file_of_that_name_beside_something_else_is_not_read(folder: Path) -> None:
    (folder / "vit.safetensors").write_bytes(b"no tensors")
    assert (
        len(load_adapter((folder / FILE).rename(folder / "mine.safetensors"), stated=StatedScale(alpha=1)).targets) == 2
    )


def test_a_head_for_rewards_is_said(folder: Path) -> None:
    (folder / "value_head.bin").write_bytes(b"")
    assert [problem.code for problem in load_adapter(folder).problems] == ["LF239"]


def test_one_file_of_any_name_beside_the_configuration(folder: Path) -> None:
    """As RL trainers and servers keep them: `pytorch_model.bin`, `lora.safetensors`."""
    path = (folder / FILE).rename(folder / "policy_lora.safetensors")
    (folder / "optimizer.pt").write_bytes(b"")
    assert [len(load_adapter(each).targets) for each in (folder, path)] == [2, 2]
    (folder / "other.safetensors").write_bytes(path.read_bytes())
    assert refusal(folder).code == "LF121"
    assert refusal(path).code == "LF211"


def test_a_folder_of_checkpoints_says_which_to_name(folder: Path) -> None:
    problem = refusal(folder.parent)
    assert problem.code == "LF121"
    assert str(folder) in problem.advice
