"""kohya's flat scheme (sd-scripts, musubi-tuner, A1111, LyCORIS): `<prefix>_<path with _ for dots>.<tensor>`.

One file. `lora_unet` stands for the UNet and for every transformer, `lora_te`, `lora_te1` ... for the text encoders. A
module may have a tensor `alpha`, in whatever form the file was saved in. What the paths are depends on the model:
`spec/names/` has them.
"""

import re
from dataclasses import dataclass, replace
from typing import Final

from loraformat.adapter import Adapter, SlotKind
from loraformat.problems import Problem
from loraformat.schemes import LORA_SLOTS, PIPELINES, Bundle, Holds, StatedScale
from loraformat.schemes._lycoris import LYCORIS_KINDS, LYCORIS_ROWS, LycorisScheme
from loraformat.schemes._marks import NOISE, Alias, Marks
from loraformat.schemes._naming import ComponentNaming
from loraformat.schemes._scales import AlphaTensors, fold_rankless
from loraformat.schemes._table import NameTable, Row

_PREFIXES: Final = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
    "lora_prior_unet": "prior",
    "lora_prior_te": "text_encoder",
    "lycoris": "diffusion_model",
    "oft_unet": "diffusion_model",
    "lora_unet_llm_adapter": "text_conditioner",
}
"""What a prefix stands for where no table of the model says otherwise; `lora_transformer` is
OneTrainer's, `oft_unet` that of sd-scripts' networks/oft.py."""

_SPLIT: Final = "split_qkv=True"
_PART: Final = re.compile(r"(oft_unet_[^.]+)\.oft_blocks\.(\d+)")
"""Blocks of one part of a fused weight (sd-scripts' networks/oft_flux.py); of a weight in one piece there is only 0."""


@dataclass(frozen=True)
class Kohya(LycorisScheme):
    """The scheme `kohya`."""

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; a training option that leaves two readings of alpha is said.

        With `split_qkv` sd-scripts trains q, k and v apart with alpha / rank each, and saves them fused, at three times
        the rank, under the same alpha. Every reader then divides by the rank that it sees.
        """
        adapter = super().read(_part_rotations(bundle), stated)
        arguments = bundle.metadata.get("ss_network_args", "").replace('"', "").replace(" ", "")
        if not any(form in arguments for form in (_SPLIT, _SPLIT.replace("=", ":"), "split_qkv:true")):
            return adapter
        found = "split_qkv in ss_network_args: alpha is divided by the fused rank, three times that of the training"
        return replace(
            adapter, problems=(*adapter.problems, Problem("LF324", adapter.source, found, severity="warning"))
        )


def _part_rotations(bundle: Bundle) -> Bundle:
    """Return a file with the rotations of a fused weight's parts as those of modules, each with the alpha of all."""
    found = {key: match for key in bundle.tensors if (match := _PART.fullmatch(key))}
    fused = {match[1] for match in found.values() if match[2] != "0"}
    if not fused:
        return bundle
    tensors = {key: tensor for key, tensor in bundle.tensors.items() if key.removesuffix(".alpha") not in fused}
    for key, match in found.items():
        if match[1] in fused:
            part = f"{match[1]}_{match[2]}"
            tensors[f"{part}.oft_blocks"] = tensors.pop(key)
            tensors |= {f"{part}.alpha": each for name, each in bundle.tensors.items() if name == f"{match[1]}.alpha"}
    return replace(bundle, tensors=tensors)


SCHEME: Final = Kohya(
    name="kohya",
    title="kohya: one file, flat names, an alpha beside each module (A1111, LyCORIS)",
    rows=NameTable(
        [
            Row("lora_down.weight", "lora", "lora_A.weight"),
            Row("lora_up.weight", "lora", "lora_B.weight"),
            Row("lora.down.weight", "lora", "lora_A.weight"),  # Some trainers of Z-Image.
            Row("lora.up.weight", "lora", "lora_B.weight"),
            Row("lora_A.weight", "lora", "lora_A.weight"),
            Row("lora_B.weight", "lora", "lora_B.weight"),
            *LYCORIS_ROWS,
        ]
    ),
    naming=ComponentNaming("kohya", _PREFIXES, flat=True),
    scale=AlphaTensors(),
    marks=Marks(
        keys=(r"(?:lora_(?:unet|te\d?|prior_unet|prior_te|transformer)_|lycoris_|oft_unet_)[^.]+\.(?!alpha$)",),
    ),
    holds=Holds(kinds=LYCORIS_KINDS, slots=LORA_SLOTS | {SlotKind.PARAMETER}, models=PIPELINES),
    names="kohya",
    fits=(fold_rankless,),
    only_added=True,
    aliases=(
        *NOISE,
        Alias(r"^(.*)\.oft_blocks\.0$", r"\1.oft_blocks"),
        Alias(r"^(lora_[^.]*[^_.])_\.(lora_(?:up|down)\.weight)$", r"\1.\2"),
    ),
)
