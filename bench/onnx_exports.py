"""Every export path, merged and run: docs/onnx-exports.md.

    python bench/onnx_exports.py --results results.json --output docs/onnx-exports.md

Each model of the oracles' zoo is exported by both of torch's exporters and taken through the tools that people run
before they deploy, built by onnxruntime-genai's builder, or exported by Optimum; an adapter trained with PEFT is merged
into what comes out, by names alone, with the torch checkpoint, and stamped; onnxruntime's outputs are compared with
those of PEFT's unmerged model. Needs the packages of the oracle tests, and the tools of its rows.

Cases that the results hold are not run again, so that one table can be made in several runs and environments: Optimum
wants another transformers than the rest.
"""

import argparse
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

warnings.simplefilter("ignore")
sys.path.append(str(Path(__file__).parent.parent / "tests" / "oracles"))

import builders_of_graphs  # noqa: E402
import numpy as np  # noqa: E402
import onnx_paths  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import zoo  # noqa: E402
import zoo_built  # noqa: E402
import zoo_wide  # noqa: E402, F401 - more models
from lab import Lab, difference  # noqa: E402
from safetensors.torch import save_model  # noqa: E402

import loraformat  # noqa: E402

MODELS = (
    *("llama", "qwen2_tied", "qwen3", "phi3", "mixtral", "gpt_oss", "gpt2", "bert", "roberta", "distilbert"),
    *("t5", "whisper", "vit", "convnet", "resnet", "unet"),
)
PACKAGES = (
    *("torch", "transformers", "diffusers", "peft", "onnx", "onnxruntime", "onnxscript", "onnxslim", "onnxsim"),
    *("onnxruntime-genai", "optimum-onnx"),
)
WAYS = ("names", "structure", "checkpoint", "stamped")
STRUCTURE = "structure"
GENAI, OPTIMUM = "genai builder", "Optimum"
IN_ONE_GRAPH = ("llama", "gpt2", "bert", "distilbert")
"""What Optimum exports as one model; an encoder and a decoder are a test of their own."""
Case = dict[str, Any]
Run = Callable[[Path], Mapping[str, np.ndarray[Any, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=[*MODELS, *zoo_built.BUILT])
    parser.add_argument("--exporters", nargs="*", default=[*zoo.EXPORTERS, GENAI, OPTIMUM])
    parser.add_argument("--tools", nargs="*", default=["", *onnx_paths.TOOLS])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(asked.results.read_text()) if asked.results.exists() else {"packages": {}, "cases": {}}
    with TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        for model, exporter, tool in list_cases(asked):
            key = "|".join((exporter, tool, model))
            if key not in results["cases"]:
                results["cases"][key] = measure(lab, model, exporter, tool)
                results["packages"] |= {f"{name} {text}": None for name, text in _name_versions()}
                asked.results.write_text(json.dumps(results, indent=1))
                print(key, file=sys.stderr, flush=True)
    asked.output.write_text("\n".join(write(results)) + "\n")


def list_cases(asked: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield model, exporter and tool of every case."""
    for model in asked.models:
        for exporter in asked.exporters:
            if exporter == GENAI:
                if model in zoo_built.BUILT and find_spec("onnxruntime_genai"):
                    yield model, exporter, ""
                continue
            if exporter == OPTIMUM:
                if model in IN_ONE_GRAPH and find_spec("optimum"):
                    yield model, exporter, ""
                continue
            for tool in asked.tools if model in MODELS else ():
                if exporter in ("ts", "dynamo") or tool in ("", "ORT extended", "onnxsim"):
                    yield model, exporter, tool


def measure(lab: Lab, name: str, exporter: str, tool: str) -> Case:
    """Merge into one model on one path, in all ways, and return what came of it."""
    trained = lab.trained(name)
    run: Run = lambda path: zoo.run_onnx(path, trained.feeds, trained.specimen.outputs)  # noqa: E731
    rows = slice(None)
    try:
        if exporter == GENAI:
            base = builders_of_graphs.build_genai(trained.specimen, lab.root / f"genai-{name}")
            rows = slice(1)  # The row without padding.
            first = {feed: values[rows] for feed, values in trained.feeds.items()}
            run = lambda path: {"logits": builders_of_graphs.run_cached(path, first)}  # noqa: E731
        elif exporter == OPTIMUM:
            graphs = builders_of_graphs.export_with_optimum(trained.specimen, lab.root / f"optimum-{name}")
            base, rows = graphs["model"], slice(1)
            first = {feed: values[rows] for feed, values in trained.feeds.items()}
            run = lambda path: {"logits": builders_of_graphs.run_whole(path, first)["logits"]}  # noqa: E731
        else:
            base = onnx_paths.make(lab, name, exporter, tool) if tool else lab.exported(name, exporter)
        found = run(base)
    except Exception as error:  # whatever a tool makes of a model
        return {"failed": type(error).__name__}
    wanted = {key: values[rows] for key, values in trained.unmerged.items()}
    case: Case = {"targets": len(trained.deltas), "ways": {}}
    case["base"] = difference(found, {key: values[rows] for key, values in trained.base.items()})
    for way in WAYS:
        case["ways"][way] = _merge(lab, name, base, way, lambda path: difference(run(path), wanted))
    return case


def _merge(lab: Lab, name: str, base: Path, way: str, compare: Callable[[Path], float]) -> Case:
    checkpoint, output = save_checkpoint(lab, name), lab.root / "merged.onnx"
    adapter: Any = lab.trained(name).folder
    options: dict[str, Any] = {"base_checkpoint": checkpoint} if way == "checkpoint" else {}
    options |= {"resolve": STRUCTURE} if way == STRUCTURE else {}
    if way == "stamped":
        adapter = loraformat.stamp(adapter, checkpoint)
    try:
        receipt = loraformat.merge(base, [adapter], output, force=True, **options)
    except loraformat.LoraformatError as error:
        resolved = loraformat.resolve_targets(base, adapter, **options)
        codes = sorted({problem.code for problem in error.problems})
        return {"found": len({each.target for each in resolved.targets}), "codes": codes}
    found = {target for weight in receipt.weights for target in weight.targets}
    return {"found": len(found), "apart": compare(output)}


def save_checkpoint(lab: Lab, name: str) -> Path:
    """Return the model's checkpoint, as transformers would save it."""
    folder = lab.root / f"checkpoint-{name}"
    if not folder.exists():
        folder.mkdir()
        model = zoo.SPECIMENS[name].make()
        save_model(model, str(folder / "model.safetensors"))
        if isinstance(model, transformers.PreTrainedModel):
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
    return folder


def write(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the page."""
    rows: dict[tuple[str, str], dict[str, Case]] = defaultdict(dict)
    for key, case in results["cases"].items():
        exporter, tool, model = key.split("|")
        rows[exporter, tool][model] = case
    models = dict.fromkeys(model for cases in rows.values() for model in cases)
    yield "# ONNX export paths"
    yield ""
    yield from INTRODUCED
    yield ""
    yield f"Models: {', '.join(models)}: tiny, from configurations, random weights, adapters trained with PEFT."
    yield f"Packages: {', '.join(sorted(results['packages']))}."
    yield ""
    yield from EXPLAINED
    yield ""
    columns = ["exporter", "tool", "models", "targets", *(cell for way in WAYS for cell in (way, "apart")), "base"]
    yield f"| {' | '.join([*columns, 'refused'])} |"
    yield f"|---|---|{'--:|' * (len(columns) - 2)}---|"
    order = list(dict.fromkeys((exporter, tool) for exporter in (*zoo.EXPORTERS, GENAI, OPTIMUM) for tool in _TOOLS))
    for exporter, tool in sorted(rows, key=order.index):
        yield _write_row(exporter, tool, rows[exporter, tool])


_TOOLS = ("", *onnx_paths.TOOLS)
INTRODUCED = """\
Written by `python bench/onnx_exports.py --results FILE --output docs/onnx-exports.md`, run in two environments: Optimum
wants another transformers than the rest. Encoder and decoder that it exports apart, with both branches of a merged
decoder, are `tests/oracles/test_optimum.py`; Whisper of the builder is `tests/oracles/test_genai.py`.
""".splitlines()
EXPLAINED = """\
`names`: targets resolved by names alone, those beside a layer among them; `structure`: with `--resolve structure`
besides; `checkpoint`: with `--base-checkpoint`; `stamped`: by the fingerprints of a stamped adapter. A merge is all or
nothing, so a model with a target that is not resolved is refused, with the codes in the last column. `apart`: the
largest difference of any output from PEFT's unmerged model, over all models merged; `base`: that of the unmerged path
from the torch model, which no merge can undercut.

What is not resolved, by rule:

- *Names alone* need names. `optimize=True` of the newer exporter keeps a module's path in the metadata of its nodes,
  and onnxruntime, onnxsim and onnxslim drop metadata. What remains are weights and biases that kept their names, and
  the names of norms, biases and routers beside those that did not (`onnx-resolving.md`): with neither, LF401.
- *Structure* tells of one stack of transformer layers, or of an encoder and its decoder, and of no head, embedding or
  convolution (LF425, LF401).
- A convolution with BatchNorm folded in holds other numbers than the module: refused (LF407) unless the checkpoint
  tells the factors. A fingerprint knows the module's own numbers, and does not find them there.
- `ORT all` stores convolutions in blocks of channels (`nchwc`): refused in every way (LF403; LF401 without a name).
""".splitlines()


def _write_row(exporter: str, tool: str, cases: Mapping[str, Case]) -> str:
    done = {model: case for model, case in cases.items() if "failed" not in case}
    cells: list[object] = [exporter, tool or "-", len(done), sum(case["targets"] for case in done.values())]
    for way in WAYS:
        ways = [case["ways"][way] for case in done.values()]
        apart = max((each["apart"] for each in ways if "apart" in each), default=None)
        cells += [sum(each["found"] for each in ways), "-" if apart is None else f"{apart:.1e}"]
    base = max((case["base"] for case in done.values()), default=0.0)
    return f"| {' | '.join(map(str, [*cells, f'{base:.1e}', _say(cases)]))} |"


def _say(cases: Mapping[str, Case]) -> str:
    said = []
    for way in WAYS:
        ways = {model: case["ways"][way] for model, case in cases.items() if "ways" in case}
        refused = [f"{model} {', '.join(each['codes'])}" for model, each in ways.items() if "codes" in each]
        said += [f"{way}: {'; '.join(refused)}"] if refused else []
    failed = [f"{model} ({case['failed']})" for model, case in cases.items() if "failed" in case]
    return ". ".join([*said, *([f"the tool fails: {', '.join(failed)}"] if failed else [])])


def _name_versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


if __name__ == "__main__":
    main()
