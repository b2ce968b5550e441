"""Translates the texts of minigpt.lens to Chinese. The key of a translation is the English text in the code.

say = speaker("zh")
say("layer")                              # 层
say("step {step}", step=105)              # 第 105 步
"""

from typing import Protocol

from minigpt.console.language import Language

__all__ = ["CHINESE", "Say", "speaker"]


class Say(Protocol):
    """A function that translates a text, and then fills its placeholders: say("step {step}", step=105)."""

    def __call__(self, text: str, /, **values: object) -> str:
        """Translate the text and fill its placeholders with `values`."""


def speaker(language: Language) -> Say:
    """Return the function that translates English texts to a language."""

    def say(text: str, /, **values: object) -> str:
        chosen = CHINESE[text] if language == "zh" else text
        return chosen.format(**values) if values else chosen

    return say


CHINESE = {
    "({title}: too wide for {width} columns; --plot FILE draws it)": (
        "（{title}：{width} 列放不下，用 --plot 文件名 画成图）"
    ),
    "({count} heat maps: --plot FILE draws them)": "（{count} 张热力图：用 --plot 文件名 画出来）",
    "; change since {model}": "；相对 {model} 的变化",
    "; lm_head shares the embedding's matrix": "；lm_head 与词向量共用一个矩阵",
    "after that": "之后",
    "after the answer, {count} tokens": "回答之后，{count} 个词元",
    "after the prompt, {count} tokens": "读完提示之后，{count} 个词元",
    "all": "合计",
    "along {run}": "{run} 的各个检查点",
    "answer": "回答",
    "answers": "回答",
    "answers to {text}": "{text} 的回答",
    "at step": "在第几步",
    "attention": "注意力",
    "before": "前一个",
    "best loss": "最低损失",
    "block {layer}": "第 {layer} 层",
    "bytes": "字节",
    "bytes in the cache": "缓存的字节数",
    "bytes of a token": "每个词元的字节数",
    "bytes of a token, if each of the {count} query heads had its own": (
        "如果 {count} 个查询头各有一份，每个词元的字节数"
    ),
    "bytes of each token": "每个词元的字节数",
    "can be drawn": "可抽取的个数",
    "change": "变化",
    "checkpoints": "检查点",
    "cost of each head (nats)": "每个头的代价（奈特）",
    "counts": "计入",
    "dearest head": "最要紧的头",
    "different answers": "不同的回答数",
    "embedding": "词向量",
    "entropy": "熵",
    "expected": "标准答案",
    "experiments": "实验",
    "final norm": "最后的归一化",
    "first": "第一个",
    "full, {count} tokens": "装满，{count} 个词元",
    "hardest": "最难的",
    "heads, from 0": "各个头，从 0 数起",
    "instead": "其他候选",
    "itself": "自己",
    "known after": "从哪层起知道",
    "largest": "最大",
    "layer": "层",
    "layer {layer}": "第 {layer} 层",
    "layer {layer}, head {head}": "第 {layer} 层第 {head} 头",
    "layer {layer}, head {head}: whom each token looks at": "第 {layer} 层第 {head} 头：每个词元在看谁",
    "layer.head": "层.头",
    "layers x (keys, values) x heads x channels": "层 x（键、值）x 头 x 通道",
    "least sure": "最没把握",
    "length of the keys": "键的长度",
    "length of the values": "值的长度",
    "line": "行",
    "line {line}": "第 {line} 行",
    "line {line}: {count} of {tokens} targets count (loss_on={loss_on})": (
        "第 {line} 行：{tokens} 个目标中有 {count} 个计入损失（loss_on={loss_on}）"
    ),
    "lm_head": "lm_head",
    "logit lens": "逐层读出",
    "looks at": "在看",
    "loss": "损失",
    "loss of each token (nats)": "每个词元的损失（奈特）",
    "loss {loss} on {count} tokens of answers; what each part adds to it when switched off": (
        "回答共 {count} 个词元，损失 {loss}；关掉各部分后损失增加多少"
    ),
    "mask": "掩码",
    "mean": "平均",
    "merges, step by step": "逐步合并",
    "model": "模型",
    "nats": "奈特",
    "nearest to {text}": "离 {text} 最近的",
    "never": "一直不知道",
    "next token": "下一个词元",
    "norm": "范数",
    "number": "个数",
    "parameters": "参数",
    "part": "部分",
    "parts": "各段",
    "probability of the written token after each layer": "每层之后，写出的词元的概率",
    "question": "问题",
    "rank": "名次",
    "reads": "读",
    "relative change": "相对变化",
    "rises by {nats}": "上升 {nats}",
    "run": "训练",
    "runs": "训练",
    "shape": "形状",
    "share": "占比",
    "size and spectrum: usual size, largest singular value, stable rank": (
        "大小与谱：均方根、最大奇异值、稳定秩"
    ),
    "stable rank": "稳定秩",
    "step": "步",
    "steps": "步",
    "still falling": "还在下降",
    "never evaluated": "没有评估过",
    "evaluated once": "只评估过一次",
    "target": "目标",
    "targets that count": "计入损失的目标数",
    "the KV cache": "KV 缓存",
    "the given answer": "给定的回答",
    "the text": "这段文字",
    "the model's own answer": "模型自己的回答",
    "the next token after {text}": "{text} 之后的下一个词元",
    "the tokens that cost most": "损失最大的词元",
    "time": "用时",
    "token": "词元",
    "tokens": "词元",
    "training loss": "训练损失",
    "unknown": "未知",
    "usual": "正常",
    "validation loss": "验证损失",
    "weight": "权重",
    "what each head looks at when the answer begins; its mean share on three places": (
        "开始回答时每个头在看谁；它平均有多少注意力在三个位置上"
    ),
    "what each head looks at from the last token; its mean share on three places": (
        "最后一个词元处每个头在看谁；它平均有多少注意力在三个位置上"
    ),
    "what each layer would write": "每层会写什么",
    "whole": "整层",
    "why": "为什么",
    "word": "词",
    "worst token": "最差的词元",
    "writes": "写",
    "{count} characters, {tokens} tokens of {entries} in the vocabulary": (
        "{count} 个字符，{tokens} 个词元（词表共 {entries} 个）"
    ),
    "{count} examples, {loss} nats a token; the hardest ones": (
        "{count} 个样本，每个词元 {loss} 奈特；最难的几个"
    ),
    "{whose}: {loss} nats a token, {count} tokens; least sure: {token} ({probability})": (
        "{whose}：每个词元 {loss} 奈特，共 {count} 个；最没把握的是 {token}（{probability}）"
    ),
    # `minigpt experiment`: what each experiment changes in a model or its training, and what this causes
    "attention without the causal mask": "去掉因果掩码的注意力",
    "Each token sees the token that it has to predict, so the model learns to copy it: the loss "
    "is lower than the usual one's. When it answers, there is no later token to copy, and it "
    "stops or writes nonsense.": (
        "每个词元都看得见自己要预测的那个词元，于是学会了照抄：损失比正常的还低。回答问题时后面没"
        "有字可抄，不是写不下去，就是乱写。"
    ),
    "no position embeddings": "没有位置向量",
    "Attention is a weighted mean: by itself it does not know the order of the tokens. Yet the "
    "causal mask shows each token fewer others the earlier it stands, and short questions are "
    "clear from their characters alone: on this data the loss hardly changes. It is the one "
    "experiment here that does not fail.": (
        "注意力是加权平均，本身不知道词元的先后。不过有因果掩码：越靠前的词元看得见的越少；短问题"
        "又只凭有哪些字就分得清。所以在这份数据上损失几乎不变：这是这里唯一没有失败的实验。"
    ),
    "blocks without residual connections": "没有残差连接",
    "The gradient must pass every attention and every MLP, and each of them shrinks it. The first"
    " layers learn almost nothing, and the loss stays near that of counting characters.": (
        "梯度必须穿过每一层注意力和 MLP，每穿一层就缩小一次。前几层几乎学不到东西，损失停在只数字频的水平。"
    ),
    "blocks without attention": "没有注意力",
    "Each token is computed alone: the model knows only the newest character, as a table of pairs"
    " does. Every question gets the same answer.": (
        "每个词元单独计算：模型只知道最新的一个字，就像一张两字搭配表。问什么都是同一个回答。"
    ),
    "blocks without LayerNorm": "没有 LayerNorm",
    "The numbers of the residual stream are too small for attention at first, and their size "
    "changes with each step. The same learning rate is then wrong for every layer.": (
        "一开始残差流里的数太小，注意力用不上；之后它们的大小每步都在变。同一个学习率对每一层都不合适。"
    ),
    "no warm-up of the learning rate": "学习率没有预热",
    "AdamW's first steps all have full length, before it knows how much the gradient varies. They"
    " throw the weights somewhere from where training has to recover.": (
        "AdamW 还不知道梯度波动有多大，头几步就已经迈满步长，把权重甩到一个得慢慢爬回来的地方。"
    ),
    "a learning rate that is 30 times higher": "学习率大 30 倍",
    "Each step overshoots the minimum that it aims at. The loss jumps, and the weights grow "
    "instead of learning.": ("每一步都越过了它要去的低点。损失上蹿下跳，权重只变大，不学习。"),
    "a learning rate that is 100 times lower": "学习率小 100 倍",
    "Each step goes in the right direction, but hardly moves. The loss falls slowly: more steps "
    "would help, a higher rate helps sooner.": (
        "每一步方向都对，只是几乎没动。损失降得很慢：多训练几步有用，加大学习率更快。"
    ),
    "the loss counts the questions, too": "问题也计入损失",
    "The model also has to predict the questions, which nobody asks it to write. In the same "
    "number of steps it learns the answers less well.": (
        "模型还得去预测没人要它写的问题。步数相同，回答就学得差一些。"
    ),
    "one training example in a hundred": "训练样本只留百分之一",
    "The model learns its few examples by heart: the training loss goes to zero while the "
    "validation loss rises. This is overfitting.": (
        "模型把仅有的几个样本背了下来：训练损失趋近零，验证损失反而上升。这就是过拟合。"
    ),
}
