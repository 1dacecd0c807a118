"""The face of conversion: files in, files out, every tensor accounted for, and nothing left behind when it fails."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loraformat
from builders import write_peft, write_tensors
from loraformat.adapter import SlotKind
from loraformat.conversion import SchemeSummary, list_pairs, tabulate_pairs
from loraformat.conversion._proof import prove
from loraformat.errors import LoraformatError
from loraformat.loading import load_adapter
from schemes import modules as m

DOWN, UP = "lora_down.weight", "lora_up.weight"


def write_file(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Path:
    return write_tensors(path, {name: factor.read() for name, factor in tensors.items()}, metadata)


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """Return kohya's file of a FLUX adapter."""
    modules = m.flat("lora_unet", m.FLUX_BFL) | m.flat("lora_te1", m.CLIP)
    return write_file(tmp_path / "flux.safetensors", m.lora(modules, DOWN, UP, alpha=3.0), {"ss_network_dim": "2"})


def codes(call: Any) -> tuple[str, ...]:
    with pytest.raises(LoraformatError) as caught:
        call()
    return caught.value.codes


def test_a_file_becomes_a_file(flux: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = loraformat.convert(flux, "diffusers", output, verify=True)
    assert (done.origin, done.scheme, done.output, done.targets) == ("kohya", "diffusers", output, 13)
    assert (len(done.account.converted), len(done.account.carried), done.account.refused) == (16, 8, ())
    assert str(done.account) == "16 converted, 8 carried, 0 refused"
    assert done.proof is not None
    assert (done.proof.modules, done.proof.relative, done.proof.missing) == (8, 0.0, ())
    adapter = load_adapter(output)
    assert {target.scale for target in adapter.targets} == {1.5}


def test_numbers_that_are_not_finite_are_carried_with_a_warning(tmp_path: Path) -> None:
    """Bit for bit, as a conversion moves all numbers; a proof tells NaN from another number."""
    tensors = m.lora(m.flat("lora_unet", m.SD1_DIFFUSERS), DOWN, UP, alpha=1.0)
    arrays = {name: np.array(factor.read()) for name, factor in tensors.items()}
    name = next(name for name in arrays if name.endswith(DOWN))
    arrays[name].flat[2] = np.nan
    source = write_tensors(tmp_path / "in.safetensors", arrays)
    done = loraformat.convert(source, "diffusers", tmp_path / "out.safetensors", verify=True)
    (warning,) = [problem for problem in done.problems if problem.code == "LF501"]
    assert (warning.severity, "1 of" in warning.found) == ("warning", True)
    assert done.proof is not None
    assert done.proof.relative == 0
    sound = arrays | {name: np.nan_to_num(arrays[name])}
    one, other = (
        load_adapter(write_tensors(tmp_path / f"{index}.safetensors", each))
        for index, each in enumerate((arrays, sound))
    )
    assert prove(one.targets, other.targets).relative == np.inf


def test_the_way_back_gives_the_same_tensors_and_annotations(flux: Path, tmp_path: Path) -> None:
    loraformat.convert(flux, "diffusers", tmp_path / "a.safetensors")
    loraformat.convert(tmp_path / "a.safetensors", "dotted", tmp_path / "b.safetensors")
    loraformat.convert(tmp_path / "b.safetensors", "native", tmp_path / "c.safetensors")
    loraformat.convert(tmp_path / "c.safetensors", "kohya", tmp_path / "d.safetensors")
    loraformat.convert(flux, "kohya", tmp_path / "e.safetensors")
    first, last = (_read(path) for path in (flux, tmp_path / "d.safetensors"))
    assert first == last
    assert b"ss_network_dim" in (tmp_path / "d.safetensors").read_bytes()


def _read(path: Path) -> dict[str, tuple[object, ...]]:
    from safetensors.numpy import load_file

    return {name: (each.dtype, each.shape, each.tobytes()) for name, each in load_file(path).items()}


def test_the_same_conversion_gives_the_same_bytes(flux: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        loraformat.convert(flux, "dotted", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_folder_of_peft(flux: Path, tmp_path: Path) -> None:
    source = tmp_path / "unet.safetensors"
    write_file(source, m.lora(m.flat("lora_unet", m.SD1_DIFFUSERS), DOWN, UP, alpha=1.0))
    folder = tmp_path / "peft"
    loraformat.convert(source, "peft", folder, verify=True)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 1)
    again = tmp_path / "again.safetensors"
    loraformat.convert(folder, "kohya", again, verify=True)
    assert _read(again) == _read(source)
    assert codes(lambda: loraformat.convert(source, "peft", folder)) == ("LF601",)
    loraformat.convert(source, "peft", folder, force=True)
    assert codes(lambda: loraformat.convert(flux, "peft", tmp_path / "two parts")) == ("LF312",)
    assert not (tmp_path / "two parts").exists()


def test_an_own_configuration_comes_back_as_it_was(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    factors = {"a.q": (dice.standard_normal((2, 5)), dice.standard_normal((6, 2)))}
    folder = write_peft(tmp_path / "in", factors, alpha=12, target_modules=["q"], something_of_next_year={"x": 1})
    loraformat.convert(folder, "native", tmp_path / "n.safetensors")
    loraformat.convert(tmp_path / "n.safetensors", "peft", tmp_path / "out")
    config = [json.loads((each / "adapter_config.json").read_text()) for each in (folder, tmp_path / "out")]
    assert config[0] == config[1]
    assert _read(folder / "adapter_model.safetensors") == _read(tmp_path / "out" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("scheme", "name", "other"),
    [
        ("mlx", "adapters.npz", "adapters.safetensors"),
        ("mlx", "0000100_adapters.npz", "adapters.safetensors"),
        ("peft", "adapter_model.bin", "adapter_model.safetensors"),
    ],
)
def test_an_output_called_as_a_file_of_the_folder_is_that_file(
    scheme: str, name: str, other: str, tmp_path: Path
) -> None:
    """The name says the container too; the configuration stands beside it, and both are read again."""
    dice = np.random.default_rng(0)
    source = write_peft(tmp_path / "in", {"a.q": (dice.standard_normal((2, 5)), dice.standard_normal((6, 2)))}, alpha=3)
    loraformat.convert(source, scheme, tmp_path / name, verify=True)
    assert (tmp_path / name).read_bytes()[:2] == b"PK"
    assert {path.name for path in tmp_path.iterdir()} == {"in", name, "adapter_config.json"}
    assert codes(lambda: loraformat.convert(source, scheme, tmp_path / name)) == ("LF601",)
    (tmp_path / "folder").mkdir()
    loraformat.convert(tmp_path / name, scheme, tmp_path / "folder" / other, verify=True)
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {other, "adapter_config.json"}
    assert [(target.name, target.scale) for target in load_adapter(tmp_path / "folder").targets] == [("a.q", 1.5)]


def test_a_form_that_the_container_lacks(tmp_path: Path) -> None:
    factors = {"a.q": (np.ones((2, 5), ml_dtypes.bfloat16), np.ones((6, 2), ml_dtypes.bfloat16))}
    source = write_peft(tmp_path / "in", factors, alpha=3)
    assert codes(lambda: loraformat.convert(source, "mlx", tmp_path / "adapters.npz")) == ("LF132",)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_plan_says_how_every_tensor_is_made(flux: Path) -> None:
    plan = loraformat.plan_conversion(flux, "diffusers")
    steps = {step.name: step for step in plan.steps}
    up = steps["transformer.transformer_blocks.0.attn.to_k.lora_B.weight"]
    assert up.sources == ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",)
    assert up.operations == ("rows 6:12",)
    assert steps["transformer.norm_out.linear.lora_B.weight"].operations == ("swap halves of rows",)
    assert steps["transformer.norm_out.linear.lora_A.weight"].operations == ()
    assert plan.output is None
    record = json.loads(json.dumps(plan.as_json()))
    assert record["account"] == {"converted": 16, "carried": list(plan.account.carried), "refused": []}


def test_parts_with_one_a_are_joined_and_others_stand_on_a_diagonal(tmp_path: Path) -> None:
    parts = {f"transformer.transformer_blocks.0.attn.{name}": (6, 5) for name in ("to_q", "to_k", "to_v")}
    tensors = {name: each.read() for name, each in m.lora(parts, "lora_A.weight", "lora_B.weight").items()}
    source = write_tensors(tmp_path / "apart.safetensors", tensors)
    plan = loraformat.plan_conversion(source, "dotted", base=_flux_config(tmp_path))
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert {step.name: step.operations for step in plan.steps} == {
        f"{name}.lora_A.weight": ("concatenate rows",),
        f"{name}.lora_B.weight": ("block-diagonal",),
    }
    shared = tensors | {key: tensors[next(iter(tensors))] for key in tensors if "lora_A" in key}
    source = write_tensors(tmp_path / "shared.safetensors", shared)
    plan = loraformat.plan_conversion(source, "dotted", base=_flux_config(tmp_path))
    assert {step.name: step.operations for step in plan.steps} == {
        f"{name}.lora_A.weight": (),
        f"{name}.lora_B.weight": ("concatenate rows",),
    }
    assert len(plan.account.carried) == 2


def _flux_config(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text('{"_class_name": "FluxTransformer2DModel"}', encoding="utf-8")
    return path


def test_names_of_two_models_are_asked_about(tmp_path: Path) -> None:
    tensors = m.lora({"transformer.transformer_blocks.0.attn.to_q": (6, 5)}, "lora_A.weight", "lora_B.weight")
    source = write_file(tmp_path / "a.safetensors", tensors)
    assert codes(lambda: loraformat.convert(source, "kohya", tmp_path / "b")) == ("LF316",)
    loraformat.convert(source, "kohya", tmp_path / "b", base=_flux_config(tmp_path), verify=True)


def test_parts_of_different_scales(tmp_path: Path) -> None:
    """A ratio of two is exact; one of three is no power of two, and the tensors are float32 already."""
    parts = {f"transformer.transformer_blocks.0.attn.{name}": (6, 5) for name in ("to_q", "to_k")}
    tensors = {name: each.read() for name, each in m.lora(parts, "lora_A.weight", "lora_B.weight", alpha=2.0).items()}
    key = "transformer.transformer_blocks.0.attn.to_k.alpha"
    config = _flux_config(tmp_path)
    for alpha, expected in ((4.0, ()), (6.0, ("LF313",))):
        tensors[key] = np.array(alpha, np.float32)
        source = write_tensors(tmp_path / f"{alpha}.safetensors", tensors)
        found = loraformat.plan_conversion(source, "dotted", base=config).problems
        assert tuple(each.code for each in found if each.severity == "error") == expected
    assert codes(lambda: loraformat.convert(source, "dotted", tmp_path / "out", base=config)) == ("LF313",)
    done = loraformat.convert(source, "dotted", tmp_path / "out", base=config, allow_rounding=True, verify=True)
    assert [each.severity for each in done.problems if each.code == "LF313"] == ["warning"]
    assert done.proof is not None
    assert 0 < done.proof.relative < 1e-6


def test_payloads_of_fused_weights(tmp_path: Path) -> None:
    """Rows of LoHa's first factors are outputs, so it splits; LoKr's are not."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    dice = np.random.default_rng(0)
    loha = {"hada_w1_a": (18, 2), "hada_w1_b": (2, 5), "hada_w2_a": (18, 2), "hada_w2_b": (2, 5)}
    lokr = {"lokr_w1": (3, 5), "lokr_w2": (6, 1)}
    for roles, expected in ((loha, {"LF312"}), (lokr, {"LF315"})):
        arrays = {f"{name}.{role}": dice.standard_normal(shape).astype(np.float32) for role, shape in roles.items()}
        source = write_tensors(tmp_path / "a.safetensors", arrays)
        found = loraformat.plan_conversion(source, "diffusers").problems
        assert {each.code for each in found if each.severity == "error"} == expected


def test_a_tensor_that_nothing_knows_stops_it(flux: Path, tmp_path: Path) -> None:
    more = {"stray": np.ones(3, np.float32)} | {name: _array(flux, name) for name in _read(flux)}
    source = write_tensors(tmp_path / "more.safetensors", more)
    assert codes(lambda: loraformat.convert(source, "dotted", tmp_path / "out")) == ("LF202",)
    assert loraformat.plan_conversion(source, "dotted").account.refused == ("stray",)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["mlx", "kohya", "peft", "dotted", "native", "gguf"])
def test_factors_of_other_shapes_than_their_roles_stop_it(tmp_path: Path, to: str) -> None:
    down, up = np.ones(20, np.float32), np.ones((12, 2), np.float32)
    source = write_peft(tmp_path / "in", {"model.layers.0.self_attn.q_proj": (down, up)}, r=2)
    assert codes(lambda: loraformat.convert(source, to, tmp_path / "out.safetensors")) == ("LF203",)
    assert [each.code for each in loraformat.plan_conversion(source, to).problems] == ["LF203"]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_number_beyond_what_readers_of_json_hold_stops_it(tmp_path: Path) -> None:
    """A configuration that is carried along for the way back may state anything."""
    factors = {"model.layers.0.self_attn.q_proj": (np.ones((2, 10), np.float32), np.ones((12, 2), np.float32))}
    source = write_peft(tmp_path / "in", factors, megatron_config=2**64 - 1)
    assert codes(lambda: loraformat.convert(source, "kohya", tmp_path / "out.safetensors")) == ("LF104",)


def _array(path: Path, name: str) -> Any:
    from safetensors.numpy import load_file

    return load_file(path)[name]


def test_a_conversion_that_changed_something_is_not_kept(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof reads the file that was written: let the writer write one number wrong."""
    from loraformat.containers import safetensors

    write = safetensors.write_safetensors

    def spoil(sink: Any, tensors: Any, metadata: Any) -> None:
        (name, dtype, shape, read), *others = sorted(tensors, key=lambda each: "lora_B" not in each[0])
        wrong = read()
        wrong[0, 0] += 1
        write(sink, [(name, dtype, shape, wrong), *others], metadata)

    monkeypatch.setattr(safetensors, "write_safetensors", spoil)
    output = tmp_path / "out.safetensors"
    assert codes(lambda: loraformat.convert(flux, "diffusers", output, verify=True)) == ("LF318",)
    assert [path.name for path in tmp_path.iterdir()] == [flux.name]


def test_outputs_that_would_destroy_something(flux: Path, tmp_path: Path) -> None:
    assert codes(lambda: loraformat.convert(flux, "dotted", flux, force=True)) == ("LF602",)
    (tmp_path / "out").write_text("mine")
    assert codes(lambda: loraformat.convert(flux, "dotted", tmp_path / "out")) == ("LF601",)
    assert codes(lambda: loraformat.convert(flux, "dotted", tmp_path / "no" / "out")) == ("LF605",)
    assert codes(lambda: loraformat.convert(flux, "peft", tmp_path / "out")) == ("LF312",)


def test_schemes_that_do_not_exist_or_are_only_read(flux: Path, tmp_path: Path) -> None:
    assert codes(lambda: loraformat.convert(flux, "koyha", tmp_path / "out")) == ("LF305",)
    assert codes(lambda: loraformat.convert(flux, "xlabs", tmp_path / "out")) == ("LF317",)


def test_fingerprints_do_not_outlive_their_names(flux: Path, tmp_path: Path) -> None:
    from loraformat.base_facts import NO_FACTS
    from loraformat.conversion._respelling import respell
    from loraformat.fingerprint import Fingerprint

    adapter = load_adapter(flux)
    marked = replace(adapter.targets[-1], fingerprint=Fingerprint((6, 5), tuple(map(float, range(16)))))
    moved, problems = respell(replace(adapter, targets=(*adapter.targets[:-1], marked)), "diffusers", NO_FACTS)
    assert {target.fingerprint for target in moved.targets} == {None}
    assert [problem.code for problem in problems] == ["LF319"]
    same, problems = respell(replace(adapter, targets=(marked,)), "dotted", NO_FACTS)
    assert (same.targets, problems) == ((marked,), [])


def test_every_scheme_is_listed_with_what_it_holds() -> None:
    listed = {each.name: each for each in loraformat.list_schemes()}
    assert {"native", "peft", "kohya", "diffusers", "dotted"} <= {name for name, each in listed.items() if each.writes}
    assert listed["xlabs"] == SchemeSummary("xlabs", listed["xlabs"].title, False, ("lora",), ("linear",), "not stored")
    assert listed["native"].kinds == ()
    assert "loha" in listed["kohya"].kinds
    assert SlotKind.EMBEDDING.value not in listed["diffusers"].slots
    for each in listed.values():
        assert json.loads(json.dumps(each.as_json()))["name"] == each.name


def test_the_documentation_names_every_scheme() -> None:
    text = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text(encoding="utf-8")
    rows = [line for line in text.partition("### Every pair")[0].splitlines() if line.startswith("| `")]
    for each in loraformat.list_schemes():
        (row,) = [line for line in rows if f"`{each.name}`" in line]
        cells = [cell.strip() for cell in row.split("|")]
        assert (cells[4] != "") == each.writes, row


def test_the_documentation_has_the_table_of_all_pairs() -> None:
    """Made by `loraformat schemes --pairs`."""
    text = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text(encoding="utf-8")
    assert tabulate_pairs(list_pairs()) in text


def test_pairs_say_what_has_no_place() -> None:
    pairs = {(pair.source, pair.target): pair for pair in list_pairs()}
    listed = loraformat.list_schemes()
    assert len(pairs) == len(listed) * sum(each.writes for each in listed)
    assert all(str(pair) == "=" for (source, target), pair in pairs.items() if source == target or target == "native")
    assert str(pairs["litgpt", "kohya"]) == "–"
    assert str(pairs["kohya", "diffusers"]) == "ks"
    assert {"loha", "lokr"} <= set(pairs["kohya", "diffusers"].kinds)
    assert pairs["mlx", "onnx_adapter"].scale == "folded"
    assert (pairs["peft", "mlx"].scale, pairs["torchtune", "mlx"].scale) == ("levelled", "")
    assert json.loads(json.dumps(pairs["peft", "gguf"].as_json()))["models"] == "some"
