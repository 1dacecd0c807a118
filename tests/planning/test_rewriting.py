"""Outputs that are written anew: every number rounded once from the base's own form, and nothing lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from graphs import FORMS as NUMBER_FORMS
from graphs import dyadic, product, read_state, round_once, same_bits, write_state
from models import IN, MODULES, OUT, files_below, make_factors, write_adapter, write_base
from torch_zips import write_torch

NAMES = ("float64", "float32", "float16", "bfloat16")


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("own", NAMES)
def test_every_number_is_rounded_once(tmp_path: Path, own: str, wanted: str) -> None:
    """Merged ones from the sum, the others from the base's; whole numbers, scalars and tensors without any stay."""
    rng, form = np.random.default_rng(3), NUMBER_FORMS[own]
    state: dict[str, Any] = {
        f"{MODULES[0]}.weight": rng.standard_normal((OUT, IN)).astype(form),
        "other.weight": rng.standard_normal((7, 5)).astype(form),
        "norm.weight": rng.standard_normal(9).astype(form),
        "scale": np.array(1.37, form),
        "none.weight": np.zeros((0, 4), form),
        "steps": np.arange(6, dtype=np.int64),
    }
    base = write_state(tmp_path / "base.safetensors", state)
    adapter, out = write_adapter(tmp_path / "style", 1, MODULES[:1]), tmp_path / "out.safetensors"
    loraformat.merge(base, [adapter], out, dtype=wanted)
    found = read_state(out)
    work = np.float64 if "float64" in (own, wanted) else np.float32
    delta = product(make_factors(1, MODULES[:1])[MODULES[0]]).astype(work)
    for name, array in state.items():
        if name == "steps":
            assert same_bits(found[name], array)
            continue
        expected = array.astype(work) + delta if name == f"{MODULES[0]}.weight" else array.astype(work)
        rounded = round_once(np.asarray(expected, np.float64).reshape(-1), NUMBER_FORMS[wanted]).reshape(array.shape)
        assert same_bits(found[name], rounded), name
    assert loraformat.verify(out, base, [adapter]).problems == ()


@pytest.mark.parametrize("wanted", [None, "bfloat16", "float64"])
def test_views_of_a_torch_file_are_written_out(tmp_path: Path, wanted: str | None) -> None:
    """Turned, stepped and expanded tensors become whole ones of their own; into such none can be merged before."""
    rng = np.random.default_rng(9)
    held = {f"{MODULES[0]}.weight": dyadic(rng, OUT, IN), "held.weight": dyadic(rng, IN, OUT), "row": dyadic(rng, 4)}
    views = {
        f"{MODULES[1]}.weight": ("held.weight", (OUT, IN), (1, OUT)),
        "stepped.weight": ("held.weight", (3, 5), (2 * OUT, 2)),
        "expanded.weight": ("row", (3, 4), (0, 1)),
    }
    base, out = write_torch(tmp_path / "base.pt", held, views), tmp_path / "out.safetensors"
    adapter = write_adapter(tmp_path / "style", 1, MODULES[:1])
    options = {"dtype": wanted} if wanted else {}
    loraformat.merge(base, [adapter], out, to="safetensors", **options)
    form = NUMBER_FORMS[wanted or "float32"]
    expected = {
        **held,
        f"{MODULES[0]}.weight": held[f"{MODULES[0]}.weight"] + product(make_factors(1, MODULES[:1])[MODULES[0]]),
        f"{MODULES[1]}.weight": held["held.weight"].T,
        "stepped.weight": held["held.weight"][:5:2, :10:2],
        "expanded.weight": np.stack([held["row"]] * 3),
    }
    found = read_state(out)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        rounded = round_once(np.ascontiguousarray(array, np.float64).reshape(-1), form).reshape(array.shape)
        assert same_bits(found[name], rounded), name
    assert loraformat.verify(out, base, [adapter]).problems == ()
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [write_adapter(tmp_path / "both")], tmp_path / "no.safetensors", to="safetensors")
    assert caught.value.codes == ("LF150",)


def test_an_overflow_leaves_nothing(tmp_path: Path) -> None:
    """Of a tensor that nothing is merged into, too."""
    state = {f"{MODULES[0]}.weight": dyadic(np.random.default_rng(1), OUT, IN).astype(NUMBER_FORMS["bfloat16"])}
    state["norm.weight"] = np.full(9, 1e6, NUMBER_FORMS["bfloat16"])
    base = write_state(tmp_path / "base.safetensors", state)
    adapter = write_adapter(tmp_path / "style", 1, MODULES[:1])
    before = files_below(tmp_path)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "out.safetensors", dtype="float16")
    assert caught.value.codes == ("LF503",)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("jobs", [2, 5])
def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path, jobs: int) -> None:
    base, adapter = write_base(tmp_path / "in", "torch folder"), write_adapter(tmp_path / "style")
    loraformat.merge(base, [adapter], tmp_path / "one", dtype="bfloat16", to="safetensors", jobs=1)
    loraformat.merge(base, [adapter], tmp_path / "more", dtype="bfloat16", to="safetensors", jobs=jobs)
    assert files_below(tmp_path / "one") == files_below(tmp_path / "more")
    assert '"dtype": "bfloat16"' in (tmp_path / "one" / "config.json").read_text()
