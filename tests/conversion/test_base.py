"""What a base says for conversions."""

import json
from pathlib import Path

import numpy as np
import pytest

from builders import write_tensors
from loraformat.base_facts import NO_FACTS, BaseFacts
from loraformat.containers.gguf import CONTAINER
from loraformat.conversion._base import read_base_facts
from loraformat.errors import LoraformatError

FIELDS = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "hidden_size": 10}
COUNTS = {"heads": 4, "kv_heads": 2, "head_dim": 6, "hidden": 10}


def test_nothing_is_known_of_no_base() -> None:
    assert read_base_facts(None) == NO_FACTS


def test_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FIELDS))
    facts = read_base_facts(path)
    assert (facts.counts, facts.architecture, facts.source) == (COUNTS, "llama", str(path))
    assert read_base_facts(tmp_path).counts == COUNTS


def test_a_checkpoint_says_its_modules_as_well(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    write_tensors(tmp_path / "model.safetensors", {"model.q.weight": np.ones((3, 2), np.float32)}, {"format": "pt"})
    facts = read_base_facts(tmp_path / "model.safetensors")
    assert (facts.counts, facts.modules) == (COUNTS, frozenset({"model.q"}))


def test_a_gguf_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    values = {
        "general.architecture": "llama",
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 6,
        "llama.embedding_length": 10,
        "llama.block_count": 3,
        "tokenizer.ggml.tokens": [str(index) for index in range(2000)],
    }
    with path.open("wb") as sink:
        CONTAINER.write(sink, [], values)
    facts = read_base_facts(path)
    assert (facts.counts, facts.architecture) == (COUNTS | {"layers": 3}, "llama")
    path.write_bytes(b"GGUF")
    with pytest.raises(LoraformatError):
        read_base_facts(path)


def test_facts_complete_each_other_and_the_users_own_count_first() -> None:
    one = BaseFacts("base", counts={"heads": 4}, architecture="llama")
    other = BaseFacts("adapter", counts={"heads": 8, "layers": 2}, architecture="qwen2")
    both = one.complete(other)
    assert (both.source, both.counts, both.architecture) == ("base", {"heads": 4, "layers": 2}, "llama")
    assert NO_FACTS.complete(other) == other


def test_a_product_of_counts_is_known_when_all_are() -> None:
    facts = BaseFacts("base", counts=COUNTS)
    assert facts.count("heads*head_dim") == 24
    assert facts.count("heads*experts") is None
