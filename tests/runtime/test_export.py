"""Models with run-time inputs, node by node: nothing changes without an adapter, and x·A·B is added with one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import loraformat
from builders import Factors, write_peft
from graphs import (
    STYLES,
    Array,
    Net,
    dyadic,
    dyadic_factors,
    linear_net,
    make_adapter,
    make_target,
    product,
    run,
    same_bits,
    torchscript_name,
    write_model,
)
from loraformat import runtime
from loraformat.adapter import Adapter, SlotKind

MODULE = "model.layers.1.fc"
NAME = torchscript_name(MODULE, "MatMul")
OUT, IN, RANK, SCALE = 14, 10, 3, 2.0
MS = "com.microsoft"


@dataclass(frozen=True)
class Node:
    """A graph with one node that applies a weight.

    Attributes:
        net: the graph; its output is `y`.
        feeds: what it is fed with.
        effect: what a change `(out, in, *kernel)` in float64 adds to `y`.
        shape: of the weight, `(out, in, *kernel)`.
        slot: what kind of slot it is.
        tolerance: absolute, of the sum.
    """

    net: Net
    feeds: Mapping[str, Array]
    effect: Callable[[Array], Array]
    shape: tuple[int, ...] = (OUT, IN)
    slot: SlotKind = SlotKind.LINEAR
    tolerance: float = 1e-5

    def adapter(self, seed: int = 9) -> Adapter:
        """Return an adapter of the one module."""
        return make_adapter(make_target(MODULE, self.factors(seed), self.slot, SCALE))

    def factors(self, seed: int) -> Factors:
        rng, ones = np.random.default_rng(seed), (1,) * len(self.shape[2:])
        return dyadic(rng, RANK, *self.shape[1:]), dyadic(rng, self.shape[0], RANK, *ones)

    def delta(self, seed: int = 9) -> Array:
        return product(self.factors(seed), SCALE).reshape(self.shape)


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def rows(*leading: int) -> dict[str, Array]:
    return {"x": dyadic(rng(), *leading, IN)}


def on_rows(feeds: Mapping[str, Array]) -> Callable[[Array], Array]:
    return lambda delta: feeds["x"].astype(np.float64) @ delta.T


def make_matmul(form: Any = np.float32, tolerance: float = 1e-5) -> Node:
    net, kind = Net(), helper.np_dtype_to_tensor_dtype(np.dtype(form))
    feeds = {"x": rows(2, 5)["x"].astype(form)}
    x = net.feed("x", kind, 3)
    net.op("MatMul", [x, net.weight("w", dyadic(rng(), IN, OUT).astype(form))], net.result("y", kind, 3), NAME)
    return Node(net, feeds, on_rows(feeds), tolerance=tolerance)


def make_bias() -> Node:
    net, feeds = Net(), rows(2, 5)
    made = net.op("MatMul", [net.feed("x", rank=3), net.weight("w", dyadic(rng(), IN, OUT))], "made", NAME)
    net.op("Add", [net.weight("b", dyadic(rng(), OUT)), made], net.result("y", rank=3), "/add")
    return Node(net, feeds, on_rows(feeds))


def make_gemm(*, turned: bool) -> Node:
    net, feeds = Net(), rows(6)
    inputs = [net.feed("x"), net.weight("w", dyadic(rng(), OUT, IN)), net.weight("b", dyadic(rng(), OUT))]
    net.op("Gemm", inputs, net.result("y"), NAME, transA=int(turned), transB=1, alpha=0.5, beta=2.0)
    effect = on_rows(feeds)
    return Node(net, {"x": np.ascontiguousarray(feeds["x"].T)} if turned else feeds, effect)


def make_fused(*, turned: bool) -> Node:
    net, feeds = Net(), rows(2, 6)
    inputs = [net.feed("x", rank=3), net.weight("w", dyadic(rng(), OUT, IN))]
    net.op("FusedMatMul", inputs, net.result("y", rank=3), NAME, domain=MS, transA=int(turned), transB=1, alpha=0.25)
    effect = on_rows(feeds)
    return Node(net, {"x": np.ascontiguousarray(feeds["x"].swapaxes(1, 2))} if turned else feeds, effect)


def make_left() -> Node:
    net, feeds = Net(), {"x": dyadic(rng(), 2, IN, 6)}
    net.op(
        "MatMul",
        [net.weight(f"{MODULE}.weight", dyadic(rng(), OUT, IN)), net.feed("x", rank=3)],
        net.result("y", rank=3),
    )
    return Node(net, feeds, lambda delta: delta @ feeds["x"].astype(np.float64))


def make_cast() -> Node:
    net, feeds = Net(), rows(2, 5)
    wide = net.op("Cast", [net.weight("w", dyadic(rng(), IN, OUT).astype(ml_dtypes.bfloat16))], "wide", to=1)
    net.op("MatMul", [net.feed("x", rank=3), wide], net.result("y", rank=3), NAME)
    return Node(net, feeds, on_rows(feeds))


def make_nbits(bits: int = 4) -> Node:
    """Of 4 bits, or of 2, which no merge reads."""
    net, feeds = Net(), {"x": dyadic(rng(), 2, 5, 32)}
    codes = rng().integers(0, 255, (OUT, 1, 4 * bits)).astype(np.uint8)
    scales = rng().uniform(0.01, 0.03, OUT).astype(np.float32)
    inputs = [net.feed("x", rank=3), net.weight("w_Q4", codes), net.weight("w_scales", scales)]
    more = {"K": 32, "N": OUT, "bits": bits, "block_size": 32}
    net.op("MatMulNBits", inputs, net.result("y", rank=3), NAME, domain=MS, **more)
    return Node(net, feeds, on_rows(feeds), (OUT, 32))


def codes() -> tuple[Array, Array]:
    """Return int8 codes `(in, out)` and a scale for each column; on 7 bits, where the processor would saturate."""
    return rng().integers(-63, 64, (IN, OUT)).astype(np.int8), rng().uniform(0.01, 0.03, OUT).astype(np.float32)


def make_qdq() -> Node:
    net, feeds = Net(), rows(2, 5)
    inputs = [net.weight("w", codes()[0]), net.weight("s", codes()[1])]
    wide = net.op("DequantizeLinear", inputs, "wide", axis=1)
    net.op("MatMul", [net.feed("x", rank=3), wide], net.result("y", rank=3), NAME)
    return Node(net, feeds, on_rows(feeds))


def make_integer(*, one_by_one: bool = False) -> Node:
    """What onnxruntime's dynamic quantisation leaves: a product by both scales, or by one after the other."""
    net, feeds = Net(), rows(2, 5)
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", [net.feed("x", rank=3)], ["xq", "xs", "xz"], name="/dq"))
    zero = net.weight("z", np.array(0, np.int8))
    net.op("MatMulInteger", ["xq", net.weight("w", codes()[0]), "xz", zero], "made", NAME)
    net.op("Cast", ["made"], "wide", "/cast", to=1)
    step = net.weight("s", np.array(0.02, np.float32))
    if one_by_one:
        net.op("Mul", ["wide", "xs"], "half", "/half")
        net.op("Mul", [step, "half"], net.result("y", rank=3), "/scaled")
    else:
        net.op("Mul", ["xs", step], "scales", "/scales")
        net.op("Mul", ["wide", "scales"], net.result("y", rank=3), "/scaled")
    return Node(net, feeds, on_rows(feeds))


def make_dynamic(op: str) -> Node:
    net, feeds = Net(), rows(2, 5)
    x, w, s = net.feed("x", rank=3), net.weight("w", codes()[0]), net.weight("s", np.array(0.02, np.float32))
    inputs = [x, w, s]
    if op == "MatMulIntegerToFloat":
        net.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], ["xq", "xs", "xz"], name="/dq"))
        inputs = ["xq", w, "xs", s, "xz"]
    net.op(op, inputs, net.result("y", rank=3), NAME, domain=MS)
    return Node(net, feeds, on_rows(feeds))


def make_gather() -> Node:
    net, ids = Net(), np.array([[1, 3, 0], [-2, 6, 6]])
    net.op(
        "Gather",
        [net.weight("w", dyadic(rng(), 7, OUT)), net.feed("ids", TensorProto.INT64)],
        net.result("y", rank=3),
        torchscript_name(MODULE, "Gather"),
    )
    return Node(net, {"ids": ids}, lambda delta: delta.T[ids], (OUT, 7), SlotKind.EMBEDDING)


def make_conv() -> Node:
    """Oblong, strided, dilated and padded; the sum is compared with a convolution written out."""
    net, feeds = Net(), {"x": dyadic(rng(), 2, 3, 9, 11)}
    inputs = [
        net.feed("x", rank=4),
        net.weight(f"{MODULE}.weight", dyadic(rng(), 5, 3, 3, 2)),
        net.weight("b", dyadic(rng(), 5)),
    ]
    net.op(
        "Conv",
        inputs,
        net.result("y", rank=4),
        torchscript_name(MODULE, "Conv"),
        strides=[2, 1],
        pads=[1, 0, 1, 2],
        dilations=[1, 2],
    )

    def effect(delta: Array) -> Array:
        padded = np.pad(feeds["x"].astype(np.float64), ((0, 0), (0, 0), (1, 1), (0, 2)))
        out = np.zeros((2, 5, 5, 11))
        for i in range(3):
            for j in range(2):
                out += np.einsum("oi,nihw->nohw", delta[:, :, i, j], padded[:, :, i : i + 9 : 2, 2 * j : 2 * j + 11])
        return out

    return Node(net, feeds, effect, (5, 3, 3, 2), SlotKind.CONV)


def make_fused_gemm(*, turned: bool) -> Node:
    """The product is inside: Relu follows, with numbers on both sides of zero."""
    net, feeds = Net(), rows(6)
    weight, bias = dyadic(rng(), OUT, IN), dyadic(rng(), OUT)
    inputs = [net.feed("x"), net.weight("w", weight), net.weight("b", bias)]
    more = {"transA": int(turned), "transB": 1, "alpha": 0.5, "beta": 2.0, "activation": "Relu"}
    net.op("FusedGemm", inputs, net.result("y"), torchscript_name(MODULE, "Gemm"), domain=MS, **more)
    x = feeds["x"].astype(np.float64)
    inner = 0.5 * x @ weight.T + 2.0 * bias

    def effect(delta: Array) -> Array:
        return np.maximum(inner + x @ delta.T, 0) - np.maximum(inner, 0)

    return Node(net, {"x": np.ascontiguousarray(feeds["x"].T)} if turned else feeds, effect)


def make_fused_conv() -> Node:
    net, feeds = Net(), {"x": dyadic(rng(), 2, 3, 5, 7)}
    weight = dyadic(rng(), 5, 3, 1, 1)
    inputs = [net.feed("x", rank=4), net.weight(f"{MODULE}.weight", weight)]
    more = {"domain": MS, "strides": [2, 1], "activation": "Tanh"}
    net.op("FusedConv", inputs, net.result("y", rank=4), torchscript_name(MODULE, "Conv"), **more)
    points = feeds["x"].astype(np.float64)[:, :, ::2]

    def effect(delta: Array) -> Array:
        before, after = (
            np.tanh(np.einsum("oi,nihw->nohw", (weight + change)[:, :, 0, 0], points)) for change in (0, delta)
        )
        return after - before

    return Node(net, feeds, effect, (5, 3, 1, 1), SlotKind.CONV)


def make_inner() -> Node:
    """The node stands in both branches of an If, as in Optimum's merged decoders, and reads one weight."""
    net, feeds = Net(), rows(2, 5) | {"first": np.array(True)}
    net.feed("x", rank=3)
    net.feed("first", TensorProto.BOOL, 0)
    net.weight("w", dyadic(rng(), IN, OUT))
    bodies = []
    for name in ("then", "else"):
        inner = Net()
        inner.op("MatMul", ["x", "w"], f"{name}_made", NAME)
        inner.op(
            "Relu" if name == "else" else "Identity", [f"{name}_made"], inner.result(f"{name}_y", rank=3), f"/{name}"
        )
        bodies.append(inner.branch(name))
    net.op("If", ["first"], net.result("y", rank=3), "/if", then_branch=bodies[0], else_branch=bodies[1])
    return Node(net, feeds, on_rows(feeds))


NODES: dict[str, Callable[[], Node]] = {
    "MatMul": make_matmul,
    "MatMul float16": lambda: make_matmul(np.float16, 0.06),
    "MatMul float64": lambda: make_matmul(np.float64),
    "MatMul and bias": make_bias,
    "MatMul, weight first": make_left,
    "bfloat16 and Cast": make_cast,
    "Gemm": lambda: make_gemm(turned=False),
    "Gemm, x turned": lambda: make_gemm(turned=True),
    "FusedMatMul": lambda: make_fused(turned=False),
    "FusedMatMul, x turned": lambda: make_fused(turned=True),
    "MatMulNBits": make_nbits,
    "MatMulNBits of 2 bits": lambda: make_nbits(2),
    "QDQ": make_qdq,
    "MatMulInteger": make_integer,
    "MatMulInteger, scale by scale": lambda: make_integer(one_by_one=True),
    "DynamicQuantizeMatMul": lambda: make_dynamic("DynamicQuantizeMatMul"),
    "MatMulIntegerToFloat": lambda: make_dynamic("MatMulIntegerToFloat"),
    "Gather": make_gather,
    "Conv": make_conv,
    "FusedGemm": lambda: make_fused_gemm(turned=False),
    "FusedGemm, x turned": lambda: make_fused_gemm(turned=True),
    "FusedConv": make_fused_conv,
    "If": make_inner,
}


@pytest.mark.parametrize("kind", NODES)
def test_nothing_changes_without_an_adapter_and_its_product_is_added_with_one(tmp_path: Path, kind: str) -> None:
    node = NODES[kind]()
    base = write_model(tmp_path / "base.onnx", node.net.model(check=False))
    model = tmp_path / "base.lora.onnx"
    runtime.export_runtime(base, [node.adapter()], model)
    onnx.checker.check_model(str(model))
    (before,), (idle,) = run(base, node.feeds), run(model, node.feeds)
    assert same_bits(before, idle)
    feeds = runtime.adapter_feeds(model, [node.adapter()])
    (active,) = run(model, {**node.feeds, **feeds})
    wanted = node.effect(node.delta())
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(
        active.astype(np.float64), before.astype(np.float64) + wanted, rtol=0, atol=node.tolerance
    )


@pytest.mark.parametrize("files", ["", "one"])
@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_export_is_served(tmp_path: Path, style: str, files: str) -> None:
    weights = {"model.a": dyadic(rng(), 12, 10), "model.b": dyadic(rng(), 7, 9)}
    base = write_model(tmp_path / "base.onnx", linear_net(weights, style).model(), files)
    adapter = write_peft(tmp_path / "adapter", {n: dyadic_factors(rng(), *w.shape, 3) for n, w in weights.items()})
    model = tmp_path / "base.lora.onnx"
    runtime.export_runtime(base, [adapter], model, external_data="share" if files else None)
    x = {f"in.{name}": dyadic(rng(), 4, weight.shape[1]) for name, weight in weights.items()}
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    for one, other in zip(run(model, x), run(base, x), strict=True):
        assert same_bits(one, other)
    active = run(model, x | runtime.adapter_feeds(model, [adapter]))
    for one, other in zip(active, run(tmp_path / "merged.onnx", x), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_bfloat16_models_have_inputs_of_their_form(tmp_path: Path) -> None:
    """The processor's provider has no MatMul of this form: only what is written is looked at."""
    node = make_matmul(ml_dtypes.bfloat16)
    base, model = write_model(tmp_path / "base.onnx", node.net.model()), tmp_path / "model.onnx"
    runtime.export_runtime(base, [node.adapter()], model)
    onnx.checker.check_model(str(model), full_check=True)
    feeds = runtime.adapter_feeds(model, [node.adapter()])
    assert {array.dtype.name for array in feeds.values()} == {"bfloat16"}
    down, up = (array.astype(np.float32) for array in feeds.values())
    np.testing.assert_allclose((down @ up).T, node.delta(), rtol=0.02)


def test_what_is_added_comes_before_the_range_of_the_product(tmp_path: Path) -> None:
    """Quantisers leave a Relu out where the range of what follows begins at zero: the range stands for it."""
    net, x = Net(), dyadic(rng(), 9, IN, step=0.25, reach=20)
    step, zero = net.weight("step", np.array(0.25, np.float32)), net.weight("zero", np.array(0, np.int8))
    least = net.weight("least", np.array(-128, np.int8))
    stored, scales = codes()
    wide = net.op("DequantizeLinear", [net.weight("w", stored), net.weight("s", scales)], "wide", axis=1)
    xq = net.op("QuantizeLinear", [net.feed("x"), step, zero], "xq", "/q")
    made = net.op("MatMul", [net.op("DequantizeLinear", [xq, step, zero], "xf", "/dq"), wide], "made", NAME)
    yq = net.op("QuantizeLinear", [made, step, least], "yq", "/yq")
    net.op("DequantizeLinear", [yq, step, least], net.result("y"), "/ydq")
    base, model = write_model(tmp_path / "base.onnx", net.model()), tmp_path / "model.onnx"
    factors = dyadic(rng(), RANK, IN, step=0.25), dyadic(rng(), OUT, RANK, step=0.25)
    adapter = make_adapter(make_target(MODULE, factors))
    with pytest.raises(loraformat.FindingError) as caught:
        runtime.export_runtime(base, [adapter], model)
    assert caught.value.codes == ("LF441",)
    done = runtime.export_runtime(base, [adapter], model, accept_ranges=True)
    assert [(each.code, each.severity) for each in done.problems] == [("LF441", "warning")]
    product_of_both = x.astype(np.float64) @ (stored * scales.astype(np.float64) + product(factors).T)
    (found,) = run(model, {"x": x} | runtime.adapter_feeds(model, [adapter]))
    assert (product_of_both < -1).any()
    np.testing.assert_allclose(found, np.clip(product_of_both, 0, 255 * 0.25), rtol=0, atol=0.126)
