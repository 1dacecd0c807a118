"""Words of the command line."""

from pathlib import Path

import click
import pytest

from loraformat_cli.params import ByteSize, Finite, WeightedAdapter


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("adapter.safetensors", ("adapter.safetensors", None)),
        ("adapter.safetensors:0.8", ("adapter.safetensors", 0.8)),
        ("dir/with:colon/adapter:-1e-1", ("dir/with:colon/adapter", -0.1)),
        (r"C:\models\adapter.safetensors:0.5", (r"C:\models\adapter.safetensors", 0.5)),
        ("C:/models/adapter:2", ("C:/models/adapter", 2.0)),
        ("a::1", ("a:", 1.0)),
        ("adapter:0", ("adapter", 0.0)),
    ],
)
def test_path_and_weight(word, expected) -> None:
    assert WeightedAdapter().convert(word, None, None) == (Path(expected[0]), expected[1])


@pytest.mark.parametrize(
    "word",
    ["a:nan", "a:inf", "a:-inf", "a:1e999", "a:", "a:heavy", ":1", "a:1_0", "a:1:", r"C:\models\adapter.safetensors"],
)
def test_refused_weights(run, word) -> None:
    result = run("merge", "base.onnx", word)
    assert result.exit_code == 2
    assert repr(word) in " ".join(result.stderr.split())


def test_a_weight_without_its_adapter(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").touch()
    for word, told in (("0.7", "ADAPTER:0.7"), ("a=0.7", "a:0.7")):
        result = run("merge", "base.onnx", "a", word)
        assert result.exit_code == 2
        assert f"behind its adapter and a colon: {told}" in " ".join(result.stderr.split())
    assert WeightedAdapter().convert("b=0.7", None, None) == (Path("b=0.7"), None)
    assert WeightedAdapter().convert("https://host/a", None, None)[1] is None


@pytest.mark.parametrize("name", ["adapter:0.5", "a:nan", "C:x", ":1"])
def test_what_exists_is_a_path(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"")
    assert WeightedAdapter().convert(name, None, None) == (Path(name), None)
    assert WeightedAdapter().convert(f"{name}:2", None, None) == (Path(name), 2.0)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("1", 1),
        ("512B", 512),
        ("10kB", 10_000),
        ("256MiB", 256 << 20),
        ("256mib", 256 << 20),
        ("2GB", 2_000_000_000),
        ("1.5GiB", 3 << 29),
        ("512M", 512 << 20),
        ("2 GiB", 2 << 30),
        ("1TB", 10**12),
    ],
)
def test_sizes(word, expected) -> None:
    assert ByteSize().convert(word, None, None) == expected


@pytest.mark.parametrize("word", ["", "MiB", "-1", "0", "1XB", "1 2", "nan", "inf", "1iB", "1BB", "1e400"])
def test_refused_sizes(word) -> None:
    with pytest.raises(click.BadParameter):
        ByteSize().convert(word, None, None)


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e999", "x", "", "-0.1", "1.5"])
def test_refused_shares(word) -> None:
    with pytest.raises(click.BadParameter):
        Finite(0.0, 1.0).convert(word, None, None)


def test_shares() -> None:
    assert [Finite(0.0, 1.0).convert(word, None, None) for word in ("0", "0.5", "1")] == [0.0, 0.5, 1.0]
