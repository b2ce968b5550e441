"""QADataset: a torch Dataset of a file of questions and answers. Each item is one conversation.

    dataset = QADataset("data/train.jsonl", Tokenizer("data/vocab.json"), max_length=128)
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)

QADataset is for study and for your own training loop. `minigpt train` uses `minigpt.data.batches` instead,
which pads to the longest example of a batch, not to max_length.
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
    """A Dataset. Item i is {"input_ids", "attention_mask", "targets"}, each int64, (max_length - 1,).

    The encoded conversation is first cut or padded to max_length ids. input_ids has all of these except the
    last id, targets has all except the first: the target of a position is the next id. attention_mask is 1
    for tokens and 0 for padding.

    Args:
        path: the data file. Bad records are skipped with a warning.
        tokenizer: encodes the conversations.
        max_length: longer conversations are cut to this number of tokens; shorter conversations are padded.

    Raises:
        InputError: if the file cannot be read, or max_length is less than 2.
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
        # as with any list, a negative index counts from the end, and an index out of range raises IndexError
        conversation = self.conversations[index]
        found, _, _ = encode_conversation(conversation, self.tokenizer, self.max_length)
        ids = torch.full((self.max_length,), self.tokenizer.pad_token_id)
        ids[: len(found)] = torch.from_numpy(found)
        mask = torch.arange(self.max_length) < len(found)
        return {"input_ids": ids[:-1].clone(), "attention_mask": mask[:-1].long(), "targets": ids[1:]}
