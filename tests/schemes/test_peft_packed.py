"""PEFT's packed parameters, blocks, attention and buffers: from keys and shapes to targets; numbers against einsum."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from builders import MemoryFactor, find_errors
from laws.scheme_laws import SchemeLaws
from loraformat.adapter import Adapter, SlotKind
from loraformat.base_facts import NO_FACTS
from loraformat.derived import KeptFactor, LastRead, derive
from loraformat.kinds import KINDS
from loraformat.operations import Take
from loraformat.schemes import NOT_STATED, Bundle, WrittenBundle
from loraformat.schemes.peft import SCHEME
from schemes import decoders as d
from schemes.test_peft import CONFIG, LINEAR, make_bundle

E, R, OUT, IN = 3, 2, 7, 5
X = "model.layers.0.mlp.experts"
PACKED = {"lora_A.weight": (E * R, IN), "lora_B.weight": (OUT, R * E)}
OTHER = {"lora_A.weight": (E * R, OUT), "lora_B.weight": (IN, R * E)}
NAMED = {**CONFIG, "peft_version": "0.21.2"}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def read(shapes: Mapping[str, Any], **fields: Any) -> Adapter:
    return SCHEME.read(make_bundle(shapes, {**NAMED, **fields}), NOT_STATED)


def codes(shapes: Mapping[str, Any], **fields: Any) -> list[str]:
    bundle = make_bundle(shapes, {**NAMED, **fields})
    return [problem.code for problem in find_errors(lambda: SCHEME.read(bundle, NOT_STATED))]


BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "match_strict": True}


class TestPacked(SchemeLaws):
    """One stored tensor is several factors, and comes back as it was."""

    scheme = SCHEME
    facts = d.QWEN_MOE

    def examples(self) -> Mapping[str, Bundle]:
        both = {**NAMED, "target_parameters": BOTH}
        lone = {"model.layers.0.mlp.gate": LINEAR, "model.layers.0.sinks": LINEAR}
        blocks = {
            "m.o_proj": {"lora_A.weight": (4, 3), "lora_B.weight": (8, 4)},
            "m.q_proj": {"lora_A.weight": (4, 6), "lora_B.weight": (8, 2)},
        }
        return {
            "experts": make_bundle({X: OTHER, f"{X}.base_layer": {**PACKED, "lora_B.weight": (14, R * E)}}, both),
            "float16": make_bundle({X: PACKED}, {**NAMED, "target_parameters": BOTH[1:]}, dtype=np.float16),
            "without experts": make_bundle(lone, {**NAMED, "target_parameters": ["mlp.gate.weight", "sinks.table"]}),
            "blocks": make_bundle(blocks, {**NAMED, "r": 4, "use_bdlora": BLOCKS}),
        }


def write_own(shapes: Mapping[str, Any], fields: Mapping[str, Any], **changes: Any) -> WrittenBundle:
    """Return what is written of an adapter after its configuration was changed."""
    adapter = SCHEME.read(make_bundle(shapes, {**NAMED, **fields}), NOT_STATED)
    raw = {**adapter.provenance["peft"], **changes}
    return SCHEME.write(replace(adapter, provenance={"peft": raw}), NO_FACTS)


def test_experts_without_a_gate_nest_in_the_order_of_their_model() -> None:
    """Nemotron-H defines up before down, whatever the configuration's order."""
    names = ["experts.down_proj", "experts.up_proj"]
    adapter = read({X: OTHER, f"{X}.base_layer": PACKED}, target_parameters=names)
    found = {target.name: target.factors["lora_B.weight"].shape for target in adapter.targets}
    assert (found[f"{X}.0.up_proj"], found[f"{X}.0.down_proj"]) == ((OUT, R), (IN, R))


def test_blocks_that_are_none_any_more_are_written_in_full() -> None:
    shapes = {"m.q_proj": {"lora_A.weight": (4, 6), "lora_B.weight": (8, 4)}}
    written = write_own(shapes, {"r": 4}, use_bdlora=BLOCKS)
    assert not written.problems
    assert written.config is not None
    assert "use_bdlora" not in written.config
    assert written.tensors["base_model.model.m.q_proj.lora_B.weight"].shape == (8, 4)


def test_names_of_parameters_are_packed_without_a_word_of_the_source() -> None:
    """No expert has a module `gate_up_proj`; `down_proj` beside it is a parameter too, alone it is a module."""
    shapes = {X: OTHER, f"{X}.base_layer": PACKED}
    adapter = SCHEME.read(make_bundle(shapes, {**NAMED, "target_parameters": BOTH}), NOT_STATED)
    written = SCHEME.write(replace(adapter, provenance={}), NO_FACTS)
    assert not written.problems
    assert written.config is not None
    assert written.config["target_parameters"] == [f"{X}.{name}" for name in ("gate_up_proj", "down_proj")]
    again = SCHEME.read(Bundle(Path("again"), written.tensors, config=written.config), NOT_STATED)
    assert [target.name for target in again.targets] == [target.name for target in adapter.targets]
    alone = replace(adapter, targets=tuple(each for each in adapter.targets if "down" in each.name), provenance={})
    assert len(SCHEME.write(alone, NO_FACTS).tensors) == 2 * E


def test_experts_that_are_not_all_there_are_not_packed() -> None:
    adapter = SCHEME.read(make_bundle({X: PACKED}, {**NAMED, "target_parameters": BOTH[1:]}), NOT_STATED)
    some = replace(adapter, targets=adapter.targets[::2])
    assert [problem.code for problem in SCHEME.write(some, NO_FACTS).problems] == ["LF134"]


def test_each_expert_is_a_target_of_its_own() -> None:
    """As PEFT's own einsum has it: A3 = A.reshape(E, r, in), B3 = B.reshape(out, r, E)."""
    bundle = make_bundle({X: PACKED}, {**NAMED, "target_parameters": BOTH[1:]})
    adapter = SCHEME.read(bundle, NOT_STATED)
    stored = {name.rpartition("lora_")[2][0]: factor.read() for name, factor in bundle.tensors.items()}
    expected = np.einsum("ore,eri->eoi", stored["B"].reshape(OUT, R, E), stored["A"].reshape(E, R, IN))
    assert [target.name for target in adapter.targets] == [f"{X}.{expert}.down_proj" for expert in range(E)]
    for expert, target in enumerate(adapter.targets):
        assert (target.kind, target.slot, target.rank, target.scale) == ("lora", SlotKind.LINEAR, R, 4.0)
        down, up = (target.factors[role] for role in ("lora_A.weight", "lora_B.weight"))
        assert (down.shape, up.shape) == ((R, IN), (OUT, R)) == (down.read().shape, up.read().shape)
        np.testing.assert_allclose(up.read() @ down.read(), expected[expert], rtol=1e-5, atol=1e-6)
    assert not codes({X: PACKED}, target_parameters=BOTH[1:])


def test_the_inner_pair_is_of_the_parameter_that_the_model_defines_first() -> None:
    adapter = read({X: OTHER, f"{X}.base_layer": PACKED}, target_parameters=BOTH[::-1])
    found = {target.name: target.factors["lora_B.weight"].shape[0] for target in adapter.targets}
    assert found[f"{X}.0.gate_up_proj"] == OUT
    assert found[f"{X}.2.down_proj"] == IN
    assert len(found) == 2 * E


def test_parameters_whose_order_is_not_known_are_told_apart_by_their_shapes_or_not_at_all() -> None:
    names = ["experts.first", "experts.second"]
    assert len(read({X: OTHER, f"{X}.base_layer": PACKED}, target_parameters=names).targets) == 2 * E
    assert "LF225" in codes({X: PACKED, f"{X}.base_layer": PACKED}, target_parameters=names)


@pytest.mark.parametrize(
    ("shapes", "fields"),
    [
        ({X: PACKED}, {"target_parameters": BOTH}),
        ({X: PACKED, f"{X}.base_layer": PACKED}, {"target_parameters": BOTH[:1]}),
        ({X: PACKED, f"{X}.base_layer.base_layer": PACKED}, {"target_parameters": BOTH}),
        ({X: PACKED}, {"target_parameters": BOTH[1:], "r": 4}),
        ({X: PACKED}, {"target_parameters": BOTH[1:], "r": None}),
        ({X: {"lora_A.weight": (9000, 2), "lora_B.weight": (3, 9000)}}, {"target_parameters": BOTH[1:], "r": 1}),
    ],
    ids=["a pair too few", "a pair too many", "a level without a pair", "no multiple", "no rank", "too many experts"],
)
def test_what_nothing_tells_apart(shapes: Mapping[str, Any], fields: dict[str, Any]) -> None:
    assert set(codes(shapes, **fields)) == {"LF225"}


def test_halves_of_a_pair() -> None:
    half = {"lora_A.weight": (E * R, IN)}
    assert codes({X: half}, target_parameters=BOTH[1:]) == ["LF203"]
    assert codes({X: {**half, "lora_B.weight": (OUT, 4)}}, target_parameters=BOTH[1:]) == ["LF203"]


@pytest.mark.parametrize(
    ("version", "right"), [("0.19.1", True), ("0.21.0.dev0", True), ("0.19.0", False), (None, False)]
)
def test_square_matrices_of_a_peft_that_took_sides_by_their_places(version: str | None, right: bool) -> None:
    square = {"lora_A.weight": (E * R, IN), "lora_B.weight": (IN, R * E)}
    assert codes({X: square}, target_parameters=BOTH[1:], peft_version=version) == ([] if right else ["LF225"])
    assert codes({X: PACKED}, target_parameters=BOTH[1:], peft_version=version) == []


def test_the_rank_of_one_expert_may_stand_in_a_pattern() -> None:
    adapter = read({X: PACKED}, target_parameters=BOTH[1:], r=9, rank_pattern={"experts.down_proj": R})
    assert {target.rank for target in adapter.targets} == {R}


def test_a_parameter_that_is_not_packed() -> None:
    shapes = {"model.layers.0.mlp.gate": LINEAR, "model.layers.0.sinks": LINEAR}
    adapter = read(shapes, target_parameters=["mlp.gate.weight", "sinks.table"])
    assert [target.name for target in adapter.targets] == ["model.layers.0.mlp.gate", "model.layers.0.sinks.table"]


def test_bare_names_beside_a_router_that_is_called_by_its_owner() -> None:
    """PEFT 0.21 writes so what `all-linear` is for a mixture of experts."""
    router = {"lora_A.weight": (R, IN), "lora_B.weight": (E, R)}
    shapes = {X: OTHER, f"{X}.base_layer": PACKED, "model.layers.0.mlp.gate": router, "m.q_proj": LINEAR}
    names = ["gate_up_proj", "down_proj", "gate.weight"]
    adapter = read(shapes, target_parameters=names, target_modules=["q_proj"])
    packed = [f"{X}.{expert}.{name}" for expert in range(E) for name in ("gate_up_proj", "down_proj")]
    assert {target.name for target in adapter.targets} == {*packed, "model.layers.0.mlp.gate", "m.q_proj"}


def test_a_bare_name_means_no_module_that_a_pattern_targets() -> None:
    shapes = {X: PACKED, "model.layers.0.self_attn.q_proj": LINEAR}
    adapter = read(shapes, target_parameters=["down_proj"], target_modules=r".*\.(q|v)_proj")
    assert "model.layers.0.self_attn.q_proj" in {target.name for target in adapter.targets}
    assert codes(shapes, target_parameters=["down_proj"], target_modules="*") == ["LF213"]


def test_a_bare_name_means_no_module_that_is_targeted_by_its_own() -> None:
    shapes = {X: PACKED, "model.layers.0.q_proj": LINEAR}
    adapter = read(shapes, target_parameters=["down_proj"], target_modules=["q_proj"])
    assert {target.name for target in adapter.targets} >= {"model.layers.0.q_proj", f"{X}.0.down_proj"}


# --- blocks ----------------------------------------------------------------------------------------------------------


def block_diagonal(compact: NDArray[Any], count: int) -> NDArray[Any]:
    rows, columns = compact.shape[0] // count, compact.shape[1]
    found = np.zeros((rows * count, columns * count), compact.dtype)
    for row in range(rows * count):
        start = row // rows * columns
        found[row, start : start + columns] = compact[row]
    return found


def test_the_compact_factor_is_put_in_blocks() -> None:
    blocks = {"nblocks": 2, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"]}
    shapes = {
        "m.o_proj": {"lora_A.weight": (4, 3), "lora_B.weight": (7, 4)},
        "m.q_proj": {"lora_A.weight": (4, 6), "lora_B.weight": (8, 2)},
        "m.v_proj": {"lora_A.weight": (4, 6), "lora_B.weight": (8, 4)},
    }
    bundle = make_bundle(shapes, {**NAMED, "r": 4, "use_bdlora": blocks})
    targets = {target.name: target.factors for target in SCHEME.read(bundle, NOT_STATED).targets}
    for name, role in (("m.o_proj", "lora_A.weight"), ("m.q_proj", "lora_B.weight")):
        stored = bundle.tensors[f"base_model.model.{name}.{role}"].read()
        np.testing.assert_array_equal(targets[name][role].read(), block_diagonal(stored, 2))
        assert targets[name][role].shape == block_diagonal(stored, 2).shape
    assert {role: factor.shape for role, factor in targets["m.v_proj"].items()} == shapes["m.v_proj"]


@pytest.mark.parametrize("stated", [True, {}, {"nblocks": 0}, {"nblocks": "2"}, {"nblocks": True}], ids=str)
def test_blocks_that_are_not_stated(stated: Any) -> None:
    expected = [] if stated == {} else ["LF213"]
    assert codes({"m.q": LINEAR}, use_bdlora=stated) == expected


def test_rows_that_do_not_divide_into_the_blocks() -> None:
    assert codes({"m.q": LINEAR}, use_bdlora={"nblocks": 3, "target_modules_bd_a": ["q"]}) == ["LF203"]


# --- attention, buffers, added rows ----------------------------------------------------------------------------------

ATTENTION = {
    "m.attn": {"lora_A.weight": (2, 6), "lora_B.weight": (18, 2)},
    "m.attn.base_layer.out_proj": {"lora_A.weight": (2, 6), "lora_B.weight": (6, 2)},
}


@pytest.mark.parametrize(("version", "times"), [("0.21.2", 2), (None, 2), ("0.15.0", 2), ("0.22.0", 1), ("1.0", 1)])
def test_the_output_projection_of_attention(version: str | None, times: int) -> None:
    adapter = read(ATTENTION, peft_version=version)
    assert {target.name: target.scale for target in adapter.targets} == {"m.attn": 4.0, "m.attn.out_proj": 4.0 * times}
    assert [problem.code for problem in adapter.problems] == ["LF224"] * (times - 1)


def test_an_output_projection_without_its_attention_keeps_its_name() -> None:
    adapter = read({"m.attn.base_layer.out_proj": LINEAR})
    assert [(target.name, target.scale) for target in adapter.targets] == [("m.attn.base_layer.out_proj", 4.0)]


def test_buffers_of_the_training_run_are_left_out_and_said() -> None:
    extra = {
        "lora_velora_embed": (3,),
        "lora_monteclora_sampler.std": (2, 2),
        "lora_monteclora_sampler.default.x": (2,),
    }
    adapter = read({"m.q": {**LINEAR, **extra}})
    assert set(adapter.targets[0].factors) == set(LINEAR)
    ((code, severity, where),) = [(p.code, p.severity, p.where) for p in adapter.problems]
    assert (code, severity) == ("LF226", "note")
    assert "lora_velora_embed" in where


def test_the_file_of_added_rows_beside_an_adapter(tmp_path: Any) -> None:
    bundle = replace(make_bundle({"m.q": LINEAR}), path=tmp_path)
    assert not find_errors(lambda: SCHEME.read(bundle, NOT_STATED))
    (tmp_path / "new_embeddings.safetensors").write_bytes(b"")
    assert [problem.code for problem in find_errors(lambda: SCHEME.read(bundle, NOT_STATED))] == ["LF228"]
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    beside = Bundle(tmp_path / "adapter_model.safetensors", bundle.tensors, bundle.metadata, bundle.config)
    assert [problem.code for problem in find_errors(lambda: SCHEME.read(beside, NOT_STATED))] == ["LF228"]


# --- derived factors -------------------------------------------------------------------------------------------------


def test_slices_of_one_tensor_are_cut_from_one_reading() -> None:
    counted = []

    class Counted(MemoryFactor):
        def read(self) -> NDArray[Any]:
            counted.append(self.name)
            return super().read()

    sources = [Counted(name, np.arange(12.0).reshape(4, 3)) for name in "abc"]
    last = LastRead()
    factors = [derive(Take(row, row + 1), KeptFactor(source, last)) for source in sources[:2] for row in range(4)]
    for first, second in zip(factors[:4], factors[4:], strict=True):
        np.testing.assert_array_equal(first.read(), second.read())
    assert counted == ["a", "b"]
    derive(Take(0, 1), KeptFactor(sources[2], last)).read()
    factors[0].read()
    assert counted == ["a", "b", "c", "a"]
    assert [(each.name, each.shape, each.elements, each.dtype.name) for each in factors[:1]] == [
        ("a", (1, 3), 3, "float64")
    ]


SLICES = {"lora_A.weight": (4, 5), "lora_B.weight": (6, 2, 1)}
Q_AND_V = [True, False, True]


def test_slices_of_a_fused_weight() -> None:
    """PEFT 0.2 took loralib's MergedLinear over; its B is the weight of a grouped convolution."""
    (target,) = read({"m.q": SLICES}, r=2, lora_alpha=6, enable_lora=Q_AND_V).targets
    assert (target.kind, target.rank, target.scale) == ("merged_linear", 2, 3.0)
    assert target.options == {"enable_lora": Q_AND_V}
    assert target.factors["lora_B.weight"].shape == (6, 2)
    kind = KINDS.find("merged_linear")
    assert kind is not None
    assert not kind.check(target)
    assert kind.changes(target)[0].shape == (9, 5)


@pytest.mark.parametrize(
    ("shapes", "stated", "code"),
    [
        (SLICES, "q and v", "LF213"),
        (SLICES, [1, 0, 1], "LF213"),
        ({**SLICES, "lora_B.weight": (6, 2, 3)}, Q_AND_V, "LF203"),
    ],
)
def test_slices_that_are_not_stated(shapes: Mapping[str, Any], stated: Any, code: str) -> None:
    assert code in codes({"m.q": shapes}, r=2, enable_lora=stated)


BY_EXPERT = {"lora_B_layout": "grouped_by_expert"}
UNSLOTH = {"auto_mapping": {"unsloth_fixed": True}, "target_parameters": BOTH[1:]}


@pytest.mark.parametrize(
    ("fields", "by_expert"),
    [
        (BY_EXPERT, True),
        ({"auto_mapping": {"unsloth_fixed": True, **BY_EXPERT}}, True),
        ({"unsloth_fused_expert_lora": {"parameters": {"down_proj": BY_EXPERT}}}, True),
        ({"lora_B_layout": "rank_major"}, False),
        ({"unsloth_fused_expert_lora": {"parameters": {"gate_up_proj": BY_EXPERT}}}, False),
    ],
)
def test_columns_of_unsloth(fields: Mapping[str, Any], by_expert: bool) -> None:
    adapter = read({X: PACKED}, **{**UNSLOTH, **fields})
    packed = make_bundle({X: PACKED}, NAMED).tensors[f"base_model.model.{X}.lora_B.weight"].read()
    second = packed[:, R : 2 * R] if by_expert else packed[:, 1::E]
    target = next(target for target in adapter.targets if ".1." in target.name)
    assert np.array_equal(target.factors["lora_B.weight"].read(), second)
    written = SCHEME.write(adapter, NO_FACTS)
    assert written.config is not None
    assert written.config["lora_B_layout"] == "rank_major"
    again = Bundle(Path("again"), dict(written.tensors), config=written.config)
    found = {target.name: target for target in SCHEME.read(again, NOT_STATED).targets}
    assert np.array_equal(found[target.name].factors["lora_B.weight"].read(), second)


@pytest.mark.parametrize("fields", [{}, {"lora_B_layout": "odd"}])
def test_columns_that_nothing_tells(fields: Mapping[str, Any]) -> None:
    assert codes({X: PACKED}, **{**UNSLOTH, **fields}) == ["LF647"]
