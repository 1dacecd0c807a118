"""What holds codes with scales and zero points, of one width: an encoding, by the numbers of its forms."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding
from loraformat.encodings._affine import Layout, bind_affine


@dataclass(frozen=True, slots=True)
class AffineCodes:
    """Codes of one width.

    Attributes:
        name: the encoding's.
        bits: of a code.
        layouts: by the name of the stored form, how its codes count.
        is_read_only: whether nothing encodes them.
    """

    name: str
    bits: int
    layouts: Mapping[str, Layout] = field(repr=False, hash=False)
    is_read_only: bool = False

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight."""
        return bind_affine(coding, self.layouts[form.name])
