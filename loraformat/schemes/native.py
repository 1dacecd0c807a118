"""The project's own scheme: one safetensors file with a manifest (spec/SPEC.md).

Tensor keys are `<target>.<role>`; the manifest says everything else. A tensor that several targets have is stored once.
"""

from collections import defaultdict
from collections.abc import Container, Mapping
from typing import Final

from loraformat.adapter import Adapter, Factor, Target
from loraformat.base_facts import BaseFacts
from loraformat.errors import LoraformatError, refuse
from loraformat.manifest import MANIFEST_KEY, Shared, TargetEntry, build_manifest, parse_manifest
from loraformat.problems import Problem
from loraformat.schemes import ALL_SLOTS, Bundle, Holds, StatedScale, WrittenBundle


class Native:
    """The scheme `native`."""

    name = "native"
    title = "loraformat 1.0: one safetensors file with a manifest"
    holds = Holds(kinds=frozenset(), slots=ALL_SLOTS)  # Any kind: the manifest names it.
    names = ""

    def detect(self, bundle: Bundle) -> str | None:
        """Recognise the manifest's metadata key."""
        return f"metadata key {MANIFEST_KEY!r}" if MANIFEST_KEY in bundle.metadata else None

    def is_named(self, bundle: Bundle) -> bool:
        """Say whether there is a manifest: no other scheme reads files that have one."""
        return MANIFEST_KEY in bundle.metadata

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; a stated scale is not needed and not used."""
        if MANIFEST_KEY not in bundle.metadata:
            raise refuse("LF122", bundle.path, "no manifest", f"the metadata key {MANIFEST_KEY!r}")
        manifest = parse_manifest(bundle.metadata[MANIFEST_KEY], bundle.path)
        if not manifest.targets:
            raise refuse("LF212", bundle.path, "a manifest without targets", "at least one")
        factors, problems = _group(bundle, manifest.targets)
        targets = tuple(
            Target(
                name,
                entry.kind,
                entry.slot,
                factors[name],
                entry.rank,
                entry.scaling,
                entry.fingerprint,
                entry.options,
            )
            for name, entry in sorted(manifest.targets.items())
        )
        return Adapter(
            targets=targets,
            base=manifest.base,
            scheme=self.name,
            source=str(bundle.path),
            metadata=manifest.annotations,
            provenance=manifest.provenance,
            problems=tuple(problems),
        )

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return the adapter as one file with a manifest."""
        try:
            tensors, metadata = write_tensors(adapter)
        except LoraformatError as error:
            return WrittenBundle({}, problems=error.problems)
        return WrittenBundle(tensors, metadata)


def write_tensors(adapter: Adapter) -> tuple[dict[str, Factor], dict[str, str]]:
    """Return the tensors and the metadata of the adapter's file in this scheme."""
    names = {target.name for target in adapter.targets}
    tensors: dict[str, Factor] = {}
    shared = _share(adapter)
    for target in adapter.targets:
        for role, factor in target.factors.items():
            if role in shared.get(target.name, ()):
                continue
            key = f"{target.name}.{role}"
            if key in tensors or _owner_of(key, names) != target.name:
                raise refuse("LF302", key, f"{role} of {target.name}, and a tensor of another target", "one of them")
            tensors[key] = factor
    if not tensors:
        raise refuse("LF212", adapter.source or "the adapter", "no tensors", "at least one target")
    return tensors, {MANIFEST_KEY: build_manifest(adapter, shared).decode("utf-8")}


def _share(adapter: Adapter) -> Shared:
    """Return the tensors that a target before has under the same role, in the order of UTF-16."""
    owners: dict[tuple[int, str], str] = {}
    shared: dict[str, dict[str, str]] = defaultdict(dict)
    for target in sorted(adapter.targets, key=lambda target: target.name.encode("utf-16-be", "surrogatepass")):
        for role, factor in target.factors.items():
            owner = owners.setdefault((id(factor), role), target.name)
            if owner != target.name:
                shared[target.name][role] = owner
    return shared


def _group(
    bundle: Bundle, entries: Mapping[str, TargetEntry]
) -> tuple[Mapping[str, Mapping[str, Factor]], list[Problem]]:
    """Return target to role to tensor, and problems of tensors of no target."""
    groups: dict[str, dict[str, Factor]] = {name: {} for name in entries}
    problems: list[Problem] = []
    for key, tensor in bundle.tensors.items():
        owner = _owner_of(key, entries)
        if owner is None:
            problems.append(Problem("LF202", key, "a tensor of no target in the manifest", "tensors <target>.<role>"))
        else:
            groups[owner][key[len(owner) + 1 :]] = tensor
    return groups, problems + _take_shared(groups, entries)


def _take_shared(groups: Mapping[str, dict[str, Factor]], entries: Mapping[str, TargetEntry]) -> list[Problem]:
    """Give targets the tensors that are stored with others; return problems of those that are not."""
    stored = {name: dict(group) for name, group in groups.items()}
    problems = []
    for name, entry in entries.items():
        for role, other in entry.shared.items():
            found = stored.get(other, {}).get(role)
            if found is not None and role not in stored[name]:
                groups[name][role] = found
                continue
            said = f"{role} of {other!r}, " + ("which has none" if found is None else "beside one of its own")
            problems.append(Problem("LF236", name, said, "one tensor, stored with that target"))
    return problems


def _owner_of(key: str, entries: Container[str]) -> str | None:
    """Return the longest target that `key` lies below, at a dot."""
    end = len(key)
    while (end := key.rfind(".", 0, end)) > 0:
        if key[:end] in entries:
            return key[:end]
    return None


SCHEME: Final = Native()
