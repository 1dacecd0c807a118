"""PEFT's types other than LORA: what becomes of their keys, fields and versions."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import MemoryFactor, find_errors
from laws.scheme_laws import SchemeLaws
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.base_facts import NO_FACTS
from loraformat.errors import LoraformatError
from loraformat.kinds import KINDS
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes._peft.order import name_category
from loraformat.schemes._peft.types import TYPES
from loraformat.schemes.peft import SCHEME

PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, ...]]

BOFT = {"boft_R": (1, 6, 4, 4), "boft_s": (12, 1), "boft_P": (1, 24, 24)}


def make_bundle(peft_type: str, shapes: Shapes, whole: tuple[str, ...] = (), **fields: Any) -> Bundle:
    tensors = {
        key if key.startswith("base_model.") else PREFIX + key: MemoryFactor(
            key, np.ones(shape, np.int32 if key in whole else np.float32)
        )
        for key, shape in shapes.items()
    }
    return Bundle(Path("adapter"), tensors, config={"peft_type": peft_type, **fields})


def read(bundle: Bundle) -> Adapter:
    return SCHEME.read(bundle, NOT_STATED)


def errors(bundle: Bundle) -> list[str]:
    return [problem.code for problem in find_errors(lambda: read(bundle))]


LOHA = {"m.q.hada_w1_a": (6, 2), "m.q.hada_w1_b": (2, 5), "m.q.hada_w2_a": (6, 2), "m.q.hada_w2_b": (2, 5)}


def test_every_type_is_of_a_kind_that_there_is_with_roles_that_it_has() -> None:
    for name, row in TYPES.items():
        kind = KINDS.find(row.kind)
        assert kind is not None, name
        known = {role for roles in kind.role_sets for role in (*roles.required, *roles.optional)}
        assert set(row.roles.values()) <= known, name


def test_alpha_and_rank_by_pattern() -> None:
    shapes = {**LOHA, **{key.replace("m.q", "m.v").replace("2", "2"): shape for key, shape in LOHA.items()}}
    adapter = read(make_bundle("LOHA", shapes, r=2, alpha=8, alpha_pattern={"v": 3}))
    assert [target.scale for target in adapter.targets] == [4.0, 1.5]
    assert not errors(make_bundle("LOHA", shapes, r=2, alpha=8))


def test_a_table_that_was_saved_beside_a_changed_one_says_how_to_save_without_it() -> None:
    """PEFT saves `lm_head.base_layer.weight` of every type that adapts the output layer."""
    bundle = make_bundle("LOHA", {**LOHA, "m.q.base_layer.weight": (6, 5)}, r=2, alpha=8)
    adapter = read(bundle)
    (target,) = adapter.targets
    kind = KINDS.find("loha")
    assert kind is not None
    (problem,) = kind.check(target)
    assert problem.code == "LF202"
    assert "save_embedding_layers=False" in problem.mend


@pytest.mark.parametrize("alpha", [None, "8", True, float("nan")])
def test_an_alpha_that_is_no_number(alpha: Any) -> None:
    assert errors(make_bundle("LOHA", LOHA, alpha=alpha)) == ["LF213"]


def test_the_scale_of_two_whole_factors_is_alpha_over_the_stated_rank() -> None:
    """LyCORIS takes 1 there, PEFT does not; the factors have no rank."""
    shapes = {"m.q.lokr_w1": (2, 3), "m.q.lokr_w2": (4, 5)}
    (target,) = read(make_bundle("LOKR", shapes, r=16, alpha=8)).targets
    assert (target.rank, target.scaling) == (0, Scaling(ScalingRule.MULTIPLIER, 0.5))
    (target,) = read(make_bundle("LOKR", shapes, r=16, alpha=8, rank_pattern={"q": 4})).targets
    assert target.scale == 2.0
    assert errors(make_bundle("LOKR", shapes, alpha=8)) == ["LF213"]


@pytest.mark.parametrize(
    ("fields", "scale", "said"),
    [
        ({"rank_dropout": 0.0}, 1.0, ["LF247"]),
        ({"rank_dropout": 0.0, "exclude_modules": None}, 0.5, []),
        ({"rank_dropout": 0.0, "peft_version": "0.20.0"}, 0.5, []),
        ({"rank_dropout": 0.0, "alpha": 16}, 1.0, []),
    ],
    ids=str,
)
def test_the_first_versions_of_lokr_had_no_scale(fields: dict[str, Any], scale: float, said: list[str]) -> None:
    """PEFT 0.6 to 0.13 computed w1 ⊗ w2, whatever alpha was."""
    shapes = {"base_model.model.m.q.lokr_w1": (2, 3), "base_model.model.m.q.lokr_w2": (3, 4)}
    adapter = read(make_bundle("LOKR", shapes, **({"r": 16, "alpha": 8} | fields)))
    assert adapter.targets[0].scale == scale
    assert [(each.code, each.severity) for each in adapter.problems] == [(code, "warning") for code in said]


def test_permutations_of_boft_are_left_out() -> None:
    """PEFT 0.11 saved them, though the sizes of the blocks tell them."""
    shapes = {f"base_model.model.q.{role}": shape for role, shape in BOFT.items()}
    adapter = read(make_bundle("BOFT", shapes))
    assert [each.code for each in adapter.problems] == ["LF226"]
    assert adapter.targets[0].factors.keys() == {"boft_R", "boft_s"}


def test_a_line_of_lokr_is_counted_as_peft_does() -> None:
    shapes = {"m.q.lokr_w1": (2, 3), "m.q.lokr_w2": (4, 5, 3)}
    (target,) = read(make_bundle("LOKR", shapes, r=16, alpha=8)).targets
    assert (target.slot, target.options) == (SlotKind.CONV, {"kron_axes": "leading"})


@pytest.mark.parametrize(
    ("modules", "forward"),
    [
        (["v"], False),
        (["q"], True),
        (["m.q"], True),
        (["l.m.q"], False),
        (r".*\.q", True),
        (r"q", False),
        (None, False),
    ],
    ids=str,
)
def test_the_feed_forward_modules_of_ia3(modules: Any, forward: bool) -> None:
    (target,) = read(make_bundle("IA3", {"m.q.ia3_l": (6, 1)}, feedforward_modules=modules)).targets
    assert target.options == {"is_feedforward": forward}


def test_factors_that_all_share() -> None:
    lambdas = {
        "m.q.vera_lambda_b": (6,),
        "m.q.vera_lambda_d": (2,),
        "m.v.vera_lambda_b": (4,),
        "m.v.vera_lambda_d": (2,),
    }
    shared = {"base_model.vera_A": (2, 9), "base_model.vera_B": (7, 2)}
    adapter = read(make_bundle("VERA", {**lambdas, **shared}))
    assert [target.name for target in adapter.targets] == ["m.q", "m.v"]
    assert len({id(target.factors["vera_A"]) for target in adapter.targets}) == 1
    assert not errors(make_bundle("VERA", {**lambdas, **shared}))
    drawn = make_bundle("VERA", lambdas, save_projection=False, projection_prng_key=5)
    assert not errors(drawn)
    assert [target.options for target in read(drawn).targets] == [{"projection_prng_key": 5, "sharing": 2}] * 2
    assert set(errors(make_bundle("VERA", lambdas))) == {"LF230"}


def test_what_all_targets_share_is_written_once() -> None:
    lambdas = {f"m.{name}.vera_lambda_{side}": (size,) for name in "qv" for side, size in (("b", 6), ("d", 2))}
    bundle = make_bundle("VERA", {**lambdas, "base_model.vera_A": (2, 9), "base_model.vera_B": (7, 2)})
    adapter = read(bundle)
    written = SCHEME.write(adapter, NO_FACTS)
    assert not written.problems
    assert set(written.tensors) == set(bundle.tensors)
    other = replace(
        adapter.targets[1], factors={**adapter.targets[1].factors, "vera_A": adapter.targets[1].factors["vera_B"]}
    )
    torn = SCHEME.write(replace(adapter, targets=(adapter.targets[0], other)), NO_FACTS)
    assert "LF312" in {problem.code for problem in torn.problems}


def test_a_target_s_own_copy_comes_first() -> None:
    own = {"m.q.randlora_A": (2, 1, 9), "m.q.randlora_B": (9, 2, 2)}
    shapes = {**own, "m.q.randlora_lambda": (2, 2), "m.q.randlora_gamma": (2, 4), "base_model.randlora_A": (2, 1, 5)}
    (target,) = read(make_bundle("RANDLORA", shapes, randlora_alpha=6)).targets
    assert (target.factors["randlora_A"].shape, target.scale) == ((2, 1, 9), 3.0)


@pytest.mark.parametrize(("version", "options"), [("0.17.1", 2), ("0.16.0", 2), ("0.18.0", None), (None, None)])
def test_the_series_of_oft_follows_the_version(version: str | None, options: int | None) -> None:
    fields = {"peft_version": version} if version else {}
    (target,) = read(make_bundle("OFT", {"m.q.oft_R.weight": (3, 6)}, **fields)).targets
    assert target.options.get("last_neumann_coefficient") == options


def test_the_older_generations_of_oft() -> None:
    assert not errors(make_bundle("OFT", {"m.q.oft_r": (3, 4, 4)}))
    assert not errors(make_bundle("OFT", {"m.q.oft_r": (3, 4, 4), "m.q.oft_s": (5, 1)}))


def test_adalora_divides_by_the_rank_that_it_began_with() -> None:
    shapes = {"m.q.lora_A": (2, 5), "m.q.lora_B": (6, 2), "m.q.lora_E": (2, 1)}
    (target,) = read(make_bundle("ADALORA", shapes, init_r=12, lora_alpha=32, rank_pattern={"m.q": [True]})).targets
    assert (target.rank, target.scale) == (2, pytest.approx(32 / 12.00001))
    (target,) = read(make_bundle("ADALORA", shapes, init_r=12, lora_alpha=0)).targets
    assert target.scale == pytest.approx(1, rel=1e-5)


def test_a_target_of_adalora_that_was_left_without_a_rank() -> None:
    left = {"m.q.lora_A": (2, 5), "m.q.lora_B": (6, 2), "m.q.lora_E": (2, 1)}
    gone = {"m.v.lora_A": (0, 5), "m.v.lora_B": (6, 0), "m.v.lora_E": (0, 1)}
    adapter = read(make_bundle("ADALORA", {**left, **gone}, init_r=4, lora_alpha=8))
    assert [target.name for target in adapter.targets] == ["m.q"]
    assert [(p.code, p.where, p.severity) for p in adapter.problems] == [("LF233", "m.v", "note")]


def test_the_variants_of_miss_and_bone() -> None:
    kinds = {}
    for peft_type, key, shape, variant in (
        ("MISS", "miss_block", (3, 6), True),
        ("MISS", "miss_block", (3, 2), "mini"),
        ("MISS", "miss_block", (2, 3, 3), "bat"),
        ("BONE", "bone_block", (3, 6), True),
        ("BONE", "bone_block", (2, 3, 3), "bat"),
    ):
        bundle = make_bundle(peft_type, {f"m.q.{key}": shape}, init_weights=variant)
        assert not errors(bundle)
        (target,) = read(bundle).targets
        kinds[peft_type, variant] = (target.kind, target.rank, dict(target.options))
    assert kinds == {
        ("MISS", True): ("miss", 3, {}),
        ("MISS", "mini"): ("miss", 3, {"is_repeated_along_outputs": True}),
        ("MISS", "bat"): ("miss_bat", 3, {}),
        ("BONE", True): ("miss", 3, {}),
        ("BONE", "bat"): ("miss_bat", 3, {}),
    }


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6, 2.0)])
def test_the_injection_of_deft_has_a_scale_and_its_projection_none(alpha: int | None, scale: float) -> None:
    shapes = {"m.q.deft_P": (6, 3), "m.q.deft_R": (3, 5)}
    (target,) = read(make_bundle("DEFT", shapes, r=3, alpha=alpha, decomposition_method="qr")).targets
    assert (target.kind, target.rank, target.scale) == ("deft", 3, scale)
    assert target.options == {"decomposition_method": "qr"}


def test_norms_that_were_trained_replace_the_base_s() -> None:
    shapes = {"m.norm.ln_tuning_layers.weight": (6,), "m.norm.ln_tuning_layers.bias": (6,)}
    (target,) = read(make_bundle("LN_TUNING", shapes)).targets
    assert (target.kind, target.slot, sorted(target.factors)) == ("replace", SlotKind.PARAMETER, ["bias", "weight"])


def test_wavelets() -> None:
    for fields in ({}, {"use_idwt": False}, {"wavelet_family": "sym5"}):
        assert not errors(make_bundle("WAVEFT", {"m.q.waveft_spectrum": (9,)}, scaling=25, **fields))
    bundle = make_bundle("WAVEFT", {"m.q.waveft_spectrum": (9,)}, scaling=25, wavelet_family="coif2")
    problems = find_errors(partial(read, bundle))
    assert "LF209" in [problem.code for problem in problems]
    assert "coiflet" in str(problems[0].found)


def make_tiny(drawn: Mapping[str, list[float]], vectors: int, **fields: Any) -> Bundle:
    """Return targets with one random matrix each, of rank 1 where there are three numbers."""
    arrays: dict[str, Any] = {f"base_model.tinylora_v.{each}": np.full(3, each) for each in range(vectors)}
    for name, numbers in drawn.items():
        parts = {"A": np.ones((1, 5)), "B": np.ones((6, 1)), "P": np.reshape(numbers, (3, 1, 1))}
        arrays |= {f"{PREFIX}{name}.tinylora_{part}": array for part, array in parts.items()}
    tensors = {key: MemoryFactor(key, array.astype(np.float32)) for key, array in arrays.items()}
    return Bundle(Path("adapter"), tensors, config={"peft_type": "TINYLORA", **fields})


PLACES = {
    "m.b": [0.33669036626815796, 0.12880940735340118, 0.23446236550807953],
    "m.a": [-0.6484010815620422, -0.7058414220809937, 0.6432183980941772],
    "m.c": [0.058945026248693466, -1.3944607973098755, 0.8447810411453247],
}
"""`torch.normal(0, 1, (3, 1, 1))` of the seeds 42, 43 and 44: the base has b before a before c."""


@pytest.mark.parametrize(
    ("tying", "given"), [(0.0, {"m.b": 0, "m.a": 1, "m.c": 2}), (0.5, {"m.b": 0, "m.a": 1, "m.c": 1})]
)
def test_random_matrices_tell_the_order_of_tinyloras_vectors(tying: float, given: dict[str, int]) -> None:
    adapter = read(make_tiny(PLACES, max(given.values()) + 1, weight_tying=tying))
    assert not adapter.problems
    found = {target.name: target.factors["tinylora_v"].read()[0] for target in adapter.targets}
    assert found == given


def test_vectors_of_tinylora_without_an_order() -> None:
    ones = {name: [1.0, 1.0, 1.0] for name in PLACES}
    assert errors(make_tiny(ones, 3)) == ["LF209"]
    assert errors(make_tiny(PLACES, 3, projection_seed=7)) == ["LF209"]
    assert errors(make_tiny(PLACES, 2)) == ["LF201"]
    assert not errors(make_tiny(ones, 1, weight_tying=1.0))


def test_indices_that_were_not_saved() -> None:
    codes = errors(make_bundle("SUPERTUNING", {"m.q.supertuning_values": (9,)}, save_precomputed_indices=False))
    assert set(codes) == {"LF201", "LF232"}


def test_places_that_were_saved_as_floats() -> None:
    """PEFT does so on Windows."""
    shapes = {"m.q.shira_weight": (4,), "m.q.shira_indices": (2, 4)}
    (target,) = read(make_bundle("SHIRA", shapes)).targets
    indices = target.factors["shira_indices"]
    assert (indices.dtype.name, indices.read().tolist()) == ("int32", [[1, 1, 1, 1], [1, 1, 1, 1]])
    assert not errors(make_bundle("SHIRA", shapes))
    odd = make_bundle("SHIRA", shapes)
    key = f"{PREFIX}m.q.shira_indices"
    broken = MemoryFactor(key, np.full((2, 4), 1.5, np.float32))
    problems = find_errors(partial(read, replace(odd, tensors={**odd.tensors, key: broken})))
    assert "LF210" in [problem.code for problem in problems]


def test_unilora_without_its_indices() -> None:
    shapes = {"base_model.unilora_theta_d": (9,)}
    with pytest.raises(LoraformatError) as caught:
        read(make_bundle("UNILORA", shapes))
    assert caught.value.codes == ("LF232",)


@pytest.mark.parametrize(
    ("module", "category"),
    [
        ("lin", "lin"),
        ("layers.0", "layers_0"),
        ("h.3.proj", "proj"),
        ("encoder.layer.0.attention.self.query", "self_query"),
        ("vision_model.encoder.layers.0.self_attn.q_proj", "self_attn_q_proj"),
        ("encoder.layer.0.attention.output.dense", "attention_output"),
        ("encoder.layer.0.output.dense", "output_dense"),
    ],
)
def test_categories_of_frod(module: str, category: str) -> None:
    """As PEFT's `_category_from_key` has them."""
    assert name_category(module) == category
    own = {f"{module}.frod_lambda_l": (4,), f"{module}.frod_lambda_s_values": (2,)}
    shared = {f"base_model.frod_V.{category}": (4, 4), "base_model.frod_V.another": (3, 3)}
    problems = find_errors(partial(read, make_bundle("FROD", {**own, **shared})))
    assert [(problem.code, problem.where) for problem in problems] == [("LF202", "base_model.frod_V.another")]


def test_names_of_a_raw_state_dict() -> None:
    bundle = make_bundle("OFT", {"m.q.oft_R.default.weight": (3, 6)})
    assert list(read(bundle).targets[0].factors) == ["oft_R.weight"]
    bundle = make_bundle("C3A", {"m.q.c3a_kernel.default": (3, 2, 4)})
    assert list(read(bundle).targets[0].factors) == ["c3a_kernel"]


def test_a_head_that_was_saved_whole_beside_it() -> None:
    adapter = read(make_bundle("IA3", {"m.q.ia3_l": (6, 1), "score.weight": (2, 6)}))
    assert [(target.name, target.kind) for target in adapter.targets] == [("m.q", "ia3"), ("score", "replace")]


def test_a_tensor_of_another_type_is_not_dropped() -> None:
    assert errors(make_bundle("IA3", {"m.q.ia3_l": (6, 1), "m.q.oft_r": (3, 6, 6)})) == ["LF202"]


@pytest.mark.parametrize("peft_type", ["PSOFT", "ADAMSS", "XLORA", "CPT", "NEW"])
def test_types_that_are_not_merged_say_why(peft_type: str) -> None:
    with pytest.raises(LoraformatError) as caught:
        read(make_bundle(peft_type, {"m.q.a": (2, 3)}))
    assert caught.value.codes == ("LF209",)
    assert repr(peft_type) in caught.value.problems[0].found
    assert "LORA" in caught.value.problems[0].expected


def test_a_configuration_alone_names_the_kind() -> None:
    bundle = Bundle(Path("adapter_config.json"), {}, config={"peft_type": "WAVEFT"})
    reading = SCHEME.check_config(bundle)
    assert list(reading.kinds) == ["waveft"]
    assert not reading.problems


def test_tables_of_other_types_mean_other_things() -> None:
    shapes = {"m.q.lora_A": (2, 5), "m.q.lora_B": (6, 2), "m.q.lora_E": (2, 1)}
    bundle = make_bundle("ADALORA", shapes, rank_pattern={"m.q": [True, False]}, target_modules=["q", "k"])
    assert SCHEME.check(bundle) == []


# --- written ---------------------------------------------------------------------------------------------------------

SD1 = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_"


def lokr(left: tuple[int, int], right: tuple[int, int], *ranks: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of w1 and w2; each is whole where its rank is 0."""
    shapes: dict[str, tuple[int, ...]] = {}
    for role, (rows, columns), rank in zip(("lokr_w1", "lokr_w2"), (left, right), ranks, strict=True):
        whole = {role: (rows, columns)}
        shapes |= {f"{role}_a": (rows, rank), f"{role}_b": (rank, columns)} if rank else whole
    return shapes


class TestOtherTypes(SchemeLaws):
    """Folders that go to LyCORIS' schemes and come back."""

    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        loha = {f"{SD1}{name}.{key[4:]}": shape for name in "qk" for key, shape in LOHA.items()}
        core = {f"conv_in.{role}": (2, 8) for role in ("hada_w1_a", "hada_w2_a")}
        core |= {f"conv_in.{role}": (2, 4) for role in ("hada_w1_b", "hada_w2_b")}
        core |= {"conv_in.hada_t1": (2, 2, 3, 3), "conv_in.hada_t2": (2, 2, 3, 3)}
        fields = {"target_modules": ["to_q", "to_k", "conv_in"]}
        pair = {f"{SD1}q.{role}": shape for role, shape in lokr((2, 3), (9, 8), 0, 2).items()}
        whole = {f"{SD1}k.{role}": shape for role, shape in lokr((2, 3), (3, 5), 0, 0).items()}
        return {
            "LoHa": make_bundle("LOHA", {**loha, **core}, r=2, alpha=3, use_effective_conv2d=True, **fields),
            "LoKr": make_bundle("LOKR", {**pair, **whole}, r=2, alpha=3, **fields),
            "(IA)³": make_bundle("IA3", {"m.k.ia3_l": (6, 1), "m.down.ia3_l": (1, 5)}, feedforward_modules=["down"]),
            "HRA": make_bundle("HRA", {"m.k.hra_u": (6, 2)}, r=2, apply_GS=True),
        }


def adapter_of(kind: str, modules: Mapping[str, Shapes], scaling: Scaling) -> Adapter:
    """Return an adapter that brings no configuration; the rank is that of the second factor of a product."""
    targets = []
    for name, shapes in modules.items():
        factors = {role: MemoryFactor(role, np.ones(shape, np.float32)) for role, shape in shapes.items()}
        rank = next((shape[0] for role, shape in shapes.items() if role.endswith("_b")), 0)
        targets.append(Target(name, kind, SlotKind.LINEAR, factors, rank, scaling))
    return Adapter(tuple(targets))


UNIT = Scaling(ScalingRule.MULTIPLIER, 1.0)
ALPHA = Scaling(ScalingRule.ALPHA_OVER_RANK, 3.0)


@pytest.mark.parametrize(
    ("shapes", "scaling", "fields"),
    [
        (lokr((2, 2), (9, 8), 0, 2), ALPHA, {"r": 2, "alpha": 3, "decompose_both": False, "decompose_factor": 2}),
        (lokr((2, 3), (3, 4), 0, 0), UNIT, {"r": 4, "alpha": 4, "decompose_both": False, "decompose_factor": -1}),
        (lokr((6, 6), (7, 9), 2, 2), ALPHA, {"r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": -1}),
    ],
)
def test_a_configuration_of_lokr_is_found(shapes: Shapes, scaling: Scaling, fields: Mapping[str, Any]) -> None:
    written = SCHEME.write(adapter_of("lokr", {"m.q": shapes}, scaling), NO_FACTS)
    assert not written.problems
    assert written.config is not None
    assert {name: written.config[name] for name in fields} == fields
    (target,) = read(Bundle(Path("adapter"), written.tensors, config=written.config)).targets
    assert target.scale == scaling.effective(2)


@pytest.mark.parametrize(
    "shapes",
    [
        lokr((2, 3), (9, 10), 0, 6),  # PEFT has w2 whole from rank 5 on
        lokr((6, 6), (7, 9), 3, 2),  # two ranks
        lokr((6, 6), (7, 9), 4, 4),  # w1 whole from rank 3 on
        lokr((4, 3), (9, 8), 0, 2),  # 36 rows and 24 columns: no factor gives 4 and 3
    ],
)
def test_what_peft_would_make_otherwise_is_refused(shapes: Shapes) -> None:
    written = SCHEME.write(adapter_of("lokr", {"m.q": shapes}, ALPHA), NO_FACTS)
    assert [problem.code for problem in written.problems] == ["LF312"]


def test_two_types_in_one_folder_are_refused() -> None:
    loha = {key[4:]: shape for key, shape in LOHA.items()}
    both = [adapter_of("loha", {"m.q": loha}, ALPHA), adapter_of("lokr", {"m.k": lokr((2, 3), (9, 8), 0, 2)}, ALPHA)]
    mixed = Adapter(tuple(target for each in both for target in each.targets))
    assert {problem.where for problem in SCHEME.write(mixed, NO_FACTS).problems} == {"m.q", "m.k"}


def test_a_configuration_that_says_something_else_by_now_is_not_kept() -> None:
    adapter = read(make_bundle("LOHA", LOHA, r=2, alpha=8, target_modules=["q"], rank_dropout=0.5))
    stronger = replace(adapter, targets=tuple(replace(each, scaling=ALPHA) for each in adapter.targets))
    written = SCHEME.write(stronger, NO_FACTS)
    assert not written.problems
    assert written.config is not None
    assert (written.config["alpha"], written.config["target_modules"]) == (3, ["m.q"])
    other = read(make_bundle("HRA", {"m.k.hra_u": (6, 2)}, r=2, apply_GS=True))
    changed = replace(other, targets=tuple(replace(each, options={"apply_GS": False}) for each in other.targets))
    assert [problem.code for problem in SCHEME.write(changed, NO_FACTS).problems] == ["LF312"]
