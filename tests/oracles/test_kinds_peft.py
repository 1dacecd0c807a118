"""Each kind of PEFT's, merged, computes what its trained module computed."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import loraformat

if TYPE_CHECKING:
    from kind_zoo import Arrays

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")


def merged_outputs(base: Path, adapter: Path, output: Path, specimen: str) -> "Arrays":
    """Return what plain modules compute with the merged weights."""
    import torch
    from kind_zoo import SPECIMENS, Parts, make_inputs, run
    from safetensors.torch import load_file

    loraformat.merge(base, [adapter], output)
    form = SPECIMENS[specimen].form
    model = Parts().to(form).eval()
    model.load_state_dict(load_file(output))
    wanted = SPECIMENS[specimen].targets
    with torch.no_grad():
        return run(model, {name: value for name, value in make_inputs(form).items() if name in wanted})


def names() -> list[str]:
    from kind_zoo import SPECIMENS

    return list(SPECIMENS)


@pytest.mark.parametrize("specimen", names())
def test_what_training_computed(tmp_path: Path, specimen: str) -> None:
    from kind_zoo import SPECIMENS, train

    trained = train(SPECIMENS[specimen], tmp_path)
    found = merged_outputs(trained.base, trained.folder, tmp_path / "merged.safetensors", specimen)
    double = SPECIMENS[specimen].form.itemsize == 8
    for name, expected in trained.unmerged.items():
        size = float(np.abs(expected).max())
        apart = float(np.abs(found[name] - expected).max()) / size
        effect = float(np.abs(trained.before[name] - expected).max()) / size
        assert effect > 1e-2, (name, effect)
        assert apart < (SPECIMENS[specimen].tolerance if double else 2e-5), (name, apart)
