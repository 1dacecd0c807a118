"""loraformat: a file format for LoRA adapters, and the tools that merge them without torch.

The public face. Names are imported when they are first used, so `import loraformat` is cheap.

    import loraformat

    adapter = loraformat.load("my-adapter")
    receipt = loraformat.merge("base.onnx", [(adapter, 0.7)], "merged.onnx")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraformat.adapter import Adapter, Target
    from loraformat.algebra.analysis import Analysis
    from loraformat.algebra.difference import Difference
    from loraformat.algebra.extraction import Extraction
    from loraformat.algebra.initialise import Initialisation
    from loraformat.algebra.reduction import Reduction
    from loraformat.algebra_api import compose, diff, resize, scale
    from loraformat.analysis_api import analyse, extract, init, save_page
    from loraformat.api import inspect, load, save, stamp, validate
    from loraformat.conversion import Conversion, SchemeSummary, convert, list_schemes, plan_conversion
    from loraformat.errors import FindingError, InputError, LoraformatError, OutputError, RefusedError
    from loraformat.inspection import AdapterInspection, BaseInspection
    from loraformat.merging import merge, merge_each, merge_into, plan_merge, resolve_targets, unmerge, verify
    from loraformat.merging.in_memory import MergedState, merge_state_dict
    from loraformat.merging.model_in_memory import MergedModel, merge_model
    from loraformat.merging.unmerging import Undone
    from loraformat.plan import Plan
    from loraformat.problems import Problem
    from loraformat.receipt import Receipt
    from loraformat.resolving import Resolved
    from loraformat.validation import Verdict
    from loraformat.verification import Verification

    __version__: str

__all__ = [
    "Adapter",
    "AdapterInspection",
    "Analysis",
    "BaseInspection",
    "Conversion",
    "Difference",
    "Extraction",
    "FindingError",
    "Initialisation",
    "InputError",
    "LoraformatError",
    "MergedModel",
    "MergedState",
    "OutputError",
    "Plan",
    "Problem",
    "Receipt",
    "Reduction",
    "RefusedError",
    "Resolved",
    "SchemeSummary",
    "Target",
    "Undone",
    "Verdict",
    "Verification",
    "analyse",
    "compose",
    "convert",
    "diff",
    "extract",
    "init",
    "inspect",
    "list_schemes",
    "load",
    "merge",
    "merge_each",
    "merge_into",
    "merge_model",
    "merge_state_dict",
    "plan_conversion",
    "plan_merge",
    "resize",
    "resolve_targets",
    "save",
    "save_page",
    "scale",
    "stamp",
    "unmerge",
    "validate",
    "verify",
]

_HOMES = {
    "loraformat.adapter": ("Adapter", "Target"),
    "loraformat.algebra.analysis": ("Analysis",),
    "loraformat.algebra.difference": ("Difference",),
    "loraformat.algebra.extraction": ("Extraction",),
    "loraformat.algebra.initialise": ("Initialisation",),
    "loraformat.algebra.reduction": ("Reduction",),
    "loraformat.algebra_api": ("compose", "diff", "resize", "scale"),
    "loraformat.analysis_api": ("analyse", "extract", "init", "save_page"),
    "loraformat.api": ("inspect", "load", "save", "stamp", "validate"),
    "loraformat.conversion": ("Conversion", "SchemeSummary", "convert", "list_schemes", "plan_conversion"),
    "loraformat.errors": ("FindingError", "InputError", "LoraformatError", "OutputError", "RefusedError"),
    "loraformat.inspection": ("AdapterInspection", "BaseInspection"),
    "loraformat.merging": ("merge", "merge_each", "merge_into", "plan_merge", "resolve_targets", "unmerge", "verify"),
    "loraformat.merging.in_memory": ("MergedState", "merge_state_dict"),
    "loraformat.merging.model_in_memory": ("MergedModel", "merge_model"),
    "loraformat.merging.unmerging": ("Undone",),
    "loraformat.plan": ("Plan",),
    "loraformat.problems": ("Problem",),
    "loraformat.receipt": ("Receipt",),
    "loraformat.resolving": ("Resolved",),
    "loraformat.validation": ("Verdict",),
    "loraformat.verification": ("Verification",),
}
_ROOMS = ("runtime",)
"""What has a face of its own."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # here: it imports parsers of mail

        return version("loraformat")
    if name in _ROOMS:
        return import_module(f"loraformat.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]
