"""Describes GPT-2 as a list of operations, which minigpt.generation.native runs in C."""

from typing import Any

from torch import nn

from minigpt.model import MLP, Block, CausalSelfAttention, GPTLMHeadModel, Transformer

__all__ = ["MODULES", "list_operations"]

MODULES: tuple[type[nn.Module], ...] = (GPTLMHeadModel, Transformer, Block, CausalSelfAttention, MLP)


def list_operations(out: Any, model: GPTLMHeadModel) -> None:
    """Add the operations of the model's forward pass to `out`, an OperationList for the C code."""
    config, body = model.config, model.transformer
    C, H = config.n_embd, config.n_head
    x, qkv, mixed = out.buffer("x", C), out.buffer("qkv", 3 * C), out.buffer("mixed", C)
    wide, logits = out.buffer("wide", 4 * C), out.buffer("logits", config.vocab_size)
    act = "gelu_tanh" if config.gelu == "tanh" else "gelu_exact"
    blocks: Any = body.blocks
    out.embed(body.wte.weight, x, positions=body.wpe.weight)
    for block in blocks:
        out.product(block.attn.qkv_proj, x, qkv, norm=block.ln_1)
        out.attention(qkv, mixed, heads=H, kv_heads=H, head_dim=C // H)
        out.product(block.attn.out_proj, mixed, x, add=1)
        out.product(block.mlp.c_fc, x, wide, norm=block.ln_2, act=act)
        out.product(block.mlp.c_proj, wide, x, add=1)
    out.product(model.lm_head, x, logits, norm=body.ln_f)
