"""The demo, and real merges through the command line from end to end."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from loraformat import demo
from loraformat.demo import model as demo_model

onnxruntime = pytest.importorskip("onnxruntime", reason="the demo runs its models in onnxruntime")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with base.onnx and adapter/, and truth.onnx with weights merged by plain numpy."""
    folder = tmp_path_factory.mktemp("demo")
    weights, factors = demo_model.make_weights(), demo_model.make_factors()
    scale = np.float32(demo_model.SCALE)
    merged = {k: w + scale * factors[k][1] @ factors[k][0] if k in factors else w for k, w in weights.items()}
    onnx.save_model(demo_model.build_model(weights), folder / "base.onnx")
    onnx.save_model(demo_model.build_model(merged), folder / "truth.onnx")
    onnx.save_model(demo_model.build_model(weights, factors), folder / "reference.onnx")
    demo_model.write_adapter(folder / "adapter", factors)
    return folder


def _report(base: Path, merged: Path, reference: Path) -> demo.DemoReport:
    facts = demo._compare_files(base, merged) | demo._compare_runs(base, merged, reference)
    return demo.DemoReport(base_bytes=0, rank=8, targets=len(demo_model.make_factors()), versions={}, **facts)


def test_the_reference_agrees_with_plain_numpy(files) -> None:
    report = _report(files / "base.onnx", files / "truth.onnx", files / "reference.onnx")
    assert report.passed, report.failures
    assert report.difference < report.tolerance / 10
    assert report.effect > 100 * report.tolerance


def test_the_demo_notices_one_forgotten_target(files, tmp_path) -> None:
    for module in list(demo_model.make_factors())[::4]:
        weights, factors = demo_model.make_weights(), demo_model.make_factors()
        scale = np.float32(demo_model.SCALE)
        others = {k: scale * up @ down for k, (down, up) in factors.items() if k != module}
        wrong = {k: w + others[k] if k in others else w for k, w in weights.items()}
        onnx.save_model(demo_model.build_model(wrong), tmp_path / "wrong.onnx")
        report = _report(files / "base.onnx", tmp_path / "wrong.onnx", files / "reference.onnx")
        assert report.difference > 10 * report.tolerance, module
        assert len(report.failures) == 2


def test_the_demo_notices_a_wrong_scale(files, tmp_path) -> None:
    factors = demo_model.make_factors()
    scale = np.float32(1.01 * demo_model.SCALE)
    weights = demo_model.make_weights()
    wrong = {k: w + scale * factors[k][1] @ factors[k][0] if k in factors else w for k, w in weights.items()}
    onnx.save_model(demo_model.build_model(wrong), tmp_path / "wrong.onnx")
    assert not _report(files / "base.onnx", tmp_path / "wrong.onnx", files / "reference.onnx").passed


def test_the_demo_notices_a_merge_that_does_nothing(files) -> None:
    assert len(_report(files / "base.onnx", files / "base.onnx", files / "reference.onnx").failures) == 2


def test_demo(run) -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for words in ("13 of 24 tensors", "42 nodes before, 42 after: the same", "latency, base again"):
        assert words in result.stdout


def test_demo_as_json_keeps_files(run, tmp_path) -> None:
    folder = tmp_path / "new" / "kept"
    result = run("demo", "--json", "--keep", folder)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["passed"] is True
    assert document["difference"] <= document["tolerance"] < document["effect"]
    assert {path.name for path in folder.iterdir()} == {"base.onnx", "reference.onnx", "merged.onnx", "adapter"}


def test_demo_overwrites_nothing(run, tmp_path) -> None:
    (tmp_path / "mine").write_text("precious")
    result = run("demo", "--keep", tmp_path)
    assert result.exit_code == 4
    assert "LF601" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_demo_under_a_file(run, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert run("demo", "--keep", tmp_path / "file").exit_code == 5


def test_demo_without_onnxruntime(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("demo")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "pip install 'loraformat[cpu]'" in " ".join(result.stderr.split())


def test_a_demo_that_fails_says_so(run, monkeypatch, files) -> None:
    good = _report(files / "base.onnx", files / "truth.onnx", files / "reference.onnx")
    monkeypatch.setattr(demo, "run_demo", lambda _: dataclasses.replace(good, difference=good.effect))
    result = run("demo")
    assert result.exit_code == 1
    assert "the demo failed: the merged model differs" in result.stderr


def test_merge_end_to_end(spawn, run, files, tmp_path) -> None:
    output = tmp_path / "out" / "merged.onnx"
    output.parent.mkdir()
    words = ("merge", files / "base.onnx", files / "adapter", "-o", output)
    done = spawn(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == bytes(output) + b"\n"
    assert b"13 weights rewritten" in done.stderr
    assert b"Traceback" not in done.stderr
    report = _report(files / "base.onnx", output, files / "reference.onnx")
    assert report.passed, report.failures
    again = run(*words)
    assert (again.exit_code, again.stdout) == (4, "")
    assert "LF601" in again.stderr
    before = output.read_bytes()
    forced = run(*words, "--force", "--json", "-j", "1", "--max-memory", "64MiB")
    assert forced.exit_code == 0
    assert json.loads(forced.stdout)["output"] == str(output)
    assert output.read_bytes() == before


def test_dry_run_end_to_end(run, files, tmp_path) -> None:
    output = tmp_path / "merged.onnx"
    done = run("merge", files / "base.onnx", files / "adapter", "-o", output, "--dry-run")
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 14
    assert not output.exists()
    document = json.loads(run("merge", files / "base.onnx", files / "adapter", "--dry-run", "--json").stdout)
    assert len(document["weights"]) == 13


def test_weights_end_to_end(run, files, tmp_path) -> None:
    output = tmp_path / "merged.onnx"
    done = run("merge", files / "base.onnx", f"{files / 'adapter'}:0.25", f"{files / 'adapter'}:0.75", "-o", output)
    assert done.exit_code == 0, done.output
    report = _report(files / "base.onnx", output, files / "reference.onnx")
    assert report.difference <= report.tolerance


def test_inspect_end_to_end(run, files) -> None:
    for name, listed in (("adapter", "targets"), ("base.onnx", "sites")):
        document = json.loads(run("inspect", files / name, "--json").stdout)
        assert len(document[listed]) >= 13
        for words in ((), ("--all",)):
            shown = run("inspect", files / name, *words)
            assert shown.exit_code == 0, shown.output
            assert "self_attn.q_proj" in shown.stdout


def test_errors_end_to_end(run, files, tmp_path) -> None:
    missing = run("merge", files / "base.onnx", tmp_path / "nothing")
    assert (missing.exit_code, missing.stdout) == (3, "")
    assert "LF100" in missing.stderr
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    assert run("inspect", empty).exit_code == 3
