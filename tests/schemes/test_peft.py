"""PEFT's scheme: names, wrappers, ranks and scales; what it reads but does not pass off as LoRA."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import MemoryFactor, find_errors
from laws.scheme_laws import SchemeLaws
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.base_facts import NO_FACTS
from loraformat.manifest import MANIFEST_KEY
from loraformat.problems import Problem
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.peft import SCHEME

LINEAR = {"lora_A.weight": (2, 5), "lora_B.weight": (7, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": "some/base", "revision": "r1"}


def make_bundle(
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    config: Mapping[str, Any] | None = CONFIG,
    prefix: str = "base_model.model.",
    dtype: Any = np.float32,
) -> Bundle:
    dice = np.random.default_rng(0)
    tensors = {}
    for target, roles in shapes.items():
        for role, shape in roles.items():
            key = f"{prefix}{target}.{role}"
            tensors[key] = MemoryFactor(key, (dice.standard_normal(shape) * 4).astype(dtype))
    return Bundle(Path("folder"), tensors, {"format": "pt"}, config)


def infix(adapter: str) -> dict[str, tuple[int, ...]]:
    return {role.replace(".weight", f".{adapter}.weight"): shape for role, shape in LINEAR.items()}


EMBEDDING = {"lora_embedding_A": (2, 9), "lora_embedding_B": (5, 2)}
CONV = {"lora_A.weight": (2, 3, 3, 3), "lora_B.weight": (8, 2, 1, 1)}


class TestPeft(SchemeLaws):
    scheme = SCHEME

    def is_restored(self, example: str) -> bool:
        """Prefixes of wrappers and names of adapters are no part of an adapter, and are left out for good."""
        return example not in {"adapter names", "no prefix", "wrapped"}

    def examples(self) -> Mapping[str, Bundle]:
        return {
            "linear": make_bundle({"model.q": LINEAR, "model.v": LINEAR}),
            "conv and embedding": make_bundle({"model.conv": CONV, "model.embed": EMBEDDING}),
            "adapter names": make_bundle(
                {
                    "model.q": infix("default"),
                    "model.embed": {f"{role}.other": shape for role, shape in EMBEDDING.items()},
                }
            ),
            "no prefix": make_bundle({"model.q": LINEAR}, prefix=""),
            "wrapped": make_bundle({"model._orig_mod.q": LINEAR}, prefix="module.base_model.model."),
            "Conv1D": make_bundle({"model.q": LINEAR}, {**CONFIG, "fan_in_fan_out": True}),
        }


class TestPeftAlone(SchemeLaws):
    """The tensors without their configuration."""

    scheme = SCHEME
    stated = StatedScale(alpha=16.0)

    def examples(self) -> Mapping[str, Bundle]:
        return {
            "linear": make_bundle({"model.q": LINEAR}, None),
            "embedding": make_bundle({"model.embed": EMBEDDING}, None),
        }


def read(bundle: Bundle, stated: StatedScale = NOT_STATED) -> Adapter:
    return SCHEME.read(bundle, stated)


def read_one(bundle: Bundle, stated: StatedScale = NOT_STATED) -> Target:
    (target,) = read(bundle, stated).targets
    return target


def errors(bundle: Bundle, stated: StatedScale = NOT_STATED) -> list[Problem]:
    return find_errors(lambda: read(bundle, stated))


def codes(bundle: Bundle, stated: StatedScale = NOT_STATED) -> list[str]:
    return [problem.code for problem in errors(bundle, stated)]


# --- what a target is ------------------------------------------------------------------------------------------------


def test_a_linear_target() -> None:
    bundle = make_bundle({"model.layers.0.self_attn.q_proj": LINEAR})
    target = read_one(bundle)
    assert (target.name, target.kind, target.slot) == ("model.layers.0.self_attn.q_proj", "lora", SlotKind.LINEAR)
    assert (target.rank, target.scaling) == (2, Scaling(ScalingRule.ALPHA_OVER_RANK, 8.0))
    assert target.scale == 4.0
    assert {role: factor.shape for role, factor in target.factors.items()} == LINEAR
    assert target.parameters == 2 * 5 + 7 * 2


@pytest.mark.parametrize(
    ("shapes", "config", "slot"),
    [
        (LINEAR, {}, SlotKind.LINEAR),
        (LINEAR, {"fan_in_fan_out": True}, SlotKind.LINEAR_TRANSPOSED),
        (LINEAR, {"fan_in_fan_out": None}, SlotKind.LINEAR),
        (EMBEDDING, {"fan_in_fan_out": True}, SlotKind.EMBEDDING),
        (CONV, {"fan_in_fan_out": True}, SlotKind.CONV),
        ({"lora_A.weight": (2, 3, 4), "lora_B.weight": (8, 2, 1)}, {}, SlotKind.CONV),
    ],
)
def test_slots(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], slot: SlotKind) -> None:
    assert read_one(make_bundle({"m": shapes}, {**CONFIG, **config})).slot is slot


def test_the_base_and_the_configuration_travel_along() -> None:
    adapter = read(make_bundle({"m.q": LINEAR}))
    assert (adapter.base.name, adapter.base.revision) == ("some/base", "r1")
    assert adapter.provenance == {"peft": CONFIG}
    assert read(make_bundle({"m.q": LINEAR}, None), StatedScale(alpha=1.0)).provenance == {}


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float64"])
def test_number_forms_stay(name: str) -> None:
    from loraformat.dtypes import BY_NAME

    target = read_one(make_bundle({"m.q": LINEAR}, dtype=BY_NAME[name].numpy()))
    assert {factor.dtype.name for factor in target.factors.values()} == {name}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "target", "stripped"),
    [
        ("base_model.model.model.q", "model.q", ()),
        ("model.q", "model.q", ()),
        ("module.base_model.model.model.q", "model.q", ("module.",)),
        ("base_model.model.module.model.q", "model.q", ("module.",)),
        ("module.module.base_model.model.module.model.q", "model.q", ("module.",)),
        ("_orig_mod.base_model.model.model.q", "model.q", ("_orig_mod.",)),
        ("base_model.model._orig_mod.model._orig_mod.q", "model.q", ("_orig_mod.",)),
        ("module._orig_mod.base_model.model.model.q", "model.q", ("module.", "_orig_mod.")),
        ("_orig_mod.module.base_model.model.model.q", "model.q", ("module.", "_orig_mod.")),
        ("base_model.model.model._fsdp_wrapped_module.q", "model.q", ("_fsdp_wrapped_module.",)),
        ("base_model.model.model._checkpoint_wrapped_module.q", "model.q", ("_checkpoint_wrapped_module.",)),
        (
            "base_model.model.model._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.q",
            "model.q",
            ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."),
        ),
        # A module that is called so, and words that only end so, keep their names.
        ("base_model.model.encoder.module.q", "encoder.module.q", ()),
        ("base_model.model.my_module.q", "my_module.q", ()),
        ("base_model.model.x_orig_mod.q", "x_orig_mod.q", ()),
    ],
)
def test_wrappers_are_left_out_and_said(key: str, target: str, stripped: tuple[str, ...]) -> None:
    adapter = read(make_bundle({key: LINEAR}, prefix=""))
    assert [found.name for found in adapter.targets] == [target]
    notes = [problem for problem in adapter.problems if problem.code == "LF304"]
    assert all(problem.severity == "note" for problem in notes)
    assert bool(notes) == bool(stripped)
    assert all(wrapper in notes[0].found for wrapper in stripped)


def test_a_thousand_wrappers_take_no_time() -> None:
    key = "_orig_mod." * 400
    assert read_one(make_bundle({f"{key}q": LINEAR}, prefix="")).name == "q"


@pytest.mark.parametrize(
    "twin", ["model.q.lora_A.weight", "module.model.q.lora_A.weight", "base_model.model.model.q.lora_A.default.weight"]
)
def test_two_keys_for_one_role(twin: str) -> None:
    bundle = make_bundle({"model.q": LINEAR})
    more = replace(bundle, tensors={**bundle.tensors, twin: MemoryFactor("twin", np.ones((2, 5), np.float32))})
    assert codes(more) == ["LF302"]
    assert "lora_A.weight for model.q" in errors(more)[0].found


def test_all_unknown_keys_are_named() -> None:
    bundle = make_bundle({"model.q": {**LINEAR, "lora_noise": (2,)}, "model.v": {**LINEAR, "lora_mask": (3,)}})
    problems = errors(bundle)
    assert {problem.code for problem in problems} == {"LF202"}
    assert [problem.where.rpartition(".")[2] for problem in problems] == ["lora_noise", "lora_mask"]


def test_nothing_but_unknown_keys() -> None:
    bundle = Bundle(Path("f"), {"optimizer": MemoryFactor("optimizer", np.ones(3))}, {}, CONFIG)
    assert {"LF202", "LF212"} & set(codes(bundle))


def test_no_tensors_at_all() -> None:
    """40 bytes: what torch.compile and ZeRO-3 leave."""
    assert codes(Bundle(Path("f"), {}, {}, CONFIG)) == ["LF212"]


# --- rank and scale --------------------------------------------------------------------------------------------------


def test_rs_lora_divides_by_the_root() -> None:
    target = read_one(make_bundle({"m.q": LINEAR}, {**CONFIG, "use_rslora": True}))
    assert target.scaling == Scaling(ScalingRule.ALPHA_OVER_SQRT_RANK, 8.0)
    assert target.scale == 8 / math.sqrt(2)


def test_patterns_decide_over_the_defaults() -> None:
    wide = {"lora_A.weight": (3, 5), "lora_B.weight": (7, 3)}
    config = {**CONFIG, "rank_pattern": {"v": 3}, "alpha_pattern": {r"layers\.1\.q": 1, "v": 9}, "use_rslora": True}
    targets = {"m.layers.0.q": LINEAR, "m.layers.1.q": LINEAR, "m.layers.0.v": wide}
    adapter = read(make_bundle(targets, config))
    found = {target.name: (target.rank, target.scale) for target in adapter.targets}
    assert found == {
        "m.layers.0.q": (2, 8 / math.sqrt(2)),
        "m.layers.1.q": (2, 1 / math.sqrt(2)),
        "m.layers.0.v": (3, 9 / math.sqrt(3)),
    }
    assert not find_errors(lambda: adapter)


def test_the_rank_of_the_configuration_must_be_that_of_the_tensors() -> None:
    for config in ({**CONFIG, "r": 4}, {**CONFIG, "rank_pattern": {"q": 4}}, {**CONFIG, "r": 0}):
        assert codes(make_bundle({"m.q": LINEAR}, config)) == ["LF205"]


def test_without_a_stated_rank_the_tensors_tell() -> None:
    config = {name: value for name, value in CONFIG.items() if name != "r"}
    assert read_one(make_bundle({"m.q": LINEAR}, config)).scale == 4.0
    assert read_one(make_bundle({"m.q": LINEAR}, {**CONFIG, "r": None})).rank == 2


@pytest.mark.parametrize("config", [None, {"peft_type": "LORA", "r": 2}, {**CONFIG, "lora_alpha": None}])
def test_a_scale_that_nobody_states(config: Mapping[str, Any] | None) -> None:
    assert codes(make_bundle({"m.q": LINEAR}, config)) == ["LF211"]


@pytest.mark.parametrize("config", [None, {"peft_type": "LORA", "r": 2}, {**CONFIG, "lora_alpha": 0}])
def test_the_user_may_state_it(config: Mapping[str, Any] | None) -> None:
    bundle = make_bundle({"m.q": LINEAR}, config)
    assert read_one(bundle, StatedScale(alpha=3.0)).scaling == Scaling(ScalingRule.ALPHA_OVER_RANK, 3.0)
    assert read_one(bundle, StatedScale(multiplier=0.5)).scaling == Scaling(ScalingRule.MULTIPLIER, 0.5)
    assert read_one(bundle, StatedScale(multiplier=-0.5)).scale == -0.5


def test_the_users_alpha_follows_the_rule_of_the_source() -> None:
    bundle = make_bundle({"m.q": LINEAR}, {"peft_type": "LORA", "use_rslora": True})
    assert read_one(bundle, StatedScale(alpha=3.0)).scale == 3 / math.sqrt(2)


def test_what_the_source_states_stands() -> None:
    bundle = make_bundle({"m.q": LINEAR})
    for stated in (StatedScale(alpha=1000.0), StatedScale(multiplier=1000.0)):
        assert read_one(bundle, stated).scale == 4.0


def test_a_pattern_may_state_what_the_default_does_not() -> None:
    config = {**CONFIG, "lora_alpha": None, "alpha_pattern": {"q": 6}}
    assert codes(make_bundle({"m.q": LINEAR, "m.v": LINEAR}, config)) == ["LF211"]
    adapter = read(make_bundle({"m.q": LINEAR, "m.v": LINEAR}, config), StatedScale(multiplier=0.25))
    assert [target.scale for target in adapter.targets] == [3.0, 0.25]


def test_alpha_of_zero_is_read_and_refused_later() -> None:
    bundle = make_bundle({"m.q": LINEAR}, {**CONFIG, "lora_alpha": 0})
    assert read_one(bundle).scale == 0
    assert codes(bundle) == ["LF208"]


@pytest.mark.parametrize("stated", [StatedScale(alpha=math.inf), StatedScale(multiplier=math.nan)])
def test_a_stated_scale_must_be_finite(stated: StatedScale) -> None:
    assert codes(make_bundle({"m.q": LINEAR}, None), stated) == ["LF207"]


# --- factors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lone", ["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"])
def test_a_factor_without_its_partner(lone: str) -> None:
    bundle = make_bundle({"m.q": {lone: (LINEAR | EMBEDDING)[lone]}})
    problems = errors(bundle)
    assert [problem.code for problem in problems] == ["LF201"]
    partner = lone.replace("_A", "_#").replace("_B", "_A").replace("_#", "_B")
    assert lone in problems[0].found
    assert partner in problems[0].expected


def test_factors_of_two_ranks() -> None:
    assert codes(make_bundle({"m.q": {"lora_A.weight": (2, 5), "lora_B.weight": (7, 3)}})) == ["LF203"]


def test_what_zero_3_saves() -> None:
    assert codes(make_bundle({"m.q": {"lora_A.weight": (0,), "lora_B.weight": (0,)}})) == ["LF204"]
    assert codes(make_bundle({"m.q": {"lora_A.weight": (0, 5), "lora_B.weight": (7, 0)}})) == ["LF204"]


def test_factors_of_integers() -> None:
    assert codes(make_bundle({"m.q": LINEAR}, dtype=np.int32)) == ["LF210", "LF210"]


def test_linear_and_embedding_factors_of_one_module() -> None:
    assert codes(make_bundle({"m.q": {**LINEAR, **EMBEDDING}})) == ["LF202"]


# --- what is more than LoRA ------------------------------------------------------------------------------------------

BEYOND = {
    "DoRA": ({**LINEAR, "lora_magnitude_vector": (7,)}, "dora"),
    "DoRA of a state dict": ({**LINEAR, "lora_magnitude_vector.default.weight": (7,)}, "dora"),
    "DoRA with a bias": ({**LINEAR, "lora_B.bias": (7,), "lora_magnitude_vector": (7,)}, "dora"),
    "trained bias beside DoRA": ({**LINEAR, "lora_magnitude_vector": (7,), "base_layer.bias": (7,)}, "dora"),
    "trained tokens beside factors": ({**EMBEDDING, "trainable_tokens_delta": (3, 5)}, "lora and tokens"),
    "a weight twice": ({**LINEAR, "base_layer.weight": (7, 5), "weight": (7, 5)}, "lora and replace"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_is_more_than_lora_is_never_taken_for_it(case: str) -> None:
    shapes, kind = BEYOND[case]
    adapter = read(make_bundle({"m.q": LINEAR, "m.x": shapes}))
    assert {target.name: target.kind for target in adapter.targets} == {"m.q": "lora", "m.x": kind}


BESIDE = {
    "lora_bias": ({**LINEAR, "lora_B.bias": (7,)}, {"lora_B.bias": (7,)}),
    "lora_bias of a state dict": ({**infix("default"), "lora_B.default.bias": (7,)}, {"lora_B.bias": (7,)}),
    "trained bias": ({**LINEAR, "base_layer.bias": (7,)}, {"base_layer.bias": (7,)}),
    "trained bias of an older version": ({**LINEAR, "bias": (7,)}, {"base_layer.bias": (7,)}),
    "resized embedding": ({**EMBEDDING, "base_layer.weight": (9, 5)}, {"base_layer.weight": (9, 5)}),
    "resized embedding of an older version": ({**EMBEDDING, "weight": (9, 5)}, {"base_layer.weight": (9, 5)}),
    "resized head": ({**LINEAR, "base_layer.weight": (7, 5)}, {"base_layer.weight": (7, 5)}),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_was_saved_beside_factors_is_the_base_s_own(case: str) -> None:
    shapes, extra = BESIDE[case]
    bundle = make_bundle({"m.x": shapes}, {**CONFIG, "lora_bias": "lora_B.bias" in extra})
    target = read_one(bundle)
    assert not errors(bundle)
    assert target.kind == "lora"
    assert {role: f.shape for role, f in target.factors.items() if not role.startswith(("lora_A", "lora_emb"))} == {
        role: shape for role, shape in {"lora_B.weight": (7, 2), **extra}.items() if role in target.factors
    }


def test_a_bias_of_factors_that_nobody_announced_is_applied_and_said() -> None:
    """As mergekit's extraction writes it."""
    adapter = read(make_bundle({"m.q": {**LINEAR, "lora_B.bias": (7,)}, "m.v": {**LINEAR, "lora_B.bias": (7,)}}))
    assert [(problem.code, problem.severity) for problem in adapter.problems] == [("LF223", "warning")]
    assert all("lora_B.bias" in target.factors for target in adapter.targets)
    assert not read(make_bundle({"m.q": {**LINEAR, "lora_B.bias": (7,)}}, {**CONFIG, "lora_bias": True})).problems


def test_a_bias_of_factors_that_was_lost() -> None:
    assert codes(make_bundle({"m.q": LINEAR}, {**CONFIG, "lora_bias": True})) == ["LF201"]


TOKEN_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "list": ("token_adapter.trainable_tokens_delta", {"trainable_token_indices": [4, 1, 7]}),
    "table": ("token_adapter.trainable_tokens_delta", {"trainable_token_indices": {"x": [9], "embed": [4, 1, 7]}}),
    "state dict": ("token_adapter.trainable_tokens_delta.default", {"trainable_token_indices": [4, 1, 7]}),
    "their own type": ("trainable_tokens_delta", {"peft_type": "TRAINABLE_TOKENS", "token_indices": [4, 1, 7]}),
}


@pytest.mark.parametrize("case", TOKEN_CASES)
def test_trained_tokens_are_numbered_by_the_configuration(case: str) -> None:
    role, fields = TOKEN_CASES[case]
    bundle = make_bundle({"m.embed": {role: (3, 5)}}, {**CONFIG, **fields})
    target = read_one(bundle)
    assert not errors(bundle)
    assert (target.kind, target.slot, target.options) == ("tokens", SlotKind.PARAMETER, {"token_indices": [4, 1, 7]})


@pytest.mark.parametrize(
    "stated", [None, [1], [1, 2, 2], {"other": [1, 2, 3]}, [1, 2, "3"], [1, 2, -3], "123"], ids=str
)
def test_rows_that_nothing_numbers(stated: Any) -> None:
    fields = {} if stated is None else {"trainable_token_indices": stated}
    bundle = make_bundle({"m.embed": {"trainable_tokens_delta": (3, 5)}}, {**CONFIG, **fields})
    assert codes(bundle) == ["LF227"]


SAVED = {
    "head": {"weight": (7, 5)},
    "head with bias": {"weight": (7, 5), "bias": (7,)},
    "head of a state dict": {"modules_to_save.default.weight": (7, 5), "modules_to_save.default.bias": (7,)},
    "bias of a module that is not adapted": {"bias": (7,)},
    "bias of an adapted module without its factors": {"base_layer.bias": (7,)},
    "norm": {"weight": (7,), "bias": (7,)},
    "kernel": {"weight": (7, 5, 3, 3)},
}


@pytest.mark.parametrize("case", SAVED)
def test_what_is_saved_whole_is_a_replacement(case: str) -> None:
    """It has no rank, and alpha is not for it."""
    bundle = make_bundle({"m.q": LINEAR, "m.x": SAVED[case]})
    lora, saved = read(bundle).targets
    assert not errors(bundle)
    assert (lora.name, lora.kind, lora.scale) == ("m.q", "lora", 4.0)
    assert (saved.name, saved.kind, saved.slot) == ("m.x", "replace", SlotKind.PARAMETER)
    assert (saved.rank, saved.scaling) == (0, Scaling(ScalingRule.MULTIPLIER, 1.0))
    shapes = {role.rpartition(".")[2]: shape for role, shape in SAVED[case].items()}
    assert {role: factor.shape for role, factor in saved.factors.items()} == shapes


def test_a_saved_module_alone_needs_no_scale() -> None:
    target = read_one(make_bundle({"m.x": {"weight": (7, 5)}}, {"peft_type": "LORA"}))
    assert (target.kind, target.scale) == ("replace", 1.0)


def test_the_copy_that_a_state_dict_keeps_is_left_out_and_said() -> None:
    """`original_module` is the base's own."""
    saved = {"modules_to_save.default.weight": (7, 5), "original_module.weight": (7, 5)}
    adapter = read(make_bundle({"head": saved}))
    assert [target.name for target in adapter.targets] == ["head"]
    assert [(problem.code, problem.severity) for problem in adapter.problems] == [("LF226", "note")]
    alone = read(make_bundle({"head": {"original_module.weight": (7, 5)}}))
    assert [target.name for target in alone.targets] == ["head.original_module"]


def test_the_three_names_of_a_module_saved_whole_and_resized() -> None:
    """PEFT 0.21 writes them for modules_to_save beside save_embedding_layers."""
    names = ("weight", "modules_to_save.weight", "original_module.weight")
    adapter = read(make_bundle({"m.q": LINEAR, "lm_head": dict.fromkeys(names, (7, 5))}))
    assert {target.name: set(target.factors) for target in adapter.targets}["lm_head"] == {"weight"}
    assert [problem.code for problem in adapter.problems] == ["LF226"]


def test_two_copies_of_a_saved_weight() -> None:
    saved = {"modules_to_save.default.weight": (7, 5), "weight": (7, 5)}
    assert codes(make_bundle({"m.q": LINEAR, "m.x": saved})) == ["LF302"]


def test_what_is_no_weight_or_bias_of_a_saved_module() -> None:
    """A buffer or a parameter of another name cannot be placed, and is not left out in silence."""
    for role in ("running_mean", "in_proj_weight"):
        assert codes(make_bundle({"m.q": LINEAR, "m.x": {"weight": (7, 5), role: (7,)}})) == ["LF202"]


def test_a_dora_adapter_that_lost_its_magnitudes() -> None:
    bundle = make_bundle({"m.q": LINEAR, "m.v": LINEAR}, {**CONFIG, "use_dora": True})
    assert [(problem.code, problem.where) for problem in errors(bundle)] == [("LF201", "m.q"), ("LF201", "m.v")]
    whole = {**LINEAR, "lora_magnitude_vector": (7,)}
    assert codes(make_bundle({"m.q": whole}, {**CONFIG, "use_dora": True})) == []


@pytest.mark.parametrize("role", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_dora_with_its_magnitudes(role: str) -> None:
    (target,) = read(make_bundle({"m.q": {**LINEAR, role: (7,)}}, {**CONFIG, "use_dora": True})).targets
    assert (target.kind, target.slot) == ("dora", SlotKind.LINEAR)
    assert set(target.factors) == {*LINEAR, "lora_magnitude_vector"}


@pytest.mark.parametrize("kind", ["PSOFT", "ADAMSS", "LORAX", "PROMPT_TUNING", ""])
def test_other_types_are_refused_by_name(kind: str) -> None:
    problems = errors(make_bundle({"m.q": LINEAR}, {**CONFIG, "peft_type": kind}))
    assert [problem.code for problem in problems] == ["LF209"]
    assert repr(kind) in problems[0].found


@pytest.mark.parametrize("kind", ["lora", "Lora", "PeftType.LORA"])
def test_other_spellings_of_the_type(kind: str) -> None:
    bundle = make_bundle({"m.q": LINEAR}, {**CONFIG, "peft_type": kind})
    assert SCHEME.detect(bundle)
    assert read_one(bundle).scale == 4.0
    assert not SCHEME.check_config(bundle).problems


def test_the_fields_that_servers_need_are_those_of_lora() -> None:
    bundle = make_bundle({"m.q": LINEAR}, {"r": 2, "lora_alpha": 8, "target_modules": ["q"]})
    assert SCHEME.detect(bundle) == "adapter_config.json with r, lora_alpha and target_modules"
    assert read_one(bundle).scale == 4.0
    assert SCHEME.detect(replace(bundle, tensors={"m.q": MemoryFactor("m.q", np.ones((2, 5)))})) is None


def test_layers_that_are_repeated_say_how_to_repeat_them() -> None:
    (problem,) = errors(make_bundle({"m.q": LINEAR}, {**CONFIG, "layer_replication": [[0, 2], [1, 3]]}))
    assert problem.code == "LF245"
    assert "layer_replication" in problem.advice


def dump_of(kind: str, config: Mapping[str, Any], roles: Mapping[str, tuple[int, ...]]) -> list[tuple[str, list[str]]]:
    """Return the targets of a whole model's state dict, with their roles."""
    own = {"base_layer.weight": (7, 5), "base_layer.bias": (7,)}
    shapes = {"m.q": {**roles, **own}, "m.v": {**roles, **own}, "norm": {"weight": (5,)}}
    adapter = read(make_bundle(shapes, {**CONFIG, "peft_type": kind, **config}))
    notes = [problem.found for problem in adapter.problems if problem.code == "LF226"]
    assert notes == ([] if kind == "LORA" and not config else ["kept by the training run, left out"])
    return [(target.name, sorted(target.factors)) for target in adapter.targets]


def test_the_state_dict_of_a_whole_model() -> None:
    """What lies in it of the base replaces the base's, where the kind has a place for it, and is left out elsewhere."""
    norm = ("norm", ["weight"])
    scaled = {"ia3_l.default": (7, 1)}
    assert dump_of("IA3", {"feedforward_modules": []}, scaled) == [("m.q", ["ia3_l"]), ("m.v", ["ia3_l"]), norm]
    magnitudes = {**infix("default"), "lora_magnitude_vector.default.weight": (7,)}
    roles = [*sorted(LINEAR), "lora_magnitude_vector"]
    assert dump_of("LORA", {"use_dora": True}, magnitudes) == [("m.q", roles), ("m.v", roles), norm]
    whole = sorted([*LINEAR, "base_layer.weight", "base_layer.bias"])
    assert dump_of("LORA", {}, infix("default")) == [("m.q", whole), ("m.v", whole), norm]


def test_a_quantised_base_in_the_state_dict_is_left_out() -> None:
    beside = ["base_layer.weight", "base_layer.weight.absmax", "base_layer.weight.quant_map"]
    beside += ["base_layer.weight.quant_state.bitsandbytes__nf4"]
    bundle = make_bundle({"m.q": infix("default")})
    codes_of_base = {f"base_model.model.m.q.{role}": MemoryFactor(role, np.ones((18, 1), np.uint8)) for role in beside}
    adapter = read(replace(bundle, tensors={**bundle.tensors, **codes_of_base}))
    assert [(target.name, sorted(target.factors)) for target in adapter.targets] == [("m.q", sorted(LINEAR))]
    assert [problem.code for problem in adapter.problems] == ["LF226"]


def test_parameters_of_any_name_of_a_module_that_was_saved_whole() -> None:
    saved = {"cls_token": (1, 1, 5), "inner.weight": (4, 5)}
    config = {**CONFIG, "modules_to_save": ["embeddings"]}
    expected = [("m.embeddings", ["cls_token"]), ("m.embeddings.inner", ["weight"]), ("m.q", sorted(LINEAR))]
    dumped = {f"{wrapper}{role}": shape for role, shape in saved.items() for wrapper in DUMPED}
    for roles in (saved, dumped):
        adapter = read(make_bundle({"m.q": LINEAR, "m.embeddings": roles}, config))
        assert [(target.name, sorted(target.factors)) for target in adapter.targets] == expected
    assert codes(make_bundle({"m.q": LINEAR, "m.other": saved}, config)) == ["LF202"]
    written = SCHEME.write(read(make_bundle({"m.q": LINEAR, "m.embeddings": saved}, config)), NO_FACTS)
    assert "base_model.model.m.embeddings.cls_token" in written.tensors


DUMPED = ("modules_to_save.default.", "original_module.")


def test_tensors_beside_the_adapter_are_of_modules_saved_whole() -> None:
    bundle = make_bundle({"m.q": LINEAR, "m": {"image_newline": (5,)}, "m.projector": {"weight": (4, 5)}})
    beside = frozenset(key for key in bundle.tensors if "lora" not in key)
    adapter = read(replace(bundle, beside=beside))
    assert [target.kind for target in adapter.targets] == ["replace", "replace", "lora"]
    assert not SCHEME.check(replace(bundle, beside=beside))
    assert codes(bundle) == ["LF202"]


def test_two_adapters_for_the_same_modules() -> None:
    (problem,) = errors(make_bundle({"m.q": {**infix("vision"), **infix("speech")}}))
    assert problem.code == "LF238"
    assert "speech, vision" in problem.found


def test_no_type_at_all() -> None:
    assert codes(make_bundle({"m.q": LINEAR}, {"r": 2, "lora_alpha": 8})) == ["LF209"]
    assert codes(make_bundle({"m.q": LINEAR}, {"peft_type": None})) == ["LF209"]


# --- whose file it is ------------------------------------------------------------------------------------------------


def test_a_configuration_of_something_else_is_no_evidence() -> None:
    assert SCHEME.detect(make_bundle({"m.q": LINEAR}, {"model_type": "llama"})) is None


def test_the_marks_of_others_are_seen() -> None:
    for key in ("lora_adapter_metadata", MANIFEST_KEY):
        bundle = make_bundle({"m.q": LINEAR}, None)
        assert SCHEME.detect(bundle)
        assert SCHEME.detect(replace(bundle, metadata={key: "{}"})) is None


def test_other_keys_are_no_evidence() -> None:
    for key in ("m.lora_down.weight", "m.lora_a", "m.lora_A", "lora_A.weight", "m.flora_A.weight"):
        tensors = {key: MemoryFactor(key, np.ones((2, 5), np.float32))}
        assert SCHEME.detect(Bundle(Path("f"), tensors)) is None


def test_biases_that_were_trained_and_not_saved_are_missed() -> None:
    """PEFT 0.10 to 0.20 saved none with `lora_only`; a base without biases has none to lose."""
    (problem,) = SCHEME.read(make_bundle({"m.q": LINEAR}, {**CONFIG, "bias": "lora_only"}), NOT_STATED).problems
    assert (problem.code, problem.severity) == ("LF218", "warning")
