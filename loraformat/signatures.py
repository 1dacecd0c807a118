"""What a file is by its first bytes, for messages: people hand us pointers, pages and pickles."""

import re
from dataclasses import dataclass
from typing import Final

HEAD_BYTES: Final = 64
_TEXT_BYTES: Final = 8
_PRINTABLE: Final = re.compile(rb"[\t\n\r\x20-\x7e]+")
_FETCH_AGAIN: Final = "If a download gave this in the place of the file, fetch it again."
ZIP_MAGIC: Final = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Signature:
    """A known beginning.

    Attributes:
        magic: the first bytes.
        what: what such a file is.
        mend: what to do about it; empty for the reason code's own advice.
        at: where these bytes stand, if not first.
    """

    magic: bytes
    what: str
    mend: str = ""
    at: int = 0


_UNPACK: Final = "Unpack it, and give what is in it: the folder of the adapter or model, or its file."
_CONVERT: Final = (
    "Pickles can run code and are not read. Save it as safetensors where it was made, or as torch's zip format: "
    "python -c \"import sys, torch; torch.save(torch.load(sys.argv[1], map_location='cpu', weights_only=True), "
    'sys.argv[2])" OLD NEW'
)

_NAMED: Final = "An adapter of KerasHub (.lora.h5) is read as it is. Of anything else save the arrays as safetensors."

_SIGNATURES: Final = (
    Signature(b"version https://git-lfs", "a git-LFS pointer, not the file itself", "Fetch the file: git lfs pull"),
    Signature(ZIP_MAGIC, "a zip archive", f"If torch or numpy wrote it, name it .pt or .npz. Else: {_UNPACK}"),
    Signature(b"\x80\x02", "a Python pickle", _CONVERT),
    Signature(b"\x80\x03", "a Python pickle", _CONVERT),
    Signature(b"\x80\x04", "a Python pickle", _CONVERT),
    Signature(b"\x80\x05", "a Python pickle", _CONVERT),
    Signature(b"GGUF", "a GGUF file", "It holds an adapter: give it as one, and as the base a model."),
    Signature(b"<!DOCTYPE", "an HTML page", "The download gave an error page: fetch the file again."),
    Signature(b"<!doctype", "an HTML page", "The download gave an error page: fetch the file again."),
    Signature(b"<html", "an HTML page", "The download gave an error page: fetch the file again."),
    Signature(b"\x1f\x8b", "a gzip archive", _UNPACK),
    Signature(b"\x89HDF\r\n\x1a\n", "an HDF5 file", _NAMED),
    Signature(b"\x93NUMPY", "one array without a name", "Save the arrays by name, as safetensors or .npz."),
    Signature(
        b"TFL3",
        "a graph of LiteRT (TensorFlow Lite), as MediaPipe has adapters",
        "It is compiled for a phone. Give the PEFT folder that it was converted from.",
        at=4,
    ),
    Signature(
        b"ORTM",
        "a model in onnxruntime's own format, which is optimised for one machine",
        "Merge into the .onnx model that it was made from, and convert the merged one: "
        "python -m onnxruntime.tools.convert_onnx_models_to_ort merged.onnx",
        at=4,
    ),
    Signature(b"{", "JSON text", "Name the file with the tensors, or its folder."),
)


_ONNX_TEXT: Final = re.compile(rb"(?:<\s*)?ir_version\s*:|\{\s*\"ir_?[vV]ersion\"\s*:")
_AS_TEXT: Final = Signature(
    b"",
    "an ONNX model written as text",
    "Write it as protobuf, which loses nothing: onnx.save(onnx.load(P, format=F), 'model.onnx'), where F is "
    "textproto, json or onnxtxt.",
)


def describe_head(head: bytes) -> Signature | None:
    """Return what a file that starts with `head` is, None when it is none of these."""
    text = head.lstrip()
    if _ONNX_TEXT.match(text):
        return _AS_TEXT
    return next((known for known in _SIGNATURES if known.magic in (_cut(head, known), _cut(text, known))), None)


def _cut(head: bytes, known: Signature) -> bytes:
    return head[known.at : known.at + len(known.magic)]


def describe_text(head: bytes) -> Signature | None:
    """Return what `describe_head` does, and text where it is that: downloads that fail leave a line of it."""
    known = describe_head(head)
    if known is not None or len(head) < _TEXT_BYTES or not _PRINTABLE.fullmatch(head):
        return known
    line = head.decode("ascii").splitlines()[0]
    return Signature(head, f"text, which begins with {line!r}", _FETCH_AGAIN)
