"""The functions of the public face that look into weights: extract an adapter, analyse adapters, start new ones."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from loraformat.adapter import Adapter
from loraformat.algebra.analyse import analyse_adapters
from loraformat.algebra.analysis import Analysis
from loraformat.algebra.components import Structure
from loraformat.algebra.extract import extract_adapter
from loraformat.algebra.extraction import Extraction, Limits
from loraformat.algebra.initialise import Initialisation, Method, Recipe, initialise_adapter
from loraformat.algebra.statistics import Statistics
from loraformat.arguments import AdapterSource, StrPath
from loraformat.containers.npz import CONTAINER as NPZ
from loraformat.engine import Progress
from loraformat.errors import error_for
from loraformat.files import write_at
from loraformat.loading import load_adapter, open_base, open_model
from loraformat.loading.adapter_folders import FACTORS_NAMES
from loraformat.loading.adapter_shards import name_whole
from loraformat.outputs import PendingOutput, check_output
from loraformat.pages import write_analysis
from loraformat.problems import Problem
from loraformat.schemes import StatedScale

_FORMS: Final = ("float32", "float16", "bfloat16")
"""What extracted factors may be rounded to."""


def extract(
    tuned: StrPath,
    base: StrPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    targets: Sequence[str] = (),
    replace: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    dtype: str = "float32",
    seed: int = 0,
    progress: Progress | None = None,
) -> Extraction:
    """Return an adapter that makes `base` what `tuned` is, with a report on every parameter; `save` writes it.

    Without rank, energy or error nothing is lost: a difference of low rank becomes factors, any other parameter that
    changed is taken whole. A model is never held; one dense difference of one weight is.

    Args:
        tuned: the fine-tuned model, file or folder.
        base: the model it was tuned from.
        rank: at most this rank for each weight.
        energy: the fewest singular values with this share of Σσ², in (0, 1].
        max_error: the fewest with ‖left out‖ ≤ max_error · ‖difference‖.
        targets: glob patterns of parameters (`*.q_proj.weight`); none takes all that changed.
        replace: glob patterns of parameters to take whole.
        allow_missing: glob patterns of parameters that only the base has.
        dtype: number form of the factors: float32, float16 or bfloat16.
        seed: of the randomised search.
        progress: told how far the work is, in bytes of the tuned model.

    Raises:
        LoraformatError: nothing differs, different structures, missing parameters, NaN, a pattern without a match;
            LF705 a number out of its range, or energy and max_error at once.
    """
    _check_settings(
        ("rank", rank, "at least 1", rank is None or rank >= 1),
        ("energy", energy, "above 0 and at most 1", energy is None or 0 < energy <= 1),
        ("max_error", max_error, "at least 0 and below 1", max_error is None or 0 <= max_error < 1),
        ("energy and max_error", "two rules", "one of them", energy is None or max_error is None),
        ("dtype", dtype, f"one of {', '.join(_FORMS)}", dtype in _FORMS),
    )
    limits = Limits(rank, max_error or 0.0 if energy is None else math.sqrt(1 - energy))
    return extract_adapter(
        open_model(Path(tuned)),
        open_model(Path(base)),
        limits,
        targets=targets,
        replace=replace,
        allow_missing=allow_missing,
        dtype=dtype,
        seed=seed,
        progress=progress,
    )


def analyse(
    adapters: AdapterSource | Sequence[AdapterSource],
    base: StrPath | None = None,
    *,
    seed: int = 0,
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
) -> Analysis:
    """Return spectra, ranks in use, where the energy is, shared subspaces and, with a base, what is amplified.

    Args:
        adapters: path or loaded adapter, or several, which are also compared in pairs.
        base: the model that they were trained on.
        seed: of the random matrices that amplification is compared with.
        scheme: as in `load`.
        alpha: as in `load`.
        scale: as in `load`.

    Raises:
        LoraformatError: no target with singular values, NaN, or targets that the base lacks.
    """
    listed = [adapters] if isinstance(adapters, Adapter | str) or not isinstance(adapters, Sequence) else list(adapters)
    stated = StatedScale(alpha, scale)
    opened = [item if isinstance(item, Adapter) else load_adapter(Path(item), scheme, stated) for item in listed]
    names = _tell_apart([Path(item.source) if item.source else None for item in opened])
    model = open_base(Path(base)) if base is not None else None
    return analyse_adapters(list(zip(names, opened, strict=True)), model, seed=seed)


def save_page(analysis: Analysis, path: StrPath, *, force: bool = False) -> Path:
    """Write an analysis as one HTML file with pictures, which needs neither a network nor scripts.

    Args:
        analysis: what `analyse` returned.
        path: the file to make.
        force: replace an existing file.

    Raises:
        LoraformatError: the file exists or cannot be written.
    """
    output = Path(path)
    check_output(output, [], force=force)
    data = write_analysis(analysis).encode("utf-8")
    with PendingOutput([output], force=force) as pending:
        write_at(pending.descriptors[0], data, 0)
        pending.commit()
    return output


def init(
    base: StrPath,
    rank: int,
    targets: Sequence[str],
    *,
    method: str = "gaussian",
    stats: StrPath | None = None,
    alpha: float | None = None,
    smoothness: float = 0.0,
    sparsity: float = 0.0,
    seed: int = 0,
) -> Initialisation:
    """Return a new adapter to start training from; `save` writes it.

    Args:
        base: the model to train on.
        rank: rank of every target.
        targets: glob patterns of module paths (`*.q_proj`).
        method: `gaussian`, `kaiming`, `svd`, `covariance` (which needs `stats`), or `pissa`, whose first change is not
            zero, so that training starts from a changed base.
        stats: `.npz` with, for each target, samples (n, in) or a covariance (in, in) of what enters it.
        alpha: lora_alpha; None takes the rank, a scale of 1.
        smoothness: of `covariance`: penalty on differences between neighbouring numbers of a component.
        sparsity: of `covariance`: share of a component's largest number below which its numbers become 0.
        seed: of the random numbers, which follow from it and the target's name alone.

    Raises:
        LoraformatError: a pattern without a match, a rank beyond a weight's, statistics that do not fit, NaN; LF705 an
            unknown method, a number out of its range, or smoothness and sparsity at once.
    """
    _check_settings(
        ("rank", rank, "at least 1", rank >= 1),
        ("targets", "none", "glob patterns of module paths", bool(targets)),
        ("method", method, f"one of {', '.join(Method)}", method in set(Method)),
        ("alpha", alpha, "a finite number other than 0", alpha is None or (math.isfinite(alpha) and alpha != 0)),
        ("smoothness", smoothness, "a finite number of at least 0", 0 <= smoothness < math.inf),
        ("sparsity", sparsity, "at least 0 and below 1", 0 <= sparsity < 1),
        ("smoothness and sparsity", "both", "one of them", not (smoothness and sparsity)),
    )
    structure = Structure(smoothness, sparsity)
    statistics = Statistics(NPZ.open(Path(stats))) if stats is not None else None
    recipe = Recipe(rank, Method(method), alpha, seed, structure, statistics)
    return initialise_adapter(open_model(Path(base)), targets, recipe)


def _check_settings(*rows: tuple[str, object, str, bool]) -> None:
    """Raise LF705 for the settings that will not do; a row is name, value, what will do, and whether it does."""
    problems = [Problem("LF705", name, str(value), expected) for name, value, expected, fits in rows if not fits]
    if problems:
        raise error_for(problems)


def _tell_apart(paths: Sequence[Path | None]) -> list[str]:
    """Return short names of adapters: as much of the ends of their paths as tells them apart."""
    parts = [_parts_of(path, place) for place, path in enumerate(paths)]
    count = 1
    while len({each[-count:] for each in parts}) < len(set(parts)):
        count += 1
    names = ["/".join(each[-count:]) for each in parts]
    return [f"{name} ({place + 1})" if names.count(name) > 1 else name for place, name in enumerate(names)]


def _parts_of(path: Path | None, place: int) -> tuple[str, ...]:
    if path is None:
        return (f"adapter {place + 1}",)
    absolute = path.absolute()
    named = absolute.parent if name_whole(absolute).name in FACTORS_NAMES else absolute.with_suffix("")
    return named.parts[1:]
