"""Files with tensors of several adapters, told apart by a name in their keys: `PATH#NAME` says which one is meant."""

from collections.abc import Mapping
from dataclasses import replace

from loraformat.errors import refuse
from loraformat.problems import Problem
from loraformat.schemes import Bundle


def keep_chosen(bundle: Bundle, names: Mapping[str, str]) -> tuple[Bundle, list[Problem]]:
    """Return the bundle without the tensors of adapters that were not chosen, and a note of these.

    Args:
        bundle: with the name that the user chose, or without one.
        names: keys in which an adapter's name stands, each with that name.

    Raises:
        FindingError: LF242 the chosen one is not among them.
    """
    if not bundle.adapter:
        return bundle, []
    if bundle.adapter not in names.values():
        listed = ", ".join(sorted(set(names.values())))
        found = f"the adapters {listed}" if names else "no name of an adapter in its keys"
        raise refuse("LF242", bundle.path, found, f"one called {bundle.adapter!r}")
    others = {key: name for key, name in names.items() if name != bundle.adapter}
    kept = {key: tensor for key, tensor in bundle.tensors.items() if key not in others}
    if not others:
        return bundle, []
    found = f"{len(others)} tensors of {', '.join(sorted(set(others.values())))}, left out"
    return replace(bundle, tensors=kept), [Problem("LF243", str(bundle.path), found, severity="note")]


def refuse_several(bundle: Bundle, names: set[str]) -> Problem:
    """Return the refusal of a file of several adapters of which none was chosen."""
    found = f"factors of the adapters {', '.join(sorted(names))} for the same modules"
    mend = f"Name the one that you mean behind a #, as in {bundle.path}#{min(names)}."
    return Problem("LF238", str(bundle.path), found, "one adapter for a file", mend)
