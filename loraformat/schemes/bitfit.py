"""BitFit: the biases of a model that were trained, and its head, under their own names (arXiv 2106.10199).

What `microsoft/LoRA` (examples/NLU, `apply_bitfit`) and many scripts save: those of `state_dict()` whose name ends with
`bias`, and the classifier. They take the place of the base's.
"""

import re
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.schemes import Bundle, Holds
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import Folded
from loraformat.schemes._table import NameTable, Row

_HEAD: Final = re.compile(
    r"(?:^|.*\.)(?:classifier|score|qa_outputs|pooler|classification_head|lm_head|head)\..*(?:weight|bias)$"
)
_BIAS: Final = re.compile(r"(?!base_model\.).+\.bias$")


def _are_biases(bundle: Bundle) -> bool:
    """Say whether there is nothing but biases and a head, and biases outside it."""
    rest = [key for key in bundle.tensors if not _HEAD.match(key)]
    return bool(rest) and all(map(_BIAS.match, rest)) and "peft_type" not in (bundle.config or {})


SCHEME: Final = TableReader(
    name="bitfit",
    title="BitFit: trained biases, and a head",
    rows=NameTable([Row("weight", "replace", "weight"), Row("bias", "replace", "bias")]),
    naming=PlainNaming(),
    scale=Folded(),
    holds=Holds(kinds=frozenset({"replace"}), slots=frozenset({SlotKind.PARAMETER}), scale="not stored"),
    marks=Marks(keys=(r".+\.bias$",), neutral=(r".+\.weight$",), asks=(_are_biases,)),
)
