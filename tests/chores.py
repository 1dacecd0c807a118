"""What users do with files, one thing after another, in a process of its own: `python -m chores FOLDER [poor]`."""

import sys
from pathlib import Path

if "poor" in sys.argv:
    import poor_system  # noqa: F401  # Before whatever asks what the system has.

import loraformat
from loraformat_cli.main import main
from models import FORMS, copy_base, suffix_of


def merge_in_all_ways(folder: Path, form: str, adapters: list[Path]) -> None:
    """Merge beside the base, over an output, for each adapter, and into the base; and undo."""
    suffix = suffix_of(form)
    base = folder / f"base{suffix}"
    merged = folder / f"merged{suffix}"
    loraformat.merge(base, [adapters[0]], merged)
    loraformat.merge(base, [(adapters[0], 0.5), adapters[1]], merged, force=True, durable=True)
    assert loraformat.verify(merged, base, [(adapters[0], 0.5), adapters[1]]).holds
    loraformat.merge(base, [adapters[0]], folder / f"resumed{suffix}", resume=True)
    loraformat.merge_each(base, adapters, folder / "each")
    for keep_undo in (False, True):
        again = copy_base(base, folder.parent / f"own-{form}-{keep_undo}")
        loraformat.merge_into(again, [adapters[0]], keep_undo=keep_undo)
        assert not keep_undo or loraformat.unmerge(again).exact


def do_chores(folder: Path) -> None:
    """Do them to the adapters and bases in a folder."""
    adapters = [folder / "style", folder / "task"]
    for form in [form for form in FORMS if (folder / form).is_dir()]:
        merge_in_all_ways(folder / form, form, adapters)
    for scheme, name in (("native", "native.safetensors"), ("mlx", "mlx"), ("peft", "peft")):
        loraformat.convert(adapters[0], scheme, folder / name, verify=True)
    loraformat.save(loraformat.compose([*adapters], rank=1), folder / "sum.safetensors")
    loraformat.save(loraformat.load(adapters[0]), folder / "sum.safetensors", force=True)
    base = folder / "one" / "base.onnx"
    assert not [problem for verdict in loraformat.validate(folder / "style", base=base) for problem in verdict.problems]
    assert loraformat.inspect(base).as_json()["kind"] == "base"
    sys.argv = ["loraformat", "merge", str(base), str(adapters[0]), "-o", str(folder / "by-command.onnx")]
    main()


if __name__ == "__main__":
    do_chores(Path(sys.argv[1]))
