"""How an output is finished once all of its numbers are written."""

from collections.abc import Mapping, Sequence

from loraformat.files import write_at
from loraformat.images import FileImage
from loraformat.spans import Span


class Checksums:
    """Checksums of a base's outputs: none, where the base does not say how they are computed."""

    def compute_checksums(
        self, image: FileImage, descriptor: int, touched: Sequence[Span], jobs: int = 1
    ) -> Mapping[int, bytes]:
        """Return nothing; see `BaseModel.compute_checksums`."""
        return {}

    def finish_output(self, image: FileImage, descriptor: int, touched: Sequence[Span], jobs: int = 1) -> None:
        """Write the checksums to their offsets."""
        for offset, checksum in self.compute_checksums(image, descriptor, touched, jobs).items():
            write_at(descriptor, checksum, offset)
