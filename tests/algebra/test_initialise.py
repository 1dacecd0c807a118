"""New adapters: what each method makes, that it depends on seed and name alone, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import loraformat
from builders import write_onnx, write_tensors
from loraformat.adapter import Target

SHAPES = {
    "m.layers.0.q.weight": (48, 32),
    "m.layers.0.v.weight": (20, 32),
    "m.layers.1.q.weight": (48, 32),
    "m.embed_tokens.weight": (64, 32),
    "m.conv.weight": (12, 6, 3, 3),
    "m.norm.weight": (32,),
    "m.layers.0.q.bias": (48,),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return write_tensors(
        tmp_path / "base.safetensors", {n: rng.standard_normal(s).astype("f4") for n, s in SHAPES.items()}
    )


def pair_of(target: Target) -> tuple[NDArray[Any], NDArray[Any]]:
    down, up = (target.factors[role].read() for role in sorted(target.factors))
    return down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)


def by_name(made: Any) -> dict[str, Target]:
    return {target.name: target for target in made.adapter.targets}


def test_gaussian_and_kaiming_have_their_spread(base: Path) -> None:
    rank = 16
    gaussian, _ = pair_of(by_name(loraformat.init(base, rank, ["*.q"]))["m.layers.0.q"])
    assert gaussian.std() == pytest.approx(1 / rank, rel=0.15)
    uniform, up = pair_of(by_name(loraformat.init(base, rank, ["*.q"], method="kaiming"))["m.layers.0.q"])
    bound = 1 / np.sqrt(32)
    assert np.abs(uniform).max() <= bound
    assert np.abs(uniform).max() > 0.95 * bound
    assert uniform.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert not up.any()


@pytest.mark.parametrize("method", ["gaussian", "kaiming", "svd"])
def test_nothing_changes_before_training(method: str, base: Path, tmp_path: Path) -> None:
    made = loraformat.init(base, 4, ["*"], method=method)
    assert set(by_name(made)) == {"m.layers.0.q", "m.layers.0.v", "m.layers.1.q", "m.embed_tokens", "m.conv"}
    assert not made.method.changes_base
    assert made.problems == ()
    path = loraformat.save(made.adapter, tmp_path / "new.safetensors")
    loraformat.merge(base, [path], tmp_path / "merged.safetensors")
    before, after = load_file(base), load_file(tmp_path / "merged.safetensors")
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_an_embedding_has_zeros_in_a(base: Path) -> None:
    target = by_name(loraformat.init(base, 4, ["*.embed_tokens"]))["m.embed_tokens"]
    down, up = target.factors["lora_embedding_A"].read(), target.factors["lora_embedding_B"].read()
    assert down.shape == (4, 64)
    assert up.shape == (32, 4)
    assert not down.any()
    assert up.std() == pytest.approx(1, rel=0.2)


def test_numbers_follow_from_seed_and_name_alone(base: Path, tmp_path: Path) -> None:
    alone = by_name(loraformat.init(base, 4, ["*.1.q"], seed=5))["m.layers.1.q"]
    among = by_name(loraformat.init(base, 4, ["*"], seed=5))
    np.testing.assert_array_equal(pair_of(alone)[0], pair_of(among["m.layers.1.q"])[0])
    assert not np.array_equal(pair_of(among["m.layers.0.q"])[0], pair_of(among["m.layers.1.q"])[0])
    other = by_name(loraformat.init(base, 4, ["*.1.q"], seed=6))["m.layers.1.q"]
    assert not np.array_equal(pair_of(alone)[0], pair_of(other)[0])
    same = write_onnx(tmp_path / "b.onnx", {"m.layers.1.q": np.ones((48, 32), np.float32)})
    graph = by_name(loraformat.init(same, 4, ["*.1.q"], seed=5))["m.layers.1.q"]
    np.testing.assert_array_equal(pair_of(alone)[0], pair_of(graph)[0])


def test_the_numbers_are_these(base: Path) -> None:
    """Pinned, so that a change of the generator is seen: Philox, keyed with SHA-256, and numpy's ziggurat."""
    down, _ = pair_of(by_name(loraformat.init(base, 4, ["*.1.q"], seed=5))["m.layers.1.q"])
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"loraformat-init-1\n5\nm.layers.1.q").digest()[:16], "little")
    rng = np.random.Generator(np.random.Philox(key=key))
    np.testing.assert_array_equal(down, rng.standard_normal((4, 32), np.float32) / np.float32(4))


def test_svd_gives_the_right_singular_directions(base: Path) -> None:
    weight = load_file(base)["m.layers.0.q.weight"].astype(np.float64)
    down, up = pair_of(by_name(loraformat.init(base, 5, ["*.0.q"], method="svd"))["m.layers.0.q"])
    expected = np.linalg.svd(weight)[2][:5]
    np.testing.assert_allclose(np.abs(np.sum(down * expected, axis=1)), 1, atol=1e-5)
    assert not up.any()


@pytest.mark.parametrize("alpha", [None, 10.0, -2.5])
def test_pissa_is_the_leading_part_and_says_that_the_base_changes(
    alpha: float | None, base: Path, tmp_path: Path
) -> None:
    weight = load_file(base)["m.layers.0.q.weight"].astype(np.float64)
    made = loraformat.init(base, 5, ["*.0.q"], method="pissa", alpha=alpha)
    assert made.method.changes_base
    assert [problem.code for problem in made.problems] == ["LF729"]
    target = by_name(made)["m.layers.0.q"]
    down, up = pair_of(target)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    np.testing.assert_allclose(target.scale * up.astype(np.float64) @ down, (u[:, :5] * s[:5]) @ vt[:5], atol=1e-4)
    loraformat.merge(base, [(made.adapter, -1.0)], tmp_path / "residual.safetensors")
    residual = load_file(tmp_path / "residual.safetensors")["m.layers.0.q.weight"]
    np.testing.assert_allclose(residual, (u[:, 5:] * s[5:]) @ vt[5:], atol=1e-4)


def test_convolutions(base: Path) -> None:
    target = by_name(loraformat.init(base, 4, ["m.conv"], method="svd"))["m.conv"]
    assert target.factors["lora_A.weight"].shape == (4, 6, 3, 3)
    assert target.factors["lora_B.weight"].shape == (12, 4, 1, 1)


@pytest.fixture
def samples() -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    return (rng.standard_normal((300, 6)) @ rng.standard_normal((6, 32)) + 0.1 * rng.standard_normal((300, 32))).astype(
        "f4"
    )


@pytest.mark.parametrize("key", ["m.layers.0.q", "m.layers.0.q.samples", "m.layers.0.q.covariance", "square"])
def test_covariance_gives_the_directions_of_the_activations(
    key: str, samples: NDArray[np.float32], base: Path, tmp_path: Path
) -> None:
    wide = samples.astype(np.float64)
    covariance = wide.T @ wide / len(wide)
    is_square = key in ("square", "m.layers.0.q.covariance")
    stored = {"m.layers.0.q" if key == "square" else key: covariance if is_square else samples}
    np.savez(tmp_path / "seen.npz", **stored)
    made = loraformat.init(base, 4, ["*.0.q"], method="covariance", stats=tmp_path / "seen.npz")
    down, up = pair_of(by_name(made)["m.layers.0.q"])
    expected = np.linalg.svd(wide, full_matrices=False)[2][:4]
    np.testing.assert_allclose(np.abs(np.sum(down * expected, axis=1)), 1, atol=1e-5)
    assert not up.any()
    assert not made.method.changes_base


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"other": np.ones((9, 32))}, "nothing of this name"),
        ({"m.layers.0.q": np.ones((9, 31))}, "[9, 31]"),
        ({"m.layers.0.q": np.ones((3, 32))}, "3 samples"),
        ({"m.layers.0.q": np.ones((9, 32), np.int64)}, "int64"),
        ({"m.layers.0.q.covariance": np.ones((9, 32))}, "[9, 32]"),
        ({"m.layers.0.q": np.triu(np.ones((32, 32)))}, "not symmetric"),
        ({"m.layers.0.q": np.full((40, 32), np.nan)}, "NaN"),
    ],
)
def test_statistics_that_do_not_fit(arrays: dict[str, NDArray[Any]], found: str, base: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "seen.npz", **arrays)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.init(base, 4, ["*.0.q"], method="covariance", stats=tmp_path / "seen.npz")
    assert set(caught.value.codes) == {"LF728"}
    assert found in str(caught.value)


def test_refusals(base: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("LF724", {"rank": 4, "targets": ["*.q", "*.nothing"]}),
        ("LF724", {"rank": 4, "targets": ["*.norm"]}),
        ("LF727", {"rank": 21, "targets": ["*"]}),
        ("LF728", {"rank": 4, "targets": ["*.q"], "method": "covariance"}),
    ]
    for code, flags in cases:
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.init(base, **flags)
        assert set(caught.value.codes) == {code}


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ({"method": "best"}, "method"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"smoothness": -1.0}, "smoothness"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"smoothness": 1.0, "sparsity": 0.5}, "smoothness and sparsity"),
        ({"rank": 0}, "rank"),
        ({"targets": []}, "targets"),
    ],
)
def test_settings_that_will_not_do(flags: dict[str, Any], where: str, base: Path) -> None:
    with pytest.raises(loraformat.FindingError) as caught:
        loraformat.init(base, **({"rank": 4, "targets": ["*.q"]} | flags))
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [("LF705", where)]


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "b.safetensors", {"m.q.weight": np.full((6, 5), np.inf, np.float32)})
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.init(path, 2, ["*"], method="svd")
    assert caught.value.codes == ("LF723",)
