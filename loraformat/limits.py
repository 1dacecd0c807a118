"""Caps on what a file may ask of us, each with its reason.

A file is hostile until checked: a number from a file is compared with one of these, or with the file's own size, before
anything is allocated for it.
"""

from typing import Final

MAX_SAFETENSORS_HEADER_BYTES: Final = 100_000_000
"""The cap of the safetensors library itself: a header beyond it cannot be read by anyone else."""

MAX_CONFIG_BYTES: Final = 10_000_000
"""`adapter_config.json` and `config.json` are kilobytes; ten megabytes hold any rank pattern."""

MAX_METADATA_BYTES: Final = 10_000_000
"""One free-text metadata value."""

MAX_JSON_DEPTH: Final = 32
"""Real headers nest three deep. Far below the depth at which parsers overflow their stack."""

MAX_JSON_INTEGER_DIGITS: Final = 21
"""Canonical JSON writes floats below 1e21 without an exponent; longer integers cost quadratic time to convert."""

MAX_TENSORS: Final = 300_000
"""Tensors in one file. The index of one takes a kilobyte; mixtures of hundreds of experts in every layer have a hundred
thousand matrices, and lie in many files."""

MAX_NAME_BYTES: Final = 4096
"""One tensor name. Exporters' flattened paths reach some hundreds."""

MAX_DIMS: Final = 8
"""Dimensions of one tensor; a 3-d convolution has five."""

MAX_DRAWN: Final = 1 << 28
"""Random numbers that are drawn again from a seed, a gibibyte; VeRA of rank 1024 on a 70B model takes 38 million."""

MAX_LAYERS: Final = 4096
"""Layers of a model that PEFT's layer_replication makes: each is copied, and the largest models have some hundred."""

MAX_EXPERTS: Final = 4096
"""Experts in one packed tensor. Models have some hundreds."""

MAX_PROTO_DEPTH: Final = 100
"""Nesting of protobuf messages, as in the protobuf libraries' own default."""

MAX_ZIP_DIRECTORY_BYTES: Final = 100_000_000
"""The list of a zip archive's members: about a hundred bytes for each tensor."""

MAX_ARCHIVE_MEMBERS: Final = 10_000
"""Members of a tar archive; NeMo's have two, and one for each process of a parallel model."""

MAX_PICKLE_BYTES: Final = 100_000_000
"""The pickle of a torch checkpoint holds names and shapes, no weights: about 140 bytes for each tensor."""

MAX_PICKLE_OPCODES: Final = 2_500_000
"""About 40 for each tensor. What they build takes 350 MB at worst."""

MAX_PICKLE_MEMO: Final = 1_250_000
"""Values that a pickle can refer back to; Python's pickler remembers about every second one."""

MAX_PICKLE_MARKS: Final = 1000
"""Nested collections under construction. Python's own pickler stops at a recursion depth of about a thousand."""

MAX_PICKLE_STRING_BYTES: Final = 10_000_000
"""One string in a pickle, such as a configuration kept beside the weights."""

MAX_PICKLE_INTEGER_BYTES: Final = 64
"""Seeds and generator states have 128 bits; long ones cost quadratic time to print."""

MAX_NPY_HEADER_BYTES: Final = 10_000
"""numpy's own cap (`max_header_size`)."""

MAX_GGUF_HEAD_BYTES: Final = 100_000_000
"""Key-values and tensor descriptions of a GGUF file; vocabularies take some megabytes."""

MAX_KEY_VALUES: Final = 100_000
"""Key-values of one GGUF file; real ones have some dozens."""

MAX_FLATBUFFER_BYTES: Final = 2**31 - 1
"""Offsets in a flatbuffer have 31 bits, so no reader takes a longer one."""

MAX_VALUE_CHARACTERS: Final = 200
"""What is shown of a value beside the tensors, and of its name."""

MAX_LISTED_VALUES: Final = 256
"""Values beside the tensors of a checkpoint that are listed by name."""

MAX_SKELETON_BYTES: Final = 1_000_000_000
"""An ONNX graph without its weights. Below the 2 GiB that protobuf libraries can parse."""

MAX_PROTOBUF_BYTES: Final = 2**31 - 1
"""A model's own file, data files aside, or a model in memory: protobuf libraries count its bytes in 31 bits."""

MAX_GRAPH_VISITS: Final = 5_000_000
"""Nodes walked with functions expanded; nested calls can multiply without end."""

KEEP_INLINE_BYTES: Final = 4096
"""Tensor payloads up to this size stay in an ONNX skeleton: shapes and axes, which graphs are read by."""

KEEP_CODES_BYTES: Final = 1 << 18
"""The same for zero points that are written one by one: some bytes for each of a weight's channels."""

MAX_EVIDENCE_BYTES: Final = 100_000
"""One node's name-scope metadata, which is parsed as a Python literal."""

TILE_BYTES: Final = 2 << 20
"""float32 bytes of one tile: all workers' buffers stay in the last cache, and Python between tiles costs little."""

STREAM_BYTES: Final = 4 << 20
"""What is held of a factor of the size of a weight, for each worker: reads of this size are as fast as any."""

COPY_CHUNK_BYTES: Final = 64 << 20
"""Bytes of one copying step: large enough to be cheap, small enough to show progress and to stop."""

DEFAULT_MEMORY_BYTES: Final = 128 << 20
"""What the tiles and factors in flight may take, unless `--max-memory` says otherwise."""

RETAINED_WARN: Final = 0.9
RETAINED_REFUSE: Final = 0.5
"""Share of a delta that survives rounding: below the first a warning, below the second a refusal (reason LF504)."""

NEAR_MISSES: Final = 3
"""How many similar names a message about an unmatched target lists."""

MAX_TRAVELLING_FILES: Final = 256
"""Files of a model's folder beside its weights. All are open at once, and a process may have some hundred."""

MAX_IDLE_DESCRIPTORS: Final = 128
"""Files that are open though nobody reads from them. A process may have 256 (macOS) or 1024 (Linux) of all sorts."""

MAX_GRAPHS: Final = 64
"""ONNX models in one folder: a repository for the browser has some eight forms of three or four."""

MAX_FOLDER_DEPTH: Final = 8
"""Nesting of a model's sub-folders; real ones have one or two levels."""
