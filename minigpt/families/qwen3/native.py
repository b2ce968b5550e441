"""Describes Qwen3 as a list of operations, which minigpt.generation.native runs in C."""

from typing import Any

import torch
from torch import Tensor, nn

from minigpt.families.qwen3.model import (
    MLP,
    Attention,
    Block,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    RMSNorm,
    rope_frequencies,
    rope_tables,
)

__all__ = ["MODULES", "list_operations", "rotary_frequencies", "rotary_table"]

MODULES: tuple[type[nn.Module], ...] = (Qwen3ForCausalLM, Qwen3Model, Block, Attention, MLP, RMSNorm)


def list_operations(out: Any, model: Qwen3ForCausalLM) -> None:
    """Add the operations of the model's forward pass to `out`, an OperationList for the C code."""
    config, body = model.config, model.model
    C, D, H, G = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    x, qkv, mixed = out.buffer("x", C), out.buffer("qkv", (H + 2 * G) * D), out.buffer("mixed", H * D)
    wide, logits = out.buffer("wide", config.intermediate_size), out.buffer("logits", config.vocab_size)
    # views of one buffer: the C code for attention expects q, k and v side by side
    q, k, v = torch.split(qkv, [H * D, G * D, G * D], dim=1)
    blocks: Any = body.layers
    out.embed(body.embed_tokens.weight, x)
    for block in blocks:
        attention, mlp, norm = block.self_attn, block.mlp, block.input_layernorm
        out.product(attention.q_proj, x, q, norm=norm, wait=0)
        out.product(attention.k_proj, x, k, norm=norm, wait=0)
        out.product(attention.v_proj, x, v, norm=norm)
        norms = {"q_norm": attention.q_norm.weight, "k_norm": attention.k_norm.weight}
        out.attention(qkv, mixed, heads=H, kv_heads=G, head_dim=D, eps=attention.q_norm.eps, **norms)
        out.product(attention.o_proj, mixed, x, add=1)
        out.product(mlp.gate_proj, x, wide, norm=block.post_attention_layernorm, values=mlp.up_proj)
        out.product(mlp.down_proj, wide, x, add=1)
    out.product(model.lm_head, x, logits, norm=body.norm)


def rotary_table(config: Qwen3Config, columns: int) -> Tensor:
    """Return RoPE's table for the first `columns` positions (columns, D): D / 2 cosines, then D / 2 sines."""
    return torch.cat(rope_tables(torch.arange(columns), config), dim=-1)[0].contiguous()


def rotary_frequencies(config: Qwen3Config) -> tuple[Tensor, float]:
    """Return how RoPE rotates each pair of channels: (angles, factor).

    angles (D / 2,): each pair's rotation from one position to the next. factor: multiplies cos and sin.
    """
    scaling = config.rope_scaling
    factor = 1.0 if scaling is None else scaling.attention_factor
    return rope_frequencies(config, torch.device("cpu")), factor
