"""Signals that end the program, and the exit codes that they leave."""

import signal
from types import FrameType
from typing import Final, NoReturn

EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
_ENDING_SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def catch_signals() -> None:
    """Turn the ending signals into SystemExit, so that context managers remove what is unfinished."""
    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:  # ignored ones stay ignored (nohup)
            signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    for each in _ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    raise SystemExit(128 + number)
