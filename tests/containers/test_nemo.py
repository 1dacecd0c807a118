"""Our reader of NeMo's archives against the standard library's tar, and against files made to hurt."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import loraformat
from laws.container_laws import ContainerLaws, read_all, rewrite, same_bits
from loraformat import limits
from loraformat.containers import nemo
from loraformat.containers.nemo import CONTAINER
from loraformat.containers.torch_zip import CONTAINER as TORCH
from loraformat.dtypes import BY_NAME
from loraformat.errors import LoraformatError

LAYER = "model.decoder.layers.0.self_attention.adapter_layer.lora_dense_attention_adapter"


def arrays_of(names: tuple[str, ...] = (f"{LAYER}.linear_in.weight", f"{LAYER}.linear_out.weight")) -> Any:
    dice = np.random.default_rng(0)
    shapes = ((3, 5), (4, 3))
    return {name: dice.standard_normal(shape).astype(np.float32) for name, shape in zip(names, shapes, strict=True)}


def checkpoint(arrays: dict[str, NDArray[Any]]) -> bytes:
    sink = io.BytesIO()
    TORCH.write(sink, [(name, BY_NAME[each.dtype.name], each.shape, each) for name, each in arrays.items()], {})
    return sink.getvalue()


def archive(members: dict[str, bytes], form: int = tarfile.GNU_FORMAT, folder: bool = True) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
        if folder:
            info = tarfile.TarInfo("./")
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


CONFIG = b"peft:\n  lora_tuning:\n    adapter_dim: 3\n"


class TestNemo(ContainerLaws):
    container = CONTAINER

    def write_example(self, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        path, arrays = folder / "adapter.nemo", arrays_of()
        rewrite(path, archive({"./model_config.yaml": CONFIG, "./model_weights.ckpt": checkpoint(arrays)}))
        return path, arrays


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", [True, False])
def test_every_form_of_tar(tmp_path: Path, form: int, folder: bool) -> None:
    path, arrays = tmp_path / "a.nemo", arrays_of()
    name = "model_weights.ckpt" if not folder else "./model_weights.ckpt"
    path.write_bytes(archive({"model_config.yaml": CONFIG, name: checkpoint(arrays)}, form, folder))
    found = read_all(CONTAINER.open(path))
    assert all(same_bits(found[key], each) for key, each in arrays.items())


def test_an_adapter_of_nemo_is_converted(tmp_path: Path) -> None:
    path, arrays = tmp_path / "a.nemo", arrays_of()
    path.write_bytes(archive({"./model_config.yaml": CONFIG, "./model_weights.ckpt": checkpoint(arrays)}))
    (target,) = loraformat.load(path, alpha=6).targets
    assert (target.name, target.scale) == ("decoder.layers.0.self_attention.linear_proj", 2.0)
    done = loraformat.convert(path, "native", tmp_path / "a.safetensors", alpha=6, verify=True)
    assert (done.origin, done.account.refused) == ("megatron", ())


def spoil_checksum(data: bytes) -> bytes:
    return data[:148] + b"000001\0 " + data[156:]


def restate_size(data: bytes, size: int) -> bytes:
    """Return an archive whose first regular member states another size, its checksum mended."""
    start = 512
    header = bytearray(data[start : start + 512])
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


def test_hostile_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = archive({"./model_weights.ckpt": checkpoint(arrays_of())})
    shards = {f"./mp_rank_0{rank}/model_weights.ckpt": checkpoint(arrays_of()) for rank in range(2)}
    cases = {
        "LF109": (spoil_checksum(good), restate_size(good, 8**11 - 1)),
        "LF135": (archive({"./model_config.yaml": CONFIG}), archive(shards)),
        "LF111": (archive({"./model_weights.ckpt": b"\x80\x02}."}),),
    }
    for code, files in cases.items():
        for data in files:
            rewrite(tmp_path / "a.nemo", data)
            with pytest.raises(LoraformatError) as caught:
                CONTAINER.open(tmp_path / "a.nemo")
            assert caught.value.codes == (code,)
    rewrite(tmp_path / "a.nemo", good)
    monkeypatch.setattr(nemo, "MAX_ARCHIVE_MEMBERS", 1)
    with pytest.raises(LoraformatError) as caught:
        CONTAINER.open(tmp_path / "a.nemo")
    assert caught.value.codes == ("LF110",)
    assert limits.MAX_ARCHIVE_MEMBERS > 100


def test_a_member_does_not_reach_beyond_its_end(tmp_path: Path) -> None:
    """A checkpoint cut short in the archive is not completed by the bytes that follow it."""
    whole = checkpoint(arrays_of())
    path = tmp_path / "a.nemo"
    path.write_bytes(archive({"./model_weights.ckpt": whole[:-30], "./rest": whole[-30:]}))
    with pytest.raises(LoraformatError):
        CONTAINER.open(path)


SETTINGS = """\
num_attention_heads: 4
num_query_groups: 2
hidden_size: 10 # of the base
exp_manager:
  alpha: 99
peft:
  peft_scheme: lora
  lora_tuning:
    variant: nemo
    adapter_dim: 3
    alpha: {alpha}
  adapter_tuning:
    adapter_dim: 32
    alpha: 77
alpha: 55
"""


def test_the_alpha_of_the_settings(tmp_path: Path) -> None:
    settings = SETTINGS.format(alpha=6).encode()
    path = tmp_path / "a.nemo"
    path.write_bytes(archive({"./model_config.yaml": settings, "./model_weights.ckpt": checkpoint(arrays_of())}))
    found = dict(CONTAINER.open(path).metadata)
    assert found["nemo.peft.lora_tuning.alpha"] == "6"
    assert found["nemo.num_query_groups"] == "2"
    (target,) = loraformat.load(path).targets
    assert target.scale == 2.0
    (target,) = loraformat.load(path, alpha=3.0).targets
    assert target.scale == 1.0


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        (SETTINGS.format(alpha="${.adapter_dim}"), "LF211"),
        (SETTINGS.format(alpha="&a 6"), "LF211"),
        (SETTINGS.format(alpha=6).replace("dim: 3", "dim: 4"), "LF203"),
        (SETTINGS.format(alpha=6) + "peft:\n  lora_tuning:\n    alpha: 7\n", "LF211"),
    ],
)
def test_settings_that_do_not_say_it(tmp_path: Path, settings: str, code: str) -> None:
    path = tmp_path / "a.nemo"
    members = {"./model_config.yaml": settings.encode(), "./model_weights.ckpt": checkpoint(arrays_of())}
    path.write_bytes(archive(members))
    with pytest.raises(LoraformatError) as caught:
        loraformat.load(path)
    assert caught.value.codes == (code,)
