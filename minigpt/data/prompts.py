"""Prompts that a model answers during training, with the file's answers.

A prompt is a conversation up to its last answer. The answer itself is not learned; rewards compare with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minigpt.data.batches import Encode, EncodedExamples
from minigpt.data.conversation import Conversation
from minigpt.errors import InputError

__all__ = ["EncodedPrompts", "Prompt", "encode_prompts"]


class Prompt(NamedTuple):
    """One prompt."""

    ids: list[int]  # ids that the model reads
    question: str  # the last question as text
    answer: str  # the file's answer


@dataclass(frozen=True)
class EncodedPrompts(EncodedExamples):
    """All prompts. Their rows include the file's answers. `is_answer` marks only the last answer."""

    prompts: list[Prompt] = field(default_factory=list)  # N

    def last_tokens(self) -> set[int]:
        """Return the last id of each answer. A chat template may put more ids after the answer."""
        places = np.where(self.is_answer, np.arange(len(self.ids)), -1)
        return {*self.ids[np.maximum.reduceat(places, self.starts[:-1])].tolist()}


def encode_prompts(
    conversations: Sequence[Conversation], tokenizer: Any, max_length: int, encode: Encode
) -> EncodedPrompts:
    """Encode each conversation up to its last answer. Conversations longer than max_length are left out.

    Args:
        encode: `encode_conversation` (plain form) or `encode_chat_conversation`.

    Raises:
        InputError: if no conversation is left.
    """
    pieces: list[npt.NDArray[np.int32]] = []
    marks: list[npt.NDArray[np.bool_]] = []
    lines: list[int] = []
    prompts: list[Prompt] = []
    n_cut = 0
    for conversation in conversations:
        ids, is_answer, is_cut = encode(conversation, tokenizer, max_length)
        if is_cut or not is_answer.any():
            n_cut += 1
            continue
        begins = is_answer & ~np.concatenate([[False], is_answer[:-1]])
        start = int(begins.nonzero()[0][-1])
        is_answer = is_answer.copy()
        is_answer[:start] = False
        pieces.append(ids)
        marks.append(is_answer)
        lines.append(conversation.line)
        last = conversation.exchanges[-1]
        prompts.append(Prompt(ids[:start].tolist(), last.question, last.answer))
    if not pieces:
        raise InputError(f"every prompt is longer than max_length={max_length}; raise --max_length")
    return EncodedPrompts(
        ids=np.concatenate(pieces),
        is_answer=np.concatenate(marks),
        starts=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
        n_cut=n_cut,
        n_without_answer=n_cut,
        prompts=prompts,
    )
