"""`merge`: what reaches the face, and what reaches whom."""

import json
from pathlib import Path

import pytest

from loraformat.errors import refuse
from loraformat.limits import RETAINED_REFUSE


def test_stdout_is_the_path_alone(run, face, receipt) -> None:
    face.answer("merge", receipt)
    result = run("merge", "base.onnx", "style")
    assert (result.exit_code, result.stdout) == (0, "/models/merged.onnx\n")
    assert "style [bold]:smile:" in result.stderr  # neither markup nor an emoji
    assert "2 weights rewritten" in result.stderr
    assert "96.000% (onnx::MatMul_13)" in result.stderr
    assert "warning: LF214" in result.stderr


def test_a_folder_is_no_name_for_a_file(run, face, receipt, tmp_path) -> None:
    """`-o merged/` beside a file would make a file called `merged`."""
    face.answer("merge", receipt)
    model = tmp_path / "model.onnx"
    model.touch()
    result = run("merge", model, "style", "-o", "merged/")
    assert (result.exit_code, face.calls) == (2, [])
    assert "-o merged/model.onnx" in result.stderr
    assert run("merge", tmp_path, "style", "-o", "merged/").exit_code == 0


def test_a_plan_in_place_names_the_base(run, face) -> None:
    face.answer("plan_merge", refuse("LF401", "x", "nothing"))
    run("merge", "base.onnx", "style", "--in-place", "--dry-run")
    assert face.calls[0][1][2] == Path("base.onnx")


def test_quiet_leaves_the_path(run, face, receipt) -> None:
    face.answer("merge", receipt)
    for words in (["-q", "merge", "base.onnx", "style"], ["merge", "base.onnx", "style", "-q"]):
        result = run(*words)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "/models/merged.onnx\n", "")


def test_verbose_lists_every_weight(run, face, receipt) -> None:
    face.answer("merge", receipt)
    result = run("merge", "base.onnx", "style", "-v")
    assert result.stdout == "/models/merged.onnx\n"
    assert "onnx::MatMul_12" in result.stderr
    assert "99.987%" in result.stderr


def test_json_is_one_object(run, face, receipt) -> None:
    face.answer("merge", receipt)
    result = run("merge", "base.onnx", "style", "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(receipt.as_json()))
    assert json.loads(result.stdout)["output"] == "/models/merged.onnx"


def test_json_has_no_nan(run, face, receipt) -> None:
    from dataclasses import replace

    face.answer("merge", replace(receipt, weights=(replace(receipt.weights[0], relative=float("nan")),)))
    result = run("merge", "base.onnx", "style", "--json")
    assert json.loads(result.stdout)["weights"][0]["relative"] is None


def test_the_exact_bytes_of_the_path(run, face, receipt) -> None:
    from dataclasses import replace

    name = b"/models/\xff\xc3\xa9.onnx"
    face.answer("merge", replace(receipt, output=name.decode("utf-8", "surrogateescape")))
    assert run("merge", "base.onnx", "style").stdout_bytes == name + b"\n"


def test_every_flag_reaches_the_face(run, face, receipt) -> None:
    face.answer("merge", receipt)
    words = "--force --scheme peft --alpha 16 --allow-unmatched lm_* --allow-unmatched *.x --strip-prefix model. "
    words += "--min-retained 0.25 --allow-zero --untie --new-biases --durable -j 3 --max-memory 64MiB -o out.onnx"
    result = run("merge", "base.onnx", "one:0.5", "two", *words.split())
    assert result.exit_code == 0
    ((_, args, kwargs),) = face.calls
    assert args == (Path("base.onnx"), [(Path("one"), 0.5), Path("two")], Path("out.onnx"))
    assert kwargs == {
        "progress": None,
        "force": True,
        "scheme": "peft",
        "alpha": 16.0,
        "allow_unmatched": ("lm_*", "*.x"),
        "strip_prefix": "model.",
        "min_retained": 0.25,
        "allow_zero": True,
        "untie": True,
        "new_biases": True,
        "durable": True,
        "jobs": 3,
        "max_memory_bytes": 64 << 20,
    }


def test_the_flags_of_other_outputs_reach_the_face(run, face, receipt) -> None:
    face.answer("merge", receipt)
    words = "--warn-retained 0.5 --ignore-fingerprints --dtype bfloat16 --to safetensors --resume --link --keep-undo"
    assert run("merge", "base.onnx", "one", *words.split()).exit_code == 0
    asked = face.calls[0][2]
    assert asked == {
        "progress": None,
        "force": False,
        "durable": False,
        "allow_unmatched": (),
        "allow_zero": False,
        "warn_retained": 0.5,
        "ignore_fingerprints": True,
        "dtype": "bfloat16",
        "to": "safetensors",
        "resume": True,
        "link": True,
        "keep_undo": True,
    }


def test_each_is_a_model_for_each_adapter(run, face, receipt) -> None:
    from dataclasses import replace

    face.answer("merge_each", [receipt, replace(receipt, output="/models/other.onnx")])
    result = run("merge", "base.onnx", "--each", "one", "two:0.5", "-o", "models", "--resume")
    assert (result.exit_code, result.stdout) == (0, "/models/merged.onnx\n/models/other.onnx\n")
    ((name, args, kwargs),) = face.calls
    assert (name, args) == ("merge_each", (Path("base.onnx"), [Path("one"), (Path("two"), 0.5)], Path("models")))
    assert kwargs["resume"] is True
    printed = json.loads(run("merge", "base.onnx", "--each", "one", "two", "-o", "models", "--json").stdout)
    assert [each["output"] for each in printed["receipts"]] == ["/models/merged.onnx", "/models/other.onnx"]


def test_in_place_has_no_output(run, face, receipt) -> None:
    face.answer("merge_into", receipt)
    assert run("merge", "base.onnx", "one", "--in-place", "--keep-undo").exit_code == 0
    ((name, args, kwargs),) = face.calls
    assert (name, args) == ("merge_into", (Path("base.onnx"), [Path("one")]))
    assert kwargs["keep_undo"] is True


@pytest.mark.parametrize(
    "words",
    [
        "--each",
        "--each -o out --in-place",
        "--each -o out --dry-run",
        "--in-place -o out",
        "--to onnx",
        "--warn-retained 2",
    ],
)
def test_flags_that_do_not_go_together(run, face, receipt, words) -> None:
    for name in ("merge", "merge_each", "merge_into", "plan_merge"):
        face.answer(name, receipt)
    assert run("merge", "base.onnx", "one", *words.split()).exit_code == 2
    assert face.calls == []


def test_a_plan_is_asked_for_what_it_knows(run, face, plan) -> None:
    face.answer("plan_merge", plan)
    run("merge", "base.onnx", "one", "--dry-run", "--resume", "--link", "--keep-undo", "--dtype", "float16", "--untie")
    assert face.calls[0][2] == {"allow_unmatched": (), "allow_zero": False, "dtype": "float16", "untie": True}


def test_what_is_not_given_is_left_to_the_face(run, face, receipt) -> None:
    face.answer("merge", receipt)
    run("merge", "base.onnx", "one")
    ((_, args, kwargs),) = face.calls
    assert args == (Path("base.onnx"), [Path("one")], None)
    assert set(kwargs) == {"progress", "force", "durable", "allow_unmatched", "allow_zero"}


def test_the_help_states_the_real_default(run) -> None:
    assert f"[default: {RETAINED_REFUSE}]" in " ".join(run("merge", "--help").stdout.split())


def test_variables_are_defaults(run, face, receipt) -> None:
    face.answer("merge", receipt)
    run("merge", "base.onnx", "one", env={"LORAFORMAT_MERGE_JOBS": "7", "LORAFORMAT_QUIET": "0"})
    assert face.calls[0][2]["jobs"] == 7


def test_alpha_and_scale_exclude_each_other(run, face, receipt) -> None:
    face.answer("merge", receipt)
    assert run("merge", "base.onnx", "one", "--alpha", "1", "--scale", "1").exit_code == 2
    assert face.calls == []


@pytest.mark.parametrize("flag", ["--alpha=nan", "--scale=inf", "--min-retained=2", "-j0", "--max-memory=lots"])
def test_numbers_out_of_range(run, flag) -> None:
    assert run("merge", "base.onnx", "one", flag).exit_code == 2


def test_dry_run_shows_the_plan_and_merges_nothing(run, face, plan) -> None:
    face.answer("plan_merge", plan)
    result = run(
        "merge",
        "base.onnx",
        "one",
        "--dry-run",
        "-j",
        "2",
        "--force",
        "--max-memory",
        "1GB",
        "--allow-zero",
        "--min-retained",
        "1",
    )
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["target", "weight", "rank", "scale", "kind", "form", "evidence"]
    cells = [
        "model.layers.0.self_attn.q_proj",
        "onnx::MatMul_12",
        "8",
        "1.6",
        "lora",
        "F32",
        "[64,",
        "48]",
        "node",
        "path",
    ]
    assert lines[1:] == [cells]
    assert "left out, as allowed: lm_head" in result.stderr
    ((name, _, kwargs),) = face.calls
    assert (name, kwargs) == ("plan_merge", {"allow_unmatched": (), "allow_zero": True})


def test_dry_run_as_json(run, face, plan) -> None:
    face.answer("plan_merge", plan)
    assert json.loads(run("merge", "base.onnx", "one", "--dry-run", "--json").stdout) == plan.as_json()


def test_a_failed_merge_leaves_stdout_empty(run, face) -> None:
    face.answer("merge", refuse("LF401", "model.layers.0.q_proj", "no such module", "one of: model.layers.0.q"))
    result = run("merge", "base.onnx", "one")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: LF401 target not found in the base: model.layers.0.q_proj\n")
    for part in ("  found: no such module\n", "  expected: one of: model.layers.0.q\n", "  mend: Check that"):
        assert part in result.stderr
