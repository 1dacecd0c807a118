"""Running models with run-time inputs, and PEFT's models with the base's weights as an ONNX graph has them.

This file imports torch, peft and transformers: only tests that have checked for them may import it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
import zoo
from numpy.typing import NDArray
from onnx import numpy_helper
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from loraformat import runtime

BLOCK = 16


def export(base: Path, adapters: Sequence[Path], model: Path, **options: object) -> runtime.RuntimeExport:
    """Write a model with run-time inputs; its nodes are those of the base and others between them."""
    done = runtime.export_runtime(base, adapters, model, **options)
    before, after = (onnx.load(path, load_external_data=False).graph for path in (base, model))
    kept = [node.name for node in after.node if "/lora_" not in node.name and "/lora/Add" not in node.name]
    if not options.get("batched"):
        assert kept == [node.name for node in before.node]
    assert [t.name for t in after.initializer][: len(before.initializer)] == [t.name for t in before.initializer]
    return done


def run(model: Path, feeds: zoo.Arrays, outputs: Sequence[str] = (), adapter: Path | None = None) -> zoo.Arrays:
    """Run a model, with an adapter's file or without; feeds that it has no input for are left out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    known = {entry.name for entry in (*session.get_inputs(), *session.get_overridable_initializers())}
    names = [entry.name for entry in session.get_outputs() if not outputs or entry.name in outputs]
    settings = onnxruntime.RunOptions()
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        settings.add_active_adapter(loaded)
    values = session.run(names, {name: array for name, array in feeds.items() if name in known}, settings)
    return dict(zip(names, values, strict=True))


def write_adapter(model: Path, adapter: Path, output: Path) -> Path:
    """Write an adapter for a model, as a user does later."""
    return Path(runtime.export_adapter(model, [adapter], output).output)


def run_mixed(specimen: zoo.Specimen, adapters: Mapping[str, Path], rows: Sequence[str]) -> zoo.Arrays:
    """Return what PEFT computes of a batch whose rows have adapters of their own; `__base__` is none."""
    first, *others = adapters
    with zoo.quiet():
        model = PeftModel.from_pretrained(specimen.make(), str(adapters[first]), adapter_name=first).eval()
        for name in others:
            model.load_adapter(str(adapters[name]), adapter_name=name)
    feeds = {name: tensor[: len(rows)] for name, tensor in specimen.feeds().items()}
    return zoo.run_torch(model, {**feeds, "adapter_names": list(rows)}, specimen.outputs)


def run_with_weights(trained: zoo.Trained, weights: Mapping[str, NDArray[np.float32]]) -> tuple[zoo.Arrays, zoo.Arrays]:
    """Return what torch and PEFT compute, unmerged, where some of the base's weights are other ones."""
    model = trained.specimen.make()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, weight in weights.items():
            module = modules[name]
            assert isinstance(module, nn.Linear)
            module.weight.copy_(torch.from_numpy(weight))
    feeds = {name: torch.from_numpy(array) for name, array in trained.feeds.items()}
    before = zoo.run_torch(model, feeds, trained.specimen.outputs)
    with zoo.quiet():
        adapted = PeftModel.from_pretrained(model, str(trained.folder)).eval()
    return before, zoo.run_torch(adapted, feeds, trained.specimen.outputs)


def read_nbits(path: Path) -> dict[str, NDArray[np.float32]]:
    """Return the weights `(out, in)` of all MatMulNBits of 4 bits, decoded by the operator's definition, by module."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        size = {attribute.name: attribute.i for attribute in node.attribute}
        packed, scales = arrays[node.input[1]], arrays[node.input[2]].reshape(size["N"], -1, 1)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(size["N"], packed.shape[1], -1)
        wide = ((codes.astype(np.float32) - 8) * scales).reshape(size["N"], -1)[:, : size["K"]]
        found[_module_of(node.name)] = np.ascontiguousarray(wide, np.float32)
    return found


def _module_of(node: str) -> str:
    return re.sub(r"/", ".", node.removeprefix("/").rpartition("/")[0])


def to_nbits(source: Path, path: Path) -> Path:
    """Quantise the matrices of a model to 4 bits, computed in float32, as onnxruntime does."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with zoo.quiet():
        made = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=BLOCK, is_symmetric=True, accuracy_level=1)
        made.process()
    made.model.save_model_to_file(str(path))
    return path


def compute_in_float32(path: Path) -> None:
    """Have MatMulNBits take its x as it is; the builder has it rounded to 8 bits."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    path.write_bytes(model.SerializeToString())


def make_random_adapter(checkpoint: Path, folder: Path, modules: list[str], rank: int) -> Path:
    """Write a PEFT adapter with random factors for a Llama."""
    with zoo.quiet():
        base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules))
        generator = torch.Generator().manual_seed(rank)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def read_nbits_of_builder(path: Path, sizes: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
    """Return the 4-bit weights of a model of onnxruntime-genai's builder, under the names of transformers."""
    found = {name.replace(".attn.", ".self_attn."): weight for name, weight in read_nbits(path).items()}
    heads, groups, size = (sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    for name in [name for name in found if name.endswith(".qkv_proj")]:
        parts = np.split(found.pop(name), np.cumsum([heads * size, groups * size]))
        found |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in zip("qkv", parts, strict=True)}
    return found


def run_llama(
    checkpoint: Path, adapter: Path, prompt: NDArray[np.int32], weights: Mapping[str, NDArray[np.float32]], count: int
) -> tuple[NDArray[np.float32], list[int]]:
    """Return PEFT's logits of a prompt, and the likeliest tokens after it, one by one."""
    with zoo.quiet(), torch.no_grad():
        base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
        modules = dict(base.named_modules())
        for name, weight in weights.items():
            modules[name].weight.copy_(torch.from_numpy(weight))
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
        ids = torch.from_numpy(prompt).long()
        logits = model(input_ids=ids).logits.numpy().copy()
        tokens = []
        for _ in range(count):
            best = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(best))
            ids = torch.cat([ids, best], dim=1)
    return logits, tokens
