"""Adapters that no weight can hold: each is known wherever it comes from, and told from those that can be merged."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import write_config, write_tensors
from loraformat.errors import LoraformatError
from loraformat.loading import is_base, load_adapter
from loraformat.problems import Problem
from loraformat.recognition import recognise_fields, recognise_files, recognise_tensors, recognise_type
from loraformat.recognition.unmergeable import UNMERGEABLE
from loraformat.validation import validate_path

TENSORS = {
    "direction.1": "control vector",
    "encoder.layers.0.q_proj.adapter_down_proj.weight": "an adapter of SpeechBrain",
    "lora_llama.a0.weight": "candle-lora",
    "prompt_embeddings": "prompt tuning, prefix tuning or P-tuning",
    "base_model.model.prefix_task_cols": "prompt tuning",
    "roberta.prompt_tuning.base_model_embeddings.prompt_tunings.sst.prompt_embedding.weight": "prompt tuning",
    "bert.encoder.layer.0.attention.self.prefix_tuning.prefix_gates.mnli.weight": "prefix tuning",
    "bert.prefix_tuning.prefix_tunings.mnli.wte.weight": "prefix tuning",
    "bert.encoder.layer.0.output.adapters.sst.adapter_down.0.weight": "bottleneck adapter",
    "bert.encoder.layer.0.output.adapters.sst.adapter_up.bias": "bottleneck adapter",
    "bert.encoder.layer.0.attention.output.attention_adapters.adapters.sst.adapter_down.0.bias": "bottleneck adapter",
    "bert.invertible_adapters.de.F.0.weight": "bottleneck adapter",
    "bert.encoder.layer.1.output.adapters.sst.adapter_down.0.phm_rule": "bottleneck adapter",
    "roberta.encoder.layer.0.attention.output.adapter_A": "bottleneck adapter",
    "bert.encoder.layer.0.output.adapter_fusion_layer.a,b.query.weight": "AdapterFusion",
    "base_model.model.model.layers.2.self_attn.adaption_prompt": "LLaMA-Adapter",
    "base_model.model.model.layers.2.self_attn.adaption_gate": "LLaMA-Adapter",
    "transformer.h.2.attn.adapter_wte.weight": "LLaMA-Adapter",
    "transformer.h.2.attn.gating_factor": "LLaMA-Adapter",
    "base_model.internal_xlora_classifier.layers.0.weight": "X-LoRA",
    "base_model.model.encoder.block.0.layer.0.SelfAttention.q.poly_lora_A": "Poly",
    "base_model.model.encoder.block.0.layer.0.SelfAttention.q.poly_router.module_logits": "Poly",
    "base_model.model.model.layers.0.self_attn.q_proj.lily_router.weight": "Lily",
    "bert.encoder.layer.3.output.refts.sst.units.0.learned_source.weight": "ReFT",
    "bert.encoder.layer.0.attention.self.query.loras.sst.gate.weight": "LoRA or (IA)³ behind a gate",
    "bert.encoder.layer.0.attention.self.query.loras.sst.task_specific.values": "MTL-LoRA",
    "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight": "ControlNet-LLLite",
    "transformer_blocks.0.qkv_proj.lora_down": "Nunchaku LoRA",
    "single_transformer_blocks.3.mlp_fc1.lora_up": "Nunchaku LoRA",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lambda_layer": "T-LoRA",
    "SD1UNet.DownBlocks.Chain_2.CrossAttentionBlock.Attention.Distribute.1.Linear.down.weight": "refiners LoRA",
    "transformer_blocks.0.qkv_proj.smooth_factor": "SVDQuant model",
    "lora_controlnet": "Control-LoRA",
    "ip_adapter.1.to_k_ip.weight": "IP-Adapter",
    "image_proj.proj.weight": "IP-Adapter",
    "emb_params": "textual inversion",
    "clip_g": "textual inversion",
}
TYPES = {
    "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "P-tuning",
    "PREFIX_TUNING": "prefix tuning",
    "MULTITASK_PROMPT_TUNING": "prompt tuning",
    "CPT": "prompt tuning",
    "CARTRIDGE": "prompt tuning",
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "XLORA": "X-LoRA",
    "POLY": "Poly",
    "LILY": "Lily",
    "SHADOW": "Shadow",
    "PSOFT": "a decomposition of the base",
    "ADAMSS": "factors without places",
}
HUB = {
    "hidden_size": 768,
    "model_class": "BertAdapterModel",
    "model_type": "bert",
    "name": "sst",
    "version": "adapters.1.0",
}
HUB_CONFIGS: dict[str, dict[str, Any]] = {
    "bottleneck adapter": {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16, "non_linearity": "relu"},
    "prefix tuning": {"architecture": "prefix_tuning", "prefix_length": 30},
    "prompt tuning": {"architecture": "prompt_tuning", "prompt_length": 10},
    "ReFT": {"architecture": "reft", "layers": "all"},
    "LoRA or (IA)³ behind a gate": {"architecture": "lora", "r": 8, "alpha": 16, "use_gating": True},
    "MTL-LoRA": {"architecture": "mtl_lora", "r": 8},
    "several methods at once": {"architecture": "union", "configs": []},
}
FILES = {
    "intkey_layer.4.block_output.unit.pos.nunit.1#0.bin": "ReFT",
    "xlora_config.json": "X-LoRA",
    "pytorch_model_adapter_fusion.bin": "AdapterFusion",
    "learned_embeds.safetensors": "textual inversion",
}
MERGEABLE = [
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight",
    "roberta.encoder.layer.0.attention.self.query.lora_A",
    "bert.encoder.layer.0.attention.self.query.loras.sst.lora_A",
    "model.layers.0.block_sparse_moe.gate.lora_A.weight",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "unet.mid_block.attentions.0.projection.lora_A.weight",
    "base_model.model.base_model.embed_tokens.token_adapter.trainable_tokens_delta",
    "transformer.h.0.attn.qkv.adapter_scale",
    "decoder.layers.0.mlp.linear_fc1.adapter_up.linear_in.weight",
    "base_model.model.classifier.weight",
]


def refusal(path: Path) -> Problem:
    with pytest.raises(LoraformatError) as caught:
        load_adapter(path)
    (problem,) = caught.value.problems
    return problem


def test_every_row_is_tried() -> None:
    names = {row.name for row in UNMERGEABLE}
    tried = {*TENSORS.values(), *TYPES.values(), *HUB_CONFIGS, *FILES.values(), "aLoRA", "Arrow", "QALoRA", "ms-swift"}
    assert {name for name in names if not any(name.startswith(each) for each in tried)} == set()


@pytest.mark.parametrize("key", TENSORS)
def test_a_bare_file_is_known_by_its_tensors(tmp_path: Path, key: str) -> None:
    path = write_tensors(tmp_path / "a.safetensors", {key: np.ones((2, 3), np.float32), "zz.bias": np.ones(2)})
    problem = refusal(path)
    assert problem.code == "LF209"
    assert problem.found.startswith(TENSORS[key])
    assert key in problem.found
    assert problem.mend
    assert not is_base(path)


@pytest.mark.parametrize("key", MERGEABLE)
def test_what_can_be_merged_is_none_of_them(key: str) -> None:
    assert recognise_tensors([key]) is None


@pytest.mark.parametrize("kind", TYPES)
def test_a_peft_folder_is_known_by_its_type(tmp_path: Path, kind: str) -> None:
    write_config(tmp_path, {"peft_type": kind, "lora_alpha": None})
    write_tensors(tmp_path / "adapter_model.safetensors", {"prompt_embeddings": np.ones((2, 3), np.float32)})
    problem = refusal(tmp_path)
    assert problem.code == "LF209"
    assert problem.found.startswith(TYPES[kind])
    assert f"(peft_type {kind!r})" in problem.found


@pytest.mark.parametrize(("kind", "words"), [("LORA", "to_peft_format"), ("PART", "Swift.from_pretrained")])
def test_a_folder_of_ms_swift_is_known_by_its_type(tmp_path: Path, kind: str, words: str) -> None:
    write_config(tmp_path, {"peft_type": ..., "swift_type": kind, "r": 2, "lora_alpha": 4})
    write_tensors(tmp_path / "adapter_model.safetensors", {"m.lora_A.default.weight": np.ones((2, 3), np.float32)})
    problem = refusal(tmp_path)
    assert problem.code == "LF209"
    assert words in problem.mend


def test_a_type_that_may_be_merged_is_left_to_its_scheme() -> None:
    assert recognise_type("LORA") is None
    assert recognise_type("LOHA") is None
    assert recognise_type("A_TYPE_OF_NEXT_YEAR") is None


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_a_configuration_of_adapterhub(tmp_path: Path, name: str) -> None:
    """With its tensors under a name that we do not read, and without them."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({**HUB, "config": HUB_CONFIGS[name]}), encoding="utf-8")
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"PK\x03\x04")
    assert refusal(tmp_path).found.startswith(name)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_text(json.dumps({**HUB, "config": HUB_CONFIGS[name]}), encoding="utf-8")
    (problem,) = validate_path(alone / "adapter_config.json").problems
    assert (problem.code, problem.severity) == ("LF209", "error")
    assert problem.found.startswith(name)


def test_lora_of_adapterhub_is_none_of_them() -> None:
    config = {"architecture": "lora", "r": 8, "alpha": 16, "use_gating": False, "composition_mode": "add"}
    assert not recognise_fields({**HUB, "config": config})


@pytest.mark.parametrize("name", FILES)
def test_a_folder_is_known_by_its_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    problem = refusal(tmp_path)
    assert problem.code == "LF209"
    assert problem.found.startswith(FILES[name])
    assert name in problem.found


def test_a_folder_of_another_kind_is_none_of_them() -> None:
    assert recognise_files(["model.safetensors", "config.json", "adapter_model.safetensors"]) is None


@pytest.mark.parametrize("row", UNMERGEABLE, ids=lambda row: row.name)
def test_each_says_why_and_what_to_do(row: Any) -> None:
    assert re.match(r"[a-z]", row.why)
    assert row.mend.endswith((".", ").", "...)."))
    assert row.types or row.keys or row.fields or row.files
