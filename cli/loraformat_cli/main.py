"""The program: what surrounds the click group, namely open descriptors and the last flush."""

import os
import sys
from contextlib import suppress
from typing import NoReturn

from loraformat_cli.signals import EXIT_INTERRUPTED, catch_signals


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        _open_standard_descriptors()
        catch_signals()
        from loraformat_cli.group import root  # here, so that Ctrl-C during the imports is caught too

        root.main(prog_name="loraformat")
        raise AssertionError("root.main exits")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        _flush()


def _open_standard_descriptors() -> None:
    """Point closed standard streams at the null device.

    Otherwise the first file that is opened takes the place of stderr, and a library's warning ends up in the model.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if descriptor == 0 else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # any locale can print any name


def _flush() -> None:
    """Flush what is left; a reader that has gone away is no error, and the interpreter must not report it as one."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
