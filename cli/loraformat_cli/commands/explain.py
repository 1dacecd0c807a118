"""`loraformat explain`."""

from dataclasses import asdict

import click

from loraformat_cli.options import common_options, json_option
from loraformat_cli.screen import Screen


@click.command(short_help="Explain a reason code, or list all.")
@click.argument("code", required=False)
@json_option
@common_options
@click.pass_obj
def command(screen: Screen, /, code: str | None) -> None:
    r"""Explain the reason CODE of a message, such as LF401: what it means, the exit code, how to mend it.

    Without CODE, all reason codes are listed.

    \b
    Examples:
      loraformat explain LF401
      loraformat explain | grep scale
    """
    from loraformat.reasons import all_reasons

    reasons = all_reasons()
    if code is not None and code.upper() not in reasons:
        raise click.BadParameter(_unknown(code, list(reasons)), click.get_current_context(), param_hint="CODE")
    chosen = list(reasons.values()) if code is None else [reasons[code.upper()]]
    if screen.json:
        screen.document({"reasons": [asdict(reason) for reason in chosen]})
    elif code is None:
        screen.table(("code", ">exit", "title"), ((reason.code, reason.exit, reason.title) for reason in chosen))
    else:
        reason = chosen[0]
        screen.line(f"{reason.code} {reason.title}")
        screen.line(f"  exit code: {reason.exit}, since version {reason.since} of the specification")
        screen.line(f"  mend: {reason.mend}")


def _unknown(code: str, known: list[str]) -> str:
    from difflib import get_close_matches

    word = code.upper()
    near = [each for each in known if word and each.startswith(word)] or get_close_matches(word, known, n=3, cutoff=0.6)
    return f"no reason has the code {code!r}; " + (f"near: {', '.join(near)}." if near else "see `loraformat explain`.")
