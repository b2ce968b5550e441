"""Encodes conversations with a tokenizer's chat template, and marks the tokens that the model learns.

`minigpt finetune` uses this for models with a subword tokenizer. For models with a character vocabulary,
minigpt/data/batches.py encodes a conversation as question <sep> answer <sep>.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.data.conversation import Conversation
from minigpt.tokenization.chat_template import ChatTokenizer, encode_chat_with_mask

__all__ = ["encode_chat_conversation"]


def encode_chat_conversation(
    conversation: Conversation, tokenizer: ChatTokenizer, max_length: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], bool]:
    """Encode one conversation with the tokenizer's chat template, as at most max_length tokens.

    If a conversation is too long, its oldest questions with their answers are left out. The system text is
    kept. If the last question with its answer is still too long, its end is cut off.

    Returns: n ids (n,); a mask (n,), True for the ids of the assistant's answers and of the tokens that end
    them; True if something was cut.

    Raises:
        InputError: if the template fails, or changes the assistant's text.
    """
    messages: list[Mapping[str, Any]] = [*conversation.messages()]
    tools = json.loads(conversation.tools) if conversation.tools else None
    first = 1 if messages[0]["role"] == "system" else 0
    starts = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"] or [first]
    is_cut = False
    while True:
        kept = [*messages[:first], *messages[starts[0] :]] if is_cut else messages
        ids, mask = encode_chat_with_mask(tokenizer, kept, tools=tools)
        if len(ids) <= max_length or len(starts) < 2:
            break
        starts, is_cut = starts[1:], True
    shown, said = np.array(ids[:max_length], dtype=np.int32), np.array(mask[:max_length], dtype=np.bool_)
    return shown, said, is_cut or len(ids) > max_length
