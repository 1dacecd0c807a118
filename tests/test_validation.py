"""Verdicts: everything at once, on files, folders and configurations alone."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import lora_factors, write_config, write_onnx, write_peft, write_tensors
from loraformat.api import validate
from loraformat.validation import Verdict, find_adapters

OUT, INNER, RANK = 12, 8, 2
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
PREFIX = "base_model.model."


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def pair(rng: np.random.Generator) -> Any:
    return lora_factors(rng, OUT, INNER, RANK)


def judge(path: Path, **options: Any) -> Verdict:
    (verdict,) = validate(path, **options)
    return verdict


def codes(verdict: Verdict) -> list[tuple[str, str]]:
    return [(problem.code, problem.severity) for problem in verdict.problems]


def found(verdict: Verdict, code: str) -> str:
    return "; ".join(problem.found for problem in verdict.problems if problem.code == code)


def add_tensors(folder: Path, **arrays: Any) -> None:
    """Put more tensors into a PEFT folder's file."""
    from safetensors.numpy import load_file

    path = folder / "adapter_model.safetensors"
    more = {name.replace("__", "."): array for name, array in arrays.items()}
    write_tensors(path, load_file(path) | more, {"format": "pt"})


# --- adapters --------------------------------------------------------------------------------------------------------


def test_a_sound_folder(tmp_path: Path, pair: Any) -> None:
    verdict = judge(write_peft(tmp_path / "style", {Q: pair, V: pair}, target_modules=["q_proj", "v_proj"]))
    assert codes(verdict) == []
    assert (verdict.scheme, verdict.targets, verdict.severity) == ("peft", 2, None)
    assert verdict.path == tmp_path / "style"
    assert verdict.file == tmp_path / "style" / "adapter_model.safetensors"


def test_a_file_of_our_own(tmp_path: Path, pair: Any) -> None:
    path = tmp_path / "style.safetensors"
    loraformat.save(loraformat.load(write_peft(tmp_path / "style", {Q: pair})), path)
    verdict = judge(path)
    assert (verdict.scheme, verdict.targets, verdict.file, codes(verdict)) == ("native", 1, path, [])


def test_the_face_works_twice(tmp_path: Path) -> None:
    for _ in range(2):
        assert loraformat.validate(tmp_path / "gone")


def test_severities() -> None:
    def verdict(*severities: Any) -> Verdict:
        return Verdict(Path("x"), "", 0, tuple(loraformat.Problem("LF101", "x", "y", severity=s) for s in severities))

    assert verdict().severity is None
    assert verdict("note", "error", "warning").severity == "error"
    bounds = ("error", "warning", "note")
    assert [verdict("error").reaches(bound) for bound in bounds] == [True, True, True]
    assert [verdict("warning").reaches(bound) for bound in bounds] == [False, True, True]
    assert [verdict("note").reaches(bound) for bound in bounds] == [False, False, True]
    assert not verdict().reaches("note")


def test_problems_stand_in_the_order_of_weight(tmp_path: Path, pair: Any) -> None:
    down, up = pair
    folder = write_peft(
        tmp_path / "s", {f"module.{Q}": (down, 0 * up), V: (down, up[:, :1])}, target_modules=["k_proj"]
    )
    verdict = judge(folder)
    assert [severity for _, severity in codes(verdict)] == ["error", "warning", "warning", "note"]
    assert {code for code, _ in codes(verdict)} == {"LF203", "LF214", "LF219", "LF304"}


def test_everything_is_said_at_once(tmp_path: Path, pair: Any) -> None:
    """A reader stops at the first wrong field; a verdict names all, and what the tensors lack besides."""
    folder = write_peft(tmp_path / "s", {Q: pair}, r="2", use_rslora="yes", lora_alpha=[], revision=3)
    assert [problem.where.rpartition(": ")[2] for problem in judge(folder).problems] == [
        "revision",
        "r",
        "lora_alpha",
        "use_rslora",
    ]
    assert {code for code, _ in codes(judge(folder))} == {"LF213"}


def test_unknown_fields(tmp_path: Path, pair: Any) -> None:
    """PEFT drops what it does not know; options that we know to change the meaning are another matter."""
    assert codes(judge(write_peft(tmp_path / "a", {Q: pair}, brand_new_field={"x": 1}))) == [("LF241", "warning")]
    newer = write_peft(tmp_path / "c", {Q: pair}, brand_new_field={"x": 1}, peft_version="9.1.0")
    assert codes(judge(newer)) == [("LF240", "error")]
    assert codes(judge(write_peft(tmp_path / "b", {Q: pair}, layer_replication=[[0, 2]]))) == [("LF245", "error")]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "LF101"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "LF111"),
        (b"<!DOCTYPE html><html></html>", "LF111"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", "LF121"),
        (b"\xff" * 64, "LF102"),
    ],
)
def test_files_that_are_not_what_they_claim(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert codes(judge(path)) == [(code, "error")]


def test_an_empty_peft_adapter(tmp_path: Path) -> None:
    """The 40 bytes that torch.compile and ZeRO-3 leave."""
    assert codes(judge(write_peft(tmp_path / "s", {}))) == [("LF212", "error")]


def test_nothing_at_the_path(tmp_path: Path) -> None:
    assert codes(judge(tmp_path / "gone")) == [("LF100", "error")]


# --- the scale -------------------------------------------------------------------------------------------------------


def test_without_a_scale_the_rest_is_checked_all_the_same(tmp_path: Path, pair: Any) -> None:
    down, up = pair
    folder = write_peft(tmp_path / "s", {Q: (down, 0 * up), V: (down, up[:, :1])})
    (folder / "adapter_config.json").unlink()
    verdict = judge(folder)
    assert codes(verdict) == [("LF211", "error"), ("LF203", "error"), ("LF214", "warning")]
    assert verdict.targets == 2


@pytest.mark.parametrize(("stated", "scale"), [({"alpha": 8}, "4"), ({"scale": 0.5}, "0.5")])
def test_a_scale_of_the_user_is_noted(tmp_path: Path, pair: Any, stated: dict[str, float], scale: str) -> None:
    folder = write_peft(tmp_path / "s", {Q: pair}, alpha=None)
    verdict = judge(folder, **stated)
    assert codes(verdict) == [("LF211", "note")]
    assert found(verdict, "LF211") == f"{scale}, as you say"


def test_a_scale_of_the_user_that_is_not_needed(tmp_path: Path, pair: Any) -> None:
    assert codes(judge(write_peft(tmp_path / "s", {Q: pair}), alpha=99)) == [("LF222", "note")]


def test_an_alpha_of_zero_gives_way_to_the_user(tmp_path: Path, pair: Any) -> None:
    folder = write_peft(tmp_path / "s", {Q: pair}, alpha=0)
    assert codes(judge(folder)) == [("LF208", "error")]
    assert codes(judge(folder, alpha=8)) == [("LF211", "note")]


# --- configuration and tensors that do not agree ---------------------------------------------------------------------


def test_saved_modules_that_are_not_listed(tmp_path: Path, pair: Any) -> None:
    folder = write_peft(tmp_path / "s", {Q: pair}, modules_to_save=["classifier"], task_type="SEQ_CLS")
    whole = np.ones((2, INNER), np.float32)
    add_tensors(
        folder,
        base_model__model__classifier__weight=whole,
        base_model__model__classifier__dense__weight=whole,  # below a listed module
        base_model__model__pre_classifier__weight=whole,  # ends with the name of one, as PEFT compares
        base_model__model__score__weight=whole,
    )
    odd = {problem.where: problem.found for problem in judge(folder).problems if problem.code == "LF217"}
    assert odd.keys() == {"pre_classifier", "score"}
    assert "its name ends with 'classifier'" in odd["pre_classifier"]
    assert "PEFT" not in odd["score"]
    assert all(problem.severity == "warning" for problem in judge(folder).problems if problem.code == "LF217")


@pytest.mark.parametrize(
    ("listed", "task", "saved", "missing"),
    [
        (["lm_head"], "CAUSAL_LM", [], ["lm_head"]),
        (["lm_head"], "CAUSAL_LM", ["lm_head"], []),
        (["classifier", "score"], "SEQ_CLS", ["classifier"], []),  # PEFT adds both, a model has one
        (["classifier", "score"], "SEQ_CLS", [], ["classifier", "score"]),
        (["classifier", "score"], None, ["classifier"], ["score"]),
        (["qa_outputs", "extra"], "QUESTION_ANS", ["qa_outputs"], ["extra"]),
        (["head", "head"], None, [], ["head"]),
    ],
)
def test_listed_modules_without_tensors(
    tmp_path: Path, pair: Any, listed: list[str], task: str | None, saved: list[str], missing: list[str]
) -> None:
    folder = write_peft(tmp_path / "s", {Q: pair}, modules_to_save=listed, task_type=task)
    add_tensors(folder, **{f"base_model__model__{name}__weight": np.ones((2, INNER), np.float32) for name in saved})
    problems = [problem for problem in judge(folder).problems if problem.code == "LF217"]
    assert [problem.found for problem in problems] == [f"{name!r}, without tensors" for name in missing]


@pytest.mark.parametrize(
    ("bias", "key", "lost"),
    [
        ("none", None, False),
        ("lora_only", None, True),
        ("all", None, True),
        ("lora_only", f"{Q}.base_layer.bias", False),
        ("lora_only", f"{Q}.bias", False),  # PEFT up to 0.5
        ("all", "model.norm.bias", False),
    ],
)
def test_biases_that_were_lost(tmp_path: Path, pair: Any, bias: str, key: str | None, lost: bool) -> None:
    folder = write_peft(tmp_path / "s", {Q: pair}, bias=bias)
    if key:
        add_tensors(folder, **{f"{PREFIX}{key}": np.ones(OUT, np.float32)})
    assert (("LF218", "warning") in codes(judge(folder))) == lost


def test_the_bias_of_a_saved_module_is_not_a_trained_bias(tmp_path: Path, pair: Any) -> None:
    folder = write_peft(tmp_path / "s", {Q: pair}, bias="all", modules_to_save=["head"])
    add_tensors(
        folder, base_model__model__head__weight=np.ones((2, 3), np.float32), base_model__model__head__bias=np.ones(2)
    )
    assert ("LF218", "warning") in codes(judge(folder))


@pytest.mark.parametrize(
    ("entries", "missing"),
    [
        (["q_proj", "v_proj"], []),
        (["self_attn.q_proj", Q], []),
        (["q_proj", "k_proj"], ["k_proj"]),
        (["proj"], ["proj"]),  # the end of a name, but not at a dot
        ([], []),
        ("all-linear", []),
        (".*k_proj", []),  # a regular expression says nothing about its parts
        (None, []),
    ],
)
def test_target_modules_without_tensors(tmp_path: Path, pair: Any, entries: Any, missing: list[str]) -> None:
    folder = write_peft(tmp_path / "s", {Q: pair, V: pair}, target_modules=entries)
    problems = judge(folder).problems
    assert [problem.found for problem in problems] == [f"{name!r}, without tensors" for name in missing]
    assert all((problem.code, problem.severity) == ("LF219", "warning") for problem in problems)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"q_proj": 4}, []),
        ({"k_proj": 4}, ["'k_proj' fits no target"]),
        ({"_proj": 4}, ["'_proj' fits no target"]),  # half a name
        ({"q_proj": 4, ".*_proj": 8}, ["patterns with different values fit 1 targets"]),
        ({"q_proj": 4, ".*_proj": 4}, []),
        ({".*": 4, "(": 8}, ["the pattern '('"]),  # never reached, and no error of a merge
    ],
)
def test_patterns(tmp_path: Path, pair: Any, patterns: dict[str, int], said: list[str]) -> None:
    problems = judge(write_peft(tmp_path / "s", {Q: pair, V: pair}, alpha_pattern=patterns)).problems
    assert len(problems) == len(said)
    for problem, text in zip(problems, said, strict=True):
        assert problem.found.startswith(text)
        code = "LF213" if "(" in patterns else "LF220"
        assert (problem.code, problem.severity) == (code, "warning")


@pytest.mark.parametrize("field", ["lora_bias", "trainable_token_indices"])
def test_what_was_trained_and_is_missing(tmp_path: Path, pair: Any, field: str) -> None:
    value = {"lora_bias": True, "trainable_token_indices": [1, 2]}[field]
    folder = write_peft(tmp_path / "s", {Q: pair}, **{field: value})
    assert codes(judge(folder)) == [("LF201", "error")]
    with pytest.raises(loraformat.LoraformatError):
        loraformat.save(loraformat.load(folder), tmp_path / "x.safetensors")


# --- a configuration alone -------------------------------------------------------------------------------------------


def write_alone(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(folder, {"r": 8, "lora_alpha": 16, **fields})


def test_a_configuration_alone(tmp_path: Path) -> None:
    path = write_alone(tmp_path / "s", target_modules=["q_proj"])
    verdict = judge(path)
    assert codes(verdict) == [("LF221", "note")]
    assert found(verdict, "LF221") == (
        "peft_type 'LORA', r 8, lora_alpha 16, target_modules ['q_proj'], base_model_name_or_path 'a/base'"
    )
    assert (verdict.scheme, verdict.targets, verdict.path, verdict.file) == ("peft", 0, path, path)


def test_a_folder_with_a_configuration_alone(tmp_path: Path) -> None:
    """Somebody who names the file means it; in a folder the tensors are missing."""
    path = write_alone(tmp_path / "s")
    verdict = judge(path.parent)
    assert codes(verdict) == [("LF221", "warning")]
    assert (verdict.path, verdict.file) == (path.parent, path)


ALONE = [
    ({"peft_type": "LOHA"}, {"LF241": "16, left out"}),
    ({"peft_type": "PSOFT"}, {"LF209": "singular vectors"}),
    ({"peft_type": "LORA_OF_NEXT_YEAR"}, {"LF209": "'LORA_OF_NEXT_YEAR': a change of another form"}),
    ({"peft_type": "PROMPT_TUNING"}, {"LF209": "virtual tokens"}),
    ({"peft_type": "XLORA"}, {"LF209": "router"}),
    ({"peft_type": None}, {"LF209": "no peft_type"}),
    ({"peft_type": 3}, {"LF213": "3"}),
    ({"use_dora": True}, {}),
    ({"lora_bias": True}, {}),
    ({"modules_to_save": ["head"]}, {}),
    ({"trainable_token_indices": {"embed": [1]}}, {}),
    ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "r": 0, "lora_alpha": ...}, {}),
    ({"use_dora": True, "modules_to_save": ["head"]}, {}),
    ({"init_lora_weights": "pissa"}, {"LF215": "pissa"}),
    ({"layer_replication": [[0, 2]]}, {"LF245": "repeats layers"}),
    ({"bias": "all"}, {"LF218": "only the tensors can say"}),
    ({"lora_alpha": 0}, {"LF208": "0"}),
    ({"lora_alpha": ...}, {"LF211": "no lora_alpha"}),
    ({"r": 0}, {"LF204": "0"}),
    ({"r": "8", "use_dora": "no"}, {"LF213": "'8'; 'no'"}),
]


@pytest.mark.parametrize(("fields", "expected"), ALONE, ids=[json.dumps(fields, default=str) for fields, _ in ALONE])
def test_what_a_configuration_alone_says(tmp_path: Path, fields: dict[str, Any], expected: dict[str, str]) -> None:
    verdict = judge(write_alone(tmp_path / "s", **fields))
    problems = dict.fromkeys(code for code, _ in codes(verdict) if code != "LF221")
    if fields == {"r": "8", "use_dora": "no"}:
        problems.pop("LF209", None)
    assert problems.keys() == expected.keys()
    for code, text in expected.items():
        assert text in found(verdict, code)
    assert verdict.reaches("error") == bool(expected.keys() - {"LF218", "LF241"})


FOREIGN = [
    ({"lora_parameters": {"rank": 8}, "model": "x"}, "mlx-lm"),
    ({"fine_tune_type": "lora"}, "mlx-lm"),
    ({"config": {}, "hidden_size": 1, "model_class": "x", "version": "3"}, "AdapterHub"),
    ({"model_type": "llama", "architectures": ["L"]}, "of a model"),
    ({"base_model": "x"}, "base_model"),
    ({}, "nothing"),
]


@pytest.mark.parametrize(("fields", "named"), FOREIGN)
def test_configurations_of_others_are_named(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(fields))
    verdict = judge(path)
    assert codes(verdict) == [("LF121", "error")]
    assert named in found(verdict, "LF121")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "LF111"),
        (b"{", "LF104"),
        (b"[]", "LF104"),
        (b"", "LF104"),
        (b'{"peft_type": "LORA", "peft_type": "IA3"}', "LF105"),
        (b'{"peft_type": "LORA", "r": NaN}', "LF104"),
        (b"\xff\xfe{}", "LF103"),
    ],
)
def test_configurations_that_cannot_be_read(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    assert codes(judge(path)) == [(code, "error")]


# --- finding ---------------------------------------------------------------------------------------------------------


def find(*paths: Path) -> list[str]:
    root = paths[0].parent if len(paths) > 1 else paths[0]
    return [os.path.relpath(path, root) for path in find_adapters(paths)]


def test_a_search(tmp_path: Path, pair: Any) -> None:
    write_peft(tmp_path / "run", {Q: pair})
    write_peft(tmp_path / "run" / "checkpoint-5", {Q: pair})
    write_alone(tmp_path / "configured")
    (tmp_path / "z").mkdir()
    loraformat.save(loraformat.load(tmp_path / "run"), tmp_path / "z" / "own.safetensors")
    write_tensors(tmp_path / "z" / "model.safetensors", {"model.weight": pair[0]})
    (tmp_path / "z" / "broken.safetensors").write_bytes(b"version https://git-lfs")
    (tmp_path / "z" / "two.onnx_adapter").write_bytes(b"x")
    (tmp_path / "z" / "notes.txt").write_bytes(b"x")
    write_peft(tmp_path / ".git" / "s", {Q: pair})
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert find(tmp_path) == [
        "configured",
        "run",
        "run/checkpoint-5",
        "z/broken.safetensors",
        "z/own.safetensors",
        "z/two.onnx_adapter",
    ]


def test_other_adapters_beside_pefts_file_are_found(tmp_path: Path, pair: Any) -> None:
    folder = write_peft(tmp_path / "model", {Q: pair})
    write_tensors(folder / "pytorch_lora_weights.safetensors", {"unet.to_k.lora_A.weight": pair[0]})
    assert find(folder) == [".", "pytorch_lora_weights.safetensors"]


def test_the_files_of_one_adapter_are_one(tmp_path: Path, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pre-commit names them: every changed file by itself."""
    folder = write_peft(tmp_path / "s", {Q: pair})
    monkeypatch.chdir(tmp_path)
    config, factors = Path("s/adapter_config.json"), Path("s/adapter_model.safetensors")
    assert list(find_adapters([config, factors])) == [factors]
    assert list(find_adapters([config])) == [factors]  # it says what the tensors mean
    assert list(find_adapters([folder, config, factors, Path("s")])) == [folder]
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    assert list(find_adapters([config])) == [Path("s/adapter_model.bin")]


def test_a_folder_without_adapters_is_not_passed_over(tmp_path: Path, pair: Any) -> None:
    """A check that checks nothing must not succeed."""
    assert codes(judge(tmp_path)) == [("LF121", "error")]
    write_tensors(tmp_path / "model.safetensors", {"model.weight": pair[0]})
    assert codes(judge(tmp_path)) == [("LF835", "error")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_a_closed_folder(tmp_path: Path, pair: Any) -> None:
    folder = write_peft(tmp_path / "a" / "s", {Q: pair}).parent
    folder.chmod(0)
    try:
        (verdict,) = validate(tmp_path)
    finally:
        folder.chmod(0o700)
    assert codes(verdict) == [("LF100", "error")]


def test_a_folder_that_cannot_be_listed(tmp_path: Path, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.iterdir

    def iterdir(folder: Path) -> Any:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    (tmp_path / "closed").mkdir()
    write_peft(tmp_path / "open", {Q: pair})
    monkeypatch.setattr(Path, "iterdir", iterdir)
    verdicts = validate(tmp_path)
    assert [codes(verdict) for verdict in verdicts] == [[("LF100", "error")], []]


# --- with a base -----------------------------------------------------------------------------------------------------


def test_a_base_that_fits(tmp_path: Path, pair: Any, rng: np.random.Generator) -> None:
    folder = write_peft(tmp_path / "s", {Q: pair})
    base = write_onnx(tmp_path / "base.onnx", {Q: rng.standard_normal((OUT, INNER)).astype(np.float32)})
    assert codes(judge(folder, base=base)) == []


def test_problems_of_adapter_and_base_together(tmp_path: Path, pair: Any, rng: np.random.Generator) -> None:
    """An unsound target does not hide that another one is missing, or too wide."""
    down, up = pair
    wide = lora_factors(rng, OUT, INNER + 1, RANK)
    folder = write_peft(tmp_path / "s", {Q: pair, V: (down, up[:, :1]), "model.gone": pair, "model.wide": wide})
    weight = rng.standard_normal((OUT, INNER)).astype(np.float32)
    base = write_onnx(tmp_path / "base.onnx", {Q: weight, V: weight, "model.wide": weight})
    assert sorted(codes(judge(folder, base=base))) == [("LF203", "error"), ("LF401", "error"), ("LF405", "error")]


def test_one_base_for_many(tmp_path: Path, pair: Any, rng: np.random.Generator) -> None:
    for name in ("a", "b"):
        write_peft(tmp_path / "all" / name, {Q: pair})
    base = write_onnx(tmp_path / "base.onnx", {V: rng.standard_normal((OUT, INNER)).astype(np.float32)})
    verdicts = validate(tmp_path / "all", base=base)
    assert [codes(verdict) for verdict in verdicts] == [[("LF401", "error")]] * 2


def test_a_base_that_cannot_be_opened_is_raised(tmp_path: Path, pair: Any) -> None:
    folder = write_peft(tmp_path / "s", {Q: pair})
    with pytest.raises(loraformat.LoraformatError) as caught:
        validate(folder, base=tmp_path / "gone.onnx")
    assert caught.value.codes == ("LF100",)
