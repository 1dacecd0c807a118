"""Writes the tables of language models in this folder; the README says what they mean.

    python spec/names/make_decoder_names.py

Names are facts about others' models: transformers, Meta's llama and mistral-inference, torchtune 0.6, litgpt 0.5,
llama.cpp (gguf 0.19), Megatron-Bridge 0.3. `tests/oracles` compares them with the tables of gguf, torchtune and litgpt.
"""

from typing import Any, Final

from make_names import Row, table

Q, K, V = (f"model.layers.{{i}}.self_attn.{name}_proj" for name in "qkv")
GATE, UP, DOWN = (f"model.layers.{{i}}.mlp.{name}_proj" for name in ("gate", "up", "down"))
OUT: Final = "model.layers.{i}.self_attn.o_proj"

PARTS: Final = {
    "transformers": {"q": Q, "k": K, "v": V, "o": OUT, "gate": GATE, "up": UP, "down": DOWN},
    "meta": {
        **{letter: f"layers.{{i}}.attention.w{letter}" for letter in "qkvo"},
        **{role: f"layers.{{i}}.feed_forward.w{n}" for n, role in ((1, "gate"), (2, "down"), (3, "up"))},
    },
    "torchtune": {
        **{letter: f"layers.{{i}}.attn.{letter}_proj" for letter in "qkv"},
        "o": "layers.{i}.attn.output_proj",
        **{role: f"layers.{{i}}.mlp.w{n}" for n, role in ((1, "gate"), (2, "down"), (3, "up"))},
    },
    "litgpt": {
        "qkv": "transformer.h.{i}.attn.qkv",
        "o": "transformer.h.{i}.attn.proj",
        "gate": "transformer.h.{i}.mlp.fc_1",
        "up": "transformer.h.{i}.mlp.fc_2",
        "down": "transformer.h.{i}.mlp.proj",
    },
    "gguf": {
        **{letter: f"blk.{{i}}.attn_{letter}" for letter in "qkv"},
        "o": "blk.{i}.attn_output",
        **{role: f"blk.{{i}}.ffn_{role}" for role in ("gate", "up", "down")},
    },
    "megatron": {
        "qkv": "decoder.layers.{i}.self_attention.linear_qkv",
        "o": "decoder.layers.{i}.self_attention.linear_proj",
        "gate_up": "decoder.layers.{i}.mlp.linear_fc1",
        "down": "decoder.layers.{i}.mlp.linear_fc2",
    },
    "megatron-canonical": {
        **{letter: f"decoder.layers.{{i}}.self_attention.linear_qkv.adapter_{letter}" for letter in "qkv"},
        "o": "decoder.layers.{i}.self_attention.linear_proj",
        **{role: f"decoder.layers.{{i}}.mlp.linear_fc1.adapter_{role}" for role in ("gate", "up")},
        "down": "decoder.layers.{i}.mlp.linear_fc2",
    },
}
"""Spelling to role to path; `qkv` and `gate_up` for one weight that is several elsewhere."""

HALVES: Final = "meta-halves"
"""Meta's names over rotary rows in halves: how ExecuTorch runs Qwen."""
PARTS[HALVES] = PARTS["meta"]

EXPERTS: Final = {
    "transformers": {
        **{role: f"model.layers.{{i}}.mlp.experts.{{e}}.{role}_proj" for role in ("gate", "up", "down")},
        "router": "model.layers.{i}.mlp.gate",
    },
    "transformers-5": {
        "gate_up": "model.layers.{i}.mlp.experts.{e}.gate_up_proj",
        "down": "model.layers.{i}.mlp.experts.{e}.down_proj",
        "router": "model.layers.{i}.mlp.gate",
    },
    "mixtral": {
        **{
            role: f"model.layers.{{i}}.block_sparse_moe.experts.{{e}}.w{n}"
            for n, role in ((1, "gate"), (2, "down"), (3, "up"))
        },
        "router": "model.layers.{i}.block_sparse_moe.gate",
    },
    "meta": {
        **{role: f"layers.{{i}}.feed_forward.experts.{{e}}.w{n}" for n, role in ((1, "gate"), (2, "down"), (3, "up"))},
        "router": "layers.{i}.feed_forward.gate",
    },
    "gguf": {
        **{role: f"blk.{{i}}.ffn_{role}_exps.{{e}}" for role in ("gate", "up", "down")},
        "router": "blk.{i}.ffn_gate_inp",
    },
}
"""Spelling to role to path of an expert; those of `transformers-5` and of `gguf` lie in one tensor for all."""

SHARED: Final = {
    **{
        role: (f"model.layers.{{i}}.mlp.shared_expert.{role}_proj", f"blk.{{i}}.ffn_{role}_shexp")
        for role in ("gate", "up", "down")
    },
    "router": ("model.layers.{i}.mlp.shared_expert_gate", "blk.{i}.ffn_gate_inp_shexp"),
}
"""Role to path of Qwen's shared expert, in transformers and in GGUF."""

ENDS: Final = {
    "transformers": ("model.embed_tokens", "lm_head"),
    "meta": ("tok_embeddings", "output"),
    "torchtune": ("tok_embeddings", "output"),
    "litgpt": ("transformer.wte", "lm_head"),
    "gguf": ("token_embd", "output"),
    HALVES: ("tok_embeddings", "output"),
    "megatron": ("embedding.word_embeddings", "output_layer"),
    "megatron-canonical": ("embedding.word_embeddings", "output_layer"),
}
SCHEMES: Final = {
    **dict.fromkeys(("peft", "mlx", "onnx_adapter", "loralib"), "transformers"),
    "mistral": "meta",
    "torchtune": "torchtune",
    "litgpt": "litgpt",
    "gguf": "gguf",
    "megatron": "megatron",
    "megatron_canonical": "megatron-canonical",
}
HEADS: Final = ["heads*head_dim", "kv_heads*head_dim", "kv_heads*head_dim"]
INTERLEAVED: Final = [
    {"rule": "rotary-interleaved", "heads": "heads"},
    {"rule": "rotary-interleaved", "heads": "kv_heads"},
    None,
]
GROUPED: Final = {"rule": "grouped-by-kv-heads"}


def paths(spellings: list[str], fused: str, roles: list[str]) -> dict[str, Any]:
    """Return spelling to path, or to the paths of the roles where it has no fused one."""
    found: dict[str, Any] = {}
    for spelling in spellings:
        names = PARTS[spelling]
        found[spelling] = names[fused] if fused in names else [names[role] for role in roles]
    return found


def decoder(spellings: list[str], interleaved: list[str]) -> list[Row]:
    """Return the rows of a decoder whose queries, keys and values are three modules in transformers."""
    orders: dict[str, Any] = {spelling: INTERLEAVED for spelling in spellings if spelling in interleaved}
    orders |= {"megatron": GROUPED} if "megatron" in spellings else {}
    rows: list[Row] = [
        {"paths": paths(spellings, "qkv", ["q", "k", "v"]), "shares": HEADS, **({"orders": orders} if orders else {})},
        {"paths": paths(spellings, "gate_up", ["gate", "up"]), "shares": [1, 1]},
        *({"paths": {spelling: PARTS[spelling][role] for spelling in spellings}} for role in ("o", "down")),
    ]
    return rows + [{"paths": {spelling: ENDS[spelling][end] for spelling in spellings}} for end in range(2)]


def experts(spellings: dict[str, str]) -> list[Row]:
    """Return the rows of experts; `spellings` is that of a table to what it is called above."""
    named = {spelling: EXPERTS[names] for spelling, names in spellings.items()}
    fused = {
        spelling: names["gate_up"] if "gate_up" in names else [names["gate"], names["up"]]
        for spelling, names in named.items()
    }
    rows: list[Row] = [{"paths": fused, "shares": [1, 1]}]
    return rows + [
        {"paths": {spelling: names[role] for spelling, names in named.items()}} for role in ("down", "router")
    ]


def also_in_5(rows: list[Row]) -> list[Row]:
    """Return the rows with the spelling of transformers 5, which differs in experts alone."""
    return [{**row, "paths": {**row["paths"], "transformers-5": row["paths"]["transformers"]}} for row in rows]


def phi3() -> list[Row]:
    """Return the rows of Phi-3, which is fused in transformers, and in GGUF as well."""
    spellings = ["transformers", "gguf", "torchtune", "litgpt"]
    fused = {"transformers": "model.layers.{i}.self_attn.qkv_proj", "gguf": "blk.{i}.attn_qkv"}
    qkv = fused | paths(["torchtune", "litgpt"], "qkv", ["q", "k", "v"])
    fused = {"transformers": "model.layers.{i}.mlp.gate_up_proj", "gguf": "blk.{i}.ffn_up"}
    gate_up = fused | paths(["torchtune", "litgpt"], "gate_up", ["gate", "up"])
    rows: list[Row] = [{"paths": qkv, "shares": HEADS}, {"paths": gate_up, "shares": [1, 1]}]
    rows += [{"paths": {spelling: PARTS[spelling][role] for spelling in spellings}} for role in ("o", "down")]
    return rows + [{"paths": {spelling: ENDS[spelling][end] for spelling in spellings}} for end in range(2)]


def gpt2() -> list[Row]:
    """Return the rows of GPT-2."""
    inner = (("attn.c_attn", "attn_qkv"), ("attn.c_proj", "attn_output"), ("mlp.c_fc", "ffn_up"))
    pairs = [
        *((f"transformer.h.{{i}}.{one}", f"blk.{{i}}.{two}") for one, two in (*inner, ("mlp.c_proj", "ffn_down"))),
        ("transformer.wte", "token_embd"),
        ("lm_head", "output"),
    ]
    return [{"paths": {"transformers": one, "gguf": two}} for one, two in pairs]


def gpt_oss() -> list[Row]:
    """Return the rows of gpt-oss, in whose packed experts gate and up take turns."""
    three = ("mlx", "transformers", "gguf")
    expert, packed = "model.layers.{i}.mlp.experts.{e}", "blk.{i}.ffn_%s_exps.{e}"
    gate_up: Row = {
        "paths": {
            "mlx": [f"{expert}.gate_proj", f"{expert}.up_proj"],
            "transformers": f"{expert}.gate_up_proj",
            "gguf": [packed % "gate", packed % "up"],
        },
        "shares": [1, 1],
        "orders": {"transformers": {"rule": "alternating"}},
    }
    pairs = [(PARTS["transformers"][role], PARTS["gguf"][role]) for role in "qkvo"]
    pairs += [(f"{expert}.down_proj", packed % "down"), ("model.layers.{i}.mlp.router", "blk.{i}.ffn_gate_inp")]
    pairs += list(zip(ENDS["transformers"], ENDS["gguf"], strict=True))
    return [gate_up, *({"paths": dict(zip(three, (one, one, two), strict=True))} for one, two in pairs)]


def write(name: str, title: str, rows: list[Row], classes: dict[str, str]) -> None:
    """Write a table; `classes` is model type to the architecture that GGUF has for it."""
    spellings = {spelling for row in rows for spelling in row["paths"]}
    schemes: dict[str, dict[str, Any]] = {
        scheme: {"spelling": spelling} for scheme, spelling in SCHEMES.items() if spelling in spellings
    }
    if {"meta", HALVES} & spellings:
        schemes["executorch"] = {"spelling": "meta" if "meta" in spellings else HALVES}
    if "transformers-5" in spellings:
        schemes["peft"]["also"] = ["transformers-5"]
    table(
        name,
        title,
        ["language_model"],
        rows,
        classes=sorted({*classes, *classes.values()}),
        architectures=classes,
        schemes=schemes,
    )


def main() -> None:
    """Write the tables."""
    every = [spelling for spelling in PARTS if spelling != HALVES]
    llama = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "granite": "granite", "smollm3": "smollm3"}
    rows = also_in_5(decoder(every, ["meta", "torchtune", "gguf"]))
    rows += experts({"transformers": "mixtral", "transformers-5": "transformers-5", "meta": "meta", "gguf": "gguf"})
    write("llama-decoder", "Llama and Mistral", rows, llama)
    qwen = {"qwen2": "qwen2", "qwen3": "qwen3", "seed_oss": "seed_oss", "exaone4": "exaone4", "olmo2": "olmo2"}
    qwen |= {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
    no_meta = [spelling for spelling in every if spelling != "meta"]
    shared: list[Row] = [{"paths": {"transformers": one, "gguf": two}} for one, two in SHARED.values()]
    rows = also_in_5([*decoder([*no_meta, HALVES], []), *shared])
    rows += experts({spelling: spelling for spelling in ("transformers", "transformers-5", "gguf")})
    write("qwen-decoder", "Qwen2 and Qwen3, and others of their layout", rows, qwen)
    gemma = {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"}
    no_megatron = [spelling for spelling in no_meta if not spelling.startswith("megatron")]
    write("gemma-decoder", "Gemma", decoder(no_megatron, ["torchtune"]), gemma)
    write("phi3-decoder", "Phi-3", phi3(), {"phi3": "phi3"})
    write("gpt2-decoder", "GPT-2", gpt2(), {"gpt2": "gpt2"})
    own = {"mlx": "mlx", "gguf": "gguf", **dict.fromkeys(("peft", "onnx_adapter", "loralib"), "transformers")}
    table(
        "gpt-oss-decoder",
        "gpt-oss",
        ["language_model"],
        gpt_oss(),
        classes=["gpt-oss", "gpt_oss"],
        architectures={"gpt_oss": "gpt-oss"},
        asks_base=True,
        schemes={name: {"spelling": spelling} for name, spelling in own.items()},
    )


if __name__ == "__main__":
    main()
