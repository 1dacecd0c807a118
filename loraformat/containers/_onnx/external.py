"""External data of ONNX tensors: what `external_data` says, checked, and what the files of a copy are called."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from loraformat.errors import refuse
from loraformat.files import is_location

if TYPE_CHECKING:
    import onnx

_NUMBER: Final = re.compile(r"[0-9]{1,19}")
_MAX_ATTEMPTS: Final = 10_000
_KNOWN: Final = ("location", "offset", "length", "checksum")


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where a tensor's numbers are, as its model has it.

    Attributes:
        location: path from the model's folder, unchecked.
        offset: bytes from the start of the data file.
        length: bytes, or None when the model does not say.
    """

    location: str
    offset: int
    length: int | None


def read_external(proto: "onnx.TensorProto", where: object) -> ExternalData:
    """Return what a tensor says about its external data; keys that nobody defined are ignored.

    Raises:
        RefusedError: LF903 two locations, which readers choose from differently.
        InputError: LF116 another key twice, or an offset or length that is not a number.
    """
    found: dict[str, str] = {}
    for entry in proto.external_data:
        if entry.key not in _KNOWN:
            continue
        if entry.key in found:
            code = "LF903" if entry.key == "location" else "LF116"
            raise refuse(code, where, f"tensor {proto.name!r} has {entry.key!r} twice", "each key once")
        found[entry.key] = entry.value
    length = _number(found["length"], "length", proto.name, where) if "length" in found else None
    offset = _number(found.get("offset", "0"), "offset", proto.name, where)
    return ExternalData(found.get("location", ""), offset, length)


def _number(text: str, key: str, name: str, where: object) -> int:
    if not _NUMBER.fullmatch(text):
        raise refuse("LF116", where, f"tensor {name!r} has the {key} {text[:40]!r}", "a non-negative number")
    return int(text)


def check_location(output: Path, name: str) -> None:
    """Refuse (LF608) to call a data file of a new model as no model may, which no reader would follow."""
    if not is_location(name):
        raise refuse("LF608", output, f"a data file called {name!r}", "a name of UTF-8 without backslash and drive")


@dataclass(frozen=True, slots=True)
class DataNames:
    """How the data files of a model are called beside a copy of it.

    Attributes:
        base: file name of the model.
        output: path of the copy.
        fresh: what to insert where a name is taken.
        is_taken: says whether a path is another file's.
    """

    base: str
    output: Path
    fresh: str
    is_taken: Callable[[Path], bool]

    def choose(self, old: PurePosixPath, taken: Collection[str]) -> PurePosixPath:
        """Return the location in the copy, in the same sub-folder; `old` itself where nothing is to change.

        Args:
            old: the location in the model.
            taken: locations that other data files of the copy have, case folded.

        Raises:
            RefusedError: LF608 a name from which no location can be made.
        """
        name = self._rename(old.name)
        wanted, attempt = old.with_name(name), 0
        while self._is_taken(wanted, taken) and attempt < _MAX_ATTEMPTS:
            wanted, attempt = old.with_name(self._freshen(name, attempt)), attempt + 1
        check_location(self.output, str(wanted))
        return wanted

    def _is_taken(self, wanted: PurePosixPath, taken: Collection[str]) -> bool:
        folded = str(wanted).casefold()
        return folded == self.output.name.casefold() or folded in taken or self.is_taken(self.output.parent / wanted)

    def _rename(self, name: str) -> str:
        """Put the copy's name where the model's name stands."""
        if self.output.name == self.base:
            return name
        for old, new in ((self.base, self.output.name), (Path(self.base).stem, self.output.stem)):
            rest = name.removeprefix(old)
            if rest != name and not rest[:1].isalnum():
                return new + rest
        return f"{self.output.stem}.{name}"

    def _freshen(self, name: str, attempt: int) -> str:
        """Insert the fresh digits after the copy's stem, or before the extension of a name without it."""
        mark = f"-{self.fresh}" + (f"-{attempt}" if attempt else "")
        if name.startswith(self.output.stem):
            return self.output.stem + mark + name.removeprefix(self.output.stem)
        plain = PurePosixPath(name)
        return plain.stem + mark + plain.suffix
