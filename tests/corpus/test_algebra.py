"""The algebra on real adapters: against dense matrices, and against what must hold of any."""

import os
from pathlib import Path

import numpy as np
import pytest

import loraformat
from algebra.adapters import delta_of, distance
from loraformat.adapter import Adapter

CORPUS = Path(os.environ.get("LORAFORMAT_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))
if not CORPUS.is_dir():
    pytest.skip(f"no folder {CORPUS}; LORAFORMAT_CORPUS names another", allow_module_level=True)

TRAINED = ["Tashu014__lora-imdb-distilbert", "abrhaleyarefaine1997__gpt2-tigrinya-lora", "guilhermmeabreu__lab_08"]


@pytest.fixture(params=TRAINED)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return loraformat.load(CORPUS / request.param)


def loras(adapter: Adapter) -> dict[str, loraformat.Target]:
    return {target.name: target for target in adapter.targets if target.kind == "lora"}


def test_trained_changes_fall_off_and_are_cut_well(adapter: Adapter) -> None:
    reductions: list[loraformat.Reduction] = []
    made = loraformat.resize(adapter, 2, report=reductions.append)
    assert [reduction.target for reduction in reductions] == list(loras(adapter))
    for reduction in reductions[::7]:
        dense, found = (delta_of(loras(each)[reduction.target]) for each in (adapter, made))
        wide = dense if dense.shape[0] < dense.shape[1] else dense.T
        _, directions = np.linalg.eigh(wide @ wide.T)
        strongest = directions[:, -2:]  # Singular vectors; those of the largest values come last.
        cut = strongest @ (strongest.T @ wide)
        assert distance(found, cut if wide is dense else cut.T) < 1e-5
        assert reduction.error == pytest.approx(distance(found, dense), rel=1e-4)


def test_halves_make_a_whole(adapter: Adapter) -> None:
    assert loraformat.diff(0.5 * adapter + 0.5 * adapter, adapter).is_same
    back = loraformat.compose([(adapter, 2.0), (adapter, -1.0)], max_error=1e-6)
    assert loraformat.diff(back, adapter).relative < 1e-6
    assert all(target.rank <= loras(adapter)[name].rank for name, target in loras(back).items())


def test_adapters_of_different_models_are_refused() -> None:
    with pytest.raises(loraformat.FindingError) as caught:
        loraformat.compose([CORPUS / TRAINED[0], CORPUS / TRAINED[1]])
    assert set(caught.value.codes) == {"LF701"}


def test_it_is_saved_and_read_again(adapter: Adapter, tmp_path: Path) -> None:
    made = loraformat.load(loraformat.save(adapter - 0.25 * adapter, tmp_path / "made.safetensors"))
    assert loraformat.diff(0.75 * adapter, made).relative < 1e-7
    assert loraformat.validate(tmp_path / "made.safetensors")[0].problems == ()
