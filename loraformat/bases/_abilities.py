"""What some bases can besides: share their data, copy a weight for some readers, stand in floats, be measured."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from loraformat.bases._model import BaseModel, Weight
from loraformat.dtypes import Dtype
from loraformat.images import FileImage, NewOutput
from loraformat.problems import Problem
from loraformat.spans import InputFile, Span
from loraformat.strict_json import JsonValue


@runtime_checkable
class ToldBase(Protocol):
    """A base beside which no configuration lies, but who opened it told it: a state dict in memory."""

    def tell_config(self) -> Mapping[str, JsonValue]:
        """Return the model's configuration, empty where none was told."""
        ...


class OutputForm(Protocol):
    """What an output is; the attributes are those of `BaseModel`."""

    suffix: str
    folder_mark: str

    def encode_receipt(self, text: str) -> bytes:
        """Return the bytes that put `text` into a blank."""
        ...


@runtime_checkable
class SharedBase(Protocol):
    """A base beside which another model can stand that refers to its data files, where most of its numbers are."""

    @property
    def sharing_form(self) -> OutputForm:
        """What that model is."""
        ...

    def describe_sharing_images(self, output: NewOutput, touched: Sequence[Span]) -> list[FileImage]:
        """Return the files that such a model adds, the one with the receipt last.

        Args:
            output: the model, in the folder of this one.
            touched: the bytes that differ, those of whole tensors.
        """
        ...

    def find_sharers(self, files: Set[Path]) -> list[Path]:
        """Return other models beside it that have numbers in some of its files."""
        ...

    def list_shared(self) -> Mapping[str, InputFile]:
        """Return the data files by their paths from the model's folder; none for a base without."""
        ...


@runtime_checkable
class DataFileBase(Protocol):
    """A folder of ONNX graphs: readers of ONNX refuse data files that have several names."""

    def list_data_files(self) -> Set[Path]:
        """Return the files that only have numbers of graphs in them."""
        ...


@dataclass(frozen=True, slots=True)
class WeightCopy:
    """A weight that some of its sites get for themselves.

    Attributes:
        name: of the new tensor.
        key: of the weight.
        readers: ids of the sites.
        roles: what of its scales and zero points they get too; `name_companion` says under which names.
    """

    name: str
    key: str
    readers: tuple[str, ...]
    roles: tuple[str, ...] = ()


def name_companion(name: str, role: str) -> str:
    """Return the name of scales or zero points that go with a copy of a weight of this name."""
    return f"{name}_{role}"


@runtime_checkable
class CopyingBase(BaseModel, Protocol):
    """A base in which some sites of a weight can get a copy of it: an ONNX graph."""

    def with_copies(self, copies: Sequence[WeightCopy]) -> "CopyingBase":
        """Return the base, whose outputs have these copies, to be filled at `FileImage.locate_fresh(name)`."""
        ...


@dataclass(frozen=True, slots=True)
class AddedBias:
    """A bias that a module is given.

    Attributes:
        name: of its tensor.
        rows: its numbers.
        dtype: number form.
        beside: ids of the sites of the module's weight.
    """

    name: str
    rows: int
    dtype: Dtype
    beside: tuple[str, ...]


@runtime_checkable
class BiasableBase(BaseModel, Protocol):
    """A base in which what applies a weight can be given a bias: an ONNX graph. Its sites say where (`FreeBias`)."""

    def with_biases(self, biases: Sequence[AddedBias]) -> "BiasableBase":
        """Return the base, whose outputs have these biases, to be filled at `FileImage.locate_fresh(name)`."""
        ...


@runtime_checkable
class RunnableBase(CopyingBase, Protocol):
    """A base that onnxruntime can run with changes beside its weights: one ONNX graph."""

    def rewire(self, graph: Any, tensors: Set[str]) -> Mapping[str, str]:
        """Have the main graph of the parsed base read the copies, each an Identity of its source; to run it.

        Biases that it is given are Constants of zeros.
        Operators on codes that read `tensors` compute in floats, and round as they did. Returns the values with the
        floats of codes that nothing reads any more but what makes these, by the codes' names.
        """
        ...


@dataclass(frozen=True, slots=True)
class WeightFloats:
    """A quantised weight that becomes a tensor of floats.

    Attributes:
        name: of the new tensor, or of the copy that it is of.
        key: of the weight.
        readers: ids of the sites that get it; none for all that read the codes.
    """

    name: str
    key: str
    readers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FloatForm:
    """How a quantised weight stands where it has become a tensor of floats.

    Attributes:
        name: the tensor's name.
        dtype: number form, that of the scales.
        shape: dimensions.
        turned: whether it is the transpose of the matrix of codes.
        padding: columns at the end of each row of codes that it lacks.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    turned: bool
    padding: int


@runtime_checkable
class DequantisingBase(BaseModel, Protocol):
    """A base in which floats can stand in the place of codes: an ONNX graph, whose operators change with them.

    Or a checkpoint: then its output is written anew, and all its quantised weights stand in floats.
    """

    def find_float_form(self, wanted: WeightFloats) -> FloatForm | Problem:
        """Return how a quantised weight would stand in floats, or why it cannot (LF619)."""
        ...

    def list_joint_floats(self, keys: Set[str]) -> Sequence[Weight | Problem]:
        """Return the weights that are to stand in floats whether they change or not, or why one cannot (LF470).

        Args:
            keys: of the weights that change.
        """
        ...

    def tell_floats(self) -> Mapping[str, JsonValue]:
        """Return the members of `config.json` that change with them; None for one that goes."""
        ...

    def with_floats(self, floats: Sequence[WeightFloats]) -> "DequantisingBase":
        """Return the base, whose outputs have these weights in floats, to be filled at `FileImage.locate_fresh`."""
        ...


@runtime_checkable
class LayeredBase(BaseModel, Protocol):
    """A base whose numbered layers can stand in another order, or several times: a checkpoint, which is written anew.

    Attributes:
        sources: of each layer of the output, which of the base's it is; empty where they stand as they are stored.
    """

    sources: Sequence[int]

    def count_layers(self) -> int | Problem:
        """Return how many layers there are, or why they cannot be repeated (LF245)."""
        ...

    def is_repeated(self, sources: Sequence[int]) -> bool:
        """Say whether the layers, as many as there are sources, are already equal where these are."""
        ...

    def tell_layers(self) -> Mapping[str, JsonValue]:
        """Return the members of `config.json` that follow from where the layers stand."""
        ...

    def with_layers(self, sources: Sequence[int]) -> "LayeredBase":
        """Return the base with its layers as `sources` says."""
        ...


@dataclass(frozen=True, slots=True)
class MeasuredValue:
    """A value whose range is to be measured.

    Attributes:
        name: the value's.
        scale: the name of the scale that stands for the range; several values may have one.
    """

    name: str
    scale: str


class MeasurableGraph(BaseModel, Protocol):
    """A graph whose activations can be measured."""

    def float_activations(self, graph: Any) -> Sequence[MeasuredValue]:
        """Have the main graph of the parsed base leave activations in floats; return whose ranges count."""
        ...


@runtime_checkable
class CalibratedBase(BaseModel, Protocol):
    """A base that may have ranges of activations as numbers: an ONNX graph, or a folder of them.

    A range is known by the name of the scale that stands for it.
    """

    def list_measurable(self) -> Mapping[str, MeasurableGraph]:
        """Return the graphs with such ranges by what marks their scales' names in the base: nothing for one graph."""
        ...

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]] | None) -> Sequence[Problem]:
        """Return what speaks against giving the base these ranges (LF627); None stands for any."""
        ...

    def with_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> "CalibratedBase":
        """Return the base, whose outputs have scales, zero points and biases of these ranges."""
        ...
