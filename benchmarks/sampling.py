"""Draws the picture of docs/sampling.md: how each option of generation changes a distribution.

    python benchmarks/sampling.py                       # writes docs/sampling.png
    python benchmarks/sampling.py --output picture.svg

Twelve tokens get made-up scores after a made-up text. minigpt's own functions, the same as in generation,
then change the scores. The script needs matplotlib (`pip install "minigpt[plot]"`).
"""

import argparse
import io
from pathlib import Path
from typing import Any

import torch

from minigpt.generation.logits_processors import make_processors
from minigpt.generation.options import GenerationOptions
from minigpt.generation.sampling import filtered, greedy
from minigpt.storage.files import atomic_write

EOS = 3
PROMPT, ANSWER = [4, 1], [0, 2, 0]  # the text so far; the picture shows the next token
PROBABILITIES = [0.26, 0.18, 0.13, 0.10, 0.08, 0.065, 0.055, 0.045, 0.035, 0.025, 0.015, 0.010]
# both above and below 0, as a model's scores
SCORES = [torch.tensor(p).log().item() + 3 for p in PROBABILITIES]
PANELS: list[dict[str, Any]] = [
    {},
    {"do_sample": False},
    {"temperature": 0.5},
    {"temperature": 1.5},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.3},
    {"typical_p": 0.5},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0},
    {"frequency_penalty": 1.0},
    {"no_repeat_ngram_size": 2},
    {"logit_bias": {1: -2.0, 9: 2.0}},
    {"bad_words_ids": [[1]]},
    {"min_new_tokens": 9},
    {"temperature": 1.5, "min_p": 0.3},
]


def distribution(options: GenerationOptions) -> list[float]:
    """Return the probability of each token under the options."""
    scores = torch.tensor([SCORES])  # (1, V)
    ids = torch.tensor([[*PROMPT, *ANSWER]])  # (1, S)
    for process in make_processors(options, [EOS], len(SCORES), scores.device):
        scores = process(scores, ids, len(ANSWER))
    if not options.do_sample:
        certain = [0.0] * len(SCORES)
        certain[int(greedy(scores))] = 1.0
        return certain
    o = options
    scores = filtered(scores, o.temperature, o.top_k, o.top_p, o.min_p, o.typical_p)
    return [float(value) for value in scores.softmax(dim=-1)[0]]


def title(values: dict[str, Any]) -> str:
    """Return the title of a panel."""
    shown = [f"{name}={value}" for name, value in values.items()]
    return ", ".join(shown) if shown else "as the model says (do_sample=True)"


def draw(path: Path) -> None:
    """Write the picture."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = io.BytesIO()
    with mpl.rc_context({"font.family": ["DejaVu Sans"], "font.size": 8, "svg.fonttype": "path"}):
        figure = Figure(figsize=(13, 8.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"one next token, 12 candidates; prompt {PROMPT}, answer so far {ANSWER}, eos_token_id {EOS}"
            "     gray: as the model says; red ×: cannot come",
            fontsize=10,
        )
        before = distribution(GenerationOptions(do_sample=True))
        places = range(len(SCORES))
        for axes, values in zip(figure.subplots(4, 4).flat, PANELS):
            after = distribution(GenerationOptions(**{"do_sample": True, **values}))
            axes.bar(places, before, color="lightgray", width=0.9)
            axes.bar(places, after, color="tab:blue", width=0.5)
            gone = [place for place in places if after[place] == 0]
            axes.plot(gone, [0.02] * len(gone), "x", color="tab:red", markersize=5)
            axes.set_title(title(values), fontsize=9)
            axes.set(xlim=(-0.7, len(SCORES) - 0.3), ylim=(0, 1.02 if max(after) > 0.6 else 0.6))
            axes.set_xticks(list(places))
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
        figure.supxlabel("id of the token")
        figure.supylabel("probability")
        figure.savefig(picture, format=path.suffix.removeprefix(".") or "png")
    atomic_write(path, picture.getvalue())


def main() -> None:
    """Parse the flag and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(__file__).parents[1] / "docs" / "sampling.png"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    draw(options.output)
    print(f"{len(PANELS)} panels written to {options.output}")


if __name__ == "__main__":
    main()
