"""Our reader of torch checkpoints against torch itself, and against files as strangers have published them.

torch writes, we read, and every bit must be the same. The real files are not part of this project: they are looked for
in `shared/corpus` beside the checkout, or where LORAFORMAT_CORPUS says, and they are read by our reader alone.
"""

import collections
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import loraformat
from loraformat.containers._strided import StridedTensor
from loraformat.containers._zip_directory import read_directory
from loraformat.containers.torch_zip import CONTAINER, describe_images, list_crc_fields, mend_crcs
from loraformat.dtypes import BY_NAME
from loraformat.errors import LoraformatError

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="the oracle tests need torch")  # type: ignore[assignment]

CORPUS = Path(os.environ.get("LORAFORMAT_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))

DTYPES = sorted(name for name in BY_NAME if isinstance(getattr(torch, name, None), torch.dtype) and "int4" not in name)
DTYPES = [name for name in DTYPES if BY_NAME[name].bits >= 8]


def bits(value: "torch.Tensor") -> bytes:
    """Return the bytes of a tensor in C order, by torch alone."""
    value = value.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(value.reshape(-1).view(torch.uint8).numpy()) if value.numel() else b""


def assert_equals_torch(path: Path, loaded: Mapping[str, "torch.Tensor"]) -> Any:
    opened = CONTAINER.open(path)
    assert list(opened.tensors) == list(loaded)
    for name, expected in loaded.items():
        found = opened.tensors[name]
        assert found.dtype.name == str(expected.dtype).removeprefix("torch."), name
        assert found.shape == tuple(expected.shape), name
        assert found.read().tobytes() == bits(expected), name
        if not isinstance(found, StridedTensor):
            stored = path.read_bytes()[found.span.offset : found.span.end]
            assert stored == bits(expected), name
    return opened


def random_bits(dtype: str, shape: tuple[int, ...], seed: int = 0) -> "torch.Tensor":
    count = int(np.prod(shape)) * BY_NAME[dtype].bits // 8
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, count, dtype=np.uint8)
    return torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(shape)


def test_there_are_forms_to_look_at() -> None:
    assert {"float32", "bfloat16", "float8_e4m3fn", "uint16", "bool", "complex64"} <= set(DTYPES)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_form(dtype: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / f"{dtype}.bin"
    torch.save(
        {"m": random_bits(dtype, (3, 5)), "row": random_bits(dtype, (7,), 1), "one": random_bits(dtype, (), 2)},
        path,
        pickle_protocol=protocol,
    )
    # torch's own guarded reader warns of every protocol but 2; the file is our own.
    opened = assert_equals_torch(path, torch.load(path, weights_only=False))
    assert {found.dtype.name for found in opened.tensors.values()} == {dtype}


@pytest.mark.parametrize("length", [1, 20, 60, 150])
def test_it_is_known_by_content_whatever_its_name(length: int, tmp_path: Path) -> None:
    path = tmp_path / ("n" * length + ".pt")  # The name becomes the archive's root.
    torch.save({"w": torch.ones(2, 3)}, path)
    assert CONTAINER.sniff(path.read_bytes()[:64], path.stat().st_size)
    assert_equals_torch(path, {"w": torch.ones(2, 3)})


def make_views() -> dict[str, "torch.Tensor"]:
    base = torch.arange(60.0).reshape(3, 4, 5)
    return {
        "base": base,
        "tied": base,
        "flat": base.view(-1),
        "part": base[1:],
        "inner": base[1, 2],
        "one": base[2, 3, 4],
        "line": base[:, 0, 0],
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(2, 0, 1)[1:, :, ::2],
        "expanded": base[:1, :1].expand(3, 4, 5),
        "scalar": torch.tensor(2.5).expand(2, 3),
        "unfolded": torch.arange(7.0).unfold(0, 3, 2),
        "none": base[:0],
        "none at the end": base[3:, 3:, 5:],
        "size one": base[:1, :, :1].squeeze().unsqueeze(1),
        "channels last": torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
    }


def test_tied_tensors_and_views(tmp_path: Path) -> None:
    path = tmp_path / "views.pt"
    torch.save(make_views(), path)
    loaded = torch.load(path, weights_only=True)
    opened = assert_equals_torch(path, loaded)
    for name, expected in loaded.items():
        assert isinstance(opened.tensors[name], StridedTensor) is not expected.is_contiguous(), name
    assert opened.tensors["base"].span == opened.tensors["tied"].span == opened.tensors["flat"].span


class Network(torch.nn.Module):  # type: ignore[misc]
    """Parameters, buffers, tied weights and a name with several levels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.body = torch.nn.ModuleList([torch.nn.Linear(6, 9), torch.nn.LayerNorm(9), torch.nn.Conv2d(3, 5, (2, 3))])
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def test_a_state_dict_of_a_module(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    state = Network().state_dict()
    assert isinstance(state, collections.OrderedDict)
    assert state._metadata
    torch.save(state, path)
    opened = assert_equals_torch(path, state)
    assert opened.tensors["head.weight"].span == opened.tensors["embed.weight"].span
    assert opened.metadata == {}


def test_parameters_and_tensors_with_attributes(tmp_path: Path) -> None:
    plain, noted = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    noted.note = "by the optimiser"
    tagged = torch.arange(4)
    tagged.tag = [1]
    path = tmp_path / "p.pt"
    values = {"plain": plain, "noted": noted, "tagged": tagged, "buffer": torch.nn.Buffer(torch.ones(1, 2))}
    torch.save(values, path)
    assert_equals_torch(path, values)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
def test_a_trainers_checkpoint(wrapper: str, tmp_path: Path) -> None:
    """With everything around that trainers put there, down to the state of the optimiser."""
    model = Network()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    path = tmp_path / "last.ckpt"
    others = {
        "epoch": 3,
        "global_step": torch.tensor(7),
        "optimizer": optimiser.state_dict(),
        "rng": torch.get_rng_state()[:1],
        "hyper": {"lr": 1e-3, "name": "x", "betas": (0.9, 0.999)},
        "seeds": {1, 2},
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "raw": b"\x00\xff",
        "big": 2**100,
    }
    torch.save({wrapper: model.state_dict(), **others}, path)
    opened = assert_equals_torch(path, model.state_dict())
    assert opened.metadata["torch.wrapper"] == wrapper
    assert opened.metadata["torch.value.epoch"] == "3"
    assert opened.metadata["torch.value.dtype"] == "torch.bfloat16"
    assert opened.metadata["torch.value.optimizer"] == "a dict of 2"
    assert {f"torch.value.{name}" for name in others} < set(opened.metadata)


REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "whole module": (lambda path: torch.save(Network(), path), "LF901", "Network"),
    "linear": (lambda path: torch.save(torch.nn.Linear(2, 3), path), "LF901", "torch.nn.modules.linear.Linear"),
    "sparse": (lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path), "LF901", "_rebuild_sparse_tensor"),
    "meta": (lambda path: torch.save({"w": torch.ones(3, device="meta")}, path), "LF901", "_rebuild_meta_tensor"),
    "numpy": (lambda path: torch.save({"w": np.ones(3)}, path), "LF901", "numpy"),
    "numpy scalar": (lambda path: torch.save({"w": np.float32(1)}, path), "LF901", "numpy"),
    "conjugated": (lambda path: torch.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, path), "LF114", "conj"),
    "one tensor": (lambda path: torch.save(torch.ones(2), path), "LF111", "a tensor [2]"),
    "old format": (
        lambda path: torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        "LF111",
        "weights_only=True",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind: str, tmp_path: Path) -> None:
    write, code, said = REFUSED[kind]
    path = tmp_path / "x.pt"
    write(path)
    with pytest.raises(LoraformatError) as caught:
        CONTAINER.open(path)
    assert caught.value.codes == (code,)
    assert said in str(caught.value)


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    """Put together from a state dict: torch.jit.script is deprecated, and its archives differ in one member."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/code/__torch__.py", "def forward(self):\n  pass\n", zipfile.ZIP_DEFLATED)
        archive.writestr("x/constants.pkl", b"\x80\x02).")
    with pytest.raises(LoraformatError, match="TorchScript") as caught:
        CONTAINER.open(path)
    assert caught.value.codes == ("LF111",)


def test_the_conversion_command_works(tmp_path: Path) -> None:
    import re
    import subprocess
    import sys

    old, new = tmp_path / "old.bin", tmp_path / "new.bin"
    values = {"w": torch.arange(6.0).reshape(2, 3)}
    torch.save(values, old, _use_new_zipfile_serialization=False)
    with pytest.raises(LoraformatError) as caught:
        CONTAINER.open(old)
    found = re.search(r'python -c "(.*)" OLD NEW', caught.value.problems[0].advice)
    assert found is not None
    subprocess.run([sys.executable, "-c", found[1], str(old), str(new)], check=True)
    assert_equals_torch(new, values)


# --- archives --------------------------------------------------------------------------------------------------------


def test_what_torch_lists_we_list(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(make_views(), path)
    opened = CONTAINER.open(path)
    ours, theirs = read_directory(opened.file), torch._C.PyTorchFileReader(str(path))
    assert [name.partition("/")[2] for name in ours] == theirs.get_all_records()
    for name, member in ours.items():
        record = name.partition("/")[2]
        assert theirs.get_record_offset(record) == member.span.offset
        assert theirs.get_record(record) == opened.file.read(member.span.offset, member.span.length)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_checks_no_crc(mmap: bool, tmp_path: Path) -> None:
    """What the docstring of `torch_zip` says: a copy whose spans were rewritten can be loaded; others see its CRCs."""
    path, copy = tmp_path / "a.pt", tmp_path / "a" / "a.pt"
    copy.parent.mkdir()
    torch.save({"v": torch.zeros(5), "w": torch.arange(6.0).reshape(2, 3)}, path)
    opened = CONTAINER.open(path)
    (image,) = describe_images(opened, copy)
    span = opened.tensors["w"].span
    place = image.locate(span)
    assert place is not None
    data = bytearray(path.read_bytes())
    data[place : place + span.length] = struct.pack("<6f", *range(10, 16))
    copy.write_bytes(data)
    changed = {"v": torch.zeros(5), "w": torch.arange(10.0, 16.0).reshape(2, 3)}
    for name, expected in changed.items():
        assert torch.equal(torch.load(copy, mmap=mmap, weights_only=True)[name], expected)
    with zipfile.ZipFile(copy) as archive:
        assert archive.testzip() == "a/data/1"
    fields = {held: places for held, places in list_crc_fields(opened).items() if held.offset <= span.offset < held.end}
    descriptor = os.open(copy, os.O_RDWR)
    mend_crcs(descriptor, fields)
    os.close(descriptor)
    with zipfile.ZipFile(copy) as archive:
        assert archive.testzip() is None
    again = tmp_path / "again" / "a.pt"
    again.parent.mkdir()
    torch.save(changed, again)
    one, other = (zipfile.ZipFile(name).infolist() for name in (copy, again))
    assert [(info.filename, info.CRC) for info in one if ".data" not in info.filename] == [
        (info.filename, info.CRC) for info in other if ".data" not in info.filename
    ]


def test_torch_can_leave_the_crcs_out(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(6.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is not None
    opened = assert_equals_torch(path, {"w": torch.arange(6.0)})
    descriptor = os.open(path, os.O_RDWR)
    mend_crcs(descriptor, list_crc_fields(opened))
    os.close(descriptor)
    with zipfile.ZipFile(path) as archive:
        crc = archive.getinfo("a/data/0").CRC
        assert archive.read("a/data/0")
    assert crc != 0


# --- PEFT ------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_peft_as_bin(tmp_path: Path) -> None:
    """The same adapter saved in both forms is the same adapter to us."""
    peft = pytest.importorskip("peft", reason="the oracle tests need peft")

    class Tiny(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = torch.nn.Linear(6, 10), torch.nn.Linear(6, 4)

        def forward(self, x: Any) -> Any:
            return self.q_proj(x), self.v_proj(x)

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(Tiny(), config)
    for name, safe in (("safe", True), ("bin", False)):
        model.save_pretrained(tmp_path / name, safe_serialization=safe)
    file = tmp_path / "bin" / "adapter_model.bin"
    assert file.exists()
    assert_equals_torch(file, torch.load(file, weights_only=True))
    one, other = (loraformat.load(tmp_path / name) for name in ("safe", "bin"))
    assert len(one.targets) == len(other.targets) == 2
    for left, right in zip(one.targets, other.targets, strict=True):
        assert (left.name, left.rank, left.scale, left.slot) == (right.name, right.rank, right.scale, right.slot)
        for role, factor in left.factors.items():
            assert np.array_equal(factor.read(), right.factors[role].read())
    alone = loraformat.load(file)
    assert [target.name for target in alone.targets] == [target.name for target in other.targets]


# --- real files ------------------------------------------------------------------------------------------------------


def corpus(path: str) -> Path:
    if not (CORPUS / path).exists():
        pytest.skip(f"no {CORPUS / path}; LORAFORMAT_CORPUS names another folder")
    return CORPUS / path


def shapes(opened: Any) -> collections.Counter[tuple[str, tuple[int, ...]]]:
    return collections.Counter((found.dtype.name, found.shape) for found in opened.tensors.values())


def test_alphas_without_factors() -> None:
    """303 alphas and dropouts, no A and no B."""
    opened = CONTAINER.open(corpus("Inishpy__lerobot-libero/adapter_model.bin"))
    assert shapes(opened) == {("int64", ()): 303, ("float32", ()): 303}
    ends = collections.Counter(name.rsplit(".", 1)[1] for name in opened.tensors)
    assert ends == {"alpha": 303, "dropout_p": 303}
    assert {int(found.read()) for name, found in opened.tensors.items() if name.endswith(".alpha")} == {16}


def test_ia3_of_pefts_own_tests() -> None:
    opened = CONTAINER.open(corpus("huggingface__peft/tests/regression/ia3_opt-350m/0.6.1/adapter_model.bin"))
    # 24 layers of OPT-350m: keys, queries and the second dense layer, each a vector.
    assert shapes(opened) == {("float32", (1024, 1)): 48, ("float32", (1, 4096)): 24}
    assert all(name.startswith("base_model.model.") and name.endswith(".ia3_l") for name in opened.tensors)


def test_loralib_with_a_head() -> None:
    opened = CONTAINER.open(corpus("microsoft__LoRA/examples/NLU/roberta_base_lora_mnli.bin"))
    # 12 layers of query and value, and the classifier of three classes.
    assert shapes(opened) == {
        ("float32", (8, 768)): 24,
        ("float32", (768, 8)): 24,
        ("float32", (768, 768)): 1,
        ("float32", (768,)): 1,
        ("float32", (3, 768)): 1,
        ("float32", (3,)): 1,
    }
    assert sum(name.endswith((".lora_A", ".lora_B")) for name in opened.tensors) == 48


def test_a_list_of_parameters() -> None:
    """Up and down in turn, without names."""
    opened = CONTAINER.open(corpus("cloneofsimo__lora/example_loras/lora_kiriko2.text_encoder.pt"))
    assert list(opened.tensors) == [str(index) for index in range(96)]
    assert shapes(opened) == {("float32", (768, 4)): 48, ("float32", (4, 768)): 48}
    assert all(np.isfinite(found.read()).all() for found in opened.tensors.values())


def test_a_pointer_is_called_one() -> None:
    with pytest.raises(LoraformatError, match="git lfs pull") as caught:
        CONTAINER.open(corpus("JOSASA__gpt2/adapter_model.bin"))
    assert caught.value.codes == ("LF111",)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("wrapper", ["", "model"])
def test_torch_reads_what_we_write(tmp_path: Path, wrapper: str, mmap: bool) -> None:
    import ml_dtypes
    import torch

    forms = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    dice = np.random.default_rng(0)
    arrays = {f"a.{form}": dice.standard_normal((3, 5)).astype(BY_NAME[form].numpy()) for form in forms}
    arrays |= {"none": np.zeros((0, 7), np.float32), "scalar": np.array(2.5), "Größe": np.ones((2, 1, 3), np.float32)}
    tensors = [(name, BY_NAME[array.dtype.name], array.shape, array) for name, array in arrays.items()]
    path = tmp_path / "new.pt"
    with path.open("wb") as sink:
        CONTAINER.write(sink, tensors, {"torch.wrapper": wrapper} if wrapper else {})
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == ([wrapper] if wrapper else list(arrays))
    found = loaded[wrapper] if wrapper else loaded
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        tensor = found[name]
        assert (tuple(tensor.shape), tensor.is_contiguous()) == (array.shape, True)
        if array.dtype == ml_dtypes.bfloat16:
            tensor, array = tensor.view(torch.uint16), array.view(np.uint16)
        assert tensor.numpy().dtype == array.dtype
        assert tensor.numpy().tobytes() == array.tobytes(), name
