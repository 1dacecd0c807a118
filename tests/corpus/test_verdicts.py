"""The verdict on every real adapter file and configuration, and why.

The files are of others and not part of this project: they are looked for in `shared/corpus` beside the checkout, or
where LORAFORMAT_CORPUS says. What is expected was written down by hand, from the files' own README and from what their
libraries do; nothing of it was taken from a run.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import write_tensors
from loraformat import Verdict
from loraformat.api import validate

CORPUS = Path(os.environ.get("LORAFORMAT_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))
if not CORPUS.is_dir():
    pytest.skip(f"no folder {CORPUS}; LORAFORMAT_CORPUS names another", allow_module_level=True)

Codes = Mapping[str, str]
"""Reason code to severity."""


@dataclass(frozen=True)
class Expected:
    """The verdict on one path.

    Attributes:
        path: below the corpus.
        codes: how often each code is said, with its severity.
        why: why this is right.
        scheme: what it is read as; empty for what this version does not read.
        targets: how many targets it has.
        said: text that some problem holds.
        alpha: the scale that a user would state.
    """

    path: str
    codes: Mapping[tuple[str, str], int]
    why: str
    scheme: str = ""
    targets: int = 0
    said: tuple[str, ...] = ()
    alpha: float | None = None


UNKNOWN = ("LF121", "error")
UNMERGEABLE = ("LF209", "error")
IMPOSTOR = ("LF111", "error")
NO_SCALE = ("LF211", "error")

FILES = (
    Expected(
        "Tashu014__lora-imdb-distilbert",
        {("LF217", "warning"): 1},
        "Two heads are saved whole, and take the place of the base's. pre_classifier is not in modules_to_save: PEFT "
        "took it along because its name ends with classifier, and trained it, so that it belongs to the adapter; a "
        "warning, since its author may not know. score is in the list by itself, as PEFT adds it.",
        "peft",
        14,
        ("pre_classifier", "ends with 'classifier'"),
    ),
    Expected("abrhaleyarefaine1997__gpt2-tigrinya-lora", {}, "plain LoRA over Conv1D, sound", "peft", 36),
    Expected("guilhermmeabreu__lab_08", {}, "plain LoRA in bfloat16, sound", "peft", 24),
    Expected(
        "ao-wei__gemma3-270m-svg-lora-partb/adapter",
        {NO_SCALE: 1},
        "No adapter_config.json beside it: the scale is in no file, and is never guessed.",
        "peft",
        72,
        ("no adapter_config.json",),
    ),
    Expected(
        "ao-wei__gemma3-270m-svg-lora-partb/adapter",
        {("LF211", "note"): 1},
        "With alpha given nothing is wrong; that the file does not say it stays worth a note.",
        "peft",
        72,
        ("4, as you say",),
        alpha=16,
    ),
    Expected(
        "FaithSang__anime-lora-gnerator/model/adapter_model.safetensors",
        {NO_SCALE: 1},
        "PEFT's file of a UNet without its configuration.",
        "peft",
        96,
    ),
    Expected(
        "FaithSang__anime-lora-gnerator/model/pytorch_lora_weights.safetensors",
        {("LF323", "note"): 1},
        "diffusers' names without a component; alpha stands in lora_adapter_metadata.",
        "diffusers",
        96,
    ),
    Expected(
        "foundation-model-stack__fms-hf-tuning/tests/artifacts/tuned_llama_with_added_tokens",
        {NO_SCALE: 1},
        "One pair of factors without a scale. Both tables are saved whole and need none; whether the base has grown by "
        "the added tokens is for the base to say (LF405).",
        "peft",
        3,
        ("no adapter_config.json",),
    ),
    Expected(
        "JOSASA__gpt2",
        {IMPOSTOR: 1},
        "The file is a git-LFS pointer: the mend is git lfs pull, not a complaint about headers.",
        said=("git-LFS pointer",),
    ),
    Expected(
        "Inishpy__lerobot-libero",
        {UNKNOWN: 1},
        "Named as PEFT's file, it holds 303 alphas and as many dropout rates, and no factors at all.",
        said=("606 tensors", "alpha", "dropout_p"),
    ),
    Expected(
        "huggingface__peft/tests/regression/ia3_opt-350m/0.6.1",
        {UNKNOWN: 1},
        "IA3 without its configuration: vectors, no factors. It must not pass for LoRA.",
        said=("ia3_l",),
    ),
    Expected(
        "microsoft__LoRA/examples/NLU/roberta_base_lora_mnli.bin",
        {("LF211", "note"): 1},
        "loralib's checkpoint of query and value in 12 layers, with a head of two layers; alpha is nowhere.",
        "loralib",
        26,
        alpha=16,
    ),
    Expected(
        "cloneofsimo__lora/example_loras/lora_kiriko2.text_encoder.pt",
        {NO_SCALE: 1},
        "A list of 48 pairs: their order, which CLIP's 12 layers of 4 projections fit, is their only name. Nothing "
        "says the scale.",
        "cloneofsimo",
        48,
    ),
    Expected(
        "cloneofsimo__lora/example_loras/lora_disney.safetensors",
        {NO_SCALE: 1, ("LF209", "error"): 2},
        "Numbered modules of Stable Diffusion 1, attention and GEGLU, which one order fits; two token embeddings, that "
        "change no weight that a checkpoint has. Nothing says the scale.",
        "cloneofsimo",
        194,
        ("token embedding",),
    ),
    Expected(
        "IBM__text-generation-inference/integration_tests/prompt_prefixes/tinyllama_peft_adapter",
        {UNMERGEABLE: 1},
        "Virtual tokens: no weight holds them.",
        said=("tensors such as prompt_embeddings", "virtual tokens", "changes no weight"),
    ),
    Expected(
        "KohakuBlueleaf__LyCORIS/result/smart_falcon_4_lokr.safetensors",
        {("LF214", "warning"): 3, ("LF323", "note"): 2},
        "LoKr under kohya's names; three modules have a factor of zeros, as its README says.",
        "kohya",
        350,
    ),
    Expected(
        "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.safetensors",
        {("LF321", "note"): 1, ("LF323", "note"): 1},
        "the oldest names of diffusers, which have no place for a scale: every reader takes 1",
        "diffusers",
        128,
    ),
    Expected(
        "wyek1n__MLX-CLI/adapters/0000100_adapters.safetensors",
        {("LF211", "note"): 1},
        "mlx-lm's names, its factors lying the other way round; q and v of 4 layers. Its configuration is missing.",
        "mlx",
        8,
        alpha=16,
    ),
    Expected(
        "debian__onnxruntime-1.21.0/onnxruntime/test/testdata/lora/two_params_lora_model.onnx_adapter",
        {UNKNOWN: 1},
        "onnxruntime's flatbuffer is read; its tensors have no names of factors, since the graph gives them a sense.",
        said=("lora_param_a, lora_param_b",),
    ),
)


def judge(path: Path, **options: Any) -> Verdict:
    (verdict,) = [each for each in validate(path, **options) if each.path == path]
    return verdict


@pytest.mark.parametrize("expected", FILES, ids=lambda expected: expected.path.split("__")[0])
def test_files(expected: Expected) -> None:
    path = CORPUS / expected.path
    if not path.exists():
        pytest.skip(f"no {expected.path} in the corpus")
    verdict = judge(path, alpha=expected.alpha)
    assert Counter((problem.code, problem.severity) for problem in verdict.problems) == expected.codes, expected.why
    assert (verdict.scheme, verdict.targets) == (expected.scheme, expected.targets)
    told = "\n".join(map(str, verdict.problems))
    assert all(text in told for text in expected.said), told


def test_every_file_of_the_corpus_is_in_the_table() -> None:
    """A file that comes new into the corpus wants a verdict that somebody defends."""
    known = {CORPUS / expected.path for expected in FILES}
    factors = {".safetensors", ".bin", ".pt", ".onnx_adapter"}
    files = [path for path in sorted(CORPUS.rglob("*")) if path.suffix in factors and path.is_file()]
    assert files
    missing = [str(path) for path in files if not known & {path, path.parent}]
    assert missing == []


def test_a_search_finds_every_file_that_can_be_told() -> None:
    """All but pickles with names of their own, which nothing tells from a model."""
    found = {verdict.file for verdict in validate(CORPUS) if CORPUS / "configs" not in verdict.path.parents}
    untold = {"roberta_base_lora_mnli.bin", "lora_kiriko2.text_encoder.pt"}
    expected = {CORPUS / expected.path for expected in FILES if Path(expected.path).name not in untold}
    assert len(found) == len(expected)
    for path in expected:
        assert path in found or any(file is not None and file.parent == path for file in found), path


def test_a_configuration_beside_the_added_tokens(tmp_path: Path) -> None:
    """The file of fms-hf-tuning with what its configuration said: v_proj was targeted, and no tensor is of it.

    The tables are in no modules_to_save: PEFT saved them because the vocabulary grew. That they replace the base's is
    what loading them does, and worth a warning.
    """
    source = CORPUS / "foundation-model-stack__fms-hf-tuning/tests/artifacts/tuned_llama_with_added_tokens"
    if not source.exists():
        pytest.skip("no fms-hf-tuning in the corpus")
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "modules_to_save": None}))
    verdict = judge(tmp_path)
    said = [(problem.code, problem.severity, problem.where.rpartition(": ")[2]) for problem in verdict.problems]
    assert said == [
        ("LF217", "warning", "lm_head"),
        ("LF217", "warning", "model.embed_tokens"),
        ("LF219", "warning", "target_modules"),
    ]
    assert "'v_proj'" in verdict.problems[-1].found


def test_rows_of_added_tokens_are_no_table(tmp_path: Path) -> None:
    """fms-hf-tuning keeps the added rows alone: which rows of the base they follow, the file does not say."""
    source = CORPUS / "foundation-model-stack__fms-hf-tuning/tests/artifacts/tuned_llama_with_added_tokens"
    if not source.exists():
        pytest.skip("no fms-hf-tuning in the corpus")
    table = np.ones((20, 64), np.float32)
    names = ("model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj")
    arrays = {f"{name}.weight": np.ones((64, 64), np.float32) if "q_proj" in name else table for name in names}
    base = write_tensors(tmp_path / "base.safetensors", arrays)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [source], tmp_path / "out.safetensors", alpha=16)
    assert caught.value.codes == ("LF405", "LF405")
    assert all("only the rows of added tokens" in problem.advice for problem in caught.value.problems)


# --- the 158 configurations ------------------------------------------------------------------------------------------

VIRTUAL_TOKENS = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
ROUTED = {"LILY", "SHADOW"}
NOT_MERGED = {"FINEGATES", "UILINLORA"}
OTHER_FORMS = {
    "ADALORA",  # singular values between the factors, pruned
    "BEFT",  # biases
    "BOFT",
    "BONE",
    "DELORA",
    "FINEGATES",
    "FOURIERFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "OSF",
    "PEANUT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SUPERTUNING",
    "TINYLORA",
    "UILINLORA",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
}


@dataclass(frozen=True)
class Group:
    """Configurations with one verdict.

    Attributes:
        name: what they are.
        holds: the rule, over the raw fields.
        count: how many there are.
        code: the error, None where there is none.
        said: text that the error holds.
        why: why this is right.
    """

    name: str
    holds: Callable[[Mapping[str, Any]], bool]
    count: int
    code: str | None
    why: str
    said: str = ""
    notes: Codes = field(default_factory=lambda: {"LF221": "note"})


def is_lora(fields: Mapping[str, Any]) -> bool:
    return fields.get("peft_type") == "LORA"


def starts(fields: Mapping[str, Any], *names: str) -> bool:
    return str(fields.get("init_lora_weights")).startswith(names)


GROUPS = (
    Group(
        "mlx-lm",
        lambda fields: "lora_parameters" in fields,
        2,
        "LF121",
        "The configuration of another tool under the same name: its scale is a multiplier, not alpha.",
        "mlx-lm",
        {},
    ),
    Group(
        "AdapterHub",
        lambda fields: "peft_type" not in fields and "config" in fields,
        1,
        "LF209",
        "A bottleneck adapter of AdapterHub, with a non-linearity: no weight holds it.",
        "bottleneck adapter",
        {},
    ),
    Group(
        "no type",
        lambda fields: "peft_type" not in fields,
        1,
        "LF121",
        "lerobot's stub: nothing says what it is.",
        "base_model",
        {},
    ),
    Group(
        "virtual tokens",
        lambda fields: fields["peft_type"] in VIRTUAL_TOKENS,
        7,
        "LF209",
        "They change no weight; the advice must not be to convert them.",
        "virtual tokens",
    ),
    Group(
        "gated attention",
        lambda fields: fields["peft_type"] == "ADAPTION_PROMPT",
        1,
        "LF209",
        "LLaMA-Adapter: an attention beside the model's own.",
        "gated attention",
    ),
    Group(
        "routers",
        lambda fields: fields["peft_type"] in ROUTED,
        6,
        "LF209",
        "What they do depends on the input.",
        "which no weight can do",
    ),
    Group(
        "forms that are not merged",
        lambda fields: fields["peft_type"] in NOT_MERGED,
        5,
        "LF209",
        "What they add cannot be told from the file, or is not computed; none is LoRA, and none may be taken for it.",
        "",
    ),
    Group(
        "indices that were not saved",
        lambda fields: fields["peft_type"] == "UNILORA" and fields.get("save_indices") is not True,
        1,
        "LF232",
        "Uni-LoRA's, which follow from the order of the base's modules.",
    ),
    Group(
        "other forms",
        lambda fields: fields["peft_type"] in OTHER_FORMS,
        77,
        None,
        "Kinds of their own, each merged by its own formula.",
    ),
    Group(
        "trained tokens",
        lambda fields: fields["peft_type"] == "TRAINABLE_TOKENS",
        2,
        None,
        "Rows of a table that take the place of the base's.",
    ),
    Group(
        "merged linear",
        lambda fields: is_lora(fields) and bool(fields.get("enable_lora")),
        1,
        None,
        "PEFT 0.2's MergedLinear: factors of slices of a fused weight.",
    ),
    Group(
        "KaSA",
        lambda fields: is_lora(fields) and bool(fields.get("kasa_config")),
        2,
        None,
        "A diagonal between the factors, and a base that lost its small singular values.",
    ),
    Group(
        "BD-LoRA",
        lambda fields: is_lora(fields) and bool(fields.get("use_bdlora")),
        1,
        None,
        "Block-diagonal factors, which are expanded before B·A is taken.",
    ),
    Group(
        "base changed",
        lambda fields: is_lora(fields) and starts(fields, "pissa", "olora"),
        5,
        "LF215",
        "The initialisation took a part out of the base: onto the original base the merge is wrong.",
        "changed the base",
    ),
    Group(
        "DoRA",
        lambda fields: is_lora(fields) and fields.get("use_dora") is True,
        5,
        None,
        "The merged weight is renormalised: a kind of its own.",
    ),
    Group(
        "saved modules",
        lambda fields: is_lora(fields) and bool(fields.get("modules_to_save")),
        5,
        None,
        "Heads that were trained whole, beside LoRA: both are merged, the heads by taking the place of the base's.",
    ),
    Group(
        "plain LoRA",
        is_lora,
        35,
        None,
        "B·A times a stated scale: rsLoRA, fan_in_fan_out, and initialisations that leave the base alone among them.",
    ),
)


def read_fields(path: Path) -> dict[str, Any] | None:
    """Return the raw fields, as Python's own reader sees them; None for what is not JSON."""
    try:
        return dict(json.loads(path.read_bytes()))
    except ValueError:
        return None


CONFIGS = sorted((CORPUS / "configs").glob("*.json"))
POINTERS = {"005.json"}
"""Git-LFS pointers in the place of the file."""
STRAY = {
    **dict.fromkeys(("016.json", "020.json", "146.json"), "lora_alpha"),
    **dict.fromkeys(("063.json", "073.json", "090.json"), "selection_direction"),
    "052.json": "use_khatri_rao",
}
"""Fields of other types, and of versions of PEFT that were never released, which PEFT leaves out when it loads them."""


def group_of(fields: Mapping[str, Any]) -> Group:
    return next(group for group in GROUPS if group.holds(fields))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations(path: Path) -> None:
    fields = read_fields(path)
    verdict = judge(path)
    said = {problem.code: problem.severity for problem in verdict.problems}
    if fields is None:
        assert path.name in POINTERS
        assert said == {"LF111": "error"}
        assert "git lfs pull" in verdict.problems[0].advice
        return
    group = group_of(fields)
    stray = {"LF241": "warning"} if path.name in STRAY else {}
    assert said == {**({group.code: "error"} if group.code else {}), **group.notes, **stray}, group.why
    assert STRAY.get(path.name, "") in "".join(each.where for each in verdict.problems if each.code == "LF241")
    assert group.said in "\n".join(problem.found for problem in verdict.problems if problem.code == group.code) or (
        group.said in verdict.problems[0].where
    )
    if "peft_type" in fields:
        named = "; ".join(problem.found for problem in verdict.problems)
        assert f"'{fields['peft_type']}'" in named, "the verdict names what it is"


def test_the_groups_are_complete() -> None:
    if not CONFIGS:
        pytest.skip("no configs in the corpus")
    assert len(CONFIGS) == 158
    counted = Counter(group_of(fields).name for path in CONFIGS if (fields := read_fields(path)) is not None)
    assert counted == {group.name: group.count for group in GROUPS}
    assert sum(group.count for group in GROUPS) + len(POINTERS) == 158


def test_plain_lora_is_of_the_kinds_that_it_should_be() -> None:
    """The rules above are not so wide that something odd slips through as plain."""
    if not CONFIGS:
        pytest.skip("no configs in the corpus")
    telling = ("alora_invocation_tokens", "arrow_config", "use_qalora", "layer_replication", "target_parameters")
    telling += ("loftq_config", "trainable_token_indices", "lora_bias", "velora_config", "monteclora_config")
    for path in CONFIGS:
        fields = read_fields(path)
        if fields is None or group_of(fields).name != "plain LoRA":
            continue
        assert not any(fields.get(name) for name in telling), path
        assert fields.get("bias", "none") == "none", path
        assert fields["lora_alpha"] > 0, path
        assert fields["r"] > 0, path
        assert fields.get("init_lora_weights", True) in (True, False, "gaussian", "mica"), path
