"""Everything that can be said about a file before it is used: is it what it claims to be, is it sound, is it odd.

All problems at once, not the first: what a reader would refuse, what a merge would refuse, and what is legal but
suspicious.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import isdir, realpath
from pathlib import Path
from typing import Any, Final, TypeAlias

from loraformat.adapter import Adapter
from loraformat.bases import BaseModel
from loraformat.errors import LoraformatError, error_for, refuse
from loraformat.evidence import Hints
from loraformat.kinds import KINDS
from loraformat.loading import find_facts, is_base, open_base, open_bundle, read_bundle
from loraformat.loading.adapter_folders import CONFIG_NAME, FACTORS_NAME, find_peft_file
from loraformat.loading.adapter_shards import name_whole
from loraformat.loading.readers import choose_scheme
from loraformat.problems import Problem, Severity, count_problems
from loraformat.recognition import recognise_config
from loraformat.resolve import gather_clues, resolve
from loraformat.rules import check_adapter, is_mergeable, refuse_kind
from loraformat.schemes import (
    NOT_STATED,
    SCHEMES,
    Bundle,
    CheckingScheme,
    ConfiguredScheme,
    Scheme,
    StatedScale,
)
from loraformat.signatures import HEAD_BYTES, describe_head
from loraformat.spans import read_small
from loraformat.strict_json import JsonValue, parse_json_object

_SUFFIXES: Final = (".safetensors", ".onnx_adapter")
_CONFIG_SUFFIX: Final = ".json"
_SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "note")
_FOREIGN_CONFIGS: Final = (
    ({"lora_parameters"}, "a configuration of mlx-lm"),
    ({"fine_tune_type"}, "a configuration of mlx-lm"),
    ({"config", "model_class", "hidden_size"}, "a configuration of AdapterHub's adapters"),
    ({"model_type", "architectures"}, "the configuration of a model, not of an adapter"),
)
"""Fields by which other tools' configurations of the same name are known."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said about one path.

    Attributes:
        path: the file or folder.
        scheme: the naming scheme that it is of; empty where none could be read.
        targets: how many targets it has.
        problems: everything that was found, in order of weight.
        file: the file that a reader would open: of a folder, the one with its tensors.
    """

    path: Path
    scheme: str
    targets: int
    problems: tuple[Problem, ...]
    file: Path | None = None

    def __repr__(self) -> str:
        """Say what it is in one line."""
        what = f", {self.scheme}, {self.targets} targets" if self.scheme else ""
        return f"<Verdict on {str(self.path)!r}{what}: {count_problems(self.problems)}>"

    @property
    def severity(self) -> Severity | None:
        """The gravest severity that was found, None where nothing was."""
        return next((each for each in _SEVERITIES if any(problem.severity == each for problem in self.problems)), None)

    def reaches(self, severity: Severity) -> bool:
        """Say whether a problem of this severity, or a graver one, was found."""
        gravest = self.severity
        return gravest is not None and _SEVERITIES.index(gravest) <= _SEVERITIES.index(severity)

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--format json`."""
        return {
            "path": str(self.path),
            "scheme": self.scheme,
            "targets": self.targets,
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }


Speller: TypeAlias = Callable[[Adapter, BaseModel], Adapter]
"""Returns an adapter with its modules spelled as a base has them."""


def _leave(adapter: Adapter, base: BaseModel) -> Adapter:
    return adapter


def validate_paths(
    paths: Sequence[Path], stated: StatedScale, base: Path | None, spell: Speller = _leave
) -> list[Verdict]:
    """Return the verdicts on all adapters at `paths`; raises when the base itself cannot be opened."""
    opened = open_base(base) if base is not None else None
    return [validate_path(path, stated, opened, spell) for path in find_adapters(paths)]


def validate_path(
    path: Path, stated: StatedScale = NOT_STATED, base: BaseModel | None = None, spell: Speller = _leave
) -> Verdict:
    """Return the verdict on one adapter, or on a configuration that has no tensors beside it.

    Args:
        path: a file or a PEFT folder, or an `adapter_config.json`.
        stated: the scale, for sources that do not state one.
        base: the base that it should fit; None checks the adapter alone.
        spell: how a merge would spell its modules for the base.
    """
    file = _main_file(path)
    try:
        alone = file.suffix == _CONFIG_SUFFIX and name_whole(file) == file
        verdict = _judge_config(path, file) if alone else _judge(path, stated, base, spell)
    except LoraformatError as error:
        verdict = Verdict(path, "", 0, error.problems)
    except OSError as error:  # A folder that may not be listed.
        found = f"cannot be opened: {error.strerror or error}"
        verdict = Verdict(path, "", 0, (Problem("LF100", str(path), found, "a readable folder"),))
    ordered = sorted(_distinct(verdict.problems), key=lambda problem: _SEVERITIES.index(problem.severity))
    return replace(verdict, problems=tuple(ordered), file=file)


def _distinct(problems: Iterable[Problem]) -> Iterable[Problem]:
    """Return the problems with what two checks found said once."""
    return {(problem.code, problem.where, problem.found): problem for problem in problems}.values()


def _judge(path: Path, stated: StatedScale, base: BaseModel | None, spell: Speller) -> Verdict:
    bundle, _ = open_bundle(path)
    if base is not None:
        bundle = replace(bundle, facts=find_facts(base))
    scheme, _ = choose_scheme(bundle, None)
    problems = scheme.check(bundle) if isinstance(scheme, CheckingScheme) else []
    try:
        adapter, implied = _read(scheme, bundle, stated)
    except LoraformatError as error:
        return Verdict(path, scheme.name, 0, (*problems, *error.problems))
    problems += implied + check_adapter(adapter)
    if base is not None:
        adapter = spell(adapter, base)
        problems += [problem for problem in adapter.problems if problem not in problems]
        problems += check_against(adapter, base)
    return Verdict(path, adapter.scheme, len(adapter.targets), tuple(problems))


def _read(scheme: Scheme, bundle: Bundle, stated: StatedScale) -> tuple[Adapter, list[Problem]]:
    """Return the adapter, and what there is to say about a scale that its source does not state."""
    alone: Adapter | None = None
    missing: list[Problem] = []
    try:
        alone = read_bundle(scheme, bundle, NOT_STATED)
    except LoraformatError as error:
        if set(error.codes) != {"LF211"}:
            raise
        missing += error.problems
    if stated == NOT_STATED:  # Without a scale, any will do to find out what else there is to say.
        return alone or scheme.read(bundle, StatedScale(multiplier=1.0)), missing
    adapter = scheme.read(bundle, stated)
    if alone is not None and alone.targets == adapter.targets:
        number = stated.alpha if stated.multiplier is None else stated.multiplier
        code, found = "LF222", f"{number:g}, while every target states its own scale"
    else:
        scales = ", ".join(sorted({f"{target.scale:g}" for target in adapter.targets if target.rank}))
        code, found = "LF211", f"{scales}, as you say"
    return adapter, [Problem(code, str(bundle.path), found, severity="note")]


def check_against(adapter: Adapter, base: BaseModel) -> list[Problem]:
    """Return what stands between an adapter and a base: names, shapes, sharing, fingerprints.

    Targets that are not sound in themselves are left out, since nothing can be said about them.
    """
    sound = []
    for target in adapter.targets:
        kind = KINDS.find(target.kind)
        if kind is not None and not any(problem.severity == "error" for problem in kind.check(target)):
            sound.append(target)
    plain = replace(adapter, targets=tuple(sound))
    return [*base.problems, *resolve(plain, base.sites, clues=gather_clues(plain, base, Hints())).problems]


def _judge_config(path: Path, file: Path) -> Verdict:
    """Return the verdict on a configuration alone: what it announces, and what of it stands against a merge."""
    fields = _read_config(file)
    bundle = Bundle(path, {}, config=fields)
    scheme = next((each for _, each in SCHEMES if isinstance(each, ConfiguredScheme) and each.detect(bundle)), None)
    unmergeable = recognise_config(fields)
    if scheme is None and unmergeable is not None:
        raise error_for([unmergeable.as_problem(file)])
    if scheme is None:
        found = next((what for names, what in _FOREIGN_CONFIGS if names <= fields.keys()), None)
        found = found or f"a JSON object with {', '.join(sorted(fields)[:6]) or 'nothing'}"
        raise refuse("LF121", file, found, "PEFT's adapter_config.json, with peft_type")
    assert isinstance(scheme, ConfiguredScheme), "chosen so"
    reading = scheme.check_config(bundle)
    unknown = [
        refuse_kind(kind, f"{path}: {field}", f"announced by {field}")
        for kind, field in reading.kinds.items()
        if not is_mergeable(kind)
    ]
    # Somebody who names the configuration means it; in a folder, something is missing.
    severity: Severity = "note" if path == file else "warning"
    alone = Problem("LF221", str(path), reading.described, f"{FACTORS_NAME} beside it", severity=severity)
    return Verdict(path, scheme.name, 0, (*reading.problems, *unknown, alone))


def _read_config(file: Path) -> dict[str, JsonValue]:
    content = read_small(file)
    described = describe_head(content[:HEAD_BYTES])
    if described is not None and not content.lstrip().startswith(b"{"):
        raise refuse("LF111", file, described.what, CONFIG_NAME, described.mend)
    return dict(parse_json_object(content, file))


def _main_file(path: Path) -> Path:
    """Return the file that speaks for a path: with tensors where there are any, else a configuration alone."""
    if isdir(path):
        config = path / CONFIG_NAME
        return find_peft_file(path) or (config if config.exists() else path)
    if path.name == CONFIG_NAME:
        return find_peft_file(path.parent) or path
    return path


def find_adapters(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the adapters at `paths`, each once: files as they are, and in folders everything that looks like one.

    A folder with PEFT's files is one adapter, and so are these files when they are named one by one. Models among the
    files of a folder are passed over. A folder without any adapter is yielded itself, so that it is not passed over in
    silence.
    """
    seen: set[str] = set()
    for path in paths:
        for found in (list(_walk(path)) or [path]) if isdir(path) else [path]:
            file = _main_file(found)
            identity = realpath(file)
            if identity not in seen:
                seen.add(identity)
                yield found if isdir(found) else file


def _walk(folder: Path) -> Iterator[Path]:
    """Yield what looks like an adapter at and below `folder`, in order; hidden folders and links are not entered."""
    own = find_peft_file(folder)
    is_adapter = own is not None or (folder / CONFIG_NAME).exists()
    if is_adapter:
        yield folder
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        yield from () if is_adapter else [folder]
        return
    for entry in entries:
        if isdir(entry):
            if not entry.is_symlink() and not entry.name.startswith("."):
                yield from _walk(entry)
        elif (
            entry.suffix in _SUFFIXES
            and not (is_adapter and name_whole(entry).name == FACTORS_NAME)
            and not _is_model(entry)
        ):
            yield entry


def _is_model(path: Path) -> bool:
    try:
        return is_base(path)
    except LoraformatError:
        return False
