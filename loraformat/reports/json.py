"""For programs: one JSON object."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from loraformat.reports import Setting

if TYPE_CHECKING:
    from loraformat.validation import Verdict

VERSION: Final = "1.0"


def write(verdicts: "Sequence[Verdict]", setting: Setting) -> str:
    """Return the verdicts as one JSON object, in ASCII."""
    document = {"version": VERSION, "verdicts": [verdict.as_json() for verdict in verdicts]}
    return json.dumps(document, indent=2, allow_nan=False) + "\n"
