"""Extraction, initialisation and analysis against torch and PEFT."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import loraformat

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")


def make_model() -> Any:
    """Return a small model with a table, linear modules of other shapes, a norm, biases and a convolution."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(50, 24)
            self.conv = nn.Conv1d(24, 32, 3, padding=1)
            self.up = nn.Linear(32, 72)
            self.norm = nn.LayerNorm(72)
            self.down = nn.Linear(72, 20, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.conv(self.embed_tokens(tokens).transpose(1, 2)).transpose(1, 2)
            return self.down(self.norm(torch.relu(self.up(hidden))))

    torch.manual_seed(0)
    return Model()


def save(model: Any, path: Path) -> Path:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, str(path))
    return path


def test_a_full_fine_tune_is_extracted_and_merged_back(tmp_path: Path) -> None:
    """Two real optimiser steps change everything: without a cut the merge runs as the tuned model does."""
    import torch
    from safetensors.torch import load_file

    model = make_model()
    base = save(model, tmp_path / "base.safetensors")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        loss = model(tokens).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    tuned = save(model, tmp_path / "tuned.safetensors")
    expected = model(tokens)
    extraction = loraformat.extract(tuned, base)
    assert extraction.count()["left out"] == 0
    path = loraformat.save(extraction.adapter, tmp_path / "adapter.safetensors")
    loraformat.merge(base, [path], tmp_path / "merged.safetensors")
    again = make_model()
    again.load_state_dict(load_file(str(tmp_path / "merged.safetensors")))
    torch.testing.assert_close(again(tokens), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rank", [3, 9])
def test_a_cut_is_as_good_as_torch_linalg_svd(rank: int, tmp_path: Path) -> None:
    import torch

    model = make_model()
    base = save(model, tmp_path / "base.safetensors")
    with torch.no_grad():
        difference = 0.1 * torch.randn(model.up.weight.shape, generator=torch.Generator().manual_seed(2))
        model.up.weight += difference
    extraction = loraformat.extract(save(model, tmp_path / "tuned.safetensors"), base, rank=rank)
    u, s, vh = torch.linalg.svd(difference.double(), full_matrices=False)
    best = float((s[rank:].square().sum() / s.square().sum()).sqrt())
    record = next(each for each in extraction.parameters if each.name == "up.weight")
    assert record.error is not None
    assert record.error <= 1.01 * best
    (target,) = extraction.adapter.targets
    made = torch.from_numpy(target.factors["lora_B.weight"].read() @ target.factors["lora_A.weight"].read())
    cut = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert float((made - cut).norm() / cut.norm()) < 0.2, "the same directions, as far as the values are apart"


@pytest.mark.parametrize("method", ["gaussian", "svd", "pissa"])
def test_peft_takes_a_new_adapter(method: str, tmp_path: Path) -> None:
    """Its factors fit PEFT's modules, and PEFT's model computes base + s·B·A with them."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    model = make_model()
    base = save(model, tmp_path / "base.safetensors")
    made = loraformat.init(base, 4, ["up", "down", "embed_tokens"], method=method, alpha=6.0)
    path = loraformat.save(made.adapter, tmp_path / "new.safetensors")
    tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    loraformat.merge(base, [path], tmp_path / "merged.safetensors")
    merged = make_model()
    merged.load_state_dict(load_file(str(tmp_path / "merged.safetensors")))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down", "embed_tokens"])
    wrapped = get_peft_model(make_model(), config)
    state = {f"base_model.model.{name}": tensor for name, tensor in load_file(str(path)).items()}
    outcome = set_peft_model_state_dict(wrapped, state)
    assert not outcome.unexpected_keys
    assert not [key for key in outcome.missing_keys if "lora_" in key]
    torch.testing.assert_close(wrapped(tokens), merged(tokens), rtol=0, atol=2e-5)
    changed = not torch.equal(merged(tokens), make_model()(tokens))
    assert changed == (method == "pissa")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Return a base, and two PEFT adapters for it of other ranks."""
    import torch
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("analysis")
    folders = []
    for seed, rank in ((1, 3), (2, 5)):
        torch.manual_seed(seed)
        wrapped = get_peft_model(make_model(), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["up", "down"]))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        wrapped.save_pretrained(root / f"seed{seed}")
        folders.append(root / f"seed{seed}")
    return save(make_model(), root / "base.safetensors"), folders


def test_spectra_and_amplification_are_the_papers(trained: tuple[Path, list[Path]]) -> None:
    """Section 7 of arXiv 2106.09685, written down once more in float64 with torch.linalg.svd."""
    import torch

    base, folders = trained
    model = make_model()
    for folder, shown in zip(folders, loraformat.analyse(folders, base).adapters, strict=True):
        for target, found in zip(loraformat.load(folder).targets, shown.targets, strict=True):
            down, up = (torch.from_numpy(target.factors[r].read()).double() for r in ("lora_A.weight", "lora_B.weight"))
            rank, delta = target.rank, 2.0 * up @ down
            u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            np.testing.assert_allclose(found.values, s[:rank], rtol=1e-6)
            assert found.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-6)
            shares = s[:rank] / s[:rank].sum()
            assert found.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-6)
            weight = model.get_submodule(target.name).weight.detach().double()
            own = torch.linalg.svdvals(weight)[:rank]
            amplified = found.amplification
            assert amplified is not None
            along = float((u[:, :rank].T @ weight @ vh[:rank].T).norm())
            assert amplified.along_delta == pytest.approx(along, rel=1e-5)
            assert amplified.factor == pytest.approx(float(delta.norm()) / along, rel=1e-5)
            assert amplified.along_weight == pytest.approx(float(own.norm()), rel=1e-3)
            assert amplified.weight_norm == pytest.approx(float(weight.norm()), rel=1e-6)
            expected = amplified.weight_norm * rank / np.sqrt(weight.numel())
            assert 0.1 * expected < amplified.along_random < 5 * expected


def test_phi_is_the_papers(trained: tuple[Path, list[Path]]) -> None:
    """Equation 4, for A and for B, at every i and j."""
    import torch

    _, folders = trained
    (compared,) = loraformat.analyse(folders).comparisons
    first, second = ({target.name: target for target in loraformat.load(folder).targets} for folder in folders)
    assert {(shown.module, shown.side) for shown in compared.maps} == {
        (n, s) for n in first for s in ("input", "output")
    }
    for shown in compared.maps:
        spaces = []
        for target in (first[shown.module], second[shown.module]):
            role = "lora_A.weight" if shown.side == "input" else "lora_B.weight"
            matrix = torch.from_numpy(target.factors[role].read()).double()
            wide = matrix if shown.side == "input" else matrix.T
            spaces.append(torch.linalg.svd(wide, full_matrices=False)[2].T)
        for i in shown.rows:
            for j in shown.columns:
                phi = float((spaces[0][:, :i].T @ spaces[1][:, :j]).norm() ** 2 / min(i, j))
                assert shown.phi[i - 1][j - 1] == pytest.approx(phi, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_what_peft_merged_is_extracted_again(name: str, lab: "Lab", tmp_path: Path) -> None:
    """Folders as transformers saves them, GPT-2's Conv1D among them: the changes are PEFT's, of PEFT's ranks."""
    from peft import PeftModel
    from zoo import quiet

    trained = lab.trained(name)
    with quiet():
        trained.specimen.make().save_pretrained(tmp_path / "base")
        merged = PeftModel.from_pretrained(trained.specimen.make(), str(trained.folder)).merge_and_unload()
        merged.save_pretrained(tmp_path / "tuned")
    extraction = loraformat.extract(tmp_path / "tuned", tmp_path / "base", max_error=1e-5)
    found = {target.name: target for target in extraction.adapter.targets}
    ranks = {target.name: target.rank for target in loraformat.load(trained.folder).targets}
    assert len(found) == len(trained.deltas) == len(ranks)
    for target_name, delta in trained.deltas.items():
        target = next(target for own, target in found.items() if target_name.endswith(own))
        down, up = (target.factors[role].read().astype(np.float64) for role in sorted(target.factors))
        made = target.scale * up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
        stored = made.T if target.slot.value in ("linear-transposed", "embedding") else made
        assert stored.reshape(delta.shape) == pytest.approx(delta, abs=2e-6 * max(1.0, float(np.abs(delta).max())))
        assert target.rank <= ranks[target_name]
    if name == "gpt2":
        assert {target.slot.value for target in found.values()} == {"linear-transposed"}
