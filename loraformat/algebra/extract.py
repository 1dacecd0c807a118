"""An adapter from a full fine-tune: what the tuned model has more than its base, in factors.

Parameter after parameter, both models are read tile by tile, and one dense difference of one weight is held while its
singular values are sought. A difference of low rank is taken exactly: what then remains is no more than what rounding
the tuned weight to its stored form, and the factors to theirs, can have put there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Adapter, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.algebra._lowrank import truncate
from loraformat.algebra._pairing import (
    Pair,
    canonical_shape,
    choose_slot,
    factor_shape,
    matches_any,
    pair_models,
    take_fingerprint,
)
from loraformat.algebra._random import generator
from loraformat.algebra._randomised import leading_svd, sum_residual
from loraformat.algebra._targets import LORA, PAIRS, MadeFactor, hold, round_once
from loraformat.algebra._weights import Difference, roundoff, subtract
from loraformat.algebra.extraction import ExtractedParameter, Extraction, Limits, Outcome
from loraformat.bases import BaseModel, Site
from loraformat.dtypes import BY_NAME
from loraformat.engine import Progress
from loraformat.errors import error_for
from loraformat.problems import Problem, escape_surrogates

_PURPOSE: Final = "loraformat-extract-1"
_SHORT_SHARE: Final = 8
"""Without a cut, a difference counts as of low rank up to this part of its short side; beyond, the weight is taken."""
_SOUGHT: Final = 8.0
"""The search ends at so many unit roundoffs of single precision, relative to ‖Δ‖."""
_EXACT: Final = 16.0
_ROUNDED: Final = 4.0
"""What counts as exact: so many roundoffs of single precision, and of the form that the factors are rounded to."""
_VALUES_BESIDE: Final = "base_layer.bias"
"""Where a target with factors holds the new values of its module's bias."""
_WHOLE: Final = ("weight", "bias")
_LISTED: Final = 8


class _Piece(NamedTuple):
    """What one parameter contributes: factors of a product, or a stored tensor to replace it."""

    record: ExtractedParameter
    pair: Pair | None = None
    factors: tuple[NDArray[Any], NDArray[Any]] | None = None
    values: Factor | None = None


def extract_adapter(
    tuned: BaseModel,
    base: BaseModel,
    limits: Limits,
    *,
    targets: Sequence[str] = (),
    replace: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    dtype: str = "float32",
    seed: int = 0,
    progress: Progress | None = None,
) -> Extraction:
    """Return the adapter that makes `base` what `tuned` is, as far as `limits` allow, with fingerprints of the base.

    Args:
        tuned: the tuned model.
        base: the model it was tuned from.
        limits: what may be lost of differences that are not of low rank.
        targets: glob patterns of parameters to take; none takes all.
        replace: glob patterns of parameters that are taken whole even where factors would do.
        allow_missing: glob patterns of parameters of the base that the tuned model may lack.
        dtype: number form of the factors.
        seed: of the random start; each weight has numbers of its own.
        progress: told how far the work is, in bytes of the tuned model.

    Raises:
        FindingError: LF720 nothing differs, LF721 different structures, LF722 parameters are missing, LF723 numbers
            that are not finite, LF724 a pattern without a parameter.
    """
    pairs, apart, problems = pair_models(tuned, base, allow_missing)
    problems += _check_globs(pairs, (*targets, *replace))
    if problems:
        raise error_for(problems)
    work = _Work(limits, tuple(targets), tuple(replace), dtype, seed)
    pieces = list(_take_all(work, pairs, progress))
    pieces += [_Piece(ExtractedParameter(name, Outcome.LEFT_OUT, why=why)) for name, why in apart]
    if all(piece.factors is None and piece.values is None for piece in pieces):
        raise error_for([Problem("LF720", f"{tuned.path} and {base.path}", _describe_nothing(pieces))])
    tuned_name, base_name = (escape_surrogates(model.path.name) for model in (tuned, base))
    adapter = Adapter(
        targets=tuple(sorted(_join(pieces), key=lambda target: target.name)),
        provenance={"extracted": {"tuned": tuned_name, "base": base_name, "seed": seed}},
    )
    records = tuple(piece.record for piece in pieces)
    return Extraction(adapter, records, (*_report(records), *_report_shared(pieces, base)))


@dataclass(frozen=True, slots=True)
class _Work:
    """What is asked of every parameter."""

    limits: Limits
    targets: tuple[str, ...]
    replace: tuple[str, ...]
    dtype: str
    seed: int

    def take(self, pair: Pair) -> _Piece:
        """Return what a pair contributes."""
        if pair.is_unchanged():
            return _Piece(ExtractedParameter(pair.name, Outcome.UNCHANGED, norm=0.0))
        if self.targets and not matches_any(pair.name, self.targets):
            return self._leave(pair, "it changed, and is not among the targets")
        if pair.base is None and pair.obstacle is not None:
            return self._leave(pair, f"it cannot be read from the base: {pair.obstacle.found}")
        if pair.base is None:
            return self._whole(pair, None, "the base has no such parameter")
        if canonical_shape(pair.tuned) != canonical_shape(pair.base):
            return self._whole(pair, None, "its number of rows changed")
        slot = choose_slot(pair.base)
        turned = tuple(site.transposed.get(slot) for site in (pair.tuned, pair.base))
        if None in turned:
            return self._leave(pair, "the two models apply it in ways that do not compare")
        difference = subtract(pair.tuned, pair.base, transposed=(bool(turned[0]), bool(turned[1])))
        norm = difference.norm
        if norm <= difference.rounding:
            return _Piece(ExtractedParameter(pair.name, Outcome.UNCHANGED, norm=norm, why="equal but for rounding"))
        if slot is SlotKind.PARAMETER or matches_any(pair.name, self.replace):
            why = "asked for" if slot is not SlotKind.PARAMETER else "not a matrix"
            return self._whole(pair, norm, why)
        return self._factorise(pair, difference, norm)

    def _factorise(self, pair: Pair, difference: Difference, norm: float) -> _Piece:
        """Return factors of a difference, exact where its rank is low."""
        matrix = difference.matrix
        single, own = roundoff("float32") * norm, roundoff(self.dtype) * norm
        floor = math.hypot(difference.rounding, _SOUGHT * single)
        bound = self.limits.rank
        if self.limits.is_lossless:
            bound = max(1, min(matrix.shape) // _SHORT_SHARE)
        leave = max(floor, self.limits.left_out * norm)
        part = leading_svd(matrix, generator(_PURPOSE, self.seed, pair.name), rank=bound, leave=leave)
        truncated = truncate(part.svd, len(part.svd.values))
        up, down = (round_once(half, BY_NAME[self.dtype], pair.name) for half in (truncated.up, truncated.down))
        left_out = math.sqrt(sum_residual(matrix, up.astype(np.float32), down.astype(np.float32)))
        exact = left_out <= math.hypot(difference.rounding, _EXACT * single, _ROUNDED * own)
        if self.limits.is_lossless and not exact:
            return self._whole(pair, norm, f"of full rank: more than {bound} singular values count")
        outcome = Outcome.EXACT if exact else Outcome.TRUNCATED
        return _Piece(
            ExtractedParameter(pair.name, outcome, truncated.rank, norm, left_out / norm), pair, factors=(up, down)
        )

    def _whole(self, pair: Pair, norm: float | None, why: str) -> _Piece:
        assert pair.tuned.weight is not None, "paired so"
        if pair.parameter not in _WHOLE or SlotKind.PARAMETER not in pair.tuned.transposed:
            return self._leave(pair, f"{why}; values of this parameter have no place in an adapter")
        if pair.tuned.divisor != 1:
            return self._leave(pair, f"{why}; its graph multiplies it by {pair.tuned.divisor:g}")
        record = ExtractedParameter(pair.name, Outcome.REPLACED, norm=norm, error=0.0, why=why)
        return _Piece(record, pair, values=_values_of(pair.tuned))

    def _leave(self, pair: Pair, why: str) -> _Piece:
        return _Piece(ExtractedParameter(pair.name, Outcome.LEFT_OUT, why=why))


def _take_all(work: _Work, pairs: Sequence[Pair], progress: Progress | None) -> Iterator[_Piece]:
    if progress is not None:
        progress.start(sum(pair.stored_bytes for pair in pairs))
    for pair in pairs:
        yield work.take(pair)
        if progress is not None:
            progress.advance(pair.stored_bytes)


def _values_of(site: Site) -> Factor:
    """Return a site's weight as the module has it, read when it is saved."""
    assert site.weight is not None, "paired so"
    tensor = site.weight.tensor
    if not site.transposed[SlotKind.PARAMETER]:
        return tensor
    return MadeFactor(
        tensor.name, tensor.dtype, tensor.shape[::-1], lambda: np.ascontiguousarray(tensor.read().T), (tensor.file,)
    )


def _join(pieces: Sequence[_Piece]) -> Iterator[Target]:
    """Yield one target for each module that something was found for."""
    modules: dict[str, list[_Piece]] = {}
    for piece in pieces:
        if piece.pair is not None:
            modules.setdefault(piece.pair.module, []).append(piece)
    for module, found in modules.items():
        values = {piece.pair.parameter: piece.values for piece in found if piece.pair and piece.values is not None}
        product = next((piece for piece in found if piece.factors is not None), None)
        yield _replacing(module, values) if product is None else _adding(product, values)


def _replacing(module: str, values: Mapping[str, Factor]) -> Target:
    return Target(module, "replace", SlotKind.PARAMETER, values, 0, Scaling(ScalingRule.MULTIPLIER, 1.0))


def _adding(piece: _Piece, values: Mapping[str, Factor]) -> Target:
    """Return a LoRA of a piece's factors, alpha equal to the rank, with its bias's new values and a fingerprint."""
    assert piece.pair is not None, "chosen so"
    assert piece.pair.base is not None, "subtracted"
    assert piece.factors is not None, "chosen so"
    module, (up, down) = piece.pair.module, piece.factors
    slot = choose_slot(piece.pair.base)
    shape = factor_shape(piece.pair.base, slot)
    rank = down.shape[0]
    down_role, up_role = PAIRS[slot is SlotKind.EMBEDDING]
    factors: dict[str, Factor] = {
        down_role: hold(f"{module}.{down_role}", down.reshape(rank, *shape[1:])),
        up_role: hold(f"{module}.{up_role}", up.reshape(shape[0], rank, *(1,) * (len(shape) - 2))),
    }
    if "bias" in values:
        factors[_VALUES_BESIDE] = values["bias"]
    scaling = Scaling(ScalingRule.ALPHA_OVER_RANK, float(rank))
    return Target(module, LORA, slot, factors, rank, scaling, take_fingerprint(module, piece.pair.base, slot))


def _check_globs(pairs: Sequence[Pair], globs: Sequence[str]) -> list[Problem]:
    """Return a problem for every pattern that no parameter matches."""
    names = [pair.name for pair in pairs]
    return [
        Problem("LF724", glob, f"none of {len(names)} parameters, such as {', '.join(names[:3])}", "one that matches")
        for glob in globs
        if not any(matches_any(name, [glob]) for name in names)
    ]


def _describe_nothing(pieces: Sequence[_Piece]) -> str:
    """Return what was found where no parameter gives a target."""
    left = [piece.record.name for piece in pieces if piece.record.outcome is Outcome.LEFT_OUT]
    if not left:
        return f"{len(pieces)} parameters, all of them equal"
    return f"nothing that can be taken; left out: {', '.join(left[:_LISTED])}"


def _report(records: Sequence[ExtractedParameter]) -> Iterator[Problem]:
    """Yield a warning for every parameter that differs and is not in the adapter."""
    for each in records:
        if each.outcome is Outcome.LEFT_OUT:
            yield Problem("LF730", each.name, each.why, severity="warning")


def _report_shared(pieces: Sequence[_Piece], base: BaseModel) -> Iterator[Problem]:
    """Yield a warning for every weight that the base shares with other modules, which no merge changes."""
    own: dict[str, set[str]] = {}
    for site in base.sites:
        own.setdefault(site.module, set()).add(site.id)
    for piece in pieces:
        weight = piece.pair.base.weight if piece.pair is not None and piece.pair.base is not None else None
        others = (
            sorted(weight.consumers - own[piece.pair.module]) if piece.pair is not None and weight is not None else []
        )
        if others:
            found = f"also read by {', '.join(others[:_LISTED])}; a merge will refuse the target"
            yield Problem("LF402", piece.record.name, found, severity="warning")
