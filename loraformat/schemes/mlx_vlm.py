"""mlx-vlm's adapters of before it had mlx-lm's: `<module>.A` as `(in, rank)` and `<module>.B` as `(rank, out)`.

Their configuration states an alpha, which was the multiplier itself until its pull request 986, and is over the rank
since; nothing in the files says which, so that the user must. Source: Blaizzy/mlx-vlm 0.7, trainer/peft/lora.py, and
that pull request.
"""

from typing import Final

from loraformat.adapter import SlotKind
from loraformat.schemes import Holds
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._scales import StatedAlone
from loraformat.schemes._table import TRANSPOSED, NameTable, Row

SCHEME: Final = TableReader(
    name="mlx_vlm",
    title="mlx-vlm, older: A and B, without a scale that is sure",
    rows=NameTable([Row("A", "lora", "lora_A.weight", TRANSPOSED), Row("B", "lora", "lora_B.weight", TRANSPOSED)]),
    naming=PlainNaming(),
    scale=StatedAlone(),
    holds=Holds(kinds=frozenset({"lora"}), slots=frozenset({SlotKind.LINEAR}), scale="not stored"),
    marks=Marks(keys=(r"(?:.+\.)?(?:layers|blocks|h)\.\d+\..+\.[AB]$",)),
    names="mlx",
)
