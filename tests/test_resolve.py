"""From names of targets to weights: the right one or an error that helps, never a wrong one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graphs import make_adapter, make_target
from loraformat.adapter import SlotKind, Target
from loraformat.bases import Site, Weight
from loraformat.dtypes import BY_NAME
from loraformat.problems import Problem
from loraformat.resolve import Resolution, resolve
from loraformat.spans import Span, StoredTensor

LINEAR = {SlotKind.LINEAR: False, SlotKind.LINEAR_TRANSPOSED: False}
OUT, IN, RANK = 7, 5, 2


@dataclass(frozen=True)
class Bytes:
    """A file for tensors whose numbers matter only where copies are compared."""

    content: str

    def read(self, offset: int, length: int) -> bytes:
        return self.content.encode()


def site(
    module: str,
    shape: tuple[int, ...] = (OUT, IN),
    *,
    weight: str = "",
    identity: str = "",
    orientations: Mapping[SlotKind, bool] = LINEAR,
    divisor: float = 1.0,
    others: Sequence[str] = (),
    obstacle: Problem | None = None,
    content: str = "",
) -> Site:
    """Return a site; its weight is called `<module>.weight` and nothing else reads it, unless said otherwise."""
    name, identity = weight or f"{module}.weight", identity or f"node of {module}"
    tensor = StoredTensor(name, BY_NAME["float32"], shape, Span(Path("w"), 0, 4), cast(Any, Bytes(content or name)))
    held = None if obstacle else Weight(name, name, tensor, frozenset([identity, *others]))
    return Site(identity, module, "node name", orientations, held, divisor, obstacle)


def target(name: str, out: int = OUT, inner: int = IN, slot: SlotKind = SlotKind.LINEAR, *kernel: int) -> Target:
    down = np.ones((RANK, inner, *kernel), np.float32)
    return make_target(name, (down, np.ones((out, RANK, *(1 for _ in kernel)), np.float32)), slot)


def outcome(targets: Sequence[str | Target], sites: Sequence[Site | str], **options: Any) -> Resolution:
    made = [target(item) if isinstance(item, str) else item for item in targets]
    return resolve(make_adapter(*made), [site(item) if isinstance(item, str) else item for item in sites], **options)


def pairs(found: Resolution) -> dict[str, str]:
    """Return the resolved targets and the weights that they lead to; there must be no error."""
    assert errors(found) == []
    return {match.target.name: match.weight.name for match in found.matches}


def codes(found: Resolution) -> list[str]:
    return [problem.code for problem in found.problems]


def errors(found: Resolution) -> list[Problem]:
    return [problem for problem in found.problems if problem.severity == "error"]


# --- names that fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.0.q", "model.layers.0.q"),
        ("layers.0.q", "model.layers.0.q"),
        ("layers.0.q", "wrapper.model.layers.0.q"),
        ("layers.0.q", "models.3.layers.0.q"),
        ("model.layers.0.q", "layers.0.q"),
        ("base.model.layers.0.q", "layers.0.q"),
        ("layers.1.q", "1.q"),
        ("lm_head", "model.lm_head"),
        ("0", "seq.0"),
    ],
    ids=lambda text: text,
)
def test_a_wrapper_on_either_side_is_no_obstacle(name: str, module: str) -> None:
    assert pairs(outcome([name], [module, "another.thing"])) == {name: f"{module}.weight"}


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("layer.1.x", "x"),
        ("layers.1.q", "layers.11.q"),
        ("layers.11.q", "layers.1.q"),
        ("blocks1.q", "q"),
        ("up.0.conv2.x", "conv2.x"),
        ("q", "xq"),
        ("xq", "q"),
        ("a.q", "b.q"),
        ("model.layers.0.q", "layers.0"),
        ("layers.0.q", "layers.0.q.extra"),
        ("a.b", "a_b"),
        ("a", ""),
        ("A.q", "a.q"),
    ],
    ids=lambda text: text,
)
def test_what_only_looks_alike_is_not_taken(name: str, module: str) -> None:
    found = outcome([name], [module])
    assert found.matches == ()
    assert codes(found) == ["LF401"]


def test_an_exact_name_beats_longer_and_shorter_ones() -> None:
    found = outcome(["model.q"], ["model.q", "wrapper.model.q", "q"])
    assert pairs(found) == {"model.q": "model.q.weight"}


def test_a_name_with_two_readings_is_read_as_the_unambiguous_ones_are() -> None:
    sites = ["text.layers.0.q", "text.layers.1.q", "text.norm.x", "image.layers.0.q"]
    found = outcome(["layers.0.q", "layers.1.q", "norm.x"], sites)
    assert pairs(found) == {
        "layers.0.q": "text.layers.0.q.weight",
        "layers.1.q": "text.layers.1.q.weight",
        "norm.x": "text.norm.x.weight",
    }


def test_the_matching_does_not_depend_on_the_order_of_sites() -> None:
    sites = ["text.layers.0.q", "text.layers.1.q", "image.layers.0.q"]
    targets = ["layers.0.q", "layers.1.q"]
    assert pairs(outcome(targets, sites)) == pairs(outcome(targets, sites[::-1]))


def test_strip_prefix_is_taken_off_before_matching() -> None:
    found = outcome(["encoder.block.0.q"], ["block.0.q", "other"], strip_prefix="encoder.")
    assert pairs(found) == {"encoder.block.0.q": "block.0.q.weight"}
    assert codes(outcome(["layers.0.x"], ["x"])) == ["LF401"]
    assert pairs(outcome(["layers.0.x"], ["x"], strip_prefix="layers.0.")) == {"layers.0.x": "x.weight"}


def test_strip_prefix_leaves_names_that_lack_it() -> None:
    found = outcome(["encoder.a", "b"], ["a", "b"], strip_prefix="encoder.")
    assert pairs(found) == {"encoder.a": "a.weight", "b": "b.weight"}


# --- names that do not lead to one weight ----------------------------------------------------------------------------


def test_two_targets_on_one_weight_are_refused_and_both_named() -> None:
    found = outcome(["text_model.layers.0.q", "vision_model.layers.0.q"], ["layers.0.q"])
    (problem,) = errors(found)
    assert problem.code == "LF404"
    assert "text_model.layers.0.q" in problem.where
    assert "vision_model.layers.0.q" in problem.where
    assert "--strip-prefix" in problem.advice


def test_the_very_name_of_a_weight_beats_one_that_drops_a_prefix() -> None:
    found = outcome(["layers.0.q", "vision_model.layers.0.q"], ["layers.0.q"])
    assert {match.target.name for match in found.matches} == {"layers.0.q"}
    assert [(problem.code, problem.where) for problem in errors(found)] == [("LF401", "vision_model.layers.0.q")]


T5 = ["encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q", "decoder.block.1.q"]


@pytest.mark.parametrize("names", [T5, T5[:2], T5[2:]], ids=["both", "encoder", "decoder"])
def test_a_half_of_an_encoder_decoder_is_never_taken_for_the_other(names: list[str]) -> None:
    """T5's encoder exported alone drops `encoder.`; then the decoder's names fit it as well (reference 5.4)."""
    found = outcome(names, ["block.0.q", "block.1.q"])
    assert found.matches == ()
    assert {problem.code for problem in errors(found)} == {"LF401"}
    assert all(name in " ".join(problem.where for problem in errors(found)) for name in names)


def test_the_t5_case_is_mended_by_strip_prefix() -> None:
    sites = ["block.0.q", "block.1.q"]
    found = outcome(T5, sites, strip_prefix="encoder.", allow_unmatched=["decoder.*"])
    assert pairs(found) == {name: f"{name.removeprefix('encoder.')}.weight" for name in T5[:2]}
    assert sorted(found.unmatched) == T5[2:]


def test_dropping_a_prefix_is_told_once_for_each_prefix() -> None:
    found = outcome(["base.a.x", "base.b.x", "c.y"], ["a.x", "b.x", "y"])
    assert [(p.code, p.severity, p.where) for p in found.problems] == [
        ("LF306", "warning", "base."),
        ("LF306", "warning", "c."),
    ]
    assert "2 targets" in found.problems[0].found
    assert outcome(["a.x"], ["wrapper.a.x"]).problems == ()
    assert outcome(["base.a.x"], ["a.x"], strip_prefix="base.").problems == ()


def test_a_name_with_two_equal_readings_is_refused() -> None:
    found = outcome(["layers.0.q"], ["text.layers.0.q", "image.layers.0.q"])
    assert codes(found) == ["LF404"]
    assert "text.layers.0.q" in found.problems[0].found
    assert "image.layers.0.q" in found.problems[0].found


def test_one_module_with_two_weights_that_fit_is_refused() -> None:
    found = outcome(["a"], [site("a", weight="w1", identity="1"), site("a", weight="w2", identity="2")])
    assert codes(found) == ["LF404"]


def test_copies_of_one_weight_are_one_weight() -> None:
    """Exporters may write a weight once for each call of its module: equal to the last bit, all of them are changed."""
    sites = [site("a", weight=f"w{index}", identity=str(index), content="same") for index in (1, 2, 3)]
    found = outcome(["a"], sites)
    assert errors(found) == []
    assert [[weight.name for weight in match.weights] for match in found.matches] == [["w1", "w2", "w3"]]


def test_equal_weights_of_two_modules_are_no_copies() -> None:
    sites = [site(f"{part}.a", weight=part, content="same") for part in ("text", "image")]
    assert codes(outcome(["a"], sites)) == ["LF404"]


def test_a_copy_that_another_part_reads_is_refused() -> None:
    sites = [
        site("a", weight="w1", identity="1", content="same"),
        site("a", weight="w2", identity="2", content="same", others=["stranger"]),
    ]
    assert codes(outcome(["a"], sites)) == ["LF402"]


@pytest.mark.parametrize("difference", [{"divisor": 2.0}, {"orientations": dict.fromkeys(LINEAR, True)}], ids=str)
def test_one_weight_used_in_two_manners_is_refused(difference: dict[str, Any]) -> None:
    sites = [
        site("a", (5, 5), weight="w", identity=str(index), others=["0", "1"], **more)
        for index, more in enumerate(({}, difference))
    ]
    found = outcome([target("a", 5, 5)], sites)
    assert codes(found) == ["LF404"]


def test_a_module_at_two_nodes_with_one_weight_is_one_match() -> None:
    sites = [site("a", weight="w", identity=str(index), others=["0", "1"]) for index in (0, 1)]
    found = outcome(["a"], sites)
    assert pairs(found) == {"a": "w"}
    assert len(found.matches[0].sites) == 2


def test_a_weight_that_another_part_reads_is_refused() -> None:
    found = outcome(["a"], [site("a", others=["Gather 'embed'"])])
    assert codes(found) == ["LF402"]
    assert "Gather 'embed'" in found.problems[0].found


def test_an_obstacle_is_reported_with_its_own_reason() -> None:
    problem = Problem("LF407", "Conv 'c'", "BatchNorm", "its own weight", "Export it again.")
    found = outcome(["a"], [site("a", obstacle=problem)])
    assert [(p.code, p.found, p.advice) for p in found.problems] == [("LF407", "BatchNorm", "Export it again.")]
    assert "a" in found.problems[0].where


def test_an_obstacle_at_one_of_two_nodes_stops_the_merge() -> None:
    """The other node would change and this one not."""
    problem = Problem("LF403", "MatMul 'm'", "Reshape")
    found = outcome(["a"], [site("a"), site("a", identity="2", obstacle=problem)])
    assert codes(found) == ["LF403"]


# --- targets without a weight ----------------------------------------------------------------------------------------


def test_a_missing_target_lists_what_is_near() -> None:
    found = outcome(["model.layers.0.self_attn.q_proj"], ["model.layers.0.attn.q_proj", "something.else"])
    assert codes(found) == ["LF401"]
    assert "model.layers.0.attn.q_proj" in found.problems[0].found
    assert "something.else" not in found.problems[0].found


def test_nothing_near_is_said_so() -> None:
    assert "none near" in outcome(["zzzz"], ["model.layers.0.attn"]).problems[0].found


def test_weights_without_a_module_are_offered_to_a_map() -> None:
    """Keras and Paddle name weights as they like, and nodes by number."""
    fitting, other = site("", weight="fc/kernel:0"), site("", (OUT + 1, IN), weight="fc_1/kernel:0")
    (problem,) = outcome(["fc"], [fitting, other]).problems
    assert problem.code == "LF401"
    assert problem.found.endswith(": fc/kernel:0")
    assert "--map" in problem.mend


def test_two_weights_of_one_name_are_told_apart_by_their_readers() -> None:
    """Two branches of a model, each with weights of its own under the same names."""
    twins = [site("a", identity=f"Conv 'c' ({branch})", content=branch) for branch in ("then", "else")]
    twins = [replace(each, evidence="initializer name") for each in twins]
    (problem,) = outcome(["a"], twins).problems
    assert problem.code == "LF404"
    assert "at Conv 'c' (then)" in problem.found


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_many_missing_targets_are_summed_up_and_all_named(count: int) -> None:
    names = [f"layers.{index:02}.lost" for index in range(count)]
    found = outcome([*names, "kept"], ["kept"])
    assert codes(found) == ["LF401"] * min(count, 9)
    said = "\n".join(str(problem) for problem in found.problems)
    assert all(name in said for name in names)
    assert [match.target.name for match in found.matches] == ["kept"]


@pytest.mark.parametrize(
    ("patterns", "left_out", "errors"),
    [
        ([], [], 3),
        (["decoder.*"], ["decoder.1.k", "decoder.2.k"], 1),
        (["decoder.1.*", "head"], ["decoder.1.k", "head"], 1),
        (["*"], ["decoder.1.k", "decoder.2.k", "head"], 0),
        (["HEAD", "dec"], [], 3),
        (["kept"], [], 3),
    ],
    ids=str,
)
def test_targets_may_be_left_out_by_pattern(patterns: list[str], left_out: list[str], errors: int) -> None:
    found = outcome(["decoder.1.k", "decoder.2.k", "head", "kept"], ["kept"], allow_unmatched=patterns)
    assert sorted(found.unmatched) == left_out
    assert codes(found) == ["LF401"] * errors
    assert [match.target.name for match in found.matches] == ["kept"]


@pytest.mark.parametrize("wrong", [site("a", (9, 9)), site("a", others=["x"])], ids=["shape", "shared"])
def test_leaving_out_forgives_absence_alone(wrong: Site) -> None:
    found = outcome(["a"], [wrong], allow_unmatched=["*"])
    assert codes(found)[0] in {"LF405", "LF402"}
    assert found.unmatched == ()


# --- shapes and slots ------------------------------------------------------------------------------------------------


def test_a_shape_that_does_not_fit() -> None:
    found = outcome(["a"], [site("a", (OUT, 9))])
    assert codes(found) == ["LF405"]
    assert f"({OUT}, 9)" in found.problems[0].found
    assert f"({OUT}, {IN})" in found.problems[0].expected
    assert "transposed" not in found.problems[0].found


def test_a_shape_that_would_fit_transposed_is_said_and_not_guessed() -> None:
    found = outcome(["a"], [site("a", (IN, OUT))])
    assert codes(found) == ["LF405"]
    assert "transposed" in found.problems[0].found


@pytest.mark.parametrize("turned", [False, True])
def test_the_site_decides_the_orientation(turned: bool) -> None:
    shape = (IN, OUT) if turned else (OUT, IN)
    found = outcome(["a"], [site("a", shape, orientations=dict.fromkeys(LINEAR, turned))])
    assert [match.transposed for match in found.matches] == [turned]


def test_shapes_choose_between_the_nodes_of_one_module() -> None:
    """A rotary table, say, multiplied inside the module: not of the factors' shape."""
    found = outcome(["a"], [site("a", (3, 3), identity="table"), site("a", identity="weight", weight="w")])
    assert pairs(found) == {"a": "w"}


def test_a_slot_of_another_kind() -> None:
    found = outcome([target("a", OUT, IN, SlotKind.EMBEDDING)], [site("a")])
    assert codes(found) == ["LF408"]
    assert "linear" in found.problems[0].found
    assert "embedding" in found.problems[0].expected


def test_slots_choose_between_two_uses_of_one_name() -> None:
    """A tied table: the adapter's slot says whether it is meant as a lookup or as a matrix."""
    table = site("a", (IN, OUT), identity="lookup", weight="t", orientations={SlotKind.EMBEDDING: True})
    assert pairs(outcome([target("a", OUT, IN, SlotKind.EMBEDDING)], [table, site("a", weight="m")])) == {"a": "t"}
    assert pairs(outcome(["a"], [table, site("a", weight="m")])) == {"a": "m"}


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (1, 2, 3)], ids=str)
def test_kernels_fit_whole(kernel: tuple[int, ...]) -> None:
    conv = target("a", OUT, IN, SlotKind.CONV, *kernel)
    good = site("a", (OUT, IN, *kernel), orientations={SlotKind.CONV: False})
    bad = site("a", (OUT, IN, *kernel[:-1], 9), orientations={SlotKind.CONV: False})
    assert pairs(outcome([conv], [good])) == {"a": "a.weight"}
    assert codes(outcome([conv], [bad])) == ["LF405"]


# --- random trees ----------------------------------------------------------------------------------------------------

PARTS = st.sampled_from(["model", "encoder", "decoder", "layers", "block", "q", "k", "fc", "0", "1", "11", "2"])
PATHS = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
TREES = st.sets(PATHS, min_size=1, max_size=14)


@given(tree=TREES, chosen=st.sets(st.integers(0, 13), min_size=1), data=st.data())
def test_wrapping_the_export_keeps_every_weight(tree: set[str], chosen: set[int], data: st.DataObject) -> None:
    """The exported model is the trained one below another module: the right weight, or an error."""
    modules = sorted(tree)
    names = [modules[index % len(modules)] for index in sorted(chosen)]
    prefix = data.draw(st.one_of(st.just(""), PATHS.map(lambda path: f"wrap.{path}.")))
    sites = [f"{prefix}{module}" for module in data.draw(st.permutations(modules))]
    found = outcome(sorted(set(names)), sites)
    for match in found.matches:
        assert match.weight.name == f"{prefix}{match.target.name}.weight"
    if not prefix:
        assert errors(found) == []


@given(tree=TREES, data=st.data())
def test_exporting_a_part_keeps_every_weight_or_is_refused(tree: set[str], data: st.DataObject) -> None:
    """A sub-module exported alone; all of the model was trained, so that names of other parts may fit it too.

    What holds: every match is of a target of the part itself, or the names collide and the merge is refused.
    """
    modules = sorted(tree)
    part = data.draw(st.sampled_from(["model.", "encoder.", "decoder.", "layers."]))
    inside = [module.removeprefix(part) for module in modules if module.startswith(part)]
    assume(inside)
    found = outcome(modules, inside)
    taken = [match.weight.name for match in found.matches]
    if not errors(found):
        assert len(set(taken)) == len(taken) == len(modules)
    for match in found.matches:
        name, module = match.target.name, match.weight.name.removesuffix(".weight")
        assert name == module or name.endswith(f".{module}") or module.endswith(f".{name}")
        dropped = name.removesuffix(module) if name.endswith(module) else ""
        assert not any(character.isdigit() for character in dropped)


@given(tree=TREES, stranger=PATHS)
def test_every_target_is_a_match_or_left_out_or_a_problem(tree: set[str], stranger: str) -> None:
    modules = sorted(tree)
    names = sorted({*modules[::2], stranger})
    found = outcome(names, modules, allow_unmatched=["q*"])
    said = " ".join(f"{problem.where} {problem.found}" for problem in found.problems)
    for name in names:
        matched = sum(match.target.name == name for match in found.matches)
        assert matched + (name in found.unmatched) == 1 or name in said.replace(";", " ").split() or name in said


@given(st.lists(st.integers(0, 120), min_size=1, max_size=12, unique=True), st.integers(0, 120))
def test_layer_numbers_are_never_mixed_up(layers: list[int], wanted: int) -> None:
    found = outcome([f"layers.{wanted}.q"], [f"model.layers.{layer}.q" for layer in layers])
    if wanted in layers:
        assert pairs(found) == {f"layers.{wanted}.q": f"model.layers.{wanted}.q.weight"}
    else:
        assert codes(found) == ["LF401"]
