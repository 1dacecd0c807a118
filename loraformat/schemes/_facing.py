"""Which way round factors of two axes lie: A `(rank, in)` and B `(out, rank)`, or A `(in, rank)` and B `(rank, out)`.

Several frameworks call both `lora_A` and `lora_B`. Shapes tell them apart where one pair fits in one way alone; a rank
is never larger than what it is the rank of, which decides between weights that are square.
"""

from collections.abc import Iterator, Mapping

from loraformat.adapter import Factor

Pair = tuple[tuple[int, int], tuple[int, int]]


def list_pairs(tensors: Mapping[str, Factor], down: str = ".lora_A", up: str = ".lora_B") -> Iterator[Pair]:
    """Yield the shapes of A and B of every module that has both, of two axes each."""
    for key, factor in tensors.items():
        other = tensors.get(f"{key.removesuffix(down)}{up}") if key.endswith(down) else None
        if other is not None and len(factor.shape) == len(other.shape) == 2:
            (one, two), (three, four) = factor.shape, other.shape
            yield (one, two), (three, four)


def are_transposed(tensors: Mapping[str, Factor], down: str = ".lora_A", up: str = ".lora_B") -> bool:
    """Say whether the factors can only be A `(in, rank)` and B `(rank, out)`."""
    pairs = list(list_pairs(tensors, down, up))
    fitting = all(a[1] == b[0] and a[1] <= a[0] for a, b in pairs)
    return bool(pairs) and fitting and any(a[0] != b[1] or a[0] > a[1] for a, b in pairs)
