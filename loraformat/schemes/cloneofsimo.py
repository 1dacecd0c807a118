"""cloneofsimo/lora, for Stable Diffusion 1: modules are numbered in the order in which torch walks them.

Either one safetensors file with `unet:0:up`, `unet:0:down`, `text_encoder:0:up` ... and token embeddings `<s1>`, or a
pickled list `[up, down, up, down ...]` of one component. The order is that of the base and of diffusers' version; it is
taken from `spec/names/orders`, and only where every size agrees. Nothing says how strongly it acts. Source:
cloneofsimo/lora, lora_diffusion/lora.py.
"""

import re
from collections.abc import Mapping
from typing import Final

from loraformat.adapter import Adapter, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.derived import derive
from loraformat.errors import error_for, refuse
from loraformat.manifest import MANIFEST_KEY
from loraformat.operations import Reshape
from loraformat.problems import Problem
from loraformat.schemes import PIPELINES, Bundle, Holds, StatedScale
from loraformat.schemes._groups import TOKEN
from loraformat.schemes._naming import BUNDLED
from loraformat.spellings import read_order_file

_NUMBERED: Final = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_TOKEN: Final = re.compile(r"<[^<>]+>")
_ROLES: Final = {"up": "lora_B.weight", "down": "lora_A.weight"}
Numbered = Mapping[int, Mapping[str, Factor]]
"""Number of a module to role to tensor."""


class Cloneofsimo:
    """The scheme `cloneofsimo`."""

    name = "cloneofsimo"
    holds = Holds(
        kinds=frozenset({"lora", TOKEN}),
        slots=frozenset({SlotKind.LINEAR, SlotKind.PARAMETER}),
        scale="not stored",
        models=PIPELINES,
    )
    title = "cloneofsimo/lora: numbered modules of Stable Diffusion 1"

    def detect(self, bundle: Bundle) -> str | None:
        """Recognise numbered names, or a list of pairs."""
        if MANIFEST_KEY in bundle.metadata:
            return None
        named = [key for key in bundle.tensors if _NUMBERED.fullmatch(key)]
        if named:
            return f"{len(named)} of {len(bundle.tensors)} tensors are called like {min(named)}"
        return f"a list of {len(bundle.tensors) // 2} pairs of matrices" if _is_list(bundle.tensors) else None

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; numbers for which no order fits are refused."""
        problems: list[Problem] = []
        groups, tokens = _group(bundle.tensors, problems)
        if not groups:
            raise error_for([*problems, Problem("LF212", str(bundle.path), "no numbered factors", "pairs of matrices")])
        scaling = _state(stated, bundle)
        targets = [target for component, each in groups.items() for target in _name(component, each, scaling, problems)]
        targets += tokens
        return Adapter(
            targets=tuple(sorted(targets, key=lambda target: target.name)),
            scheme=self.name,
            source=str(bundle.path),
            problems=tuple(problems),
        )


def _is_list(tensors: Mapping[str, Factor]) -> bool:
    if not tensors or len(tensors) % 2 or set(tensors) != {str(index) for index in range(len(tensors))}:
        return False
    shapes = [tensors[str(index)].shape for index in range(len(tensors))]
    return all(
        len(up) == len(down) == 2 and up[1] == down[0] for up, down in zip(shapes[::2], shapes[1::2], strict=True)
    )


def _group(
    tensors: Mapping[str, Factor], problems: list[Problem]
) -> tuple[dict[str, dict[int, dict[str, Factor]]], list[Target]]:
    """Return component to numbered factors, and the token embeddings."""
    groups: dict[str, dict[int, dict[str, Factor]]] = {}
    tokens: list[Target] = []
    if _is_list(tensors):
        pairs = {
            index: {"lora_B.weight": tensors[str(2 * index)], "lora_A.weight": tensors[str(2 * index + 1)]}
            for index in range(len(tensors) // 2)
        }
        return {"": pairs}, []
    for key, tensor in sorted(tensors.items()):
        match = _NUMBERED.fullmatch(key)
        if match is not None:
            groups.setdefault(match[1], {}).setdefault(int(match[2]), {})[_ROLES[match[3]]] = tensor
        elif _TOKEN.fullmatch(key):
            unit = Scaling(ScalingRule.MULTIPLIER, 1.0)
            row = derive(Reshape((1, *tensor.shape)), tensor)  # As others bundle it: tokens below each other.
            tokens.append(Target(f"{BUNDLED}.{key}", TOKEN, SlotKind.PARAMETER, {"clip_l": row}, 0, unit))
        else:
            problems.append(Problem("LF202", key, f"a tensor of shape {tensor.shape}", "a numbered factor or a token"))
    return groups, tokens


def _state(stated: StatedScale, bundle: Bundle) -> Scaling:
    if stated.multiplier is not None:
        return Scaling(ScalingRule.MULTIPLIER, stated.multiplier)
    if stated.alpha is not None:
        return Scaling(ScalingRule.ALPHA_OVER_RANK, stated.alpha)
    raise refuse("LF211", bundle.path, "a scheme that has no place for a scale", "the scale of the training run")


def _name(component: str, numbered: Numbered, scaling: Scaling, problems: list[Problem]) -> list[Target]:
    """Return the targets of one component, named by the one order whose sizes all agree."""
    for order in read_order_file("sd1-cloneofsimo")["orders"]:
        if component in ("", order["component"]) and _agrees(numbered, order["modules"]):
            return [
                _make_target(f"{order['component']}.{path}", numbered[index], scaling)
                for index, (path, _) in enumerate(order["modules"])
            ]
    found = f"{len(numbered)} numbered modules, in no order that is known"
    problems.append(Problem("LF314", component or "the list", found, "the modules of Stable Diffusion 1"))
    return []


def _agrees(numbered: Numbered, modules: list[tuple[str, int]]) -> bool:
    """Say whether every module has its number, and every B as many rows as the module has outputs."""
    if set(numbered) != set(range(len(modules))):
        return False
    ups = (numbered[index].get("lora_B.weight") for index in range(len(modules)))
    return all(up is not None and up.shape[0] == out for up, (_, out) in zip(ups, modules, strict=True))


def _make_target(name: str, factors: Mapping[str, Factor], scaling: Scaling) -> Target:
    down = factors.get("lora_A.weight")
    rank = down.shape[0] if down is not None and down.shape else 0
    return Target(name, "lora", SlotKind.LINEAR, factors, rank, scaling)


SCHEME: Final = Cloneofsimo()
