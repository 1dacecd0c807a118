"""The bar that shows how many bytes are done. Imports rich: only `Screen.progress` imports this."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class ByteBar:
    """What the face calls while it works; gone from the screen when it is done.

    Args:
        console: where to draw.
        verb: what is being done.
    """

    def __init__(self, console: Console, verb: str) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(
            *columns,
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(verb, total=None, visible=False)

    def start(self, total_bytes: int) -> None:
        """Show the bar, from nothing to `total_bytes`."""
        self._bar.reset(self._task, total=total_bytes, visible=True)

    def advance(self, nbytes: int) -> None:
        """Move on by `nbytes`; any thread may call this."""
        self._bar.advance(self._task, nbytes)

    def __enter__(self) -> "ByteBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
