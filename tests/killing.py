"""A process that kills itself at one of its calls: Python source, for the children that tests of crashes fork."""

from typing import Final

KILL_AT: Final = """
import os, signal

def kill_at(number, functions):
    calls = 0
    def patch(name):
        real = getattr(os, name)
        def counted(*arguments, **more):
            nonlocal calls
            if name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR):
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)
        setattr(os, name, counted)
    for name in functions:
        if hasattr(os, name):
            patch(name)
"""
