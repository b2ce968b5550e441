"""QADataset: a file of questions and answers as a torch Dataset. Each item is one conversation.

    dataset = QADataset("data/train.jsonl", Tokenizer("data/vocab.json"), max_length=128)
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)

Use it to study the code, or in your own training loop. `minigpt train` itself uses `minigpt.data.batches`,
which pads to the longest example of a batch instead of max_length.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from minigpt.data.batches import encode_conversation
from minigpt.data.reader import read_conversations
from minigpt.errors import InputError
from minigpt.tokenizer import Tokenizer

__all__ = ["QADataset"]


class QADataset(Dataset[dict[str, Tensor]]):
    """Item i is {"input_ids", "attention_mask", "targets"}, each int64 of shape (max_length - 1,).

    The target of a position is the next token: input_ids is the encoded example without its last token,
    targets without its first, attention_mask is 1 where input_ids holds a token and 0 where it is padded.

    Args:
        path: the data; bad records are skipped with a warning.
        tokenizer: encodes the conversations.
        max_length: tokens of an example; longer ones are cut, shorter ones padded.

    Raises:
        InputError: for a file that cannot be used, or a max_length that is less than 2.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, max_length: int = 128) -> None:
        if max_length < 2:
            raise InputError(f"max_length must be at least 2, an input and its target: got {max_length}")
        self.conversations, report = read_conversations(path)
        report.print_summary()
        self.tokenizer, self.max_length = tokenizer, max_length

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        conversation = self.conversations[index]  # negative and out-of-range indices: as in any list
        found, _, _ = encode_conversation(conversation, self.tokenizer, self.max_length)
        ids = torch.full((self.max_length,), self.tokenizer.pad_token_id)
        ids[: len(found)] = torch.from_numpy(found)
        mask = torch.arange(self.max_length) < len(found)
        return {"input_ids": ids[:-1].clone(), "attention_mask": mask[:-1].long(), "targets": ids[1:]}
