"""`loraformat analyse`."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from loraformat_cli.options import adapter_options, check_stated, common_options, json_option
from loraformat_cli.screen import Screen

if TYPE_CHECKING:
    from loraformat.algebra.analysis import AdapterAnalysis, Comparison, TargetAnalysis

_FILE: Final = click.Path(path_type=Path, readable=False)
_HEADINGS: Final = (">targets", ">rank", ">norm", ">energy", ">eff. rank", ">stable rank")
_AMPLIFIED: Final = (">along delta", ">along W", ">random", ">amplified")


@click.command(short_help="Say what adapters have learned: spectra, subspaces, amplification.")
@click.argument("adapters", type=_FILE, nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--base", type=_FILE, metavar="MODEL", help="The model they were trained on: adds what is amplified.")
@click.option("--html", type=_FILE, metavar="FILE", help="Write a page with pictures, for any browser, no network.")
@click.option("--force", is_flag=True, help="Replace the page if it exists.")
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of the random matrices.")
@json_option
@adapter_options
@common_options
@click.pass_obj
def command(
    screen: Screen, /, adapters: tuple[Path, ...], base: Path | None, html: Path | None, force: bool, **flags: Any
) -> None:
    r"""Say what adapters have learned, alone and of one another.

    Where the energy of the change is, how many directions it uses, how alike layers and adapters are, and what it
    amplifies (section 7 of the LoRA paper). With -v, every target.

    \b
    Examples:
      loraformat analyse adapter/
      loraformat analyse seed1/ seed2/ --base model/ --html analysis.html
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    analysis = loraformat.analyse(adapters, base, **flags)
    screen.problems(analysis.problems)
    if html is not None:
        loraformat.save_page(analysis, html, force=force)
        screen.note(f"page: {html}")
    if screen.json:
        screen.document(analysis.as_json())
        return
    for adapter in analysis.adapters:
        _show(screen, adapter)
    for compared in analysis.comparisons:
        _show_pair(screen, compared)


def _show(screen: Screen, adapter: "AdapterAnalysis") -> None:
    screen.line(
        f"{adapter.name}: {len(adapter.targets)} targets, {adapter.parameters:,} numbers, norm {adapter.norm:.4g}"
    )
    known = any(each.amplification for each in adapter.targets)
    headings = (*_HEADINGS, *(_AMPLIFIED if known else ()))
    screen.table(("module", *headings), _rows(adapter, [(name, name) for name in adapter.by_module], "module", known))
    if len(adapter.by_layer) > 1:
        screen.line()
        layers = [(layer or "-", layer) for layer in adapter.by_layer]
        screen.table(("layer", *headings), _rows(adapter, layers, "layer", known))
    if screen.verbose:
        screen.line()
        names = [(each.name, each.name) for each in adapter.targets]
        screen.table(("target", *headings), _rows(adapter, names, "name", known))
    screen.line()


def _rows(
    adapter: "AdapterAnalysis", keys: Sequence[tuple[str, str]], field: str, known: bool
) -> Iterator[Sequence[object]]:
    """Yield a row for each group of targets: sums of energy, medians of the rest."""
    for label, key in keys:
        group = [each for each in adapter.targets if _key(each, field) == key]
        yield (label, *_numbers(group), *(_amplified(group) if known else ()))


def _key(target: "TargetAnalysis", field: str) -> str:
    value = getattr(target, field)
    return "" if value is None else str(value)


def _numbers(group: "Sequence[TargetAnalysis]") -> tuple[object, ...]:
    return (
        len(group),
        f"{_median(each.rank for each in group):g}",
        f"{sum(each.norm**2 for each in group) ** 0.5:.4g}",
        f"{sum(each.energy for each in group):.1%}",
        f"{_median(each.effective_rank for each in group):.3g}",
        f"{_median(each.stable_rank for each in group):.3g}",
    )


def _amplified(group: "Sequence[TargetAnalysis]") -> tuple[str, ...]:
    known = [each.amplification for each in group if each.amplification]
    factors = [each.factor for each in known if each.factor is not None]
    if not known:
        return ("",) * len(_AMPLIFIED)
    return (
        f"{_median(each.along_delta for each in known):.3g}",
        f"{_median(each.along_weight for each in known):.3g}",
        f"{_median(each.along_random for each in known):.3g}",
        f"{_median(factors):.3g}x" if factors else "",
    )


def _show_pair(screen: Screen, compared: "Comparison") -> None:
    screen.line(f"{compared.first} and {compared.second}: {len(compared.by_target)} targets in common")
    rows = (
        (
            each.module,
            each.side,
            each.targets,
            f"{each.phi[0][0]:.3f}",
            f"{each.phi[-1][-1]:.3f}",
            f"{each.expected:.3f}",
        )
        for each in compared.maps
    )
    screen.table(("module", "side", ">targets", ">phi(1,1)", ">phi(r,r)", ">random"), rows)
    screen.line()


def _median(values: Iterable[float]) -> float:
    from statistics import median  # here: it imports fractions and decimals

    return median(values)
