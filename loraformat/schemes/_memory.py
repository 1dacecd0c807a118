"""What a scheme remembers of a source, so that the way back restores it: kept in the adapter and in what is written.

A file of another scheme carries it as one annotation, `loraformat.provenance`, a JSON object: scheme to what it needs.
It says how things were called and stored. No number of the adapter depends on it, so a stale one does no harm.
"""

from collections.abc import Mapping
from typing import Any, Final

from loraformat.errors import LoraformatError, refuse
from loraformat.strict_json import JsonValue, parse_json_object, write_canonical

PROVENANCE_KEY: Final = "loraformat.provenance"
COMPONENT_KEY: Final = "component"
"""The part of a provenance that says which component names without one belong to."""
MODEL_KEY: Final = "model"
"""The part of a provenance that says by which table a component's names were respelled."""
SPELLING_KEY: Final = "spelling"
"""The part that says, for a scheme, which component had names in another spelling than the scheme is written in."""


def recall(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what a file's annotations say about earlier forms of it; nothing where that cannot be read."""
    text = metadata.get(PROVENANCE_KEY)
    if text is None:
        return {}
    try:
        return dict(parse_json_object(text.encode("utf-8", "surrogatepass"), PROVENANCE_KEY))
    except LoraformatError:  # Another tool's, or damaged: then there is nothing to restore by.
        return {}


def find_memory(provenance: Mapping[str, Any], scheme: str) -> Mapping[str, JsonValue]:
    """Return what a scheme remembers, which may be nothing."""
    found = provenance.get(scheme)
    return found if isinstance(found, Mapping) else {}


def find_texts(memory: Mapping[str, JsonValue], field: str) -> dict[str, str]:
    """Return a field that is an object of texts; what is no text is left out."""
    found = memory.get(field)
    if not isinstance(found, Mapping):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def annotate(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return the annotation that carries `provenance`, none where it is empty.

    Raises:
        InputError: LF104 a number that not every reader of JSON holds.
    """
    try:
        return {PROVENANCE_KEY: write_canonical(provenance).decode("utf-8")} if provenance else {}
    except ValueError as error:
        raise refuse("LF104", PROVENANCE_KEY, str(error), "numbers that JSON readers hold") from error
