"""The manifest: every field wrong once, every adapter there and back, and any damage an error of ours."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import MemoryFactor
from loraformat.adapter import Adapter, BaseBinding, Scaling, ScalingRule, SlotKind, Target
from loraformat.errors import LoraformatError
from loraformat.fingerprint import Fingerprint
from loraformat.manifest import TargetEntry, build_manifest, parse_manifest
from loraformat.strict_json import write_canonical

WHOLE: Mapping[str, Any] = {
    "version": "1.0",
    "base": {"name": "some/base", "revision": "r1"},
    "annotations": {"x.note": "text"},
    "provenance": {"peft": {"r": 4}},
    "targets": {
        "m.q": {
            "kind": "lora",
            "slot": "linear",
            "rank": 4,
            "scaling": {"rule": "alpha/rank", "alpha": 16},
            "fingerprint": {"shape": [5, 6], "samples": [0.5] * 16},
        },
        "m.v": {"kind": "lora", "slot": "conv", "rank": 2, "scaling": {"rule": "multiplier", "multiplier": -0.5}},
    },
}


def changed(path: str, value: Any) -> str:
    """Return the manifest with the field at `path` set, or removed when the value is `...`."""
    manifest = copy.deepcopy(dict(WHOLE))
    *way, last = path.split("/")
    place: Any = manifest
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(manifest)


def codes_of(text: str) -> tuple[str, ...]:
    with pytest.raises(LoraformatError) as caught:
        parse_manifest(text, "file")
    return caught.value.codes


def test_the_whole_manifest() -> None:
    manifest = parse_manifest(json.dumps(WHOLE), "file")
    assert manifest.version == "1.0"
    assert manifest.base == BaseBinding("some/base", "r1")
    assert (manifest.annotations, manifest.provenance) == (WHOLE["annotations"], WHOLE["provenance"])
    assert manifest.targets == {
        "m.q": TargetEntry(
            "lora",
            SlotKind.LINEAR,
            4,
            Scaling(ScalingRule.ALPHA_OVER_RANK, 16.0),
            Fingerprint((5, 6), (0.5,) * 16),
            {},
        ),
        "m.v": TargetEntry("lora", SlotKind.CONV, 2, Scaling(ScalingRule.MULTIPLIER, -0.5), None, {}),
    }


def test_only_two_fields_are_required() -> None:
    manifest = parse_manifest('{"version": "1.0", "targets": {}}', "file")
    assert (manifest.targets, manifest.base) == ({}, BaseBinding())
    assert (manifest.annotations, manifest.provenance) == ({}, {})


TARGET = "targets/m.q"
MISSING = ["version", "targets", *(f"{TARGET}/{name}" for name in ("kind", "slot", "rank", "scaling"))]
MISSING += [f"{TARGET}/scaling/rule", f"{TARGET}/scaling/alpha"]
MISSING += [f"{TARGET}/fingerprint/{name}" for name in ("shape", "samples")]


@pytest.mark.parametrize("path", MISSING)
def test_a_required_field_is_missing(path: str) -> None:
    assert codes_of(changed(path, ...)) == ("LF122",)


@pytest.mark.parametrize("path", ["base", "annotations", "provenance", f"{TARGET}/fingerprint", "base/revision"])
def test_an_optional_field_may_be_missing(path: str) -> None:
    parse_manifest(changed(path, ...), "file")


TEXT_BUT = [None, 1, 1.5, True, [], {}]
OBJECT_BUT = [None, 1, True, "text", [], [["a", 1]]]
WRONG: dict[str, list[Any]] = {
    "version": [
        *TEXT_BUT,
        "",
        "1",
        "1.",
        ".0",
        "1.0.0",
        "1.x",
        "v1.0",
        " 1.0",
        "-1.0",
        "1,0",
        "01.0",
        "1.00",
        "00.0",
        "1.0\n",
        "١.٠",
        "².",
    ],
    "targets": OBJECT_BUT,
    "base": OBJECT_BUT,
    "base/name": TEXT_BUT,
    "base/revision": TEXT_BUT,
    "annotations": OBJECT_BUT,
    "annotations/x.note": TEXT_BUT,
    "provenance": OBJECT_BUT,
    TARGET: OBJECT_BUT,
    f"{TARGET}/kind": TEXT_BUT,
    f"{TARGET}/slot": [*TEXT_BUT, "Linear", "", "linear_transposed"],
    f"{TARGET}/rank": [None, "4", 4.0, 4.5, True, -1, [], {}],
    f"{TARGET}/scaling": OBJECT_BUT,
    f"{TARGET}/scaling/rule": [*TEXT_BUT, "", "alpha", "alpha / rank"],
    f"{TARGET}/scaling/alpha": [None, "16", True, [], {}],
    f"{TARGET}/fingerprint": OBJECT_BUT,
    f"{TARGET}/fingerprint/shape": [
        None,
        1,
        "56",
        {},
        [],
        [5],
        [5, 0],
        [5, -6],
        [5, 6.0],
        [5, True],
        ["5", 6],
        [1] * 9,
    ],
    f"{TARGET}/fingerprint/samples": [None, 1, "5", {}, [], [0.5] * 15, [0.5] * 17, [True] * 16, ["0.5"] * 16],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in WRONG.items() for value in values])
def test_a_field_of_the_wrong_type(path: str, value: Any) -> None:
    assert codes_of(changed(path, value)) == ("LF122",)


def test_a_wrong_rule_asks_for_its_own_number() -> None:
    scaling = f"{TARGET}/scaling"
    assert codes_of(changed(scaling, {"rule": "multiplier", "alpha": 16})) == ("LF122",)
    assert codes_of(changed(scaling, {"rule": "alpha/rank", "multiplier": 16})) == ("LF122",)
    assert codes_of(changed(scaling, {"rule": "alpha/rank", "alpha": 16, "multiplier": 2})) == ("LF120",)


def test_all_wrong_targets_are_named() -> None:
    manifest = copy.deepcopy(dict(WHOLE))
    manifest["targets"]["m.q"]["rank"] = -1
    manifest["targets"]["m.v"]["slot"] = "hole"
    with pytest.raises(LoraformatError) as caught:
        parse_manifest(json.dumps(manifest), "file")
    assert ["m.q" in caught.value.problems[0].where, "m.v" in caught.value.problems[1].where] == [True, True]


PLACES = ["", "base/", f"{TARGET}/", f"{TARGET}/scaling/", f"{TARGET}/fingerprint/"]


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_field(place: str) -> None:
    for value in (
        1,
        None,
        "x",
        [],
        {},
        {"must_understand": True},
        {"must_understand": 0},
        {"must_understand": "false"},
    ):
        assert codes_of(changed(f"{place}novelty", value)) == ("LF120",)
    harmless = parse_manifest(changed(f"{place}novelty", {"must_understand": False, "more": [1]}), "file")
    assert harmless == parse_manifest(json.dumps(WHOLE), "file")


def test_a_known_field_needs_no_permission() -> None:
    """`must_understand: false` excuses unknown fields, not wrong ones."""
    assert codes_of(changed("base", {"name": {"must_understand": False}})) == ("LF122",)


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "11.1", f"{'9' * 5000}.0"])
def test_another_major_version(version: str) -> None:
    assert codes_of(changed("version", version)) == ("LF119",)


def test_a_newer_major_version_is_said_before_its_new_fields() -> None:
    manifest = json.loads(changed("version", "2.0")) | {"novelty": 1}
    assert codes_of(json.dumps(manifest)) == ("LF119",)


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.99", f"1.{'9' * 5000}"])
def test_a_newer_minor_version(version: str) -> None:
    assert parse_manifest(changed("version", version), "file").version == version


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "LF104"),
        ("[]", "LF104"),
        ("null", "LF104"),
        ('{"version": "1.0"', "LF104"),
        ('{"version": "1.0", "version": "1.0", "targets": {}}', "LF105"),
        ('{"version": "1.0", "targets": {"m": 1, "m": 2}}', "LF105"),
        ('{"version": "1.0", "targets": {}, "provenance": {"x": NaN}}', "LF104"),
        ('{"version": "1.0", "targets": {}, "provenance": {"x": Infinity}}', "LF104"),
        ('{"version": "1.0", "targets": {}, "provenance": {"x": 1e999}}', "LF104"),
        ('{"version": "1.0", "targets": {}, "provenance": {"x": 1234567890123456789012}}', "LF104"),
        ('{"version": "1.0", "targets": {}, "provenance": {"x": "\\ud800"}}', "LF104"),
        ('{"version": "1.0", "targets": {}, "provenance": {"x": ' + "[" * 40 + "]" * 40 + "}}", "LF104"),
    ],
)
def test_json_that_is_not_strict(text: str, code: str) -> None:
    assert codes_of(text) == (code,)


def test_text_that_is_no_unicode() -> None:
    assert codes_of('{"version": "\udcff"}') in (("LF103",), ("LF104",))


def test_a_target_without_a_name() -> None:
    assert codes_of(changed("targets/", WHOLE["targets"]["m.v"])) == ("LF301",)


@pytest.mark.parametrize("number", [1e20, -9.999999e20, 1e21, 2.0**69, 5e-324, 1.7976931348623157e308, 0.1])
def test_a_number_of_any_size_comes_back(number: float) -> None:
    """Canonical JSON spells floats below 1e21 out: an integer of 21 digits, to the reader."""
    scaling = Scaling(ScalingRule.MULTIPLIER, number)
    adapter = Adapter((Target("m", "lora", SlotKind.LINEAR, {}, 1, scaling),))
    assert parse_manifest(build_manifest(adapter).decode(), "file").targets["m"].scaling == scaling


def test_what_no_reader_would_accept_is_not_written() -> None:
    for adapter in (
        Adapter((Target("", "lora", SlotKind.LINEAR, {}, 1, Scaling(ScalingRule.MULTIPLIER, 1.0)),)),
        Adapter((Target("m", "lora", SlotKind.LINEAR, {}, -1, Scaling(ScalingRule.MULTIPLIER, 1.0)),)),
        Adapter((), provenance={"deep": json.loads("[" * 40 + "]" * 40)}),
    ):
        with pytest.raises(LoraformatError):
            build_manifest(adapter)


def test_a_nan_for_alpha() -> None:
    text = changed(f"{TARGET}/scaling/alpha", 16).replace('"alpha": 16', '"alpha": NaN')
    assert codes_of(text) == ("LF104",)


# --- there and back --------------------------------------------------------------------------------------------------

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
INTEGERS = st.integers(-(2**53) + 1, 2**53 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | FINITE | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
SHAPES = st.lists(st.integers(1, 2**40), min_size=2, max_size=5).map(tuple)
SAMPLES = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16).map(tuple)


@st.composite
def targets(draw: st.DrawFn) -> Target:
    factor = MemoryFactor("f", np.zeros((2, 3), np.float32))
    return Target(
        name=draw(NAMES),
        kind=draw(TEXTS),
        slot=draw(st.sampled_from(SlotKind)),
        factors={"lora_A.weight": factor},
        rank=draw(st.integers(0, 2**31)),
        scaling=Scaling(draw(st.sampled_from(ScalingRule)), draw(FINITE)),
        fingerprint=draw(st.none() | st.builds(Fingerprint, SHAPES, SAMPLES)),
    )


ADAPTERS = st.builds(
    Adapter,
    targets=st.lists(targets(), max_size=3, unique_by=lambda target: target.name).map(tuple),
    base=st.builds(BaseBinding, st.none() | NAMES, st.none() | NAMES),
    metadata=st.dictionaries(TEXTS, TEXTS, max_size=3),
    provenance=st.dictionaries(TEXTS, JSON, max_size=3),
)


@given(adapter=ADAPTERS)
def test_what_is_written_is_read(adapter: Adapter) -> None:
    manifest = parse_manifest(build_manifest(adapter).decode(), "file")
    assert manifest.targets == {
        target.name: TargetEntry(
            target.kind, target.slot, target.rank, target.scaling, target.fingerprint, target.options
        )
        for target in adapter.targets
    }
    assert (manifest.base, manifest.annotations) == (adapter.base, adapter.metadata)
    # A float of 17 digits and no fraction comes back as the integer that its shortest digits spell.
    assert write_canonical(manifest.provenance) == write_canonical(adapter.provenance)


@given(adapter=ADAPTERS, dice=st.randoms(use_true_random=False))
def test_order_makes_no_difference_to_the_bytes(adapter: Adapter, dice: Any) -> None:
    def shuffle(mapping: Mapping[str, Any]) -> dict[str, Any]:
        items = list(mapping.items())
        dice.shuffle(items)
        return dict(items)

    turned = Adapter(
        tuple(reversed(adapter.targets)),
        adapter.base,
        metadata=shuffle(adapter.metadata),
        provenance=shuffle(adapter.provenance),
    )
    assert build_manifest(turned) == build_manifest(adapter)


def test_what_is_empty_is_left_out() -> None:
    assert build_manifest(Adapter(())) == b'{"targets":{},"version":"1.0"}'
    assert build_manifest(Adapter((), BaseBinding("n", ""))) == b'{"base":{"name":"n"},"targets":{},"version":"1.0"}'


# --- damage ----------------------------------------------------------------------------------------------------------

FIELDS = st.sampled_from(
    ["version", "targets", "base", "name", "kind", "slot", "rank", "scaling", "rule", "alpha", "multiplier"]
) | st.sampled_from(["fingerprint", "shape", "samples", "must_understand", "m.q"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["1.0", "linear"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """Put anything anywhere in a sound manifest."""
    manifest = copy.deepcopy(dict(WHOLE))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = manifest
        for _ in range(draw(st.integers(0, 3))):
            inner = [value for value in place.values() if isinstance(value, dict)]
            if not inner:
                break
            place = draw(st.sampled_from(inner))
        if place:
            place[draw(st.sampled_from(sorted(place)) | FIELDS)] = draw(ANYTHING)
    return manifest


@settings(max_examples=150)
@given(manifest=damaged())
def test_a_damaged_manifest_is_read_or_refused(manifest: Any) -> None:
    read_or_refuse(json.dumps(manifest))


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_text_is_read_or_refused(data: st.DataObject) -> None:
    text = json.dumps(WHOLE)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 6)))
    read_or_refuse(text[:start] + data.draw(st.text(max_size=4)) + text[stop:])


def read_or_refuse(text: str) -> None:
    try:
        manifest = parse_manifest(text, "file")
    except LoraformatError as error:
        codes, told = error.codes, str(error)
    else:
        codes, told = (), manifest.version
    assert told
    assert set(codes) <= {"LF103", "LF104", "LF105", "LF119", "LF120", "LF122", "LF301"}
