"""What loraformat raises.

    LoraformatError             everything that this package raises on purpose; carries `problems`
    ├── FindingError            the adapter and the base do not fit, or the numbers do not hold       exit 1
    ├── InputError              a file cannot be read as what it claims to be                         exit 3
    ├── RefusedError            refused for safety: overwriting, paths, limits                        exit 4
    └── OutputError             the output could not be written: space, permission                    exit 5

Every problem has a reason code (`spec/reasons.toml`), and the code decides the class:

    try:
        loraformat.merge("base.onnx", ["adapter.safetensors"])
    except loraformat.LoraformatError as error:
        for problem in error.problems:
            print(problem.code, problem.where)
"""

from collections.abc import Iterable
from typing import ClassVar, Self

from loraformat.problems import Problem
from loraformat.reasons import EXIT_FINDING, EXIT_INPUT, EXIT_OUTPUT, EXIT_REFUSED, find_reason


class LoraformatError(Exception):
    """Base of all errors of this package.

    Attributes:
        problems: what is wrong, at least one.
        exit_code: what a command that ends with this error exits with.
    """

    exit_code: ClassVar[int] = EXIT_FINDING

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Problem, ...]]]:
        """Pickle from the problems; the default would hand the message to the constructor."""
        return type(self), (self.problems,)

    @property
    def codes(self) -> tuple[str, ...]:
        """The reason codes, in the order of the problems."""
        return tuple(problem.code for problem in self.problems)


class FindingError(LoraformatError):
    """The adapter and the base do not fit, or the numbers do not hold."""

    exit_code = EXIT_FINDING


class InputError(LoraformatError):
    """A file cannot be read as what it claims to be."""

    exit_code = EXIT_INPUT


class RefusedError(LoraformatError):
    """Refused for safety."""

    exit_code = EXIT_REFUSED


class OutputError(LoraformatError):
    """The output could not be written."""

    exit_code = EXIT_OUTPUT


_BY_EXIT = {cls.exit_code: cls for cls in (FindingError, InputError, RefusedError, OutputError)}


def error_for(problems: Iterable[Problem]) -> LoraformatError:
    """Return the error for `problems`; the gravest reason (highest exit code) decides the class."""
    listed = tuple(problems)
    return _BY_EXIT[max(find_reason(problem.code).exit for problem in listed)](listed)


def refuse(code: str, where: object, found: str, expected: str = "", mend: str = "") -> LoraformatError:
    """Return the error for one problem; the caller raises it."""
    return error_for([Problem(code, str(where), found, expected, mend)])
