"""What callers hand over by mistake: no option and no empty list is left aside in silence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loraformat
from graphs import linear_net
from loraformat import runtime
from models import make_state, make_weights, write_adapter, write_base


def make_model() -> Any:
    return linear_net(make_weights()).model()


CALLS: dict[str, Callable[..., Any]] = {
    "plan_merge": lambda base, adapter, out, **o: loraformat.plan_merge(base, adapter, out, **o),
    "merge": lambda base, adapter, out, **o: loraformat.merge(base, adapter, out, **o),
    "merge_each": lambda base, adapter, out, **o: loraformat.merge_each(base, adapter, out, **o),
    "merge_into": lambda base, adapter, out, **o: loraformat.merge_into(base, adapter, **o),
    "merge_state_dict": lambda base, adapter, out, **o: loraformat.merge_state_dict(make_state(), adapter, **o),
    "merge_model": lambda base, adapter, out, **o: loraformat.merge_model(make_model(), adapter, **o),
}
OTHERS: dict[str, Callable[..., Any]] = {
    "verify": lambda base, adapter, out, **o: loraformat.verify(base, base, adapter, **o),
    "unmerge": lambda base, adapter, out, **o: loraformat.unmerge(base, out, adapters=adapter, **o),
    "resolve_targets": lambda base, adapter, out, **o: loraformat.resolve_targets(base, adapter, **o),
    "session": lambda base, adapter, out, **o: runtime.session(base, adapter, **o),
    "export_runtime": lambda base, adapter, out, **o: runtime.export_runtime(base, adapter, out, **o),
    "export_adapter": lambda base, adapter, out, **o: runtime.export_adapter(base, adapter, out, **o),
    "adapter_feeds": lambda base, adapter, out, **o: runtime.adapter_feeds(base, adapter, **o),
}


@pytest.mark.parametrize("name", CALLS | OTHERS)
def test_an_option_that_there_is_not(tmp_path: Path, name: str) -> None:
    base, adapter = write_base(tmp_path, "safetensors"), write_adapter(tmp_path / "style")
    with pytest.raises(
        TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'alhpa'; did you mean 'alpha'"
    ):
        (CALLS | OTHERS)[name](base, adapter, tmp_path / "out", alhpa=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "style"]


@pytest.mark.parametrize("name", CALLS)
def test_no_adapters(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path, "safetensors")
    before = base.read_bytes()
    with pytest.raises(loraformat.FindingError, match="no adapter to merge"):
        CALLS[name](base, [], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]
    assert base.read_bytes() == before
