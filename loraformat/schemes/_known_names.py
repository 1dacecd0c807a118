"""Files that have no prefix of their own, known by what their modules are: those of a pipeline's model in a table."""

import re
from functools import lru_cache
from typing import Final

from loraformat.schemes import Bundle
from loraformat.schemes._naming import DENOISERS
from loraformat.spellings import Reading, read_names

_ENDS: Final = re.compile(
    r"\.(?:lora_(?:A|B|down|up|mid)(?:\.[^.]+)?(?:\.(?:weight|bias))?|lora\.(?:down|up)\.weight|lora_magnitude_vector"
    r"|alpha|dora_scale|diff|diff_b|reshape_weight|hada_\w+|lokr_\w+|oft_blocks|oft_R\.weight|rescale"
    r"|(?:a1|a2|b1|b2)\.weight)$"
)
_PREFIXED: Final = ("model.", "lora_", "lycoris_", "oft_")
"""Beginnings of names that no model of a pipeline has, and no table need be asked about."""


def find_model(bundle: Bundle, prefix: str = "") -> Reading | None:
    """Return the table whose names stand behind a prefix, where it is of a pipeline's model, and no decoder has them.

    Every key must begin with the prefix; keys that are no tensors of an adapter do not count.
    """
    if not all(key.startswith(prefix) for key in bundle.tensors):
        return None
    keys = (key.removeprefix(prefix) for key in bundle.tensors)
    modules = frozenset(_ENDS.sub("", key) for key in keys if _ENDS.search(key))
    return _recognise(modules) if modules and not any(name.startswith(_PREFIXED) for name in modules) else None


@lru_cache(maxsize=8)
def _recognise(modules: frozenset[str]) -> Reading | None:
    readings = [reading for reading in read_names(modules) if not reading.missed]
    of_pipelines = all(DENOISERS.intersection(reading.table.components) for reading in readings)
    return readings[0] if readings and of_pipelines else None


def find_original(bundle: Bundle, prefix: str) -> Reading | None:
    """Return the same, where the names are those of the model's own repository, and not diffusers'."""
    found = find_model(bundle, prefix)
    return found if found is not None and found.spelling != "diffusers" else None
