"""Our reader of torch checkpoints against files made to hurt; what torch itself writes is in `oracles`.

Pickles are put together opcode by opcode, and archives field by field: torch is not needed, and nothing here could be
written by a library that means well.
"""

import contextlib
import math
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from laws import container_laws
from laws.container_laws import ContainerLaws, read_all, rewrite, same_bits
from loraformat import limits
from loraformat.containers._inert_pickle import read_pickle
from loraformat.containers._inert_values import Entries
from loraformat.containers._zip_checksums import compute_crcs, mend_crcs
from loraformat.containers._zip_directory import read_directory
from loraformat.containers.torch_zip import CONTAINER, describe_images, list_crc_fields
from loraformat.errors import InputError, LoraformatError, RefusedError
from loraformat.images import Copy
from loraformat.spans import InputFile
from torch_zips import (
    NO_HOOKS,
    SIX,
    Part,
    build,
    call,
    checkpoint,
    finish,
    group,
    named,
    number,
    pairs,
    plain_end,
    storage,
    tensor,
    text,
    wide_end,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


open_bytes = partial(container_laws.open_bytes, CONTAINER)
refusal = partial(container_laws.refuse_bytes, CONTAINER)


class TestTorchZipLaws(ContainerLaws):
    container = CONTAINER
    mutations = 600

    def write_example(self, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        path = folder / "example.pt"
        dice = np.random.default_rng(0)
        kinds = {"Double": np.float64, "Float": np.float32, "BFloat16": ml_dtypes.bfloat16, "Byte": np.uint8}
        arrays: dict[str, NDArray[Any]] = {
            "scale": np.array(2.5, dtype=np.float64),
            "model.q_proj.lora_A.weight": dice.standard_normal((3, 5)).astype(np.float32),
            "none.here": np.zeros((0, 7), dtype=np.float32),
            "model.q_proj.lora_B.weight": dice.standard_normal((4, 3)).astype(ml_dtypes.bfloat16),
            "tokens": np.arange(7, dtype=np.uint8),
        }
        names = {np.dtype(kind): name for name, kind in kinds.items()}
        entries, members = [], {}
        for index, (name, array) in enumerate(arrays.items()):
            members[str(index)] = array.tobytes()
            held = storage(names[array.dtype], str(index), array.size)
            entries.append((name, tensor(held, 0, array.shape)))
        rewrite(path, checkpoint(pairs(entries), members))
        return path, arrays


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_dictionary_of_one(path: Path) -> None:
    opened = open_bytes(path, checkpoint(pairs([("w", tensor())])))
    assert same_bits(opened.tensors["w"].read(), np.arange(6, dtype=np.float32).reshape(2, 3))
    assert opened.metadata == {}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_around_the_tensors_are_listed(path: Path, protocol: int) -> None:
    values = {
        "epoch": 3,
        "lr": 1e-4,
        "name": "x\x1b[31m" * 100,
        "seed": 2**127,
        "flags": [True, None],
        "betas": (0.9, 0.999),
        "deep": {"a": {"b": [{}]}},
        "names": {"one", "two"},
        "frozen": frozenset([1]),
        "raw": b"\x00\xff",
        "many": list(range(100)),
        "": "empty",
    }
    body = pickle.dumps(values, protocol)[2:-1]
    opened = open_bytes(path, checkpoint(body + b"(" + text("w") + tensor() + b"u", protocol=protocol))
    assert list(opened.tensors) == ["w"]
    shown = {key.removeprefix("torch.value."): found for key, found in opened.metadata.items()}
    raw = "b'\\x00\\xff'" if protocol > 2 else repr("\x00\xff")  # Protocol 2 has no bytes.
    assert {key: shown[key] for key in ("epoch", "lr", "flags", "betas", "raw", "many", "")} == {
        "epoch": "3",
        "lr": "0.0001",
        "flags": "[True, None]",
        "betas": "[0.9, 0.999]",
        "raw": raw,
        "many": "a list of 100",
        "": "'empty'",
    }
    assert shown["seed"] == str(2**127)
    assert shown["names"] == "a set of 2"
    assert shown["deep"] == "a dict of 1"
    assert len(shown) == len(values)
    assert all(len(found) <= limits.MAX_VALUE_CHARACTERS and found.isprintable() for found in shown.values())


def test_values_without_end_are_counted(path: Path) -> None:
    body = pairs([*((f"v{index}", b"N") for index in range(limits.MAX_LISTED_VALUES + 7)), ("w", tensor())])
    opened = open_bytes(path, checkpoint(body))
    assert opened.metadata["torch.values_unlisted"] == "7"
    assert len(opened.metadata) == limits.MAX_LISTED_VALUES + 1


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module"])
def test_one_wrapper_is_opened(path: Path, key: str) -> None:
    inner = pairs([("a.w", tensor()), ("note", text("hi"))])
    one = tensor(shape=())
    opened = open_bytes(path, checkpoint(pairs([("epoch", number(3)), (key, inner), ("step", one)])))
    assert list(opened.tensors) == ["a.w"]
    assert opened.metadata == {
        "torch.wrapper": key,
        "torch.value.epoch": "3",
        "torch.value.step": "a tensor [] of torch.float32",
        "torch.value.note": "'hi'",
    }


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        ([("model", pairs([("w", tensor())])), ("module", pairs([("w", tensor())]))], "LF105"),
        ([("model", pairs([("w", tensor())])), ("w", tensor())], "LF105"),
        ([("unet", pairs([("w", tensor())])), ("clip", pairs([("w", tensor())]))], "LF111"),
        ([("model", pairs([("model", pairs([("w", tensor())]))]))], "LF121-free"),
        ([("w", tensor()), ("w", tensor())], "LF105"),
        ([("1", tensor()), (number(1), tensor())], "LF105"),
        ([(group(), tensor())], "LF109"),
        ([("", tensor())], "LF301"),
        ([("a\x1b[2J", tensor())], "LF301"),
        ([("a\u202eb", tensor())], "LF301"),
        ([("\ud800", tensor())], "LF301"),
        ([("n" * 5000, tensor())], "LF110"),
    ],
)
def test_names_that_are_not_taken(path: Path, entries: Any, code: str) -> None:
    data = checkpoint(pairs(entries))
    if code == "LF121-free":  # One level is opened, no more: what is below is a value.
        assert not open_bytes(path, data).tensors
    else:
        assert refusal(path, data).codes == (code,)


def test_a_wrapper_without_tensors_is_a_value(path: Path) -> None:
    opened = open_bytes(path, checkpoint(pairs([("model", pairs([("a", number(1))])), ("w", tensor())])))
    assert list(opened.tensors) == ["w"]
    assert opened.metadata == {"torch.value.model": "a dict of 1"}


def test_a_list_is_named_by_position(path: Path) -> None:
    parameter = call("torch._utils._rebuild_parameter", tensor(), b"\x88", NO_HOOKS)
    opened = open_bytes(path, checkpoint(b"](" + tensor() + b"N" + parameter + b"e"))
    assert list(opened.tensors) == ["0", "2"]


@pytest.mark.parametrize("body", [tensor(), number(1), b"N", text("x"), b"\x8f", named("torch.float32")])
def test_what_is_no_collection_is_refused(path: Path, body: bytes) -> None:
    assert refusal(path, checkpoint(body)).codes == ("LF111",)


def test_tied_tensors_have_one_span(path: Path) -> None:
    """A base that rewrites spans has to look for these."""
    body = pairs([("a", tensor()), ("b", tensor()), ("part", tensor(offset=3, shape=(3,)))])
    tensors = open_bytes(path, checkpoint(body)).tensors
    assert tensors["a"].span == tensors["b"].span
    assert tensors["a"].span.offset < tensors["part"].span.offset
    assert tensors["part"].span.end == tensors["a"].span.end


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (3, 2), (1, 3)),
        (1, (2, 2), (3, 1)),
        (0, (4, 3), (0, 1)),
        (0, (2, 2), (1, 1)),
        (2, (3,), (0,)),
        (5, (4, 1), (0, 9)),
    ],
)
def test_views_are_read_but_have_no_span(path: Path, offset: int, shape: Any, strides: Any) -> None:
    found = open_bytes(path, checkpoint(pairs([("w", tensor(None, offset, shape, strides))]))).tensors["w"]
    flat = np.arange(6, dtype=np.float32)[offset:]
    expected = [flat[sum(i * s for i, s in zip(place, strides, strict=True))] for place in np.ndindex(*shape)]
    assert found.read().tolist() == np.reshape(expected, shape).tolist()
    assert found.read().flags.c_contiguous
    assert "w" in repr(found)
    assert found == found
    with pytest.raises(LoraformatError, match="contiguous") as caught:
        _ = found.span
    assert caught.value.codes == ("LF114",)


@pytest.mark.parametrize(("shape", "strides"), [((1, 6), (99, 1)), ((6, 1), (1, 0)), ((1, 1), (7, 7)), ((), ())])
def test_a_size_of_one_has_no_stride(path: Path, shape: Any, strides: Any) -> None:
    found = open_bytes(path, checkpoint(pairs([("w", tensor(None, 0, shape, strides))]))).tensors["w"]
    assert found.span.length == 4 * math.prod(shape)


def test_older_and_newer_ways_to_write_a_tensor(path: Path) -> None:
    sizes, steps = group(number(2), number(3)), group(number(3), number(1))
    untyped = group(text("storage"), named("torch.storage.UntypedStorage"), text("0"), text("cpu"), number(24)) + b"Q"
    held, state = storage(), pairs([("a", number(1))])
    of_type = group(held, number(0), sizes, steps, b"\x89", NO_HOOKS)
    bodies = {
        "v1": call("torch._utils._rebuild_tensor", held, number(0), sizes, steps),
        "v2 and nothing": call(
            "torch._utils._rebuild_tensor_v2", held, number(0), sizes, steps, b"\x89", NO_HOOKS, b"N"
        ),
        "v3": call(
            "torch._utils._rebuild_tensor_v3",
            *(untyped, number(0), sizes, steps, b"\x89", NO_HOOKS, named("torch.float32")),
        ),
        "state": call("torch._utils._rebuild_parameter_with_state", tensor(), b"\x88", NO_HOOKS, state),
        "class": call("torch.nn.parameter.Parameter", tensor(), b"\x88"),
        "typed": call(
            "torch._tensor._rebuild_from_type_v2",
            *(named("torch._utils._rebuild_tensor_v2"), named("torch.Tensor"), of_type, state),
        ),
    }
    opened = open_bytes(path, checkpoint(pairs(bodies.items())))
    assert list(opened.tensors) == list(bodies)
    assert len({found.span for found in opened.tensors.values()}) == 1
    assert {found.dtype.name for found in opened.tensors.values()} == {"float32"}


def test_metadata_of_a_state_dict_is_dropped(path: Path) -> None:
    state = pairs([("_metadata", pairs([("", pairs([("version", number(1))]))]))])
    body = NO_HOOKS + b"(" + text("w") + tensor() + b"u" + state + b"b"
    assert list(open_bytes(path, checkpoint(body)).tensors) == ["w"]


def test_names_through_the_stack(path: Path) -> None:
    """Protocol 4 and later put module and name on the stack."""
    body = tensor().replace(
        named("torch._utils._rebuild_tensor_v2"), text("torch._utils") + text("_rebuild_tensor_v2") + b"\x93"
    )
    assert list(open_bytes(path, checkpoint(pairs([("w", body)]), protocol=4)).tensors) == ["w"]


# --- what asks for code ----------------------------------------------------------------------------------------------

CANARY = "os.open(__import__('sys').argv[1], 64)"


class Evil:
    """What pickle.loads would call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def evil_bodies(canary: Path) -> dict[str, bytes]:
    """Return pickles that would make the file `canary`, or call what they should not, in many ways."""
    code = f"open({str(canary)!r}, 'w')"
    written = {
        f"{name} {protocol}": pickle.dumps(evil, protocol)[2:-1]
        for name, evil in {
            "os.system": Evil(os.system, f"touch {canary}"),
            "eval": Evil(eval, code),
            "exec": Evil(exec, code),
            "open": Evil(open, str(canary), "w"),
            "subprocess": Evil(subprocess.Popen, ["touch", str(canary)]),
            "getattr": Evil(getattr, os, "system"),
            "numpy scalar": np.float64(1.0),
            "numpy array": np.ones(3),
            "numpy dtype": np.dtype("f4"),
            "path": canary,
            "slice": slice(1, 2),
            "complex": 1j,
        }.items()
        if name != "getattr"
        for protocol in (2, 3, 4, 5)
    }
    return written | {
        "nested getattr": named("builtins.getattr")
        + group(call("builtins.getattr", named("os.path"), text("os")), text("system"))
        + b"R",
        "dotted name": text("os") + text("path.os.system") + b"\x93" + group(text("true")) + b"R",
        "dotted name in torch": text("torch") + text("serialization.os.system") + b"\x93" + group(text("true")) + b"R",
        "load from bytes": call("torch.storage._load_from_bytes", text("x")),
        "torch.load": call("torch.load", text("x")),
        "hub": call("torch.hub.load", text("x"), text("y")),
        "module": named("torch.nn.modules.linear.Linear") + b")\x81",
        "newobj": named("collections.OrderedDict") + b")\x81",
        "newobj_ex": named("collections.OrderedDict") + b")}\x92",
        "inst": b"(" + text("true") + b"ios\nsystem\n",
        "obj": b"(" + named("collections.OrderedDict") + b"o",
        "ext1": b"\x82\x01",
        "ext2": b"\x83\x01\x00",
        "ext4": b"\x84\x01\x00\x00\x00",
        "persid": b"Pstorage\n",
        "next buffer": b"\x97",
        "readonly buffer": b"N\x98",
        "pid of another kind": group(text("module"), named("torch.FloatStorage"), text("0"), text("cpu"), number(6))
        + b"Q",
        "pid that is text": text("storage") + b"Q",
        "pid of a dtype": group(text("storage"), named("torch.float32"), text("0"), text("cpu"), number(6)) + b"Q",
        "pid of -1 elements": storage(elements=-1),
        "reduce of text": text("os.system") + b")R",
        "reduce of a dtype": call("torch.float32"),
        "reduce of a storage": call("torch.FloatStorage", number(4)),
        "reduce without a tuple": named("collections.OrderedDict") + b"]R",
        "reduce of a result": NO_HOOKS + b")R",
        "build on a list": b"]}b",
        "build on a tensor": tensor() + b"}b",
        "build on a name": named("collections.OrderedDict") + pairs([("__reduce__", number(1))]) + b"b",
        "setattr by state": b"]" + group(b"N", pairs([("append", number(1))])) + b"b",
    }


EVIL = sorted(evil_bodies(Path("canary")))


@pytest.mark.parametrize("kind", EVIL)
@pytest.mark.parametrize("place", ["alone", "value", "name", "beside"])
def test_nothing_is_executed(kind: str, place: str, path: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    body = evil_bodies(canary)[kind]
    whole = {
        "alone": body,
        "value": pairs([("w", body)]),
        "name": pairs([(body, tensor())]),
        "beside": pairs([("w", tensor())]) + body + b"0",
    }[place]
    data = checkpoint(whole, protocol=4)
    refusal(path, data)  # The first message loads the list of reasons.
    before = set(sys.modules)
    error = refusal(path, data)
    assert error.codes == ("LF901",)
    assert isinstance(error, RefusedError)
    assert not canary.exists()
    assert set(sys.modules) == before


def test_the_canary_would_be_made(tmp_path: Path) -> None:
    """The attack works on pickle itself, so the test above can fail."""
    canary = tmp_path / "canary"
    pickle.loads(finish(evil_bodies(canary)["os.system 2"]))
    assert canary.exists()


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (call("posix.system", text("true")), "posix.system"),
        (b"(" + text("true") + b"ios\nsystem\n", "os.system"),
        (named("numpy.core.multiarray.scalar"), "numpy.core.multiarray.scalar"),
        (named("torch.nn.modules.linear.Linear"), "torch.nn.modules.linear.Linear"),
        (call("torch._utils._rebuild_sparse_tensor"), "torch._utils._rebuild_sparse_tensor"),
        (named("os\x1b[31m.system\u202e"), "os\\x1b[31m.system\\u202e"),
    ],
)
def test_the_refusal_names_what_was_asked_for(path: Path, body: bytes, name: str) -> None:
    assert name in str(refusal(path, checkpoint(body)))


SIZES, STEPS = group(number(2), number(3)), group(number(3), number(1))
V2, V3 = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"


@pytest.mark.parametrize(
    "body",
    [
        call(V2),
        call(V2, storage()),
        call(V2, text("0"), number(0), SIZES, STEPS, b"\x89", NO_HOOKS),
        call(V2, storage(), b"\x88", SIZES, STEPS, b"\x89", NO_HOOKS),
        call(V2, storage(), b"G" + bytes(8), SIZES, STEPS, b"\x89", NO_HOOKS),
        call(V2, storage(), number(0), b"]", STEPS, b"\x89", NO_HOOKS),
        call(V2, storage(), number(0), group(text("2"), number(3)), STEPS, b"\x89", NO_HOOKS),
        call(V2, storage(), number(0), group(b"\x88", number(3)), STEPS, b"\x89", NO_HOOKS),
        call(V2, storage(), number(0), SIZES, group(number(3)), b"\x89", NO_HOOKS),
        call(V2, storage(), number(0), SIZES, STEPS, number(0), NO_HOOKS),
        call(V2, storage(), number(0), SIZES, STEPS, b"\x89", b"N"),
        call(V2, storage(), number(0), SIZES, STEPS, b"\x89", NO_HOOKS, text("x")),
        call(V2, storage(), number(0), SIZES, STEPS, b"\x89", NO_HOOKS, b"N", b"N"),
        call(V2, storage(), number(0), group(*[number(1)] * 65), group(*[number(1)] * 65), b"\x89", NO_HOOKS),
        call(V2, named("torch.FloatStorage"), number(0), SIZES, STEPS, b"\x89", NO_HOOKS),
        call(V3, storage(), number(0), SIZES, STEPS, b"\x89", NO_HOOKS, named("torch.float32")),
        call("torch._utils._rebuild_parameter", number(1), b"\x88", NO_HOOKS),
        call("torch._utils._rebuild_parameter", tensor(), number(1), NO_HOOKS),
        call("torch.nn.parameter.Parameter", text("x")),
        call("torch.nn.parameter.Parameter"),
        call(FROM_TYPE, named("collections.OrderedDict"), named("torch.Tensor"), group(), pairs([])),
        call(FROM_TYPE, named(FROM_TYPE), named("torch.Tensor"), group(b"N", b"N", b"N", b"N"), b"N"),
        call(FROM_TYPE, named(V2), named("torch.float32"), group(), b"N"),
        call(FROM_TYPE, named(V2), named("torch.Tensor"), b"]", b"N"),
        call("torch.Size", b"]"),
        call("torch.Size", group(text("2"))),
        call("torch.device", number(1)),
        call("collections.OrderedDict", group()),
        call("builtins.set", text("abc")),
        call("builtins.set", group(number(1))),
        call("_codecs.encode", text("x"), text("rot13")),
        call("_codecs.encode", text("x")),
    ],
)
def test_permitted_names_with_other_arguments(path: Path, body: bytes) -> None:
    assert refusal(path, checkpoint(pairs([("w", body)]))).codes == ("LF901",)


# --- what is damaged, or too much ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x01N.",
        b"\x80\x06N.",
        b"N.",
        b"(dp0\n.",
        finish(b"NN"),
        finish(b"N") + b"N",
        finish(b"(N"),
        finish(b"0"),
        finish(b"(1"),
        finish(b"t"),
        finish(b"N(a"),
        finish(b"(N\x86"),
        finish(b"Na"),
        finish(b"}Na"),
        finish(b"]Ns"),
        finish(b"]NNs"),
        finish(b"}(Nu"),
        finish(b"](N\x90"),
        finish(b"N(u"),
        finish(b"h\x00"),
        finish(b"j\x00\x00\x00\x01"),
        finish(b"q\x00N"),
        finish(b"(q\x00N"),
        finish(b"\x94"),
        finish(b"R"),
        finish(b")b"),
        finish(b"Q"),
        finish(b"NN\x93"),
        finish(text("os") + b"N\x93"),
        finish(b"cos\nsystem"),
        finish(b"c" + b"x" * 5000 + b"\ny\n"),
        finish(b"c\xff\n\xff\n"),
        finish(b"X\x04\x00\x00\x00\xff\xff\xff\xff"),
        finish(b"X\xff\x00\x00\x00abc"),
        finish(b"\x8d" + b"\x10\x27" + bytes(6) + b"x"),
        finish(b"J\x00"),
        finish(b"2"),
        finish(b"N2"),
        finish(b"I01\n"),
        finish(b"L5L\n"),
        finish(b"F1.5\n"),
        finish(b"S'x'\n"),
        finish(b"Vx\n"),
        finish(b"U\x01x"),
        finish(b"T\x01\x00\x00\x00x"),
        finish(b"p0\n"),
        finish(b"g0\n"),
        finish(b"l"),
        finish(b"d"),
        finish(b"\x80\x02N"),
        finish(b"\xff"),
        finish(b"\x00"),
    ],
)
def test_damaged_pickles(data: bytes, path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_pickle(data, "a.pt, data.pkl")
    assert caught.value.codes == ("LF123",)
    parts = [Part("m/data.pkl", data), Part("m/data/0", SIX)]
    assert refusal(path, build(parts)).codes == ("LF123",)


def bounded(function: Callable[[], Any], megabytes: int = 200) -> Any:
    """Run `function` and say that it took not much memory; what takes too long, the suite's own limit stops."""
    tracemalloc.start()
    try:
        return function()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < megabytes * 1e6


@pytest.mark.parametrize(
    "body",
    [
        b"(" * (limits.MAX_PICKLE_MARKS + 1),
        b"\x8a\xff" + b"\x01" * 255,
        b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6,
        b"\x8b\xff\xff\xff\xff",
        b"X\xff\xff\xff\xff",
        b"\x8d" + b"\xff" * 8,
        b"B\xff\xff\xff\xff",
        b"\x96" + b"\xff" * 8,
        b"\x8e" + struct.pack("<Q", 2**40),
    ],
)
def test_numbers_beyond_a_limit(body: bytes, path: Path) -> None:
    error = bounded(lambda: refusal(path, checkpoint(body)), megabytes=20)
    assert error.codes == ("LF110",)


def test_opcodes_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraformat.containers._pickle_machine.MAX_PICKLE_OPCODES", 1000)
    with pytest.raises(RefusedError) as caught:
        read_pickle(finish(b"N0" * 600 + b"N"), "x")
    assert caught.value.codes == ("LF110",)
    assert read_pickle(finish(b"N0" * 400 + b"N"), "x") is None


def test_a_memo_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraformat.containers._pickle_machine.MAX_PICKLE_MEMO", 100)
    with pytest.raises(RefusedError) as caught:
        read_pickle(finish(b"N" + b"\x94" * 101), "x")
    assert caught.value.codes == ("LF110",)


def test_a_pickle_that_is_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraformat.containers.torch_zip.MAX_PICKLE_BYTES", 50)
    assert refusal(path, checkpoint(pairs([("w", tensor())]))).codes == ("LF110",)
    monkeypatch.setattr("loraformat.containers._inert_pickle.MAX_PICKLE_BYTES", 50)
    with pytest.raises(RefusedError):
        read_pickle(finish(bytes(100)), "x")


BOMBS = {
    # Each line holds the one before it twice: 2^60 values if anyone looked at all of them.
    "doubling": b"]\x94" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(60)),
    "doubling tuples": b")\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60)),
    "a ring": b"]\x94h\x00a",
    "a ring of dictionaries": b"}\x94" + text("self") + b"h\x00s",
    "deep tuples": b")" + b"\x85" * 30_000,
    "deep lists": b"]" * 20_000 + b"a" * 19_999,
    "deep dictionaries": (b"}" + text("a")) * 20_000 + b"N" + b"s" * 20_000,
    "a long text in many places": text("x" * 200_000) + b"\x940](" + b"h\x00" * 3_000 + b"e",
    "a long text, encoded often": text("x" * 200_000)
    + b"\x940"
    + named("_codecs.encode")
    + b"\x940]("
    + (b"h\x01h\x00" + text("latin1") + b"\x86R") * 3_000
    + b"e",
    "a long list, made a set often": b"]("
    + b"N" * 20_000
    + b"e\x940"
    + named("builtins.set")
    + b"\x940]("
    + b"h\x01h\x00\x85R" * 3_000
    + b"e",
    "a long tuple as a shape": b"(" + b"K\x01" * 30_000 + b"t\x940" + named("torch.Size") + b"\x940]h\x01h\x00\x85Ra",
    "keys that collide": pairs((number(index * (2**61 - 1)), b"N") for index in range(5_000)),
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("place", ["alone", "value", "name"])
def test_bombs_take_neither_time_nor_memory(kind: str, place: str, path: Path) -> None:
    body = BOMBS[kind]
    whole = {
        "alone": body,
        "value": body + b"0" + pairs([("w", tensor())]) + text("v") + body + b"s",
        "name": pairs([(body, number(1)), ("w", tensor())]),
    }[place]

    said: list[str] = []

    def attempt() -> None:
        try:
            opened = open_bytes(path, checkpoint(whole))
        except LoraformatError as error:
            said.append(str(error))
            return
        assert all(len(shown) <= limits.MAX_VALUE_CHARACTERS for shown in opened.metadata.values())

    if kind.startswith("deep"):  # These are about the depth of the stack, and slow when memory is counted.
        attempt()
    else:
        bounded(attempt)
    assert all(len(message) < 5000 for message in said)


def test_the_worst_pickle_that_is_taken(path: Path) -> None:
    """As many empty dictionaries as the limit permits."""
    count = limits.MAX_PICKLE_OPCODES // 20
    found = bounded(lambda: read_pickle(finish(b"](" + b"}" * count + b"e"), "x"), megabytes=300)
    assert len(found) == count
    assert isinstance(found[0], Entries)


# --- views and storages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (2, 3), (3, 1)),
        (-1, (2, 3), (3, 1)),
        (0, (2, 3), (4, 1)),
        (0, (2, 3), (3, 2)),
        (0, (7,), (1,)),
        (0, (2,), (6,)),
        (6, (), ()),
        (5, (2, 3), (-3, 1)),
        (5, (6,), (-1,)),
        (-(2**63), (1,), (1,)),
        (2**62, (1,), (1,)),
        (2**64, (1,), (1,)),
        (-(2**64), (2,), (2**64,)),
        (0, (2**62,), (1,)),
        (0, (2**32, 2**32), (0, 0)),
        (0, (2**70,), (0,)),
        (0, (-1,), (1,)),
        (0, (-2, -3), (3, 1)),
        (0, (2**40, 0), (1, 1)),
        (0, (2**40, 2**40, 0), (1, 1, 1)),
        (0, (1000,), (0,)),
    ],
)
def test_views_outside_their_storage(path: Path, offset: int, shape: Any, strides: Any) -> None:
    data = checkpoint(pairs([("w", tensor(None, offset, shape, strides))]))
    if shape == (2**40, 0):  # No bytes at all, and an array library can hold it.
        assert open_bytes(path, data).tensors["w"].read().size == 0
        return
    error = bounded(lambda: refusal(path, data), megabytes=20)
    assert error.codes == ("LF114",)
    assert "'w'" in error.problems[0].where


def test_more_dimensions_than_anyone_has(path: Path) -> None:
    data = checkpoint(pairs([("w", tensor(None, 0, (1,) * 9))]))
    assert refusal(path, data).codes == ("LF110",)


@pytest.mark.parametrize(
    ("held", "members", "code"),
    [
        (storage(elements=5), {"0": SIX}, "LF114"),
        (storage(elements=7), {"0": SIX}, "LF114"),
        (storage(elements=2**70), {"0": SIX}, "LF114"),
        (storage(elements=0), {"0": SIX}, "LF114"),
        (storage("Double", elements=6), {"0": SIX}, "LF114"),
        (storage("Half", elements=6), {"0": SIX}, "LF114"),
        (storage(key="1"), {"0": SIX}, "LF114"),
        (storage(key=""), {"0": SIX}, "LF114"),
        (storage(key="../version"), {"0": SIX}, "LF114"),
        (storage(key="0\x1b"), {"0": SIX}, "LF114"),
        (storage(), {"0": b""}, "LF114"),
        (storage(), {"0": SIX + b"\0" * 4}, "LF114"),
        (storage(), {"0": SIX + b"\0" * 3}, None),
        (storage("Int"), {"0": SIX}, None),
    ],
)
def test_storages_that_are_not_their_members(path: Path, held: bytes, members: Any, code: str | None) -> None:
    data = checkpoint(pairs([("w", tensor(held))]), members)
    if code is None:
        assert open_bytes(path, data).tensors["w"].shape == (2, 3)
    else:
        assert refusal(path, data).codes == (code,)


@pytest.mark.parametrize("form", ["float4_e2m1fn_x2", "bits8", "quint8", "complex32"])
def test_number_forms_that_we_lack(path: Path, form: str) -> None:
    untyped = group(text("storage"), named("torch.storage.UntypedStorage"), text("0"), text("cpu"), number(24)) + b"Q"
    body = call(V3, untyped, number(0), SIZES, STEPS, b"\x89", NO_HOOKS, named(f"torch.{form}"))
    error = refusal(path, checkpoint(pairs([("w", body)])))
    assert error.codes == ("LF106",)
    assert form in str(error)


@pytest.mark.parametrize(("mark", "taken"), [(b"\x88", False), (b"\x89", True), (b"N", False)])
def test_views_that_conjugate(path: Path, mark: bytes, taken: bool) -> None:
    body = call(V2, storage(), number(0), SIZES, STEPS, b"\x89", NO_HOOKS, pairs([("conj", mark)]))
    data = checkpoint(pairs([("w", body)]))
    if taken:
        assert open_bytes(path, data).tensors
    else:
        assert refusal(path, data).codes == ("LF114",)


def test_a_mark_that_is_set_later(path: Path) -> None:
    """The dictionary is filled after the tensor was made from it."""
    body = b"}\x940" + call(V2, storage(), number(0), SIZES, STEPS, b"\x89", NO_HOOKS, b"h\x00")
    later = b"h\x00" + text("conj") + b"\x88s0"
    assert refusal(path, checkpoint(pairs([("w", body)]) + later)).codes == ("LF114",)


# --- archives --------------------------------------------------------------------------------------------------------

PICKLE = finish(pairs([("w", tensor())]))
PARTS = [Part("m/data.pkl", PICKLE), Part("m/data/0", SIX), Part("m/version", b"3\n")]


def change(index: int, **fields: Any) -> list[Part]:
    return [replace(part, **fields) if place == index else part for place, part in enumerate(PARTS)]


def deflated() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(bytes(10**8)) + packer.flush()


def zip64(*numbers: int) -> bytes:
    return struct.pack("<2H", 1, 8 * len(numbers)) + struct.pack(f"<{len(numbers)}Q", *numbers)


FULL = 0xFFFFFFFF
N = len(SIX)
LYING_ARCHIVES = {
    "deflated": build(change(1, method=8)),
    "deflated pickle": build(change(0, method=8)),
    "deflate bomb": build(change(1, method=8, data=deflated(), central=(len(deflated()), 10**8), local=(0, 0, 0))),
    "encrypted": build(change(1, flags=0x809)),
    "strongly encrypted": build(change(1, flags=0x848)),
    "patch data": build(change(1, flags=0x828)),
    "masked": build(change(1, flags=0x2808)),
    "two of one name": build([*PARTS, PARTS[1]]),
    "two pickles": build([*PARTS, Part("n/data.pkl", PICKLE)]),
    "parent": build([*PARTS, Part("m/../../x", b"")]),
    "absolute": build([*PARTS, Part("/etc/passwd", b"")]),
    "drive": build([*PARTS, Part("C:/x", b"")]),
    "backslash": build([*PARTS, Part("m\\x", b"")]),
    "NUL in a name": build([*PARTS, Part("m/x\0y", b"")]),
    "escape in a name": build([*PARTS, Part("m/\x1b[2J", b"")]),
    "no name": build([*PARTS, Part("", b"")]),
    "long name": build([*PARTS, Part("m/" + "x" * 5000, b"")]),
    "same bytes twice": build([*PARTS, Part("m/data/1", SIX, at=30 + 10 + len(PICKLE) + 16)]),
    "inside another": build([PARTS[0], PARTS[1], Part("m/data/1", b"", at=50)]),
    "behind the directory": build([*PARTS, Part("m/data/1", b"", at=5000)]),
    "offset of 2^32-2": build([*PARTS, Part("m/data/1", b"", at=FULL - 1)]),
    "local name differs": build(change(1, local_name="m/data/9")),
    "local name shorter": build(change(1, local_name="m/data/")),
    "local crc differs": build(change(1, local=(1, N, N))),
    "local size differs": build(change(1, local=(0, N + 4, N + 4))),
    "larger than the file": build(change(1, central=(10**6, 10**6))),
    "larger than it is": build(change(1, central=(N + 4, N + 4))),
    "smaller than it is": build(change(1, central=(N - 4, N - 4))),
    "packed differs": build(change(1, central=(N - 4, N))),
    "descriptor differs": build(change(1, descriptor=struct.pack("<4s3L", b"PK\x07\x08", zlib.crc32(SIX), N - 4, N))),
    "descriptor of another crc": build(change(1, descriptor=struct.pack("<4s3L", b"PK\x07\x08", 1, N, N))),
    "no descriptor": build(change(1, descriptor=b"")),
    "not streamed but says so": build([PARTS[0], replace(PARTS[1], flags=0x800)]),
    "zip64 without its field": build(change(1, central=(FULL, FULL))),
    "zip64 field without need": build(change(1, central_extra=zip64(N))),
    "zip64 too short": build(change(1, central=(FULL, FULL), central_extra=zip64(N))),
    "zip64 too long": build(change(1, central=(FULL, N), central_extra=zip64(N, N))),
    "zip64 twice": build(change(1, central=(FULL, FULL), central_extra=zip64(N, N) + zip64(N, N))),
    "zip64 of 2^64-1": build(change(1, central=(FULL, FULL), central_extra=zip64(2**64 - 1, 2**64 - 1))),
    "zip64 of 2^63": build(change(1, central=(FULL, FULL), central_extra=zip64(2**63, 2**63))),
    "zip64 with two sizes": build(change(1, central=(FULL, FULL), central_extra=zip64(N, N - 4))),
    "zip64 offset": build(change(1, at=FULL, central_extra=zip64(2**62))),
    "extra field cut off": build(change(1, central_extra=struct.pack("<2H", 0x4246, 50))),
    "local zip64 lies": build(change(1, streamed=False, local_extra=zip64(N, N) + zip64(N, N))),
    "comment": build(PARTS)[:-2] + b"\x03\x00abc",
    "trailing bytes": build(PARTS) + b"\0\0\0",
    "two end records": build(PARTS) + plain_end(0, 0, len(build(PARTS))),
    "bytes before": b"PK\x03\x04" + bytes(28) + build(PARTS),
    "several disks": build(PARTS, lambda n, size, at: struct.pack("<4s4H2LH", b"PK\x05\x06", 1, 1, n, n, size, at, 0)),
    "count differs": build(PARTS, lambda n, size, at: struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, n, size, at, 0)),
    "count too small": build(PARTS, lambda n, size, at: plain_end(n - 1, size, at)),
    "count too large": build(PARTS, lambda n, size, at: plain_end(n + 1, size, at)),
    "count of 65535": build(PARTS, lambda n, size, at: plain_end(65535, size, at)),
    "directory too long": build(PARTS, lambda n, size, at: plain_end(n, size + 1, at)),
    "directory elsewhere": build(PARTS, lambda n, size, at: plain_end(n, size, at - 1)),
    "directory of 2^32-1": build(PARTS, lambda n, size, at: plain_end(n, FULL - 1, at)),
    "zip64 end elsewhere": build(PARTS, lambda n, size, at: wide_end(n, size, at, shift=1)),
    "zip64 end count": build(PARTS, lambda n, size, at: wide_end(n + 1, size, at)),
    "zip64 end of 2^64-1": build(
        PARTS,
        lambda n, size, at: (
            wide_end(n, size, at)[:-74] + struct.pack("<4Q", 1, 1, 2**64 - 1, 2**64 - 1) + wide_end(n, size, at)[-42:]
        ),
    ),
    "zip64 end says otherwise": build(
        PARTS, lambda n, size, at: wide_end(n, size, at)[:-22] + plain_end(n - 1, size, at)
    ),
}


@pytest.mark.parametrize("kind", LYING_ARCHIVES)
def test_archives_that_lie(kind: str, path: Path) -> None:
    error = bounded(lambda: refusal(path, LYING_ARCHIVES[kind]), megabytes=50)
    assert error.codes == ("LF902",)
    assert isinstance(error, RefusedError)


@pytest.mark.parametrize(
    "data",
    [
        build(PARTS),
        build([replace(part, streamed=False) for part in PARTS]),
        build([replace(part, local=None) for part in PARTS]),
        build(change(1, central_extra=struct.pack("<2H", 0x4246, 2) + b"ZZ", local_extra=b"FB\x03\0ZZZ")),
        build(change(1, central=(FULL, FULL), central_extra=zip64(N, N))),
        build(change(1, descriptor=struct.pack("<4sL2Q", b"PK\x07\x08", zlib.crc32(SIX), N, N))),
        build(change(1, local=(0, FULL, FULL), local_extra=zip64(N, N))),
        build(change(1, crc=0)),
        build(PARTS, wide_end),
        build(PARTS, lambda n, size, at: wide_end(n, size, at, full=False)),
        build([Part("m/", b"", streamed=False), *PARTS, Part("other.txt", b"hello")]),
    ],
)
def test_archives_that_are_sound(data: bytes, path: Path) -> None:
    opened = open_bytes(path, data)
    assert read_all(opened)["w"].tobytes() == SIX
    with zipfile.ZipFile(path) as theirs:
        ours = read_directory(opened.file)
        assert list(ours) == theirs.namelist()
        for info in theirs.infolist():
            with theirs.open(info) as member:
                assert member._orig_compress_start == ours[info.filename].span.offset
            assert info.file_size == ours[info.filename].span.length


def test_a_field_of_two_gigabytes_is_not_read(path: Path) -> None:
    """zip64 for real: a hole of 5 GiB, and what matters behind it."""
    hole, size = 5 << 30, N
    with path.open("wb") as file:
        file.write(build(PARTS[:1])[: 30 + 10 + len(PICKLE) + 16])
        first = file.tell()
        head = struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0x800, 0, 0, 0, 0, FULL, FULL, len("m/data/9"), 20)
        file.write(head + b"m/data/9" + zip64(hole, hole))
        file.seek(hole, os.SEEK_CUR)
        second = file.tell()
        file.write(
            struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, 0x808, 0, 0, 0, 0, 0, 0, 8, 12) + b"m/data/0" + zip64(second)
        )
        file.write(SIX + struct.pack("<4sL2Q", b"PK\x07\x08", zlib.crc32(SIX), size, size))
        start = file.tell()
        rows = [
            (0x808, zlib.crc32(PICKLE), len(PICKLE), 0, "m/data.pkl", b""),
            (0x800, 0, FULL, first, "m/data/9", zip64(hole, hole)),
            (0x808, zlib.crc32(SIX), size, FULL, "m/data/0", zip64(second)),
        ]
        for flags, crc, length, at, name, extra in rows:
            fields = (b"PK\x01\x02", 45, 45, flags, 0, 0, 0, crc, length, length, len(name), len(extra), 0, 0, 0, 0, at)
            file.write(struct.pack("<4s6H3L5H2L", *fields) + name.encode() + extra)
        file.write(wide_end(3, file.tell() - start, start))
    opened = CONTAINER.open(path)
    assert opened.tensors["w"].read().tobytes() == SIX
    with zipfile.ZipFile(path) as theirs:
        assert theirs.read("m/data/0") == SIX
    fields = list_crc_fields(opened)
    assert fields[opened.tensors["w"].span] == (second + 50 + N + 4, start + 46 + 10 + 46 + 8 + 20 + 16)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (build(PARTS)[:-10], "LF101"),
        (build(PARTS)[:100], "LF101"),
        (b"PK\x03\x04", "LF101"),
        (build([]), "LF121"),
        (build(PARTS[1:]), "LF111"),
        (build([Part("data.pkl", PICKLE)]), "LF111"),
        (build([Part("a/m/data.pkl", PICKLE)]), "LF111"),
        (build([*PARTS, Part("m/constants.pkl", b"")]), "LF111"),
        (build([*PARTS, Part("m/code/__torch__.py", b"x", method=8)]), "LF111"),
        (build([*PARTS, Part("m/byteorder", b"big")]), "LF112"),
        (build([*PARTS, Part("m/byteorder", b"pdp")]), "LF109"),
        (build([*PARTS, Part("m/byteorder", b"little\n")]), "LF109"),
        (b"", "LF101"),
        (pickle.dumps({"a": 1}, 2), "LF111"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "LF111"),
        (b"x" * 257 + b"ustar" + bytes(250), "LF111"),
        (b"x" * 600, "LF121"),
    ],
)
def test_files_that_are_something_else(data: bytes, code: str, path: Path) -> None:
    assert refusal(path, data).codes == (code,)


def test_an_old_pickle_comes_with_the_command(path: Path) -> None:
    advice = refusal(path, pickle.dumps({"a": 1}, 2)).problems[0].advice
    assert 'python -c "import sys, torch; ' in advice
    assert "weights_only=True" in advice


def test_what_is_sniffed(tmp_path: Path) -> None:
    def sniff(*parts: Part) -> bool:
        data = build(parts)
        return CONTAINER.sniff(data[:64], len(data))

    assert sniff(*PARTS)
    assert sniff(Part("a-root-with-a-name-that-is-longer-than-a-head/data.pkl", PICKLE))
    assert not sniff(Part("a-key-with-a-name-that-is-longer-than-a-whole-head.npy", b"", streamed=False))
    assert not sniff(Part("w.npy", b""))
    assert not sniff(Part("word/document.xml", b""))
    assert not CONTAINER.sniff(b"PK\x03\x04", 4)


# --- images and CRCs -------------------------------------------------------------------------------------------------


def test_a_copy_can_be_rewritten_and_mended(path: Path, tmp_path: Path) -> None:
    body = pairs([("a", tensor()), ("b", tensor(storage(key="1"), 3, (1, 3)))])
    opened = open_bytes(path, checkpoint(body, {"0": SIX, "1": SIX}))
    (image,) = describe_images(opened, tmp_path / "out.pt")
    ((_, piece),) = image.placed()
    assert isinstance(piece, Copy)
    assert (piece.offset, piece.length) == (0, opened.file.size_bytes)
    data = bytearray(path.read_bytes())
    span = opened.tensors["b"].span
    place = image.locate(span)
    assert place is not None
    data[place : place + span.length] = np.full(3, 7, np.float32).tobytes()
    image.path.write_bytes(data)
    with zipfile.ZipFile(image.path) as theirs:
        assert theirs.testzip() == "m/data/1"
    fields = {
        held: offsets for held, offsets in list_crc_fields(opened).items() if held.offset <= span.offset < held.end
    }
    assert len(fields) == 1
    descriptor = os.open(image.path, os.O_RDWR)
    mend_crcs(descriptor, fields)
    os.close(descriptor)
    with zipfile.ZipFile(image.path) as theirs:
        assert theirs.testzip() is None
    assert CONTAINER.open(image.path).tensors["b"].read().tolist() == [[7, 7, 7]]
    changed = {
        at for at, (old, new) in enumerate(zip(path.read_bytes(), image.path.read_bytes(), strict=True)) if old != new
    }
    places = set(range(span.offset, span.end))
    places |= {at + byte for offsets in fields.values() for at in offsets for byte in range(4)}
    assert changed <= places


@pytest.mark.parametrize("streamed", [True, False])
def test_every_place_of_a_crc_is_listed(streamed: bool, path: Path) -> None:
    data = build([replace(part, streamed=streamed) for part in PARTS])
    opened = open_bytes(path, data)
    (offsets,) = list_crc_fields(opened).values()
    crc = struct.pack("<L", zlib.crc32(SIX))
    assert [data[at : at + 4] for at in offsets] == [crc] * 2
    assert data.count(crc) == 2


@pytest.mark.parametrize("jobs", [1, 3])
def test_checksums_of_several_members_by_several_threads(jobs: int, path: Path) -> None:
    dice = np.random.default_rng(1)
    members = {str(index): dice.bytes(1 << 20 | index) for index in range(5)}
    parts = [
        Part("m/data.pkl", finish(pairs([("w", tensor(storage(elements=1 << 18)))]))),
        Part("m/byteorder", b"little"),
    ]
    opened = open_bytes(path, build([*parts, *(Part(f"m/data/{key}", data) for key, data in members.items())]))
    fields = list_crc_fields(opened)
    with path.open("rb") as stream:
        found = compute_crcs(stream.fileno(), fields, jobs)
    assert [found[at] for offsets in fields.values() for at in offsets] == [
        struct.pack("<L", zlib.crc32(data)) for data in members.values() for _ in range(2)
    ]


def test_mending_a_copy_that_was_cut_off(path: Path) -> None:
    opened = open_bytes(path, build(PARTS))
    fields = list_crc_fields(opened)
    descriptor = os.open(path, os.O_RDWR)
    os.ftruncate(descriptor, 100)
    with pytest.raises(LoraformatError) as caught:
        mend_crcs(descriptor, fields)
    os.close(descriptor)
    assert caught.value.codes == ("LF906",)


# --- damage at random ------------------------------------------------------------------------------------------------

OPCODES = [bytes([code]) for code in range(256)]
BITS = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from(
        [b"N", b"}", b"]", b")", b"(", b"t", b"u", b"e", b"a", b"s", b"0", b"R", b"b", b"Q", b"\x94", b"\x93"]
    ),
    st.sampled_from(
        [tensor(), storage(), NO_HOOKS, SIZES, text("w"), text(""), number(2**70), number(-1), b"h\x00", b"q\x00"]
    ),
    st.sampled_from(
        [V2, V3, FROM_TYPE, "torch.FloatStorage", "torch.float32", "os.system", "torch.Size", "builtins.set"]
    ).map(named),
)


@given(bits=st.lists(BITS, max_size=40), wrap=st.booleans())
def test_any_opcodes_are_read_or_refused(bits: list[bytes], wrap: bool, tmp_path: Path) -> None:
    body = b"".join(bits)
    whole = pairs([("w", tensor()), ("v", body)]) if wrap else body
    path = tmp_path / "any.pt"
    try:
        opened = bounded(lambda: open_bytes(path, checkpoint(whole)), megabytes=30)
    except LoraformatError as error:
        str(error)
        return
    read_all(opened)


GOOD = checkpoint(pairs([("a.w", tensor()), ("b", tensor(storage(key="1"), 2, (2, 2), (2, 1)))]), {"0": SIX, "1": SIX})
DAMAGE = st.lists(
    st.tuples(st.integers(0, len(GOOD) - 1), st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))),
    min_size=1,
    max_size=6,
)


@given(damage=DAMAGE, cut=st.one_of(st.none(), st.integers(0, len(GOOD))), grown=st.binary(max_size=30))
def test_any_damage_is_read_or_refused(
    damage: list[tuple[int, int]], cut: int | None, grown: bytes, tmp_path: Path
) -> None:
    data = bytearray(GOOD)
    for place, value in damage:
        data[place] = value
    path = tmp_path / "damaged.pt"
    try:
        opened = bounded(lambda: open_bytes(path, bytes(data[:cut] + grown)), megabytes=30)
    except LoraformatError as error:
        str(error)
        return
    read_all(opened)


FIELDS = {
    "flags": st.sampled_from([0, 8, 0x800, 0x808, 1, 0xFFFF]),
    "method": st.sampled_from([0, 8, 99]),
    "crc": st.sampled_from([None, 0, 1, FULL]),
    "local": st.sampled_from([None, (0, 0, 0), (0, N, N), (1, 1, 1), (FULL, FULL, FULL)]),
    "central": st.sampled_from([None, (0, 0), (N, N), (N + 1, N + 1), (FULL, FULL), (FULL - 1, FULL - 1)]),
    "central_extra": st.sampled_from(
        [b"", zip64(), zip64(N), zip64(N, N), zip64(N, N, 0), zip64(2**63, 2**63), b"\1", b"\1\0\xff\xff"]
    ),
    "local_extra": st.sampled_from([b"", zip64(N, N), b"FB\x02\0ZZ", b"\1\0"]),
    "at": st.sampled_from([None, 0, 1, 30, 200, FULL - 1, FULL]),
    "descriptor": st.sampled_from([None, b"", b"PK\x07\x08", bytes(16)]),
    "streamed": st.booleans(),
    "name": st.sampled_from(["m/data/0", "m/data/1", "m/data.pkl", "m/", "m", "m/byteorder", "n/data.pkl"]),
}


@given(data=st.data(), index=st.integers(0, 2), keys=st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True))
def test_archives_that_are_taken_are_read_as_zipfile_reads_them(
    data: st.DataObject, index: int, keys: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "fields.pt"
    rewrite(path, build(change(index, **{key: data.draw(FIELDS[key]) for key in keys})))
    file = InputFile(path)
    try:
        ours = read_directory(file)
    except LoraformatError:
        return
    with zipfile.ZipFile(path) as theirs:
        assert list(ours) == theirs.namelist()
        for info in theirs.infolist():
            if ours[info.filename].compression:
                continue
            with contextlib.suppress(zipfile.BadZipFile):  # Of another CRC: we do not look at the content.
                span = ours[info.filename].span
                assert theirs.read(info) == file.read(span.offset, span.length)
