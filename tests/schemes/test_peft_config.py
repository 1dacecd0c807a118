"""`adapter_config.json`: fields of the wrong type, patterns, and options under which B·A is not the whole story."""

import re
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.adapter import Scaling, ScalingRule
from loraformat.errors import LoraformatError
from loraformat.problems import Problem
from loraformat.recognition.unmergeable import UNMERGEABLE
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes._peft.config import _OBSTACLES, PeftConfig, read_config
from loraformat.schemes._peft.fields import OF_LORA
from loraformat.schemes._peft.patterns import fits, fits_whole
from loraformat.schemes._peft.types import TYPES

PATH = Path("folder")


def config_of(**fields: Any) -> PeftConfig:
    """Return a configuration of PEFT 0.15 or newer, which writes `trainable_token_indices`."""
    return read_config({"peft_type": "LORA", "trainable_token_indices": None, **fields}, PATH)


def scale_of(target: str = "m.q", **fields: Any) -> float:
    scaling = config_of(**{"lora_alpha": 4, **fields}).scaling_of(target, NOT_STATED, PATH)
    return scaling.value


def codes_of(call: Any) -> tuple[str, ...]:
    with pytest.raises(LoraformatError) as caught:
        call()
    return caught.value.codes


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [[], {}, "8", True, False])
def test_alpha_is_a_number(value: Any) -> None:
    assert codes_of(lambda: scale_of(lora_alpha=value)) == ("LF213",)
    assert codes_of(lambda: scale_of(alpha_pattern={"q": value})) == ("LF213",)


@pytest.mark.parametrize("value", [8.0, "8", [8], {}, True, -1])
def test_a_rank_is_a_whole_number(value: Any) -> None:
    assert codes_of(lambda: config_of(r=value).rank_of("m.q", 2)) == ("LF213",)
    assert codes_of(lambda: config_of(r=2, rank_pattern={"q": value}).rank_of("m.q", 2)) == ("LF213",)


@pytest.mark.parametrize("value", [1, "true", [], {}, 0.0])
def test_a_flag_is_true_or_false(value: Any) -> None:
    assert codes_of(lambda: config_of(use_rslora=value).flag("use_rslora")) == ("LF213",)
    assert codes_of(lambda: scale_of(use_rslora=value)) == ("LF213",)


@pytest.mark.parametrize("value", [1, True, ["a"], {}])
def test_a_text_is_text(value: Any) -> None:
    assert codes_of(lambda: config_of(revision=value).text("revision")) == ("LF213",)


@pytest.mark.parametrize("value", [["q"], "q", 3])
@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
def test_patterns_are_an_object(table: str, value: Any) -> None:
    config = config_of(**{"r": 2, "lora_alpha": 4, table: value})
    read = (lambda: config.rank_of("m.q", 2)) if table == "rank_pattern" else (lambda: scale_of(**{table: value}))
    assert codes_of(read) == ("LF213",)


def test_null_is_as_good_as_absent() -> None:
    config = config_of(r=None, rank_pattern=None, alpha_pattern=None, use_rslora=None, revision=None, lora_alpha=4)
    assert config.rank_of("m.q", 7) == 7
    assert config.text("revision") is None
    assert config.scaling_of("m.q", NOT_STATED, PATH) == Scaling(ScalingRule.ALPHA_OVER_RANK, 4.0)


def test_errors_name_the_file_and_the_field() -> None:
    with pytest.raises(LoraformatError) as caught:
        config_of(use_rslora="yes").flag("use_rslora")
    assert caught.value.problems[0].where == "folder: adapter_config.json: use_rslora"
    assert "'yes'" in caught.value.problems[0].found


def test_the_lack_of_a_configuration_is_said() -> None:
    for config, found in ((read_config(None, PATH), "adapter_config.json"), (config_of(), "lora_alpha")):
        with pytest.raises(LoraformatError) as caught:
            config.scaling_of("m.q", NOT_STATED, PATH)
        assert caught.value.codes == ("LF211",)
        assert found in caught.value.problems[0].found
    assert read_config(None, PATH).check_type(Bundle(PATH, {})) == "LORA"


def test_a_multiplier_is_no_alpha() -> None:
    assert config_of().scaling_of("q", StatedScale(multiplier=2.0), PATH).rule is ScalingRule.MULTIPLIER


# --- obstacles -------------------------------------------------------------------------------------------------------

STANDING = {
    "alora_invocation_tokens": ([[1, 2], []], [None]),
    "arrow_config": ([{"arrow_top_k": 2}], [None, {}]),
    "use_qalora": ([True], [False, None]),
    "swift_type": (["LORA"], [None]),
    "layer_replication": ([[[0, 4], [2, 5]]], [None, []]),
    "init_lora_weights": (
        ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "PiSSA", "OLoRA"],
        [True, False, None, "gaussian", "eva", "orthogonal", "loftq", "mica"],
    ),
    "loftq_config": ([{"loftq_bits": 4}], [None, {}]),
}
CODES = {"layer_replication": "LF245", "init_lora_weights": "LF215", "loftq_config": "LF215"}


def test_every_obstacle_is_tried() -> None:
    other = {field.path for row in UNMERGEABLE for field in row.fields if "." not in field.path}
    assert {item.field for item in _OBSTACLES} | other == set(STANDING)


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, (bad, _) in STANDING.items() for value in bad], ids=str
)
def test_what_stands_against_a_merge(field: str, value: Any) -> None:
    (problem,) = config_of(**{field: value}).problems()
    assert problem.code == CODES.get(field, "LF209")
    assert problem.severity == "error"
    assert problem.where.endswith(f": {field}")
    assert len(problem.found) > len(repr(value))


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, (_, good) in STANDING.items() for value in good], ids=str
)
def test_what_does_not(field: str, value: Any) -> None:
    assert not config_of(**{field: value}).problems()


def test_all_obstacles_are_said_at_once() -> None:
    fields = {field: bad[0] for field, (bad, _) in STANDING.items()}
    assert len(config_of(**fields).problems()) == len(STANDING)


def test_fields_without_effect_on_the_numbers_have_none() -> None:
    harmless = {
        "lora_dropout": 0.1,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": ["q"],
        "inference_mode": True,
        "layers_to_transform": None,
        "layers_pattern": "layers",
        "a_field_of_next_year": None,
    }
    assert not config_of(**harmless).problems()


# --- fields that no PEFT known here has -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "value", "said"),
    [
        ("0.22.0", True, ("LF240", "error")),
        ("0.21.3.dev0@UNKNOWN", {"x": 1}, ("LF240", "error")),
        ("1.0", "trick", ("LF240", "error")),
        ("0.22.0", 16, ("LF241", "warning")),
        ("0.21.2", True, ("LF241", "warning")),
        (None, ["a"], ("LF241", "warning")),
        ("of the trainer", True, ("LF241", "warning")),
        ("0.22.0", False, None),
        ("0.22.0", [], None),
    ],
    ids=str,
)
@pytest.mark.parametrize("peft_type", ["LORA", "LOHA"])
def test_a_field_of_next_year(peft_type: str, version: str | None, value: Any, said: tuple[str, str] | None) -> None:
    config = config_of(peft_type=peft_type, peft_version=version, use_trick=value)
    problems = TYPES[peft_type].find_obstacles(config) if peft_type in TYPES else config.problems()
    assert [(each.code, each.severity) for each in problems] == ([said] if said else [])
    assert all(each.where.endswith(": use_trick") for each in problems)


def test_no_field_is_both_heeded_and_ignored() -> None:
    for name, row in TYPES.items():
        assert not set(row.ignores.split()) & row.fields.heeded, name
    assert {item.field for item in _OBSTACLES} <= OF_LORA["LORA"].heeded


# --- patterns --------------------------------------------------------------------------------------------------------


def peft_rule(pattern: str, name: str) -> bool:
    """`get_pattern_key` of peft/utils/other.py, as of 0.21."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.match(rf"(.*\.)?({pattern})$", name) is not None


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.experts.3.w1",
    "model.layers.0.self_attn.k_proj",
    "my_q_proj",
    "q_proj",
    "layersX0Yq_proj",
    "h.0.attn.c_attn",
    "a-b.c",
]
PATTERNS = [
    "q_proj",
    "self_attn.q_proj",
    "attn.q_proj",
    "_proj",
    "proj",
    "model.layers.0.self_attn.q_proj",
    "layers.0.q_proj",
    "layers.1",
    r"layers\.1\..*",
    r"layers\.\d+\.self_attn\.q_proj",
    r".*self_attn.*",
    r".*\.(q|k)_proj",
    r"model\.layers\.(0|1|10)\.self_attn\.(q|k|v|o)_proj",
    r"^model\.layers\.0\..*",
    r"^q_proj$",
    r"^q_proj",
    r"layers\.[0-5]\..+proj",
    r"layers\.[^1]\..+proj",
    r"layers\.\d{2}\..*",
    r"layers\.\d{1,2}(\.mlp)?\.self_attn\.[qk]_proj",
    r"(?:q|k)_pro?j",
    r".*experts\.\d+\.w[13]",
    r".*?q_proj",
    "",
    ".",
    ".*",
    "a|b.c",
    "(q_proj|)",
    "c_attn|k_proj",
    "[a-]-b.c",
    r"\w+-b\.c",
    r"^(?!.*mlp).*q_proj$",
    r".*\.(?!lm_head)[^.]*_proj",
    r"(?=.*self_attn)(?!.*k_proj).*",
    r"\bq_proj\b",
    r".*\bself_attn\b.*",
    r"(?<=attn\.)q_proj",
    r".*(?<!self_attn\.q_proj)(?<!w1)",
    r"(?:model\.)?(?:layers\.\d+\.)+self_attn\.(?P<which>[qk])_proj",
    r"(?i:MODEL).*q_PROJ|(?i:model).*(?-i:q_proj)",
    r"(?:.*?(?:language|text|layers).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|w1).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:q_proj|k_proj)))",
    r"(?:layers\.(?:[0-9]|1[0-5])\.)(?:.*\.)*[qk]_proj",
    r"(\w+\.){2,40}\w+",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_real_patterns_fit_as_in_peft(pattern: str) -> None:
    assert [fits(pattern, name) for name in NAMES] == [peft_rule(pattern, name) for name in NAMES]


ATOMS = st.sampled_from(
    [
        *("a", "b", ".", r"\.", "ab", "[ab]", "[^a]", r"\d", r"\w", "1", "-", "^", "$", "(", ")", "(?:", "|", "|", "_"),
        *("(?=", "(?!", "(?<=", "(?<!", r"\b", r"\B", ")", ")", "(?i:", "A"),
    ]
)
QUANTIFIERS = st.sampled_from(["", "", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{,2}", "{1,2}", "{0}"])
PIECES = st.lists(st.tuples(ATOMS, QUANTIFIERS).map("".join), max_size=7).map("".join)
PATHS = st.lists(st.text("ab1_-", max_size=3), min_size=1, max_size=4).map(".".join)


@given(pattern=PIECES, names=st.lists(PATHS, min_size=1, max_size=4))
def test_any_pattern_fits_as_in_peft_or_is_refused(pattern: str, names: list[str]) -> None:
    try:
        found = [fits(pattern, name) for name in names]
    except ValueError:
        return
    assert found == [peft_rule(pattern, name) for name in names]


@given(pattern=PIECES, names=st.lists(PATHS, min_size=1, max_size=4))
def test_whole_names_fit_as_in_peft_or_are_refused(pattern: str, names: list[str]) -> None:
    """The expressions of target_modules."""
    try:
        found = [fits_whole(pattern, name) for name in names]
    except ValueError:
        return
    assert found == [re.fullmatch(pattern, name) is not None for name in names]


def test_flags_stand_at_the_start_of_a_whole_expression() -> None:
    assert fits_whole("(?i).*Q_PROJ", "m.q_proj")
    assert not fits_whole("(?s).*Q_PROJ", "m.q_proj")
    with pytest.raises(ValueError, match="at its start"):
        fits("(?i)Q_PROJ+", "m.q_proj")  # PEFT writes it behind `(.*\\.)?`, where Python refuses it.


@given(pattern=st.text(max_size=30), name=st.text(max_size=30))
def test_any_text_is_a_pattern_or_refused(pattern: str, name: str) -> None:
    with suppress(ValueError):
        assert fits(pattern, name) in (True, False)


HOSTILE = [
    ("(a+)+$", "a" * 50),
    ("(a|a)*b", "a" * 50),
    ("(a*)*b", "a" * 50),
    ("a?" * 60 + "a" * 60, "a" * 60),
    ("(a|aa)" * 80 + "b", "a" * 120),
    (".*.*.*.*.*x", "." * 4000),
    (".*" * 200 + "x", "a" * 4000),
    ("(.*)" * 100 + "x", "a." * 2000),
    ("[^x]*" * 90 + "x", "a" * 4000),
    ("a{20}" * 80, "a" * 4000),
    ("(" * 200 + "a" + ")" * 200, "a"),
    ("a{99999999999999}", "a"),
    ("(?=a)" * 50, "a"),
    (r"(a)\1", "aa"),
    ("a*+b", "aab"),
    ("(?i)A", "a"),
    ("a" * 4001 + "*", "a"),
    ("((((a*)*)*)*)*b", "a" * 300),
    ("(?=(?=(?=(?=.*a.*).*a.*).*a.*).*a.*)" * 20 + "b", "a" * 400),
    ("(?:.*(?!.*(?!.*(?!.*(?!b)))))*", "a" * 300),
    ("(a?){999}" * 50, "a" * 300),
    ("(((((a|b?){99}){99}){99}){99}){99}", "ab" * 90),
    ("(?<=" + "a" * 900 + ")" + "a*b", "a" * 4000),
    ("[", "a"),
    ("(", "a"),
    ("*", "a"),
    ("[z-a]", "a"),
    ("[[a]x", "ax"),
    ("\\", "a"),
    (r"\bq", "q"),
    ("(" * 5000, "a"),
]


@pytest.mark.parametrize(("pattern", "name"), HOSTILE, ids=lambda text: text[:12])
def test_hostile_patterns_cost_nothing(pattern: str, name: str) -> None:
    started = time.process_time()
    problems: tuple[Problem, ...] = ()
    try:
        scale_of(name, alpha_pattern={pattern: 8})
    except LoraformatError as error:
        problems = error.problems
    assert time.process_time() - started < 2
    assert all(problem.code == "LF213" for problem in problems)
    assert all("pattern" in problem.found and "alpha_pattern" in problem.where for problem in problems)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(a)\1", "(?P<x>a)(?P=x)", "(a)?(?(1)b|c)", "(?>a)", "a*+", "(?i)a", "(?<=a+)b", "(?<=a|bc)d"),
        *("[", "(", "a)", "*", "\\", "a{1000}", "a{2,1}", "^*", "a**", "(?P<x>a)(?P<x>b)", "(?x:a b)"),
    ],
)
def test_what_is_no_simple_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        fits(pattern, "m.q")


def test_a_thousand_names_as_patterns_take_no_time() -> None:
    """AdaLoRA and extracted adapters give every module a rank of its own."""
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(250) for part in "qkvo"]
    config = config_of(r=8, rank_pattern={name: index for index, name in enumerate(names)})
    started = time.process_time()
    assert [config.rank_of(name, 8) for name in names[::10]] == list(range(0, 1000, 10))
    assert time.process_time() - started < 3


def test_the_first_pattern_that_fits_counts() -> None:
    assert scale_of("m.q", alpha_pattern={"q": 1, "m.q": 2}) == 1
    assert scale_of("m.q", alpha_pattern={"m.q": 2, "q": 1}) == 2
    assert scale_of("m.q", alpha_pattern={"v": 3, ".*": 5, "q": 1}) == 5
    assert scale_of("m.q", alpha_pattern={"v": 3}) == 4
    assert scale_of("m.q_proj", alpha_pattern={"q": 3}) == 4


def test_rank_and_alpha_have_patterns_of_their_own() -> None:
    config = config_of(r=8, lora_alpha=4, rank_pattern={"q": 16}, alpha_pattern={"m.*": 32})
    assert config.rank_of("m.q", 1) == 16
    assert config.rank_of("m.v", 1) == 8
    assert config.scaling_of("m.v", NOT_STATED, PATH).value == 32


@given(patterns=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 99), max_size=5), name=st.sampled_from(NAMES))
def test_the_choice_is_peft_s(patterns: dict[str, int], name: str) -> None:
    chosen = next((key for key in patterns if peft_rule(key, name)), None)
    assert scale_of(name, alpha_pattern=patterns) == (4 if chosen is None else patterns[chosen])
