import ast
import inspect
from pathlib import Path

import pytest
import safetensors

from loraformat import limits

CAPS = {name: value for name, value in vars(limits).items() if name.isupper()}


def test_every_cap_says_why() -> None:
    body = ast.parse(Path(inspect.getfile(limits)).read_text(encoding="utf-8")).body
    named = [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    assert named == list(CAPS)
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            explained = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert explained or isinstance(following, ast.AnnAssign), ast.unparse(node)


@pytest.mark.parametrize("name", CAPS)
def test_caps_are_positive_numbers(name: str) -> None:
    assert type(CAPS[name]) in (int, float)
    assert CAPS[name] > 0
    assert isinstance(CAPS[name], int) or CAPS[name] < 1


def test_our_header_cap_is_the_librarys() -> None:
    cap = limits.MAX_SAFETENSORS_HEADER_BYTES
    with pytest.raises(safetensors.SafetensorError, match="invalid header length"):
        safetensors.deserialize(cap.to_bytes(8, "little") + b"{}")
    with pytest.raises(safetensors.SafetensorError, match="too large"):
        safetensors.deserialize((cap + 1).to_bytes(8, "little") + b"{}")


def test_the_caps_fit_each_other() -> None:
    assert limits.RETAINED_REFUSE < limits.RETAINED_WARN
    assert limits.TILE_BYTES < limits.COPY_CHUNK_BYTES
    assert limits.TILE_BYTES < limits.DEFAULT_MEMORY_BYTES
    assert limits.MAX_METADATA_BYTES < limits.MAX_SAFETENSORS_HEADER_BYTES
    assert limits.MAX_SKELETON_BYTES < 2**31
    assert 10**limits.MAX_JSON_INTEGER_DIGITS > 2**64
