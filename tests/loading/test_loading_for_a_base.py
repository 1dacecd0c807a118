"""An adapter that cannot be read without its base is read with the one that it is merged into."""

from pathlib import Path

import numpy as np
import pytest

import loraformat
from builders import write_tensors
from loraformat.containers.safetensors import CONTAINER
from loraformat.errors import LoraformatError


def write_flat(path: Path, module: str) -> Path:
    factors = {
        f"{module}.lora_down.weight": np.arange(10, dtype=np.float32).reshape(2, 5),
        f"{module}.lora_up.weight": np.arange(14, dtype=np.float32).reshape(7, 2),
        f"{module}.alpha": np.array(4, np.float32),
    }
    return write_tensors(path, factors)


def write_base(path: Path, *modules: str) -> Path:
    return write_tensors(path, {f"{module}.weight": np.ones((7, 5), np.float32) for module in modules})


@pytest.mark.parametrize("prefix", ["lora_unet", "lycoris"])
def test_flat_names_are_those_of_the_base(tmp_path: Path, prefix: str) -> None:
    adapter = write_flat(tmp_path / "adapter.safetensors", f"{prefix}_my_block_0_to_q")
    base = write_base(tmp_path / "base.safetensors", "my_block.0.to_q", "my_block.0.to_k")
    assert [problem.code for problem in loraformat.load(adapter).problems if problem.severity == "error"] == ["LF314"]
    receipt = loraformat.merge(base, [adapter], tmp_path / "merged.safetensors")
    merged = CONTAINER.open(Path(receipt.output)).tensors
    down = np.arange(10, dtype=np.float32).reshape(2, 5)
    np.testing.assert_array_equal(
        merged["my_block.0.to_q.weight"].read(), 1 + 2 * np.arange(14, dtype=np.float32).reshape(7, 2) @ down
    )
    np.testing.assert_array_equal(merged["my_block.0.to_k.weight"].read(), np.ones((7, 5)))
    assert loraformat.verify(receipt.output, base, [adapter]).holds


def test_flat_names_that_may_be_two_modules_stay_refused(tmp_path: Path) -> None:
    adapter = write_flat(tmp_path / "adapter.safetensors", "lora_unet_a_b_c")
    base = write_base(tmp_path / "base.safetensors", "a_b.c", "a.b_c")
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.safetensors")
    assert "LF314" in caught.value.codes
    assert not (tmp_path / "merged.safetensors").exists()
