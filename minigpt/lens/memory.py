"""Shows what the KV cache holds, and how it grows while a model writes an answer."""

from dataclasses import dataclass

import torch

from minigpt.families.registry import LanguageModel
from minigpt.generation.cache import KeyValueCache, cache_bytes
from minigpt.generation.generation_config import PromptFormat
from minigpt.lens.reading import Reading, read_question
from minigpt.lens.recorder import as_row
from minigpt.lens.results import Floats, Heat, Lines, Part, Table, View
from minigpt.lens.words import Say
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["Cache", "cache"]


@dataclass(frozen=True)
class Cache(View):
    """A view of the KV cache after a question and an answer."""

    pieces: list[str]  # texts of all tokens; the last token of an answer is here, but not in the cache
    prompt: int  # number of tokens of the prompt, which the model reads in one forward pass
    shape: tuple[int, int, int, int]  # layers, key/value heads, tokens (S), channels of a head
    query_heads: int
    bytes_per_token: int
    context: int  # largest number of tokens that the model can read
    key_norms: Floats  # (layers, S)  L2 norm of a token's key vectors, mean over the heads
    value_norms: Floats  # (layers, S)  L2 norm of a token's value vectors, mean over the heads

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        layers, heads, tokens, channels = self.shape
        rows = [
            (say("layers x (keys, values) x heads x channels"), f"{layers} x 2 x {heads} x {channels}"),
            (say("bytes of a token"), f"{self.bytes_per_token:,}"),
            (
                say("after the prompt, {count} tokens", count=self.prompt),
                f"{self.prompt * self.bytes_per_token:,}",
            ),
            *(
                [
                    (
                        say("after the answer, {count} tokens", count=tokens),
                        f"{tokens * self.bytes_per_token:,}",
                    )
                ]
                if tokens > self.prompt
                else []
            ),
            (say("full, {count} tokens", count=self.context), f"{self.context * self.bytes_per_token:,}"),
        ]
        if self.query_heads != heads:
            whole = self.bytes_per_token * self.query_heads // heads
            rows.append((say("bytes of a token, if each of the {count} query heads had its own",
                             count=self.query_heads), f"{whole:,}"))  # fmt: skip
        steps = range(self.prompt, tokens + 1)
        growth = Lines(say("bytes in the cache"), say("tokens"), say("bytes"),
                       {say("bytes"): (list(steps), [n * self.bytes_per_token for n in steps])})  # fmt: skip
        labels = [say("layer {layer}", layer=layer) for layer in range(layers)]
        read = self.pieces[:tokens]
        maps = [Heat(say("length of the keys"), self.key_norms, labels, read),
                Heat(say("length of the values"), self.value_norms, labels, read)]  # fmt: skip
        return [Table(say("the KV cache"), ("", ""), rows, (1,)), growth, *maps]

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        return {say("bytes"): f"{self.shape[2] * self.bytes_per_token:,}"}


@torch.inference_mode()
def cache(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    question: str | Reading,
    answer: str | None = None,
    form: PromptFormat | None = None,
) -> Cache:
    """Run the model on a question and an answer with a KV cache, and measure what the cache then holds.

    Raises:
        InputError: if the text is too long for the model.
    """
    reading = read_question(model, tokenizer, question, answer, form)
    config, weight = model.config, next(model.parameters())
    is_whole = reading.is_text or not reading.answer
    # generation never feeds the answer's last token to the model, so the cache lacks this token
    ids = as_row(model, reading.ids if is_whole else reading.ids[:-1])
    held = KeyValueCache(config, 1, ids.shape[1], weight.device, weight.dtype)
    slot = held.allocate()
    model.base_model(ids, past_key_values=held.view([slot], [ids.shape[1]]))
    keys, values = held.columns(slot, 0, held.length(slot))  # (layers, heads, S, channels) each
    return Cache(
        pieces=reading.pieces,
        prompt=ids.shape[1] if reading.is_text else len(reading.prompt),
        shape=(len(keys), keys.shape[1], keys.shape[2], keys.shape[3]),
        query_heads=config.num_attention_heads,
        bytes_per_token=cache_bytes(config, 1, 1, weight.dtype),
        context=config.max_position_embeddings,
        key_norms=keys.float().norm(dim=-1).mean(dim=1).cpu().numpy(),
        value_norms=values.float().norm(dim=-1).mean(dim=1).cpu().numpy(),
    )
