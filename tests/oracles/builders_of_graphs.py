"""ONNX models that are not torch's exports: those of onnxruntime-genai's model builder and of Optimum."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import transformers
import zoo

HEAD_DIM = 16
"""Of the decoders that are built: onnxruntime's attention with rotary embedding wants a multiple of it."""
WINDOW = 32
_SIZES = {"kv_cache_dim": HEAD_DIM, "past_sliding_length": WINDOW}
"""Of caches that are empty; one that slides has its window's size from the start."""


def save_model(specimen: zoo.Specimen, folder: Path) -> Path:
    """Save a specimen as a model of the hub: configuration, weights, and a tokenizer, which tools want."""
    if not folder.exists():
        with zoo.quiet():
            model = specimen.make()
            model.save_pretrained(folder)
            _make_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def _make_tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(number): number for number in range(size)}, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="0", bos_token="1", eos_token="2", pad_token="0"
    )


def build_genai(specimen: zoo.Specimen, folder: Path, precision: str = "fp32", *extra: str) -> Path:
    """Build a specimen with onnxruntime-genai's model builder, without network."""
    source, output, cache = save_model(specimen, folder / "torch"), folder / precision, folder / "cache"
    # A process of its own: the builder imports modules whose names are those of others.
    flags = ["-i", source, "-o", output, "-p", precision, "-e", "cpu", "-c", cache]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, flags)]
    command += ["--extra_options", *extra] if extra else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=environment)
    return output / "model.onnx"


def run_cached(path: Path, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the logits of a decoder that takes a cache, here an empty one."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {}
    for entry in session.get_inputs():
        if entry.name in feeds:
            given[entry.name] = feeds[entry.name].astype(np.int32) if "int32" in entry.type else feeds[entry.name]
        else:
            sizes = [size if isinstance(size, int) else _SIZES.get(size, 0) for size in entry.shape]
            form = np.float16 if "float16" in entry.type else np.float32
            given[entry.name] = np.zeros([len(feeds["input_ids"]), *sizes[1:]], form)
    logits: np.ndarray[Any, Any] = session.run(["logits"], given)[0]
    return logits


def list_domains(path: Path) -> set[str]:
    """Return the operators of a model that are onnxruntime's own."""
    model = onnx.load(path, load_external_data=False)
    return {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}


OPTIMUM_TASKS = {
    "llama": "text-generation-with-past",
    "gpt2": "text-generation-with-past",
    "bert": "text-classification",
    "distilbert": "text-classification",
    "t5": "text2text-generation-with-past",
    "whisper": "automatic-speech-recognition-with-past",
}
"""What Optimum is asked to export of each specimen."""
OPTIMUM_SHAPES = {"whisper": {"nb_max_frames": 20}}
"""Sizes of the example that it traces with, where its own would not fit so small a model."""


def export_with_optimum(specimen: zoo.Specimen, folder: Path) -> dict[str, Path]:
    """Export a specimen with Optimum; return the models by their names without suffix."""
    from optimum.exporters.onnx import main_export

    source, output = save_model(specimen, folder / "torch"), folder / "onnx"
    if not output.exists():
        with zoo.quiet():
            shapes = OPTIMUM_SHAPES.get(specimen.name, {})
            main_export(str(source), output, task=OPTIMUM_TASKS[specimen.name], do_validation=False, **shapes)
    return {path.stem: path for path in output.glob("*.onnx")}


def run_whole(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs of a model that Optimum exported; what it asks for and nobody has is an empty cache."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    batch = len(next(iter(feeds.values())))
    given = {"token_type_ids": np.zeros_like(feeds["input_ids"])} if "input_ids" in feeds else {}
    if "attention_mask" in feeds:
        given["position_ids"] = np.maximum(np.cumsum(feeds["attention_mask"], axis=1) - 1, 0)
    for entry in session.get_inputs():
        empty = [size if isinstance(size, int) else 0 for size in entry.shape]
        given.setdefault(entry.name, feeds.get(entry.name, np.zeros([batch, *empty[1:]], np.float32)))
    asked = {entry.name: given[entry.name] for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, asked), strict=True))
