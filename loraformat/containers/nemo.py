"""NeMo 1's `.nemo` files: a tar archive of `model_config.yaml` and a torch checkpoint, `model_weights.ckpt`.

Nothing is unpacked: the checkpoint is read where it lies in the archive. One that was saved in shards of a parallel
model is refused. Of the settings, which OmegaConf writes one to a line, indented, only plain numbers are looked for,
those of `_SETTINGS`; they become annotations. Source: NVIDIA/NeMo, core/connectors/save_restore_connector.py;
POSIX.1-1988 for the headers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from loraformat.containers import TensorFile, open_indexed
from loraformat.containers.torch_zip import index_checkpoint
from loraformat.errors import refuse
from loraformat.limits import MAX_ARCHIVE_MEMBERS, MAX_CONFIG_BYTES
from loraformat.signatures import HEAD_BYTES, describe_head
from loraformat.spans import InputFile

_BLOCK: Final = 512
_FIRST: Final = re.compile(rb"(?:\./)?(?:model_config\.yaml|model_weights\.ckpt|(?:mp|tp)_rank_\d+\w*/?)?\0")
"""How an archive of NeMo begins: with the name of its first member, which is often the folder `./`."""
_CHECKPOINT: Final = re.compile(r"(?:.*/)?model_weights\.ckpt")
_CONFIG: Final = re.compile(r"(?:.*/)?model_config\.yaml")
_LINE: Final = re.compile(r"( *)([A-Za-z_]\w*):(?: +([^\s#]+))? *(?:#.*)?")
_SETTINGS: Final = frozenset(
    {
        *("peft.lora_tuning.alpha", "peft.lora_tuning.adapter_dim", "hidden_size", "num_layers"),
        *("num_attention_heads", "num_query_groups", "kv_channels"),
    }
)
"""The settings that say what the tensors are, each by its path."""
PREFIX: Final = "nemo."
_REGULAR: Final = b"0\0"
_DIGITS: Final = re.compile(rb" *([0-7]+)[ \0]*")


@dataclass(frozen=True, slots=True)
class Nemo:
    """The container of NeMo 1."""

    name: str = "nemo"
    suffixes: tuple[str, ...] = (".nemo",)
    has_magic: bool = True

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Say whether the file begins with the name of a member that NeMo writes."""
        return size_bytes >= 2 * _BLOCK and head[:1] != b"\0" and _FIRST.match(head) is not None

    def open(self, path: Path | InputFile) -> TensorFile:
        """Check the archive's headers and the checkpoint in it; return its tensors.

        Raises:
            InputError: LF101, LF109, LF111, LF121, LF135, and those of `torch_zip`.
            RefusedError: LF110.
        """
        return open_indexed(path, _index)


CONTAINER: Final = Nemo()


class _Section(InputFile):
    """A part of an open file, read as if it were a file of its own."""

    def __init__(self, whole: InputFile, offset: int, length: int) -> None:
        self.path = whole.path
        self.size_bytes = length
        self._whole = whole
        self._offset = offset
        self.close = whole.close

    def read_into(self, buffer: memoryview | NDArray[Any], offset: int) -> None:
        """Fill `buffer` from `offset`; LF906 beyond the end."""
        length = buffer.nbytes
        if offset < 0 or offset + length > self.size_bytes:
            raise refuse("LF906", self.path, f"bytes {offset} to {offset + length}", f"{self.size_bytes} bytes")
        self._whole.read_into(buffer, self._offset + offset)


def _index(file: InputFile) -> TensorFile:
    if not file.size_bytes:
        raise refuse("LF101", file.path, "an empty file", "an archive of NeMo")
    head = file.read(0, min(HEAD_BYTES, file.size_bytes))
    if not CONTAINER.sniff(head, file.size_bytes):
        described = describe_head(head)
        found, mend = (described.what, described.mend) if described else ("a file of no known format", "")
        raise refuse("LF111" if described else "LF121", file.path, found, "an archive of NeMo", mend)
    members = list(_list_members(file))
    checkpoints = [member for member in members if _CHECKPOINT.fullmatch(member[0])]
    if len(checkpoints) != 1:
        names = ", ".join(name for name, _, _ in checkpoints[:4]) or "no model_weights.ckpt"
        raise refuse("LF135", file.path, names, "one model_weights.ckpt")
    _, offset, length = checkpoints[0]
    inner = index_checkpoint(_Section(file, offset, length))
    tensors = {name: tensor.moved(file, offset) for name, tensor in inner.tensors.items()}
    settings = [member for member in members if _CONFIG.fullmatch(member[0])][:1]
    read = {name: text for _, start, size in settings for name, text in _read_settings(file, start, size).items()}
    return TensorFile(file, tensors, {**inner.metadata, **read})


def _read_settings(file: InputFile, offset: int, length: int) -> dict[str, str]:
    """Return the settings that count, as they are written; a path that stands twice counts for nothing."""
    if length > MAX_CONFIG_BYTES:
        raise refuse("LF110", file.path, f"settings of {length} bytes", f"at most {MAX_CONFIG_BYTES}")
    found: dict[str, list[str]] = {}
    above: list[tuple[int, str]] = []
    for line in file.read(offset, length).decode("utf-8", "replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        indent = len(match[1])
        above = [parent for parent in above if parent[0] < indent]
        path = ".".join([*(name for _, name in above), match[2]])
        if match[3] is None:
            above.append((indent, match[2]))
        elif path in _SETTINGS:
            found.setdefault(path, []).append(match[3])
    return {f"{PREFIX}{path}": values[0] for path, values in found.items() if len(values) == 1}


def _list_members(file: InputFile) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and length of every regular file of the archive; raises LF109, LF110."""
    position = 0
    for _ in range(MAX_ARCHIVE_MEMBERS):
        if position + _BLOCK > file.size_bytes:
            return
        header = file.read(position, _BLOCK)
        if not header.strip(b"\0"):
            return
        length = _read_size(file, header, position)
        start = position + _BLOCK
        if length > file.size_bytes - start:
            raise refuse("LF109", f"{file.path}, byte {position}", f"a member of {length} bytes", "one inside the file")
        if header[156:157] in _REGULAR:
            yield _read_name(header), start, length
        position = start + -(-length // _BLOCK) * _BLOCK
    raise refuse("LF110", file.path, f"more than {MAX_ARCHIVE_MEMBERS} members", "a few")


def _read_size(file: InputFile, header: bytes, position: int) -> int:
    """Return the length that a header states; LF109 where its checksum is not that of its bytes."""
    stated = _DIGITS.fullmatch(header[148:156])
    counted = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if stated is None or int(stated[1], 8) != counted:
        raise refuse("LF109", f"{file.path}, byte {position}", "a header with a wrong checksum", "a header of tar")
    field = header[124:136]
    if field[0] & 0x80:  # GNU's form for more than 8 GB.
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = _DIGITS.fullmatch(field)
    if digits is None:
        raise refuse("LF109", f"{file.path}, byte {position}", f"the size {field!r}", "octal digits")
    return int(digits[1], 8)


def _read_name(header: bytes) -> str:
    name, prefix = (part.partition(b"\0")[0].decode("utf-8", "replace") for part in (header[:100], header[345:500]))
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name
