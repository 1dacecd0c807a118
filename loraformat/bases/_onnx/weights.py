"""What the sites of an ONNX graph have as weights: the stored tensor, its coding and readers, the module's part."""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from loraformat.adapter import SlotKind
from loraformat.bases import Site, Weight
from loraformat.bases._onnx.coded import agree_on_codes, find_coded_part, find_coding
from loraformat.bases._onnx.operands import QMOE, find_operands
from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.sites import RawSite, agree_on_views
from loraformat.bases._onnx.views import list_readers
from loraformat.containers.onnx_file import OnnxFile
from loraformat.files import name_from
from loraformat.problems import Problem, escape_surrogates
from loraformat.spans import Part


def list_weight_sites(opened: OnnxFile, found: Sequence[RawSite], caveat: Problem | None) -> list[Site]:
    """Return the sites, each with its weight, or what stands in the way of one.

    A tensor held by a function is read at every call: its readers are those of all places where it was found.
    """
    found = agree_on_views(found)
    readers: dict[int, set[str]] = defaultdict(set)
    beside: dict[int, set[Visit]] = defaultdict(set)
    for raw in found:
        readers[id(raw.trace.tensor)].update(list_readers(raw.trace))
        beside[id(raw.trace.tensor)].update(*(each.readers for each in find_operands(raw).values()))
    sites = [
        _make_site(opened, raw, frozenset(readers[id(raw.trace.tensor)] - raw.apart), beside[id(raw.trace.tensor)])
        for raw in found
    ]
    sites = agree_on_codes(sites)
    return [replace(site, caveat=caveat) for site in sites] if caveat is not None else sites


def _make_site(opened: OnnxFile, raw: RawSite, readers: frozenset[str], beside: Set[Visit]) -> Site:
    weight, obstacle = _find_weight(opened, raw, readers, beside)
    transposed = {kind: turned ^ raw.trace.flipped for kind, turned in raw.use.orientations.items()}
    return Site(
        id=raw.visit.describe(raw.position),
        module=raw.module,
        evidence=raw.evidence,
        transposed=transposed,
        weight=weight,
        parameter=raw.parameter,
        divisor=raw.use.divisor,
        obstacle=obstacle,
        part=_find_part(weight, raw, transposed) if weight is not None else None,
        section=raw.section,
    )


def _find_part(weight: Weight, raw: RawSite, transposed: Mapping[SlotKind, bool]) -> Part | None:
    """Return the rows or columns of the stored matrix that the site's module has; None for all."""
    if raw.part is not None:
        return raw.part
    whole = find_coded_part(weight.coding, raw)
    if raw.rows is None:
        return whole
    if whole is not None:
        return replace(whole, rows=(*raw.rows, 1))
    rows, columns = weight.tensor.shape
    own = (*raw.rows, 1)
    if transposed[SlotKind.LINEAR]:
        return Part((rows, columns), (0, rows, 1), own)
    return Part((rows, columns), own, (0, columns, 1))


def _find_weight(
    opened: OnnxFile, raw: RawSite, readers: frozenset[str], beside: Set[Visit]
) -> tuple[Weight | None, Problem | None]:
    if raw.trace.tensor is None or raw.use.refusal or raw.trace.blocked:
        return None, raw.obstacle
    stored = opened.stored_tensor(raw.trace.tensor)
    if isinstance(stored, Problem):
        return None, stored
    stored = replace(stored, shape=raw.trace.sizes)
    name = stored.name or raw.trace.name
    coding = find_coding(opened, raw, stored, beside)
    if isinstance(coding, Problem):
        return None, coding
    if coding is not None and raw.part is not None and raw.visit.op != QMOE:
        return None, Problem("LF403", name, "packed experts that are stored in codes", "a floating-point form")
    if coding is None and stored.dtype.family != "float":
        return None, Problem("LF403", name, f"numbers stored as {stored.dtype.name}", "a floating-point form")
    if not stored.elements:
        return None, Problem("LF403", name, f"no numbers: its shape is {stored.shape}", "a matrix or a kernel")
    overlapping = [f"the tensor {other!r}, whose bytes overlap its own" for other in opened.overlaps(stored)]
    file = name_from(stored.span.path, opened.path.parent)
    key = f"{escape_surrogates(file)}@{stored.span.offset}" + (f" {name}" if overlapping else "")
    return Weight(key, name, stored, readers.union(overlapping), coding), raw.obstacle
