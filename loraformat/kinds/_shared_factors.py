"""Checks of random factors that all targets share, of which each takes the rows and columns that it has."""

from loraformat.adapter import Target
from loraformat.kinds import Change
from loraformat.kinds._axes import Axes
from loraformat.problems import Problem


def check_shared(target: Target, axes: Axes) -> list[Problem]:
    """Return a problem of a shared B with fewer rows than the target."""
    if axes["out"] <= axes["tallest"]:
        return []
    found = f"{axes['out']} rows, and a shared factor with {axes['tallest']}"
    return [Problem("LF203", target.name, found, "a shared factor with at least as many")]


def check_shared_width(target: Target, change: Change, axes: Axes) -> list[Problem]:
    """Return a problem of a shared A with fewer columns than the weight."""
    if change.shape[1] <= axes["widest"]:
        return []
    found = f"a weight of {change.shape}, and a shared factor with {axes['widest']} columns"
    return [Problem("LF405", target.name, found, "a shared factor with at least as many")]
