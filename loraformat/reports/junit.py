"""For GitLab, Jenkins and others: JUnit's XML, a test case for each path.

Only characters that XML 1.0 has reach the text: everything else is written out as an escape before.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from loraformat.reports import Setting
from loraformat.reports._words import count_targets, locate, one_line

if TYPE_CHECKING:
    from loraformat.validation import Verdict

_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(verdicts: "Sequence[Verdict]", setting: Setting) -> str:
    """Return one suite; a case fails where the exit code says so too."""
    failures = sum(verdict.reaches(setting.fail_on) for verdict in verdicts)
    counts = f'tests="{len(verdicts)}" failures="{failures}" errors="0" skipped="0"'
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f"<testsuites {counts}>",
        f'<testsuite name="loraformat validate" {counts}>',
        *(_case(verdict, setting) for verdict in verdicts),
        "</testsuite>",
        "</testsuites>",
    ]
    return "\n".join(lines) + "\n"


def _case(verdict: "Verdict", setting: Setting) -> str:
    file, _ = locate(verdict.file or verdict.path, setting.root)
    head = f'<testcase classname="loraformat.validate" name={_quoted(one_line(verdict.path))} file={_quoted(file)}>'
    texts = [f"{problem.severity}: {problem}" for problem in verdict.problems]
    if not verdict.reaches(setting.fail_on):
        told = "\n".join((f"ok {count_targets(verdict)}".rstrip(), *texts))
        return f"{head}<system-out>{_escaped(told)}</system-out></testcase>"
    first = verdict.problems[0]
    more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
    message = _quoted(f"{first.code} {first.title}: {one_line(first.where)}{more}")
    told = _escaped("\n".join(texts))
    return f"{head}<failure message={message} type={_quoted(first.code)}>{told}</failure></testcase>"


def _quoted(text: str) -> str:
    return f'"{_escaped(one_line(text))}"'


def _escaped(text: str) -> str:
    return escape(_NOT_XML.sub(lambda match: f"\\u{ord(match[0]):04x}", text))
