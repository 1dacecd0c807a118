"""A PyTorch state dict as torch.save writes it (`.bin`, `.pt`, `.pth`, `.ckpt`), alone or inside a trainer's."""

from typing import Final

from loraformat.bases._zip_file import ZipFormat
from loraformat.containers.torch_zip import CONTAINER, list_crc_fields

BASE: Final = ZipFormat("torch", CONTAINER.suffixes, CONTAINER, list_crc_fields, {"format": "pt"})
