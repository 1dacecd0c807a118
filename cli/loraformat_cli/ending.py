"""How a run ends: every exception becomes a message and an exit code; no traceback reaches a user."""

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import click

from loraformat_cli.screen import Screen
from loraformat_cli.signals import EXIT_INTERRUPTED

TRACEBACK_VARIABLE: Final = "LORAFORMAT_TRACEBACK"
_EXIT_USAGE: Final = 2
_NO_THREAD: Final = "can't start new thread"
"""As Python says it, which has no class of its own for it."""
_STREAM_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def ending(work: Callable[[], object], screen: Screen) -> int:
    """Do `work`, report how it ended, and return the exit code."""
    try:
        outcome = work()
        sys.stdout.flush()
    except click.Abort:  # what click makes of Ctrl-C
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has what it wanted
        return 0
    except click.ClickException as error:
        return _report_usage(error, screen)
    except Exception as error:
        return _report_failure(error, screen)
    return outcome if isinstance(outcome, int) else 0


def _report_usage(error: click.ClickException, screen: Screen) -> int:
    if screen.json:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "loraformat"
        record = _record("usage", "wrong usage", where, error.format_message(), f"Try: {where} --help")
        _print_document([record], error.exit_code, screen)
    else:
        with suppress(OSError):
            error.show()
    return error.exit_code


def _report_failure(error: Exception, screen: Screen) -> int:
    """Report an exception that came out of a command."""
    from loraformat.errors import LoraformatError
    from loraformat.reasons import EXIT_OUTPUT

    error = _explain(error)
    if isinstance(error, LoraformatError):
        if screen.json:
            _print_document([problem.as_json() for problem in error.problems], error.exit_code, screen)
        else:
            screen.problems(error.problems)
        return error.exit_code
    if isinstance(error, OSError) and error.errno in _STREAM_FULL:
        reason = os.strerror(error.errno or 0)
        return _report_line("output", "standard output cannot be written", reason, EXIT_OUTPUT, screen)
    return _report_bug(error, screen)


def _explain(error: Exception) -> Exception:
    """Return LF100 for what the system says of a path before any reader does, LF641 for want of threads."""
    from loraformat.errors import refuse

    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return refuse("LF641", "the work", str(error), "a thread beside the first")
    if not isinstance(error, OSError):
        return error
    if error.errno == errno.ENAMETOOLONG:
        return refuse("LF100", error.filename or "path", os.strerror(error.errno), "a path that the system takes")
    if error.errno == errno.ENOENT and not _has_working_directory():
        return refuse(
            "LF100", "the working directory", "it was removed", "absolute paths, or a directory that is there"
        )
    return error


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _report_bug(error: Exception, screen: Screen) -> int:
    from loraformat.reasons import EXIT_BUG

    if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        import traceback

        with suppress(OSError):
            traceback.print_exception(error, file=sys.stderr)
    found = (
        f"{type(error).__name__}: {error}{_place(error)}, please report it with the output of {TRACEBACK_VARIABLE}=1"
    )
    return _report_line("bug", "loraformat has a bug", found, EXIT_BUG, screen)


def _place(error: Exception) -> str:
    """Return ` (file.py:12)` of the innermost frame."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"


def _report_line(code: str, title: str, found: str, exit_code: int, screen: Screen) -> int:
    if screen.json:
        _print_document([_record(code, title, "loraformat", found, "")], exit_code, screen)
    else:
        screen.error_line(f"{title}: {found}")
    return exit_code


def _record(code: str, title: str, where: str, found: str, mend: str) -> Mapping[str, str]:
    """Return what `Problem.as_json` returns, for what has no reason code."""
    return dict(code=code, severity="error", title=title, where=where, found=found, expected="", mend=mend)  # noqa: C408


def _print_document(records: Sequence[Mapping[str, str]], exit_code: int, screen: Screen) -> None:
    with suppress(OSError):
        screen.document({"problems": list(records), "exit_code": exit_code})
