"""Verdicts for reports, hostile ones among them."""

from pathlib import Path

from loraformat import Verdict
from loraformat.problems import Problem

ROOT = Path("/repo")

HOSTILE = "a\n::error::forged\r\x1b[31m\x00\x08<b>&\"']]>%0A,:;\u202e\u2028\ud800\ufffe\uffff\U0001f600é"
"""Line breaks, workflow commands, terminal escapes, markup, bidi marks, a lone surrogate, code points XML lacks."""

FINE = Verdict(Path("adapters/fine.safetensors"), "native", 1, ())
NOTED = Verdict(
    Path("adapters/noted"),
    "peft",
    24,
    (Problem("LF304", "adapters/noted", "the prefix module.", severity="note"),),
    Path("adapters/noted/adapter_model.safetensors"),
)
WARNED = Verdict(
    Path("/repo/adapters/warned/adapter_config.json"),
    "peft",
    0,
    (Problem("LF221", "adapters/warned", "peft_type 'LORA'", "tensors", severity="warning"),),
)
BROKEN = Verdict(
    Path("/elsewhere/100% söhne.safetensors"),
    "",
    0,
    (
        Problem("LF101", "x.safetensors", "3 bytes", "at least 8"),
        Problem("LF209", "model.q", "the kind 'dora'", "one of lora", "Wait."),
        Problem("LF209", "model.v", "the kind 'dora'", "one of lora", "Wait."),
        Problem("LF206", "model.v", "rank 9", severity="warning"),
        Problem("LF216", "model.v", "scale -1", severity="note"),
    ),
)
FORGED = Verdict(
    Path(f"adapters/{HOSTILE.replace(chr(0), '')}/x.safetensors".replace("\ud800", "\udcff")),
    "",
    0,
    (Problem("LF202", HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
)
ALL = [FINE, NOTED, WARNED, BROKEN, FORGED]
