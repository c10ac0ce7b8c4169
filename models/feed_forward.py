"""The feed-forward half of a block: one gated MLP, or a router and experts."""

from __future__ import annotations

from ..backends.base import A
from .config import MLPConfig, MoEConfig
from .scope import Scope


def feed_forward(p: Scope, cfg: MLPConfig | MoEConfig, x: A) -> A:
    """x [B, T, D] -> [B, T, D]"""
    return moe(p.at("moe"), cfg, x) if isinstance(cfg, MoEConfig) else mlp(p.at("mlp"), cfg, x)


def mlp(p: Scope, cfg: MLPConfig, x: A) -> A:
    if cfg.gate is None:
        return p.linear("down", p.ops.act(p.linear("up", x), cfg.act))
    if cfg.gate == "fused":
        gate, up = p.ops.split(p.linear("gate_up", x), (cfg.hidden, cfg.hidden))
    else:
        gate, up = p.linear("gate", x), p.linear("up", x)
    return p.linear("down", p.ops.gated(gate, up, cfg.act))


def moe(p: Scope, cfg: MoEConfig, x: A) -> A:
    """Each token goes through `per_token` of the experts, weighted by the router's gates."""
    B, T, D = x.shape
    x = x.reshape(B * T, D)
    logits = p.tap("logits", p.linear("router", x))  # [N, E]
    routing = p.ops.route(logits, cfg.per_token, cfg.rule, p.weight("election") if cfg.election else None)
    gate, up = p.expert_linear("gate", x, routing), p.expert_linear("up", x, routing)  # [N, k, F]
    if cfg.up_act:
        up = p.ops.act(up, cfg.up_act) + cfg.up_offset
    h = p.ops.gated(gate, up, cfg.act)
    y = p.ops.combine(p.expert_linear("down", h, routing), routing)
    if cfg.shared:
        h = mlp(p.at("shared"), cfg.shared, x)
        y = y + (h * p.ops.act(p.linear("shared_gate", x), "sigmoid") if cfg.shared_gate else h)
    return y.reshape(B, T, D)
