"""Real adapter files, as strangers have published them.

The files are not part of this project: they are looked for in `shared/corpus` beside the checkout, or where
LORAFORMAT_CORPUS says. What is expected was written down by hand from the `adapter_config.json` beside each file.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - safetensors hands out bfloat16 through it
import numpy as np
import pytest
from safetensors import safe_open

import loraformat

pytestmark = pytest.mark.oracle

CORPUS = Path(os.environ.get("LORAFORMAT_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))
if not CORPUS.is_dir():
    pytest.skip(f"no folder {CORPUS}; LORAFORMAT_CORPUS names another", allow_module_level=True)


@dataclass(frozen=True)
class Expected:
    """What a file holds.

    Attributes:
        path: below the corpus.
        targets: number of LoRA targets.
        rank: `r`, the same for all of them.
        alpha: `lora_alpha`.
        slot: what `fan_in_fan_out` makes of a matrix.
        base: `base_model_name_or_path`.
        dtype: number form of the factors.
        first: the first target by name.
        shape: `(out, in)` of that target in the base model.
        stated: whether the folder says alpha itself, or lacks its `adapter_config.json`.
        replaced: modules that are saved whole.
    """

    path: str
    targets: int
    rank: int
    alpha: float
    first: str
    shape: tuple[int, int]
    base: str | None
    slot: str = "linear"
    dtype: str = "float32"
    stated: bool = True
    replaced: tuple[str, ...] = ()


ADAPTERS = (
    # 6 layers of q_lin and v_lin; modules_to_save names classifier and score, the classification head has one more.
    Expected(
        "Tashu014__lora-imdb-distilbert",
        targets=12,
        rank=8,
        alpha=16,
        first="distilbert.transformer.layer.0.attention.q_lin",
        shape=(768, 768),
        base="distilbert-base-uncased",
        replaced=("classifier", "pre_classifier"),
    ),
    # 12 layers of c_attn and both c_proj; Conv1D, whose weights lie the other way round.
    Expected(
        "abrhaleyarefaine1997__gpt2-tigrinya-lora",
        targets=36,
        rank=8,
        alpha=32,
        first="transformer.h.0.attn.c_attn",
        shape=(2304, 768),
        base="gpt2",
        slot="linear-transposed",
    ),
    # 12 layers of q_proj and v_proj, in bfloat16.
    Expected(
        "guilhermmeabreu__lab_08",
        targets=24,
        rank=16,
        alpha=32,
        first="model.decoder.layers.0.self_attn.q_proj",
        shape=(768, 768),
        base="facebook/opt-125m",
        dtype="bfloat16",
    ),
    # Gemma 3 270M: 18 layers of q, k, v and o; one key-value head of 256 over a hidden size of 640.
    Expected(
        "ao-wei__gemma3-270m-svg-lora-partb/adapter",
        targets=72,
        rank=4,
        alpha=16,
        first="model.layers.0.self_attn.k_proj",
        shape=(256, 640),
        base=None,
        stated=False,
    ),
    # The UNet of Stable Diffusion 1: 16 blocks of to_q, to_k, to_v in attn1 and attn2.
    Expected(
        "FaithSang__anime-lora-gnerator/model",
        targets=96,
        rank=4,
        alpha=16,
        first="down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k",
        shape=(320, 320),
        base=None,
        stated=False,
    ),
)


@pytest.fixture(params=ADAPTERS, ids=lambda expected: expected.path.split("__")[0])
def expected(request: pytest.FixtureRequest) -> Expected:
    found: Expected = request.param
    if not (CORPUS / found.path).exists():
        pytest.skip(f"no {found.path} in the corpus")
    return found


def _inspect(expected: Expected) -> dict[str, Any]:
    stated = {} if expected.stated else {"alpha": expected.alpha}
    return loraformat.inspect(CORPUS / expected.path, **stated).as_json()


def _lora(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [target for target in record["targets"] if target["kind"] == "lora"]


def test_what_the_configuration_says(expected: Expected) -> None:
    record = _inspect(expected)
    assert (record["kind"], record["scheme"]) == ("adapter", "peft")
    replaced = {"replace": len(expected.replaced)} if expected.replaced else {}
    assert record["kinds"] == {"lora": expected.targets} | replaced
    assert record["ranks"] == {str(expected.rank): expected.targets}
    assert record["scales"] == {f"{expected.alpha / expected.rank:g}": expected.targets}
    assert record["base"]["name"] == expected.base
    targets = _lora(record)
    assert {target["slot"] for target in targets} == {expected.slot}
    assert targets[0]["name"] == expected.first
    assert tuple(targets[0]["shape"]) == expected.shape
    assert set(record["dtypes"]) == {expected.dtype}


def test_what_is_saved_whole_is_a_target_of_its_own(expected: Expected) -> None:
    """Modules that are saved whole are listed with the rest, and nothing stands in the way of a merge."""
    record = _inspect(expected)
    names = [target["name"] for target in record["targets"] if target["kind"] == "replace"]
    assert sorted(names) == sorted(expected.replaced)
    assert not [problem for problem in record["problems"] if problem["severity"] == "error"]


def test_without_its_configuration_the_scale_is_asked_for(expected: Expected) -> None:
    if expected.stated:
        loraformat.load(CORPUS / expected.path)
        return
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.load(CORPUS / expected.path)
    assert caught.value.codes == ("LF211",)


def test_norms_are_those_of_the_whole_product(expected: Expected) -> None:
    """B·A is formed here in float64 from what safetensors' own reader hands out."""
    factors = _read(CORPUS / expected.path / "adapter_model.safetensors")
    record = _inspect(expected)
    squares = []
    for target in _lora(record):
        prefix = f"base_model.model.{target['name']}"
        down, up = (factors[f"{prefix}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        norm = float(np.linalg.norm(up @ down)) * expected.alpha / expected.rank
        assert math.isclose(target["norm"], norm, rel_tol=1e-9, abs_tol=1e-12), target["name"]
        assert target["parameters"] == down.size + up.size
        squares.append(norm**2)
    assert math.isclose(record["norm"], math.sqrt(math.fsum(squares)), rel_tol=1e-9)
    assert record["parameters"] == sum(array.size for array in factors.values())


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def test_the_scheme_of_a_saved_copy(expected: Expected, tmp_path: Path) -> None:
    """A real adapter goes through our own format and says the same."""
    stated = {} if expected.stated else {"alpha": expected.alpha}
    saved = loraformat.save(loraformat.load(CORPUS / expected.path, **stated), tmp_path / "copy.safetensors")
    copy, original = loraformat.inspect(saved).as_json(), _inspect(expected)
    assert copy["scheme"] == "native"
    for key in ("kinds", "ranks", "scales", "parameters", "dtypes", "norm", "targets"):
        assert copy[key] == original[key], key


REFUSED = [
    # A pointer of git-LFS in the place of the file.
    ("JOSASA__gpt2", "LF111", "git-LFS"),
    # Schemes and kinds that this version does not read, each by name.
    (
        "IBM__text-generation-inference/integration_tests/prompt_prefixes/tinyllama_peft_adapter",
        "LF209",
        "prompt tuning",
    ),
    ("Inishpy__lerobot-libero", "LF121", ""),
    ("huggingface__peft/tests/regression/ia3_opt-350m/0.6.1", "LF121", ""),
    ("microsoft__LoRA/examples/NLU/roberta_base_lora_mnli.bin", "LF211", "scale"),
    ("cloneofsimo__lora/example_loras/lora_disney.safetensors", "LF211", "scale"),
]


@pytest.mark.parametrize(("path", "code", "said"), REFUSED, ids=[entry[0].split("__")[0] for entry in REFUSED])
def test_what_is_not_read_is_refused_by_name(path: str, code: str, said: str) -> None:
    if not (CORPUS / path).exists():
        pytest.skip(f"no {path} in the corpus")
    for read in (loraformat.load, loraformat.inspect):
        with pytest.raises(loraformat.LoraformatError) as caught:
            read(CORPUS / path)
        assert caught.value.codes == (code,)
        assert said in str(caught.value)
