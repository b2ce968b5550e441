"""Draws the pictures of the book, one function each, with labels in English and in Chinese.

    python docs/book/draw.py                  # writes all pictures of docs/book/pictures/
    python docs/book/draw.py 06-attention     # writes one, in both languages

The script needs matplotlib and a font with Chinese characters (`pip install "minigpt[plot]"`).
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# run as a script: import minigpt from this checkout
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import io

import numpy as np

from minigpt.console.fonts import picture_bytes
from minigpt.storage.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
PICTURES = Path(__file__).parent / "pictures"
COLOURS = 32  # of a picture's palette: text and lines stay sharp, and the file small

Say = Callable[[str, str], str]  # (English, Chinese) -> the one of the picture's language
Draw = Callable[[Any, Say], None]
DRAWINGS: dict[str, tuple[Draw, tuple[float, float]]] = {}


def drawing(name: str, width: float = 7.0, height: float = 3.0) -> Callable[[Draw], Draw]:
    """Register a function that draws the picture of a chapter into a figure of this size in inches."""

    def register(draw: Draw) -> Draw:
        DRAWINGS[name] = draw, (width, height)
        return draw

    return register


def boxes(axes: Any, texts: list[str], y: float = 0.5, colour: str = "#dbe9f6", size: float = 11) -> None:
    """Write texts into boxes from left to right, joined by arrows."""
    axes.set(xlim=(-0.5, len(texts) - 0.5), ylim=(0, 1))
    axes.axis("off")
    style = {"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "#44617b"}
    for place, text in enumerate(texts):
        axes.text(place, y, text, ha="center", va="center", fontsize=size, bbox=style)
        if place:
            ends = {"xy": (place - 0.36, y), "xytext": (place - 0.64, y)}
            axes.annotate("", **ends, arrowprops={"arrowstyle": "-|>", "color": "#44617b"})


def fan(figure: Any, chain: list[str], targets: list[str]) -> None:
    """Draw boxes from left to right, and arrows from the last one to each of the targets."""
    axes = figure.add_subplot()
    middle = (len(targets) - 1) / 2
    axes.set(xlim=(0, 10), ylim=(-0.6, len(targets) - 0.4))
    axes.axis("off")
    style = {"boxstyle": "round,pad=0.4", "edgecolor": "#44617b"}
    arrow = {"arrowstyle": "-|>", "color": "#44617b"}
    places = [1.0 + 2.5 * i for i in range(len(chain))]
    for x, text in zip(places, chain):
        axes.text(
            x, middle, text, ha="center", va="center", fontsize=11, bbox={**style, "facecolor": "#dbe9f6"}
        )
        if x > places[0]:
            axes.annotate("", xy=(x - 1.0, middle), xytext=(x - 1.9, middle), arrowprops=arrow)
    right = places[-1] + 1.0
    for y, text in zip(reversed(range(len(targets))), targets):
        axes.text(right + 1.2, y, text, va="center", fontsize=11, bbox={**style, "facecolor": "#fbe6c8"})
        axes.annotate("", xy=(right + 1.0, y), xytext=(right, middle), arrowprops=arrow)


def grid(axes: Any, values: Any, rows: list[str], columns: list[str], form: str = "{:.2f}") -> None:
    """Draw a table of numbers from 0 to 1 as a heat map; None is a hidden place."""
    shown = np.array([[np.nan if v is None else float(v) for v in row] for row in values])
    axes.set_facecolor("#eeeeee")
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=11)
    axes.set_yticks(range(len(rows)), rows, fontsize=11)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text = "×" if value is None else form.format(value)
            colour = "white" if value is not None and value > 0.7 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=10, color=colour)


@drawing("01-start", 8.2, 1.5)
def start(figure: Any, say: Say) -> None:
    """The road of the book."""
    steps = [("questions\nand answers", "问答文件"), ("vocabulary,\nsplit", "词表\n划分")]
    steps += [("batches", "批次"), ("model", "模型"), ("training", "训练"), ("answers", "回答")]
    boxes(figure.add_subplot(), [say(*step) for step in steps], size=10)


@drawing("02-data")
def data(figure: Any, say: Say) -> None:
    """Lengths of the pairs of the built-in corpus."""
    from minigpt.data.reader import read_conversations

    conversations, _ = read_conversations(ROOT / "data/data.jsonl")
    # a token a character, and a <sep> behind the question and behind the answer
    lengths = [sum(map(len, one.texts())) + 2 for one in conversations]
    axes = figure.add_subplot()
    axes.hist(lengths, bins=range(min(lengths), max(lengths) + 2), color="tab:blue", rwidth=0.85)
    axes.set_xlabel(say("tokens of a question with its answer", "一组问答的词元数"))
    axes.set_ylabel(say("pairs", "组数"))


@drawing("03-tokens", 8.0, 2.6)
def tokens(figure: Any, say: Say) -> None:
    """A sentence, its tokens and its ids."""
    from minigpt.tokenizer import Tokenizer, build_vocabulary

    text = "天空是什么颜色"
    tokenizer = Tokenizer.from_word2id(build_vocabulary([text, "蓝色"]))
    axes = figure.add_subplot()
    axes.set(xlim=(-2.2, 7.5), ylim=(0, 3))
    axes.axis("off")
    names = (say("text", "文字"), say("tokens", "词元"), say("ids", "编号"))
    for row, name in zip((2.5, 1.5, 0.5), names):
        axes.text(-2.1, row, name, va="center", fontsize=11)
    axes.text(3, 2.5, text, ha="center", va="center", fontsize=15)
    style = {"boxstyle": "round,pad=0.35", "facecolor": "#dbe9f6", "edgecolor": "#44617b"}
    for place, character in enumerate(text):
        axes.text(place, 1.5, character, ha="center", va="center", fontsize=13, bbox=style)
        number = str(tokenizer.word2id[character])
        axes.text(place, 0.5, number, ha="center", va="center", fontsize=12)


@drawing("04-tensors")
def tensors(figure: Any, say: Say) -> None:
    """Steps of gradient descent on the hill of section 4.4."""
    axes = figure.add_subplot()
    ws = np.linspace(-0.5, 6.5, 200)
    axes.plot(ws, (ws - 3) ** 2 + 1, color="gray")
    way = [0.0]
    for _ in range(4):
        way.append(way[-1] - 0.3 * 2 * (way[-1] - 3))
    axes.plot(way, [(w - 3) ** 2 + 1 for w in way], "o-", color="tab:red")
    axes.annotate(say("start", "起点"), (way[0], 10), (0.5, 11), fontsize=11, arrowprops={"arrowstyle": "->"})
    axes.set(xlabel=say("parameter w", "参数 w"), ylabel=say("loss", "损失"), ylim=(0, 13))


@drawing("05-batches", 7.0, 2.6)
def batches(figure: Any, say: Say) -> None:
    """Three rows of a batch: read, counted, padded."""
    from matplotlib.patches import Patch, Rectangle

    pairs = [("着火了打什么电话？", "着火了快打119！"), ("告诉我2加4得几。", "2加4等于6。")]
    pairs.append(("望梅止渴讲的是谁的故事？", "望梅止渴说的是曹操。"))
    rows = [[*question, "│", *answer] for question, answer in pairs]
    width = max(map(len, rows))
    axes = figure.add_subplot()
    colours = {"read": "#dbe9f6", "count": "#6aa5d8", "padding": "white"}
    for y, (row, (question, _)) in enumerate(zip(rows, pairs)):
        for x in range(width):
            kind = "padding" if x >= len(row) else "count" if x >= len(question) else "read"
            axes.add_patch(Rectangle((x, -y), 0.94, 0.86, facecolor=colours[kind], edgecolor="#9ab"))
            if x < len(row):
                axes.text(x + 0.47, -y + 0.43, row[x], ha="center", va="center", fontsize=9)
    axes.set(xlim=(-0.2, width + 0.2), ylim=(-2.9, 1.1))
    axes.axis("off")
    names = {"read": say("read", "只读"), "count": say("read, its target counts", "读，且目标计入损失")}
    names["padding"] = say("padding", "补齐")
    handles = [Patch(facecolor=colours[kind], edgecolor="#9ab", label=names[kind]) for kind in names]
    axes.legend(handles=handles, loc="lower center", ncols=3, fontsize=9, frameon=False)


@drawing("06-attention", 6.0, 3.0)
def attention(figure: Any, say: Say) -> None:
    """The weights of the 3 x 3 example."""
    scores = [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    weights: list[list[float | None]] = []
    for place, row in enumerate(scores):
        e = [math.exp(score) for score in row[: place + 1]]
        weights.append([x / sum(e) for x in e] + [None] * (2 - place))
    names = [say(f"token {i}", f"第 {i} 个") for i in (1, 2, 3)]
    axes = figure.add_subplot()
    grid(axes, weights, names, names)
    axes.set_title(say("whom each token looks at (×: hidden)", "每个词元在看谁（×：看不见）"), fontsize=11)
    axes.set_ylabel(say("looks", "看"))
    axes.set_xlabel(say("is looked at", "被看"))


@drawing("07-block")
def block(figure: Any, say: Say) -> None:
    """ReLU and GELU, and their slopes."""
    xs = np.linspace(-4, 3, 300)
    share = np.array([(1 + math.erf(x / math.sqrt(2))) / 2 for x in xs])
    density = np.exp(-xs * xs / 2) / math.sqrt(2 * math.pi)
    left, right = figure.subplots(1, 2)
    left.plot(xs, np.maximum(xs, 0), label="ReLU")
    left.plot(xs, xs * share, label="GELU")
    left.set_title(say("value", "函数值"), fontsize=11)
    right.plot(xs, (xs > 0).astype(float), label="ReLU")
    right.plot(xs, share + xs * density, label="GELU")
    right.set_title(say("slope", "斜率"), fontsize=11)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()


@drawing("08-model", 7.0, 3.2)
def model(figure: Any, say: Say) -> None:
    """Where the parameters of five sizes are."""
    from minigpt.families.gpt2.presets import PRESETS

    rows = [("mini", 2, 64, 1466, 64)]
    rows += [(p.name, p.sizes.n_layer, p.sizes.n_embd, p.sizes.n_vocab, p.sizes.n_ctx) for p in PRESETS]
    names = [say("embeddings", "嵌入"), say("attention", "注意力"), "MLP"]
    axes = figure.add_subplot()
    parts = np.array([[(V + N) * C, L * 4 * C * C, L * 8 * C * C] for _, L, C, V, N in rows], float)
    shares = parts / parts.sum(axis=1, keepdims=True)
    left = np.zeros(len(rows))
    for number, name in enumerate(names):
        axes.barh(range(len(rows)), shares[:, number], left=left, label=name)
        left += shares[:, number]
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(say("share of the parameters", "占全部参数的比例"))
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


@drawing("09-training")
def training(figure: Any, say: Say) -> None:
    """Three curves of the learning rate."""
    from dataclasses import replace

    from minigpt.training.config import read_recipe
    from minigpt.training.optimizer import schedule

    recipe = replace(read_recipe("qa-cpu"), warmup_steps=50)
    axes = figure.add_subplot()
    names = {"cosine": say("cosine", "余弦"), "wsd": say("flat, then down", "先平后降")}
    names["constant"] = say("constant", "常数")
    for kind, name in names.items():
        config = replace(recipe, lr_scheduler_type=kind)
        axes.plot([schedule(config, step, 1050) for step in range(1050)], label=name)
    axes.set(xlabel=say("step", "步"), ylabel=say("share of the highest rate", "占最高学习率的比例"))
    axes.legend()


@drawing("10-a-real-run")
def real_run(figure: Any, say: Say) -> None:
    """The curves of the run of section 10.1, as its metrics.jsonl has them."""
    import json

    lines = [json.loads(line) for line in (PICTURES / "10-a-real-run.jsonl").read_text("utf-8").splitlines()]
    axes = figure.add_subplot()
    for key, name in (("train_loss", say("training", "训练")), ("val_loss", say("validation", "验证"))):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot(*zip(*points), ".-" if key == "val_loss" else "-", label=name, linewidth=1)
    axes.axhline(math.log(1466), color="gray", linestyle=":", label="ln V")
    axes.set(xlabel=say("step", "步"), ylabel=say("loss", "损失"))
    axes.legend()


@drawing("11-answers", 7.5, 2.6)
def answers(figure: Any, say: Say) -> None:
    """One set of scores under five temperatures."""
    scores = np.array([4.0, 3.0, 2.0, 0.0])
    candidates = ["成", "重", "武", "猫"]
    for axes, temperature in zip(figure.subplots(1, 5, sharey=True), (0.2, 0.5, 1.0, 2.0, 5.0)):
        e = np.exp(scores / temperature - scores.max() / temperature)
        axes.bar(candidates, e / e.sum(), color="tab:blue")
        axes.set_title(say(f"T = {temperature}", f"温度 {temperature}"), fontsize=10)
        axes.set_ylim(0, 1)
    figure.supylabel(say("probability", "概率"), fontsize=10)


@drawing("12-numpy", 8.0, 2.8)
def functions(figure: Any, say: Say) -> None:
    """Who calls whom."""
    axes = figure.add_subplot()
    axes.set(xlim=(0, 10), ylim=(0, 4))
    axes.axis("off")
    places = {
        "generate": (1, 3.4), "gpt2": (3.4, 3.4), "block": (5.8, 3.4),
        "multi_head": (4.4, 2.0), "mlp": (8.3, 2.0), "layer_norm": (1.4, 2.0),
        "attention": (3.1, 0.6), "softmax": (0.9, 0.6), "linear": (6.2, 0.6), "gelu": (9, 0.6),
    }  # fmt: skip
    calls = [("generate", "gpt2"), ("gpt2", "block"), ("gpt2", "layer_norm"), ("block", "layer_norm")]
    calls += [
        ("block", "multi_head"),
        ("block", "mlp"),
        ("multi_head", "attention"),
        ("multi_head", "linear"),
    ]
    calls += [("attention", "softmax"), ("mlp", "linear"), ("mlp", "gelu")]
    for one, other in calls:
        gap = 32 if places[one][1] == places[other][1] else 16
        style = {"arrowstyle": "-|>", "color": "#44617b", "shrinkA": gap, "shrinkB": gap}
        axes.annotate("", xy=places[other], xytext=places[one], arrowprops=style)
    for name, (x, y) in places.items():
        style = {"boxstyle": "round,pad=0.35", "facecolor": "#dbe9f6", "edgecolor": "#44617b"}
        axes.text(x, y, name, ha="center", va="center", fontsize=10, bbox=style)
    axes.text(9.9, 3.8, say("arrow: calls", "箭头：调用"), ha="right", fontsize=9)


@drawing("13-troubles", 8.0, 2.6)
def troubles(figure: Any, say: Say) -> None:
    """Four shapes of loss curves, as sketches."""
    x = np.linspace(0, 1, 60)
    noise = np.sin(np.arange(60) * 2.4) * np.sin(np.arange(60) * 0.7)
    good = 6.5 * np.exp(-5 * x) + 0.4
    curves = [
        (say("healthy", "正常"), good, good + 0.25),
        (say("rate too low", "学习率太小"), 7.2 - 0.5 * x, 7.25 - 0.45 * x),
        (say("rate too high", "学习率太大"), 5.5 + 1.6 * noise, 5.8 + 1.2 * noise),
        (say("overfitting", "过拟合"), 6.8 * np.exp(-6 * x), 4.2 * np.exp(-7 * x) + 2.4 + 2.6 * x**2),
    ]
    for axes, (name, train, val) in zip(figure.subplots(1, 4, sharey=True), curves):
        axes.plot(x, train, label=say("training", "训练"))
        axes.plot(x, val, "--", label=say("validation", "验证"))
        axes.set_title(name, fontsize=11)
        axes.set_xticks([])
        axes.set_ylim(0, 8)
    figure.axes[0].legend(fontsize=9)
    figure.supylabel(say("loss (sketch)", "损失（示意）"), fontsize=10)


@drawing("14-hugging-face", 7.5, 2.8)
def heads(figure: Any, say: Say) -> None:
    """One trunk with two heads, or none."""
    trunk = say("trunk:\nembeddings,\nblocks, norm", "主干：\n嵌入、块、\n归一化")
    targets = [
        say("lm_head: (B, T, V), next token", "lm_head：(B, T, V)，下一个词元"),
        say("score: (B, labels), one label a text", "score：(B, 标签数)，一段文本一个标签"),
        say("no head: (B, T, C), vectors", "不加头：(B, T, C)，向量"),
    ]
    fan(figure, ["ids\n(B, T)", trunk], targets)


@drawing("15-generate-and-adapt", 7.0, 3.2)
def masks(figure: Any, say: Say) -> None:
    """Causal, and both ways."""
    text = list("四川的省会")
    left, right = figure.subplots(1, 2)
    causal = [[1 if j <= i else None for j in range(5)] for i in range(5)]
    grid(left, causal, text, text, "✓")
    left.set_title(say("causal: writes", "因果：会写"), fontsize=11)
    hidden = ["四", "□", "的", "省", "会"]
    grid(right, [[1] * 5] * 5, hidden, hidden, "✓")
    right.set_title(say("both ways: fills gaps", "双向：会填空"), fontsize=11)


@drawing("16-on-your-own", 8.0, 2.8)
def ways(figure: Any, say: Say) -> None:
    """Ways from one base."""
    targets = [
        say("finetune: your data", "finetune：你的数据"), say("classify: labels", "classify：打标签"),
        say("eval, compare: how good", "eval、compare：有多好"), say("look: what is inside", "look：看内部"),
        say("quantize, convert: smaller, elsewhere", "quantize、convert：更小，去别处"),
    ]  # fmt: skip
    fan(figure, [say("base", "底座")], targets)


def small(png: bytes) -> bytes:
    """Return the same picture with a palette of a few colours."""
    from PIL import Image

    out = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def main(names: list[str]) -> None:
    """Draw the named pictures, or all, in both languages."""
    PICTURES.mkdir(exist_ok=True)
    for name in names or DRAWINGS:
        draw, size = DRAWINGS[name]
        for language, ending in ((0, ""), (1, ".zh-CN")):

            def say(*texts: str, language: int = language) -> str:
                return texts[language]

            png = small(picture_bytes(lambda figure, _, draw=draw, say=say: draw(figure, say), "png", size))
            atomic_write(PICTURES / f"{name}{ending}.png", png)
            print(f"{name}{ending}.png {len(png) // 1024} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
