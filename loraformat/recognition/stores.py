"""Checkpoints that no container of ours reads: what their folders are known by, and how their tensors get names."""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final


@dataclass(frozen=True, slots=True)
class Store:
    """One way in which a framework keeps tensors.

    Attributes:
        what: what it is.
        mend: how to make a file of named tensors of it.
        files: names of files or folders of which one lies in it.
    """

    what: str
    mend: str
    files: tuple[str, ...]


STORES: Final = (
    Store(
        "an orbax checkpoint (JAX: Tunix, qwix, MaxText)",
        "Save its tensors by name, in the environment that wrote it: "
        'python -c "import sys, jax, numpy, orbax.checkpoint as o, safetensors.numpy as s; '
        "t = o.PyTreeCheckpointer().restore(sys.argv[1]); "
        "s.save_file({'.'.join(str(getattr(k, 'key', getattr(k, 'idx', k))) for k in p): numpy.asarray(v) "
        'for p, v in jax.tree_util.tree_flatten_with_path(t)[0]}, sys.argv[2])" FOLDER lora.safetensors, where FOLDER '
        "is the absolute path of the item, such as model_params.",
        ("manifest.ocdbt", "_CHECKPOINT_METADATA", "_METADATA"),
    ),
    Store(
        "a distributed checkpoint of torch",
        "Make one file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER adapter.pt",
        ("*.distcp",),
    ),
    Store(
        "a ZeRO checkpoint of DeepSpeed",
        "Run the zero_to_fp32.py that lies in it: python zero_to_fp32.py FOLDER OUT",
        ("zero_to_fp32.py", "zero_pp_rank_*", "*_zero_pp_rank_*", "mp_rank_*_model_states.pt"),
    ),
    Store(
        "an adapter that was converted for TensorRT-LLM",
        "It has numbers for modules, and weights in rows of one length. Give the PEFT or NeMo adapter that it was "
        "made of.",
        ("model.lora_weights.npy", "model.lora_config.npy"),
    ),
    Store(
        "an adapter of PaddleNLP in parts of parallel training",
        "Save it with merge_tensor_parallel=True: model.save_pretrained(folder, merge_tensor_parallel=True).",
        ("lora_model_state.*.pdparams",),
    ),
    Store(
        "an adapter for Apple's on-device model (.fmadapter)",
        "Its base is in no file, and its tensors are in the order of Apple's toolkit: load it with that model alone.",
        ("adapter_weights.bin", "*.fmadapter"),
    ),
    Store(
        "a package of Core ML",
        "It is a compiled program. Merge into the model that it was converted from, and convert that again.",
        ("*.mlpackage", "*.mlmodelc", "*.mlmodel"),
    ),
    Store(
        "an adapter as vLLM's tensorizer has it",
        "Give the PEFT folder that it was made of; vLLM serialises adapter_model.safetensors as it is.",
        ("adapter_model.tensors",),
    ),
    Store(
        "an adapter in shards of optimum-neuron",
        "Make one of them: optimum-cli neuron consolidate FOLDER OUTPUT",
        ("adapter_shards",),
    ),
    Store(
        "an adapter of MediaPipe",
        "It is a compiled graph for a phone. Give the PEFT folder that it was converted from.",
        ("*lora*.tflite", "*lora*.task"),
    ),
    Store(
        "an adapter of KerasHub",
        "Name the file itself, and give the base that it was trained on: its layers have numbers instead of names.",
        ("*.lora.h5",),
    ),
)


def recognise_store(names: Collection[str]) -> Store | None:
    """Return what the names in a folder speak for."""
    return next((row for row in STORES if any(fnmatchcase(name, glob) for name in names for glob in row.files)), None)
