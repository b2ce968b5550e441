"""Fills the missing tokens of a text, with a model of `minigpt finetune --task mlm`.

    minigpt fill --model output/mlm/best --text 四川的省会是[MASK][MASK]。
    minigpt fill --model output/mlm/best --text 四川的省会是[MASK][MASK]。 --top_k 3 --json

Each [MASK] stands for one token; in a character vocabulary, for one character. The model proposes tokens for
each [MASK] with their probabilities. The prediction for one [MASK] does not know the other missing tokens.
"""

from dataclasses import dataclass
from typing import Any

from minigpt.console import command_line
from minigpt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options(command_line.ModelOptions):
    """Name the missing tokens of a text."""

    RANGES = {"top_k": (1, 1000)}

    # The text
    text: str
    """text with [MASK] in place of each missing token"""
    top_k: int = 5
    """candidates to show for each"""


def main(options: Options) -> dict[str, Any]:
    """Load the model, fill the text, and print the candidates."""
    from minigpt.console.terminal import table
    from minigpt.finetuning.masked_lm import fill_masks, mask_token_id, with_masks
    from minigpt.generation.loading import load_to_answer

    _, model, tokenizer, _ = load_to_answer(options, None, fills=True)
    mask_id = mask_token_id(tokenizer)
    if mask_id is None:
        raise InputError(f"{options.model} has no [MASK]: minigpt finetune --task mlm makes a model that has")
    ids = tokenizer.encode_array(with_masks(options.text)).tolist()
    found = fill_masks(model, ids, mask_id, options.top_k)
    masks = [[{"token": tokenizer.decode([t]), "probability": p} for t, p in each] for each in found]
    best = iter(each[0].token for each in found)
    filled = tokenizer.decode([next(best) if token == mask_id else token for token in ids])
    head = ("", *(f"[MASK] {number}" for number in range(1, len(masks) + 1)))
    rows = [
        (str(rank + 1), *(f"{each[rank]['token']} {each[rank]['probability']:.1%}" for each in masks))
        for rank in range(len(masks[0]))
    ]
    table(filled, head, rows)
    return {"text": options.text, "filled": filled, "masks": masks}


if __name__ == "__main__":
    command_line.run(Options, main)
