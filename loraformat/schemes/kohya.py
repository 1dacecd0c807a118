"""kohya's flat scheme (sd-scripts, musubi-tuner, A1111, LyCORIS): `<prefix>_<path with _ for dots>.<tensor>`.

One file. `lora_unet` stands for the UNet and for every transformer, `lora_te`, `lora_te1` ... for the text encoders. A
module may have a tensor `alpha`, in whatever form the file was saved in. What the paths are depends on the model:
`spec/names/` has them.
"""

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


@dataclass(frozen=True)
class Kohya(LycorisScheme):
    """The scheme `kohya`."""

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; a training option that leaves two readings of alpha is said.

        With `split_qkv` sd-scripts trains q, k and v apart with alpha / rank each, and saves them fused, at three times
        the rank, under the same alpha. Every reader then divides by the rank that it sees.
        """
        adapter = super().read(bundle, stated)
        arguments = bundle.metadata.get("ss_network_args", "").replace('"', "").replace(" ", "")
        if not any(form in arguments for form in (_SPLIT, _SPLIT.replace("=", ":"), "split_qkv:true")):
            return adapter
        found = "split_qkv in ss_network_args: alpha is divided by the fused rank, three times that of the training"
        return replace(
            adapter, problems=(*adapter.problems, Problem("LF324", adapter.source, found, severity="warning"))
        )


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
