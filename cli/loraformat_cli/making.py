"""The end of commands that make an adapter: write it, say what became of its targets, print its path."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat_cli.screen import Screen

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.algebra.reduction import Reduction


def finish(
    screen: Screen, made: "Adapter", output: Path, *, force: bool, reductions: "Sequence[Reduction]" = ()
) -> None:
    """Save `made` and print the path, or the JSON object, on stdout; the cuts on stderr, in full when verbose."""
    import loraformat

    written = loraformat.save(made, output, force=force)
    if reductions:
        _say_cuts(screen, reductions)
    ranks = sorted({target.rank for target in made.targets if target.rank})
    listed = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}" if ranks else "no ranks"
    screen.note(f"{len(made.targets)} targets, {listed}, {made.parameters:,} numbers")
    if screen.json:
        cuts = [dict(reduction.as_json()) for reduction in reductions]
        targets = [{"name": t.name, "kind": t.kind, "rank": t.rank, "scale": t.scale} for t in made.targets]
        screen.document({"output": str(written), "targets": targets, "cuts": cuts})
    else:
        screen.path(written)


def _say_cuts(screen: Screen, reductions: "Sequence[Reduction]") -> None:
    worst = max(reductions, key=lambda reduction: reduction.error)
    if screen.verbose:
        rows = ((r.target, r.before, r.after, f"{r.error:.3g}") for r in reductions)
        screen.table(("target", ">rank before", ">rank", ">error"), rows, to="stderr")
    cut = sum(reduction.after < reduction.before for reduction in reductions)
    screen.note(f"{cut} of {len(reductions)} targets cut; largest relative error {worst.error:.3g} ({worst.target})")
