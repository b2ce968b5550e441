"""Draws the picture of docs/sampling.md, in two languages: how each option changes a distribution.

    python benchmarks/sampling.py                   # writes docs/sampling.png and docs/sampling.zh-CN.png
    python benchmarks/sampling.py --output folder   # writes them there

Twelve tokens get made-up scores after a made-up text. minigpt's own functions, the same as in generation,
then change the scores. The script needs matplotlib (`pip install "minigpt[plot]"`).
"""

import argparse
import io
from pathlib import Path
from typing import Any

import torch

from minigpt.console.fonts import chinese_font
from minigpt.generation.logits_processors import make_processors
from minigpt.generation.options import GenerationOptions
from minigpt.generation.sampling import filtered, greedy
from minigpt.storage.files import atomic_write

TOKENS = ["川", "山", "的", "eos", "蜀", "成", "省", "水", "都", "云", "好", "猫"]  # of the picture
EOS = 3
PROMPT, ANSWER = [4, 1], [0, 2, 0]  # the text so far, as ids; the picture shows the next token
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


WORDS = {
    "sampling.png": {
        "title": "one next token, 12 candidates; prompt {}, answer so far {}; eos ends the answer"
        "     gray: as the model says; red ×: cannot come",
        "model": "as the model says (do_sample=True)",
        "token": "token (its id is its place, from 0 on)",
        "probability": "probability",
    },
    "sampling.zh-CN.png": {
        "title": "下一个词元，12 个候选；提示 {}，已经写下 {}；eos 结束回答"
        "     灰：模型给的；红 ×：不可能出现",
        "model": "模型给的概率（do_sample=True）",
        "token": "词元（编号就是从 0 数起的位置）",
        "probability": "概率",
    },
}


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


def written(ids: list[int]) -> str:
    """Return ids as text."""
    return "".join(TOKENS[i] for i in ids)


def title(values: dict[str, Any]) -> str:
    """Return the title of a panel; "" for the one without options."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def draw(path: Path, words: dict[str, str]) -> None:
    """Write the picture, with the words of a language."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = io.BytesIO()
    families = [font for font in (chinese_font(TOKENS[0]), "DejaVu Sans") if font]
    with mpl.rc_context({"font.family": families, "font.size": 8, "svg.fonttype": "path"}):
        figure = Figure(figsize=(13, 8.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(words["title"].format(written(PROMPT), written(ANSWER)), fontsize=10)
        before = distribution(GenerationOptions(do_sample=True))
        places = range(len(SCORES))
        for axes, values in zip(figure.subplots(4, 4).flat, PANELS):
            after = distribution(GenerationOptions(**{"do_sample": True, **values}))
            axes.bar(places, before, color="lightgray", width=0.9)
            axes.bar(places, after, color="tab:blue", width=0.5)
            gone = [place for place in places if after[place] == 0]
            axes.plot(gone, [0.02] * len(gone), "x", color="tab:red", markersize=5)
            axes.set_title(title(values) or words["model"], fontsize=9)
            axes.set(xlim=(-0.7, len(SCORES) - 0.3), ylim=(0, 1.02 if max(after) > 0.6 else 0.6))
            axes.set_xticks(list(places), TOKENS)
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
        figure.supxlabel(words["token"])
        figure.supylabel(words["probability"])
        figure.savefig(picture, format=path.suffix.removeprefix(".") or "png")
    atomic_write(path, picture.getvalue())


def main() -> None:
    """Parse the flag and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs", help="a folder")
    options = parser.parse_args()
    for name, words in WORDS.items():
        draw(options.output / name, words)
        print(f"{len(PANELS)} panels written to {options.output / name}")


if __name__ == "__main__":
    main()
