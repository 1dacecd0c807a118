"""From a path that a user named to an adapter or a base: which container, which scheme, which kind of base."""

from collections.abc import Mapping
from dataclasses import replace
from os.path import isdir, lexists
from pathlib import Path
from typing import Final

from loraformat.adapter import Adapter, Factor, SlotKind
from loraformat.base_facts import NO_FACTS, BaseFacts, read_facts
from loraformat.bases import BASES, TENSOR_NAME, BaseFormat, BaseModel, ToldBase, ViewedBase
from loraformat.derived import find_origins
from loraformat.errors import LoraformatError, error_for, refuse
from loraformat.files import find_snapshot
from loraformat.loading.adapter_folders import (
    CONFIG_NAME,
    FACTORS_NAMES,
    find_factors,
    find_peft_file,
    is_factors_name,
    list_saved_beside,
    read_config_beside,
)
from loraformat.loading.adapter_shards import name_whole, open_factors
from loraformat.loading.digests import digest_aside, digest_files, name_digest
from loraformat.loading.known_scales import find_scale
from loraformat.loading.readers import (
    choose_scheme,
    is_factors,
    open_tensors,
    read_head,
    recognise_bundle,
    recognise_names,
    refuse_unreadable,
)
from loraformat.problems import Problem
from loraformat.receipt import RUNTIME_KEY
from loraformat.recognition import recognise_config
from loraformat.renames import DENOISER_IN_ONE_FILE
from loraformat.schemes import NOT_STATED, SCHEMES, AmbiguousScheme, Bundle, ChoosingScheme, Scheme, StatedScale
from loraformat.signatures import describe_text
from loraformat.spans import InputFile, read_small
from loraformat.strict_json import JsonValue, parse_json_object

_BASE_CONFIG: Final = "config.json"
_PIPELINE_INDEX: Final = "model_index.json"
_NEED_BASE: Final = frozenset({"LF311", "LF314"})
"""Problems that a base can solve: counts that are not known, and flat names."""


def load_adapter(path: Path, scheme: str | None = None, stated: StatedScale = NOT_STATED) -> Adapter:
    """Read the adapter at `path`, a file or a PEFT folder; its tensors stay unread.

    Args:
        path: a file, or a folder with `adapter_config.json`.
        scheme: name of the scheme; None finds it from the content.
        stated: the scale, for sources that do not state one.

    Raises:
        LoraformatError: the file, its scheme or its meaning is not sound.
    """
    return read_adapter(path, scheme, stated)[0]


def load_for_base(path: Path, scheme: str | None, stated: StatedScale, base: BaseModel) -> Adapter:
    """Read an adapter as `load_adapter` does; one that its file alone does not tell is read with what `base` says.

    Raises:
        LoraformatError: as `load_adapter`.
    """
    try:
        adapter = load_adapter(path, scheme, stated)
    except LoraformatError as error:
        if not _NEED_BASE.intersection(error.codes):
            raise
    else:
        needed = _NEED_BASE.intersection(problem.code for problem in adapter.problems)
        if not needed and not isinstance(SCHEMES.find(adapter.scheme), AmbiguousScheme):
            return adapter
    return read_adapter(path, scheme, stated, find_facts(base))[0]


def read_adapter(
    path: Path, scheme: str | None, stated: StatedScale, facts: BaseFacts = NO_FACTS
) -> tuple[Adapter, str, tuple[InputFile, ...]]:
    """Return the adapter as `load_adapter` does, the evidence for its scheme, and the files that hold its tensors."""
    bundle, files = open_bundle(path)
    bundle = replace(bundle, facts=facts)
    with digest_aside(files) as digest:
        reader, evidence = choose_scheme(bundle, scheme)
        adapter = read_bundle(reader, bundle, stated)
        problems = (*adapter.problems, *find_unused(adapter, stated))
        own = {file.path for file in files}
        beside = {each.path: each for each in list_files(adapter) if each.path not in own} if bundle.beside else {}
        sha256 = digest_files([*files, *(beside[path] for path in sorted(beside))]) if beside else digest()
        return replace(adapter, sha256=name_digest(sha256, bundle.adapter), problems=problems), evidence, files


def read_bundle(scheme: Scheme, bundle: Bundle, stated: StatedScale) -> Adapter:
    """Return what a scheme reads; where the scale is missing (LF211), the error says what is known of it."""
    if bundle.adapter and not isinstance(scheme, ChoosingScheme):
        raise refuse("LF242", bundle.path, f"the scheme {scheme.name!r}", "names of several adapters, as PEFT has them")
    try:
        return scheme.read(bundle, stated)
    except LoraformatError as error:
        known = find_scale({name: tensor.shape for name, tensor in bundle.tensors.items()})
        if known is None or "LF211" not in error.codes:
            raise
        said = f"This looks like {known.name}: {known.said}."
        problems = [
            replace(problem, mend=f"{problem.advice} {said}") if problem.code == "LF211" else problem
            for problem in error.problems
        ]
        raise error_for(problems) from error


def find_unused(adapter: Adapter, stated: StatedScale) -> list[Problem]:
    """Return a note when no target took the scale that the user stated: each states its own."""
    number = stated.alpha if stated.multiplier is None else stated.multiplier
    if number is None or any(target.scaling.value == number for target in adapter.targets):
        return []
    return [Problem("LF222", adapter.source, f"{number:g}, while every target states its own scale", severity="note")]


def open_bundle(source: Path) -> tuple[Bundle, tuple[InputFile, ...]]:
    """Return the named tensors at a path with what lies beside them, and the files that hold them.

    Args:
        source: a file or a folder; behind a `#`, the name of one of several adapters in it.
    """
    path, adapter = split_choice(source)
    path = find_snapshot(path)
    factors = find_factors(path) if isdir(path) else path
    whole = name_whole(factors)
    try:
        opened = open_factors(factors, is_factors_name)
    except LoraformatError:
        _refuse_by_config(path, whole)
        raise
    bundle = Bundle(path, opened.tensors, opened.metadata, read_config_beside(whole), adapter=adapter)
    for saved in list_saved_beside(whole):
        bundle = _add(bundle, open_tensors(saved).tensors, saved)
    return bundle, opened.files


def split_choice(source: Path) -> tuple[Path, str]:
    """Return path and name of `PATH#NAME`; what names an existing path is a path, and has no name."""
    path, mark, name = str(source).rpartition("#")
    return (source, "") if not mark or not path or not name or lexists(source) else (Path(path), name)


def _add(bundle: Bundle, tensors: Mapping[str, Factor], path: Path) -> Bundle:
    """Return a bundle with the tensors of a further file."""
    twice = sorted(set(tensors) & set(bundle.tensors))
    if twice:
        raise refuse("LF302", f"{path}: {twice[0]}", "a tensor that the adapter's own file has as well", "one")
    return replace(bundle, tensors={**bundle.tensors, **tensors}, beside=bundle.beside | set(tensors))


def _refuse_by_config(path: Path, factors: Path) -> None:
    """Raise LF209 where the configuration beside an unreadable file names an adapter that no weight can hold."""
    unmergeable = recognise_config(read_config_beside(factors) or {})
    if unmergeable is not None:
        raise error_for([unmergeable.as_problem(path)])


def list_files(adapter: Adapter) -> list[InputFile]:
    """Return the open files that an adapter's factors are read from; none for one made in memory."""
    origins = (origin for factor in adapter.factors() for origin in find_origins(factor))
    files = (f for origin in origins for f in getattr(origin, "files", (getattr(origin, "file", None),)))
    return list({id(file): file for file in files if isinstance(file, InputFile)}.values())


def open_base(path: Path) -> BaseModel:
    """Index the model at `path`.

    Raises:
        LoraformatError: LF836 it is an adapter; what the base's format refuses.
    """
    path = find_snapshot(path)
    base = _open_any(path)
    if is_factors([site.module for site in base.sites if site.evidence == TENSOR_NAME]):
        raise refuse("LF836", path, f"factors of an adapter, {len(base.sites)} in all", "a model")
    return base


def _open_any(path: Path) -> BaseModel:
    head, size = (b"", 0) if isdir(path) else read_head(path)
    hint = path.suffix.lower().removeprefix(".") or "-"
    names = sorted(BASES.names(), key=lambda name: (isdir(path) != name.endswith("_folder"), not name.startswith(hint)))
    for name in names:
        likely = BASES.find(name)  # Imports no other where the model is what its name says.
        if likely is not None and likely.accepts(path, head, size):
            return likely.open(path)
    if isdir(path):
        raise _refuse_folder(path)
    by_suffix = [base for _, base in BASES if path.suffix.lower() in base.suffixes]
    return _refuse_or_open(path, head, by_suffix)


def open_model(path: Path) -> BaseModel:
    """Index the model at `path` as `open_base` does; LF834 for a folder of several, whose modules may share names."""
    base = open_base(path)
    if isinstance(base, ViewedBase):
        raise refuse("LF834", path, f"a base of the format {base.format!r}", "one model")
    return base


def _refuse_folder(path: Path) -> LoraformatError:
    """Return the error for a folder that is no base: a pipeline of diffusers is a folder of several."""
    expected = "a model folder with safetensors, torch or ONNX weights, a pipeline of such, or one model file"
    own = next((name for name in (CONFIG_NAME, *FACTORS_NAMES) if (path / name).exists()), None)
    if own is not None:
        return refuse("LF836", path, f"an adapter's folder, with {own}", expected)
    mend = ""
    if (path / _PIPELINE_INDEX).is_file():
        parts = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and (entry / _BASE_CONFIG).is_file())
        found = f"a pipeline of diffusers with {', '.join(parts) or 'no parts'}"
        if parts:
            whole = f"loraformat merge {path / parts[-1]} ADAPTER --allow-unmatched '{parts[0]}*'"
            mend = f"Merge into its parts one by one, and leave out the targets of the others, as in: {whole}"
    else:
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in {".onnx", ".safetensors", ".bin"})
        found = f"a folder with {', '.join(inside[:4]) or 'no model'}"
    return refuse("LF121", path, found, expected, mend)


def _refuse_or_open(path: Path, head: bytes, by_suffix: list[BaseFormat]) -> BaseModel:
    """Open a file whose name says what its content does not, for the error that this gives; else say what it is."""
    described = describe_text(head)
    if path.suffix.lower() == ".onnx_adapter":
        raise refuse("LF836", path, "an adapter of ONNX Runtime", "a model")
    if described is None and by_suffix:
        return by_suffix[0].open(path)
    raise refuse_unreadable(path, head, "a model as .onnx, .safetensors, .bin, .pt or .npz")


def find_facts(base: BaseModel) -> BaseFacts:
    """Return the names of a base's modules, and what the configuration beside it counts."""
    fields = base.tell_config() if isinstance(base, ToldBase) else _read_base_config(base.path)
    names = {site.module for site in base.sites if site.module}
    facts = read_facts(fields, str(base.path), frozenset(names | set(map(_name_alone, names))))
    convolutions = [site for site in base.sites if site.weight and SlotKind.CONV in site.transposed]
    kernels = {site.module: site.stored_shape() for site in convolutions}
    return replace(facts, kernels={_name_alone(name): shape for name, shape in kernels.items()} | kernels)


def _read_base_config(path: Path) -> Mapping[str, JsonValue]:
    config = path / _BASE_CONFIG if isdir(path) else path.with_name(_BASE_CONFIG)
    return parse_json_object(read_small(config), config) if config.exists() else {}


def _name_alone(module: str) -> str:
    """Return what a module is called where its model is in a file of its own."""
    return module.removeprefix(f"{DENOISER_IN_ONE_FILE}.")


def is_base(path: Path) -> bool:
    """Say whether `path` is a model rather than an adapter, from its content: an adapter's tensors have a scheme."""
    path = find_snapshot(path)
    if isdir(path):
        looks_so = any(base.accepts(path, b"", 0) for _, base in BASES)
        return looks_so and not (path / CONFIG_NAME).exists() and find_peft_file(path) is None
    bundle, _ = open_bundle(path)
    if RUNTIME_KEY in bundle.metadata:  # Its inputs for adapters are called as an adapter's tensors are.
        return True
    known = recognise_names(bundle) or recognise_bundle(bundle)
    if known or any(scheme.detect(bundle) for _, scheme in SCHEMES):
        return False
    head, size = read_head(path)
    return any(base.accepts(path, head, size) for _, base in BASES)
