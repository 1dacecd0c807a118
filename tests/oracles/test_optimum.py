"""Optimum's exports: decoders with a cache, and an encoder-decoder whose two decoders share weights under an `If`.

Needs optimum-onnx, whose transformers is older than that of the other oracle tests: an environment of its own.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxruntime", "optimum.exporters.onnx"):
    pytest.importorskip(_package, reason=f"these tests need {_package}")


def export(lab: "Lab", model: str) -> dict[str, Path]:
    import zoo_wide  # noqa: F401 - more models
    from builders_of_graphs import export_with_optimum

    return export_with_optimum(lab.trained(model).specimen, lab.root / f"optimum-{model}")


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "distilbert"])
@pytest.mark.parametrize("way", ["names", "checkpoint"])
def test_one_graph(lab: "Lab", tmp_path: Path, model: str, way: str) -> None:
    from builders_of_graphs import run_whole
    from lab import ABSOLUTE_TOLERANCE

    import loraformat

    graphs, trained = export(lab, model), lab.trained(model)
    options = {"base_checkpoint": graphs["model"].parent.parent / "torch"} if way == "checkpoint" else {}
    receipt = loraformat.merge(graphs["model"], [trained.folder], tmp_path / "merged.onnx", **options)
    assert {target for weight in receipt.weights for target in weight.targets} == set(trained.deltas)
    mask = trained.feeds["attention_mask"][..., None].astype(bool)
    found, wanted = run_whole(tmp_path / "merged.onnx", trained.feeds)["logits"], trained.unmerged["logits"]
    if found.ndim == 3:  # Of padding the two make different things.
        found, wanted = found * mask, wanted * mask
    assert np.abs(found - wanted).max() <= ABSOLUTE_TOLERANCE < trained.effect / 100


HALVES = {"t5": "encoder.", "whisper": "model.encoder."}
"""Models of two halves, and what their encoders' exports lack of the names."""


@pytest.mark.parametrize("model", HALVES)
def test_both_branches_of_a_merged_decoder(lab: "Lab", tmp_path: Path, model: str) -> None:
    """Step by step through the decoder: the first token through one branch, the others with a cache through another."""
    import loraformat

    graphs, trained = export(lab, model), lab.trained(model)
    encoder, decoder = tmp_path / "encoder.onnx", tmp_path / "decoder.onnx"
    halves = [
        loraformat.merge(
            graphs["encoder_model"],
            [trained.folder],
            encoder,
            strip_prefix=HALVES[model],
            allow_unmatched=["*decoder.*"],
        ),
        loraformat.merge(
            graphs["decoder_model_merged"], [trained.folder], decoder, allow_unmatched=[f"{HALVES[model]}*"]
        ),
    ]
    targets = {target for half in halves for weight in half.weights for target in weight.targets}
    assert {target.removeprefix(HALVES[model]) for target in targets} == {
        target.removeprefix(HALVES[model]) for target in trained.deltas
    }
    check_steps(encoder, (decoder, decoder), trained)


def check_steps(encoder: Path, decoders: tuple[Path, Path], trained: Any) -> None:
    """Compare what the halves compute token by token with PEFT's unmerged model; the second decoder has a cache."""
    from builders_of_graphs import run_whole
    from lab import ABSOLUTE_TOLERANCE

    feeds = dict(trained.feeds)
    if "input_ids" in feeds:
        feeds["attention_mask"] = np.ones_like(feeds["input_ids"])
    hidden = next(iter(run_whole(encoder, feeds).values()))
    cache: dict[str, Any] = {}
    for step in range(feeds["decoder_input_ids"].shape[1]):
        own = {
            "input_ids": feeds["decoder_input_ids"][:, step : step + 1],
            "encoder_hidden_states": hidden,
            "use_cache_branch": np.array([step > 0]),
        }
        own |= {"encoder_attention_mask": feeds["attention_mask"]} if "attention_mask" in feeds else {}
        own["cache_position"] = np.array([step])
        found = run_whole(decoders[step > 0], own | cache)
        kept = {name.replace("present", "past_key_values"): value for name, value in found.items() if "present" in name}
        cache |= {name: value for name, value in kept.items() if step == 0 or "encoder" not in name}
        apart = np.abs(found["logits"][:, 0] - trained.unmerged["logits"][:, step]).max()
        assert apart <= ABSOLUTE_TOLERANCE < trained.effect / 100


@pytest.mark.parametrize("model", HALVES)
def test_the_whole_folder(lab: "Lab", tmp_path: Path, model: str) -> None:
    """Encoder and three decoders at once: whichever a runtime takes, it has the adapter."""
    import loraformat

    base = export(lab, model)["encoder_model"].parent
    trained = lab.trained(model)
    receipt = loraformat.merge(base, [trained.folder], tmp_path / "out")
    assert {target for weight in receipt.weights for target in weight.targets} == set(trained.deltas)
    assert receipt.adapters[0].targets == len(trained.deltas)
    graphs = {path.stem: path for path in (tmp_path / "out").glob("*.onnx")}
    assert len(graphs) == 4
    encoder, merged = graphs["encoder_model"], graphs["decoder_model_merged"]
    check_steps(encoder, (merged, merged), trained)
    check_steps(encoder, (graphs["decoder_model"], graphs["decoder_with_past_model"]), trained)
    assert loraformat.verify(tmp_path / "out", base, [trained.folder]).holds


@pytest.mark.parametrize("model", HALVES)
def test_a_set_beside_the_folder(lab: "Lab", tmp_path: Path, model: str) -> None:
    """Small graphs that refer to the folder's data: the same tokens, and a decoder alone where only it is chosen."""
    import loraformat

    base = tmp_path / "onnx"
    shutil.copytree(export(lab, model)["encoder_model"].parent, base)
    trained = lab.trained(model)
    loraformat.merge(base, [trained.folder], base / "own.graphs.json", external_data="share")
    thin = {path.stem.removesuffix("-own"): path for path in base.glob("*-own.onnx")}
    encoder = thin.get("encoder_model", base / "encoder_model.onnx")
    check_steps(encoder, (thin["decoder_model_merged"], thin["decoder_model_merged"]), trained)
    check_steps(encoder, (thin["decoder_model"], thin["decoder_with_past_model"]), trained)
    assert loraformat.verify(base / "own.graphs.json", base, [trained.folder]).holds
    halves = [name for name in trained.deltas if "encoder" in name.split(".")]
    some = {"graphs": ["decoder_model.onnx"], "allow_unmatched": halves}
    receipt = loraformat.merge(base, [trained.folder], tmp_path / "some", **some)
    assert {weight.name.partition(":")[0] for weight in receipt.weights} == {"decoder_model.onnx"}
    assert loraformat.verify(tmp_path / "some", base, [trained.folder]).holds


@pytest.mark.parametrize("model", HALVES)
def test_the_whole_folder_without_names(lab: "Lab", tmp_path: Path, model: str) -> None:
    """What layers do finds them in all four graphs, and in both branches of the merged decoder."""
    from onnx_paths import forget_names

    import loraformat

    graphs, trained, base = export(lab, model), lab.trained(model), tmp_path / "base"
    base.mkdir()
    for source in graphs.values():
        forget_names(trained.specimen, source, base / source.name)
    receipt = loraformat.merge(base, [trained.folder], tmp_path / "out", resolve="structure")
    assert {target for weight in receipt.weights for target in weight.targets} == set(trained.deltas)
    graphs = {path.stem: path for path in (tmp_path / "out").glob("*.onnx")}
    encoder, merged = graphs["encoder_model"], graphs["decoder_model_merged"]
    check_steps(encoder, (merged, merged), trained)
    check_steps(encoder, (graphs["decoder_model"], graphs["decoder_with_past_model"]), trained)


def test_a_decoder_without_its_own_half_lacks_what_the_cache_holds(lab: "Lab", tmp_path: Path) -> None:
    """The graph that runs with a cache has no keys and values of the encoder to compute: said, not passed over."""
    import loraformat

    graphs, trained = export(lab, "t5"), lab.trained("t5")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(
            graphs["decoder_with_past_model"],
            [trained.folder],
            tmp_path / "m.onnx",
            allow_unmatched=["encoder.*"],
        )
    assert set(caught.value.codes) == {"LF401"}
    layers = [f"decoder.block.{layer}.layer.1.EncDecAttention.{name}" for layer in (0, 1) for name in "kv"]
    assert sorted(problem.where for problem in caught.value.problems) == layers
