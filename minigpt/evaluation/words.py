"""Translates the texts of an evaluation's tables and reports to Chinese, with the dict CHINESE.

say = speaker("zh")
say("temperature")                                   # "温度"
say("{count} pairs", count=3)                        # "3 条问答"

Names of metrics and tasks, and the output of --json, are the same in both languages.
"""

from typing import Protocol

from minigpt.console.language import Language

__all__ = ["CHINESE", "Say", "speaker"]


class Say(Protocol):
    """A function that translates a text, and then replaces fields such as {count} by values."""

    def __call__(self, text: str, /, **values: object) -> str:
        """Return the text in the language that was given to `speaker`."""


def speaker(language: Language = "en") -> Say:
    """Return the function that translates to a language."""

    def say(text: str, /, **values: object) -> str:
        chosen = CHINESE[text] if language == "zh" and text else text
        return chosen.format(**values) if values else chosen

    return say


CHINESE = {
    # In the table of results, and in the lines printed below it:
    "{low} to {high}": "{low} 至 {high}",
    "tasks": "任务",
    "task": "任务",
    "metric": "指标",
    "value (95 % interval)": "数值（95% 区间）",
    "guessing": "瞎猜",
    "count": "数量",
    "questions": "题数",
    "shots": "示例数",
    "the report is in {file}": "报告写在 {file}",
    "the results are in {file}": "结果写在 {file}",
    # In the profile of a model (model_profile.py):
    "Calibration": "校准",
    "expected calibration error": "期望校准误差",
    "95 % interval": "95% 区间",
    "temperature": "温度",
    "error with it": "调温后的误差",
    "fitted on": "拟合用的题",
    "dev part, without shots": "dev 部分，不带示例",
    "every second question": "隔一题取一题",
    "Robustness: what a change of the question costs": "稳健性：题目改一改，分数差多少",
    "change": "改动",
    "difference": "差",
    "full width": "全角",
    "half width": "半角",
    "no punctuation": "去标点",
    "case": "大小写",
    "typing errors": "打字错误",
    "dropped characters": "漏字",
    "doubled characters": "重字",
    "homophones": "同音字",
    "reworded instruction": "换一种说法的指令",
    "Position: the same choice in every order for {share} of the questions": (
        "位置：{share} 的题，选项怎么排都选同一个"
    ),
    "letter": "字母",
    "chosen": "被选的比例",
    "accuracy where it is right": "它是答案时的准确率",
    "Contamination": "污染",
    "questions looked for": "查找的题数",
    "all of it in the training data": "整题在训练数据里",
    "half of it or more": "一半以上在训练数据里",
    # In the report (report.py):
    "Evaluation of {model}": "{model} 的评估",
    "Results": "结果",
    "Efficiency": "效率",
    "seconds": "秒",
    "tokens of prompts": "提示的词元数",
    "tokens read": "读过的词元数",
    "tokens written": "写出的词元数",
    "MiB": "内存 MiB",
    "prompts cut": "截短的提示",
    "choices in pieces": "分段的选项",
    "skipped": "跳过的记录",
    "The worst cases: wrong, and sure of it": "最差的例子：答错了，还很有把握",
    "The most surprising cases: right against the odds": "最意外的例子：没把握，却答对了",
    "line": "行",
    "question": "问题",
    "right": "正确答案",
    "given": "模型的回答",
    "sure": "把握",
    "black: 95 % interval; red: what a guess gets right": "黑线：95% 区间；红线：瞎猜能对的比例",
    "how sure": "有多大把握",
    "how often right": "对了多少",
    # In the measurement of questions and answers, or of a text:
    "how well the text is predicted": "文本预测得怎么样",
    "tokens": "词元",
    "loss (nats)": "损失（nat）",
    "perplexity": "困惑度",
    "bits per byte": "每字节比特数",
    "bits per character": "每字符比特数",
    "characters": "字符",
    "bytes": "字节",
    "all": "全部",
    "answers": "回答",
    "text": "文本",
    "exact match": "精确匹配",
    "F1": "F1",
    "exact match   {share} of {count} questions": "精确匹配   {count} 题中的 {share}",
    "character F1  {value}": "字符 F1    {value}",
    "{cut} of {counted} were cut at {length} tokens for the loss": (
        "{counted}中有 {cut} 条算损失时在 {length} 个词元处截断"
    ),
    "too long for block_size={context}, counted as not answered: {count} of the questions": (
        "超过 block_size={context}，按没有回答算：{count} 题"
    ),
    "with characters that are not in the vocabulary: {count} of the questions": "含有词表外字符：{count} 题",
    "{count} pairs": "{count} 条问答",
    "{count} conversations": "{count} 段对话",
    "some of the questions": "部分问题",
    "{wrong} of {count} are wrong": "{count} 题中答错 {wrong} 题",
    "expected": "标准答案",
    "precision": "精度",
    "perplexity ({part})": "困惑度（{part}）",
    "what it costs to store the weights in fewer bits": "权重少存几个比特的代价",
    # In the comparison of two models:
    "two models on the same questions": "两个模型答同样的题",
    "first": "第一个",
    "second": "第二个",
    "difference (95 %)": "差（95%）",
    "better only": "独对题数",
    "the first": "第一个",
    "the second": "第二个",
    "only {model} is better": "只有 {model} 答得好的题",
    "{value} points": "{value} 个百分点",
    "{value} nats": "{value} nat",
    "{task}: {a} and {b} give the same {metric} on each of {count} questions": (
        "{task}：{a} 和 {b} 在全部 {count} 题上 {metric} 都一样"
    ),
    "{task}: {better} is better than {worse} by {size} in {metric}; chance alone gives so much with p={p}": (
        "{task}：{better} 比 {worse} 好，{metric} 高出 {size}；纯属偶然的概率 p={p}"
    ),
    "{task}: the data cannot tell {a} and {b} apart: {size} in {metric} on {count} questions is within "
    "chance (p={p})": (
        "{task}：这些题分不出 {a} 和 {b} 的高下：{count} 题上 {metric} 相差 {size}，可能只是偶然（p={p}）"
    ),
    "; with about {count} questions such a difference would show": "；大约 {count} 题才能看出这么大的差别",
}
