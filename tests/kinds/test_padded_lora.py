"""LoRA of a wider weight against B·A in float64, and merges into weights of fewer, as many and more inputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import loraformat
from builders import MemoryFactor
from graphs import linear_net, write_model
from laws.kind_laws import Example, KindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.errors import LoraformatError
from loraformat.kinds.padded_lora import KIND

OUT, OWN, IN, RANK = 5, 3, 7, 2


def make_target(arrays: dict[str, NDArray[Any]], scaling: Scaling) -> Target:
    factors = {role: MemoryFactor(role, array) for role, array in arrays.items()}
    return Target("img_in", "padded_lora", SlotKind.LINEAR, factors, len(arrays["lora_A.weight"]), scaling)


@st.composite
def padded_examples(draw: st.DrawFn) -> Example:
    out, inner = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda sizes: sizes[0] != sizes[1]))
    rank = draw(st.integers(1, 4))
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    down, up = dice.standard_normal((rank, inner)).astype(dtype), dice.standard_normal((out, rank)).astype(dtype)
    arrays: dict[str, NDArray[Any]] = {"lora_A.weight": down, "lora_B.weight": up}
    scaling = Scaling(draw(st.sampled_from(ScalingRule)), draw(st.sampled_from([4.0, 1.0, -0.3])))
    dense = up.astype(np.float64) @ down.astype(np.float64)
    bound = np.abs(up).astype(np.float64) @ np.abs(down).astype(np.float64)
    return Example(make_target(arrays, scaling), arrays, dense, bound)


class TestPaddedLora(KindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[Example]:
        return padded_examples()


def make_adapter(path: Path, inner: int = IN, stated: tuple[int, ...] = (OUT, IN)) -> dict[str, NDArray[Any]]:
    dice = np.random.default_rng(3)
    tensors: dict[str, NDArray[Any]] = {
        "diffusion_model.img_in.lora_down.weight": dice.standard_normal((RANK, inner)).astype(np.float32),
        "diffusion_model.img_in.lora_up.weight": dice.standard_normal((OUT, RANK)).astype(np.float32),
        "diffusion_model.img_in.alpha": np.array(1.0, np.float32),
        "diffusion_model.img_in.diff_b": dice.standard_normal(OUT).astype(np.float32),
        "diffusion_model.img_in.reshape_weight": np.array(stated),
    }
    save_file(tensors, path)
    return {key.rpartition("img_in.")[2]: array for key, array in tensors.items()}


def make_base(path: Path, columns: int = OWN) -> dict[str, NDArray[Any]]:
    dice = np.random.default_rng(4)
    tensors = {
        "img_in.weight": dice.standard_normal((OUT, columns)).astype(np.float32),
        "img_in.bias": dice.standard_normal(OUT).astype(np.float32),
        "txt_in.weight": dice.standard_normal((OUT, 4)).astype(np.float32),
    }
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("columns", [OWN, IN])
def test_the_base_is_filled_up_with_zeros(tmp_path: Path, columns: int) -> None:
    adapter, base = make_adapter(tmp_path / "a.safetensors"), make_base(tmp_path / "b.safetensors", columns)
    out = tmp_path / "out.safetensors"
    receipt = loraformat.merge(tmp_path / "b.safetensors", tmp_path / "a.safetensors", out)
    merged = load_file(out)
    expected = np.pad(base["img_in.weight"], ((0, 0), (0, IN - columns))).astype(np.float64)
    expected += 0.5 * adapter["lora_up.weight"].astype(np.float64) @ adapter["lora_down.weight"].astype(np.float64)
    np.testing.assert_allclose(merged["img_in.weight"], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(merged["img_in.bias"], base["img_in.bias"] + adapter["diff_b"], rtol=1e-6)
    np.testing.assert_array_equal(merged["txt_in.weight"], base["txt_in.weight"])
    assert (columns < IN) is ("LF136" in {problem.code for problem in receipt.problems})


def test_what_is_merged_can_be_verified(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a.safetensors")
    make_base(tmp_path / "b.safetensors")
    loraformat.merge(tmp_path / "b.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    found = loraformat.verify(tmp_path / "out.safetensors", tmp_path / "b.safetensors", [tmp_path / "a.safetensors"])
    assert found.holds


def test_a_weight_of_more_inputs_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a.safetensors")
    make_base(tmp_path / "b.safetensors", IN + 1)
    with pytest.raises(LoraformatError, match="LF405"):
        loraformat.merge(tmp_path / "b.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")


def test_a_stated_shape_must_be_that_of_the_factors(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a.safetensors", stated=(OUT, IN + 1))
    make_base(tmp_path / "b.safetensors")
    with pytest.raises(LoraformatError, match=r"LF203(?s:.*)reshape_weight"):
        loraformat.merge(tmp_path / "b.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")


def test_in_place_there_is_no_room_for_more_inputs(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a.safetensors")
    base = make_base(tmp_path / "b.safetensors")
    with pytest.raises(LoraformatError, match="LF6"):
        loraformat.merge_into(tmp_path / "b.safetensors", [tmp_path / "a.safetensors"])
    np.testing.assert_array_equal(load_file(tmp_path / "b.safetensors")["img_in.weight"], base["img_in.weight"])


def test_a_graph_is_refused_with_what_to_do(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a.safetensors")
    net = linear_net({"img_in": np.ones((OUT, OWN), np.float32)})
    graph = write_model(tmp_path / "model.onnx", net.model())
    with pytest.raises(LoraformatError, match=r"LF405(?s:.*)more inputs"):
        loraformat.merge(graph, tmp_path / "a.safetensors", tmp_path / "out.onnx", allow_unmatched=["*.bias"])
