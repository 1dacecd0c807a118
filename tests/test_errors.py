import copy
import pickle

import pytest

from loraformat.errors import FindingError, InputError, LoraformatError, OutputError, RefusedError, error_for, refuse
from loraformat.problems import Problem
from loraformat.reasons import all_reasons

CLASSES = {1: FindingError, 3: InputError, 4: RefusedError, 5: OutputError}


@pytest.mark.parametrize("code", all_reasons())
def test_the_code_decides_the_class(code: str) -> None:
    error = refuse(code, "where", "found", "expected", "mend")
    assert type(error) is CLASSES[all_reasons()[code].exit]
    assert error.exit_code == all_reasons()[code].exit
    assert error.problems == (Problem(code, "where", "found", "expected", "mend"),)


def test_the_gravest_reason_decides() -> None:
    codes = ["LF401", "LF905", "LF101", "LF604"]
    for count, expected in ((1, FindingError), (2, RefusedError), (3, RefusedError), (4, OutputError)):
        error = error_for(Problem(code, "x", "y") for code in codes[:count])
        assert type(error) is expected
        assert error.codes == tuple(codes[:count])


def test_the_message_holds_every_problem() -> None:
    problems = [Problem("LF101", "one", "a"), Problem("LF102", "two", "b")]
    assert str(error_for(problems)) == f"{problems[0]}\n{problems[1]}"


def test_all_are_one_family() -> None:
    assert {cls.exit_code for cls in CLASSES.values()} == set(CLASSES)
    assert all(issubclass(cls, LoraformatError) for cls in CLASSES.values())


@pytest.mark.parametrize("code", ["LF401", "LF101", "LF905", "LF604"])
def test_errors_travel_between_processes(code: str) -> None:
    error = error_for([Problem(code, "x", "y"), Problem("LF401", "z", "w", severity="note")])
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert again.problems == error.problems
        assert str(again) == str(error)


def test_a_path_may_say_where(tmp_path: object) -> None:
    assert refuse("LF100", tmp_path, "nothing").problems[0].where == str(tmp_path)


def test_an_error_without_a_problem_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="empty"):
        error_for([])
