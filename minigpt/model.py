"""The model: a decoder-only Transformer. The architecture is GPT-2's, with two options (bias, gelu).

    ids - wte + wpe - dropout - n_layer x [ x + attn(ln_1(x)), x + mlp(ln_2(x)) ] - ln_f - lm_head - logits

    >>> model = GPTLMHeadModel(GPTConfig(n_embd=32, n_head=4, n_layer=2, vocab_size=100, block_size=16))
    >>> model(torch.tensor([[5, 17, 3]])).shape  # a score for each vocabulary entry, at each position
    torch.Size([1, 3, 100])

With `bias=True, gelu="tanh"` the architecture is exactly GPT-2's. This file imports only torch. Training,
sampling, caching, loading and saving are in other files.

Letters in shapes: B rows of the batch; T tokens in the input; S = cached tokens + T;
C = n_embd channels; H = n_head heads; D = C / H channels of a head; V = vocab_size.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The configuration: everything that decides the shapes of the weights and the computation."""

    n_embd: int = 768  # channels: width of a token's vector
    n_head: int = 8  # number of attention heads, of n_embd / n_head channels each
    n_layer: int = 6  # number of blocks
    dropout: float = 0.1  # share of activations that are set to zero in training
    block_size: int = 256  # longest sequence, in tokens
    vocab_size: int = 4825  # number of vocabulary entries
    bias: bool = False  # True: biases in all linear layers of a block; False: in qkv_proj only
    gelu: Literal["exact", "tanh"] = "exact"  # the exact GELU, or GPT-2's approximation
    tie_word_embeddings: bool = True  # True: lm_head shares wte's tensor, as in all published GPT-2 models

    def __post_init__(self) -> None:
        for name in ("n_embd", "n_head", "n_layer", "block_size", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1: got {name}={value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head must divide n_embd: got n_head={self.n_head}, n_embd={self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1: got dropout={self.dropout!r}")
        if not isinstance(self.tie_word_embeddings, bool):
            got = repr(self.tie_word_embeddings)
            raise ValueError(f"tie_word_embeddings must be True or False: got tie_word_embeddings={got}")
        if self.gelu not in ("exact", "tanh"):
            raise ValueError(f'gelu must be "exact" or "tanh": got gelu={self.gelu!r}')

    # The sizes under Hugging Face's names. The configuration of every model family has these names.
    hidden_size = property(lambda self: self.n_embd)
    num_hidden_layers = property(lambda self: self.n_layer)
    num_attention_heads = num_key_value_heads = property(lambda self: self.n_head)
    head_dim = property(lambda self: self.n_embd // self.n_head)
    max_position_embeddings = property(lambda self: self.block_size)

    def parameter_count(self) -> int:
        """Compute the number of parameters from the sizes. A tied lm_head is not counted again."""
        C, bias = self.n_embd, int(self.bias)
        # parameters of wte, of lm_head if it is untied, and of wpe
        embeddings = self.vocab_size * C * (1 if self.tie_word_embeddings else 2) + self.block_size * C
        norm = C + C  # parameters of a LayerNorm: weight and bias
        # parameters of qkv_proj (always with bias) and out_proj
        attention = (C * 3 * C + 3 * C) + (C * C + bias * C)
        mlp = (C * 4 * C + bias * 4 * C) + (4 * C * C + bias * C)  # parameters of c_fc and c_proj
        return embeddings + self.n_layer * (norm + attention + norm + mlp) + norm  # the last norm is ln_f


class KeyValueCache(Protocol):
    """The interface of a cache of keys and values (see generation/cache.py)."""

    @property
    def length(self) -> int:
        """Number of cached tokens; it is the same for each row."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v of T tokens, (B, heads, T, D). Return the layer's k and v (B, heads, length + T, D)."""

    def advance(self, tokens: int) -> None:
        """Add `tokens` to `length`. Called after all layers are updated."""


def check_inputs(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, past: int, limit: int, name: str
) -> None:
    """Raise a clear ValueError for inputs that torch would refuse later. `past`: number of cached tokens."""
    if ids.ndim != 2 or ids.shape[1] == 0 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64/int32 (B, T > 0): got {ids.dtype} {tuple(ids.shape)}")
    (B, T), width = ids.shape, past + ids.shape[1]
    # A float mask is refused. It is probably a mask to be added to the scores: 0 = attend, -inf = do not
    # attend. In minigpt's masks, 1 means attend.
    if mask is not None and (mask.is_floating_point() or mask.shape not in ((B, width), (B, T, width))):
        raise ValueError(f"attention_mask must be bool or int {B, width}: got {mask.dtype} {(*mask.shape,)}")
    if positions is not None and positions.shape != (B, T):
        raise ValueError(f"position_ids must have the shape of input_ids, {B, T}: got {(*positions.shape,)}")
    # `limit` limits the positions. With left padding, a row has more columns than positions. So the largest
    # position is checked, not the number of columns. On a GPU, this is done only if `width` exceeds `limit`:
    # to get a value of `positions`, the CPU must wait for the GPU.
    if positions is not None and (ids.device.type == "cpu" or width > limit):
        width = 0 if torch.compiler.is_compiling() else int(positions.max()) + 1
    if width > limit:
        raise ValueError(f"the model's {name} is {limit} tokens: got a sequence of {width} tokens")


def causal_mask(past: int, T: int, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the mask for SDPA, True = attend: (T, S), or (B, 1, T, S) if `attention_mask` is given.

    Without attention_mask, returns None if no token is cached (SDPA's is_causal is faster), or if T is 1 (the
    newest token attends to all). Right padding needs no mask: real tokens never attend to later ones.
    """
    if attention_mask is None and (past == 0 or T == 1):
        return None
    if attention_mask is not None and attention_mask.ndim == 3:
        return attention_mask.bool()[:, None]  # (B, 1, T, S): used as it is, even if it is not causal
    query = torch.arange(past, past + T, device=device)[:, None]  # (T, 1): positions of the queries
    key = torch.arange(past + T, device=device)  # (S,): positions of the keys
    visible = key <= query  # (T, S); SDPA's is_causal would ignore the cached tokens
    if attention_mask is None:
        return visible
    visible = visible & attention_mask.bool()[:, None, :]  # (B, T, S)
    # A row of the mask that is all False would become NaN in the softmax. So every token attends to itself.
    return (visible | (key == query))[:, None]  # (B, 1, T, S): the same for all heads


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute softmax(Q K^T / sqrt(D)) V step by step. Slower than SDPA, but returns attention weights.

    https://arxiv.org/abs/1706.03762 (Attention Is All You Need), equation 1.
    q (B, H, T, D), k and v (B, H, S, D) -> output (B, H, T, D), weights (B, H, T, S) before dropout.
    `visible` comes from `causal_mask`. None means causal: the T queries are the last of the S tokens.
    """
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    if visible is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, S)
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)  # (B, H, T, S): each row sums to 1
    return F.dropout(weights, dropout) @ v, weights


class CausalSelfAttention(nn.Module):
    """Causal attention in H heads: each position takes a weighted mean of its own and earlier values."""

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer  # index of this layer; the cache stores keys and values under this index
        self.n_head, self.dropout = config.n_head, config.dropout
        # The matrices of queries, keys and values are joined, because one large product is faster than three
        # small products.
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, visible: Tensor | None, cache: KeyValueCache | None, attentions: list[Tensor] | None
    ) -> Tensor:
        """Hidden states (B, T, C) -> (B, T, C). Appends the attention weights to `attentions`, if given."""
        B, T, C = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D) each
        dropout = self.dropout if self.training else 0.0
        if attentions is not None:
            out, weights = eager_attention(q, k, v, visible, dropout)
            attentions.append(weights)
        elif visible is None and T > 1:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        mixed: Tensor = self.resid_dropout(self.out_proj(out))  # (B, T, C)
        return mixed


class MLP(nn.Module):
    """Two linear layers with 4C channels between them. Each position is computed independently."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        # https://arxiv.org/abs/1606.08415 (GELU). GPT-2 uses that paper's tanh approximation. The two forms
        # differ by up to 5e-4. A trained model needs the form that it was trained with, so config.json stores
        # the form.
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, C) -> (B, T, C)."""
        x = F.gelu(self.c_fc(x), approximate=self.approximate)  # (B, T, 4C)
        out: Tensor = self.resid_dropout(self.c_proj(x))  # (B, T, C)
        return out


class Block(nn.Module):
    """A block: attention, then MLP. Each adds its output to the residual stream.

    A norm comes before attention and before the MLP (pre-LN, https://arxiv.org/abs/2002.04745). So gradients
    can reach the first block through the additions alone. The original Transformer had a norm after each
    addition, and needed a long warm-up of the learning rate.
    """

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        visible: Tensor | None,
        cache: KeyValueCache | None,
        attentions: list[Tensor] | None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) -> (B, T, C).

        columns (B, W): indices of W positions in each row. Given them, the MLP computes only these positions,
            and the result is (B, W, C).
        """
        x = x + self.attn(self.ln_1(x), visible, cache, attentions)
        if columns is not None:
            x = x.take_along_dim(columns[..., None], 1)  # (B, W, C)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """Embeddings, blocks and the last norm: from ids to hidden states."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        # A learned vector for each position. So no sequence may have more than block_size tokens.
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.initialize()

    def initialize(self) -> None:
        """Initialise the weights as GPT-2 does: normal(0, 0.02), biases 0. LayerNorms keep weight 1, bias 0.

        The 2 * n_layer projections that add to the residual stream start smaller, so that their sum does not
        grow with depth: https://openai.com/index/better-language-models (GPT-2's paper, section 2.3).
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
        columns: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, T) -> hidden states (B, T, C). Arguments: see GPTLMHeadModel and CausalSelfAttention.

        columns (B, W): indices of W positions in each row. Only their hidden states are returned, (B, W, C).
            The last MLP skips the other positions, because no later block needs them.
        """
        past = 0 if past_key_values is None else past_key_values.length
        check_inputs(input_ids, attention_mask, position_ids, past, self.config.block_size, "block_size")
        T = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)  # (T,)
        visible = causal_mask(past, T, attention_mask, input_ids.device)  # one mask for all layers
        x = self.drop(self.wte(input_ids) + self.wpe(position_ids))  # (B, T, C)
        for block in self.blocks:
            wanted = columns if block is self.blocks[-1] else None
            x = block(x, visible, past_key_values, attentions, wanted)
        if past_key_values is not None:
            past_key_values.advance(T)
        hidden: Tensor = self.ln_f(x)  # (B, T, C) or (B, W, C)
        return hidden


class GPTLMHeadModel(nn.Module):
    """The Transformer with lm_head. It gives a score (logit) to each vocabulary entry as the next token."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        # With weight tying (https://arxiv.org/abs/1608.05859), lm_head uses wte's matrix. The matrix that
        # nn.Linear makes is replaced below. So it is made on "meta": there it takes no memory, and no random
        # numbers are drawn for it.
        device = "meta" if config.tie_word_embeddings else None
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False, device=device)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=0.02)

    # base_model is Hugging Face's name for the model without lm_head
    base_model = property(lambda self: self.transformer)
    blocks = property(lambda self: self.transformer.blocks)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V): at each position, the scores of the next token.

        attention_mask: (B, S): 1 = token, 0 = padding, cached tokens included; not needed for right padding.
            Or (B, T, S): 1 = the query attends to the key, even to a later one. No row may be all 0.
        position_ids: (B, T): positions of the input tokens. For left padding, give this and attention_mask.
        past_key_values: a cache of earlier tokens. The T input tokens are added to it.
        Raises ValueError if a shape or dtype is wrong, or if the sequence is longer than block_size.
        """
        hidden = self.transformer(input_ids, attention_mask, position_ids, past_key_values)  # (B, T, C)
        logits: Tensor = self.lm_head(hidden)  # (B, T, V)
        return logits

    def attentions(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Return the attention weights of each layer, (B, H, T, T). Each row sums to 1 over the keys."""
        weights: list[Tensor] = []
        self.transformer(input_ids, attention_mask, attentions=weights)
        return weights
