"""Every field that PEFT's configurations have, by type: those that are heeded, and those that change no number.

What is in neither list, and set, is a field of a newer PEFT or of somebody else. PEFT leaves such a field out, with a
warning, when it loads a configuration; what a newer one computes by it no one here can know. Source: the dataclasses of
huggingface/peft 0.21.2, and what its layers read of them; ms-swift, vLLM and Unsloth for what is theirs.
"""

import re
from collections.abc import Mapping
from typing import Final

from loraformat.problems import Problem
from loraformat.strict_json import JsonValue

NEWEST: Final = (0, 21, 2)
"""The PEFT whose fields these are."""
_VERSION: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")

_HEEDED: Final = (
    "peft_type peft_version base_model_name_or_path revision modules_to_save target_modules fan_in_fan_out bias"
)
_IGNORED: Final = (
    "task_type auto_mapping inference_mode exclude_modules layers_to_transform layers_pattern init_weights"
)
_OTHERS: Final = (
    "merge_weights lora_dtype lorap_lr_ratio lorap_emb_lr vllm_lora_scaling_factor vllm_max_position_embeddings "
    "vllm_long_context_scaling_factor lora_plus_lr_ratio"
)
"""Fields by which training or serving goes: of PEFT 0.2, ms-swift, vLLM, and those who train with LoRA+."""
_OF_TRAINING: Final = (
    "lora_dropout megatron_config megatron_core eva_config corda_config lora_ga_config velora_config monteclora_config "
    "qalora_group_size runtime_config"
)
_OF_LORA: Final = (
    "lora_alpha r rank_pattern alpha_pattern use_rslora use_dora lora_bias trainable_token_indices target_parameters "
    "use_bdlora kasa_config enable_lora ensure_weight_tying init_lora_weights loftq_config layer_replication "
    "arrow_config alora_invocation_tokens use_qalora lora_B_layout unsloth_fused_expert_lora"
)

_BY_TYPE: Final[Mapping[str, tuple[str, str]]] = {
    "LORA": (_OF_LORA, _OF_TRAINING),
    "TRAINABLE_TOKENS": ("token_indices", ""),
    "ADALORA": (
        f"init_r {_OF_LORA}",
        f"target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step {_OF_TRAINING}",
    ),
    "IA3": ("feedforward_modules", "init_ia3_weights"),
    "LOHA": ("r alpha rank_pattern alpha_pattern", "rank_dropout module_dropout use_effective_conv2d"),
    "LOKR": (
        "r alpha rank_pattern alpha_pattern decompose_both decompose_factor",
        "rank_dropout module_dropout use_effective_conv2d rank_dropout_scale",
    ),
    "OFT": (
        "block_share use_cayley_neumann num_cayley_neumann_terms coft eps",
        "r oft_block_size module_dropout rank_pattern alpha_pattern",
    ),
    "VERA": ("projection_prng_key save_projection", "r vera_dropout d_initial"),
    "PVERA": ("projection_prng_key save_projection sample_at_inference", "r pvera_dropout d_initial generator_seed"),
    "BOFT": ("", "boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout"),
    "HRA": ("apply_GS", "r"),
    "FOURIERFT": ("scaling random_loc_seed", "n_frequency n_frequency_pattern"),
    "WAVEFT": (
        "scaling random_loc_seed use_idwt wavelet_family",
        "n_frequency n_frequency_pattern proportional_parameters",
    ),
    "RANDLORA": ("randlora_alpha save_projection", "r projection_prng_key sparse very_sparse randlora_dropout"),
    "VBLORA": (
        "topk",
        "r num_vectors vector_length save_only_topk_weights vblora_dropout init_vector_bank_bound init_logits_std",
    ),
    "MISS": ("init_weights", "r mini_r miss_dropout"),
    "BONE": ("init_weights", "r"),
    "SHIRA": ("", "r mask_type random_seed"),
    "C3A": ("", "block_size block_size_pattern"),
    "ROAD": ("variant group_size", ""),
    "DELORA": ("", "r rank_pattern delora_lambda module_dropout lambda_pattern"),
    "GRALORA": ("alpha", "r hybrid_r gralora_dropout gralora_k"),
    "HIRA": ("", "r rank_pattern hira_dropout"),
    "GLORA": ("", "r config_A_B config_C config_D_E"),
    "DEFT": ("alpha decomposition_method", "r init_scale para deft_dropout"),
    "OSF": ("", "effective_rank rank_pattern target_svd_config"),
    "PEANUT": ("scaling act_fn", "r depth"),
    "UNILORA": ("save_indices", "r proj_seed theta_d_length unilora_dropout init_theta_d_bound"),
    "FROD": (
        "save_projection",
        "projection_prng_key frod_dropout sparse_rate regularization_alpha progressbar runtime_offload_base_weight",
    ),
    "BEFT": ("", ""),
    "LN_TUNING": ("", ""),
    "TINYLORA": ("weight_tying projection_seed save_projection", "r u init_v_bound tinylora_dropout"),
    "SUPERTUNING": ("r lora_alpha save_precomputed_indices", "sparsity select_top lora_dropout"),
}
"""`peft_type` to the fields that are its own: heeded, and ignored; the shape of a tensor says what most ranks do."""

_NOTHING: Final = ("", "")


def list_heeded(peft_type: str) -> frozenset[str]:
    """Return the fields that say how tensors of a type become a change, or stand against it."""
    return frozenset(f"{_HEEDED} {_BY_TYPE.get(peft_type, _NOTHING)[0]}".split())


def list_ignored(peft_type: str) -> frozenset[str]:
    """Return the fields of a type that change no number of a trained adapter."""
    own = _BY_TYPE.get(peft_type, _NOTHING)[1]
    return frozenset(f"{_IGNORED} {_OTHERS} {own}".split()) - list_heeded(peft_type)


def find_unknown(fields: Mapping[str, JsonValue], where: str) -> list[Problem]:
    """Return the fields that are set and that no list has.

    Of a PEFT newer than the lists, a switch (`true`, a list, an object, text) may change what its layers compute: an
    error. A number qualifies some switch. PEFT of the versions that the lists are of would leave the field out, as it
    is left out here: a warning.
    """
    peft_type = str(fields.get("peft_type"))
    if peft_type not in _BY_TYPE:
        return []
    known = list_heeded(peft_type) | list_ignored(peft_type)
    unknown = {name: value for name, value in fields.items() if value and name not in known}
    version = fields.get("peft_version")
    newer = _is_newer(version)
    stopping = {name for name, value in unknown.items() if newer and (value is True or not _is_number(value))}
    return [
        Problem("LF240", f"{where}: {name}", f"{value!r:.80}, of PEFT {version}", f"a field of PEFT {_spell(NEWEST)}")
        if name in stopping
        else Problem("LF241", f"{where}: {name}", f"{value!r:.80}, left out", severity="warning")
        for name, value in unknown.items()
    ]


def _is_newer(version: JsonValue) -> bool:
    found = _VERSION.match(version) if isinstance(version, str) else None
    return found is not None and tuple(int(part or 0) for part in found.groups()) > NEWEST


def _is_number(value: JsonValue) -> bool:
    return isinstance(value, int | float)


def _spell(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
