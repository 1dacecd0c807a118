"""Graphs of transformer layers built node by node in which nothing has a name that says anything."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import helper

from graphs import Net, dyadic

HIDDEN, HEAD, INNER, RANK = 12, 8, 20, 2
NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "first": "mlp.fc1",
    "second": "mlp.fc2",
}
SHAPES = {"value": (2 * HEAD, HIDDEN), "output": (HIDDEN, 2 * HEAD), "down": (HIDDEN, INNER), "second": (HIDDEN, INNER)}
SHAPES |= dict.fromkeys(("query", "key"), (HEAD, HIDDEN)) | dict.fromkeys(("gate", "up", "first"), (INNER, HIDDEN))


@dataclass
class Stack:
    """A stack of transformer layers in which nothing has a name that says anything.

    The flags say in what it is not as usual.
    """

    layers: int = 2
    gated: bool = True
    scale: float | None = HEAD**-0.5
    axis: int = -1
    flags: frozenset[str] = frozenset()
    net: Net = field(default_factory=Net)
    weights: dict[tuple[int, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng, self.count, self.number = np.random.default_rng(5), 0, 0
        x = self.net.feed("x")
        while self.number < self.layers:
            attended = self.attend(x)
            x = self.block(attended, x if "parallel" in self.flags else attended)
            self.number += 1
        if "classifier" in self.flags:  # An activation between two layers, as behind a pooler, and nothing added.
            x = self.linear(self.op("Tanh", self.linear(x, "pool", (9, HIDDEN))), "class", (5, 9))
        self.net.op("Identity", [x], self.net.result("y"), "last")

    def op(self, kind: str, *inputs: str, **more: Any) -> str:
        self.count += 1
        swapped = kind in ("Mul", "Add") and "swapped" in self.flags
        return self.net.op(kind, inputs[::-1] if swapped else inputs, f"v{self.count}", f"n{self.count}", **more)

    def constant(self, array: Any) -> str:
        return self.net.weight(f"c{len(self.net.initializers)}", np.asarray(array, np.float32))

    def linear(self, x: str, role: str, shape: tuple[int, int] | None = None) -> str:
        w = dyadic(self.rng, *(shape or SHAPES[role]))
        if "uneven" in self.flags and self.number == 1 and role in ("gate", "up", "down"):
            w = np.concatenate([w, w], axis=1 if role == "down" else 0)
        known = self.weights.get((0, role)) if "shared" in self.flags and role == "key" else None
        self.weights[self.number, role] = known or self.constant(w.T)
        return self.op("MatMul", x, self.weights[self.number, role])

    def norm(self, x: str) -> str:
        return (
            self.op("Tanh", x)
            if "normless" in self.flags
            else self.op("Mul", x, self.constant(np.linspace(0.5, 1.5, HIDDEN)))
        )

    def attend(self, x: str) -> str:
        normed = self.norm(x)
        q, k, v = self.pack(normed) if "packed" in self.flags else self.project(normed)
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[1, 0]))
        if "turned" in self.flags:
            scores = self.op("Transpose", scores, perm=[1, 0])
        if self.scale is not None:
            scores = self.op("Mul", scores, self.factor(self.scale))
        if "masked" in self.flags:  # A mask is multiplied too, by a number that is no scale.
            mask = self.op("Mul", self.op("Sub", self.constant(1), self.net.inputs[0].name), self.constant(-3e38))
            scores = self.op("Add", scores, self.op("ReduceMax", mask, keepdims=0))
        shares = self.op("Softmax", scores, axis=self.axis)
        if "contexts" in self.flags:
            self.op("MatMul", shares, self.op("Tanh", v))
        context = self.op("MatMul", shares, v)
        out = self.linear(context, "output")
        if "outputs" in self.flags:
            self.linear(context, "other", SHAPES["output"])
        return self.op("Add", x, out)

    def factor(self, number: float) -> str:
        """Return a constant; in a graph of codes that is one of them, with a step and a zero point."""
        if "coded" not in self.flags:
            return self.constant(number)
        code, zero = (self.net.weight(f"c{len(self.net.initializers)}", np.array(value, np.uint8)) for value in (7, 3))
        return self.op("DequantizeLinear", code, self.constant(number / 4), zero)

    def project(self, normed: str) -> list[str]:
        return [self.linear(normed, role) for role in ("query", "key", "value")]

    def pack(self, normed: str) -> list[str]:
        """Apply the three in one matrix, in an order that no rule tells: values, queries, keys."""
        rows = [SHAPES[role][0] for role in ("value", "query", "key")]
        whole = self.linear(normed, "qkv", (sum(rows), HIDDEN))
        lengths = self.net.weight(f"c{len(self.net.initializers)}", np.array(rows))
        v, q, k = outputs = [f"{whole}_{index}" for index in range(3)]
        node = helper.make_node("Split", [whole, lengths], outputs, f"split{self.number}", axis=-1)
        self.net.nodes.append(node)
        return [q, k, v]

    def block(self, x: str, read: str) -> str:
        if "no blocks" in self.flags:
            return x
        normed = self.norm(read)
        if not self.gated:
            inner = self.op("Relu", self.linear(normed, "first"))
            down = self.linear(inner, "second")
        else:
            gate, up = self.linear(normed, "gate"), self.linear(normed, "up")
            active = self.op("Mul", gate, self.op("Sigmoid", gate))
            other = self.op("Relu", up) if "two active" in self.flags else up
            down = self.linear(self.op("Mul", active, other), "down")
        if "two blocks" in self.flags:
            again = self.linear(self.op("Relu", self.linear(normed, "x1", SHAPES["first"])), "x2", SHAPES["second"])
            down = self.op("Add", down, again)
            return self.op("Add", self.op("Add", x, down), again)
        return self.op("Add", x, down) if "no residual" not in self.flags else down

    def roles(self) -> list[str]:
        return ["query", "key", "value", "output", *(("gate", "up", "down") if self.gated else ("first", "second"))]


HEADS, WIDTH = 2, 16
"""Of stacks with one operator for attention: heads of 8 numbers."""
MICROSOFT = "com.microsoft"
FUSED = {
    "attention": ("Attention", {"num_heads": HEADS}),
    "multi-head": ("MultiHeadAttention", {"num_heads": HEADS}),
    "grouped": ("GroupQueryAttention", {"num_heads": HEADS, "kv_num_heads": 1}),
    "packed": ("GroupQueryAttention", {"num_heads": HEADS, "kv_num_heads": 1}),
    "standard": ("Attention", {"q_num_heads": HEADS, "kv_num_heads": 1}),
}
"""Operators that are all of attention, with what says how they cut heads; `packed` reads all three in one."""


@dataclass
class FusedStack(Stack):
    """A stack as onnxruntime's optimisers and builders write it: one operator attends, norms add, biases are folded.

    Keys and values have the same shape, but for `attention`, in which queries have it too.
    """

    operator: str = "grouped"
    attributes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng, self.count, self.number = np.random.default_rng(7), 0, 0
        x, added = self.net.feed("x"), ""
        while self.number < self.layers:
            normed, x = self.add_and_norm(x, added)
            attended = self.linear(self.attend_at_once(normed), "output", (HIDDEN, WIDTH))
            normed, x = self.add_and_norm(x, attended)
            added = self.gate(normed)
            self.number += 1
        self.net.op("Identity", [self.add_and_norm(x, added)[0]], self.net.result("y"), "last")

    def node(self, kind: str, inputs: list[str], outputs: int = 1, **more: Any) -> list[str]:
        self.count += 1
        names = [f"w{self.count}_{index}" for index in range(outputs)]
        self.net.nodes.append(helper.make_node(kind, inputs, names, f"m{self.count}", **more))
        return names

    def add_and_norm(self, x: str, added: str) -> tuple[str, str]:
        weight = self.constant(np.linspace(0.5, 1.5, HIDDEN))
        if not added:
            return self.op("SimplifiedLayerNormalization", x, weight, axis=-1), x
        normed, _, _, total = self.node("SkipSimplifiedLayerNormalization", [x, added, weight], 4, domain=MICROSOFT)
        return normed, total

    def attend_at_once(self, normed: str) -> str:
        kind, heads = FUSED[self.operator]
        more = heads | self.attributes | ({"domain": MICROSOFT} if self.operator != "standard" else {})
        if "unknown" in self.flags:
            kind = "PackedAttention"
        narrow = WIDTH if self.operator == "multi-head" else WIDTH // HEADS
        if self.operator == "attention":
            self.weights[self.number, "qkv"] = self.constant(dyadic(self.rng, HIDDEN, 3 * WIDTH))
            return self.node(kind, [normed, self.weights[self.number, "qkv"]], **more)[0]
        if self.operator == "packed":
            whole = self.linear(normed, "qkv", (WIDTH + 2 * narrow, HIDDEN))
            if "sliced" in self.flags:
                whole = self.op("Transpose", whole, perm=[1, 0])
            return self.node(kind, [whole], **more)[0]
        q = self.rotate(self.linear(normed, "query", (WIDTH, HIDDEN)))
        source = self.op("Mul", "x", self.constant(np.linspace(1, 2, HIDDEN))) if "crossed" in self.flags else normed
        k = self.rotate(self.linear(source, "key", (narrow, HIDDEN)))
        v = self.linear(source, "value", (narrow, HIDDEN))
        given = [self.node("Concat", [q, k, v], axis=-1)[0]] if "head by head" in self.flags else [q, k, v]
        return self.node(kind, given, **more)[0]

    def rotate(self, x: str) -> str:
        if self.flags.isdisjoint({"rotated", "interleaved"}):
            return x
        caches = [self.constant(np.ones((5, 4))), self.constant(np.zeros((5, 4)))]
        turned = int("interleaved" in self.flags)
        return self.node("RotaryEmbedding", [x, "x", *caches], domain=MICROSOFT, interleaved=turned)[0]

    def gate(self, normed: str) -> str:
        """Apply a gated block; what is gated comes first where both are in one matrix."""
        if "one matrix" not in self.flags:
            up, gate = self.linear(normed, "up"), self.linear(normed, "gate")
        else:
            lengths = self.net.weight(f"c{len(self.net.initializers)}", np.array([INNER, INNER]))
            whole = self.linear(normed, "gate_up", (2 * INNER, HIDDEN))
            up, gate = self.node("Split", [whole, lengths], 2, axis=-1)
        active = self.node("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)[0]
        return self.linear(self.op("Mul", up, active), "down")
