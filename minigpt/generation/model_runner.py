"""Runs a model with PyTorch: tokens in, logits out. minigpt.generation.native does the same faster, in C.

    runner = TorchRunner(model)
    logits = runner.prefill([prompt], [slot], cache)      # (1, V), after the prompt
    logits = runner.decode([[token]], [slot], cache)      # (1, V), after the token

The order in which PyTorch sums a matrix product depends on the number of tokens in the call. So the last bits
of a token's logits depend on this number, too. This is not so in the C code.

Letters in shapes: n rows, T tokens, C channels, V entries of the vocabulary.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.families.registry import LanguageModel
from minigpt.generation import sampling
from minigpt.generation.cache import CacheView, KeyValueCache
from minigpt.generation.inputs_embeds import replaced_embeddings
from minigpt.generation.output import Recorder

__all__ = ["TorchRunner"]


class TorchRunner:
    """Runs one model, which is in eval mode. Only one thread may use the runner."""

    # False: the used slots of the cache should be adjacent; otherwise their content is copied in each step
    in_any_slot = False

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._device = next(model.parameters()).device

    def prefill(
        self,
        pieces: Sequence[Sequence[int]],
        slots: Sequence[int],
        cache: KeyValueCache,
        embeds: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Read pieces[i], the next tokens of slots[i]. Return the logits after each piece, (n, V).

        All slots must hold the same number of tokens. The pieces are one batch, padded on the right.

        Args:
            embeds: (tokens, C), vectors that replace the embeddings of the first tokens of every piece. If
                the slots are not empty, `embeds` is ignored.
            recorder: collects hidden states and attentions. With a recorder, there must be one piece only.
        """
        counts = [len(piece) for piece in pieces]
        T = max(counts)
        view = cache.view(slots, counts)
        padded = [[*piece, *[0] * (T - len(piece))] for piece in pieces]
        hidden = self._hidden(padded, view, embeds, recorder)  # (n, T, C)
        last = [count - 1 for count in counts]
        return self._logits(hidden[:, -1] if min(last) == T - 1 else hidden[torch.arange(len(last)), last])

    def decode(
        self,
        rows: Sequence[Sequence[int]],
        slots: Sequence[int],
        cache: KeyValueCache,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Read rows[i], the next tokens of slots[i]. Return the logits after each token, (tokens, V)."""
        if max(map(len, rows)) == 1:
            return self._logits(self._hidden(rows, cache.view(slots), None, recorder)[:, -1])
        found = []
        for row, slot in zip(rows, slots):  # one by one, because rows may have different numbers of tokens
            found.append(self._hidden([row], cache.view([slot], [len(row)]), None, recorder)[0])
        return self._logits(torch.cat(found))

    def argmax(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """Return the token with the highest logit in each row (in a tie the first one), and this logit."""
        tokens = sampling.greedy(logits)
        return tokens.tolist(), logits.gather(-1, tokens[:, None])[:, 0].tolist()

    def _hidden(
        self, ids: Sequence[Sequence[int]], view: CacheView, embeds: Tensor | None, recorder: Recorder | None
    ) -> Tensor:
        given = torch.tensor(ids)  # (n, T)
        if self._device.type == "cuda":
            # while ids are copied from pinned memory to the GPU, the CPU continues; else it would wait
            given = given.pin_memory()
        with contextlib.ExitStack() as stack:
            if embeds is not None and view.length == 0:
                stack.enter_context(replaced_embeddings(self._model, embeds))
            attentions = stack.enter_context(recorder.watching(self._model)) if recorder else None
            # (n, T, C)
            hidden: Tensor = self._model.base_model(
                given.to(self._device, non_blocking=True), view.mask, view.positions, view, attentions
            )
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(hidden).float()  # (n, C) -> (n, V)
        return logits
