"""Several models from one base, hard links, and room on the disk."""

from pathlib import Path

import pytest

import loraformat
from models import FOLDERS, FORMS, files_below, leftovers, suffix_of, write_adapter, write_base


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("jobs", [1, 5])
def test_each_gives_what_single_merges_give(tmp_path: Path, form: str, jobs: int) -> None:
    base = write_base(tmp_path / "in", form)
    adapters = [write_adapter(tmp_path / f"style{seed}", seed) for seed in (1, 2, 3)]
    receipts = loraformat.merge_each(base, adapters, tmp_path / "each", jobs=jobs)
    (tmp_path / "single").mkdir()
    for adapter, receipt in zip(adapters, receipts, strict=True):
        single = loraformat.merge(base, [adapter], tmp_path / "single" / f"{adapter.name}{suffix_of(form)}")
        assert single.embedded_text() == receipt.embedded_text()
    assert files_below(tmp_path / "each") == files_below(tmp_path / "single")


def test_adapters_of_one_name_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "in", "safetensors")
    adapters = [write_adapter(tmp_path / folder / "style", 1) for folder in "ab"]
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge_each(base, adapters, tmp_path / "each")
    assert caught.value.codes == ("LF601",)
    assert not (tmp_path / "each").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("resume", [False, True])
def test_no_room_is_told_before_anything_is_made(
    tmp_path: Path, form: str, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = write_base(tmp_path / "in", form), write_adapter(tmp_path / "style")
    before = files_below(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1500})())
    with pytest.raises(loraformat.OutputError) as caught:
        loraformat.merge_each(base, [adapter], tmp_path / "each", resume=resume)
    assert caught.value.codes == ("LF604",)
    assert not (tmp_path / "each").exists()
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("form", FOLDERS)
def test_untouched_files_are_linked_and_no_other(tmp_path: Path, form: str) -> None:
    base, out = write_base(tmp_path / "in", form), tmp_path / "out"
    loraformat.merge(base, [write_adapter(tmp_path / "style")], out, link=True)
    linked = {path.name for path in base.iterdir() if path.samefile(out / path.name)}
    changed = {path.name for path in base.iterdir() if path.read_bytes() != (out / path.name).read_bytes()}
    assert changed
    assert linked == {path.name for path in base.iterdir()} - changed
    assert not leftovers(tmp_path)


def test_links_of_a_single_file_are_refused(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "in", "safetensors"), write_adapter(tmp_path / "style")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "out.safetensors", link=True)
    assert caught.value.codes == ("LF624",)
