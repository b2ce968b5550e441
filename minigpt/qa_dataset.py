"""QADataset: a JSONL file of questions and answers as a torch Dataset, one pair an item.

    dataset = QADataset("data/train.jsonl", Tokenizer("data/vocab.json"), max_length=128)
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)

For reading along and for loops of your own. `minigpt train` itself uses `minigpt.data.batches`, which pads to
the longest pair of a batch instead of max_length.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from minigpt.data.reader import read_pairs
from minigpt.errors import InputError
from minigpt.tokenizer import Tokenizer

__all__ = ["QADataset"]


class QADataset(Dataset[dict[str, Tensor]]):
    """Item i is {"input_ids", "attention_mask", "targets"}, each int64 of shape (max_length - 1,).

    The target of a position is the next token: input_ids is the encoded pair without its last token, targets
    without its first, attention_mask is 1 where input_ids holds a token and 0 where it is padded.

    Args:
        path: JSONL file; bad lines are skipped with a warning.
        tokenizer: encodes the pairs.
        max_length: tokens of a pair; longer ones are cut, shorter ones padded.

    Raises:
        InputError: for a file that cannot be used, or a max_length that is less than 2.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, max_length: int = 128) -> None:
        if max_length < 2:
            raise InputError(f"max_length must be at least 2, an input and its target: got {max_length}")
        self.pairs, report = read_pairs(path)
        report.print_summary()
        self.tokenizer, self.max_length = tokenizer, max_length

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pair = self.pairs[index]  # negative and out-of-range indices: as in any list
        ids, mask = self.tokenizer.encode(pair.question, pair.answer, self.max_length)
        return {
            "input_ids": torch.tensor(ids[:-1]),
            "attention_mask": torch.tensor(mask[:-1]),
            "targets": torch.tensor(ids[1:]),
        }
