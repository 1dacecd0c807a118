"""What is said when names or shapes of adapter and base do not meet."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

from loraformat.bases import Site
from loraformat.kinds import REST, UNKNOWN
from loraformat.matching import Match, Want, brings_rows, fits_site, name_weight, shape_at
from loraformat.matching.site_index import RENAMED, SiteIndex
from loraformat.problems import Problem
from loraformat.spans import Part

LISTED: Final = 8
"""How many of a kind are listed one by one."""

_NAMELESS: Final = 3
_MAP: Final = (
    "The base does not tell which modules its weights are of. The checkpoint that it was exported from finds them by "
    "their numbers: --base-checkpoint DIR. Or say it with --map FILE: a JSON object with a list `targets` of objects "
    "with `target` and `weight`."
)
_GRAPH_GROWS: Final = (
    "The adapter's vocabulary has grown, and a graph fixes the size of its tables: export the model again with its "
    "embeddings resized, or merge into the checkpoint and export that."
)
_FEWER_ROWS: Final = (
    "The adapter holds fewer rows than the base's table: only the rows of added tokens (as fms-hf-tuning and vLLM keep "
    "them), or a table of a smaller vocabulary. Which rows of the base they follow, the file does not say: save the "
    "adapter with its whole table."
)
_WIDER: Final = (
    "The adapter is for a model with more inputs. A checkpoint in floats that stands in one piece, as diffusers and "
    "ComfyUI have them, can be filled up with zeros for it; a graph, codes and fused weights cannot: merge into such a "
    "checkpoint, or give the base that has the inputs already."
)


def report_shape(want: Want, sites: Sequence[Site]) -> Problem:
    """Return why a target fits none of the sites that have its name."""
    site = next(site for site in sites if site.weight is not None)
    stored, wanted = site.stored_shape(), shape_at(want, site)
    mend = _mend_table(want, site, stored, wanted) or (_WIDER if want.change.widens else "")
    turned = " (it would fit transposed, which is never guessed)" if stored == wanted[::-1] else ""
    found = f"the weight {name_weight(site)!r} is {stored}{turned}"
    shown = str(wanted).replace(str(UNKNOWN), "any").replace(str(REST), "...")
    return Problem("LF405", want.name, found, f"{shown} for its factors", mend)


def _mend_table(want: Want, site: Site, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Return what to do about a table of tokens that has more or fewer rows than the base's."""
    if stored[1:] != wanted[1:] or not brings_rows(want):
        return ""
    if wanted[0] > stored[0]:
        return "" if site.grows else _GRAPH_GROWS
    return _FEWER_ROWS if site.grows else ""


def report_missing(lost: Sequence[tuple[Want, str, SiteIndex]], sites: Sequence[Site]) -> list[Problem]:
    """Return one problem for each of the first few names, and one that lists the rest."""
    problems = []
    for want, looked_for, index in lost[:LISTED]:
        near = index.near(looked_for)
        found = f"nothing of this name; nearest: {', '.join(near)}" if near else "nothing of this name, and none near"
        nameless = list_nameless(want, sites)
        found += f"; without a module, but of its shape: {', '.join(nameless[:_NAMELESS])}" if nameless else ""
        expected = f"one of {len(index.paths)} modules of the base"
        problems.append(Problem("LF401", want.name, found, expected, _MAP if nameless else ""))
    rest = [want.name for want, *_ in lost[LISTED:]]
    if rest:
        problems.append(Problem("LF401", f"{len(rest)} more targets", f"nothing of these names: {', '.join(rest)}"))
    return problems


def list_nameless(want: Want, sites: Sequence[Site]) -> list[str]:
    """Return the names of the weights that would fit a target and of which nothing tells the module."""
    fitting = (
        site.weight.name
        for site in sites
        if not site.module
        and site.weight is not None
        and site.obstacle is None
        and want.change.slot in site.transposed
        and fits_site(want, site)
    )
    return list(dict.fromkeys(fitting))


def report_collisions(matches: Sequence[Match]) -> list[Problem]:
    """Return a problem for every weight, or part of one, that two targets of one adapter lead to."""
    return [
        Problem(
            "LF404",
            " and ".join(dict.fromkeys(match.target.name for match in group)),
            f"both lead to {group[0].weight.name!r} ({group[0].sites[0].module})",
            "a weight for each",
            "Drop the part of the names that the base lacks with --strip-prefix, or leave one out.",
        )
        for group in group_by_weight(matches)
        if len({match.target.name for match in group}) > 1
    ]


def report_dropped(matches: Sequence[Match]) -> list[Problem]:
    """Return a warning for every prefix that was dropped from targets' names."""
    dropped = Counter(match.relation[1:] for match in matches if match.relation.startswith("-"))
    return [
        Problem(
            "LF306", prefix, f"dropped from the names of {count} targets", "the base's own names", severity="warning"
        )
        for prefix, count in sorted(dropped.items())
    ]


def report_renamed(matches: Sequence[Match]) -> list[Problem]:
    """Return a note on the targets that were found under a name that a library gave them before or since."""
    renamed = {m.target.name: m.relation[1:] for m in matches if m.relation.startswith(RENAMED)}
    if not renamed:
        return []
    name, other = next(iter(renamed.items()))
    found = f"{len(renamed)} targets stand under another name, as {name} under {other}"
    return [Problem("LF410", name, found, "the base's own names", severity="note")]


def group_by_weight(matches: Sequence[Match]) -> list[list[Match]]:
    """Return the matches of each weight, or part of one."""
    groups: dict[tuple[str, Part | None, str], list[Match]] = defaultdict(list)
    for match in matches:
        groups[match.weight.key, match.part, match.apart].append(match)
    return list(groups.values())
