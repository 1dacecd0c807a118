"""Random numbers that follow from a seed and a name alone, whatever else was drawn before and in whatever order."""

import hashlib

import numpy as np


def generator(purpose: str, seed: int, name: str) -> np.random.Generator:
    """Return a generator of its own for `name`: numpy's Philox, keyed with SHA-256 of purpose, seed and name.

    The bits are the same on every platform. The normal numbers made of them are those of numpy's ziggurat method.
    """
    digest = hashlib.sha256(f"{purpose}\n{seed}\n{name}".encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
