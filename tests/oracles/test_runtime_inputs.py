"""Adapters as inputs of exported models, beside PEFT's unmerged model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

CASES = [
    ("llama", "ts", ""),
    ("llama", "dynamo", ""),
    ("llama_embed", "dynamo_noopt", ""),
    ("llama_tied", "dynamo", ""),
    ("gpt2", "ts", ""),
    ("bert", "dynamo", ""),
    ("vit", "ts", ""),
    ("convnet", "dynamo", ""),
    ("resnet", "ts_nofold", ""),
    ("twins_3d", "dynamo", ""),
    ("reused", "ts", ""),
    ("bert", "ts", "bfloat16 + Cast"),
    ("llama", "dynamo", "float16"),
    ("bert", "ts", "external data, many files"),
]
COARSE = {"float16": 1e-2, "bfloat16 + Cast": 5e-2}


@pytest.mark.parametrize(("name", "exporter", "tool"), CASES)
def test_outputs_are_those_of_peft_unmerged(lab: "Lab", tmp_path: Path, name: str, exporter: str, tool: str) -> None:
    from lab import ABSOLUTE_TOLERANCE, difference, note
    from onnx_paths import make
    from runtime_lab import export, run, write_adapter

    trained = lab.trained(name)
    base = make(lab, name, exporter, tool) if tool else lab.exported(name, exporter)  # type: ignore[arg-type]
    model, allowed = tmp_path / "base.lora.onnx", COARSE.get(tool, ABSOLUTE_TOLERANCE)
    assert trained.effect > 10 * allowed
    done = export(base, [trained.folder], model)
    assert sum(done.served.values()) == len(trained.deltas)
    outputs = trained.specimen.outputs
    idle = difference(run(model, trained.feeds, outputs), run(base, trained.feeds, outputs))
    adapter = write_adapter(model, trained.folder, tmp_path / "style.onnx_adapter")
    off = difference(run(model, trained.feeds, outputs, adapter), trained.unmerged)
    note(f"runtime {name} {exporter} {tool}", idle=idle, off=off)
    assert idle <= 1e-6  # Not nothing where onnxruntime fuses what follows another way.
    assert off <= allowed


@pytest.mark.parametrize("slots", [0, 2])
def test_a_fused_attention_is_taken_apart(lab: "Lab", tmp_path: Path, slots: int) -> None:
    from lab import ABSOLUTE_TOLERANCE, difference
    from onnx_paths import make
    from runtime_lab import run

    from loraformat import runtime

    trained = lab.trained("bert", ["query", "value", "dense"])
    base, model = make(lab, "bert", "ts", "ORT transformer optimiser"), tmp_path / "base.lora.onnx"
    done = runtime.export_runtime(base, [trained.folder], model, batched=slots)
    assert sum(each.name.endswith(".self.qkv_proj") for each in done.inputs.layouts) == 2
    feeds, outputs = runtime.adapter_feeds(model, [trained.folder]), trained.specimen.outputs
    if slots:
        feeds[runtime.ADAPTER_INDEX] = np.array([0])
    assert difference(run(model, trained.feeds, outputs), run(base, trained.feeds, outputs)) <= 1e-6
    assert difference(run(model, {**trained.feeds, **feeds}, outputs), trained.unmerged) <= ABSOLUTE_TOLERANCE


@pytest.mark.parametrize(("name", "exporter", "tool"), [("resnet", "ts", ""), ("llama", "ts", "without names")])
def test_with_the_checkpoint_folded_and_nameless_weights_are_served(
    lab: "Lab", tmp_path: Path, name: str, exporter: str, tool: str
) -> None:
    import zoo
    from lab import ABSOLUTE_TOLERANCE, difference
    from onnx_paths import make
    from runtime_lab import export, run
    from safetensors.torch import save_model

    from loraformat import runtime

    trained = lab.trained(name)
    base = make(lab, name, exporter, tool) if tool else lab.exported(name, exporter)  # type: ignore[arg-type]
    checkpoint, model = tmp_path / "checkpoint.safetensors", tmp_path / "base.lora.onnx"
    save_model(zoo.SPECIMENS[name].make(), str(checkpoint))
    export(base, [trained.folder], model, base_checkpoint=checkpoint)
    feeds = runtime.adapter_feeds(model, [trained.folder], base_checkpoint=checkpoint)
    found = run(model, {**trained.feeds, **feeds}, trained.specimen.outputs)
    assert difference(found, trained.unmerged) <= ABSOLUTE_TOLERANCE


@pytest.mark.parametrize(("name", "exporter"), [("llama", "dynamo"), ("bert", "ts"), ("gpt2", "ts")])
def test_rows_of_a_batch_have_adapters_of_their_own(lab: "Lab", tmp_path: Path, name: str, exporter: str) -> None:
    from lab import ABSOLUTE_TOLERANCE, difference
    from runtime_lab import export, run, run_mixed

    from loraformat import runtime

    every, some = lab.trained(name), lab.trained(name, _SOME[name])
    base, model = lab.exported(name, exporter), tmp_path / "batched.onnx"  # type: ignore[arg-type]
    export(base, [every.folder, some.folder], model, batched=3)
    stack = runtime.adapter_feeds(model, [every.folder, some.folder])
    for rows, index in ((["some", "every"], [1, 0]), (["__base__", "some"], [3, 1]), (["every", "__base__"], [0, -1])):
        wanted = run_mixed(every.specimen, {"every": every.folder, "some": some.folder}, rows)
        feeds = {**every.feeds, **stack, runtime.ADAPTER_INDEX: np.array(index)}
        assert difference(run(model, feeds, every.specimen.outputs), wanted) <= ABSOLUTE_TOLERANCE
    idle = run(model, every.feeds, every.specimen.outputs)
    assert difference(idle, run(base, every.feeds, every.specimen.outputs)) <= 1e-6


_SOME = {"llama": ["q_proj", "down_proj"], "bert": ["query", "output.dense"], "gpt2": ["c_attn"]}


def test_beside_4_bits_the_whole_adapter_is_kept(lab: "Lab", tmp_path: Path) -> None:
    """PEFT's unmerged model over the numbers that the 4-bit weights stand for; a merge keeps a part of the change."""
    pytest.importorskip("onnx_ir")
    from lab import ABSOLUTE_TOLERANCE, difference
    from runtime_lab import export, read_nbits, run, run_with_weights, to_nbits, write_adapter

    trained = lab.trained("llama")
    base, model = to_nbits(lab.exported("llama", "ts"), tmp_path / "base.onnx"), tmp_path / "base.lora.onnx"
    weights = read_nbits(base)
    assert set(trained.deltas) <= set(weights)
    before, unmerged = run_with_weights(trained, weights)
    export(base, [trained.folder], model)
    outputs = trained.specimen.outputs
    adapter = write_adapter(model, trained.folder, tmp_path / "style.onnx_adapter")
    assert difference(run(base, trained.feeds, outputs), before) <= ABSOLUTE_TOLERANCE
    assert difference(run(model, trained.feeds, outputs), run(base, trained.feeds, outputs)) == 0
    assert difference(run(model, trained.feeds, outputs, adapter), unmerged) <= ABSOLUTE_TOLERANCE


GENAI_SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
GENAI_ADAPTERS = {
    "one": (["q_proj", "v_proj", "o_proj", "down_proj"], 4),
    "other": (["k_proj", "gate_proj", "lm_head"], 6),
}
PROMPT = np.array([[5, 17, 33, 8, 90, 41, 7]], np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama in Hugging Face's form, with a tokenizer that the builder of onnxruntime-genai can copy."""
    pytest.importorskip("onnxruntime_genai", reason="this test needs onnxruntime-genai")
    import transformers
    import zoo
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("genai") / "checkpoint"
    with zoo.quiet():
        config = transformers.LlamaConfig(**GENAI_SIZES)
        zoo._randomised(lambda: transformers.LlamaForCausalLM(config)).save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
        ends = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["fp32", "int4"])
def test_a_model_of_genai_stays_one(checkpoint: Path, tmp_path: Path, form: str) -> None:
    """Without an adapter it generates what the base does; with one, logits and tokens are PEFT's."""
    from runtime_lab import compute_in_float32, make_random_adapter, read_nbits_of_builder, run_llama

    from loraformat import runtime

    base, folder = tmp_path / "base", tmp_path / "lora"
    _build(checkpoint, base, form)
    compute_in_float32(base / "model.onnx")
    adapters = {
        name: make_random_adapter(checkpoint, tmp_path / name, *settings) for name, settings in GENAI_ADAPTERS.items()
    }
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("model.onnx*"))
    runtime.export_runtime(base / "model.onnx", list(adapters.values()), folder / "model.onnx", adapters_out=folder)
    logits, tokens = _generate(base)
    same, again = _generate(folder)
    np.testing.assert_array_equal(logits, same)
    assert tokens == again
    weights = read_nbits_of_builder(base / "model.onnx", GENAI_SIZES) if form == "int4" else {}
    for name, adapter in adapters.items():
        found, chosen = _generate(folder, folder / f"{name}.onnx_adapter")
        wanted, expected = run_llama(checkpoint, adapter, PROMPT, weights, len(chosen))
        assert np.abs(wanted - logits).max() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
        assert chosen == expected


def _build(checkpoint: Path, output: Path, form: str) -> None:
    """Run the builder in a process of its own: it brings modules of common names."""
    words = ["-i", checkpoint, "-o", output, "-p", form, "-e", "cpu", "-c", output.with_name("cache")]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((output / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "model.onnx"


def _generate(folder: Path, adapter: Path | None = None, count: int = 6) -> tuple[np.ndarray, list[int]]:
    """Return the logits of the prompt, and the tokens that follow it."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(max_length=PROMPT.shape[1] + count, batch_size=1, do_sample=False)
    generator = onnxruntime_genai.Generator(model, settings)
    if adapter is not None:
        loaded = onnxruntime_genai.Adapters(model)
        loaded.load(str(adapter), "style")
        generator.set_active_adapter(loaded, "style")
    generator.append_tokens(PROMPT)
    logits = np.asarray(generator.get_output("logits")).copy()
    tokens = []
    while len(tokens) < count and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return logits, tokens
