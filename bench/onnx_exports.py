"""Every export path, merged and run: docs/onnx-exports.md.

    python bench/onnx_exports.py --output docs/onnx-exports.md

Each model of the oracles' zoo is exported by both of torch's exporters and taken through the tools that people run
before they deploy; an adapter trained with PEFT is merged into what comes out, by names alone and with the torch
checkpoint; onnxruntime's outputs are compared with those of PEFT's unmerged model. Needs the packages of the oracle
tests, and onnxslim and onnxsim for their rows.
"""

import argparse
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

warnings.simplefilter("ignore")
sys.path.append(str(Path(__file__).parent.parent / "tests" / "oracles"))

import onnx_paths  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402
import zoo_wide  # noqa: E402, F401 - more models
from lab import Lab, difference  # noqa: E402
from safetensors.torch import save_model  # noqa: E402

import loraformat  # noqa: E402

MODELS = ("llama", "qwen2_tied", "gpt2", "bert", "distilbert", "t5", "whisper", "vit", "convnet", "resnet")
PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxruntime", "onnxscript", "onnxslim", "onnxsim")
PRECISE = 1e-3
"""A path whose own base is further than this from torch is measured against its base, not against PEFT."""


@dataclass
class Row:
    """One path, over all models.

    Attributes:
        models: models that the tools can do.
        targets: targets of their adapters.
        found: by way of resolving, targets of the models that were merged.
        furthest: by way of resolving, the largest difference from PEFT's unmerged model.
        base: the largest difference of the path's own base from torch.
        refused: by way of resolving, the reason codes and models.
        failed: models that the tools cannot do.
    """

    models: int = 0
    targets: int = 0
    found: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    furthest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    base: float = 0.0
    refused: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    failed: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--exporters", nargs="*", default=zoo.EXPORTERS)
    parser.add_argument("--tools", nargs="*", default=["", *onnx_paths.TOOLS])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[tuple[str, str], Row] = defaultdict(Row)
    with TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        for model in asked.models:
            for exporter in asked.exporters:
                for tool in asked.tools:
                    if exporter in ("ts_nofold", "dynamo_noopt") and tool not in ("", "ORT extended", "onnxsim"):
                        continue
                    measure(lab, model, exporter, tool, rows[exporter, tool])
                    asked.output.write_text("\n".join(write(rows, asked.models)) + "\n")
                    print(model, exporter, tool, file=sys.stderr, flush=True)


def measure(lab: Lab, name: str, exporter: zoo.Exporter, tool: str, row: Row) -> None:
    """Merge into one model on one path, both ways, and note what came of it."""
    trained = lab.trained(name)
    try:
        base = onnx_paths.make(lab, name, exporter, tool) if tool else lab.exported(name, exporter)
        found = zoo.run_onnx(base, trained.feeds, trained.specimen.outputs)
    except Exception as error:  # whatever a tool makes of a model
        row.failed.append(f"{name} ({type(error).__name__})")
        return
    row.models += 1
    row.targets += len(trained.deltas)
    row.base = max(row.base, difference(found, trained.base))
    for way, options in (("names", {}), ("checkpoint", {"base_checkpoint": save_checkpoint(lab, name)})):
        output = lab.root / "merged.onnx"
        try:
            receipt = loraformat.merge(base, [trained.folder], output, force=True, **options)
        except loraformat.LoraformatError as error:
            resolved = loraformat.resolve_targets(base, trained.folder, **options)
            row.found[way] += len({each.target for each in resolved.targets})
            codes = sorted({problem.code for problem in error.problems})
            row.refused[way].append(f"{name} {', '.join(codes)}")
            continue
        row.found[way] += sum(len(weight.targets) for weight in receipt.weights)
        merged = zoo.run_onnx(output, trained.feeds, trained.specimen.outputs)
        row.furthest[way] = max(row.furthest[way], difference(merged, trained.unmerged))


def save_checkpoint(lab: Lab, name: str) -> Path:
    """Return the model's checkpoint, as transformers would save it."""
    folder = lab.root / f"checkpoint-{name}"
    if not folder.exists():
        folder.mkdir()
        model = zoo.SPECIMENS[name].make()
        save_model(model, str(folder / "model.safetensors"))
        if hasattr(model, "config"):
            model.config.save_pretrained(folder)
    return folder


def write(rows: dict[tuple[str, str], Row], models: list[str]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield "# ONNX export paths"
    yield ""
    yield "Written by `python bench/onnx_exports.py --output docs/onnx-exports.md`; the figures are of its last run."
    yield ""
    yield f"Models: {', '.join(models)}: tiny, from configurations, random weights, adapters trained with PEFT."
    yield f"Packages: {', '.join(_name_versions())}."
    yield ""
    yield "`names`: targets resolved by names alone; `checkpoint`: with `--base-checkpoint`. A merge is all or nothing,"
    yield "so a model with a target that is not resolved is refused, with the codes in the last column. `apart`: the"
    yield "largest difference of any output from PEFT's unmerged model, over all models merged; `base`: that of"
    yield "the unmerged path from the torch model, which no merge can undercut."
    yield ""
    yield "| exporter | tool | models | targets | names | apart | checkpoint | apart | base | refused |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|---|"
    for (exporter, tool), row in rows.items():
        cells = [exporter, tool or "-", row.models, row.targets]
        for way in ("names", "checkpoint"):
            cells += [row.found[way], f"{row.furthest[way]:.1e}" if row.furthest[way] else "-"]
        yield f"| {' | '.join(map(str, [*cells, f'{row.base:.1e}', _say(row)]))} |"


def _say(row: Row) -> str:
    said = [f"{way}: {'; '.join(cases)}" for way, cases in row.refused.items()]
    return ". ".join([*said, *([f"the tool fails: {', '.join(row.failed)}"] if row.failed else [])])


def _name_versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


if __name__ == "__main__":
    main()
