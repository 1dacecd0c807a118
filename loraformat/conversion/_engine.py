"""The conversion itself: read by one scheme, respell, write by another, and account for every tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraformat.adapter import Adapter, Target
from loraformat.base_facts import NO_FACTS, BaseFacts
from loraformat.conversion._account import Account, Step, account, find_unaccounted, list_written
from loraformat.conversion._expanding import expand_slices
from loraformat.conversion._proof import Proof, prove
from loraformat.conversion._respelling import respell, respell_like
from loraformat.conversion._writing import check_outputs, pending_files, place_files, read_back
from loraformat.errors import error_for, refuse
from loraformat.loading import list_files, open_bundle, read_bundle
from loraformat.loading.readers import choose_scheme
from loraformat.problems import Problem, count_problems
from loraformat.rules import check_shapes
from loraformat.schemes import (
    SCHEMES,
    Bundle,
    KnowingScheme,
    StatedScale,
    WritingScheme,
    WrittenBundle,
)
from loraformat.schemes._naming import split_component

PROVEN_TO = 1e-6
"""Relative difference of a change above which a conversion without rounding is not what it says."""

_CARRIED = "finite numbers; a merge refuses them, and they are carried along as they are"


@dataclass(frozen=True, slots=True)
class Rounding:
    """What the user allows.

    Attributes:
        allowed: whether a scale may be folded into a tensor that cannot hold the product exactly.
    """

    allowed: bool = False


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion, done or planned.

    Attributes:
        source: what is converted.
        origin: the scheme that it was read by.
        evidence: how that is known.
        scheme: the scheme that it is written in.
        output: where it is written; None for a plan.
        targets: how many targets it has in the new scheme.
        steps: how every tensor of the output is made.
        account: what became of the source's tensors.
        problems: what was normalised, rounded or lost of annotations.
        proof: the comparison of the changes, where it was asked for.
    """

    source: Path
    origin: str
    evidence: str
    scheme: str
    output: Path | None
    targets: int
    steps: tuple[Step, ...]
    account: Account
    problems: tuple[Problem, ...]
    proof: Proof | None = None

    def __repr__(self) -> str:
        """Say what it is in one line."""
        where = f" at {str(self.output)!r}" if self.output is not None else ", planned"
        moves = f"{self.origin} to {self.scheme}, {self.targets} targets"
        return f"<Conversion of {str(self.source)!r}: {moves}{where}; {count_problems(self.problems)}>"

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "source": str(self.source),
            "from": self.origin,
            "evidence": self.evidence,
            "to": self.scheme,
            "output": str(self.output) if self.output is not None else None,
            "targets": self.targets,
            "account": {
                "converted": len(self.account.converted),
                "carried": list(self.account.carried),
                "refused": list(self.account.refused),
            },
            "steps": [
                {"name": step.name, "sources": list(step.sources), "operations": list(step.operations)}
                for step in self.steps
            ],
            "problems": [dict(problem.as_json()) for problem in self.problems],
            "proof": self.proof.as_json() if self.proof is not None else None,
        }


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter that was read for conversion.

    Attributes:
        path: where it is from.
        bundle: its tensors as they are stored.
        adapter: what they mean.
        evidence: how the scheme is known.
    """

    path: Path
    bundle: Bundle
    adapter: Adapter
    evidence: str


@dataclass(frozen=True, slots=True)
class Converted:
    """A conversion before it is written.

    Attributes:
        source: what is converted.
        scheme: the new scheme.
        adapter: the adapter as the new scheme spells it.
        written: the new bundle.
        problems: everything that was found, errors among them.
        steps: how every new tensor is made.
        account: what became of the old ones.
    """

    source: Source
    scheme: WritingScheme
    adapter: Adapter
    written: WrittenBundle
    problems: tuple[Problem, ...]
    steps: tuple[Step, ...]
    account: Account

    def report(self, output: Path | None, proof: Proof | None) -> Conversion:
        """Return the record of the conversion."""
        return Conversion(
            source=self.source.path,
            origin=self.source.adapter.scheme,
            evidence=self.source.evidence,
            scheme=self.scheme.name,
            output=output,
            targets=len(self.adapter.targets),
            steps=self.steps,
            account=self.account,
            problems=self.problems,
            proof=proof,
        )


def read_source(path: Path, scheme: str | None, stated: StatedScale, facts: BaseFacts) -> Source:
    """Read what is to be converted; raises LoraformatError."""
    bundle, _ = open_bundle(path)
    reader, evidence = choose_scheme(bundle, scheme)
    own = reader.find_facts(bundle) if isinstance(reader, KnowingScheme) else NO_FACTS
    bundle = replace(bundle, facts=facts.complete(own))
    return Source(path, bundle, read_bundle(reader, bundle, stated), evidence)


def find_writer(name: str) -> WritingScheme:
    """Return the scheme `name`; LF305 for one that does not exist, LF317 for one that is only read."""
    scheme = SCHEMES.find(name)
    if scheme is None:
        raise refuse("LF305", name, "no scheme of this name", f"one of {', '.join(SCHEMES.names())}")
    if not isinstance(scheme, WritingScheme):
        able = ", ".join(each for each, member in SCHEMES if isinstance(member, WritingScheme))
        raise refuse("LF317", name, scheme.title, f"one of {able}")
    return scheme


def convert_source(source: Source, scheme: WritingScheme, facts: BaseFacts, rounding: Rounding) -> Converted:
    """Convert in memory; what stands against it is among the problems."""
    adapter, found = source.adapter, list[Problem]()
    unfit = [problem for problem in check_shapes(adapter) if problem.severity == "error"]
    if unfit:  # Operations are over tensors of the shapes that their roles have.
        result = account(source.bundle.tensors, adapter, ())
        return Converted(source, scheme, adapter, WrittenBundle({}), (*adapter.problems, *unfit), (), result)
    if adapter.scheme != scheme.name:  # In its own scheme it keeps its spelling.
        adapter = expand_slices(adapter, scheme.holds.kinds)
        adapter, found = respell(adapter, scheme.names or scheme.name, facts)
    written = scheme.write(adapter, facts)
    problems = [*source.adapter.problems, *found, *written.problems]
    if rounding.allowed:
        problems = [replace(each, severity="warning") if each.code == "LF313" else each for each in problems]
    result = account(source.bundle.tensors, adapter, written.tensors.values())
    if not any(problem.severity == "error" for problem in problems):
        problems += find_unaccounted(result, problems)
    return Converted(source, scheme, adapter, written, tuple(problems), list_written(written.tensors), result)


def check_converted(converted: Converted) -> None:
    """Raise the errors among the problems of a conversion."""
    against = [problem for problem in converted.problems if problem.severity == "error"]
    if against:
        raise error_for(against)


def write_converted(
    converted: Converted, output: Path, facts: BaseFacts, rounding: Rounding, *, force: bool, verify: bool
) -> Conversion:
    """Write a conversion; with `verify` what was written is read again and compared before it is moved into place.

    Numbers that are not finite go along as they are, and are warned of (LF501).
    """
    inputs = [file.path for file in list_files(converted.source.adapter)]
    check_outputs(converted.written, output, inputs, force=force)
    proof, broken = None, list[Problem]()
    with pending_files(converted.written, output, broken, force=force) as pending:
        with read_back(pending, converted.written, output) as bundle:
            if verify:
                proof = verify_bundle(converted, replace(bundle, facts=facts), rounding)
        place_files(pending, converted.written, output, force=force)
    carried = [replace(each, severity="warning", expected=_CARRIED) for each in broken]
    return replace(converted, problems=(*converted.problems, *carried)).report(output, proof)


def verify_bundle(converted: Converted, bundle: Bundle, rounding: Rounding) -> Proof:
    """Compare what a reader of the new scheme finds with the source, under the source's own names.

    Raises:
        FindingError: LF318 they differ by more than `PROVEN_TO`, and rounding was not allowed; or modules are missing.
    """
    reader = converted.scheme
    again = reader.read(bundle, converted.written.stated)
    back, problems = respell_like(again, converted.source.adapter, bundle.facts)
    against = [problem for problem in problems if problem.severity == "error"]
    if against:
        raise error_for(against)
    proof = prove(_lone(converted.source.adapter.targets), _lone(back.targets))
    far = proof.relative > PROVEN_TO and not rounding.allowed
    if far or proof.missing:
        worst = proof.differences[0].target if proof.differences else ""
        found = (
            f"a relative difference of {proof.relative:.3g} {worst}, missing: {', '.join(proof.missing) or 'nothing'}"
        )
        raise refuse("LF318", converted.source.path, found, "the same change of every module")
    return proof


def _lone(targets: Sequence[Target]) -> Sequence[Target]:
    """Return targets that are all of one component without its name, which not every scheme writes."""
    components = {split_component(target.name)[0] for target in targets}
    if len(components) != 1:
        return targets
    return [replace(target, name=split_component(target.name)[1]) for target in targets]
