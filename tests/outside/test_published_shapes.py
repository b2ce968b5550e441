"""Data as others publish it or as programs export it: what must be read from each."""

import ast
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from minigpt.data.conversation import Turn
from minigpt.data.corpus import TextOptions, find_sources, read_texts, recognise
from minigpt.data.reader import read_conversations
from minigpt.data.split import split_conversations, write_split
from minigpt.errors import InputError

Q, A, Q2, A2 = "天空是什么颜色？", "天空是蓝色的。", "草呢？", "草是绿色的。"
PAIR = [("user", Q), ("assistant", A)]
FOUR = [*PAIR, ("user", Q2), ("assistant", A2)]
MESSAGES = [{"role": role, "content": text} for role, text in FOUR]


def node(name: str, role: str, text: Any, parent: str | None, *children: str, **more: Any) -> dict[str, Any]:
    kind = more.pop("kind", "text")
    content = {"content_type": kind, "parts": text if isinstance(text, list) else [text]}
    message = {"id": name, "author": {"role": role}, "content": content, "recipient": "all", **more}
    return {"id": name, "message": message, "parent": parent, "children": list(children)}


NODES = {  # an answer that was made twice, and parts that the user does not see
    "root": {"id": "root", "message": None, "parent": None, "children": ["sys"]},
    "sys": node("sys", "system", "", "root", "u1"),
    "u1": node("u1", "user", ["", Q], "sys", "bad", "call"),
    "bad": node("bad", "assistant", "不知道。", "u1"),
    "call": node("call", "assistant", "search()", "u1", "tool", recipient="browser"),
    "tool": node("tool", "tool", "found", "call", "think"),
    "think": node("think", "assistant", "hm", "tool", "hidden", kind="thoughts"),
    "hidden": node(
        "hidden", "user", "x", "think", "a1", metadata={"is_visually_hidden_from_conversation": True}
    ),
    "a1": node("a1", "assistant", A, "hidden", "u2"),
    "u2": node("u2", "user", [{"asset_pointer": "picture"}, Q2], "a1", "a2", kind="multimodal_text"),
    "a2": node("a2", "assistant", A2, "u2"),
}
DEEPSEEK = {
    "root": {"id": "root", "parent": None, "children": ["1"], "message": None},
    "1": {
        "id": "1",
        "parent": "root",
        "children": ["2"],
        "message": {"fragments": [{"type": "REQUEST", "content": Q}]},
    },
    "2": {
        "id": "2",
        "parent": "1",
        "children": [],
        "message": {"fragments": [{"type": "THINK", "content": "hm"}, {"type": "RESPONSE", "content": A}]},
    },
}
CLAUDE = [
    {"sender": {"user": "human"}.get(role, role), "text": text, "content": [{"type": "text", "text": text}]}
    for role, text in FOUR
]
CONTEXT = "天空看上去是蓝色的，草是绿色的。"
WITH_CONTEXT = [("user", f"{Q}\n{CONTEXT}"), ("assistant", A)]
ANSWER = {"text": A, "answer_start": 0}
SQUAD = {"context": CONTEXT, "qas": [{"id": "1", "question": Q, "answers": [ANSWER]}]}
OASST: list[dict[str, Any]] = [
    {"message_id": "a", "parent_id": None, "role": "prompter", "text": Q},
    {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "不知道。", "rank": 1},
    {"message_id": "c", "parent_id": "a", "role": "assistant", "text": A, "rank": 0},
    {"message_id": "d", "parent_id": "c", "role": "prompter", "text": Q2, "rank": None},
    {"message_id": "e", "parent_id": "d", "role": "assistant", "text": A2, "rank": 0},
]
TREE = {
    **OASST[0],
    "replies": [
        {**OASST[1], "replies": []},
        {**OASST[2], "replies": [{**OASST[3], "replies": [{**OASST[4], "replies": []}]}]},
    ],
}
MOSS = {
    "Human": f"<|Human|>: {Q}<eoh>\n",
    "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
    "Commands": "<|Commands|>: None<eoc>\n",
    "Tool Responses": "<|Results|>: None<eor>\n",
    "MOSS": f"<|MOSS|>: {A}<eom>\n",
}
# name -> a record, and the turns that it means
RECORDS: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "ChatGPT's export": ({"title": "t", "mapping": NODES, "current_node": "a2"}, FOUR),
    "ChatGPT's export without the last node": ({"title": "t", "mapping": NODES}, FOUR),
    "DeepSeek's export": ({"title": "t", "mapping": DEEPSEEK}, PAIR),
    "Claude's export": ({"uuid": "1", "name": "t", "chat_messages": CLAUDE}, FOUR),
    "SQuAD": ({"title": "t", "paragraphs": [SQUAD]}, WITH_CONTEXT),
    "SQuAD, one paragraph": (SQUAD, WITH_CONTEXT),
    "SQuAD, one question": (
        {
            "id": "1",
            "title": "t",
            "context": CONTEXT,
            "question": Q,
            "answers": {"text": [A], "answer_start": [0]},
        },
        WITH_CONTEXT,
    ),
    "CMRC": (
        {"context_id": "1", "context_text": CONTEXT, "qas": [{"query_text": Q, "answers": [A, "蓝"]}]},
        WITH_CONTEXT,
    ),
    "WebQA": (
        {
            "question": Q,
            "evidences": {
                "1": {"answer": ["no_answer"], "evidence": "x"},
                "2": {"answer": [A], "evidence": "y"},
            },
        },
        PAIR,
    ),
    "DuReader": (
        {"documents": [{"title": "t", "paragraphs": ["p"]}], "question": Q, "answers": [A, "蓝"]},
        PAIR,
    ),
    "BELLE": ({"instruction": f"Human: {Q}\n\nAssistant:", "input": "", "output": A}, PAIR),
    "BELLE, several turns": (
        {
            "instruction": f"Human:{Q}\nAssistant:{A}\nHuman:{Q2}\nAssistant:",
            "input": "",
            "output": f"{A2}\n",
        },
        FOUR,
    ),
    "BELLE, turns in the answer": (
        {
            "instruction": f"Human: {Q}\n\nAssistant:",
            "output": f"Assistant: {A}\n\nHuman: {Q2}\n\nAssistant: {A2}",
        },
        FOUR,
    ),
    "Firefly": ({"kind": "OpenQA", "input": Q, "target": A}, PAIR),
    "COIG's exams": (
        {
            "textbox_q_instruction": "回答。",
            "textbox_q_context": "",
            "textbox_question": Q,
            "textbox_answer": A,
            "textbox_answer_analysis": "x",
        },
        [("user", f"回答。\n{Q}"), ("assistant", A)],
    ),
    "LCCC": ([Q, A, Q2, A2], FOUR),
    "MOSS": (
        {"conversation_id": 1, "meta_instruction": "帮忙。", "num_turns": 1, "chat": {"turn_1": MOSS}},
        [("system", "帮忙。"), *PAIR],
    ),
    "MOSS with tools": (
        {
            "chat": {
                "turn_1": {
                    **MOSS,
                    "Commands": "<|Commands|>: Search()<eoc>\n",
                    "Tool Responses": "found<eor>",
                }
            }
        },
        [("user", Q), ("assistant", "Search()"), ("tool", "found"), ("assistant", A)],
    ),
    "MOSS as one text": (
        {
            "num_turns": 2,
            "plain_text": f"[Human]: {Q}<eoh> [MOSS]: {A}<eoa> [Human]: {Q2}<eoh> [MOSS]: {A2}<eoa> ",
        },
        FOUR,
    ),
    "OpenAssistant": ({"message_tree_id": "a", "prompt": TREE}, FOUR),
    "UltraChat": ({"id": "0", "data": [Q, A, Q2, A2]}, FOUR),
    "human, assistant": ({"human": Q, "assistant": A}, PAIR),
    "turns of human and assistant": (
        {"conversation": [{"human": Q, "assistant": A}, {"human": Q2, "assistant": A2}]},
        FOUR,
    ),
    "turns without speakers": (
        {
            "messages": [
                {"message": text, "attrs": []} if i else {"message": text} for i, (_, text) in enumerate(FOUR)
            ]
        },
        FOUR,
    ),
    "baike": ({"qid": "1", "category": "c", "title": Q, "desc": "", "answer": A}, PAIR),
    "baike with a description": (
        {"qid": "1", "title": Q, "desc": "白天", "answer": A},
        [("user", f"{Q}\n白天"), ("assistant", A)],
    ),
    "a forum's answer": ({"qid": 1, "title": Q, "desc": Q, "content": A, "star": 3}, PAIR),
    "intents": ({"tag": "t", "patterns": [Q], "responses": [A, "蓝"]}, PAIR),
    "Gemini": (
        {"contents": [{"role": {"assistant": "model"}.get(r, r), "parts": [{"text": t}]} for r, t in FOUR]},
        FOUR,
    ),
    "turns of a sender": ({"messages": [{"sender": role, "text": text} for role, text in FOUR]}, FOUR),
    "multiple choice": (
        {"question": Q, "A": "红色", "B": "蓝色", "C": "绿色", "D": "白色", "answer": "B"},
        [("user", f"{Q}\nA. 红色\nB. 蓝色\nC. 绿色\nD. 白色"), ("assistant", "B")],
    ),
    "multiple choice by number": (
        {"question": Q, "choices": ["红色", "蓝色"], "answer": 1},
        [("user", f"{Q}\nA. 红色\nB. 蓝色"), ("assistant", "B")],
    ),
    "messages as JSON": ({"messages": json.dumps(MESSAGES)}, FOUR),
    "messages as JSON in another field": ({"id": 1, "payload": json.dumps(MESSAGES)}, FOUR),
    "messages as JSON in the text": ({"id": 1, "text": json.dumps(MESSAGES)}, FOUR),
    "messages as JSON in the prompt": ({"prompt": json.dumps(MESSAGES[:3]), "response": A2}, FOUR),
    "messages as Python prints them": ({"conversations": str(MESSAGES)}, FOUR),
    "a pair as JSON in a field": ({"data": json.dumps({"question": Q, "answer": A})}, PAIR),
    "a record as JSON": (json.dumps({"question": Q, "answer": A}), PAIR),
    "a pair in an object": ({"id": 1, "qa": {"question": Q, "answer": A}}, PAIR),
}
S = "简短地回答。"
WITH_SYSTEM = [("system", S), *FOUR]
# name of the marks -> a text with them, and the turns that it means
MARKED: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "ChatML": ("".join(f"<|im_start|>{r}\n{t}<|im_end|>\n" for r, t in WITH_SYSTEM), WITH_SYSTEM),
    "Llama 3": (
        "<|begin_of_text|>"
        + "".join(f"<|start_header_id|>{r}<|end_header_id|>\n\n{t}<|eot_id|>" for r, t in WITH_SYSTEM),
        WITH_SYSTEM,
    ),
    "Llama 2": (
        f"<s>[INST] <<SYS>>\n{S}\n<</SYS>>\n\n{Q} [/INST] {A} </s><s>[INST] {Q2} [/INST] {A2} </s>",
        WITH_SYSTEM,
    ),
    "Gemma": (
        "<bos>"
        + "".join(
            f"<start_of_turn>{'model' if r == 'assistant' else r}\n{t}<end_of_turn>\n" for r, t in FOUR
        ),
        FOUR,
    ),
    "Zephyr": ("".join(f"<|{r}|>\n{t}</s>\n" for r, t in WITH_SYSTEM), WITH_SYSTEM),
    "Alpaca": (
        f"{S}\n\n### Instruction:\n{Q}\n\n### Input:\n{Q2}\n\n### Response:\n{A}</s>",
        [("system", S), ("user", f"{Q}\n{Q2}"), ("assistant", A)],
    ),
    "Human: Assistant:": (f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman: {Q2}\n\nAssistant: {A2}", FOUR),
    "### Human: ### Assistant:": (
        f"### Human: {Q}### Assistant: {A}### Human: {Q2}### Assistant: {A2}",
        FOUR,
    ),
    "USER: ASSISTANT:": (f"USER: {Q} ASSISTANT: {A}</s>USER: {Q2} ASSISTANT: {A2}</s>", FOUR),
}
RECORDS |= {f"a text with marks: {name}": ({"text": text}, turns) for name, (text, turns) in MARKED.items()}
RECORDS["an answer that begins with the mark of a question"] = (
    {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "completion": f" Human: {A}\n\nAssistant: {A2}"},
    [("user", Q), ("assistant", f"Human: {A}\n\nAssistant: {A2}")],
)
RECORDS |= {  # the prompt ends with the mark of the answer
    f"a prompt with marks: {name}": (
        {"prompt": text[: text.rindex(turns[-1][1])], "completion": text[text.rindex(turns[-1][1]) :]},
        turns,
    )
    for name, (text, turns) in MARKED.items()
}
TEXTS = [  # marks in a text that is no conversation
    "A chat template writes <|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>.",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>narrator\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>",
    "Use [INST] and [/INST] around the question.",
    "### Instruction:\nWrite a poem.",
    "The form:\nUSER: name ASSISTANT: name",
    "Human: a story of one speaker.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_marks_inside_a_text(tmp_path: Path, text: str) -> None:
    """A text about marks, or with one side of a conversation, stays a text."""
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert recognise(tmp_path / "d.jsonl").holds_texts


def test_marks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what was read as turns, and how the texts stay texts; that command is obeyed."""
    path = tmp_path / "d.jsonl"
    texts = [MARKED[name][0] for name in ("ChatML", "Alpaca", "ChatML")]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    read_conversations(path)[1].print_summary()
    assert capsys.readouterr().err.splitlines() == [
        f"note: {path}: 2 with ChatML marks, 1 with Alpaca marks: the texts are read as conversations; "
        f"as plain texts: minigpt train --text {path}"
    ]
    assert list(read_texts(path)) == texts


# name -> a record, and the turns that it means: marks and JSON that are the text itself
AS_THEY_ARE: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "a question that names one speaker": (
        {"question": "Human: who are you?", "answer": A},
        [("user", "Human: who are you?"), ("assistant", A)],
    ),
    "an answer with marks": (
        {"question": Q, "answer": "Human: a\nAssistant: b"},
        [("user", Q), ("assistant", "Human: a\nAssistant: b")],
    ),
    "a question about JSON": (
        {"question": '[{"a": 1}]', "answer": '[{"role": "user", "content": "x"}]'},
        [("user", '[{"a": 1}]'), ("assistant", '[{"role": "user", "content": "x"}]')],
    ),
    "an answer that is a call": (
        {"question": Q, "answer": '{"question": "a", "answer": "b"}'},
        [("user", Q), ("assistant", '{"question": "a", "answer": "b"}')],
    ),
}


def read(path: Path) -> list[list[tuple[str, str]]]:
    return [[(turn.role, turn.content) for turn in each.turns] for each in read_conversations(path)[0]]


@pytest.mark.parametrize("name", [name for name in RECORDS if isinstance(RECORDS[name][0], dict)])
def test_records_in_a_table(tmp_path: Path, name: str) -> None:
    """Lists and objects stand in the cells as JSON, or as Python prints them."""
    record, turns = RECORDS[name]
    for shown in (str, lambda value: json.dumps(value, ensure_ascii=False)):
        cells = [shown(value) if isinstance(value, list | dict) else value for value in record.values()]
        with (tmp_path / "d.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([[*record], cells, cells])
        assert read(tmp_path / "d.csv") == [turns, turns]
        assert not recognise(tmp_path / "d.csv").holds_texts


@pytest.mark.parametrize("name", [*RECORDS, *AS_THEY_ARE])
def test_records(tmp_path: Path, name: str) -> None:
    """The same from JSON Lines, from an array, and from the file that `split` writes."""
    record, turns = {**RECORDS, **AS_THEY_ARE}[name]
    for file, text in {
        "d.jsonl": f"{json.dumps(record, ensure_ascii=False)}\n" * 2,
        "d.json": json.dumps([record, record], indent=1),
    }.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
        assert not recognise(tmp_path / file).holds_texts
        assert read(tmp_path / file) == [turns, turns], file
    others = [{"question": f"{n}？", "answer": f"{n}。"} for n in range(3)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [record, *others]))
    conversations, report = read_conversations(tmp_path / "d.jsonl")
    write_split(split_conversations(conversations, 0.5), report, tmp_path, train_ratio=0.5, seed=42)
    parts = [each for part in ("train", "val") for each in read(tmp_path / f"{part}.jsonl")]
    more = [[("user", f"{n}？"), ("assistant", f"{n}。")] for n in range(3)]
    assert sorted(parts) == sorted([turns, *more])


@pytest.mark.parametrize(
    "whole",
    [
        {"version": "v2", "data": [{"title": "t", "paragraphs": [SQUAD]}]},
        {"title": "t", "mapping": NODES, "current_node": "a2"},
        {"conversations": json.loads(json.dumps([{"mapping": NODES}])), "user": {"id": 1}},
        {"intents": [RECORDS["intents"][0]]},
        {"1": {"question": Q, "answer": A}, "2": {"question": Q, "answer": A}},
        {"Q_1": RECORDS["WebQA"][0], "Q_2": RECORDS["WebQA"][0]},
        {Q: A, Q2: A2, "雪呢？": "白色。"},
        {"name": "t", "pairs": [[Q, A], [Q2, A2]]},
        json.dumps([{"question": Q, "answer": A}]),
    ],
    ids=[
        "SQuAD",
        "one of ChatGPT's",
        "many of ChatGPT's",
        "intents",
        "ids",
        "WebQA",
        "questions",
        "pairs",
        "JSON in JSON",
    ],
)
def test_one_value_in_a_file(tmp_path: Path, whole: Any) -> None:
    blank = "\n" * 30 if isinstance(whole, str) else ""  # blank lines before the value change nothing
    (tmp_path / "d.json").write_text(blank + json.dumps(whole), encoding="utf-8")
    first = read(tmp_path / "d.json")[0]
    assert first in (PAIR, FOUR, WITH_CONTEXT)
    assert not recognise(tmp_path / "d.json").holds_texts


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_messages_that_name_the_one_before(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"d.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in [*OASST[3:], *OASST[:3]]), encoding="utf-8")
        assert read(path) == [FOUR]
        return
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(
            pyarrow.Table.from_pylist([{"rank": None, "lang": "zh", **row} for row in OASST]), path
        )
        assert read(path) == [FOUR]
        return
    names = ("message_id", "parent_id", "role", "text", "rank")
    rows = [
        ",".join(str(row.get(name) if row.get(name) is not None else "") for name in names) for row in OASST
    ]
    path.write_text("\n".join([",".join(names), *rows]), encoding="utf-8")
    assert read(path) == [FOUR]


def test_questions_without_an_answer_are_counted(tmp_path: Path) -> None:
    open_question = {"question": Q2, "answers": [], "is_impossible": True}
    article = {"title": "t", "paragraphs": [{**SQUAD, "qas": [*SQUAD["qas"], open_question]}]}
    (tmp_path / "d.json").write_text(json.dumps({"data": [article]}), encoding="utf-8")
    conversations, report = read_conversations(tmp_path / "d.json")
    assert (len(conversations), report.skipped) == (1, [(1, "the question has no answer")])
    flat = {"context": CONTEXT, "question": Q2, "answers": {"text": [], "answer_start": []}}
    lines = [flat, RECORDS["SQuAD, one question"][0]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_conversations(tmp_path / "d.jsonl")[1].skipped == [(1, "the question has no answer")]


BEYOND = 10**400  # a whole number that no float can hold
NO_NAMES = {**NODES, "root": {**NODES["root"], "parent": [1], "children": [["a"], "sys"]}}
ONE = {"question": Q, "answer": A}
ODD_VALUES: dict[str, tuple[list[Any], list[list[tuple[str, str]]], list[str]]] = {
    "names of nodes that are lists": ([{"mapping": NO_NAMES}], [FOUR], []),
    # Python's int() refuses more than 4300 digits
    "a long number of a turn": (
        [{"chat": {f"turn_{'9' * 5000}": {}}}, ONE],
        [PAIR],
        ["no field that is known"],
    ),
    "a rank beyond all floats": ([OASST[0], {**OASST[1], "rank": BEYOND}, OASST[2]], [PAIR], []),
    "a message without an id": (
        [*OASST, {**OASST[0], "message_id": 7}],
        [FOUR],
        ["no message with a message_id"],
    ),
    "a parent that is a list": (
        [*OASST, {**OASST[0], "parent_id": ["a"]}, {**OASST[0], "parent_id": 7}],
        [FOUR],
        ["the parent_id of a message is no text"] * 2,
    ),
    "a question that is a number": ([{**SQUAD, "qas": [*SQUAD["qas"], 7]}], [WITH_CONTEXT], []),
    "evidence of nothing": (
        [{"question": Q, "evidences": {"1": {"answer": "no_answer"}, "2": {"answer": []}}}, ONE],
        [PAIR],
        ["the question has no answer"],
    ),
    "a weight beyond all floats": (
        [{**ONE, "weight": BEYOND}, ONE],
        [PAIR],
        ["`weight` is no number from 0 to 1e6"],
    ),
}


@pytest.mark.parametrize("name", ODD_VALUES)
def test_odd_values_inside_known_shapes(tmp_path: Path, name: str) -> None:
    rows, expected, reasons = ODD_VALUES[name]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read(path) == expected
    assert [reason for _, reason in read_conversations(path)[1].skipped] == reasons


def test_a_circle_of_messages_ends(tmp_path: Path) -> None:
    nodes = {"a": node("a", "user", Q, "b", "b"), "b": node("b", "assistant", A, "a", "a")}
    (tmp_path / "d.jsonl").write_text(json.dumps({"mapping": nodes, "current_node": "b"}), encoding="utf-8")
    assert read(tmp_path / "d.jsonl") == [PAIR]
    (tmp_path / "d.jsonl").write_text(json.dumps({"mapping": nodes}), encoding="utf-8")
    assert read(tmp_path / "d.jsonl") == [PAIR]


# -- tables that are drawn, dialogues in lines ---------------------------------------------------------------

ROWS = [(Q, A), ("两行？", "一。\n二。"), ("什么是|？", "竖线。")]
TABLES = {
    "Markdown": "| 问题 | 答案 |\n|---|:-:|\n{rows}",
    "Markdown without outer bars": "问题 | 答案\n--- | ---\n{bare}",
    "Markdown below a heading": "# 常见问题\n\n| 问题 | 答案 |\n| --- | --- |\n{rows}\n",
    "Markdown, CR LF": "| 问题 | 答案 |\r\n|---|---|\r\n{rows}",
    "Markdown, more columns": "| 编号 | 问题 | 答案 |\n|---|---|---|\n{numbered}",
    "two tables": "| 问题 | 答案 |\n|--|--|\n{first}\n\n| question | answer |\n|--|--|\n{others}",
    "psql": " question | answer\n----------+--------\n{bare}\n(3 rows)\n",
    "mysql": "+---+---+\n| question | answer |\n+---+---+\n{rows}\n+---+---+\n",
    "org-mode": "| question | answer |\n|----------+--------|\n{rows}\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_drawn_tables(tmp_path: Path, name: str) -> None:
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in ROWS]
    rows = [f"| {question} | {answer} |" for question, answer in cells]
    text = TABLES[name].format(
        rows="\n".join(rows),
        bare="\n".join(f"{question} | {answer}" for question, answer in cells),
        numbered="\n".join(f"| {i} {row}" for i, row in enumerate(rows)),
        first=rows[0],
        others="\n".join(rows[1:]),
    )
    (tmp_path / "faq.md").write_bytes(text.encode("gb18030"))
    assert not recognise(tmp_path / "faq.md").holds_texts
    (tmp_path / "faq.md").write_text(text, encoding="utf-8", newline="")
    assert not recognise(tmp_path / "faq.md").holds_texts
    conversations, report = read_conversations(tmp_path / "faq.md")
    assert [each.exchanges for each in conversations] == [(row,) for row in ROWS]
    left: str | None = {"Markdown below a heading": "1 line outside", "psql": "1 line outside"}.get(name)
    assert len(report.notes) == bool(left)
    assert all(left in note for note in report.notes if left)


def test_a_drawn_table_s_rows_are_counted_as_others(tmp_path: Path) -> None:
    (tmp_path / "faq.md").write_text("| 问法 | 答法 |\n|--|--|\n| a | b |\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"'问法', '答法'.*--question_field"):
        read_conversations(tmp_path / "faq.md")
    (tmp_path / "faq.md").write_text(
        "| 问题 | 答案 |\n|--|--|\n| a | b |\n| c | d | e |\n| f |\n", encoding="utf-8"
    )
    conversations, report = read_conversations(tmp_path / "faq.md")
    assert [line for line, _ in report.skipped] == [4, 5]
    assert conversations[0].line == 3


@pytest.mark.parametrize(
    "text",
    [
        "一篇文章。\n" * 9 + "| 问题 | 答案 |\n|--|--|\n| a | b |\n",
        "---\ntitle: a | b\n---\n正文。\n" * 3,
        "a | b\nc | d\n" * 5,
    ],
    ids=["an article with a table", "front matter", "no line of dashes"],
)
def test_what_is_no_drawn_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    assert list(read_texts(tmp_path / "a.md")) == [text]
    assert recognise(tmp_path / "a.md").holds_texts


DIALOGUES = {
    "conv": f"E\nM {Q}\nM {A}\nM {Q2}\nM {A2}\nE\nM {Q}\nM {A}\n",
    "conv with blank lines": f"E\n\nM {Q}\nM {A}\nM {Q2}\nM {A2}\n\nE\nM {Q}\nM {A}\nE\n",
    "conv with a text of two lines": f"E\nM {Q}\nM {A}\nM {Q2}\nM {A2}\nE\nM {Q}\nM {A[:3]}\n{A[3:]}\nE\nE\n",
    "yaml with a comment and a next key": f"conversations:\n- - {Q}\n  - {A}\n# more\n  - {Q2}\n  - {A2}\n"
    f"- - {Q}\n  - {A[:3]}\n    {A[3:]}\nversion: 1\n- - x\n  - y\n",
    "yaml": f"categories:\n- 颜色\nconversations:\n- - {Q}\n  - {A}\n  - '{Q2}'\n  - \"{A2}\"\n"
    f"- - {Q}\n  - {A[:3]}\n    {A[3:]}\n",
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_dialogues_in_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / "d").write_text(DIALOGUES[name], encoding="utf-8")
    joined = {"yaml": " ", "conv with a text of two lines": "\n", "yaml with a comment and a next key": " "}
    second = [PAIR[0], ("assistant", f"{A[:3]}{joined.get(name, '')}{A[3:]}")]
    assert read(tmp_path / "d") == [FOUR, second]
    assert not recognise(tmp_path / "d").holds_texts
    (tmp_path / "d").write_bytes(DIALOGUES[name].encode("gb18030"))
    assert read(tmp_path / "d") == [FOUR, second]


def test_words_that_a_conv_file_cuts_are_joined(tmp_path: Path) -> None:
    lines = [f"E\nM {'/'.join(Q)}\nM {'/'.join(A)}\n", "E\nM 你好\nM 今天/很好\n"]
    (tmp_path / "d").write_text("".join(lines), encoding="utf-8")
    assert read(tmp_path / "d") == [PAIR, [("user", "你好"), ("assistant", "今天很好")]]
    (tmp_path / "d").write_text(f"E\nM 一/二是多少\nM {A}\nE\nM {Q}\nM {A}\n", encoding="utf-8")
    assert read(tmp_path / "d")[0][0] == ("user", "一/二是多少")


def test_letters_alone_are_no_dialogue(tmp_path: Path) -> None:
    for text in ("E\nM\n", "M a\nM b\nM c\n", "E 大调\nM 你\n天\n地\n", "conversations:\n没有。\n"):
        (tmp_path / "a.txt").write_text(text * 3, encoding="utf-8")
        assert recognise(tmp_path / "a.txt").holds_texts


def test_what_is_named_json_but_is_text_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.json").write_text(f"// data\nvar data = {json.dumps(MESSAGES)};\n", encoding="utf-8")
    find_sources(tmp_path / "d.json", TextOptions())
    assert "is no JSON, though it is named so" in capsys.readouterr().err
    (tmp_path / "d.xml").write_text("<?xml version='1.0'?><qa><q>a</q></qa>", encoding="utf-8")
    with pytest.raises(InputError, match="is XML"):
        read_conversations(tmp_path / "d.xml")


def test_python_s_lists_are_read_as_python_does(tmp_path: Path) -> None:
    text = 'it\'s "\\d" \n 中'
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    assert ast.literal_eval(str(turns)) == turns
    (tmp_path / "d.jsonl").write_text(json.dumps({"conversations": str(turns)}) + "\n", encoding="utf-8")
    assert read_conversations(tmp_path / "d.jsonl")[0][0].turns == (
        Turn("user", text),
        Turn("assistant", text),
    )
    for bad in ("[" * 5000, "[1, 2", "[open('x')]", "[-" + "-" * 9000 + "1]"):
        (tmp_path / "d.jsonl").write_text(json.dumps({"conversations": bad}) + "\n", encoding="utf-8")
        with pytest.raises(InputError, match="`conversations` is text, not a list of turns"):
            read_conversations(tmp_path / "d.jsonl")
