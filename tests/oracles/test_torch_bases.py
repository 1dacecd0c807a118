"""torch checkpoints and model folders as bases: torch, transformers and every unzip read what comes out."""

import json
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import loraformat
from builders import lora_factors, write_peft
from loraformat.bases import BaseModel, NewContents
from loraformat.dtypes import BY_NAME
from loraformat.images import NewOutput, OutputTensor
from loraformat.loading import open_base
from outputs import rewrite_spans, write_images

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="the oracle tests need torch")  # type: ignore[assignment]

State = Mapping[str, "torch.Tensor"]
FORMS = [name for name in BY_NAME if name.startswith(("float64", "float32", "float16", "bfloat16", "float8"))]
FORMS = [name for name in FORMS if isinstance(getattr(torch, name, None), torch.dtype) and name != "float8_e8m0fnu"]
Q = "body.0"


class Network(torch.nn.Module):  # type: ignore[misc]
    """Tied weights, a list, a kernel, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.body = torch.nn.ModuleList([torch.nn.Linear(6, 9), torch.nn.LayerNorm(9), torch.nn.Conv2d(3, 5, (2, 3))])
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def load_checked(path: Path) -> Any:
    """Return what torch loads, after every checksum was found right."""
    with zipfile.ZipFile(path) as theirs:
        assert theirs.testzip() is None
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", str(path)], check=True, capture_output=True)
    return torch.load(path, weights_only=True)


def bits(value: "torch.Tensor") -> bytes:
    flat = value.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert bits(found[name]) == bits(value), name


def overwrite(base: BaseModel, output: Path, changed: State) -> None:
    """Write an output with the new numbers of some tensors, as a merge does."""
    images = base.describe_images(NewOutput(output, 40, "0"))
    write_images(images)
    rewrite_spans(base, images, {name: bits(value) for name, value in changed.items()})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["bin", "pt"])
def test_a_state_dict_of_any_form_with_rewritten_spans(form: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        name: value.to(getattr(torch, form)) if value.is_floating_point() else value
        for name, value in Network().state_dict().items()
    }
    state["head.weight"] = state["embed.weight"]
    path = tmp_path / f"model.{suffix}"
    torch.save(state, path)
    changed = {
        name: torch.flip(state[name].to(torch.float32), (0,)).to(state[name].dtype)
        for name in (f"{Q}.weight", f"{Q}.bias")
    }
    overwrite(open_base(path), tmp_path / f"out.{suffix}", changed)
    found = load_checked(tmp_path / f"out.{suffix}")
    assert_same(found, state | changed)
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    assert bits(changed[f"{Q}.weight"]) != bits(state[f"{Q}.weight"])


def test_tied_and_sliced_tensors_are_known_to_be_so(tmp_path: Path) -> None:
    fused = torch.arange(48.0).reshape(12, 4)
    state = {**Network().state_dict(), "qkv.weight": fused, "q.weight": fused[:4], "turned.weight": fused.T}
    torch.save(state, tmp_path / "m.bin")
    sites = {f"{site.module}.{site.parameter}": site for site in open_base(tmp_path / "m.bin").sites}
    shared = {name: set(site.weight.consumers) for name, site in sites.items() if site.weight is not None}
    assert shared["embed.weight"] == shared["head.weight"] == {"embed.weight", "head.weight"}
    assert len(shared["qkv.weight"]) == 3
    assert len(shared["q.weight"]) > 1
    assert shared[f"{Q}.weight"] == {f"{Q}.weight"}
    obstacle = sites["turned.weight"].obstacle
    assert obstacle is not None
    assert obstacle.code == "LF150"


def test_the_mend_for_a_view_works(tmp_path: Path) -> None:
    torch.save({"turned.weight": torch.arange(6.0).reshape(2, 3).T.contiguous()}, tmp_path / "m.bin")
    (site,) = open_base(tmp_path / "m.bin").sites
    assert site.obstacle is None


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16"])
def test_a_trainers_checkpoint_is_merged(form: str, tmp_path: Path) -> None:
    dtype = getattr(torch, form)
    model = Network().to(dtype)
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "hyper": {"lr": 1e-3}}, tmp_path / "last.ckpt")
    rng = np.random.default_rng(5)
    down, up = lora_factors(rng, 9, 6, 2)
    adapter = write_peft(tmp_path / "task", {Q: (down, up)}, r=2, alpha=4)
    loraformat.merge(tmp_path / "last.ckpt", [adapter], tmp_path / "out.ckpt")
    found = load_checked(tmp_path / "out.ckpt")
    assert (found["epoch"], found["hyper"]) == (3, {"lr": 1e-3})
    expected = dict(model.state_dict())
    delta = 2 * torch.from_numpy(up).double() @ torch.from_numpy(down).double()
    wanted = expected[f"{Q}.weight"].double() + delta
    merged = found["state_dict"].pop(f"{Q}.weight")
    del expected[f"{Q}.weight"]
    assert_same(found["state_dict"], expected)
    assert merged.dtype == dtype
    spacing = {"float32": 2**-22, "bfloat16": 2**-8, "float16": 2**-11}[form]
    assert bool(((merged.double() - wanted).abs() <= spacing * wanted.abs() + 1e-6).all())


# --- model folders ---------------------------------------------------------------------------------------------------


def make_llama(folder: Path, shards: bool, *, tied: bool) -> Any:
    """Save a small Llama as transformers did before version 5: torch's format, one file or shards with an index."""
    transformers = pytest.importorskip("transformers", reason="the oracle tests need transformers")
    hub = pytest.importorskip("huggingface_hub", reason="the oracle tests need huggingface_hub")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": 37, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied, "dtype": "float32"},
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder.mkdir()
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    hub.save_torch_state_dict(
        model.state_dict(),
        folder,
        filename_pattern="pytorch_model{suffix}.bin",
        max_shard_size=6000 if shards else "5GB",
        safe_serialization=False,
    )
    if not shards:  # The hub's writer leaves tied names out; older transformers kept them, over one storage.
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def logits(folder_or_model: Any) -> Any:
    import transformers

    model = folder_or_model
    if isinstance(model, Path):
        model, told = transformers.AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 5, 9, 2]])).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [True, False])
class TestFolders:
    def test_transformers_loads_the_merged_folder(self, shards: bool, tied: bool, tmp_path: Path) -> None:
        model = make_llama(tmp_path / "m", shards, tied=tied)
        assert (len(list((tmp_path / "m").glob("*.bin"))) > 2) is shards
        rng = np.random.default_rng(5)
        target = "model.layers.1.self_attn.k_proj"
        down, up = lora_factors(rng, 8, 16, 3)
        loraformat.merge(tmp_path / "m", [write_peft(tmp_path / "task", {target: (down, up)}, alpha=6)], tmp_path / "o")
        for path in (tmp_path / "o").glob("*.bin"):
            load_checked(path)
        before = logits(model)
        with torch.no_grad():
            model.get_submodule(target).weight += 2 * torch.from_numpy(up @ down)
        after = logits(model)
        assert float((after - before).abs().max()) > 1e-3
        assert float((logits(tmp_path / "o") - after).abs().max()) < 1e-5

    def test_rewritten_spans_have_right_checksums(self, shards: bool, tied: bool, tmp_path: Path) -> None:
        model = make_llama(tmp_path / "m", shards, tied=tied)
        name = "model.layers.0.mlp.down_proj.weight"
        changed = {name: torch.flip(model.state_dict()[name], (1,))}
        overwrite(open_base(tmp_path / "m"), tmp_path / "o", changed)
        found: dict[str, Any] = {}
        for path in (tmp_path / "o").glob("*.bin"):
            found |= load_checked(path)
        expected = model.state_dict() | changed
        assert found.keys() <= expected.keys()
        assert_same({key: found[key] for key in sorted(found)}, {key: expected[key] for key in sorted(found)})

    def test_transformers_loads_it_as_safetensors(self, shards: bool, tied: bool, tmp_path: Path) -> None:
        model = make_llama(tmp_path / "m", shards, tied=tied)
        rewriter = open_base(tmp_path / "m").rewriter
        assert rewriter is not None
        write_images(
            rewriter.describe_rewritten(NewOutput(tmp_path / "o", 9, "0"), NewContents(rewriter.output_tensors()))
        )
        assert not list((tmp_path / "o").glob("*.bin"))
        assert (tmp_path / "o" / "model.safetensors.index.json").exists() is shards
        assert torch.equal(logits(tmp_path / "o"), logits(model))

    def test_transformers_loads_a_merge_into_safetensors_of_another_form(
        self, shards: bool, tied: bool, tmp_path: Path
    ) -> None:
        model = make_llama(tmp_path / "m", shards, tied=tied)
        rng = np.random.default_rng(5)
        target = "model.layers.0.mlp.gate_proj"
        down, up = lora_factors(rng, 28, 16, 3)
        adapter = write_peft(tmp_path / "task", {target: (down, up)}, alpha=6)
        loraformat.merge(tmp_path / "m", [adapter], tmp_path / "o", to="safetensors", dtype="bfloat16")
        config = json.loads((tmp_path / "o" / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
        with torch.no_grad():
            model.get_submodule(target).weight += 2 * torch.from_numpy(up @ down)
        import transformers

        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype="auto")
        assert loaded.dtype == torch.bfloat16
        expected = model.to(torch.bfloat16).state_dict()
        assert_same(loaded.state_dict(), expected)

    def test_transformers_loads_it_untied_and_grown(self, shards: bool, tied: bool, tmp_path: Path) -> None:
        """A larger vocabulary and an output layer of its own, as a merge of resized embeddings writes them."""
        model = make_llama(tmp_path / "m", shards, tied=tied)
        rewriter = open_base(tmp_path / "m").rewriter
        assert rewriter is not None
        tables = {name: torch.randn(41, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        kept = [tensor for tensor in rewriter.output_tensors() if tensor.name not in tables]
        new = [OutputTensor(name, BY_NAME["float32"], (41, 16), None) for name in tables]
        changes = {"vocab_size": 41, "tie_word_embeddings": False, "dtype": "float32"}
        images = rewriter.describe_rewritten(NewOutput(tmp_path / "o", 9, "0"), NewContents([*kept, *new], changes))
        write_images(images, fresh={name: bits(value) for name, value in tables.items()})
        before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "mo")
        assert after == before | {"vocab_size": 41, "tie_word_embeddings": False}
        model.resize_token_embeddings(41)
        model.config.tie_word_embeddings = False
        model.model.embed_tokens.weight = torch.nn.Parameter(tables["model.embed_tokens.weight"])
        model.lm_head.weight = torch.nn.Parameter(tables["lm_head.weight"])
        assert torch.equal(logits(tmp_path / "o"), logits(model))
