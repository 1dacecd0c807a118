"""How runs end: exit codes, messages, streams, signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest

from loraformat.errors import error_for, refuse
from loraformat.problems import Problem
from loraformat.reasons import all_reasons
from loraformat_cli.group import root

SETTINGS = ("NO_COLOR", "FORCE_COLOR", "LINES")
CLASSES = [("LF401", 1), ("LF100", 3), ("LF601", 4), ("LF604", 5)]


@pytest.mark.parametrize(("code", "exit_code"), CLASSES)
def test_exit_codes(run, face, code, exit_code) -> None:
    face.answer("inspect", refuse(code, "here", "this"))
    result = run("inspect", "file")
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.startswith(f"error: {code} ")


@pytest.mark.parametrize(("code", "exit_code"), CLASSES)
def test_exit_codes_as_json(run, face, code, exit_code) -> None:
    problems = [Problem(code, "here", "this"), Problem(code, "there", "that", "other", "do so")]
    face.answer("inspect", error_for(problems))
    result = run("inspect", "file", "--json")
    assert result.exit_code == exit_code
    assert json.loads(result.stdout) == {"problems": [dict(p.as_json()) for p in problems], "exit_code": exit_code}
    assert result.stderr == ""


def test_every_problem_is_printed(run, face) -> None:
    face.answer("inspect", error_for([Problem("LF401", f"target {number}", "none") for number in range(40)]))
    stderr = run("inspect", "file").stderr
    assert all(f"target {number}" in stderr for number in range(40))
    assert run("inspect", "file", "-v").stderr.count("error: LF401") == 40


def test_names_cannot_drive_the_terminal(run, face) -> None:
    face.answer("inspect", refuse("LF401", "[bold]x[/bold] :smile: \x1b[2J\u202e", "\ud800"))
    stderr = run("inspect", "file").stderr
    assert r"[bold]x[/bold] :smile: \x1b[2J\u202e" in stderr
    assert "\x1b" not in stderr


def test_long_lines_are_not_broken(run, face) -> None:
    name = "a/very long name " * 40
    face.answer("inspect", refuse("LF401", name, "this"))
    assert name in run("inspect", "file").stderr


def test_a_path_that_the_system_does_not_take(run) -> None:
    result = run("inspect", "/".join(["long" * 50] * 25))
    assert result.exit_code == 3
    assert result.stderr.startswith("error: LF100 ")


def test_a_working_directory_that_is_gone(run, tmp_path, monkeypatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = run("inspect", "file")
    assert result.exit_code == 3
    assert result.stderr.startswith("error: LF100 no such file: the working directory")


def test_no_more_threads(run, face) -> None:
    def start(*_: object, **__: object) -> None:
        before = threading.stack_size(1 << 45)  # more than any system has addresses for
        try:
            threading.Thread(target=list).start()
        finally:
            threading.stack_size(before)

    face.answer("inspect", start)
    result = run("inspect", "file")
    assert result.exit_code == 5
    assert result.stderr.startswith("error: LF641 ")


def test_what_cannot_be_read_is_said_by_the_readers() -> None:
    """By a reason code, not as wrong usage."""
    paths = [
        parameter.type
        for name in root.list_commands(click.Context(root))
        for parameter in root.get_command(click.Context(root), name).params
        if isinstance(parameter.type, click.Path)
    ]
    assert len(paths) > 10
    assert not any(path.readable or path.exists for path in paths)


def test_a_bug_is_one_line(run, face) -> None:
    face.answer("inspect", ZeroDivisionError("oh\nno"))
    result = run("inspect", "file")
    assert (result.exit_code, result.stdout) == (70, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(r"loraformat has a bug: ZeroDivisionError: oh\nno (conftest.py:")
    assert "LORAFORMAT_TRACEBACK=1" in result.stderr


def test_a_bug_as_json(run, face) -> None:
    face.answer("inspect", ZeroDivisionError("oh"))
    result = run("inspect", "file", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == document["exit_code"] == 70
    assert document["problems"][0]["code"] == "bug"
    assert result.stderr == ""


def test_a_bug_with_traceback(run, face) -> None:
    face.answer("inspect", ZeroDivisionError("oh"))
    result = run("inspect", "file", env={"LORAFORMAT_TRACEBACK": "1"})
    assert result.exit_code == 70
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("loraformat has a bug")


def test_ctrl_c(run, face) -> None:
    face.answer("inspect", KeyboardInterrupt())
    result = run("inspect", "file")
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "")


@pytest.mark.parametrize(
    ("words", "env", "coloured"),
    [
        ([], {}, False),
        ([], {"FORCE_COLOR": "1"}, True),
        ([], {"FORCE_COLOR": "0"}, False),
        ([], {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (["--color", "never"], {"FORCE_COLOR": "1"}, False),
        (["--color", "always"], {"NO_COLOR": "1", "TERM": "dumb"}, True),
    ],
)
def test_colours(run, face, receipt, words, env, coloured) -> None:
    face.answer("inspect", refuse("LF401", "here", "this"))
    face.answer("merge", receipt)
    assert ("\x1b[" in run(*words, "inspect", "file", env=env).stderr) is coloured
    merged = run("merge", "base", "adapter", *words, env=env)
    assert ("\x1b[1m" in merged.stderr) is coloured
    assert "\x1b" not in merged.stdout
    assert ("\x1b[1m" in run("explain", *words, env=env).stdout) is coloured


# The rest needs a process of its own.


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m loraformat explain --json; echo $? >&2"
    shell = f"( {command} ) | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == "0\n"


def test_a_reader_that_left_before_the_error_keeps_its_code() -> None:
    shell = f"( sleep 0.2; {sys.executable} -m loraformat explain nope --json; echo $? >&2 ) | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == "2\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["explain"], ["explain", "LF401"], ["--help"], ["completion", "zsh"]])
def test_a_full_disk_under_stdout(spawn, words) -> None:
    with open("/dev/full", "wb") as full:
        done = spawn(*words, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 5
    assert done.stderr.startswith(b"standard output cannot be written: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("closed", ["2>&-", "0<&-", "0<&- 2>&-", "0<&- 1>&- 2>&-", "2>/dev/full"])
def test_closed_streams(closed) -> None:
    if "/dev/full" in closed and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    shell = f"{sys.executable} -m loraformat explain LF401 {closed}; echo $?; {sys.executable} -m loraformat x {closed}"
    done = subprocess.run(["bash", "-c", f"{shell}; echo $?"], capture_output=True, text=True, check=False, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["0", "2"]
    assert lines[0].startswith("LF401") is ("1>&-" not in closed)


@pytest.mark.parametrize(
    "env", [{"LC_ALL": "C"}, {"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_poor_surroundings(spawn, env) -> None:
    done = spawn("explain", "--color", "always", env={"HOME": "", "PYTHONCOERCECLOCALE": "0"} | env)
    assert (done.returncode, done.stderr) == (0, b"")
    done = spawn("inspect", "no such é \x1b[2J file", env=env)
    assert b"\x1b" not in done.stderr
    assert b"Traceback" not in done.stderr


def test_no_environment_at_all(tmp_path) -> None:
    command = [sys.executable, "-m", "loraformat", "explain"]
    done = subprocess.run(command, capture_output=True, env={}, cwd=tmp_path, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


SLOW = """
import sys, time
from pathlib import Path
import loraformat
class Face:
    @staticmethod
    def inspect(path, **_):
        part = Path(path)
        part.write_text("part")
        try:
            print("started", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.2)
            part.unlink()
loraformat.inspect = Face.inspect
sys.argv = ["loraformat", "inspect", sys.argv[1]]
from loraformat_cli.main import main
main()
"""


def _heed_signals() -> None:
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("numbers", "exit_code"),
    [
        ((signal.SIGTERM,), 143),
        ((signal.SIGHUP,), 129),
        ((signal.SIGINT,), 130),
        ((signal.SIGTERM, signal.SIGTERM), 143),
    ],
)
def test_signals_end_cleanly(tmp_path, numbers, exit_code) -> None:
    part = tmp_path / "part"
    command = [sys.executable, "-c", SLOW, str(part)]
    pipe = subprocess.PIPE
    # What runs the tests may ignore them, as nohup and shells do for what is in the background: the child would too.
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=_heed_signals) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.05)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr.strip()) == (exit_code, "")
    assert not part.exists()


def test_ignored_signals_stay_ignored(tmp_path) -> None:
    probe = "import os,signal;signal.signal(signal.SIGHUP,signal.SIG_IGN);"
    probe += (
        "from loraformat_cli.signals import catch_signals as c;c();os.kill(os.getpid(),signal.SIGHUP);print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "alive\n"


@pytest.mark.parametrize("columns", [40, 200])
def test_tables_are_folded_on_a_terminal_and_lose_nothing(columns) -> None:
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    settings = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    env = settings | {"TERM": "xterm", "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "loraformat", "explain", "--color", "never"]
    try:
        with subprocess.Popen(command, stdout=terminal, stderr=subprocess.PIPE, env=env) as process:
            os.close(terminal)
            shown = _read_all(controller).decode()
            assert process.wait(60) == 0
    finally:
        os.close(controller)
    assert "\x1b" not in shown
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    text = "".join("".join(line[11:].split()) for line in lines[1:])  # the titles, without spaces
    assert text == "".join("".join(reason.title.split()) for reason in all_reasons().values())


def _read_all(descriptor: int) -> bytes:
    parts = []
    try:
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
    except OSError:  # how Linux says that the other end of a terminal is closed
        pass
    return b"".join(parts)


def test_progress_only_where_it_can_be_seen(face, receipt, monkeypatch) -> None:
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    script = (
        "import loraformat, os\n"
        "def merge(*_, progress, **__):\n"
        "    os.write(1, b'none' if progress is None else b'bar')\n"
        "    if progress: progress.start(10); progress.advance(10)\n"
        "    raise SystemExit(0)\n"
        "loraformat.merge = merge\n"
        "import sys; sys.argv = ['loraformat', 'merge', 'a', 'b', *sys.argv[1:]]\n"
        "from loraformat_cli.main import main; main()\n"
    )

    def merge(*words: str, stderr: int, **env: str) -> bytes:
        command = [sys.executable, "-c", script, *words]
        surroundings = os.environ | {"TERM": "xterm"} | env
        return subprocess.run(command, stdout=-1, stderr=stderr, env=surroundings, check=True, timeout=60).stdout

    try:
        assert merge(stderr=terminal) == b"bar"
        assert merge("-q", stderr=terminal) == b"none"
        assert merge("--json", stderr=terminal) == b"none"
        assert merge(stderr=terminal, TERM="dumb") == b"none"
        assert merge(stderr=subprocess.DEVNULL) == b"none"
    finally:
        os.close(terminal)
        os.close(controller)


def test_many_problems_of_one_code_are_all_named_and_few_in_full(run, face) -> None:
    from loraformat.errors import error_for
    from loraformat.problems import Problem

    places = [f"model.layers.{index}.q" for index in range(9)]
    face.answer("merge", error_for([Problem("LF401", place, "nothing of this name") for place in places]))
    result = run("merge", "base.onnx", "style")
    assert result.exit_code == 1
    assert all(place in result.stderr for place in places)
    assert result.stderr.count("found:") == 6
