"""Fixtures of the command line's tests: the runner, a face that does what a test says, and a subprocess."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import loraformat
from loraformat.problems import Problem
from loraformat.receipt import AppliedAdapter, MergedWeight, Receipt
from loraformat_cli.group import root

SETTINGS = ("NO_COLOR", "FORCE_COLOR", "LORAFORMAT_TRACEBACK")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line in this process."""
    for name in (*SETTINGS, *(name for name in os.environ if name.startswith("LORAFORMAT_"))):
        monkeypatch.delenv(name, raising=False)

    def invoke(*words: str | Path, env: Mapping[str, str] | None = None) -> Result:
        result = CliRunner(env=env).invoke(root, [str(word) for word in words], prog_name="loraformat")
        assert "Traceback" not in result.output or (env or {}).get("LORAFORMAT_TRACEBACK")
        return result

    return invoke


class Face:
    """Stands in for `loraformat.api`: remembers calls, returns or raises what it was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._monkeypatch = monkeypatch

    def answer(self, name: str, value: Any) -> None:
        """Let `loraformat.<name>` return `value`, raise it, or call it."""

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            if isinstance(value, BaseException):
                raise value
            return value(*args, **kwargs) if callable(value) else value

        self._monkeypatch.setitem(vars(loraformat), name, stand_in)


@pytest.fixture
def face(monkeypatch: pytest.MonkeyPatch) -> Face:
    return Face(monkeypatch)


@pytest.fixture
def receipt() -> Receipt:
    return Receipt(
        output="/models/merged.onnx",
        base={"name": "base.onnx", "files": [{"name": "base.onnx", "bytes": 10}], "structure_sha256": "ab"},
        plan_sha256="cd",
        adapters=(AppliedAdapter("style [bold]:smile:", "ef", 0.8, 2),),
        weights=(
            MergedWeight("onnx::MatMul_12", ("model.q_proj",), (1.6,), 0.99987, 0.02, 0.0),
            MergedWeight("onnx::MatMul_13", ("model.v_proj",), (1.6,), 0.96, 0.03, 0.0),
        ),
        problems=(Problem("LF214", "model.v_proj", "a factor of zeros", severity="warning"),),
    )


@pytest.fixture
def plan() -> SimpleNamespace:
    weight = SimpleNamespace(
        name="onnx::MatMul_12",
        dtype="F32",
        shape=(64, 48),
        targets=("model.layers.0.self_attn.q_proj",),
        scales=(1.6,),
        ranks=(8,),
        kinds=("lora",),
        changes=("a change",),
        evidence="node path",
        nbytes=12288,
    )
    return SimpleNamespace(
        output=Path("/models/merged.onnx"),
        format="onnx",
        weights=(weight,),
        unmatched=("lm_head",),
        problems=(),
        sha256="cd",
        as_json=lambda: {"sha256": "cd", "weights": [{"name": weight.name}]},
    )


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[bytes]"]:
    """Run `python -m loraformat` in a process of its own."""

    def start(*words: str | Path, env: Mapping[str, str] | None = None, **kwargs: Any) -> Any:
        settings = {name: value for name, value in os.environ.items() if not name.startswith("LORAFORMAT_")}
        kwargs = {"capture_output": True, "cwd": tmp_path, "timeout": 120} | kwargs
        command = [sys.executable, "-m", "loraformat", *map(str, words)]
        return subprocess.run(command, env=settings | dict(env or {}), check=False, **kwargs)

    return start
