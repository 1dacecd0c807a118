"""What a model with run-time inputs says about them, in its own annotations: all that an adapter for it must know."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loraformat.bases._onnx.branchable import BranchableGraph
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.errors import refuse
from loraformat.receipt import RUNTIME_KEY
from loraformat.strict_json import JsonValue, parse_json_object, write_canonical

_VERSION: Final = 1
_FORMS: Final = frozenset({"linear", "embedding", "conv"})


@dataclass(frozen=True, slots=True)
class Layout:
    """Two inputs of a model, A and B, whose product is added to what a module makes.

    `linear` and `embedding`: A `(width, rank)`, B `(rank, out)`. `conv`: A `(rank, width, *kernel)`, B
    `(out, rank, 1 ...)`.

    Attributes:
        name: what both inputs are called before their roles.
        form: which of the three.
        dtype: number form of both.
        width: the module's `in`; of an embedding the size of the vocabulary.
        out: the module's `out`; where several are packed into one node, that of all.
        kernel: sizes of a convolution's kernel; empty otherwise.
        marks: names of values that only the nodes beside the branch make; several where a module is applied several
            times.
        members: where several modules are packed into one node, the columns of each: first and last, the latter
            excluded.
    """

    name: str
    form: str
    dtype: Dtype
    width: int
    out: int
    kernel: tuple[int, ...] = ()
    marks: tuple[str, ...] = ()
    members: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def down(self) -> str:
        """The input A."""
        return f"{self.name}.lora_A.weight"

    @property
    def up(self) -> str:
        """The input B."""
        return f"{self.name}.lora_B.weight"

    def list_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B."""
        if self.form == "conv":
            return (rank, self.width, *self.kernel), (self.out, rank, *(1 for _ in self.kernel))
        return (self.width, rank), (rank, self.out)

    def as_json(self) -> dict[str, JsonValue]:
        """Return the record for the annotation and for `--json`."""
        return {
            "name": self.name,
            "form": self.form,
            "dtype": self.dtype.name,
            "in": self.width,
            "out": self.out,
            "kernel": list(self.kernel),
            "marks": list(self.marks),
            "members": {name: list(columns) for name, columns in self.members.items()},
        }


@dataclass(frozen=True, slots=True)
class RuntimeInputs:
    """All of a model.

    Attributes:
        batched: how many adapters the rows of a batch choose from; 0 where all rows have one.
        layouts: the pairs of inputs, sorted by name.
    """

    batched: int
    layouts: tuple[Layout, ...]

    @property
    def slots(self) -> int:
        """How many adapters are stacked, with the last one, which does nothing; 0 for one that is not stacked."""
        return self.batched + 1 if self.batched else 0

    def by_mark(self) -> Mapping[str, Layout]:
        """Return the layouts by the marks of their nodes."""
        return {mark: layout for layout in self.layouts for mark in layout.marks}

    def as_json(self) -> dict[str, JsonValue]:
        """Return the record for the annotation and for `--json`."""
        return {"version": _VERSION, "batched": self.batched, "branches": [each.as_json() for each in self.layouts]}

    def as_text(self) -> str:
        """Return the annotation."""
        return write_canonical(self.as_json()).decode()


def read_inputs(model: BranchableGraph) -> RuntimeInputs:
    """Return what a model says about its run-time inputs.

    Raises:
        FindingError: LF823 it has none.
        InputError: LF104, LF827 the annotation is not sound.
    """
    text = model.read_metadata(RUNTIME_KEY)
    if text is None:
        raise refuse("LF823", model.path, f"no annotation {RUNTIME_KEY!r}", "a model that export-runtime has made")
    record = parse_json_object(text.encode(), f"{model.path}: {RUNTIME_KEY}")
    try:
        if record["version"] != _VERSION:
            raise ValueError(f"version {record['version']!r:.20}, not {_VERSION}")
        return RuntimeInputs(_read_count(record, "batched"), tuple(_read_layout(each) for each in record["branches"]))  # type: ignore[union-attr]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"no member {error}" if isinstance(error, KeyError) else str(error)
        raise refuse("LF827", f"{model.path}: {RUNTIME_KEY}", found, "what export-runtime writes") from error


def _read_layout(record: Any) -> Layout:
    if record["form"] not in _FORMS or not isinstance(record["name"], str):
        raise ValueError(f"a branch {record['name']!r:.80} of the form {record['form']!r:.20}")
    return Layout(
        record["name"],
        record["form"],
        BY_NAME[record["dtype"]],
        _read_count(record, "in"),
        _read_count(record, "out"),
        tuple(_check_count(size, "kernel") for size in record["kernel"]),
        tuple(str(mark) for mark in record["marks"]),
        {str(name): _read_columns(columns) for name, columns in record["members"].items()},
    )


def _read_columns(columns: Any) -> tuple[int, int]:
    start, stop = (_check_count(each, "columns") for each in columns)
    return start, stop


def _read_count(record: Any, name: str) -> int:
    return _check_count(record[name], name)


def _check_count(value: object, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(f"{name} is {value!r:.40}")
    return value
