"""Everything that can be said about a file before it is used: is it what it claims to be, is it sound, is it odd.

All problems at once, not the first: what a reader would refuse, what a merge would refuse, and what is legal but
suspicious.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loraformat.adapter import Adapter
from loraformat.bases import BaseModel
from loraformat.errors import LoraformatError
from loraformat.loading import CONFIG_NAME, FACTORS_NAME, is_base, load_adapter, open_base
from loraformat.problems import Problem, Severity
from loraformat.resolve import resolve
from loraformat.rules import check_adapter
from loraformat.schemes import NOT_STATED, StatedScale

_ADAPTER_NAMES: Final = (FACTORS_NAME, "adapter_model.bin", CONFIG_NAME)
_SUFFIXES: Final = (".safetensors",)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said about one path.

    Attributes:
        path: the file or folder.
        scheme: the naming scheme that it is of; empty where none could be read.
        targets: how many targets it has.
        problems: everything that was found, in order of weight.
    """

    path: Path
    scheme: str
    targets: int
    problems: tuple[Problem, ...]

    def reaches(self, severity: Severity) -> bool:
        """Say whether a problem of this severity, or a graver one, was found."""
        grave = _SEVERITIES[: _SEVERITIES.index(severity) + 1]
        return any(problem.severity in grave for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--format json`."""
        return {
            "path": str(self.path),
            "scheme": self.scheme,
            "targets": self.targets,
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }


_SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "note")


def validate_path(path: Path, stated: StatedScale = NOT_STATED, base: BaseModel | None = None) -> Verdict:
    """Return the verdict on one adapter.

    Args:
        path: a file or a PEFT folder.
        stated: the scale, for sources that do not state one.
        base: the base that it should fit; None checks the adapter alone.
    """
    try:
        adapter = load_adapter(path, None, stated)
    except LoraformatError as error:
        return Verdict(path, "", 0, error.problems)
    problems = check_adapter(adapter)
    if base is not None and not any(problem.severity == "error" for problem in problems):
        problems += check_against(adapter, base)
    ordered = sorted(problems, key=lambda problem: _SEVERITIES.index(problem.severity))
    return Verdict(path, adapter.scheme, len(adapter.targets), tuple(ordered))


def check_against(adapter: Adapter, base: BaseModel) -> list[Problem]:
    """Return what stands between a sound adapter and a base: names, shapes, sharing, fingerprints."""
    return [*base.problems, *resolve(adapter, base.sites).problems]


def find_adapters(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the adapters at `paths`: files as they are, and in folders everything that looks like one, sorted.

    A folder with PEFT's files is one adapter. Models among the files of a folder are passed over.
    """
    for path in paths:
        yield from _walk(path) if path.is_dir() and not _is_adapter_folder(path) else [path]


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from [entry] if _is_adapter_folder(entry) else _walk(entry)
        elif entry.suffix in _SUFFIXES and not _is_surely_base(entry):
            yield entry


def _is_adapter_folder(folder: Path) -> bool:
    return any((folder / name).exists() for name in _ADAPTER_NAMES)


def _is_surely_base(path: Path) -> bool:
    try:
        return is_base(path)
    except LoraformatError:
        return False


def validate_paths(paths: Sequence[Path], stated: StatedScale, base: Path | None) -> list[Verdict]:
    """Return the verdicts on all adapters at `paths`; raises when the base itself cannot be opened."""
    opened = open_base(base) if base is not None else None
    return [validate_path(path, stated, opened) for path in find_adapters(paths)]
