"""The dense Qwen3 models: a decoder-only Transformer of 2025, in one file.

    ids - embed_tokens - num_hidden_layers x [ x + self_attn(input_layernorm(x)),
                                   x + mlp(post_attention_layernorm(x)) ] - norm - lm_head - logits

    >>> config = Qwen3Config(100, 32, 88, 2, 4, 2, 8, max_position_embeddings=16)
    >>> Qwen3ForCausalLM(config)(torch.tensor([[5, 17, 3]])).shape
    torch.Size([1, 3, 100])

https://arxiv.org/abs/2505.09388 (Qwen3 Technical Report). Read minigpt/model.py first: the structure is the
same, but the parts are newer. RMSNorm replaces LayerNorm; rotated queries and keys (RoPE) replace learned
positions; there are fewer heads of keys and values than of queries (GQA); queries and keys have norms; the
MLP has a gate; there are no biases and no dropout.

Fields and attributes have the names of Hugging Face's config.json and weights, so that you can read both side
by side. Experts are not supported. This file imports only torch: KeyValueCache, check_inputs, causal_mask and
eager_attention are copied from minigpt/model.py (a test compares the text).

Letters in shapes: B rows of the batch; T tokens of this call; S all tokens, cached ones and these T;
C = hidden_size; H = num_attention_heads (of queries); K = num_key_value_heads; D = head_dim;
I = intermediate_size; V = vocab_size.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are scaled, so that a model can read longer texts than in its first training."""

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float  # linear: divides all frequencies; yarn, llama3: divides the low ones; dynamic: not used
    original_max_position_embeddings: int = 0  # yarn, llama3: longest sequence of the first training
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by this number
    beta_fast: float = 32.0  # yarn: channel pairs with more rotations per sequence than this are not scaled
    beta_slow: float = 1.0  # yarn: channel pairs with fewer rotations than this rotate `factor` times slower
    truncate: bool = True  # yarn: the limits from beta_fast and beta_slow are rounded to whole channel pairs
    high_freq_factor: float = 4.0  # llama3: means the same as beta_fast
    low_freq_factor: float = 1.0  # llama3: means the same as beta_slow


@dataclass(frozen=True)
class Qwen3Config:
    """The configuration: everything that decides the weights and the computation. Defaults: Qwen3-0.6B."""

    vocab_size: int = 151936  # number of vocabulary entries
    hidden_size: int = 1024  # channels: width of a token's vector
    intermediate_size: int = 3072  # channels inside the MLP
    num_hidden_layers: int = 28  # number of blocks
    num_attention_heads: int = 16  # number of query heads
    num_key_value_heads: int = 8  # number of key and value heads; query heads share them in equal groups
    head_dim: int = 128  # channels of a head; need not be hidden_size / num_attention_heads
    max_position_embeddings: int = 40960  # longest sequence, in tokens
    rms_norm_eps: float = 1e-6  # added in RMSNorm, against division by 0
    rope_theta: float = 1e6  # base of RoPE; with a larger base, the slow channel pairs rotate more slowly
    tie_word_embeddings: bool = True  # lm_head shares the tensor of embed_tokens (published models up to 4B)
    # The published Qwen3 models use none of the following. Other models of this architecture do.
    attention_bias: bool = False  # True: biases in q_proj, k_proj, v_proj and o_proj
    rope_scaling: RopeScaling | None = None  # None: RoPE's frequencies are not scaled
    sliding_window: int | None = None  # tokens that a query of a sliding layer sees, itself included
    layer_types: tuple[str, ...] | None = None  # each "full_attention" or "sliding_attention"; None: all full

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.type is int):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1: got {name}={value!r:.80}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 3e38:
                raise ValueError(f"{name} must be a finite number above 0: got {name}={value!r:.80}")
        for name in ("tie_word_embeddings", "attention_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False: got {name}={getattr(self, name)!r:.80}")
        if self.num_attention_heads % self.num_key_value_heads:
            got = f"{self.num_key_value_heads=}, {self.num_attention_heads=}".replace("self.", "")
            raise ValueError(f"num_key_value_heads must divide num_attention_heads: got {got}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, RoPE turns pairs: got head_dim={self.head_dim}")

    def is_sliding(self, layer: int) -> bool:
        """Return True if a layer attends only to the last `sliding_window` tokens."""
        return self.layer_types is not None and self.layer_types[layer] == "sliding_attention"

    def parameter_count(self) -> int:
        """Compute the number of parameters from the sizes. A tied lm_head is not counted again."""
        C, D = self.hidden_size, self.head_dim
        queries, keys = self.num_attention_heads * D, self.num_key_value_heads * D
        attention = C * queries + C * keys + C * keys + queries * C  # q_proj, k_proj, v_proj, o_proj
        attention += int(self.attention_bias) * (queries + keys + keys + C)
        block = C + attention + 2 * D + C + 3 * C * self.intermediate_size  # 2 D: q_norm and k_norm
        embeddings = self.vocab_size * C * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * block + C  # the last C is the weight of the last norm


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
    # A float mask is probably additive (0 = attend, -inf = do not attend): the opposite of our 1 and 0.
    if mask is not None and (mask.is_floating_point() or mask.shape not in ((B, width), (B, T, width))):
        raise ValueError(f"attention_mask must be bool or int {B, width}: got {mask.dtype} {(*mask.shape,)}")
    if positions is not None and positions.shape != (B, T):
        raise ValueError(f"position_ids must have the shape of input_ids, {B, T}: got {(*positions.shape,)}")
    # Left padding gives a row more columns than positions, so check the largest position, not the width. On
    # a GPU, read positions only if the width exceeds the limit, because the CPU waits for this read.
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


def window_mask(
    visible: Tensor | None,
    window: int,
    past: int,
    T: int,
    attention_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Return the mask of a layer with a sliding window, (1 or B, 1, T, S), True = attend.

    `visible` comes from `causal_mask`. The new mask also hides keys that are `window` or more tokens back.
    """
    if visible is None:
        visible = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)  # (T, S)
    held = torch.ones(1, past + T, dtype=torch.bool, device=device)  # (1, S): True = token, not padding
    if attention_mask is not None:  # the window counts tokens, not padding
        held = torch.cat((attention_mask[:, :past].bool(), held[:, past:].expand(len(attention_mask), T)), 1)
    place = held.cumsum(-1)  # (1 or B, S): number of tokens up to this one, without padding
    return visible & (place[:, past:, None] - place[:, None, :] < window)[:, None]


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps): LayerNorm without the mean and the bias.

    https://arxiv.org/abs/1910.07467. The squares are summed in float32 or better: bfloat16 is too coarse.
    The result is rounded to x's dtype before the product with the weight, as Qwen3 was trained.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise vectors: (..., C) -> (..., C), in the same dtype."""
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out: Tensor = _RMSNormOnCpu.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return out
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.rms_norm(exact, self.weight.shape, eps=self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)


class _RMSNormOnCpu(torch.autograd.Function):
    """RMSNorm with a gradient written by hand, for training on a CPU.

    Torch has no CPU kernel for this gradient: torch passes over the activations a dozen times. This class
    takes half the time (LOG.md). Second derivatives and torch.func are not supported.
    With r = 1 / sqrt(mean(x^2) + eps), n = r x, y = w n, and g the gradient of the loss with respect to y:

        dw = sum over all vectors of g n        dx = r (g w - n mean(g w n))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        root = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        normed = exact * root  # (..., C)
        ctx.save_for_backward(normed, root, weight)
        ctx.dtype = x.dtype
        return normed.to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, root, given = ctx.saved_tensors
        gradient, weight = gradient.to(normed.dtype), given.to(normed.dtype)
        product = gradient * normed  # (..., C)
        weight_grad = product.reshape(-1, product.shape[-1]).sum(0)  # (C,)
        mean = (product @ weight).div_(normed.shape[-1]).unsqueeze(-1)  # (..., 1)
        x_grad = (gradient * weight).addcmul_(normed, mean, value=-1).mul_(root)
        return x_grad.to(ctx.dtype), weight_grad.to(given.dtype), None


def rope_tables(positions: Tensor, config: Qwen3Config) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles by which RoPE rotates each pair of channels at each position.

    RoPE, https://arxiv.org/abs/2104.09864: pair i is rotated by position * theta^(-2i/D). The product of a
    query and a key then depends only on their distance, and no positions are learned.
    positions (T,) or (B, T) -> cos, sin (1, T, D/2) or (B, 1, T, D/2), always float32: in bfloat16, position
    257 would be 256. The tables are computed in each forward pass, once for all layers, and not stored in the
    model. This is cheap, and no checkpoint, cast or move to another device can make the tables wrong.
    """
    frequencies = rope_frequencies(config, positions.device)  # (D/2,)
    angles = (positions[..., None].float() * frequencies).unsqueeze(-3)  # (1, T, D/2) or (B, 1, T, D/2)
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return angles.cos() * factor, angles.sin() * factor


def rope_frequencies(config: Qwen3Config, device: torch.device) -> Tensor:
    """Return the angle by which RoPE rotates each pair of channels from one position to the next, (D/2,).

    A model trained on short texts can read long texts if its slow pairs rotate even more slowly. The fast
    pairs, which distinguish neighbours, keep their frequency. YaRN (https://arxiv.org/abs/2309.00071) and
    Llama 3.1 differ in the limit between slow and fast. "linear" slows all pairs. "dynamic" slows all pairs
    in texts beyond max_position_embeddings, which are an error here: so "dynamic" changes nothing.
    """
    D, scaling = config.head_dim, config.rope_scaling
    exponents = torch.arange(0, D, 2, device=device, dtype=torch.float32) / D  # (D/2,)
    frequencies = 1.0 / config.rope_theta**exponents  # (D/2,), computed and rounded as in Hugging Face's code
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    kept = torch.zeros_like(frequencies)  # (D/2,): 1 = keep the frequency, 0 = divide it by `factor`
    length = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    elif scaling.rope_type == "yarn":
        first, last = (  # indices of the pairs with beta_fast and beta_slow rotations per sequence
            D * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(config.rope_theta))
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, D - 1)
        pairs = torch.arange(D // 2, device=device, dtype=torch.float32)  # (D/2,)
        kept = 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels of queries or keys: (B, H, T, D) -> (B, H, T, D). Each vector keeps its norm.

    Channel i is paired with channel i + D/2, as Hugging Face's weights expect. (The paper pairs neighbours.
    The only difference is the order of the rows of q_proj and k_proj.)
    """
    first, second = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)  # (B, H, T, D)


class Attention(nn.Module):
    """Attention with H query heads that share K key and value heads (GQA, https://arxiv.org/abs/2305.13245).

    GQA makes the cache smaller: with H = 4 K, the keys and values of a token take a quarter of the memory.
    """

    def __init__(self, config: Qwen3Config, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer  # number of this layer in the cache
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads  # H / K
        C, queries = config.hidden_size, config.num_attention_heads * config.head_dim  # H * D
        keys, bias = config.num_key_value_heads * config.head_dim, config.attention_bias  # K * D
        self.q_proj = nn.Linear(C, queries, bias=bias)
        self.k_proj, self.v_proj = nn.Linear(C, keys, bias=bias), nn.Linear(C, keys, bias=bias)
        self.o_proj = nn.Linear(queries, C, bias=bias)
        # The norms of queries and keys limit the scores, so that scores cannot explode in training
        # (https://arxiv.org/abs/2302.05442). Qwen2 had biases in q, k and v instead.
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache: KeyValueCache | None,
        attentions: list[Tensor] | None,
    ) -> Tensor:
        """Hidden states (B, T, C) -> (B, T, C). Appends the attention weights to `attentions`, if given."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        # Rotate after the norm: the norm has a weight per channel, which would distort a rotated pair.
        # cos and sin are float32, so `to` converts q and k back to the dtype of v. SDPA needs one dtype.
        q, k = rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D) each
        if attentions is not None:
            k, v = (tensor.repeat_interleave(self.groups, dim=1) for tensor in (k, v))  # (B, H, S, D) each
            out, weights = eager_attention(q, k, v, visible)
            attentions.append(weights)
        elif visible is None and T > 1:  # below, enable_gqa lets query heads share k and v without copies
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups > 1)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=self.groups > 1)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, H * D) -> (B, T, C)
        return mixed


class SlidingAttention(Attention):
    """Attention with a sliding window. Only the mask differs: `visible` comes from `window_mask`."""


class MLP(nn.Module):
    """SwiGLU, https://arxiv.org/abs/2002.05202: down_proj(silu(gate_proj(x)) * up_proj(x)).

    The three matrices have as many weights as GPT's two if intermediate_size is 8/3 hidden_size.
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, C) -> (B, T, C)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, I) -> (B, T, C)
        return out


class Block(nn.Module):
    """A block: attention, then MLP. Each adds its output to the residual stream, as in GPT."""

    def __init__(self, config: Qwen3Config, layer: int = 0) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (SlidingAttention if config.is_sliding(layer) else Attention)(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache: KeyValueCache | None,
        attentions: list[Tensor] | None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) -> (B, T, C), or (B, W, C) if `columns` (B, W) picks W tokens per row."""
        x = x + self.self_attn(self.input_layernorm(x), rope, visible, cache, attentions)
        if columns is not None:
            x = x.take_along_dim(columns[..., None], 1)  # (B, W, C)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Qwen3Model(nn.Module):
    """Embedding, blocks and the last norm: from ids to hidden states."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.initialize()

    def initialize(self) -> None:
        """Initialise as GPT-2 does. The technical report does not describe Qwen3's own initialisation."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in (module for module in self.modules() if isinstance(module, Block)):
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.num_hidden_layers))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        attentions: list[Tensor] | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, T) -> hidden states (B, T, C), or (B, W, C) if `columns` (B, W) picks W tokens per row."""
        past = 0 if past_key_values is None else past_key_values.length
        limit = self.config.max_position_embeddings
        check_inputs(input_ids, attention_mask, position_ids, past, limit, "max_position_embeddings")
        T = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)  # (T,)
        rope = rope_tables(position_ids, self.config)  # cos and sin, for all layers
        visible = causal_mask(past, T, attention_mask, input_ids.device)
        near = visible
        if self.config.sliding_window is not None:
            near = window_mask(visible, self.config.sliding_window, past, T, attention_mask, input_ids.device)
        x = self.embed_tokens(input_ids)  # (B, T, C)
        for layer, block in enumerate(self.layers):
            seen = near if self.config.is_sliding(layer) else visible
            wanted = columns if block is self.layers[-1] else None
            x = block(x, rope, seen, past_key_values, attentions, wanted)
        if past_key_values is not None:
            past_key_values.advance(T)
        hidden: Tensor = self.norm(x)  # (B, T, C) or (B, W, C)
        return hidden


class Qwen3ForCausalLM(nn.Module):
    """The model with lm_head. It gives a score (logit) to each vocabulary entry as the next token."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen3Model(config)
        # If lm_head is tied, it uses the tensor of embed_tokens. The Linear layer's own matrix is then made
        # on "meta": that matrix takes no memory, and no random numbers are drawn for it.
        device = "meta" if config.tie_word_embeddings else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=0.02)

    base_model = property(lambda self: self.model)  # the model without lm_head, under Hugging Face's name
    blocks = property(lambda self: self.model.layers)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V): at each position, the scores of the next token.

        attention_mask (B, S), cached tokens included: 1 = token, 0 = padding. Right padding needs no mask.
            Or (B, T, S): 1 = this query attends to this key, even a later one; each query needs a 1.
        position_ids (B, T): positions of these T tokens. Left padding needs both a mask and positions.
        past_key_values: a cache of the earlier tokens; these T tokens are added to it.
        Raises ValueError if a shape or dtype is wrong, or the sequence exceeds max_position_embeddings.
        """
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values)  # (B, T, C)
        logits: Tensor = self.lm_head(hidden)  # (B, T, V)
        return logits

    def attentions(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Return the attention weights of each layer, (B, H, T, T). Each row sums to 1 over the keys."""
        weights: list[Tensor] = []
        self.model(input_ids, attention_mask, attentions=weights)
        return weights
