"""For code scanning: SARIF 2.1.0 (OASIS standard of 27 March 2020).

The same verdicts give the same bytes: no times, no machine, no absolute paths below the root.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loraformat.problems import Problem
from loraformat.reasons import find_reason
from loraformat.reports import Setting
from loraformat.reports._words import as_uri, describe, one_line

if TYPE_CHECKING:
    from loraformat.validation import Verdict

_SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def write(verdicts: "Sequence[Verdict]", setting: Setting) -> str:
    """Return one SARIF log with one run."""
    codes = sorted({problem.code for verdict in verdicts for problem in verdict.problems})
    rules = {code: index for index, code in enumerate(codes)}
    run = {
        "tool": {"driver": _driver(codes)},
        "results": [
            _result(problem, as_uri(verdict.file or verdict.path, setting.root), rules)
            for verdict in verdicts
            for problem in verdict.problems
        ],
        "columnKind": "unicodeCodePoints",
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False) + "\n"


def _driver(codes: Sequence[str]) -> Mapping[str, Any]:
    from importlib.metadata import version

    return {"name": "loraformat", "version": version("loraformat"), "rules": list(map(_rule, codes))}


def _rule(code: str) -> Mapping[str, Any]:
    reason = find_reason(code)
    return {
        "id": code,
        "shortDescription": {"text": reason.title},
        "fullDescription": {"text": f"{reason.title}. {reason.mend}"},
        "help": {"text": reason.mend},
    }


def _result(problem: Problem, uri: str, rules: Mapping[str, int]) -> Mapping[str, Any]:
    mend = f" {one_line(problem.mend)}" if problem.mend else ""
    # GitHub asks for a line, which binary files lack; all results on line 1 would be one to it without a fingerprint.
    place = {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}
    identity = hashlib.sha256("\n".join((problem.code, uri, describe(problem))).encode())
    return {
        "ruleId": problem.code,
        "ruleIndex": rules[problem.code],
        "level": problem.severity,
        "message": {"text": f"{problem.title}: {describe(problem)}.{mend}"},
        "locations": [
            {"physicalLocation": place, "logicalLocations": [{"fullyQualifiedName": one_line(problem.where)}]}
        ],
        "partialFingerprints": {"primaryLocationLineHash": identity.hexdigest()[:32]},
    }
