"""Model folders and PEFT adapters of them, for the oracle tests of checkpoints.

Every adapter is made by PEFT itself, filled with random numbers, saved and merged by PEFT in float64, which is the
reference: `W + Δ` with no rounding that matters. Deltas are about a fiftieth of their weight, as real ones are.
"""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_arrays

import loraformat
from loraformat.receipt import Receipt

torch = pytest.importorskip("torch", reason="the oracle tests need torch")
peft = pytest.importorskip("peft", reason="the oracle tests need peft")
transformers = pytest.importorskip("transformers", reason="the oracle tests need transformers")

Arrays = dict[str, NDArray[Any]]

SHARE = 0.02
"""‖Δ‖ / ‖W‖."""

ALLOWED = 1e-5
"""Share of the elements of a bfloat16 weight that may differ from the float64 reference rounded once."""


@dataclass
class Trained:
    """A base, an adapter of it, and what PEFT makes of the two.

    Attributes:
        base: the model folder.
        adapter: the adapter's folder.
        model: the PEFT model, in float64.
        merged: every parameter and buffer of the merged model in float64, by the base's names.
    """

    base: Path
    adapter: Path
    model: Any
    merged: Arrays


def save_base(model: Any, folder: Path, form: Any = torch.float32) -> Path:
    """Save a transformers model; in a file of one shard, as transformers does."""
    copy.deepcopy(model).to(form).save_pretrained(folder)
    return folder


def train(
    model: Any,
    config: Any,
    folder: Path,
    *,
    form: Any = torch.float32,
    prepare: Callable[[Any], None] = lambda model: None,
    reference: Callable[[Any], Any] | None = None,
    seed: int = 0,
    **saving: Any,
) -> Trained:
    """Save a base, adapt it with PEFT, fill the adapter with numbers, and merge it in float64.

    Args:
        model: the base.
        config: PEFT's.
        folder: for base and adapter.
        form: number form of the base as it is saved; the reference starts from the rounded numbers.
        prepare: changes the model after it was saved: resizes its vocabulary.
        reference: gives the merged parameters of the PEFT model; None merges with PEFT.
        seed: of the numbers.
        saving: for `save_pretrained` of the adapter.
    """
    model = model.to(form).float()
    base = save_base(model, folder / "base", form)
    prepare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        fill(adapted, seed)
        adapted.save_pretrained(folder / "adapter", **saving)
        wide, spare = (_copy_of(adapted, base, folder / "adapter").double() for _ in range(2))
        merged = reference(spare) if reference else wide_merge(spare)
    return Trained(base, folder / "adapter", wide, merged)


def _copy_of(adapted: Any, base: Path, adapter: Path) -> Any:
    """Return a copy of a PEFT model; one whose factors are views of each other is read again from its files."""
    try:
        return copy.deepcopy(adapted)
    except RuntimeError:
        model = type(adapted.base_model.model).from_pretrained(base, dtype=torch.float32).double()
        return peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)


def wide_merge(adapted: Any) -> Arrays:
    """Return the parameters of a merged PEFT model."""
    merged = adapted.merge_and_unload()
    return {name: value.detach().double().numpy().copy() for name, value in merged.state_dict().items()}


def fill(adapted: Any, seed: int) -> None:
    """Give every trainable parameter random numbers; the two factors of a delta make it `SHARE` of its weight."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            size = 0.02 if "lora_" in name else 0.05
            noise = torch.randn(parameter.shape, generator=generator).to(parameter) * size
            with torch.no_grad():  # In place: tied factors are views of one another.
                parameter.copy_(noise if "lora_" in name else noise + parameter)


def state_of(folder: Path) -> Arrays:
    """Return the tensors of a merged model folder in float64."""
    from safetensors.torch import load_file

    found: Arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: value.double().numpy() for name, value in load_file(path).items()}
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a folder."""
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def merge(trained: Trained, output: Path, **options: Any) -> tuple[Arrays, Receipt]:
    """Merge with loraformat; return the output's tensors in float64 and the receipt."""
    receipt = loraformat.merge(trained.base, [trained.adapter], output, min_retained=0.0, **options)
    return state_of(output), receipt


def write_folder(folder: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """Write a model folder of one file, of torch tensors or arrays."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {name: torch.as_tensor(value).contiguous().clone() for name, value in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


def assert_merged(found: Arrays, trained: Trained, *, form: str = "float32") -> None:
    """Check every tensor of a merged folder against PEFT's merge in float64."""
    assert_near(found, trained.merged, state_of(trained.base), form=form)


def assert_near(
    found: Arrays, merged: Mapping[str, NDArray[Any]], before: Mapping[str, NDArray[Any]], *, form: str = "float32"
) -> None:
    """Check every tensor against the float64 reference.

    float32 within one rounding of the number and one of what is added to it; bfloat16 equal to the reference rounded
    once, but for a hundred-thousandth of the elements.
    """
    assert found
    wrong = total = 0
    for name, values in found.items():
        wanted = merged[name]
        assert values.shape == wanted.shape, name
        if form == "bfloat16":
            wrong += int((values != wanted.astype(ml_dtypes.bfloat16).astype(np.float64)).sum())
            total += values.size
            continue
        old = before.get(name, np.zeros_like(wanted))
        size = np.abs(wanted - old).max() if old.shape == wanted.shape else np.abs(wanted).max()
        slack = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.float64) + np.spacing(np.float32(size)) * 2
        assert (np.abs(values - wanted) <= slack).all(), (name, float(np.abs(values - wanted).max()))
    assert wrong <= max(1, total * ALLOWED), (wrong, total)


def changed_names(trained: Trained, found: Arrays) -> set[str]:
    """Return the names of the tensors that are not those of the base."""
    before = state_of(trained.base)
    return {name for name, values in found.items() if name not in before or not np.array_equal(values, before[name])}


def stored_names(folder: Path) -> set[str]:
    """Return the names of the adapter's tensors."""
    return set(load_arrays(folder / "adapter_model.safetensors"))
