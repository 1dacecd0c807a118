"""Shapes by the names of their axes, `rank in *kernel`: what a kind says of its factors, and how they are checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import FLOATS, RoleSet, check_roles
from loraformat.problems import Problem

_REST_OF_ONES: Final = "*1"
_KERNEL: Final = "*kernel"
_KERNEL_AXES: Final = (1, 2, 3)
_WHOLE: Final = frozenset({"int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"})

Roles = Mapping[str, str]
"""Role to its axes: names, sizes (`1`), `*kernel` for one to three more, `*1` for as many of size one; `|` for or."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which the factors of a target are made.

    Attributes:
        slots: the slots that have it.
        required: the roles that it has always, with their axes.
        optional: the roles that it may have.
        whole: which of them hold whole numbers (indices), rather than floats.
    """

    slots: tuple[SlotKind, ...]
    required: Roles
    optional: Roles = field(default_factory=dict)
    whole: frozenset[str] = frozenset()

    @property
    def roles(self) -> Roles:
        """All roles with their axes."""
        return {**self.required, **self.optional}


@dataclass(slots=True)
class Axes:
    """The sizes that factors have.

    Attributes:
        sizes: name of an axis to its size.
        kernel: sizes of the kernel; None where no factor has one.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    kernel: tuple[int, ...] | None = None

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    def bind(self, shape: Sequence[int], axes: str) -> bool:
        """Take in the sizes of one factor and say whether they agree with those before."""
        return any(self._bind_one(shape, way) for way in axes.split("|"))

    def _bind_one(self, shape: Sequence[int], axes: str) -> bool:
        *names, last = axes.split()
        if not last.startswith("*"):
            names, last = [*names, last], ""
        rest = tuple(shape[len(names) :])
        if len(shape) < len(names) or (rest and not last):
            return False
        if any(name.isdigit() and int(name) != size for name, size in zip(names, shape, strict=False)):
            return False
        named = all(self._bind_size(name, size) for name, size in zip(names, shape, strict=False))
        return named and (not last or self._bind_rest(last, rest))

    def _bind_size(self, name: str, size: int) -> bool:
        return name.isdigit() or self.sizes.setdefault(name, size) == size

    def _bind_rest(self, name: str, rest: tuple[int, ...]) -> bool:
        if name == _REST_OF_ONES:
            return len(rest) in _KERNEL_AXES and set(rest) == {1}
        if self.kernel is None:
            self.kernel = rest
        return self.kernel == rest and len(rest) in _KERNEL_AXES


def choose_layout(target: Target, layouts: Sequence[Layout]) -> Layout | None:
    """Return the layout that the target's factors have, or the nearest of its slot; None for a slot without one."""
    of_slot = [layout for layout in layouts if target.slot in layout.slots]
    have = set(target.factors)

    def nearness(layout: Layout) -> tuple[int, int]:
        return len(have & set(layout.roles)), -len(set(layout.required) - have)

    return max(of_slot, key=nearness, default=None)


def merge_role_sets(layouts: Sequence[Layout]) -> tuple[RoleSet, ...]:
    """Return one role set for each group of slots: what all layouts of it need, and what some of them have."""
    merged = []
    for slots in dict.fromkeys(layout.slots for layout in layouts):
        group = [layout for layout in layouts if layout.slots == slots]
        every = dict.fromkeys(role for layout in group for role in layout.roles)
        needed = tuple(role for role in every if all(role in layout.required for layout in group))
        merged.append(RoleSet(slots, needed, tuple(role for role in every if role not in needed)))
    return tuple(merged)


def check_factors(target: Target, layouts: Sequence[Layout]) -> list[Problem]:
    """Return problems of a target's slot, its roles, and their number forms and shapes."""
    layout = choose_layout(target, layouts)
    if layout is None:
        return check_roles(target, merge_role_sets(layouts))
    problems = check_roles(target, (RoleSet(layout.slots, tuple(layout.required), tuple(layout.optional)),))
    return problems or _check_forms(target, layout) or _check_axes(target, layout)


def bind_axes(target: Target, layouts: Sequence[Layout]) -> Axes:
    """Return the sizes of a target that `check_factors` has found sound."""
    axes, layout = Axes(), choose_layout(target, layouts)
    for role, names in layout.roles.items() if layout else ():
        if role in target.factors and not axes.bind(target.factors[role].shape, names):
            raise ValueError("the factors disagree about their shapes: check the target first")
    return axes


def count_rank(factors: Mapping[str, Any], layouts: Sequence[Layout], axis: str) -> int:
    """Return the size of an axis of the first factor that has it; 0 when there is none."""
    for layout in layouts:
        for role, names in layout.roles.items():
            words = names.split()
            if role in factors and axis in words and len(factors[role].shape) > words.index(axis):
                return int(factors[role].shape[words.index(axis)])
    return 0


def _check_forms(target: Target, layout: Layout) -> list[Problem]:
    problems = []
    for role, factor in target.factors.items():
        where, whole = f"{target.name}: {role}", role in layout.whole
        if factor.dtype.name not in (_WHOLE if whole else FLOATS):
            expected = "a form of whole numbers" if whole else "a floating-point form"
            problems.append(Problem("LF210", where, factor.dtype.name, expected))
    return problems


def _check_axes(target: Target, layout: Layout) -> list[Problem]:
    axes = Axes()
    roles = {role: names for role, names in layout.roles.items() if role in target.factors}
    fit = [axes.bind(target.factors[role].shape, names) for role, names in roles.items()]
    found = ", ".join(f"{role} {target.factors[role].shape}" for role in roles)
    if axes.sizes.get("rank") == 0:
        return [Problem("LF204", target.name, found, "a rank of at least 1")]
    empty = any(0 in target.factors[role].shape for role in roles)
    if all(fit) and not empty:
        return []
    expected = ", ".join(f"{role} ({names})" for role, names in roles.items())
    return [Problem("LF203", target.name, found, f"{expected}, none of them empty")]
