"""A Hugging Face model folder with safetensors weights, of transformers or diffusers."""

from typing import Final

from loraformat.bases._folder import FolderFormat
from loraformat.containers.safetensors import CONTAINER

BASE: Final = FolderFormat("safetensors folder", ("model", "diffusion_pytorch_model"), ".safetensors", CONTAINER)
