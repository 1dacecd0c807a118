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
    from loraformat.api import inspect, load, merge, plan_merge, save, stamp, validate
    from loraformat.conversion import Conversion, SchemeSummary, convert, list_schemes, plan_conversion
    from loraformat.errors import FindingError, InputError, LoraformatError, OutputError, RefusedError
    from loraformat.inspection import AdapterInspection, BaseInspection
    from loraformat.plan import Plan
    from loraformat.problems import Problem
    from loraformat.receipt import Receipt
    from loraformat.validation import Verdict

__all__ = [
    "Adapter",
    "AdapterInspection",
    "BaseInspection",
    "Conversion",
    "FindingError",
    "InputError",
    "LoraformatError",
    "OutputError",
    "Plan",
    "Problem",
    "Receipt",
    "RefusedError",
    "SchemeSummary",
    "Target",
    "Verdict",
    "convert",
    "inspect",
    "list_schemes",
    "load",
    "merge",
    "plan_conversion",
    "plan_merge",
    "save",
    "stamp",
    "validate",
]

_HOMES = {
    "loraformat.adapter": ("Adapter", "Target"),
    "loraformat.api": ("inspect", "load", "merge", "plan_merge", "save", "stamp", "validate"),
    "loraformat.conversion": ("Conversion", "SchemeSummary", "convert", "list_schemes", "plan_conversion"),
    "loraformat.errors": ("FindingError", "InputError", "LoraformatError", "OutputError", "RefusedError"),
    "loraformat.inspection": ("AdapterInspection", "BaseInspection"),
    "loraformat.plan": ("Plan",),
    "loraformat.problems": ("Problem",),
    "loraformat.receipt": ("Receipt",),
    "loraformat.validation": ("Verdict",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]
