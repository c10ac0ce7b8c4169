"""Mixtures of experts: who is elected, what they count, and that each token gets exactly its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...backends.base import RouteRule
from ...tensors import dense
from ..suite import Pair, case


class Rule:
    """A rule by a name."""

    def __init__(self, name: str, **fields):
        self.name, self.rule = name, RouteRule(**fields)


RULES = [
    Rule("softmax"),
    Rule("as_they_are", renormalise=False),
    Rule("sigmoid", scoring="sigmoid", scale=2.5),
    Rule("groups", scoring="sigmoid", groups=4, top_groups=2),
    Rule("input", scoring="sigmoid", renormalise=False, gate_on_input=True),
    Rule("rivals", scoring="sparsemixer", renormalise=False, jitter=0.3),
]


@case("experts", rule=RULES, tokens=[1, 7, 40], k=[1, 3])
def route(pair: Pair, rule: Rule, tokens: int, k: int) -> None:
    def routed(ops, logits):
        routing = ops.route(logits, k, rule.rule)
        return routing.ids, routing.gates

    pair.same("route", routed, pair.normal(tokens, 8, scale=2.0))


@case("experts", rule=[RULES[2], RULES[3]])
def correction_is_for_the_election_only(pair: Pair, rule: Rule) -> None:
    logits, bias = pair.normal(9, 8), dense(pair.normal(8, scale=3.0))

    def routed(ops, logits, bias):
        routing = ops.route(logits, 3, rule.rule, bias)
        return routing.ids, routing.gates

    pair.same("route", routed, logits, bias)


@case("experts")
def equal_scores_elect_the_lower_id(pair: Pair) -> None:
    logits = np.zeros((2, 8), np.float32)
    logits[1, [2, 5, 7]] = 1.0
    ids = pair.on(pair.backend, lambda ops, x: ops.route(x, 4, RouteRule()).ids, logits)[0]
    assert ids.tolist() == [[0, 1, 2, 3], [2, 5, 7, 0]], f"elected {ids.tolist()}"


@case("experts")
def gates_add_up(pair: Pair) -> None:
    logits = pair.normal(9, 8)
    gates = pair.on(pair.backend, lambda ops, x: ops.route(x, 3, RouteRule(scale=2.0)).gates, logits)[0]
    pair.close("route", gates.sum(axis=1), np.full(9, 2.0, np.float32))


@case("experts")
def rivals_share_a_gate(pair: Pair) -> None:
    """Of five experts 3, 2.9, 1 are rivals in turn: each shares with those near it that are not elected yet."""
    logits, rule = np.array([[1.0, 3.0, -4.0, 2.9, 0.97]], np.float32), RouteRule("sparsemixer", renormalise=False)

    def routed(ops, x):
        routing = ops.route(x, 3, replace(rule, jitter=0.02))
        return routing.ids, routing.gates

    ids, gates = pair.on(pair.backend, routed, logits)
    assert ids.tolist() == [[1, 3, 0]], f"elected {ids.tolist()}"
    shares = [1 / (1 + np.exp(-0.1)), 1.0, 1 / (1 + np.exp(-0.03))]
    pair.close("route", gates, np.array([shares], np.float32))


@case("experts", rule=RULES, tokens=[1, 5, 40])
def a_whole_layer(pair: Pair, rule: Rule, tokens: int) -> None:
    """Router, gated experts and their sum, against one token after the other."""
    x, router = pair.normal(tokens, 16), pair.weight(8, 16)
    gate, up, down = pair.weight(8, 24, 16), pair.weight(8, 24, 16), pair.weight(8, 16, 24)

    def layer(ops, x, router, gate, up, down):
        routing = ops.route(ops.linear(x, router), 2, rule.rule)
        inner = ops.gated(ops.expert_linear(x, gate, routing), ops.expert_linear(x, up, routing), "silu")
        return ops.combine(ops.expert_linear(inner, down, routing), routing)

    pair.same("chain", layer, x, router, gate, up, down)
    if not rule.rule.gate_on_input:
        inputs = (x, router, gate, up, down)
        want = one_by_one(pair, rule.rule, x, *(w.parts["weight"] for w in inputs[1:]))
        pair.close("chain", pair.on(pair.backend, layer, *inputs)[0], want)


def one_by_one(
    pair: Pair, rule: RouteRule, x: np.ndarray, router: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    """The layer's definition, one token and one expert at a time."""
    elected = pair.reference.route(pair.reference.array(x @ router.T), 2, rule)
    out = np.zeros_like(x)
    for n, token in enumerate(x):
        for e, weight in zip(elected.ids.data[n], elected.gates.data[n], strict=True):
            a = gate[e] @ token
            out[n] += weight * (down[e] @ (a / (1 + np.exp(-a)) * (up[e] @ token)))
    return out


@case("experts", tokens=[1, 6])
def each_expert_its_own_input(pair: Pair, tokens: int) -> None:
    """x [N, k, I]: what a token's j-th expert gets is its j-th row; with biases [E, O]."""
    x, w, b = pair.normal(tokens, 3, 16), pair.weight(8, 5, 16), dense(pair.normal(8, 5))
    logits = pair.normal(tokens, 8)

    def inner(ops, x, w, b, logits):
        routing = ops.route(logits, 3, RouteRule())
        return ops.expert_linear(x, w, routing), ops.expert_linear(x, w, routing, b)

    pair.same("linear", inner, x, w, b, logits)


@case("experts")
def experts_as_arrays(pair: Pair) -> None:
    x, w, logits = pair.normal(6, 16), pair.normal(8, 5, 16, scale=0.25), pair.normal(6, 8)

    def inner(ops, x, w, logits):
        return ops.expert_linear(x, w, ops.route(logits, 2, RouteRule()))

    pair.same("linear", inner, x, w, logits)


@case("experts", tokens=[1, 50])
def many_experts(pair: Pair, tokens: int) -> None:
    x, w, logits = pair.normal(tokens, 48), pair.weight(64, 33, 48), pair.normal(tokens, 64)

    def inner(ops, x, w, logits):
        routing = ops.route(logits, 8, RouteRule())
        return ops.combine(ops.expert_linear(x, w, routing), routing)

    pair.same("chain", inner, x, w, logits)


@case("experts")
def all_to_one_expert(pair: Pair) -> None:
    """An election as lopsided as can be, and experts that nobody elected."""
    logits = np.tile(np.array([0, 0, 5, 0, 4, 0, 0, 0], np.float32), (33, 1))
    x, w = pair.normal(33, 16), pair.weight(8, 5, 16)

    def inner(ops, x, w, logits):
        routing = ops.route(logits, 2, RouteRule())
        return ops.combine(ops.expert_linear(x, w, routing), routing)

    pair.same("chain", inner, x, w, logits)
