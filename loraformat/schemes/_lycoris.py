"""The tensors of kohya's LoRA and of LyCORIS, which stand beside each other in flat and in dotted files.

Source: KohakuBlueleaf/LyCORIS, the `weight_list` of its modules; kohya-ss/sd-scripts, networks/lora.py. A `diff_b`
beside a LoRA, as ComfyUI extracts them, is added to the bias whatever alpha is (comfyanonymous/ComfyUI, comfy/lora.py):
here it is a `lora_B.bias`, which the scale multiplies, divided by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from loraformat.adapter import Adapter, Factor, Target
from loraformat.base_facts import BaseFacts
from loraformat.derived import derive
from loraformat.operations import Scale
from loraformat.schemes import Bundle, StatedScale, WrittenBundle
from loraformat.schemes._beside import ALPHA
from loraformat.schemes._engine import TableScheme
from loraformat.schemes._foreign import refuse_tensor
from loraformat.schemes._groups import TOKEN
from loraformat.schemes._memory import find_memory
from loraformat.schemes._naming import BUNDLED
from loraformat.schemes._options import ON_INPUT, SCALED
from loraformat.schemes._padding import PADDED, SHAPE, SHAPES, state_shapes, take_shapes
from loraformat.schemes._table import COLUMN, Row

QUERY_NORM: Final = ".norm.query_norm"
"""What BFL's control adapters have a `scale` of, and no other files."""
_ADDED: Final = "diff_b"
_SCALED: Final = "lora_B.bias"
_UNCLEAR: Final = "diff and lora"
_WITH_BIAS: Final = frozenset({"lora", PADDED})
_BIASES: Final = "biases"
"""The part of a provenance that says how biases beside a LoRA were called."""


def _is_column(factor: Factor) -> bool:
    """Say whether a magnitude is one for each output: `(out, 1, ...)`. The other kind is `(1, in, ...)`."""
    return len(factor.shape) > 1 and all(size == 1 for size in factor.shape[1:])


def _is_vector(factor: Factor) -> bool:
    """Say whether a magnitude has lost its axes of one: then it is one for each output, as PEFT's and ai-toolkit's."""
    return len(factor.shape) == 1


def _is_diagonal(factor: Factor) -> bool:
    """Say whether blocks are those of diag-OFT; those of a butterfly have stages before."""
    return len(factor.shape) == 3


def is_bundled(factor: Factor) -> bool:
    """Say whether a tensor is the embedding of a token, as OneTrainer and A1111 put it beside the factors."""
    return factor.name.startswith(f"{BUNDLED}.")


_ENCODERS: Final = ("clip_l", "clip_g", "t5", "t5_l", "llama", "qwen")
_FORMS: Final = ("", "_out")
"""An embedding of the input, or one that takes the place of the encoder's output."""
_LOHA: Final = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR: Final = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_GLORA: Final = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")

LYCORIS_ROWS: Final = (
    Row("lora_mid.weight", "locon", "lora_mid.weight"),
    Row(SHAPE, PADDED, SHAPE),
    Row("dora_scale", "dora", "lora_magnitude_vector", COLUMN, _is_column),
    Row("dora_scale", "dora", "lora_magnitude_vector", fits=_is_vector),
    Row("dora_scale", "dora", "dora_scale"),
    *(Row(role, "loha", role) for role in _LOHA),
    *(Row(role, "lokr", role) for role in _LOKR),
    *(Row(role, "lycoris_glora", role) for role in _GLORA),
    Row("diff", "diff", "diff"),
    Row(_ADDED, _ADDED, _ADDED),
    Row("w_norm", "diff", "w_norm"),
    Row("b_norm", "diff", "b_norm"),
    Row("oft_blocks", "lycoris_oft", "oft_blocks", fits=_is_diagonal),
    Row("oft_blocks", "lycoris_boft", "oft_blocks"),
    Row("rescale", "rescaled", "rescale"),
    Row("oft_R.weight", "onetrainer_oft", "oft_R.weight"),
    Row(SCALED, "", SCALED),
    Row("set_weight", "replace", "weight"),
    Row("weight", "lycoris_ia3", "weight"),
    Row(ON_INPUT, "", ON_INPUT),
    Row(ALPHA, "", ALPHA),
    *(Row(f"{encoder}{form}", TOKEN, f"{encoder}{form}", fits=is_bundled) for encoder in _ENCODERS for form in _FORMS),
    *(Row(role, TOKEN, role, fits=is_bundled) for role in ("emb_params", "string_to_param.*")),
)

LYCORIS_KINDS: Final = frozenset(
    {"lora", "locon", "dora", "loha", "lokr", "dora_loha", "dora_lokr", "lycoris_glora", "lycoris_ia3"}
    | {"lycoris_oft", "lycoris_boft", "onetrainer_oft", PADDED, TOKEN, "diff", "replace"}
    | {"diff and lora", "diff and dora", "diff and locon"}
)
"""What these rows can hold: the kinds, and the kinds that they make together."""


@dataclass(frozen=True)
class LycorisScheme(TableScheme):
    """A table with these rows.

    Attributes:
        only_added: whether `diff_b` is the one name that it has for a bias beside a LoRA.
    """

    only_added: bool = False

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter, biases beside a LoRA as it has them."""
        adapter = take_shapes(_doubt_weights(super().read(bundle, stated)), self.name)
        if not any(_is_biased(target) for target in adapter.targets):
            return adapter
        targets = tuple(_divide(target) if _is_biased(target) else target for target in adapter.targets)
        memory = {**find_memory(adapter.provenance, self.name), _BIASES: _ADDED}
        return replace(adapter, targets=targets, provenance={**adapter.provenance, self.name: memory})

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return the tensors; biases beside a LoRA are called as they were."""
        if self.only_added or _were_added(adapter.provenance):
            adapter = replace(adapter, targets=tuple(map(_multiply, adapter.targets)))
        stated = find_memory(adapter.provenance, self.name).get(SHAPES)
        return super().write(adapter if _are_by_bfl(adapter) and not stated else state_shapes(adapter), facts)


def _doubt_weights(adapter: Adapter) -> Adapter:
    """Refuse tensors called `weight` that no (IA)³ wrote: beside its own the side stands that they multiply."""
    problems = [
        refuse_tensor(target.factors["weight"].name, target.factors["weight"])
        for target in adapter.targets
        if target.kind == "lycoris_ia3" and "weight" in target.factors and ON_INPUT not in target.options
    ]
    return replace(adapter, problems=(*adapter.problems, *problems)) if problems else adapter


def _are_by_bfl(adapter: Adapter) -> bool:
    """Say whether an adapter has norms as BFL's control adapters have them, by which readers know what is wider."""
    return any("scale" in target.factors and target.name.endswith(QUERY_NORM) for target in adapter.targets)


def _is_biased(target: Target) -> bool:
    return target.kind in _WITH_BIAS and _ADDED in target.factors


def _were_added(provenance: Mapping[str, Any]) -> bool:
    return any(isinstance(memory, Mapping) and memory.get(_BIASES) == _ADDED for memory in provenance.values())


def _divide(target: Target) -> Target:
    """Return a LoRA with what is added to its bias as the scale would multiply it; float64 keeps every digit."""
    if not target.scale or _SCALED in target.factors:
        return replace(target, kind=_UNCLEAR)
    added = target.factors[_ADDED]
    scaled = added if target.scale == 1 else derive(Scale(1 / target.scale, "float64"), added)
    rest = {role: factor for role, factor in target.factors.items() if role != _ADDED}
    return replace(target, factors={**rest, _SCALED: scaled})


def _multiply(target: Target) -> Target:
    """Return a LoRA with what its bias adds in the end, in the number form of B."""
    if target.kind not in _WITH_BIAS or _SCALED not in target.factors:
        return target
    scaled, form = target.factors[_SCALED], target.factors["lora_B.weight"].dtype.name
    as_it_is = target.scale == 1 and scaled.dtype.name != "float64"
    added = scaled if as_it_is else derive(Scale(target.scale, form), scaled)
    rest = {role: factor for role, factor in target.factors.items() if role != _SCALED}
    return replace(target, factors={**rest, _ADDED: added})
