"""A state dict as numpy.savez writes it."""

from typing import Final

from loraformat.bases._zip_file import ZipFormat
from loraformat.containers.npz import CONTAINER, list_crc_fields

BASE: Final = ZipFormat("npz", CONTAINER.suffixes, CONTAINER, list_crc_fields, {})
