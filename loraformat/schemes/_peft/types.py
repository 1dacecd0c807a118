"""PEFT's types other than LORA: how the fields and tensors of each become a kind, its roles, options and scaling.

Names of fields, their defaults and what they do are those of PEFT 0.21.
"""

from collections.abc import Mapping
from typing import Final

from loraformat.schemes._peft.fields import LORA_HEEDED, LORA_IGNORED
from loraformat.schemes._peft.kronecker import complete_lokr
from loraformat.schemes._peft.order import give_factors, give_vectors, take_factors, take_once, take_vectors
from loraformat.schemes._peft.readings import (
    choose_miss,
    complete_loha,
    count_indices,
    count_lokr_axes,
    drop_empty,
    halve_rank,
    read_miss_variant,
    read_oft_generation,
    remark_lokr,
    scale_adalora,
    scale_deft,
    scale_gralora,
    scale_supra,
    see_convolution,
    see_feedforward,
    unscale_lokr,
)
from loraformat.schemes._peft.type import Barrier, PeftType

_MAX_DEPTH: Final = 8
"""Encoders of a network that PEANuT may have here."""
_PLACES: Final = "its indices were not saved, and follow from the order of the base's modules"
_COIFLET: Final = "coiflets, of whose filters this version has none; db1 to db10 and sym2 to sym10 it has"
_NOT_SAVED: Final = Barrier(
    "save_projection", lambda saved: saved is False, "the random factors were not saved", True, "LF232"
)

_LORA_ONLY: Final = (
    *("use_dora", "lora_bias", "use_bdlora", "kasa_config", "enable_lora", "loftq_config", "layer_replication"),
    *("arrow_config", "alora_invocation_tokens", "use_qalora", "target_parameters"),
)
"""Fields that AdaLoRA's configuration inherits from LoRA's, and its layers never read."""


def _same(*roles: str) -> dict[str, str]:
    return {role: role for role in roles}


TYPES: Final[Mapping[str, PeftType]] = {
    "IA3": PeftType(
        "ia3",
        _same("ia3_l"),
        more=see_feedforward,
        convolves=("ia3_l",),
        heeds="feedforward_modules",
        ignores="init_ia3_weights",
    ),
    "LOHA": PeftType(
        "loha",
        _same("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        rank=(("hada_w1_b", 0),),
        alpha="alpha",
        convolves=("hada_t1",),
        complete=complete_loha,
        ignores="rank_dropout module_dropout use_effective_conv2d",
    ),
    "LOKR": PeftType(
        "lokr",
        _same("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        rank=(("lokr_w1_b", 0), ("lokr_w2_b", 0)),
        alpha="alpha",
        more=count_lokr_axes,
        adjust=unscale_lokr,
        remarks=remark_lokr,
        convolves=("lokr_w2", "lokr_t2"),
        complete=complete_lokr,
        heeds="decompose_both decompose_factor",
        ignores="rank_dropout module_dropout use_effective_conv2d rank_dropout_scale",
    ),
    "OFT": PeftType(
        "oft",
        _same("oft_R.weight", "oft_embedding_R.weight", "oft_r", "oft_s"),
        options={
            "block_share": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
            "coft": False,
            "eps": 6e-5,
        },
        more=read_oft_generation,
        ignores="r oft_block_size module_dropout rank_pattern alpha_pattern",
    ),
    "VERA": PeftType(
        "vera",
        _same("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
        rank=(("vera_lambda_d", 0),),
        drawn=("vera_A", "vera_B"),
        shared=("vera_A", "vera_B"),
        ignores="r vera_dropout d_initial",
    ),
    "PVERA": PeftType(
        "pvera",
        _same("pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B"),
        rank=(("pvera_B", 1),),
        adjust=halve_rank,
        obstacles=(Barrier("sample_at_inference", bool, "it draws new noise for every input, which no weight can do"),),
        drawn=("pvera_A", "pvera_B"),
        shared=("pvera_A", "pvera_B"),
        ignores="r pvera_dropout d_initial generator_seed",
    ),
    "ADALORA": PeftType(
        "adalora",
        _same("lora_A", "lora_B", "lora_E"),
        rank=(("lora_A", 0),),
        scaling=scale_adalora,
        adjust=drop_empty,
        obstacles=[Barrier(field, bool, "an option of LoRA that AdaLoRA has no place for") for field in _LORA_ONLY],
        heeds=f"init_r {LORA_HEEDED}",
        ignores=f"target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step {LORA_IGNORED}",
    ),
    "BOFT": PeftType(
        "boft",
        _same("boft_R", "boft_s"),
        adjust=see_convolution,
        ignores="boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout",
    ),
    "HRA": PeftType(
        "hra",
        _same("hra_u"),
        rank=(("hra_u", 1),),
        options={"apply_GS": False},
        ignores="r",
    ),
    "FOURIERFT": PeftType(
        "fourierft",
        _same("fourierft_spectrum"),
        scale="scaling",
        options={"random_loc_seed": 777},
        ignores="n_frequency n_frequency_pattern",
    ),
    "WAVEFT": PeftType(
        "waveft",
        _same("waveft_spectrum"),
        scale="scaling",
        options={"random_loc_seed": 777, "use_idwt": True, "wavelet_family": "db1"},
        obstacles=(Barrier("wavelet_family", lambda name: str(name).startswith("coif"), _COIFLET, "db1"),),
        ignores="n_frequency n_frequency_pattern proportional_parameters",
    ),
    "RANDLORA": PeftType(
        "randlora",
        _same("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
        rank=(("randlora_lambda", 0),),
        alpha="randlora_alpha",
        obstacles=(_NOT_SAVED,),
        stow=take_once(("randlora_A", "randlora_B"), is_left=True),
        ignores="projection_prng_key sparse very_sparse randlora_dropout",
    ),
    "VBLORA": PeftType(
        "vblora",
        _same(
            "vblora_vector_bank",
            "vblora_logits_A",
            "vblora_logits_B",
            "vblora_logits_A_topk_indices",
            "vblora_logits_A_topk_weights",
            "vblora_logits_B_topk_indices",
            "vblora_logits_B_topk_weights",
        ),
        rank=(("vblora_logits_A", 0), ("vblora_logits_A_topk_indices", 0)),
        options={"topk": 2},
        shared=("vblora_vector_bank",),
        ignores="r num_vectors vector_length save_only_topk_weights vblora_dropout init_vector_bank_bound "
        "init_logits_std",
    ),
    "MISS": PeftType(
        "miss",
        _same("miss_block"),
        rank=(("miss_block", 0),),
        more=read_miss_variant,
        adjust=choose_miss,
        heeds="init_weights",
        ignores="r mini_r miss_dropout",
    ),
    "BONE": PeftType(
        "miss",
        {"bone_block": "miss_block"},
        rank=(("miss_block", 0),),
        adjust=choose_miss,
        heeds="init_weights",
        ignores="r",
    ),
    "SHIRA": PeftType(
        "shira",
        _same("shira_weight", "shira_indices"),
        adjust=count_indices,
        ignores="r mask_type random_seed",
    ),
    "C3A": PeftType(
        "c3a",
        _same("c3a_kernel"),
        ignores="block_size block_size_pattern",
    ),
    "ROAD": PeftType("road", _same("road_theta", "road_alpha"), options={"variant": "road_1", "group_size": 64}),
    "DELORA": PeftType(
        "delora",
        _same("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
        rank=(("delora_A", 0),),
        ignores="r rank_pattern delora_lambda module_dropout lambda_pattern",
    ),
    "GRALORA": PeftType(
        "gralora",
        _same("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
        scaling=scale_gralora,
        heeds="alpha",
        ignores="r hybrid_r gralora_dropout gralora_k",
    ),
    "HIRA": PeftType(
        "hira",
        _same("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        rank=(("hira_A", 0), ("hira_embedding_A", 0)),
        convolves=("hira_A",),
        ignores="r rank_pattern hira_dropout",
    ),
    "GLORA": PeftType(
        "glora",
        _same(
            *(f"glora_{path}.{form}" for path in "ABCDE" for form in ("X", "zeros")),
            *(f"glora_{path}.{form}" for path in "ABC" for form in ("Xd", "Xu")),
        ),
        ignores="r config_A_B config_C config_D_E",
    ),
    "DEFT": PeftType(
        "deft",
        _same("deft_P", "deft_R"),
        rank=(("deft_P", 1),),
        scaling=scale_deft,
        options={"decomposition_method": "relu"},
        heeds="alpha",
        ignores="r init_scale para deft_dropout",
    ),
    "OSF": PeftType(
        "osf",
        _same(*(f"osf_svd_params.{part}" for part in ("U_low", "S_low", "V_low"))),
        ignores="effective_rank rank_pattern target_svd_config",
    ),
    "PEANUT": PeftType(
        "peanut",
        _same(
            *("peanut_A.weight", "peanut_B.weight"),
            *(f"peanut_{half}.{layer}.weight" for half in ("encoders", "decoders") for layer in range(_MAX_DEPTH)),
        ),
        rank=(("peanut_A.weight", 0),),
        scale="scaling",
        options={"act_fn": "relu"},
        ignores="r depth",
    ),
    "UNILORA": PeftType(
        "unilora",
        _same("unilora_theta_d", *(f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB")),
        rank=(("unilora_indices_A", 0),),
        obstacles=(Barrier("save_indices", lambda saved: saved is not True, _PLACES, False, "LF232"),),
        shared=("unilora_theta_d",),
        ignores="r proj_seed theta_d_length unilora_dropout init_theta_d_bound",
    ),
    "FROD": PeftType(
        "frod",
        _same("frod_V", "frod_lambda_l", "frod_lambda_s_values", "frod_s_indices", "frod_s_size"),
        obstacles=(_NOT_SAVED,),
        arrange=give_factors,
        stow=take_factors,
        ignores="projection_prng_key frod_dropout sparse_rate regularization_alpha progressbar "
        "runtime_offload_base_weight",
    ),
    "BEFT": PeftType("beft", _same("beft_bias")),
    "LN_TUNING": PeftType(
        "replace",
        {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"},
    ),
    "TINYLORA": PeftType(
        "tinylora",
        {**_same("tinylora_A", "tinylora_B", "tinylora_P"), "tinylora_v.0": "tinylora_v"},
        rank=(("tinylora_P", 1),),
        obstacles=(_NOT_SAVED,),
        arrange=give_vectors,
        stow=take_vectors,
        heeds="weight_tying projection_seed",
        ignores="r u init_v_bound tinylora_dropout",
    ),
    "SUPERTUNING": PeftType(
        "supertuning",
        _same(
            "supertuning_values",
            "supertuning_indices",
            "supertuning_lora_A.weight",
            "supertuning_lora_B.weight",
        ),
        rank=(("supertuning_lora_A.weight", 0),),
        more=scale_supra,
        obstacles=(
            Barrier(
                "save_precomputed_indices", lambda saved: saved is False, "its indices were not saved", True, "LF232"
            ),
        ),
        heeds="r lora_alpha",
        ignores="sparsity select_top lora_dropout",
    ),
}
"""`peft_type` to what it is."""
