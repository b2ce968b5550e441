"""The model: a decoder-only Transformer, GPT-2's architecture with two switches, in one sitting.

    ids - wte + wpe - dropout - n_layer x [ x + attn(ln_1(x)), x + mlp(ln_2(x)) ] - ln_f - lm_head - logits

    >>> model = GPTLMHeadModel(GPTConfig(n_embd=32, n_head=4, n_layer=2, vocab_size=100, block_size=16))
    >>> model(torch.tensor([[5, 17, 3]])).shape  # a score per entry of the vocabulary, at each position
    torch.Size([1, 3, 100])

With `bias=True, gelu="tanh"` this is exactly GPT-2; the defaults are the smaller model of the documents. It
imports torch and nothing of ours; training, sampling, caching, loading and saving are other rooms' work.

Letters in shapes: B rows of the batch, T tokens given now, S tokens in all (the cached ones and these T),
C = n_embd channels, H = n_head heads, D = C / H channels of one head, V = vocab_size.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides the shapes of the weights and what is computed with them."""

    n_embd: int = 768  # channels of a token's vector
    n_head: int = 8  # attention heads; each sees n_embd / n_head channels
    n_layer: int = 6  # blocks, one after the other
    dropout: float = 0.1  # share of values zeroed in training, 0 <= dropout < 1
    block_size: int = 256  # longest sequence, in tokens
    vocab_size: int = 4825  # entries of the vocabulary
    bias: bool = False  # biases in out_proj, c_fc and c_proj too, as GPT-2 has them
    gelu: Literal["exact", "tanh"] = "exact"  # GELU itself, or GPT-2's approximation of it

    def __post_init__(self) -> None:
        for name in ("n_embd", "n_head", "n_layer", "block_size", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1: got {name}={value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head must divide n_embd: got n_head={self.n_head}, n_embd={self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1: got dropout={self.dropout!r}")
        if self.gelu not in ("exact", "tanh"):
            raise ValueError(f'gelu must be "exact" or "tanh": got gelu={self.gelu!r}')

    # What every family's configuration answers to, under the names that Hugging Face has for all.
    hidden_size = property(lambda self: self.n_embd)
    num_hidden_layers = property(lambda self: self.n_layer)
    num_attention_heads = num_key_value_heads = property(lambda self: self.n_head)
    head_dim = property(lambda self: self.n_embd // self.n_head)
    max_position_embeddings = property(lambda self: self.block_size)

    def parameter_count(self) -> int:
        """How many values training sets, by formula. lm_head is wte's tensor and counts once."""
        C, bias = self.n_embd, int(self.bias)
        embeddings = self.vocab_size * C + self.block_size * C  # wte (and lm_head), wpe
        norm = C + C  # a LayerNorm's weight and bias
        attention = (C * 3 * C + 3 * C) + (C * C + bias * C)  # qkv_proj, in both variants with bias; out_proj
        mlp = (C * 4 * C + bias * 4 * C) + (4 * C * C + bias * C)  # c_fc; c_proj
        return embeddings + self.n_layer * (norm + attention + norm + mlp) + norm  # the last one is ln_f


class KeyValueCache(Protocol):
    """What the model asks of a cache of earlier tokens' keys and values (inference/cache.py has them)."""

    @property
    def length(self) -> int:
        """Tokens held: the same number in each row."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append T tokens' k, v (B, H, T, D) to a layer; return all of it, (B, H, length + T, D) each."""

    def advance(self, tokens: int) -> None:
        """All layers are updated: `length` grows by `tokens`."""


def check_inputs(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, past: int, limit: int, name: str
) -> None:
    """ValueError where an embedding, SDPA or CUDA would fail later and say less; `past`: tokens cached."""
    if ids.ndim != 2 or ids.shape[1] == 0 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64/int32 (B, T > 0): got {ids.dtype} {tuple(ids.shape)}")
    (B, T), width = ids.shape, past + ids.shape[1]
    # A mask of floats is probably additive, 0 and -inf, which means the opposite of ours.
    if mask is not None and (mask.shape != (B, width) or mask.is_floating_point()):
        raise ValueError(f"attention_mask must be bool or int {B, width}: got {mask.dtype} {(*mask.shape,)}")
    if positions is not None and positions.shape != (B, T):
        raise ValueError(f"position_ids must have the shape of input_ids, {B, T}: got {(*positions.shape,)}")
    # Left padding may make a row longer than its last position: only the values tell. To look at them stalls
    # a GPU and breaks a compiled graph, so a GPU looks only if the width alone is too large.
    if positions is not None and (ids.device.type == "cpu" or width > limit):
        width = 0 if torch.compiler.is_compiling() else int(positions.max()) + 1
    if width > limit:
        raise ValueError(f"the model's {name} is {limit} tokens: got a sequence of {width} tokens")


def visible_keys(past: int, T: int, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys may each query see? True = visible: (T, S), or (B, 1, T, S) with a padding mask (B, S).

    None means plain causality, SDPA's fast path: nothing is cached, or the one query is the newest token and
    sees all. Right padding needs no mask: to every real token it lies in the future.
    """
    if attention_mask is None and (past == 0 or T == 1):
        return None
    query = torch.arange(past, past + T, device=device)[:, None]  # (T, 1)  where each query stands
    key = torch.arange(past + T, device=device)  # (S,)
    visible = key <= query  # (T, S)  SDPA's is_causal aligns top left: wrong once a past is cached
    if attention_mask is None:
        return visible
    visible = visible & attention_mask.bool()[:, None, :]  # (B, T, S)
    # A softmax over nothing is 0/0: one such row would turn all gradients into NaN. So all see themselves.
    return (visible | (key == query))[:, None]  # (B, 1, T, S)  the same for all heads


def written_out_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(QK^T / sqrt(D)) V, step by step: the slow twin of SDPA, which shows its weights.

    https://arxiv.org/abs/1706.03762 (Attention Is All You Need), equation 1.
    q (B, H, T, D), k and v (B, H, S, D) -> output (B, H, T, D), weights (B, H, T, S) as before dropout.
    `visible` as from `visible_keys`; None is plain causality, the T queries being the last of the S tokens.
    """
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    if visible is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, S)
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)  # (B, H, T, S)  a row sums to 1
    return F.dropout(weights, dropout) @ v, weights


class CausalSelfAttention(nn.Module):
    """Each position gathers values from itself and from earlier positions, in H heads at once."""

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer  # tells the cache whose keys and values these are
        self.n_head, self.dropout = config.n_head, config.dropout
        # Queries, keys and values in one product: one large matrix is faster than three small ones.
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, visible: Tensor | None, cache: KeyValueCache | None, attentions: list[Tensor] | None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). A list `attentions` gets the weights, which the slow twin then computes."""
        B, T, C = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D) each
        dropout = self.dropout if self.training else 0.0
        if attentions is not None:
            out, weights = written_out_attention(q, k, v, visible, dropout)
            attentions.append(weights)
        elif visible is None and T > 1:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        mixed: Tensor = self.resid_dropout(self.out_proj(out))  # (B, T, C)
        return mixed


class MLP(nn.Module):
    """Two layers on each position by itself, four times as wide in between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        # https://arxiv.org/abs/1606.08415 (GELU). GPT-2 took that paper's tanh approximation. The two differ
        # by up to 5e-4, enough to change what trained weights say: hence a switch, saved with the weights.
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = F.gelu(self.c_fc(x), approximate=self.approximate)  # (B, T, 4C)
        out: Tensor = self.resid_dropout(self.c_proj(x))  # (B, T, C)
        return out


class Block(nn.Module):
    """Attention, then MLP; each adds to a stream that nothing else touches.

    The norm stands before each part (pre-LN, https://arxiv.org/abs/2002.04745), so that gradients reach the
    first block through plain sums. The first Transformer put it after each sum and needed a long warm-up.
    """

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, visible: Tensor | None, cache: KeyValueCache | None, attentions: list[Tensor] | None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), visible, cache, attentions)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """Embeddings, the blocks and the last norm: from ids to hidden vectors."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # positions are learned: hence a limit
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.initialize()

    def initialize(self) -> None:
        """Draw GPT-2's initial weights: normal(0, 0.02), biases 0; norms stay as torch makes them, 1 and 0.

        The 2 * n_layer projections that add to the residual stream are drawn smaller, so that their sum does
        not grow with depth: https://openai.com/index/better-language-models (GPT-2's paper, section 2.3).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in (module for module in self.modules() if isinstance(module, Block)):
            for projection in (block.attn.out_proj, block.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, C). Arguments as GPTLMHeadModel.forward; `attentions` as CausalSelfAttention."""
        past = 0 if past_key_values is None else past_key_values.length
        check_inputs(input_ids, attention_mask, position_ids, past, self.config.block_size, "block_size")
        T = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)  # (T,)
        visible = visible_keys(past, T, attention_mask, input_ids.device)  # once for all layers
        x = self.drop(self.wte(input_ids) + self.wpe(position_ids))  # (B, T, C)
        for block in self.blocks:
            x = block(x, visible, past_key_values, attentions)
        if past_key_values is not None:
            past_key_values.advance(T)
        hidden: Tensor = self.ln_f(x)  # (B, T, C)
        return hidden


class GPTLMHeadModel(nn.Module):
    """The Transformer and, on top, a score for each entry of the vocabulary to be the next token."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        # Weight tying, https://arxiv.org/abs/1608.05859: one tensor reads and predicts tokens. ("meta" takes
        # neither memory nor random numbers for the tensor that is replaced.)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False, device="meta")
        self.lm_head.weight = self.transformer.wte.weight

    base_model = property(lambda self: self.transformer)  # ids -> hidden vectors, as Hugging Face calls it
    blocks = property(lambda self: self.transformer.blocks)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V): at each position, scores of the token that follows.

        attention_mask (B, S): 1 = token, 0 = padding, cached tokens included. Right padding needs none.
        position_ids (B, T): each token's place in its text; rows padded on the left need both.
        past_key_values: a cache of the tokens before these, which are added to it.
        Raises ValueError if a shape or dtype does not fit or the sequence is longer than block_size.
        """
        hidden = self.transformer(input_ids, attention_mask, position_ids, past_key_values)  # (B, T, C)
        logits: Tensor = self.lm_head(hidden)  # (B, T, V)
        return logits

    def attentions(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Who looks at whom: per layer, weights (B, H, T, T); each row is a distribution over the keys."""
        weights: list[Tensor] = []
        self.transformer(input_ids, attention_mask, attentions=weights)
        return weights
