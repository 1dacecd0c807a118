"""PEFT's types other than LORA: how the fields and tensors of each become a kind, its roles, options and scaling.

Names of fields, their defaults and what they do are those of PEFT 0.21.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from loraformat.adapter import SlotKind, Target
from loraformat.derived import derive
from loraformat.errors import refuse
from loraformat.operations import WholeNumbers
from loraformat.problems import Problem
from loraformat.schemes._peft_config import PeftConfig
from loraformat.schemes._peft_order import give_factors, give_vectors
from loraformat.schemes._peft_patterns import fits_whole
from loraformat.schemes._peft_type import Barrier, Factors, PeftType, read_number
from loraformat.strict_json import JsonValue

_EXACT: Final = 1 << 24
"""Below it every whole number is a float32."""
_MAX_DEPTH: Final = 8
"""Encoders of a network that PEANuT may have here."""
_PLACES: Final = "its indices were not saved, and follow from the order of the base's modules"
_COIFLET: Final = "coiflets, of whose filters this version has none; db1 to db10 and sym2 to sym10 it has"
_NOT_SAVED: Final = Barrier(
    "save_projection", lambda saved: saved is False, "the random factors were not saved", True, "LF232"
)


def _same(*roles: str) -> dict[str, str]:
    return {role: role for role in roles}


def _is_feedforward(config: PeftConfig, target: str, factors: Factors) -> Mapping[str, JsonValue]:
    """Say whether (IA)³ multiplies the inputs of a module, as PEFT chooses."""
    modules = config.fields.get("feedforward_modules")
    if isinstance(modules, str):
        try:
            return {"is_feedforward": fits_whole(modules, target)}
        except ValueError as error:
            found = f"the pattern {modules!r:.80}: {error}"
            where = f"{config.where}: feedforward_modules"
            raise refuse("LF213", where, found, "a simple regular expression") from error
    named = modules if isinstance(modules, Sequence) else ()
    return {"is_feedforward": any(target.endswith(str(name)) for name in named)}  # PEFT looks at no dot before it.


def _read_oft_generation(config: PeftConfig, target: str, factors: Factors) -> Mapping[str, JsonValue]:
    """Return what the version of PEFT says of the Neumann series; without one it is of the newest kind."""
    version = str(config.fields.get("peft_version") or "")
    return {"last_neumann_coefficient": 2} if version.startswith(("0.16", "0.17")) else {}


def _count_lokr_axes(config: PeftConfig, target: str, factors: Factors) -> Mapping[str, JsonValue]:
    whole = factors.get("lokr_w2")
    return {"kron_axes": "leading"} if whole is not None and len(whole.shape) == 3 else {}


def _scale_adalora(config: PeftConfig, factors: Factors) -> float:
    """Return alpha over the rank that training began with, as PEFT has it; an alpha of 0 is that rank."""
    first_rank = read_number(config, "init_r", config.fields.get("init_r", 12))
    alpha = read_number(config, "lora_alpha", config.fields.get("lora_alpha", 8))
    return (alpha if alpha > 0 else first_rank) / (first_rank + 1e-5)


def _halve_rank(target: Target, config: PeftConfig) -> Target:
    """Return a target whose rank, where no factor shows it, is half of the numbers in its middle."""
    middle = target.factors.get("pvera_lambda_d")
    return target if target.rank or middle is None else replace(target, rank=middle.elements // 2)


def _drop_empty(target: Target, config: PeftConfig) -> Target | Problem:
    if target.rank:
        return target
    return Problem("LF233", target.name, "a rank of 0: training took it all away", severity="note")


def _scale_gralora(config: PeftConfig, factors: Factors) -> float:
    alpha = read_number(config, "alpha", config.fields.get("alpha", 64))
    own, general = factors.get("gralora_A"), factors.get("gralora_A_general.weight")
    ranks = (own.shape[-1] if own is not None else 0) + (general.shape[0] if general is not None else 0)
    return alpha / ranks if ranks else alpha


def _scale_deft(config: PeftConfig, factors: Factors) -> float:
    """Return alpha over the rank, which is never above the number of outputs; 1 without an alpha."""
    alpha, given = config.fields.get("alpha"), factors.get("deft_P")
    if not alpha or given is None or len(given.shape) != 2 or not given.shape[1]:
        return 1.0
    return read_number(config, "alpha", alpha) / given.shape[1]


def _read_miss_variant(config: PeftConfig, target: str, factors: Factors) -> Mapping[str, JsonValue]:
    return {"is_repeated_along_outputs": True} if config.fields.get("init_weights") == "mini" else {}


def _count_indices(target: Target, config: PeftConfig) -> Target | Problem:
    """Return SHiRA's places as whole numbers: on Windows PEFT saves them as float32."""
    places = target.factors.get("shira_indices")
    if places is None or places.dtype.name not in ("float32", "float64"):
        return target
    values = places.read()
    if not np.array_equal(values, np.rint(values)) or not (np.abs(values) < _EXACT).all():
        return Problem("LF210", f"{target.name}: shira_indices", f"{places.dtype.name}, not whole", "whole numbers")
    return replace(target, factors={**target.factors, "shira_indices": derive(WholeNumbers(), places)})


def _choose_miss(target: Target, config: PeftConfig) -> Target:
    """Return the target as the variant that it is; of "bat" the rank is the side of its squares."""
    if config.fields.get("init_weights") != "bat":
        return target
    return replace(target, kind="miss_bat", rank=target.factors["miss_block"].shape[-1])


def _scale_supra(config: PeftConfig, target: str, factors: Factors) -> Mapping[str, JsonValue]:
    """Return the scale of the LoRA beside the changed numbers."""
    if not config.fields.get("r"):
        return {}
    rank = read_number(config, "r", config.fields["r"])
    return {"lora_scale": read_number(config, "lora_alpha", config.fields.get("lora_alpha", 2 * rank)) / rank}


def _see_convolution(target: Target, config: PeftConfig) -> Target:
    """Return a target with the slot that the shape of BOFT's scale tells: (1, out) is that of a convolution."""
    scale = target.factors.get("boft_s")
    flat = scale is not None and len(scale.shape) == 2 and scale.shape[0] == 1
    return replace(target, slot=SlotKind.CONV) if flat else target


TYPES: Final[Mapping[str, PeftType]] = {
    "IA3": PeftType("ia3", _same("ia3_l"), more=_is_feedforward, convolves=("ia3_l",)),
    "LOHA": PeftType(
        "loha",
        _same("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        rank=(("hada_w1_b", 0),),
        alpha="alpha",
        convolves=("hada_t1",),
    ),
    "LOKR": PeftType(
        "lokr",
        _same("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        rank=(("lokr_w1_b", 0), ("lokr_w2_b", 0)),
        alpha="alpha",
        more=_count_lokr_axes,
        convolves=("lokr_w2", "lokr_t2"),
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
        more=_read_oft_generation,
    ),
    "VERA": PeftType(
        "vera",
        _same("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
        rank=(("vera_lambda_d", 0),),
        drawn=("vera_A", "vera_B"),
        is_sharing=True,
    ),
    "PVERA": PeftType(
        "pvera",
        _same("pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B"),
        rank=(("pvera_B", 1),),
        adjust=_halve_rank,
        drawn=("pvera_A", "pvera_B"),
        is_sharing=True,
    ),
    "ADALORA": PeftType(
        "adalora",
        _same("lora_A", "lora_B", "lora_E"),
        rank=(("lora_A", 0),),
        scaling=_scale_adalora,
        adjust=_drop_empty,
    ),
    "BOFT": PeftType("boft", _same("boft_R", "boft_s"), adjust=_see_convolution),
    "HRA": PeftType("hra", _same("hra_u"), rank=(("hra_u", 1),), options={"apply_GS": False}),
    "FOURIERFT": PeftType("fourierft", _same("fourierft_spectrum"), scale="scaling", options={"random_loc_seed": 777}),
    "WAVEFT": PeftType(
        "waveft",
        _same("waveft_spectrum"),
        scale="scaling",
        options={"random_loc_seed": 777, "use_idwt": True, "wavelet_family": "db1"},
        obstacles=(Barrier("wavelet_family", lambda name: str(name).startswith("coif"), _COIFLET, "db1"),),
    ),
    "RANDLORA": PeftType(
        "randlora",
        _same("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
        rank=(("randlora_lambda", 0),),
        alpha="randlora_alpha",
        obstacles=(_NOT_SAVED,),
        is_sharing=True,
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
        is_sharing=True,
    ),
    "MISS": PeftType(
        "miss", _same("miss_block"), rank=(("miss_block", 0),), more=_read_miss_variant, adjust=_choose_miss
    ),
    "BONE": PeftType("miss", {"bone_block": "miss_block"}, rank=(("miss_block", 0),), adjust=_choose_miss),
    "SHIRA": PeftType("shira", _same("shira_weight", "shira_indices"), adjust=_count_indices),
    "C3A": PeftType("c3a", _same("c3a_kernel")),
    "ROAD": PeftType("road", _same("road_theta", "road_alpha"), options={"variant": "road_1", "group_size": 64}),
    "DELORA": PeftType(
        "delora", _same("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), rank=(("delora_A", 0),)
    ),
    "GRALORA": PeftType(
        "gralora",
        _same("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
        scaling=_scale_gralora,
    ),
    "HIRA": PeftType(
        "hira",
        _same("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        rank=(("hira_A", 0), ("hira_embedding_A", 0)),
        convolves=("hira_A",),
    ),
    "GLORA": PeftType(
        "glora",
        _same(
            *(f"glora_{path}.{form}" for path in "ABCDE" for form in ("X", "zeros")),
            *(f"glora_{path}.{form}" for path in "ABC" for form in ("Xd", "Xu")),
        ),
    ),
    "DEFT": PeftType(
        "deft",
        _same("deft_P", "deft_R"),
        rank=(("deft_P", 1),),
        scaling=_scale_deft,
        options={"decomposition_method": "relu"},
    ),
    "OSF": PeftType("osf", _same(*(f"osf_svd_params.{part}" for part in ("U_low", "S_low", "V_low")))),
    "PEANUT": PeftType(
        "peanut",
        _same(
            *("peanut_A.weight", "peanut_B.weight"),
            *(f"peanut_{half}.{layer}.weight" for half in ("encoders", "decoders") for layer in range(_MAX_DEPTH)),
        ),
        rank=(("peanut_A.weight", 0),),
        scale="scaling",
        options={"act_fn": "relu"},
    ),
    "UNILORA": PeftType(
        "unilora",
        _same("unilora_theta_d", *(f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB")),
        rank=(("unilora_indices_A", 0),),
        obstacles=(Barrier("save_indices", lambda saved: saved is not True, _PLACES, False, "LF232"),),
        is_sharing=True,
    ),
    "FROD": PeftType(
        "frod",
        _same("frod_V", "frod_lambda_l", "frod_lambda_s_values", "frod_s_indices", "frod_s_size"),
        obstacles=(_NOT_SAVED,),
        arrange=give_factors,
        is_sharing=True,
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
        is_sharing=True,
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
        more=_scale_supra,
        obstacles=(
            Barrier(
                "save_precomputed_indices", lambda saved: saved is False, "its indices were not saved", True, "LF232"
            ),
        ),
    ),
}
"""`peft_type` to what it is."""
