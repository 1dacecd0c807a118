"""A state dict in one file as a new safetensors file."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from loraformat.bases import NewContents
from loraformat.bases._rewriting import FORMAT, list_output, warn_of_config
from loraformat.containers._safetensors_images import describe_rewritten, escape_for_header
from loraformat.images import FileImage, NewOutput, OutputTensor
from loraformat.problems import Problem
from loraformat.receipt import RECEIPT_KEY
from loraformat.spans import StoredTensor
from loraformat.strict_json import JsonValue


class FileRewriter:
    """Describes one safetensors file; the attributes are those of `Rewriter`.

    Args:
        path: the base's file.
        tensors: its tensors.
        metadata: text annotations of the output.
        config: the `config.json` beside the base, empty where there is none.
        problems: what the output leaves out.
        gone: names of tensors that it lacks.
    """

    format = FORMAT
    suffix = ".safetensors"
    folder_mark = ""

    def __init__(
        self,
        path: Path,
        tensors: Collection[StoredTensor],
        metadata: Mapping[str, str],
        config: Mapping[str, JsonValue],
        problems: Sequence[Problem] = (),
        gone: Collection[str] = (),
    ) -> None:
        self._path = path
        self._metadata = metadata
        self._tensors, notes = list_output(tensors, config, gone)
        self.problems: Sequence[Problem] = [*problems, *notes]

    def output_tensors(self) -> list[OutputTensor]:
        """Return the tensors of the base as they stand."""
        return list(self._tensors)

    def describe_rewritten(self, output: NewOutput, contents: NewContents) -> list[FileImage]:
        """Return the one output file, the receipt's blank in its header."""
        return [describe_rewritten(output.path, contents.tensors, self._metadata, RECEIPT_KEY, output.blank_bytes)]

    def check_config(self, config_changes: Mapping[str, JsonValue]) -> list[Problem]:
        """Return a warning: a single file has no configuration."""
        return warn_of_config(self._path, config_changes)

    def encode_receipt(self, text: str) -> bytes:
        """Return `text` as it stands inside a JSON string of the header."""
        return escape_for_header(text)
