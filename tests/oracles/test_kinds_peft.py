"""Each kind of PEFT's, merged, computes what its trained module computed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

import loraformat

if TYPE_CHECKING:
    from kind_zoo import Arrays, Trained
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")


def names() -> list[str]:
    from kind_zoo import SPECIMENS

    return list(SPECIMENS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Trained]":
    """Return a function from a specimen's name to what it left behind, made once."""
    from kind_zoo import SPECIMENS, train

    made: dict[str, Trained] = {}

    def find(name: str) -> "Trained":
        if name not in made:
            made[name] = train(SPECIMENS[name], tmp_path_factory.mktemp("kinds"))
        return made[name]

    return find


def outputs_of(weights: Path, specimen: str) -> "Arrays":
    """Return what plain modules compute with the weights of a file."""
    from kind_zoo import SPECIMENS, Parts, make_inputs, run
    from safetensors.torch import load_file

    form, wanted = SPECIMENS[specimen].form, SPECIMENS[specimen].targets
    model = Parts().to(form).eval()
    model.load_state_dict(load_file(weights))
    return run(model, {name: value for name, value in make_inputs(form).items() if name in wanted})


@pytest.mark.parametrize("specimen", names())
def test_what_training_computed(trained: "Callable[[str], Trained]", tmp_path: Path, specimen: str) -> None:
    from kind_zoo import SPECIMENS
    from lab import note

    left = trained(specimen)
    receipt = loraformat.merge(left.base, [left.folder], tmp_path / "merged.safetensors")
    assert {name.rpartition(".")[0] for name in (weight.name for weight in receipt.weights)} == set(left.unmerged)
    found = outputs_of(tmp_path / "merged.safetensors", specimen)
    for name, expected in left.unmerged.items():
        size = float(np.abs(expected).max())
        apart = float(np.abs(found[name] - expected).max()) / size
        effect = float(np.abs(left.before[name] - expected).max()) / size
        note(f"kind {specimen} {name}", apart=apart, effect=effect)
        assert effect > 1e-2, (name, effect)
        assert apart < SPECIMENS[specimen].tolerance, (name, apart)


@pytest.mark.parametrize("specimen", names())
def test_our_own_file_says_the_same(trained: "Callable[[str], Trained]", tmp_path: Path, specimen: str) -> None:
    left = trained(specimen)
    own = loraformat.save(loraformat.load(left.folder), tmp_path / "adapter.safetensors")
    for name, adapter in (("peft", left.folder), ("own", own)):
        loraformat.merge(left.base, [adapter], tmp_path / f"{name}.safetensors")
    found = [outputs_of(tmp_path / f"{name}.safetensors", specimen) for name in ("peft", "own")]
    assert all((found[0][name] == found[1][name]).all() for name in found[0])


@pytest.mark.parametrize("specimen", ["dora", "vera", "fourierft", "ia3", "oft"])
def test_a_fingerprint_binds_it_to_its_base(trained: "Callable[[str], Trained]", tmp_path: Path, specimen: str) -> None:
    """Also where only the base knows the shape that was sampled."""
    from safetensors.numpy import load_file, save_file

    left = trained(specimen)
    bound = loraformat.save(loraformat.stamp(left.folder, left.base), tmp_path / "bound.safetensors")
    loraformat.merge(left.base, [bound], tmp_path / "merged.safetensors")
    save_file({name: array + 1 for name, array in load_file(left.base).items()}, tmp_path / "other.safetensors")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(tmp_path / "other.safetensors", [bound], tmp_path / "wrong.safetensors")
    assert set(caught.value.codes) == {"LF406"}


@pytest.mark.parametrize("factors", [2, 3])
def test_butterflies_without_the_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factors: int) -> None:
    """PEFT puts blocks on a diagonal by an extension for CUDA, and takes one factor without it; torch has that too."""
    import peft
    import torch
    from kind_zoo import LINEAR, SPECIMENS, Specimen, train
    from peft.tuners.boft import layer

    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    monkeypatch.setattr(layer, "_FBD_CUDA", SimpleNamespace(forward=forward))
    size = {2: 6, 3: 2}[factors]
    specimen = Specimen(
        lambda t: peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=t),
        LINEAR if factors == 2 else ("lin",),
    )
    monkeypatch.setitem(SPECIMENS, "butterflies", specimen)
    left = train(specimen, tmp_path)
    loraformat.merge(left.base, [left.folder], tmp_path / "merged.safetensors")
    found = outputs_of(tmp_path / "merged.safetensors", "butterflies")
    for name, expected in left.unmerged.items():
        assert np.abs(left.before[name] - expected).max() > 1e-2
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-9)


def test_a_convolution_of_oft_is_no_weight(tmp_path: Path) -> None:
    """PEFT turns patches of the image and puts them together again; its own merge computes something else."""
    import peft
    from kind_zoo import Specimen, train

    left = train(
        Specimen(lambda targets: peft.OFTConfig(r=0, oft_block_size=4, target_modules=targets), ("conv",)), tmp_path
    )
    assert left.merged is not None
    apart, size = np.abs(left.merged["conv"] - left.unmerged["conv"]).max(), np.abs(left.unmerged["conv"]).max()
    assert apart > 0.1 * size
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(left.base, [left.folder], tmp_path / "merged.safetensors")
    assert caught.value.codes == ("LF209",)
    assert "image" in str(caught.value)


def test_two_functions_of_one_weight_are_refused(trained: "Callable[[str], Trained]", tmp_path: Path) -> None:
    one, other = trained("hra"), trained("boft")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(one.base, [one.folder, other.folder], tmp_path / "merged.safetensors")
    assert set(caught.value.codes) == {"LF409"}


def test_a_change_that_is_added_goes_on_top_of_a_function(trained: "Callable[[str], Trained]", tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    turned, added = trained("hra"), trained("loha")
    both = tmp_path / "both.safetensors"
    loraformat.merge(turned.base, [added.folder, turned.folder], both)
    weights = {}
    for name, adapters in (("turned", [turned.folder]), ("added", [added.folder])):
        loraformat.merge(turned.base, adapters, tmp_path / f"{name}.safetensors")
        weights[name] = load_file(tmp_path / f"{name}.safetensors")
    base, found = load_file(turned.base), load_file(both)
    expected = weights["turned"]["lin.weight"] + weights["added"]["lin.weight"] - base["lin.weight"]
    np.testing.assert_allclose(found["lin.weight"], expected, rtol=1e-12, atol=1e-12)


def test_half_of_a_function_lies_half_way(trained: "Callable[[str], Trained]", tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    left = trained("oft")
    for weight in (1.0, 0.5):
        loraformat.merge(left.base, [(left.folder, weight)], tmp_path / f"{weight}.safetensors")
    base, whole, half = (load_file(path) for path in (left.base, *(tmp_path / f"{w}.safetensors" for w in (1.0, 0.5))))
    np.testing.assert_allclose(half["lin.weight"], (base["lin.weight"] + whole["lin.weight"]) / 2, rtol=1e-12)


@pytest.mark.parametrize("form", ["bfloat16", "float16"])
@pytest.mark.parametrize("specimen", ["dora", "dora turned", "ia3", "oft", "vera", "lokr", "miss bat", "road 2"])
def test_narrow_weights_are_rounded_once(
    trained: "Callable[[str], Trained]", tmp_path: Path, specimen: str, form: str
) -> None:
    """The merged weight is the wide one to half a unit in the last place, and what float32 costs on the way."""
    import torch
    from safetensors.torch import load_file, save_file

    left, narrow = trained(specimen), getattr(torch, form)
    base = {name: tensor.to(narrow) for name, tensor in load_file(left.base).items()}
    save_file(base, tmp_path / "narrow.safetensors")
    save_file({name: tensor.double() for name, tensor in base.items()}, tmp_path / "wide.safetensors")
    for name in ("narrow", "wide"):
        loraformat.merge(tmp_path / f"{name}.safetensors", [left.folder], tmp_path / f"merged-{name}.safetensors")
    found, wide = (load_file(tmp_path / f"merged-{name}.safetensors") for name in ("narrow", "wide"))
    for name, exact in wide.items():
        assert found[name].dtype == narrow
        unit = torch.finfo(narrow).eps * exact.abs().clamp(min=float(torch.finfo(narrow).smallest_normal))
        assert ((found[name].double() - exact).abs() <= 0.51 * unit + 1e-6).all(), name


def _configure(kind: str, targets: "list[str] | str", turned: bool) -> object:
    import peft

    makers: dict[str, Callable[[], object]] = {
        "dora": lambda: peft.LoraConfig(
            r=3, lora_alpha=6, use_dora=True, fan_in_fan_out=turned, target_modules=targets
        ),
        "vera": lambda: peft.VeraConfig(r=8, fan_in_fan_out=turned, target_modules=targets),
        "loha": lambda: peft.LoHaConfig(r=3, alpha=6, init_weights=False, target_modules=targets),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=targets),
        "hra": lambda: peft.HRAConfig(r=4, target_modules=targets),
        "deft": lambda: peft.DeftConfig(r=3, target_modules=targets),
        "osf": lambda: peft.OSFConfig(effective_rank=5, target_modules=targets),
    }
    return makers[kind]()


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("llama", "dora"),
        ("llama", "loha"),
        ("llama", "oft"),
        ("llama", "hra"),
        ("llama", "deft"),
        ("llama", "osf"),
        ("gpt2", "dora"),
        ("gpt2", "vera"),
    ],
)
def test_in_a_graph(lab: "Lab", tmp_path: Path, model: str, kind: str, exporter: str) -> None:
    """The exporters store a Linear's matrix transposed: columns have norms, and rows are turned in blocks."""
    import zoo
    from lab import ABSOLUTE_TOLERANCE, difference, note

    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    specimen = zoo.SPECIMENS[model]
    targets = {"llama": ["q_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[model]
    config = _configure(kind, targets, turned=model == "gpt2")
    left = zoo.train(specimen, tmp_path / "adapter", lora=config)  # type: ignore[arg-type]
    assert left.effect > 1e-2
    loraformat.merge(lab.exported(model, exporter), [left.folder], tmp_path / "merged.onnx")
    found = zoo.run_onnx(tmp_path / "merged.onnx", left.feeds, specimen.outputs)
    note(f"kind in graph {model} {kind} {exporter}", apart=difference(found, left.unmerged), effect=left.effect)
    assert difference(found, left.unmerged) <= ABSOLUTE_TOLERANCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("specimen", names())
def test_it_is_written_as_peft_reads_it(trained: "Callable[[str], Trained]", tmp_path: Path, specimen: str) -> None:
    """By way of our own file, which stores what targets share once as well."""
    import peft
    import torch
    from kind_zoo import SPECIMENS, Parts, make_inputs, run
    from safetensors.torch import load_file

    left, form = trained(specimen), SPECIMENS[specimen].form
    own = loraformat.save(loraformat.load(left.folder), tmp_path / "adapter.safetensors")
    loraformat.convert(own, "peft", tmp_path / "again")
    stored, written = (load_file(folder / "adapter_model.safetensors") for folder in (left.folder, tmp_path / "again"))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())
    if specimen == "vblora topk":  # PEFT itself does not read it in float64.
        return
    model = Parts().to(form).eval()
    model.load_state_dict(load_file(left.base))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "again", autocast_adapter_dtype=False).to(form).eval()
    with torch.no_grad():
        inputs = {name: value for name, value in make_inputs(form).items() if name in SPECIMENS[specimen].targets}
        found = run(adapted, inputs)
    for name, expected in left.unmerged.items():
        np.testing.assert_array_equal(found[name], expected)
