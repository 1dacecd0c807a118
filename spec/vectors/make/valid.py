"""Files that a reader must accept, what it must understand of them, and their canonical form."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from make.kit import (
    Dice,
    Files,
    Tensor,
    Tensors,
    canonical,
    entries_of,
    factors,
    fingerprint,
    frame,
    lora,
    manifest_of,
    pack,
    replacement,
    sha256,
    shape_factors,
    store,
    tensor,
)

SHAPES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "blocks.0.q_proj": ("linear", (4, 6)),
    "blocks.0.c_attn": ("linear-transposed", (6, 4)),
    "conv1": ("conv", (3, 2, 3)),
    "conv2": ("conv", (3, 2, 3, 2)),
    "conv3": ("conv", (3, 2, 2, 1, 2)),
    "tokens": ("embedding", (4, 7)),
}
"""Target name to its slot and the canonical shape of its weight."""


def seen(slot: str, rank: int, scale: float, shape: Sequence[int]) -> dict[str, Any]:
    """Return what a reader must see of a target of the kind `lora`."""
    return {"kind": "lora", "slot": slot, "rank": rank, "scale": scale, "shape": list(shape)}


def vector(
    requirements: str, file: bytes, targets: Mapping[str, Any], canonical_file: bytes | None = None, problems: str = ""
) -> dict[str, Any]:
    """Return a vector whose canonical form is `canonical_file`, or the file itself."""
    expected = {
        "requirements": requirements.split(),
        "verdict": "valid",
        "targets": dict(targets),
        "problems": problems.split(),
        "canonical_sha256": sha256(canonical_file or file),
    }
    return {"adapter.safetensors": file, "expected.json": expected}


def _simple(manifest: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Return the manifest, tensors and expected targets of one linear target."""
    tensors = shape_factors(Dice(1), "proj", "linear", (3, 4), 2)
    return (
        manifest_of({"proj": lora("linear", 2, "alpha/rank", 3)}, **(manifest or {})),
        tensors,
        {"proj": seen("linear", 2, 1.5, (3, 4))},
    )


def _minimal() -> Files:
    tensors = factors("proj", "linear", [[1.0]], [[-2.0]])
    return vector(
        "R-001 R-002 R-004 R-005 R-006 R-010 R-020 R-021 R-022 R-043 R-070 R-071 R-072",
        pack(manifest_of({"proj": lora("linear", 1)}), tensors),
        {"proj": seen("linear", 1, 1, (1, 1))},
    )


def _slots() -> Files:
    dice = Dice(2)
    tensors: dict[str, Tensor] = {}
    for name, (slot, shape) in SHAPES.items():
        tensors |= shape_factors(dice, name, slot, shape, 2)
    manifest = manifest_of({name: lora(slot, 2) for name, (slot, _) in SHAPES.items()})
    targets = {name: seen(slot, 2, 1, shape) for name, (slot, shape) in SHAPES.items()}
    return vector("R-023 R-030 R-041", pack(manifest, tensors), targets)


RULES: Sequence[tuple[str, int, str, float, float]] = (
    ("over_rank", 4, "alpha/rank", 16, 4),
    ("over_root", 4, "alpha/sqrt(rank)", 16, 8),
    ("over_odd_root", 3, "alpha/sqrt(rank)", 16, 16 / math.sqrt(3)),
    ("multiplier", 2, "multiplier", 0.7, 0.7),
    ("negative", 2, "alpha/rank", -3, -1.5),
    ("not_whole", 3, "alpha/rank", 0.1, 0.1 / 3),
    ("small", 1, "multiplier", 1e-7, 1e-7),
    ("large", 1, "multiplier", 1e21, 1e21),
    ("longest", 1, "multiplier", -123456789012345678901, -123456789012345683968.0),
    ("written_out", 1, "multiplier", 12345678901234567890, 12345678901234567168.0),
)
"""Target, rank, rule, its number, and s."""


def _scales() -> Files:
    dice = Dice(3)
    tensors: dict[str, Tensor] = {}
    for name, rank, _, _, _ in RULES:
        tensors |= shape_factors(dice, name, "linear", (4, 4), rank)
    as_written = manifest_of({name: lora("linear", rank, rule, number) for name, rank, rule, number, _ in RULES})
    exact = manifest_of({name: lora("linear", rank, rule, float(number)) for name, rank, rule, number, _ in RULES})
    targets = {name: seen("linear", rank, scale, (4, 4)) for name, rank, _, _, scale in RULES}
    text = json.dumps(as_written).replace('"alpha": 16}', '"alpha": 1.6E+1}')
    file = store(tensors, {"loraformat": text})
    return vector("R-050 R-051 R-071 R-073", file, targets, pack(exact, tensors))


def _documented() -> Files:
    manifest, tensors, targets = _simple(
        {
            "base": {"name": "meta-llama/Llama-3.2-1B", "revision": "4e20de3"},
            "annotations": {"x.note": 'a "quoted" \\ line\nand a tab\t', "org.example.licence": "CC0-1.0", "": "€"},
            "provenance": {
                "peft": {"r": 2, "lora_alpha": 3, "target_modules": ["proj"], "bias": None, "use_rslora": False},
                "numbers": [0.1, 1e-7, 1e21, 333333333.3333332, 9007199254740991, -5e-324, 0.000125, 100],
                "\U0001f600": "sorted by UTF-16: before U+FB33",
                "\ufb33": "after",
                "must_understand": {"\u20ac": "\x7f\x01\x1f\uffff\ufeff"},
            },
        }
    )
    return vector("R-012 R-071", pack(manifest, tensors), targets)


def _empty_fields() -> Files:
    manifest, tensors, targets = _simple()
    empty = {"base": {"name": "", "revision": ""}, "annotations": {}, "provenance": {}}
    return vector("R-072 R-073", pack(manifest | empty, tensors), targets, pack(manifest, tensors))


def _optional_unknown() -> Files:
    manifest, tensors, targets = _simple()
    ignored = {"must_understand": False, "what": ["ever", 1, None]}
    target = manifest["targets"]["proj"]
    print_of = fingerprint("proj", np.arange(12.0).reshape(3, 4) / 4)
    stamped = target | {"fingerprint": print_of}
    marked = target | {
        "future": ignored,
        "scaling": target["scaling"] | {"warmup": ignored},
        "fingerprint": print_of | {"more": ignored},
    }
    file = pack(
        manifest | {"base": {"name": "b", "tokenizer": ignored}, "targets": {"proj": marked}, "router": ignored},
        tensors,
    )
    clean = pack(manifest | {"base": {"name": "b"}, "targets": {"proj": stamped}}, tensors)
    return vector("R-012 R-072 R-073", file, targets, clean)


def _newer_minor() -> Files:
    manifest, tensors, targets = _simple()
    file = pack(manifest | {"version": "1.27"}, tensors)
    return vector("R-011 R-072", file, targets, pack(manifest, tensors))


def _other_order() -> Files:
    """Tensors in another order than the canonical one, keys unsorted, white space, escapes, a header of odd length."""
    manifest, tensors, targets = _simple()
    ordered = sorted(tensors.items(), reverse=True)
    entries = {name: dict(reversed(entry.items())) for name, entry in entries_of(ordered).items()}
    text = json.dumps(manifest, indent="\t", separators=("\r\n, ", " : "))
    header = json.dumps(entries | {"__metadata__": {"loraformat": text, "a": "é"}}, indent=1)
    header = header.replace("proj.lora_A", "\\u0070roj\\u002elora_A").replace("2\n", "2 \n\t") + "\n"
    data = b"".join(item.data for _, item in ordered)
    return vector("R-003 R-073", frame(header + " " * (len(header) % 2 == 0), data), targets, pack(manifest, tensors))


def _padding(spaces: int) -> Files:
    manifest, tensors, targets = _simple()
    ordered = sorted(tensors.items())
    header = canonical(entries_of(ordered) | {"__metadata__": {"loraformat": canonical(manifest)}})
    file = frame(header + " " * spaces, b"".join(item.data for _, item in ordered))
    return vector("R-073", file, targets, pack(manifest, tensors))


def _length_of_onnx() -> Files:
    """The header's length, 0x071a, is read by a parser of protobuf as the beginning of an ONNX model."""
    manifest, tensors, targets = _simple()
    header = canonical(entries_of(sorted(tensors.items())) | {"__metadata__": {"loraformat": canonical(manifest)}})
    file = frame(header.ljust(0x071A), b"".join(item.data for _, item in sorted(tensors.items())))
    return vector("R-001 R-073", file, targets, pack(manifest, tensors))


def _other_metadata() -> Files:
    manifest, tensors, targets = _simple()
    file = store(tensors, {"format": "pt", "loraformat": canonical(manifest), "lora_alpha": "999", "": "\n"})
    return vector("R-010 R-072 R-073", file, targets, pack(manifest, tensors))


def _dtypes() -> Files:
    dice = Dice(4)
    forms = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
    tensors: dict[str, Tensor] = {}
    for form in forms:
        down = dice.numbers((2, 4), step=0.25, most=4)
        tensors |= factors(f"in_{form}", "linear", down, dice.numbers((3, 2), step=0.25, most=4), form)
    tensors["mixed.lora_A.weight"] = tensor("BF16", [[1, 2]])
    tensors["mixed.lora_B.weight"] = tensor("F64", [[0.1]])
    names = [*(f"in_{form}" for form in forms), "mixed"]
    ranks = {name: 1 if name == "mixed" else 2 for name in names}
    manifest = manifest_of({name: lora("linear", ranks[name]) for name in names})
    targets = {name: seen("linear", ranks[name], 1, (1, 2) if name == "mixed" else (3, 4)) for name in names}
    return vector("R-004 R-005 R-042 R-070", pack(manifest, tensors), targets)


def _fingerprints() -> Files:
    dice = Dice(5)
    tensors: dict[str, Tensor] = {}
    targets = {}
    for name, (slot, shape) in SHAPES.items():
        tensors |= shape_factors(dice, name, slot, shape, 1)
        weight = dice.numbers(shape, step=1 / 3, most=99)
        targets[name] = lora(slot, 1, fingerprint=fingerprint(name, weight))
    expected = {name: seen(slot, 1, 1, shape) for name, (slot, shape) in SHAPES.items()}
    return vector("R-060 R-061", pack(manifest_of(targets), tensors), expected)


def _names() -> Files:
    """Names beyond ASCII: tensors are sorted as UTF-8, keys as UTF-16, and the two orders differ."""
    dice = Dice(6)
    names = [
        "模型.слой.0",
        "é",
        "e\u0301",
        "\ufb33",
        "\U0001f600",
        'q"u\\o/te',
        "with space",
        "trailing.",
        "$",
        "weight",
    ]
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= shape_factors(dice, name, "linear", (2, 3), 1, "F16")
    manifest = manifest_of({name: lora("linear", 1, "alpha/rank", 1) for name in names})
    targets = {name: seen("linear", 1, 1, (2, 3)) for name in names}
    return vector("R-008 R-022 R-070 R-071", pack(manifest, tensors), targets)


def _nested() -> Files:
    """One target's name is the beginning of another's: the longest that fits has the tensor."""
    dice = Dice(7)
    shapes = {"block": (2, 3), "block.proj": (4, 5), "blo": (5, 2), "block.proj.lora_A.weight.deep": (3, 2)}
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensors |= shape_factors(dice, name, "linear", shape, 1)
    manifest = manifest_of({name: lora("linear", 1) for name in shapes})
    targets = {name: seen("linear", 1, 1, shape) for name, shape in shapes.items()}
    return vector("R-022", pack(manifest, tensors), targets)


def _deep() -> Files:
    """Provenance whose lists end at the 32nd level, with a number inside; two levels are above it."""
    value: Any = 1
    for _ in range(30):
        value = [value]
    manifest, tensors, targets = _simple({"provenance": {"deep": value}})
    return vector("R-003", pack(manifest, tensors), targets)


def _long_integer() -> Files:
    manifest, tensors, targets = _simple(
        {"provenance": {"longest": -100000000000000000000, "printed": 123456789012345680000}}
    )
    return vector("R-003", pack(manifest, tensors), targets)


def _unwritable() -> Files:
    """A number in the provenance that a reader may keep, and that no writer can give back."""
    manifest, tensors, targets = _simple({"provenance": {"seed": 2**53 + 1}})
    files = vector("R-072", pack(manifest, tensors), targets)
    del files["expected.json"]["canonical_sha256"]
    files["expected.json"]["canonical_codes"] = ["LF104"]
    return files


def _rank_above() -> Files:
    tensors = shape_factors(Dice(8), "proj", "linear", (2, 3), 4)
    manifest = manifest_of({"proj": lora("linear", 4, "alpha/rank", 4)})
    return vector("R-043", pack(manifest, tensors), {"proj": seen("linear", 4, 1, (2, 3))}, problems="LF206")


def _zeros() -> Files:
    tensors = factors("proj", "linear", Dice(9).numbers((2, 3)), np.zeros((4, 2)))
    manifest = manifest_of({"proj": lora("linear", 2, "alpha/rank", 4)})
    return vector("R-042", pack(manifest, tensors), {"proj": seen("linear", 2, 2, (4, 3))}, problems="LF214")


def _replace() -> Files:
    """Saved modules beside an adapted one: weight and bias, a bias of zeros alone, eight axes; no roles are shared."""
    dice = Dice(10)
    saved = {
        "classifier": {"weight": tensor("F32", dice.numbers((2, 4))), "bias": tensor("F16", dice.numbers((2,)))},
        "proj.norm": {"bias": tensor("BF16", np.zeros(3))},
        "table": {"weight": tensor("F64", dice.numbers((1, 2, 1, 1, 1, 1, 1, 3)))},
    }
    tensors = shape_factors(dice, "proj", "linear", (3, 4), 2)
    tensors |= {f"{name}.{role}": item for name, roles in saved.items() for role, item in roles.items()}
    numbers = {"classifier": 1, "proj.norm": -0.5, "table": 2}
    targets = {name: replacement(number) for name, number in numbers.items()}
    expected = {
        name: {
            "kind": "replace",
            "slot": "parameter",
            "rank": 0,
            "scale": numbers[name],
            "shapes": {role: list(item.shape) for role, item in roles.items()},
        }
        for name, roles in saved.items()
    }
    file = pack(manifest_of(targets | {"proj": lora("linear", 2)}), tensors)
    return vector("R-022 R-023 R-042 R-044 R-050", file, expected | {"proj": seen("linear", 2, 1, (3, 4))})


def _replace_another() -> Files:
    """A parameter that is called neither weight nor bias."""
    saved = tensor("F32", Dice(15).numbers((1, 1, 5)))
    file = pack(manifest_of({"embeddings": replacement(1)}), {"embeddings.cls_token": saved})
    entry = {"kind": "replace", "slot": "parameter", "rank": 0, "scale": 1, "shapes": {"cls_token": [1, 1, 5]}}
    return vector("R-023 R-044", file, {"embeddings": entry})


def _beside_lora() -> Files:
    """Further roles of `lora`; empty options are left out of the canonical file."""
    dice = Dice(14)
    shapes = {"lora_B.bias": (3,), "base_layer.weight": (3, 4), "base_layer.bias": (3,)}
    tensors = shape_factors(dice, "proj", "linear", (3, 4), 2) | shape_factors(dice, "table", "embedding", (4, 7), 2)
    tensors |= {f"proj.{role}": tensor("F16", dice.numbers(shape)) for role, shape in shapes.items()}
    tensors["table.base_layer.weight"] = tensor("BF16", dice.numbers((7, 4)))
    plain = {"proj": lora("linear", 2), "table": lora("embedding", 2)}
    given = {name: target | {"options": {}} for name, target in plain.items()}
    expected = {"proj": seen("linear", 2, 1, (3, 4)), "table": seen("embedding", 2, 1, (4, 7))}
    return vector("R-024 R-045", pack(manifest_of(given), tensors), expected, pack(manifest_of(plain), tensors))


def _shared(owner: str) -> Files:
    """One A for two targets, and a third with an empty `shared`; the first of both has it in the canonical file."""
    dice = Dice(15)
    tensors = {
        name: value
        for target in ("m.q", "m.v", "n")
        for name, value in shape_factors(dice, target, "linear", (3, 4), 2).items()
    }
    first, other = "m.q.lora_A.weight", "m.v.lora_A.weight"
    del tensors[other]
    plain = {name: lora("linear", 2) for name in ("m.q", "m.v", "n")}
    canonical_targets = plain | {"m.v": plain["m.v"] | {"shared": {"lora_A.weight": "m.q"}}}
    written = pack(manifest_of(canonical_targets, version="1.1"), tensors)
    expected = {name: seen("linear", 2, 1, (3, 4)) for name in plain}
    if owner == "m.q":
        return vector("R-025 R-072", written, expected)
    moved = {(other if name == first else name): value for name, value in tensors.items()}
    given = plain | {"m.q": plain["m.q"] | {"shared": {"lora_A.weight": "m.v"}}, "n": plain["n"] | {"shared": {}}}
    return vector("R-025 R-072", pack(manifest_of(given, version="1.1"), moved), expected, written)


VECTORS: Mapping[str, Files] = {
    "shared": _shared("m.q"),
    "shared-with-a-later-target": _shared("m.v"),
    "beside-lora": _beside_lora(),
    "minimal": _minimal(),
    "slots": _slots(),
    "scaling-rules": _scales(),
    "base-annotations-provenance": _documented(),
    "empty-fields": _empty_fields(),
    "unknown-fields-that-need-not-be-understood": _optional_unknown(),
    "newer-minor-version": _newer_minor(),
    "another-order": _other_order(),
    "no-padding": _padding(0),
    "much-padding": _padding(101),
    "length-like-onnx": _length_of_onnx(),
    "other-metadata": _other_metadata(),
    "dtypes": _dtypes(),
    "fingerprints": _fingerprints(),
    "names": _names(),
    "nested-target-names": _nested(),
    "nesting-of-32": _deep(),
    "integer-of-21-digits": _long_integer(),
    "no-canonical-form": _unwritable(),
    "rank-above-both-dimensions": _rank_above(),
    "factor-of-zeros": _zeros(),
    "replace-beside-lora": _replace(),
    "replace-of-another-parameter": _replace_another(),
}


def simple_parts() -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
    """Return manifest, tensors and expected targets of the simplest sound file, for others to break."""
    return _simple()
