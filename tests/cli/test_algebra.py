"""`compose`, `scale`, `resize` and `diff`."""

import json
from pathlib import Path

import numpy as np
import pytest

import loraformat
from builders import lora_factors, write_peft
from graphs import make_adapter, make_target
from loraformat.algebra.difference import Compared, Difference
from loraformat.problems import Problem


@pytest.fixture
def made():
    return make_adapter(make_target("model.q", lora_factors(np.random.default_rng(0), 6, 10, 3), scale=0.5))


@pytest.fixture
def writing(face, made):
    """Let the three makers cut one target and `save` take it."""

    def make(*args, report=None, **flags):
        if report is not None:
            report(loraformat.Reduction("model.q", 6, 3, 0.125))
        return made

    for name in ("compose", "scale", "resize"):
        face.answer(name, make)
    face.answer("save", lambda adapter, path, force: path)
    return face


def test_compose_passes_weights_and_flags(run, writing) -> None:
    words = (
        "--method dare --rank 3 --density 0.25 --seed 7 --allow-different-bases --scheme peft --force --dtype float16"
    )
    result = run("compose", "a", "b:-0.3", "-o", "out.safetensors", *words.split())
    assert (result.exit_code, result.stdout) == (0, "out.safetensors\n")
    assert "1 of 1 targets cut; largest relative error 0.125 (model.q)" in result.stderr
    assert "1 targets, rank 3, 48 numbers" in result.stderr
    (_, args, flags), saving = writing.calls
    assert args == ([Path("a"), (Path("b"), -0.3)], "dare")
    del flags["report"]
    assert flags == {"rank": 3, "density": 0.25, "seed": 7, "allow_different_bases": True, "scheme": "peft"} | {
        "dtype": "float16"
    }
    assert saving[2] == {"force": True}


def test_scale_takes_negative_factors(run, writing) -> None:
    result = run("scale", "a", "-0.5", "-o", "out", "--target", "*.q=0.2", "--target", "a=b=-1e1")
    assert (result.exit_code, result.stdout) == (0, "out\n")
    assert writing.calls[0][1] == (Path("a"), -0.5, {"*.q": 0.2, "a=b": -10.0})


def test_resize_passes_rules_and_ranks(run, writing) -> None:
    result = run(
        "resize", "a", "-o", "out", "--sv-ratio", "20", "--rank", "8", "--target", "*.q=4", "--device", "cpu", "-v"
    )
    assert (result.exit_code, result.stdout) == (0, "out\n")
    assert "model.q            6     3  0.125" in result.stderr
    flags = {name: value for name, value in writing.calls[0][2].items() if value is not None and name != "report"}
    assert flags == {"sv_ratio": 20.0, "rank": 8, "ranks": {"*.q": 4}, "dtype": "float32"}


def test_as_json(run, writing) -> None:
    shown = json.loads(run("resize", "a", "--rank", "3", "-o", "out", "--json").stdout)
    assert shown == {
        "output": "out",
        "targets": [{"name": "model.q", "kind": "lora", "rank": 3, "scale": 0.5}],
        "cuts": [{"target": "model.q", "before": 6, "after": 3, "error": 0.125}],
    }


@pytest.mark.parametrize(
    "words",
    [
        ["compose", "a"],
        ["compose", "-o", "x"],
        ["compose", "a:heavy", "-o", "x"],
        ["compose", "a", "-o", "x", "--method", "median"],
        ["compose", "a", "-o", "x", "--energy", "2"],
        ["compose", "a", "-o", "x", "--alpha", "1", "--scale", "1"],
        ["scale", "a", "-o", "x"],
        ["scale", "a", "half", "-o", "x"],
        ["scale", "a", "1", "-o", "x", "--target", "q"],
        ["scale", "a", "1", "-o", "x", "--taget", "q=1"],
        ["resize", "a", "-o", "x", "--rank", "0"],
        ["resize", "a", "-o", "x", "--target", "q=0.5"],
        ["resize", "a", "-o", "x", "--rank", "1", "--device", "cuda"],
        ["diff", "a"],
    ],
)
def test_wrong_usage(run, writing, words) -> None:
    assert run(*words).exit_code == 2
    assert writing.calls == []


def test_diff_lists_what_differs(run, face) -> None:
    shared = (Compared("k", 1.0, 1.0, 0.0, 1.0, 1.0), Compared("q", 2.0, 1.0, 3.0, 0.5, 0.25))
    odd = Problem("LF704", "v", "shapes", severity="note")
    face.answer("diff", Difference("adapter", shared, ("o",), ("p",), (odd,)))
    result = run("diff", "a", "b")
    assert result.exit_code == 1
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["q", "2", "1", "1.5", "0.5", "0.25"] in rows
    assert not any(row[0] == "k" for row in rows)
    assert "only in the first: o\nonly in the second: p\n" in result.stdout
    assert "LF704" in result.stderr
    assert "1 of 2 that both have are the same; relative difference 1.34" in result.stderr
    assert "\nk " in run("diff", "a", "b", "-v").stdout
    shown = json.loads(run("diff", "a", "b", "--json").stdout)
    assert (shown["same"], shown["only_first"], shown["shared"][1]["relative"]) == (False, ["o"], 1.5)


def test_diff_of_equals_ends_with_0(run, face) -> None:
    face.answer("diff", Difference("base", (Compared("q", 2.0, 2.0, 0.0),), (), (), ()))
    result = run("diff", "a", "b")
    assert (result.exit_code, result.stdout) == (0, "")


def test_end_to_end(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """a + b, minus b, is a: composed, scaled, cut and compared."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    for name in "ab":
        write_peft(tmp_path / name, {"model.q": lora_factors(rng, 12, 8, 2)}, alpha=3)
    assert run("compose", "a", "b", "-o", "sum.safetensors").stdout == "sum.safetensors\n"
    assert run("compose", "a", "b", "-o", "sum.safetensors").exit_code == 4
    assert run("scale", "b", "-1", "-o", "minus.safetensors").exit_code == 0
    done = run("compose", "sum.safetensors", "minus.safetensors", "-o", "back.safetensors", "--max-error", "1e-5")
    assert (done.exit_code, done.stdout) == (0, "back.safetensors\n")
    shown = json.loads(run("diff", "a", "back.safetensors", "--json").stdout)
    assert shown["relative"] < 1e-6
    assert loraformat.load(tmp_path / "back.safetensors").targets[0].rank == 2
    assert run("resize", "sum.safetensors", "--rank", "1", "-o", "one.safetensors").exit_code == 0
    assert run("validate", "sum.safetensors", "minus.safetensors", "one.safetensors").exit_code == 0
    assert run("diff", "a", "a").exit_code == 0
    refused = run("compose", "a", "b", "--method", "ties", "-o", "ties.safetensors")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "LF703" in refused.stderr
