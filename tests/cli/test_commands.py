"""`inspect`, `explain` and `completion`."""

import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from loraformat.problems import Problem
from loraformat.reasons import all_reasons


def _target(name: str, rank: int = 8) -> dict[str, object]:
    shape = [64, 48]
    return {"name": name, "kind": "lora", "slot": "linear", "rank": rank, "scale": 2.0, "scaling": "alpha/rank"} | {
        "shape": shape,
        "parameters": 896,
        "norm": 0.123456789,
    }


@pytest.fixture
def adapter() -> dict[str, object]:
    return {
        "kind": "adapter",
        "path": "style [bold]",
        "scheme": "peft",
        "evidence": "adapter_config.json",
        "base": {"name": "org/model", "revision": None},
        "kinds": {"lora": 3},
        "ranks": {"8": 2, "4": 1},
        "parameters": 2688,
        "targets": [_target(f"model.layers.{n}.q_proj") for n in range(2)] + [_target("lm_head", 4)],
        "notes": ["prefix base_model.model. removed"],
        "problems": [],
    }


def test_an_adapter_in_groups(run, face, adapter) -> None:
    face.answer("inspect", SimpleNamespace(as_json=lambda: adapter))
    result = run("inspect", "style")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["path", "style", "[bold]"] in rows
    assert ["targets", "3"] in rows
    assert ["ranks", "8:", "2,", "4:", "1"] in rows
    assert ["2", "model.layers.*.q_proj", "lora", "linear", "8", "2", "alpha/rank", "[64,", "48]", "896"] in rows
    assert result.stderr == "note: prefix base_model.model. removed\n"


@pytest.mark.parametrize("flag", ["--targets", "--all", "-v"])
def test_every_target(run, face, adapter, flag) -> None:
    face.answer("inspect", SimpleNamespace(as_json=lambda: adapter))
    stdout = run("inspect", "style", flag).stdout
    assert "model.layers.0.q_proj" in stdout
    assert "model.layers.1.q_proj" in stdout
    assert "0.123457" in stdout


def test_inspect_as_json(run, face, adapter) -> None:
    face.answer("inspect", SimpleNamespace(as_json=lambda: adapter))
    result = run("inspect", "style", "--json", "--scheme", "peft", "--alpha", "3")
    assert json.loads(result.stdout) == adapter
    assert face.calls[0][2] == {"scheme": "peft", "alpha": 3.0, "scale": None}


def test_a_base(run, face) -> None:
    sites = [
        {"module": f"model.{n}.q", "slot": "linear", "weight": f"onnx::MatMul_{n}", "shape": [4, 3], "dtype": "F32"}
        | {"evidence": "node path", "obstacle": dict(Problem("LF403", "q", "INT4").as_json()) if n else None}
        for n in range(2)
    ]
    receipt = {"adapters": [{"name": "style", "weight": 0.5}], "weights": [{"name": "w"}] * 99}
    shown = {"kind": "base", "path": "m.onnx", "format": "onnx", "sites": sites, "receipt": receipt, "problems": []}
    face.answer("inspect", SimpleNamespace(as_json=lambda: shown))
    assert "onnx::MatMul_1" in run("inspect", "m.onnx", "--all").stdout
    grouped = run("inspect", "m.onnx").stdout
    assert grouped.count("model.*.q") == 2  # one that can be merged into, one that cannot
    assert "LF403 weight is stored in a form" in grouped
    assert "a merge of style (0.5)\n" in grouped


def test_findings_end_with_1(run, face, adapter) -> None:
    adapter["problems"] = [dict(Problem("LF201", "model.q", "lora_A alone").as_json())]
    face.answer("inspect", SimpleNamespace(as_json=lambda: adapter))
    result = run("inspect", "style")
    assert result.exit_code == 1
    assert result.stderr.endswith(str(Problem("LF201", "model.q", "lora_A alone")) + "\n")
    assert run("inspect", "style", "--json").exit_code == 1
    adapter["problems"][0]["severity"] = "warning"
    assert run("inspect", "style").exit_code == 0


def test_an_empty_adapter(run, face) -> None:
    face.answer("inspect", SimpleNamespace(as_json=lambda: {"kind": "adapter", "path": "x", "targets": []}))
    assert run("inspect", "x").exit_code == 0
    assert run("inspect", "x", "--all").exit_code == 0


@pytest.mark.parametrize("code", list(all_reasons()))
def test_explain(run, code) -> None:
    result = run("explain", code.lower())
    reason = all_reasons()[code]
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{code} {reason.title}\n")
    assert reason.mend in result.stdout


def test_explain_lists_all(run) -> None:
    lines = run("explain").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["code", *all_reasons()]
    listed = json.loads(run("explain", "--json").stdout)["reasons"]
    assert [reason["code"] for reason in listed] == list(all_reasons())


def test_explain_near_misses(run) -> None:
    result = run("explain", "LF40")
    assert result.exit_code == 2
    assert "LF401" in result.stderr
    assert run("explain", "zebra").exit_code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run, tmp_path, shell) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_LORAFORMAT_COMPLETE" in result.stdout
    program = shutil.which(shell)
    if program is not None:
        script = tmp_path / "script"
        script.write_text(result.stdout)
        subprocess.run([program, "-n", str(script)], check=True, timeout=60)


def test_completion_of_words(spawn) -> None:
    def complete(words: str, position: int) -> list[str]:
        env = {"_LORAFORMAT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        return spawn(env=env).stdout.decode().splitlines()

    assert complete("loraformat me", 1) == ["plain,merge"]
    assert "plain,--dry-run" in complete("loraformat merge --d", 2)
    assert complete("loraformat merge base.onnx ad", 3) == ["file,ad"]
    assert complete("loraformat completion z", 2) == ["plain,zsh"]


def test_unknown_shell(run) -> None:
    assert run("completion", "tcsh").exit_code == 2
