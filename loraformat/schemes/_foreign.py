"""Tensors that tools put beside factors and no adapter here has a place for: what they do, and what to do about them.

Source: comfyanonymous/ComfyUI, comfy/weight_adapter/lora.py and comfy/ops.py; kohya-ss/sd-scripts,
library/fp8_optimization_utils.py.
"""

import re
from typing import Final

from loraformat.adapter import Factor
from loraformat.problems import Problem

_SCALED: Final = (
    "factors in plain numbers",
    "The factors are 8-bit floats that count times this scale. Multiply them by it and save them as bfloat16 or "
    "float16, or take the file before it was quantised.",
)
_ENDS: Final = ((re.compile(r"(?:^|\.)(?:scale_weight|weight_scale|scale_input|input_scale|scaled_fp8)$"), *_SCALED),)


def refuse_tensor(key: str, tensor: Factor) -> Problem:
    """Return the refusal of a tensor that no row of a scheme knows."""
    found = f"a tensor of shape {tensor.shape}"
    for end, expected, mend in _ENDS:
        if end.search(key):
            return Problem("LF202", key, found, expected, mend)
    return Problem("LF202", key, found, "a name that the scheme has")
