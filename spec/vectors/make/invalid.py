"""Files that a reader must refuse, each for one reason."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from make.kit import (
    Dice,
    Files,
    Tensor,
    canonical,
    entries_of,
    factors,
    fingerprint,
    frame,
    lora,
    manifest_of,
    pack,
    replacement,
    shape_factors,
    store,
    tensor,
)
from make.valid import simple_parts

MANIFEST, TENSORS, _ = simple_parts()
TARGET = MANIFEST["targets"]["proj"]
TEXT = canonical(MANIFEST)
DOWN, UP = "proj.lora_A.weight", "proj.lora_B.weight"
DATA = b"".join(TENSORS[name].data for name in (DOWN, UP))
ENTRIES = entries_of([(DOWN, TENSORS[DOWN]), (UP, TENSORS[UP])])


def vector(requirements: str, codes: str, file: bytes) -> Files:
    """Return a vector that is refused for one of `codes`."""
    expected = {"requirements": requirements.split(), "verdict": "invalid", "codes": codes.split()}
    return {"adapter.safetensors": file, "expected.json": expected}


# --- section 1: the file ----------------------------------------------------------------------------------------------


def _header(text: str | bytes, data: bytes = DATA) -> bytes:
    """Return a file whose header is `text`; what is to be wrong with it is all that is wrong."""
    encoded = text.encode("utf-8") if isinstance(text, str) else text
    return frame(encoded + b" " * (-len(encoded) % 8), data)


def _whole() -> str:
    return canonical(ENTRIES | {"__metadata__": {"loraformat": TEXT}})


def _entry(changes: Mapping[str, Any] | None, data: bytes = DATA, *, raw: Mapping[str, str] | None = None) -> bytes:
    """Return a file with changed fields in the entry of A, `raw` as text; None for `changes` leaves the entry out."""
    entry = {name: canonical(value) for name, value in (ENTRIES[DOWN] | dict(changes or {})).items() if value != ...}
    text = ",".join(f'"{name}":{value}' for name, value in (entry | dict(raw or {})).items())
    rest = canonical({UP: ENTRIES[UP], "__metadata__": {"loraformat": TEXT}})[1:]
    return _header(f'{{"{DOWN}":{{{text}}},{rest}', data)


def _dropped(field: str) -> bytes:
    entry = {name: value for name, value in ENTRIES[DOWN].items() if name != field}
    return _header(canonical(ENTRIES | {DOWN: entry, "__metadata__": {"loraformat": TEXT}}))


def _extra(name: str, dtype: str, shape: list[int], offsets: list[int], data: bytes = b"") -> bytes:
    """Return a file with one tensor entry more, and `data` behind that of the others."""
    more = {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    return _header(canonical(ENTRIES | more | {"__metadata__": {"loraformat": TEXT}}), DATA + data)


def _moved(distance: int) -> bytes:
    """Return a file whose tensors lie so many bytes further behind."""
    entries = {
        name: entry | {"data_offsets": [offset + distance for offset in entry["data_offsets"]]}
        for name, entry in ENTRIES.items()
    }
    return _header(canonical(entries | {"__metadata__": {"loraformat": TEXT}}), bytes(distance) + DATA)


def _metadata(raw: str) -> bytes:
    return _header(f'{{"__metadata__":{raw},{canonical(ENTRIES)[1:]}')


def _named(name: str) -> bytes:
    """Return a file whose A is called `name`; the target keeps its B."""
    tensors = {name: TENSORS[DOWN], UP: TENSORS[UP]}
    return pack(MANIFEST, tensors)


END = len(DATA)
A_END = len(TENSORS[DOWN].data)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 12345\n"
TWICE = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'

FILES: Mapping[str, Files] = {
    "empty-file": vector("R-001", "LF101", b""),
    "seven-bytes": vector("R-001", "LF101", b"\x10\0\0\0\0\0\0"),
    "header-length-beyond-the-file": vector("R-001 R-009", "LF102", b"\x00\x10" + _header(_whole())[2:]),
    "header-length-of-2-to-the-63": vector("R-001 R-009", "LF102", b"\0\0\0\0\0\0\0\x80" + _header(_whole())[8:]),
    "header-length-of-all-ones": vector("R-001 R-009", "LF102", b"\xff" * 8 + b"{}"),
    "header-length-0": vector("R-001", "LF102", frame(b"")),
    "header-length-1": vector("R-001", "LF102", frame(b"{")),
    "cut-off-in-the-header": vector("R-001", "LF102", _header(_whole())[:100]),
    "git-lfs-pointer": vector("R-001", "LF111 LF102", LFS),
    "byte-order-mark": vector("R-002", "LF103", _header("\ufeff" + _whole())),
    "leading-space": vector("R-002", "LF103", _header(" " + _whole())),
    "header-is-a-list": vector("R-002", "LF103", _header(f"[{_whole()}]")),
    "not-utf-8": vector("R-002", "LF103", _header(_whole().encode()[:-1] + b',"caf\xe9":' + TWICE.encode() + b"}")),
    "not-json": vector("R-003", "LF104", _header(_whole()[:-1])),
    "comma-at-the-end": vector("R-003", "LF104", _header(_whole()[:-1] + ",}")),
    "text-after-the-header": vector("R-003", "LF104", _header(_whole() + "{}")),
    "padding-of-nul": vector("R-003", "LF104", frame(_whole().encode() + b"\0" * 8, DATA)),
    "comment": vector("R-003", "LF104", _header(_whole()[:-1] + "/**/}")),
    "control-character-in-a-string": vector("R-003", "LF104", _metadata('{"a":"\t"}')),
    "no-such-escape": vector("R-003", "LF104", _metadata('{"a":"\\x41"}')),
    "lone-surrogate": vector("R-003", "LF104", _metadata('{"a":"\\ud800"}')),
    "surrogates-in-the-wrong-order": vector("R-003", "LF104", _metadata('{"a":"\\ude00\\ud83d"}')),
    "tensor-twice": vector("R-003", "LF105", _header(_whole()[:-1] + f',"{UP}":{canonical(ENTRIES[UP])}}}')),
    "tensor-twice-by-an-escape": vector(
        "R-003", "LF105", _header(_whole()[:-1] + f',"\\u0070{UP[1:]}":{canonical(ENTRIES[UP])}}}')
    ),
    "metadata-twice": vector(
        "R-003", "LF105", _header(_whole()[:-1] + f',"__metadata__":{canonical({"loraformat": TEXT})}}}')
    ),
    "metadata-key-twice": vector(
        "R-003", "LF105", _metadata(f'{{"loraformat":{canonical(TEXT)},"loraformat":{canonical(TEXT)}}}')
    ),
    "entry-field-twice": vector("R-003", "LF105", _entry({}, raw={"dtype": '"F32","dtype":"F32"'})),
    "entry-with-another-field": vector("R-004", "LF109", _entry({"strides": [4, 1]})),
    "entry-without-dtype": vector("R-004", "LF109", _dropped("dtype")),
    "entry-without-shape": vector("R-004", "LF109", _dropped("shape")),
    "entry-without-offsets": vector("R-004", "LF109", _dropped("data_offsets")),
    "entry-is-a-list": vector(
        "R-004", "LF109", _header(canonical(ENTRIES | {DOWN: [], "__metadata__": {"loraformat": TEXT}}))
    ),
    "unknown-dtype": vector("R-004", "LF106", _entry({"dtype": "F31"})),
    "dtype-in-small-letters": vector("R-004", "LF106", _entry({"dtype": "f32"})),
    "dtype-is-a-number": vector("R-004", "LF106", _entry({"dtype": 32})),
    "shape-is-a-number": vector("R-004", "LF109", _entry({"shape": 8})),
    "shape-with-true": vector("R-004", "LF109", _entry({}, raw={"shape": "[2,4,true]"})),
    "shape-with-a-fraction": vector("R-004", "LF109", _entry({}, raw={"shape": "[2.0,4]"})),
    "shape-with-an-exponent": vector("R-004", "LF109", _entry({}, raw={"shape": "[2,4e0]"})),
    "shape-with-a-negative-number": vector("R-004", "LF109", _entry({"shape": [-2, -4]})),
    "shape-with-text": vector("R-004", "LF109", _entry({"shape": ["2", 4]})),
    "shape-of-nine-axes": vector("R-004 R-009", "LF110", _entry({"shape": [2, 4, 1, 1, 1, 1, 1, 1, 1]})),
    "offsets-of-three": vector("R-005", "LF109", _entry({"data_offsets": [0, A_END, A_END]})),
    "offsets-with-a-fraction": vector("R-005", "LF109", _entry({}, raw={"data_offsets": f"[0.0,{A_END}]"})),
    "offsets-negative": vector("R-005", "LF109", _entry({}, raw={"data_offsets": f"[-0,{A_END}]"})),
    "size-too-small": vector("R-005", "LF108", _entry({"shape": [2, 5]})),
    "size-too-large": vector("R-005", "LF108", _entry({"shape": [2, 3]})),
    "size-beyond-64-bits": vector("R-005 R-009", "LF108", _extra("x", "U8", [2**32, 2**32, 2], [END, END])),
    "size-that-wraps-to-the-right-one": vector("R-005 R-009", "LF108", _entry({"shape": [2**61 + 2, 4]})),
    "size-beyond-64-bits-beside-a-zero": vector("R-005", "LF108", _extra("x", "U8", [0, 2**40, 2**40], [END, END])),
    "size-of-half-a-byte": vector("R-005", "LF108", _extra("x", "F4", [3], [END, END + 2], b"\0\0")),
    "hole-at-the-start": vector("R-006", "LF107", _moved(8)),
    "hole-between": vector("R-006", "LF107", _extra("x", "U8", [1], [END + 1, END + 2], b"\0\0")),
    "overlap": vector("R-006", "LF107", _extra("x", "U8", [2], [END - 1, END + 1], b"\0")),
    "one-place-for-two": vector("R-006", "LF107", _extra("x", "U8", [END - A_END], [A_END, END])),
    "bytes-behind-the-last-tensor": vector("R-006", "LF107", _header(_whole(), DATA + b"\0")),
    "cut-off-in-the-data": vector("R-006", "LF107", _header(_whole(), DATA[:-1])),
    "offsets-reversed": vector("R-006", "LF107 LF108", _entry({"data_offsets": [A_END, 0]})),
    "offset-of-2-to-the-64": vector("R-006 R-009", "LF107 LF108", _extra("x", "U8", [1], [END, 2**64 - 1])),
    "metadata-is-a-list": vector("R-007", "LF109", _metadata("[]")),
    "metadata-value-is-a-number": vector("R-007", "LF109", _metadata(f'{{"loraformat":{canonical(TEXT)},"a":1}}')),
    "metadata-value-is-an-object": vector("R-007", "LF109", _metadata(f'{{"loraformat":{TEXT}}}')),
    "tensor-name-empty": vector("R-008", "LF301", _named("")),
    "tensor-name-with-a-line-feed": vector("R-008", "LF301", _named(DOWN + "\n")),
    "tensor-name-with-nul": vector("R-008", "LF301", _named("\0" + DOWN)),
    "tensor-name-with-delete": vector("R-008", "LF301", _named("\x7f" + DOWN)),
    "tensor-name-with-a-c1-control": vector("R-008", "LF301", _named("proj\x9b.lora_A.weight")),
    "tensor-name-with-a-bidi-override": vector("R-008", "LF301", _named("proj\u202e.lora_A.weight")),
    "tensor-name-with-an-arabic-letter-mark": vector("R-008", "LF301", _named("proj\u061c.lora_A.weight")),
    "tensor-name-with-a-line-separator": vector("R-008", "LF301", _named("proj\u2028.lora_A.weight")),
}

# --- section 2: the manifest ------------------------------------------------------------------------------------------

PRINT = fingerprint("proj", np.arange(12.0).reshape(3, 4) / 4)


def _manifest(changes: Mapping[str, Any]) -> bytes:
    """Return a file with changed fields in the manifest; `...` leaves one out."""
    return pack(canonical({name: v for name, v in (MANIFEST | dict(changes)).items() if v is not ...}), TENSORS)


def _text(old: str, new: str) -> bytes:
    """Return a file with another text of the manifest."""
    if TEXT.count(old) != 1:
        raise ValueError(old)
    return pack(TEXT.replace(old, new), TENSORS)


def _target(changes: Mapping[str, Any]) -> bytes:
    """Return a file with changed fields in its target; `...` leaves one out."""
    target = {name: value for name, value in (TARGET | dict(changes)).items() if value is not ...}
    return _manifest({"targets": {"proj": target}})


def _scaling(value: Any) -> bytes:
    return _target({"scaling": value})


def _print(changes: Mapping[str, Any]) -> bytes:
    fields = {name: value for name, value in (PRINT | dict(changes)).items() if value is not ...}
    return _target({"fingerprint": fields})


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


MARKED = {"must_understand": False}

MANIFESTS: Mapping[str, Files] = {
    "manifest-not-json": vector("R-003 R-010", "LF104", _text('"version":"1.0"', '"version":1.0.0')),
    "manifest-is-a-list": vector("R-003 R-010", "LF104", pack(f"[{TEXT}]", TENSORS)),
    "manifest-empty": vector("R-003 R-010", "LF104", pack("", TENSORS)),
    "manifest-with-text-behind": vector("R-003", "LF104", pack(TEXT + "\0", TENSORS)),
    "manifest-with-a-byte-order-mark": vector("R-003", "LF104", pack("\ufeff" + TEXT, TENSORS)),
    "manifest-field-twice": vector("R-003", "LF105", _text('"version":"1.0"', '"version":"1.0","version":"1.0"')),
    "manifest-target-twice": vector(
        "R-003", "LF105", _text('"targets":{', f'"targets":{{"pro\\u006a":{canonical(TARGET)},')
    ),
    "manifest-key-twice-in-provenance": vector(
        "R-003", "LF105", _text('"version"', '"provenance":{"a":[{"b":1,"b":1}]},"version"')
    ),
    "manifest-with-nan": vector("R-003 R-051", "LF104", _text('"alpha":3', '"alpha":NaN')),
    "manifest-with-infinity": vector("R-003 R-051", "LF104", _text('"alpha":3', '"alpha":-Infinity')),
    "manifest-with-1e999": vector("R-003 R-051", "LF104", _text('"alpha":3', '"alpha":1e999')),
    "manifest-with-a-leading-zero": vector("R-003", "LF104", _text('"alpha":3', '"alpha":03')),
    "manifest-with-a-bare-point": vector("R-003", "LF104", _text('"alpha":3', '"alpha":3.')),
    "manifest-with-22-digits": vector("R-003", "LF104", _text('"alpha":3', '"alpha":1000000000000000000000')),
    "manifest-with-a-lone-surrogate": vector(
        "R-003", "LF104", _text('"version"', '"annotations":{"a":"\\udc00"},"version"')
    ),
    "manifest-nested-33-deep": vector("R-003", "LF104", _manifest({"provenance": {"deep": _nested(31)}})),
    "manifest-nested-deep": vector("R-003", "LF104", _text('"version"', f'"x":{"[" * 3000}{"]" * 3000},"version"')),
    "no-metadata": vector("R-010", "LF122", store(TENSORS)),
    "metadata-null": vector("R-007 R-010", "LF122", _metadata("null")),
    "metadata-without-the-key": vector("R-010", "LF122", store(TENSORS, {"format": "pt", "LoraFormat": TEXT})),
    "version-missing": vector("R-011 R-012", "LF122", _manifest({"version": ...})),
    "version-is-a-number": vector("R-011 R-012", "LF122", _manifest({"version": 1})),
    "version-without-minor": vector("R-011", "LF122", _manifest({"version": "1"})),
    "version-of-three": vector("R-011", "LF122", _manifest({"version": "1.0.0"})),
    "version-with-a-leading-zero": vector("R-011", "LF122", _manifest({"version": "01.0"})),
    "version-with-a-letter": vector("R-011", "LF122", _manifest({"version": "1.0b"})),
    "version-with-a-line-feed": vector("R-011", "LF122", _manifest({"version": "1.0\n"})),
    "version-in-other-digits": vector("R-011", "LF122", _manifest({"version": "1.٠"})),
    "version-2": vector("R-011", "LF119", _manifest({"version": "2.0"})),
    "version-10": vector("R-011", "LF119", _manifest({"version": "10.0"})),
    "version-0": vector("R-011", "LF119", _manifest({"version": "0.9"})),
    "version-2-with-other-fields": vector("R-011", "LF119", _manifest({"version": "2.0", "targets": 7, "new": 1})),
    "unknown-field": vector("R-012", "LF120", _manifest({"router": "top-2"})),
    "unknown-field-that-must-be-understood": vector("R-012", "LF120", _manifest({"x": {"must_understand": True}})),
    "unknown-field-that-says-neither": vector("R-012", "LF120", _manifest({"x": {"must_understand": "false"}})),
    "unknown-field-that-says-zero": vector("R-012", "LF120", _manifest({"x": {"must_understand": 0}})),
    "unknown-field-that-is-a-list": vector("R-012", "LF120", _manifest({"x": [MARKED]})),
    "unknown-field-in-a-newer-version": vector("R-011 R-012", "LF120", _manifest({"version": "1.9", "x": 1})),
    "unknown-field-in-base": vector("R-012", "LF120", _manifest({"base": {"name": "b", "sha256": "00"}})),
    "unknown-field-in-a-target": vector("R-012", "LF120", _target({"dropout": 0.1})),
    "unknown-field-in-scaling": vector("R-012", "LF120", _scaling(TARGET["scaling"] | {"use_rslora": True})),
    "unknown-field-in-a-fingerprint": vector("R-012", "LF120", _print({"seed": 1})),
    "targets-missing": vector("R-012", "LF122", _manifest({"targets": ...})),
    "targets-is-a-list": vector("R-012", "LF122", _manifest({"targets": [TARGET]})),
    "base-is-text": vector("R-012", "LF122", _manifest({"base": "meta-llama/Llama-3.2-1B"})),
    "base-is-null": vector("R-012", "LF122", _manifest({"base": None})),
    "base-name-is-null": vector("R-012", "LF122", _manifest({"base": {"name": None}})),
    "annotation-is-a-number": vector("R-012", "LF122", _manifest({"annotations": {"x.steps": 100}})),
    "provenance-is-text": vector("R-012", "LF122", _manifest({"provenance": "trained"})),
    "target-is-a-list": vector("R-012", "LF122", _manifest({"targets": {"proj": [TARGET]}})),
    "target-marked-only": vector("R-012", "LF122", _manifest({"targets": {"proj": TARGET, "a": MARKED}})),
    "kind-missing": vector("R-012", "LF122", _target({"kind": ...})),
    "kind-is-a-number": vector("R-012", "LF122", _target({"kind": 1})),
    "slot-missing": vector("R-012", "LF122", _target({"slot": ...})),
    "rank-missing": vector("R-012", "LF122", _target({"rank": ...})),
    "rank-is-text": vector("R-012", "LF122", _target({"rank": "2"})),
    "rank-is-true": vector("R-012", "LF122", _target({"rank": True})),
    "rank-with-a-fraction": vector("R-012", "LF122", _text('"rank":2', '"rank":2.0')),
    "rank-negative": vector("R-012", "LF122", _target({"rank": -2})),
}

# --- sections 3 to 7: targets, slots, kinds, scaling, fingerprints ----------------------------------------------------


def _factors(slot: str, down: Any, up: Any, rank: int = 2, dtype: str = "F32") -> bytes:
    """Return a file of one target with these shapes or numbers of A and B."""
    arrays = [Dice(11).numbers(item) if isinstance(item, tuple) else item for item in (down, up)]
    tensors = factors("proj", slot, *arrays, dtype)
    return pack(manifest_of({"proj": lora(slot, rank)}), tensors)


def _roles(tensors: Mapping[str, Tensor]) -> bytes:
    return pack(MANIFEST, tensors)


def _raw(dtype: str, data: bytes) -> bytes:
    """Return a file with factors `[2, 4]` and `[4, 2]` of some dtype."""
    tensors = {DOWN: Tensor(dtype, (2, 4), data), UP: Tensor(dtype, (4, 2), data)}
    return pack(manifest_of({"proj": lora("linear", 2)}), tensors)


def _unknown_kind() -> bytes:
    tensors = {**TENSORS, "proj.lora_magnitude_vector": tensor("F32", [1, 2, 3])}
    return pack(manifest_of({"proj": TARGET | {"kind": "kind-of-another-day"}}), tensors)


BOTH = {"lora_A.weight": "proj", "lora_B.weight": "proj"}


def _sharing(shared: Mapping[str, str], next_one: Mapping[str, str] | None = None) -> bytes:
    """Return a file with a second target, `twin`, that has a B of its own; and a third that shares with it."""
    targets = {"proj": TARGET, "twin": TARGET | {"shared": dict(shared)}}
    tensors = {**TENSORS, "twin.lora_B.weight": TENSORS[UP]}
    if next_one is not None:
        targets["twin2"] = TARGET | {"shared": dict(next_one)}
        tensors["twin2.lora_B.weight"] = TENSORS[UP]
    return pack(manifest_of(targets, version="1.1"), tensors)


def _orphan(name: str) -> bytes:
    return pack(MANIFEST, {**TENSORS, name: tensor("F32", [1])})


def _print_with_fraction() -> bytes:
    target = TARGET | {"fingerprint": PRINT | {"shape": [3.0, 4]}}
    return pack(json.dumps(MANIFEST | {"targets": {"proj": target}}), TENSORS)


def _without_name() -> bytes:
    return pack(manifest_of({"": TARGET}), {name.removeprefix("proj"): item for name, item in TENSORS.items()})


def _replace(tensors: Mapping[str, Tensor], **changes: Any) -> bytes:
    """Return a file that has a lora target and replaces parameters of `head`."""
    named = {f"head.{role}": item for role, item in tensors.items()}
    return pack(manifest_of({"proj": TARGET, "head": replacement() | changes}), {**TENSORS, **named})


SAVED = {"weight": tensor("F32", [[1, 2], [3, 4]])}
BY_RANK = {"rule": "alpha/rank", "alpha": 1}

_BIAS = tensor("F32", [1, 2, 3, 4, 5])


def _embedding_with_bias() -> bytes:
    tensors = shape_factors(Dice(13), "proj", "embedding", (3, 4), 2)
    return pack(manifest_of({"proj": lora("embedding", 2)}), tensors | {"proj.lora_B.bias": tensor("F32", [1, 2, 3])})


MEANINGS: Mapping[str, Files] = {
    "target-without-a-name": vector("R-020", "LF301", _without_name()),
    "no-targets": vector("R-021", "LF212", pack(manifest_of({}), {})),
    "tensor-of-no-target": vector("R-022", "LF202", _orphan("other.lora_A.weight")),
    "tensor-whose-name-only-begins-like-a-target": vector("R-022", "LF202", _orphan("proj2.lora_A.weight")),
    "tensor-called-like-the-target": vector("R-022", "LF202", _orphan("proj")),
    "target-without-tensors": vector("R-022", "LF201", _manifest({"targets": {"proj": TARGET, "more": TARGET}})),
    "role-unknown": vector("R-023", "LF202", _orphan("proj.lora_C.weight")),
    "shared-with-no-target": vector("R-025", "LF201 LF236", _sharing({"lora_A.weight": "nobody"})),
    "shared-role-that-is-not-there": vector("R-025", "LF201 LF236", _sharing({"lora_C.weight": "proj"})),
    "shared-beside-its-own": vector("R-025", "LF236", _sharing(BOTH)),
    "shared-with-itself": vector("R-025", "LF201 LF236", _sharing({"lora_A.weight": "twin"})),
    "shared-at-second-hand": vector(
        "R-025", "LF201 LF236", _sharing({"lora_A.weight": "proj"}, {"lora_A.weight": "twin"})
    ),
    "shared-is-a-list": vector("R-025", "LF122", _target({"shared": ["proj"]})),
    "shared-with-a-number": vector("R-025", "LF122", _target({"shared": {"lora_A.weight": 1}})),
    "option-unknown": vector("R-024", "LF120", _target({"options": {"block_size": 4}})),
    "options-not-an-object": vector("R-024", "LF122", _target({"options": [4]})),
    "lora-bias-of-another-size": vector("R-045", "LF203", _roles({**TENSORS, "proj.lora_B.bias": _BIAS})),
    "lora-bias-of-an-embedding": vector("R-045", "LF202", _embedding_with_bias()),
    "role-empty": vector("R-023", "LF202", _orphan("proj.")),
    "role-missing": vector("R-023", "LF201", _roles({DOWN: TENSORS[DOWN]})),
    "roles-of-another-slot": vector(
        "R-023", "LF201 LF202", pack(MANIFEST, shape_factors(Dice(12), "proj", "embedding", (3, 4), 2))
    ),
    "slot-unknown": vector("R-030", "LF122", _target({"slot": "slice"})),
    "slot-that-the-kind-lacks": vector("R-030", "LF408", _target({"slot": "parameter"})),
    "kind-unknown": vector("R-040", "LF209", _unknown_kind()),
    "kind-in-capitals": vector("R-040", "LF209", _target({"kind": "LoRA"})),
    "ranks-of-the-factors-differ": vector("R-041", "LF203", _factors("linear", (2, 4), (3, 3))),
    "factors-transposed": vector("R-041", "LF203", _factors("linear", (4, 2), (2, 3), 4)),
    "linear-with-a-kernel": vector("R-041", "LF203", _factors("linear", (2, 4, 1), (3, 2, 1))),
    "linear-with-a-vector": vector("R-041", "LF203", _factors("linear", (2,), (3, 2))),
    "factor-is-a-scalar": vector("R-041", "LF203 LF204", _factors("linear", (2, 4), ())),
    "conv-without-a-kernel": vector("R-041", "LF203", _factors("conv", (2, 4), (3, 2))),
    "conv-with-four-kernel-axes": vector("R-041", "LF203", _factors("conv", (2, 4, 1, 1, 1, 1), (3, 2, 1, 1, 1, 1))),
    "conv-with-a-kernel-in-b": vector("R-041", "LF203", _factors("conv", (2, 4, 3), (3, 2, 3))),
    "conv-with-other-axes-in-b": vector("R-041", "LF203", _factors("conv", (2, 4, 3, 3), (3, 2, 1))),
    "conv-with-groups": vector("R-041", "LF209", _factors("conv", (4, 4, 3), (6, 2, 1), 4)),
    "embedding-with-three-axes": vector("R-041", "LF203", _factors("embedding", (2, 4, 1), (3, 2, 1))),
    "no-inputs": vector("R-041", "LF203", _factors("linear", np.zeros((2, 0)), (3, 2))),
    "no-outputs": vector("R-041", "LF203", _factors("linear", (2, 4), np.zeros((0, 2)))),
    "factors-of-integers": vector("R-042", "LF210", _factors("linear", [[1, 2], [3, 4]], [[1, 2]], 2, "I8")),
    "factors-of-four-bits": vector("R-042", "LF210", _raw("F4", b"\x22" * 4)),
    "factors-of-exponents": vector("R-042", "LF210", _raw("F8_E8M0", b"\x7f" * 8)),
    "rank-0": vector("R-043", "LF204", _factors("linear", np.zeros((0, 4)), np.zeros((3, 0)), 0)),
    "rank-is-not-that-of-the-factors": vector("R-043", "LF205", _target({"rank": 3})),
    "replace-without-roles": vector("R-022 R-044", "LF201", _replace({})),
    "replace-with-an-unknown-role": vector("R-023 R-044", "LF202", _replace({**SAVED, "2nd": tensor("F32", [1])})),
    "replace-with-roles-of-lora": vector(
        "R-023 R-044", "LF202", _replace({**SAVED, "lora_A.weight": TENSORS[DOWN], "lora_B.weight": TENSORS[UP]})
    ),
    "replace-in-another-slot": vector("R-030 R-044", "LF408", _replace(SAVED, slot="linear")),
    "replace-by-integers": vector("R-042 R-044", "LF210", _replace({"weight": tensor("I32", [[1, 2]])})),
    "replace-by-exponents": vector("R-042 R-044", "LF210", _replace({"weight": Tensor("F8_E8M0", (2,), b"\x7f\x7f")})),
    "replace-by-nothing": vector("R-044", "LF203", _replace({"weight": tensor("F32", np.zeros((0, 4)))})),
    "replace-by-a-scalar": vector("R-044", "LF203", _replace({"bias": tensor("F32", 1)})),
    "replace-with-a-rank": vector("R-044", "LF205", _replace(SAVED, rank=2)),
    "replace-scaled-by-a-rank": vector("R-044", "LF122", _replace(SAVED, scaling=BY_RANK)),
    "scaling-missing": vector("R-012 R-050", "LF122", _scaling(...)),
    "scaling-is-a-number": vector("R-050", "LF122", _scaling(1)),
    "scaling-without-a-rule": vector("R-050", "LF122", _scaling({"alpha": 16})),
    "scaling-rule-unknown": vector("R-050", "LF122", _scaling({"rule": "alpha", "alpha": 16})),
    "scaling-without-a-number": vector("R-050", "LF122", _scaling({"rule": "alpha/rank"})),
    "scaling-with-another-rules-number": vector("R-050", "LF122 LF120", _scaling({"rule": "multiplier", "alpha": 16})),
    "scaling-with-two-numbers": vector(
        "R-050", "LF120", _scaling({"rule": "alpha/rank", "alpha": 16, "multiplier": 2})
    ),
    "scaling-with-text": vector("R-050", "LF122", _scaling({"rule": "alpha/rank", "alpha": "16"})),
    "scaling-with-true": vector("R-050", "LF122", _scaling({"rule": "alpha/rank", "alpha": True})),
    "scaling-with-null": vector("R-050", "LF122", _scaling({"rule": "alpha/rank", "alpha": None})),
    "fingerprint-is-null": vector("R-012 R-060", "LF122", _target({"fingerprint": None})),
    "fingerprint-without-a-shape": vector("R-060", "LF122", _print({"shape": ...})),
    "fingerprint-without-samples": vector("R-060", "LF122", _print({"samples": ...})),
    "fingerprint-of-15-samples": vector("R-060", "LF122", _print({"samples": PRINT["samples"][:15]})),
    "fingerprint-of-17-samples": vector("R-060", "LF122", _print({"samples": [*PRINT["samples"], 0]})),
    "fingerprint-with-text": vector("R-060", "LF122", _print({"samples": [*PRINT["samples"][:15], "0"]})),
    "fingerprint-with-null": vector("R-060", "LF122", _print({"samples": [*PRINT["samples"][:15], None]})),
    "fingerprint-of-a-shape-with-zero": vector("R-060", "LF122", _print({"shape": [3, 0]})),
    "fingerprint-of-a-shape-with-one-axis": vector("R-060", "LF122", _print({"shape": [12]})),
    "fingerprint-of-a-shape-with-nine-axes": vector("R-060", "LF122", _print({"shape": [3, 4, 1, 1, 1, 1, 1, 1, 1]})),
    "fingerprint-of-a-shape-with-a-fraction": vector("R-060", "LF122", _print_with_fraction()),
}

VECTORS: Mapping[str, Files] = {**FILES, **MANIFESTS, **MEANINGS}
