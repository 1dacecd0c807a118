"""What `resolve` prints of any merge that is planned, given back as `--map`, leads to the same plan."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraformat import merging, planning
from loraformat.evidence import Hints
from loraformat.evidence.explicit_map import read_map
from loraformat.plan import Plan
from loraformat.resolving import resolve_one

_OF_RESOLVE = ("allow_unmatched", "strip_prefix", "ignore_fingerprints", "untie", "new_biases")
"""Options of a plan that are those of `resolve` too."""


def plan_mapped(plan: Any, base: Any, adapters: Any, output: Any, scratch: Path, **options: Any) -> tuple[Plan, Plan]:
    """Return a plan of one adapter, and the plan with the map of it, without what says how weights were found."""
    hints = options.pop("hints", Hints())
    shared = {name: value for name, value in options.items() if name in _OF_RESOLVE}
    found = resolve_one(base, adapters[0], hints, shared)
    scratch.write_text(json.dumps(found.as_json()), encoding="utf-8")
    given = Hints(mapped=read_map(scratch), checkpoint=hints.checkpoint)
    first, again = (plan(base, adapters, output, hints=each, **options) for each in (hints, given))
    return _forget_evidence(first), _forget_evidence(again)


def _forget_evidence(plan: Plan) -> Plan:
    return replace(plan, weights=tuple(replace(weight, evidence="") for weight in plan.weights), problems=())


@pytest.fixture(autouse=True)
def map_law(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Check the law wherever a test plans a merge of one adapter by anything but a map."""
    original = planning.build_plan

    def build_plan(base: Any, adapters: Any, output: Any, **options: Any) -> Plan:
        plan = original(base, adapters, output, **options)
        if len(adapters) == 1 and not options.get("hints", Hints()).mapped and base.format == "onnx":
            scratch = tmp_path_factory.mktemp("map") / "map.json"
            first, again = plan_mapped(original, base, adapters, output, scratch, **options)
            assert again == first
        return plan

    for module in (planning, merging):
        monkeypatch.setattr(module, "build_plan", build_plan)
