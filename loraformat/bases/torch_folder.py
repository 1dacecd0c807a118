"""A Hugging Face model folder with weights as torch.save writes them; safetensors, where there are any, go first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraformat.bases._folder import FolderFormat
from loraformat.bases.checkpoint_folder import BASE as SAFETENSORS_FOLDER
from loraformat.containers.torch_zip import CONTAINER, list_crc_fields


@dataclass(frozen=True, slots=True)
class TorchFolderFormat(FolderFormat):
    """The base format of model folders whose only weights are torch's."""

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise a folder without safetensors weights, as transformers chooses between the two."""
        return FolderFormat.accepts(self, path, head, size_bytes) and SAFETENSORS_FOLDER.find_entry(path) is None


BASE: Final = TorchFolderFormat(
    "torch folder", ("pytorch_model", "diffusion_pytorch_model"), ".bin", CONTAINER, list_crc_fields
)
