"""What a run learns from and is measured on."""

from dataclasses import dataclass

from minigpt.command_line import InputError
from minigpt.data.batches import EncodedPairs, encode_pairs
from minigpt.data.reader import Pair, read_pairs
from minigpt.terminal import warn
from minigpt.tokenizer import Tokenizer
from minigpt.training.config import TrainConfig

__all__ = ["RunData", "read_data"]


@dataclass(frozen=True)
class RunData:
    """What a run learns from and is measured on."""

    tokenizer: Tokenizer
    train: EncodedPairs
    val: EncodedPairs
    val_pairs: list[Pair]


def read_data(config: TrainConfig) -> RunData:
    """Read vocabulary and both parts of the data, and say what was skipped or cut.

    Raises:
        InputError: naming the file, if one cannot be read or holds nothing to learn from.
    """
    tokenizer = Tokenizer(config.vocab_path)
    encoded = []
    pairs: list[Pair] = []
    for path in (config.train_data, config.val_data):
        pairs, report = read_pairs(path, strict=config.strict)
        report.print_summary()
        try:
            part = encode_pairs(pairs, tokenizer, config.max_length)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if part.n_cut:
            lost = (
                f", {part.n_without_answer} of them left out: no answer remained"
                if part.n_without_answer
                else ""
            )
            warn(
                f"{path}: {part.n_cut} of {len(pairs)} pairs are longer than max_length={config.max_length} "
                f"and were cut{lost}"
            )
        unknown = int((part.ids == tokenizer.unk_token_id).sum())
        if unknown:
            warn(f"{path}: {unknown} characters are not in {config.vocab_path} and became <unk>")
        encoded.append(part)
    return RunData(tokenizer, encoded[0], encoded[1], pairs)
