"""Adapters that no weight can hold: what each is, by what it is known, why there is no weight, and what to do instead.

One table for all ways in which they come: a PEFT folder, a folder of AdapterHub, a bare file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loraformat.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a configuration that speaks for a row.

    Attributes:
        path: names of nested fields, with dots between.
        holds: which of its values do.
    """

    path: str
    holds: Callable[[JsonValue], bool] = bool


@dataclass(frozen=True, slots=True)
class Unmergeable:
    """One family of adapters that are no changes of weights.

    Attributes:
        name: what the field calls it.
        why: why no weight holds what it does.
        mend: what to do instead.
        types: PEFT's `peft_type`.
        keys: expressions of which one is found in a name of its tensors.
        fields: fields of a configuration beside it.
        files: names of files that only it has.
    """

    name: str
    why: str
    mend: str
    types: frozenset[str] = frozenset()
    keys: tuple[str, ...] = ()
    fields: tuple[Field, ...] = ()
    files: tuple[str, ...] = ()


def _is(*values: str) -> Callable[[JsonValue], bool]:
    return lambda value: value in values


def _is_given(value: JsonValue) -> bool:
    return value is not None


def _is_of_swift(value: JsonValue) -> bool:
    return isinstance(value, str) and value != "LORA"


_ARCHITECTURE: Final = "config.architecture"
_LOAD_PEFT: Final = "Load it with PEFT beside the model: PeftModel.from_pretrained(model, path)."
_MERGE_THERE: Final = "Merge it in PEFT: load it with PeftModel.from_pretrained, then merge_and_unload."
_LOAD_ADAPTERS: Final = "Load it with AdapterHub's adapters library: model.load_adapter(path)."
_TOKENS: Final = "it trains virtual tokens before the input of the model or of its layers, and changes no weight"
_ROUTED: Final = "a router decides for each input which adapter acts and how strongly, which no weight can do"
_BOTTLENECK: Final = "it puts small layers with a nonlinearity between the model's layers, which no matrix can be"
_GATED_ATTENTION: Final = "it adds gated attention over learned tokens, and changes no weight"

UNMERGEABLE: Final = (
    Unmergeable(
        "prefix tuning",
        _TOKENS,
        _LOAD_PEFT,
        frozenset({"PREFIX_TUNING"}),
        (r"(?:^|\.)prefix_tunings?\.", r"(?:^|\.)prefix_gates\."),
        (Field(_ARCHITECTURE, _is("prefix_tuning")),),
    ),
    Unmergeable("P-tuning", _TOKENS, _LOAD_PEFT, frozenset({"P_TUNING"})),
    Unmergeable(
        "prompt tuning",
        _TOKENS,
        _LOAD_PEFT,
        frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"}),
        (r"(?:^|\.)prompt_tunings?\.", r"(?:^|\.)prefix_task_(?:cols|rows)$"),
        (Field(_ARCHITECTURE, _is("prompt_tuning")),),
    ),
    Unmergeable("prompt tuning, prefix tuning or P-tuning", _TOKENS, _LOAD_PEFT, keys=(r"(?:^|\.)prompt_embeddings$",)),
    Unmergeable(
        "AdapterFusion",
        "it is attention over the outputs of several adapters",
        _LOAD_ADAPTERS,
        keys=(r"(?:^|\.)adapter_fusion_layer\.",),
        files=("adapter_fusion_config.json", "pytorch_model_adapter_fusion.bin", "model_adapter_fusion.safetensors"),
    ),
    Unmergeable(
        "bottleneck adapter (Houlsby, Pfeiffer, parallel, Compacter)",
        _BOTTLENECK,
        f"{_LOAD_ADAPTERS} To have something that merges, train LoRA there instead.",
        keys=(
            r"(?:^|\.)adapter_(?:down|up)\.(?!linear_(?:in|out)\.)",
            r"(?:^|\.)(?:attention|output|cross_attention)_adapters\.",
            r"(?:^|\.)invertible_adapters\.",
            r"(?:^|\.)phm_rule",
            r"(?:^|\.)adapter_[AB]$",
        ),
        fields=(Field("config.reduction_factor", _is_given), Field("config.mh_adapter", _is_given)),
    ),
    Unmergeable(
        "LLaMA-Adapter",
        _GATED_ATTENTION,
        "Load it with the library that trained it: PEFT, litgpt or lit-llama.",
        frozenset({"ADAPTION_PROMPT"}),
        (r"(?:^|\.)adaption_(?:prompt|gate)(?:\.|$)", r"(?:^|\.)adapter_wte\.weight$", r"(?:^|\.)gating_factor$"),
    ),
    Unmergeable(
        "X-LoRA",
        _ROUTED,
        "Merge one of its inner LoRAs, or several with weights of your choice: each is an adapter of its own.",
        frozenset({"XLORA"}),
        (r"(?:^|\.)(?:internal_)?xlora_classifier\.",),
        files=("xlora_config.json", "xlora_classifier.safetensors"),
    ),
    Unmergeable(
        "Poly",
        _ROUTED,
        "Load it with PEFT, which routes by the number of the task.",
        frozenset({"POLY"}),
        (r"(?:^|\.)poly_(?:lora_[AB]|router)(?:\.|$)",),
    ),
    Unmergeable(
        "Arrow",
        _ROUTED,
        "Merge one of the adapters that it routes between, or several with weights of your choice.",
        fields=(Field("arrow_config"),),
    ),
    Unmergeable(
        "aLoRA",
        "it acts only on what follows its invocation tokens",
        "Load it with PEFT, which finds the tokens in the input. Merged, it would act on all of it.",
        fields=(Field("alora_invocation_tokens", _is_given),),
    ),
    Unmergeable(
        "control vector",
        "it is added to the activations between layers, and changes no weight",
        "Load it with llama.cpp beside the model: --control-vector FILE.",
        keys=(r"^direction\.\d+$",),
    ),
    Unmergeable(
        "an adapter of SpeechBrain",
        "its LoRA and Houlsby's adapters, which have a nonlinearity, have the same names there",
        "If it is LoRA: save adapter_down_proj as lora_A and adapter_up_proj as lora_B, both with .weight behind it, "
        "and put an adapter_config.json of PEFT's with r and lora_alpha beside them.",
        keys=(r"\.adapter_(?:down|up)_proj\.weight$",),
    ),
    Unmergeable(
        "candle-lora",
        "its factors have numbers in the place of names: a0 and b0 are of the layer that was made first",
        "Save them under the names of their layers, in the order in which the program makes these.",
        keys=(r"(?:^|\.)[ab]0\.weight$",),
    ),
    Unmergeable(
        "ms-swift's tuner of its own",
        "it adds layers, memory or prompts to the model, or weights that another number of layers belongs to",
        "Load it with ms-swift: Swift.from_pretrained(model, path).",
        fields=(Field("swift_type", _is_of_swift),),
    ),
    Unmergeable(
        "ms-swift's own form of LoRA",
        "its names and options are not PEFT's",
        "Make PEFT's files of it: swift export --adapters FOLDER --to_peft_format true.",
        fields=(Field("swift_type", _is("LORA")),),
    ),
    Unmergeable(
        "QALoRA",
        "its input is pooled in the groups of a GPTQ weight, for which alone it is defined",
        "Use it in PEFT on the GPTQ model that it was trained on.",
        fields=(Field("use_qalora"),),
    ),
    Unmergeable(
        "Lily",
        _ROUTED,
        _LOAD_PEFT,
        frozenset({"LILY"}),
        (r"(?:^|\.)lily_(?:[AB]|router)(?:\.|$)",),
    ),
    Unmergeable(
        "Shadow",
        "a network beside the model acts on each input, which no weight can do",
        _LOAD_PEFT,
        frozenset({"SHADOW"}),
    ),
    Unmergeable(
        "a decomposition of the base (PSOFT)",
        "it turns between singular vectors of the base, which decompositions elsewhere find with other signs",
        _MERGE_THERE,
        frozenset({"PSOFT"}),
    ),
    Unmergeable(
        "factors without places (AdaMSS)",
        "where they act follows from a clustering of the base's rows, which no file says",
        _MERGE_THERE,
        frozenset({"ADAMSS"}),
    ),
    Unmergeable(
        "ReFT",
        "it edits activations at some positions, and changes no weight",
        "Use it with pyreft, or with AdapterHub's adapters library.",
        keys=(r"(?:^|\.)refts?\..*(?:learned_source|projection)", r"(?:^|\.)intkey_"),
        fields=(Field(_ARCHITECTURE, _is("reft")),),
        files=("intkey_*.bin", "reft_config.json"),
    ),
    Unmergeable(
        "LoRA or (IA)³ behind a gate",
        "the gate depends on the input, which no weight can do",
        f"{_LOAD_ADAPTERS} Without use_gating it would merge.",
        keys=(r"(?:^|\.)loras\.[^.]+\.gate\.",),
        fields=(Field("config.use_gating"),),
    ),
    Unmergeable(
        "MTL-LoRA",
        "its change is another for each task",
        _LOAD_ADAPTERS,
        keys=(r"(?:^|\.)task_specific\.values$",),
        fields=(Field(_ARCHITECTURE, _is("mtl_lora")),),
    ),
    Unmergeable(
        "several methods at once (MAM, UniPELT)",
        "at least one of them is in no weight",
        _LOAD_ADAPTERS,
        fields=(Field(_ARCHITECTURE, _is("union")),),
    ),
    Unmergeable(
        "ControlNet-LLLite",
        "it is computed from an image at run time",
        "Load it where it is supported: ComfyUI, or kohya's sd-scripts.",
        keys=(r"^lllite_",),
    ),
    Unmergeable(
        "Nunchaku LoRA",
        "its factors lie in the order of Nunchaku's 4-bit kernels, and fused as these are",
        "Take the file that it was converted from; that one can be merged into the model before it is quantised.",
        keys=(r"^(?:single_)?transformer_blocks\.\d+\.(?:qkv|out|mlp)_\w+\.lora_(?:down|up)$",),
    ),
    Unmergeable(
        "T-LoRA",
        "it counts against singular vectors of the base's weights, which it does not hold, and fewer of its ranks act "
        "in the first steps of sampling",
        "Run it with LyCORIS, or train again with algo=lora.",
        keys=(r"\.lambda_layer$",),
    ),
    Unmergeable(
        "refiners LoRA",
        "its modules are called by refiners' own chains of layers, which no other model has",
        "Take the file that was loaded into refiners, with the names of kohya or diffusers.",
        keys=(r"(?:^|\.)\d+\.(?:Linear|Conv2d)\.(?:down|up)\.weight$",),
    ),
    Unmergeable(
        "SVDQuant model",
        "it is a whole model in codes of 4 bits, with its own low-rank part, and no adapter",
        "Merge into the model that it was quantised from, and quantise that again.",
        keys=(r"\.smooth_factor(?:_orig)?$", r"\.proj_down$"),
    ),
    Unmergeable(
        "Control-LoRA",
        "it makes a ControlNet of the base: a second network, which runs beside the model",
        "Load it where it is supported: ComfyUI.",
        keys=(r"^lora_controlnet$",),
    ),
    Unmergeable(
        "IP-Adapter",
        "it adds attention to an image, beside the model's own",
        "Load it with diffusers: pipeline.load_ip_adapter(...).",
        keys=(r"^(?:image_proj|ip_adapter)\.",),
    ),
    Unmergeable(
        "textual inversion",
        "it holds new tokens, which have no rows in the model yet",
        "Load it with diffusers: pipeline.load_textual_inversion(...).",
        keys=(r"^emb_params$", r"^clip_[lg]$", r"^string_to_param"),
        files=("learned_embeds.safetensors", "learned_embeds.bin"),
    ),
)
"""The more particular row before the more general one."""
