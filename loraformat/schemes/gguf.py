"""GGUF adapters (llama.cpp, Ollama, LM Studio): `blk.0.attn_q.weight.lora_a` and the base's architecture.

A is `(rank, in)` and B `(out, rank)` as elsewhere, of experts with their number before these axes; only the A of
`token_embd` is stored `(vocabulary, rank)`. One alpha for all targets, over each one's own rank; 0 means a scale of 1.
Where the architecture has interleaved rotary rows, so have q and k: the tables of `spec/names/` say where. Source:
llama.cpp, src/llama-adapter.cpp, convert_lora_to_gguf.py.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from loraformat.adapter import Adapter, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.base_facts import BaseFacts
from loraformat.errors import refuse
from loraformat.manifest import MANIFEST_KEY
from loraformat.problems import Problem
from loraformat.schemes import DECODERS, Bundle, Holds, StatedScale, WrittenBundle
from loraformat.schemes._beside import Module
from loraformat.schemes._experts import EXPERTS_A, EXPERTS_B, is_stack, join_stacks, part_stacks
from loraformat.schemes._files import UNIT, FiledScheme, alpha_of, level_alphas
from loraformat.schemes._marks import Marks
from loraformat.schemes._memory import PROVENANCE_KEY, find_memory, find_texts
from loraformat.schemes._one_scale import check_number, state
from loraformat.schemes._patterned import PatternedNaming
from loraformat.schemes._scales import ScalesRead, ScalesWritten
from loraformat.schemes._table import TRANSPOSED, NameTable, Row
from loraformat.spellings import all_tables
from loraformat.strict_json import JsonValue

_ARCHITECTURE: Final = "general.architecture"
_ALPHA: Final = "adapter.lora.alpha"
_TYPE: Final = "adapter.type"
_TOKENS: Final = "adapter.alora.invocation_tokens"
_IN_LLAMA_CPP: Final = "Load it with llama.cpp beside the model: --lora FILE. Merged, it would act on all of the input."
_FIXED: Final[Mapping[str, JsonValue]] = {"general.type": "adapter", "adapter.type": "lora"}
_NAMES: Final = r"blk\.\d+\.[a-z0-9_.]+|token_embd|output(?:_norm)?|cls(?:\.output)?|position_embd"


_EXPERT: Final = re.compile(r"(blk\.\d+\.ffn_\w+_exps)\.(\d+)")


def _is_table(factor: Factor) -> bool:
    return factor.name.startswith("token_embd.")


def _name_expert(stack: str, expert: int) -> str:
    return f"{stack}.{expert}"


def _find_stack(name: str) -> tuple[str, int] | None:
    match = _EXPERT.fullmatch(name)
    return (match[1], int(match[2])) if match is not None else None


@dataclass(frozen=True, slots=True)
class _AlphaValue:
    """The key-value `adapter.lora.alpha`."""

    def read(self, modules: Sequence[Module], bundle: Bundle, stated: StatedScale) -> ScalesRead:
        """Return the one scaling; without an alpha, or with 0, llama.cpp takes 1."""
        text = json.loads(bundle.metadata.get(_ALPHA, "0.0"))
        alpha = float(np.float32(check_number(text, bundle)))  # The text is the shortest that leads to this number.
        own = Scaling(ScalingRule.ALPHA_OVER_RANK, alpha) if alpha else UNIT
        scaling = state(stated) or own
        return ScalesRead({module.name: scaling if module.rank else UNIT for module in modules})

    def write(self, targets: Sequence[Target], remembered: Mapping[str, JsonValue]) -> ScalesWritten:
        """Return the key-value, which is a float32."""
        alphas = {alpha_of(target) for target in targets if target.rank}
        alpha = max(alphas, default=0.0)
        result = ScalesWritten(metadata={_ALPHA: json.dumps(float(np.float32(alpha)))})
        if float(np.float32(alpha)) != alpha:
            found = f"alpha {alpha!r} as float32, relative error {abs(float(np.float32(alpha)) / alpha - 1):.2g}"
            result.problems.append(Problem("LF320", _ALPHA, found, severity="note"))
        if not alpha and alphas:
            result.problems.append(Problem("LF208", _ALPHA, "alpha 0, which llama.cpp takes for a scale of 1"))
        return result


class _Gguf(FiledScheme):
    def detect(self, bundle: Bundle) -> str | None:
        """Recognise the type that the file states, or the names of the tensors."""
        if MANIFEST_KEY not in bundle.metadata and bundle.metadata.get("general.type") == '"adapter"':
            return "general.type is adapter"
        return self.marks.find(bundle)

    def find_facts(self, bundle: Bundle) -> BaseFacts:
        """Return the architecture, which an adapter states as its base does."""
        architecture = _read_text(bundle.metadata.get(_ARCHITECTURE))
        return BaseFacts(str(bundle.path), architecture=architecture) if architecture else BaseFacts()

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; every expert of a stack is a target of its own, `blk.0.ffn_up_exps.3`."""
        if _TOKENS in bundle.metadata:
            found = "aLoRA: it acts only on what follows its invocation tokens"
            raise refuse("LF209", f"{bundle.path}: {_TOKENS}", found, "changes of weights", _IN_LLAMA_CPP)
        kind = _read_text(bundle.metadata.get(_TYPE))
        if kind not in ("", "lora"):
            raise refuse("LF209", f"{bundle.path}: {_TYPE}", f"{kind!r:.60}", "lora, the only one that llama.cpp has")
        said = _read_text(bundle.metadata.get(PROVENANCE_KEY))
        texts = {name: text for name, text in bundle.metadata.items() if name != PROVENANCE_KEY}
        known = replace(bundle, metadata=texts | ({PROVENANCE_KEY: said} if said else {}))
        return part_stacks(super().read(known, stated), _name_expert)

    def fit(self, adapter: Adapter) -> tuple[Adapter, list[Problem]]:
        """Return the adapter with one alpha for all targets, and experts in stacks."""
        fitted, problems = super().fit(adapter)
        targets, against = join_stacks(fitted.targets, _find_stack)
        return replace(fitted, targets=tuple(targets)), [*problems, *against]

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return tensors and key-values; the architecture is the base's, or the one that the adapter had."""
        written = super().write(adapter, facts)
        memory = find_texts(find_memory(adapter.provenance, self.name), "metadata")
        architecture = _find_architecture(facts) or _read_text(memory.get(_ARCHITECTURE))
        own = {key: _parse(text) for key, text in memory.items()}
        values: dict[str, JsonValue] = (
            {_ARCHITECTURE: architecture} | dict(_FIXED) | own | {_ARCHITECTURE: architecture}
        )
        values[_ALPHA] = json.loads(str(written.metadata[_ALPHA]))
        if PROVENANCE_KEY in written.metadata:
            values[PROVENANCE_KEY] = written.metadata[PROVENANCE_KEY]
        missing = Problem("LF311", _ARCHITECTURE, "an architecture that is not known", "the base's, by --base")
        problems = written.problems if architecture else (*written.problems, missing)
        return replace(written, metadata=values, problems=problems)


def _find_architecture(facts: BaseFacts) -> str:
    """Return what GGUF calls the base's architecture; empty when no table knows it."""
    for table in all_tables():
        if facts.architecture in table.architectures:
            return table.architectures[facts.architecture]
        if facts.architecture and facts.architecture in table.architectures.values():
            return facts.architecture
    return ""


def _parse(text: str) -> JsonValue:
    value: JsonValue = json.loads(text)
    return value


def _read_text(text: str | None) -> str:
    value = _parse(text) if text else None
    return value if isinstance(value, str) else ""


SCHEME: Final = _Gguf(
    name="gguf",
    title="GGUF: one file, the names of llama.cpp, one alpha",
    rows=NameTable(
        [
            Row("weight.lora_a", "lora", EXPERTS_A, fits=is_stack),
            Row("weight.lora_b", "lora", EXPERTS_B, fits=is_stack),
            Row("weight.lora_a", "lora", "lora_embedding_A", TRANSPOSED, fits=_is_table),
            Row("weight.lora_b", "lora", "lora_embedding_B", fits=_is_table),
            Row("weight.lora_a", "lora", "lora_A.weight"),
            Row("weight.lora_b", "lora", "lora_B.weight"),
            Row("weight", "replace", "weight"),
        ]
    ),
    naming=PatternedNaming(_NAMES, "GGUF"),
    scale=_AlphaValue(),
    marks=Marks(keys=(r"(?:blk\.\d+\.[^.]+|token_embd|output)\.weight\.lora_[ab]$",)),
    holds=Holds(
        kinds=frozenset({"lora"}),
        slots=frozenset({SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.EMBEDDING}),
        scale="one for all",
        dtypes=frozenset({"float32", "float16", "bfloat16"}),
        needs="the architecture, and the counts of heads where rotary rows are interleaved",
        models=DECODERS,
    ),
    names="gguf",
    fits=(level_alphas,),
    container="gguf",
)
