"""Files as shops, forums and other programs write them: what a person would read from each."""

import csv
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minigpt.data.corpus import read_texts, recognise
from minigpt.data.reader import read_conversations
from minigpt.errors import InputError
from minigpt.evaluation.tasks import read_tasks

PAIRS = [
    ("你们几点营业？", "每天早上九点到晚上十点。"),
    ("可以开发票吗？", "可以，收银台扫码就能开电子发票。"),
    ("会员怎么办理？", "在收银台报手机号即可，免费办理。"),
    ("退货需要什么？", "七天之内，带上小票和商品就可以退。"),
]
TRADITIONAL = [
    ("今天天氣如何？", "今天天氣很好，適合出門。"),
    ("圖書館幾點開門？", "早上九點開門，晚上九點關門。"),
]
GERMAN = [
    ("Wie groß ist die Tür?", "Sie ist 2,10 m hoch; 90 cm breit."),
    ('Was heißt "Größe"?', 'Das heißt "size".'),
    ("Gibt es Öl?", "Ja, im Regal über der Kühltheke."),
    ("Können wir früher schließen?", "Nein, erst um 18 Uhr, außer an Feiertagen."),
]
Pairs = list[tuple[str, str]]


def table(head: Sequence[object], rows: Sequence[Sequence[object]], delimiter: str = ",") -> str:
    written = io.StringIO(newline="")
    csv.writer(written, delimiter=delimiter).writerows([head, *rows])
    return written.getvalue()


def lines(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def under(q: str, a: str, **more: str) -> str:
    return lines(*({**more, q: question, a: answer} for question, answer in PAIRS))


CHOICE = ["哪个是家具？", "苹果", "桌子", "石头", "火车", "B"]
WITH_OPTIONS = [("哪个是家具？\nA. 苹果\nB. 桌子\nC. 石头\nD. 火车", "B")]
NAMED = [["张三", *PAIRS[0]], ["李四", *PAIRS[1]]]
BOTH_ANSWERS = [(q, PAIRS[0][1]) for q in ("几点开门？", "什么时候开门？")]

IN_TAGS = [(f"<p>{q}</p>", f"<p>{a}</p>") for q, a in PAIRS]

READ: dict[str, tuple[str | bytes, Pairs]] = {
    "a shop's sheet": (
        table(
            ["某某超市客服常见问题（2024年）", "", "", ""],
            [
                ["", "", "", ""],
                ["序号", "客户问题", "标准答复", "点击量(次)"],
                *([n, q, a, f"{n * 37} 次"] for n, (q, a) in enumerate(PAIRS, 1)),
                ["合计", "", "", "4 条"],
            ],
        ).encode("gb18030"),
        PAIRS,
    ),
    "semicolons and quotation marks": (
        table(["Nr", "Frage", "Antwort"], [[7, *pair] for pair in GERMAN], ";").encode("cp1252"),
        GERMAN,
    ),
    "Excel's Unicode text": (table(["问题", "答案"], PAIRS, "\t").encode("utf-16"), PAIRS),
    "names with units": (
        table(["问题（必填）", "答案（500字以内）", "权重(%)"], [[*p, "50%"] for p in PAIRS]),
        PAIRS,
    ),
    "traditional names": (
        lines(*({"問題": q, "回覆": a} for q, a in TRADITIONAL)).encode("utf-8"),
        TRADITIONAL,
    ),
    "traditional questions in Big5": (
        "\n".join(f"問：{q}\n答：{a}" for q, a in TRADITIONAL * 2).encode("big5"),
        TRADITIONAL * 2,
    ),
    "traditional roles": (
        lines(
            *({"對話": [{"角色": "用戶", "內容": q}, {"角色": "助手", "內容": a}]} for q, a in TRADITIONAL)
        ),
        TRADITIONAL,
    ),
    # names that may also be those of people, places or options
    "who asked": (under("问题", "回答", user="u1"), PAIRS),
    "who asked, longer names": (table(["user", "客户问题", "标准回答"], NAMED), PAIRS[:2]),
    "who answered": (under("问题", "回答", bot="小冰"), PAIRS),
    "which assistant answered": (under("问题", "标准回答", assistant="v2"), PAIRS),
    "what it is about": (under("问题", "答案", target="门店"), PAIRS),
    "where it comes from": (under("title", "answer", source="http://x"), PAIRS),
    "source and target": (under("source", "target", id="7"), PAIRS),
    "user and assistant": (under("user", "assistant", id="7"), PAIRS),
    "user and reply": (under("user", "reply"), PAIRS),
    "user and response at a time": (under("user", "response", id="7", time="10:00"), PAIRS),
    "options": (lines(dict(zip(["问题", "A", "B", "C", "D", "答案"], CHOICE))), WITH_OPTIONS),
    "options in a table": (table(["题目", "A", "B", "C", "D", "答案"], [CHOICE] * 2), WITH_OPTIONS * 2),
    "options, a longer name": (table(["问题", "a", "b", "c", "d", "正确答案"], [CHOICE]), WITH_OPTIONS),
    "options as exams have them": (
        table(["题号", "题目", "选项A", "选项B", "选项C", "选项D", "答案", "解析"], [[1, *CHOICE, "因为"]]),
        WITH_OPTIONS,
    ),
    "options in English": (
        lines(dict(zip(["question", "option_a", "option_b", "option_c", "option_d", "answer"], CHOICE))),
        WITH_OPTIONS,
    ),
    "options in an object": (
        lines({"问题": CHOICE[0], "选项": dict(zip("ABCD", CHOICE[1:])), "答案": "B"}),
        WITH_OPTIONS,
    ),
    "options in a text": (
        lines({"题目": CHOICE[0], "选项": WITH_OPTIONS[0][0].partition("\n")[2], "答案": "B"}),
        WITH_OPTIONS,
    ),
    "an option is left out": (
        lines(dict(zip(["问题", "A", "B", "C", "D", "答案"], [*CHOICE[:3], "", *CHOICE[4:]]))),
        [("哪个是家具？\nA. 苹果\nB. 桌子\nD. 火车", "B")],
    ),
    # what programs write in place of nothing
    "no input": (
        lines(
            *(
                {"instruction": q, "input": nothing, "output": a, "system": nothing}
                for (q, a), nothing in zip(PAIRS, ["<noinput>", "None", "无", "N/A"])
            )
        ),
        PAIRS,
    ),
    "an answer like that": (lines({"question": "有吗？", "answer": "无"}), [("有吗？", "无")]),
    "a comma at the end of each row": (
        "question,answer\n" + "".join(f"{q},{a},,\n" for q, a in PAIRS),
        PAIRS,
    ),
    "line ends of Windows in a cell": (
        'question,answer\r\n"a?","b\r\nc"\r\n"d?",e\r\n',
        [("a?", "b\nc"), ("d?", "e")],
    ),
    "two files joined, with their names": (table(["问题", "答案"], PAIRS) * 2, PAIRS * 2),
    "a mark twice": ("\ufeff\ufeff" + table(["question", "answer"], PAIRS), PAIRS),
    # other lists
    "a list in YAML": (
        "faq:\n  # 店\n"
        + "".join(f'  - question: "{q}"\n    answer: |\n      {a}\n      再见。\n\n' for q, a in PAIRS),
        [(q, f"{a}\n再见。") for q, a in PAIRS],
    ),
    "YAML, folded": (
        "".join(f"- q: {q}\n  a: >-\n    {a}\n    It's so.\n\n    End.\n" for q, a in PAIRS),
        [(q, f"{a} It's so.\nEnd.") for q, a in PAIRS],
    ),
    "who speaks, and a tab": ("".join(f"Q\t{q}\nA\t{a}\n" for q, a in PAIRS), PAIRS),
    "a shop's chats": (
        table(
            ["会话ID", "发送时间", "发送方", "消息内容"],
            [
                [n, f"2024-03-01 10:0{n}", who, text]
                for n, pair in enumerate(PAIRS)
                for who, text in zip(("买家", "卖家"), pair)
            ],
        ),
        PAIRS,
    ),
    "a transcript": (
        "WEBVTT\n\n"
        + "".join(
            f"00:0{n}.000 --> 00:0{n}.900\n<v {who}>{text}</v>\n\n"
            for n, pair in enumerate(PAIRS)
            for who, text in zip(("访客", "客服"), pair)
        ),
        PAIRS,
    ),
    "the system answers": (
        lines(
            *(
                {"turns": [{"speaker": "USER", "utterance": q}, {"speaker": "SYSTEM", "utterance": a}]}
                for q, a in PAIRS
            )
        ),
        PAIRS,
    ),
    "marked as good": (lines(*({"prompt": q, "completion": a, "label": True} for q, a in PAIRS)), PAIRS),
    "UTF-16 without a mark, a space or a letter": (
        "".join(f"问：{q}\n答：{a}\n" for q, a in PAIRS).encode("utf-16-le"),
        PAIRS,
    ),
    "answers in lists": (lines(*([{"prompt": q, "response": [[a]]}] for q, a in PAIRS)), PAIRS),
    "input and output as a turn": (
        lines(*({"conversation": [{"system": "", "input": q, "output": a}]} for q, a in PAIRS)),
        PAIRS,
    ),
    # several phrasings
    "QnA Maker": (
        json.dumps(
            {"qnaDocuments": [{"id": 1, "answer": BOTH_ANSWERS[0][1], "source": "x",
                               "questions": [q for q, _ in BOTH_ANSWERS], "metadata": []}]}
        ),
        BOTH_ANSWERS,
    ),
    "phrasings": (lines({"questions": [q for q, _ in BOTH_ANSWERS], "answers": [PAIRS[0][1]]}), BOTH_ANSWERS),
    "as many answers as questions": (
        lines(*[{"questions": [*dict(PAIRS)], "answers": [a for _, a in PAIRS]}] * 2),
        PAIRS * 2,
    ),
    "plural names": (under("questions", "answers"), PAIRS),
    "a quiz": (
        json.dumps(
            {"quiz": {"questions": [{"question": q, "correct_answer": a, "incorrect_answers": ["x"]}
                                    for q, a in PAIRS]}}
        ),
        PAIRS,
    ),
    # flash cards
    "Anki": (
        "#separator:tab\n#html:true\n#tags column:3\n"
        + "".join(f"<b>{q}</b>\t{a.replace('，', '<br>')}\tshop\n" for q, a in PAIRS),
        [(q, a.replace("，", "\n")) for q, a in PAIRS],
    ),
    "Anki, all columns": (
        "#separator:Semicolon\r\n#html:false\r\n#guid column:1\r\n#notetype column:2\r\n#deck column:3\r\n"
        + "".join(f'x{n};Basic;d::e;"{q}";"{a}"\r\n' for n, (q, a) in enumerate(PAIRS)),
        PAIRS,
    ),
    # -- names that are like others
    "a wrong answer beside q and a": (lines({"q": "2+2?", "a": "4", "wrong_answer": "5"}), [("2+2?", "4")]),
    "the same in a table": ("q,a,wrong_answer\n2+2?,4,5\n", [("2+2?", "4")]),
    "a rejected response": (
        lines({"question": "Q", "target": "Hello", "rejected_response": "BAD"}), [("Q", "Hello")],
    ),
    "the next question": (
        lines({"user": "Hi", "assistant": "Hello", "next_question": "More?"}), [("Hi", "Hello")],
    ),
    "the same in Chinese": (
        lines({"用户": "你好", "助手": "您好", "错误回答": "滚", "追加问题": "还有吗"}), [("你好", "您好")],
    ),
    "an answer that is marked as false": (  # of a yes/no question; only KTO's label means a bad answer
        lines({"question": "Is it green?", "answer": "No.", "label": False}), [("Is it green?", "No.")],
    ),
    # -- several questions
    "related questions beside a question": (
        lines({"question": "main?", "answer": "a", "questions": ["b?", "c?"]}), [("main?", "a")],
    ),
    "a conversation with suggested questions": (
        lines({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
               "questions": ["b?"], "response": "c"}),
        [("hi", "hello")],
    ),
    "a passage that is asked about": (  # as before: the passage is the question
        lines({"context": "Rome is in Italy.", "questions": ["Where?"], "answers": ["Italy"]}),
        [("Rome is in Italy.", "Italy")],
    ),
    # -- which option is right
    "numbers as letters": (
        lines({"question": "Capital?", "options": {"1": "Paris", "2": "Rome"}, "answer": "1"}),
        [("Capital?\n1. Paris\n2. Rome", "1")],
    ),
    "the text of an option": (
        lines({"question": "1+1?", "options": ["1", "2"], "answer": "2"}), [("1+1?\nA. 1\nB. 2", "2")],
    ),
    "the number of an option": (
        lines({"question": "1+1?", "options": ["1", "2"], "answer": 1}), [("1+1?\nA. 1\nB. 2", "B")],
    ),
    "an empty option": (
        lines({"question": "x?", "choices": ["v", "", "w"], "answer": 2}), [("x?\nA. v\nC. w", "C")],
    ),
    "an option called nan": (
        lines({"question": "x?", "choices": ["NaN", "nan", "0"], "answer": 1}),
        [("x?\nA. NaN\nB. nan\nC. 0", "B")],
    ),
    "a and b are numbers": (lines({"prompt": "Add", "a": 3, "b": 4, "response": "1"}), [("Add", "1")]),
    "options in one text, and a number": (
        lines({"question": "x?", "options": "A. 1 B. 2", "answer": "1"}), [("x?\nA. 1 B. 2", "1")],
    ),
    "several right options": (
        "题目,A,B,C,D,正确答案\n哪些？,苹果,梨,石头,桃,ABD\n哪个？,a,b,c,d,C\n",
        [("哪些？\nA. 苹果\nB. 梨\nC. 石头\nD. 桃", "ABD"), ("哪个？\nA. a\nB. b\nC. c\nD. d", "C")],
    ),
    "the number of an option in an object": (
        lines({"question": "x?", "answer": 0, "options": {"A": "v", "B": "w"}}), [("x?\nA. v\nB. w", "A")],
    ),
    "objects as options": (
        lines({"question": "x?", "options": [{"label": "A", "text": "v"}, {"label": "B", "text": "w"}],
               "answer": "B"}),
        [("x?\nA. v\nB. w", "B")],
    ),
    "nine options": (
        lines({"question": "x?", "options": list("abcdefghi"), "answer": "I"}),
        [("\n".join(["x?", *(f"{a.upper()}. {a}" for a in "abcdefghi")]), "I")],
    ),
    "phrasings beside an empty field": (
        lines({"questions": ["a?", "b?"], "answer": "c", "context": "", "text": None}),
        [("a?", "c"), ("b?", "c")],
    ),
    "words in words": ("badge_question,badge_answer\nq,a\n", [("q", "a")]),
    "a book of mistakes": ("错误问题,问题分类,标准答案\nq,k,a\n", [("q", "a")]),
    # -- Anki and dialogue systems
    "cards with named columns": (
        "#separator:tab\n#columns:ID\tQuestion\tAnswer\tSource\n17\tq\ta\thttp://x\n", [("q", "a")],
    ),
    "a system that speaks beside an assistant": (
        lines({"conversation": [{"speaker": who, "text": text} for who, text in (
            ("user", "a"), ("assistant", "b"), ("system", "Be brief."), ("user", "c"), ("assistant", "d"))]}),
        [("a", "b"), ("Be brief.\nc", "d")],
    ),
    "cards with the back first": ("#separator:tab\n#columns:Back\tFront\nb\tf\n", [("f", "b")]),
    "cards with three fields": ("#separator:tab\n犬\tいぬ\tdog\n", [("犬", "いぬ\ndog")]),
    "a card that begins as a setting": (
        "#separator:tab\n#include:what\tC\nq\ta\n", [("#include:what", "C"), ("q", "a")],
    ),
    "a quotation mark that is not closed": ('#separator:tab\nq\ta\n"To be\twho?\nx\ty\n', [("q", "a")]),
    "answers of a system, by role": (
        lines(
            {"messages": [{"role": role, "content": a} for role, a in zip(("user", "system") * 2, "abcd")]}
        ),
        [("a", "b"), ("c", "d")],
    ),
    "pieces of a page in cells": ("".join(f"<p>{q}</p>\t<p>{a}</p>\n" for q, a in PAIRS), IN_TAGS),
}  # fmt: skip


def written(folder: Path, content: str | bytes, name: str = "data") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("kind", READ)
def test_what_is_read(tmp_path: Path, kind: str) -> None:
    content, expected = READ[kind]
    conversations, _ = read_conversations(written(tmp_path, content))
    found = [exchange for each in conversations for exchange in each.exchanges]
    assert [(each.question, each.answer) for each in found] == expected


def test_cells_that_pandas_left_empty_are_no_answers(tmp_path: Path) -> None:
    rows = [(q, a if n % 2 else missing) for n, (q, a) in enumerate(PAIRS) for missing in ("NaN", "#N/A")]
    conversations, report = read_conversations(written(tmp_path, table(["question", "answer"], rows)))
    assert {each.answer for each in conversations} == {PAIRS[1][1], PAIRS[3][1]}
    assert report.by_reason() == {"`answer` is empty": [2, 3, 6, 7]}


@pytest.mark.parametrize("codec", ["cp1252", "latin-1"])
def test_texts_that_another_program_has_garbled(
    tmp_path: Path, codec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """UTF-8 was read as another encoding, and written as UTF-8 again."""
    good = "Ça va à Noël – c’est bien." if codec == "cp1252" else PAIRS[0][1]
    bad = good.encode().decode(codec)
    rows = [{"question": "a", "answer": good}, {"question": "b", "answer": bad}]
    _, report = read_conversations(written(tmp_path, lines(*rows, {"question": "SÃO", "answer": "Â."})))
    assert report.garbled == [2]
    report.print_summary()
    assert "1 records look garbled" in capsys.readouterr().err


def test_what_stands_beside_a_question_in_parquet(tmp_path: Path) -> None:
    """Of a Parquet file, the columns that decide what is learned are read."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, which reads Parquet, is not installed")
    import pyarrow as arrow

    path = tmp_path / "d.parquet"
    columns = {"prompt": ["a?", "b?"], "completion": ["c", "d"], "label": [True, False], "weight": [0.5, 1.0]}
    parquet.write_table(arrow.table({**columns, "other": [1, 2]}), path)
    (one,), report = read_conversations(path)
    assert (one.question, one.weight) == ("a?", 0.5)
    assert report.by_reason() == {"`label` is false: the answer is a bad one": [2]}
    parquet.write_table(arrow.table({"questions": [["a?", "b?"]], "answer": ["c"]}), path)
    assert [(each.question, each.answer) for each in read_conversations(path)[0]] == [
        ("a?", "c"),
        ("b?", "c"),
    ]
    parquet.write_table(arrow.table({"user": ["Anna"], "review": ["Good."], "reply": ["Thanks."]}), path)
    with pytest.raises(InputError, match="it has 'user', 'review', 'reply'"):
        read_conversations(path)


def test_options_in_parquet(tmp_path: Path) -> None:
    """Of a Parquet file, the columns that are needed are read."""
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="pyarrow, which reads Parquet, is not installed")
    import pyarrow as arrow

    columns = {"question": [CHOICE[0]], "choices": [CHOICE[1:5]], "answer": [1], "id": [7]}
    pyarrow.write_table(arrow.table(columns), tmp_path / "list.parquet")
    apart = {name: [cell] for name, cell in zip(["题目", "选项A", "选项B", "选项C", "选项D", "答案"], CHOICE)}
    pyarrow.write_table(arrow.table(apart), tmp_path / "apart.parquet")
    for name in ("list.parquet", "apart.parquet"):
        (one,) = read_conversations(tmp_path / name)[0]
        assert [(one.question, one.answer)] == WITH_OPTIONS


@pytest.mark.parametrize("kind", [kind for kind in READ if kind.startswith("options") and "text" not in kind])
def test_options_as_a_task(tmp_path: Path, kind: str) -> None:
    """`minigpt eval --task` reads the same options."""
    content, expected = READ[kind]
    (task,) = read_tasks([written(tmp_path, content, "t.csv" if "," in str(content)[:9] else "t.jsonl")])
    found = [(one.form, one.question, one.choices, one.answer) for one in task.examples]
    assert found == [("multiple_choice", CHOICE[0], tuple(CHOICE[1:5]), 1)] * len(expected)


def test_which_option_of_an_object_is_right(tmp_path: Path) -> None:
    rows = [
        {"question": "x?", "options": {"1": "Paris", "2": "Rome", "3": "Oslo"}, "answer": "1"},
        {"question": "y?", "options": {"B": "Rome", "A": "Paris"}, "answer": "A"},
        {"q": "z?", "a": "4", "wrong_answer": "5"},
    ]
    found = []
    for number, row in enumerate(rows):
        (task,) = read_tasks([written(tmp_path, lines(row), f"{number}.jsonl")])
        found += task.examples
    assert [found[0].choices[found[0].answer], found[1].choices[found[1].answer]] == ["Paris", "Paris"]
    assert found[2].references == ("4",)
    row = {
        "question": "x?",
        "options": [{"label": a, "text": text} for a, text in ("Av", "Bw")],
        "answer": "B",
    }
    (task,) = read_tasks([written(tmp_path, lines(row), "objects.jsonl")])
    assert [(one.choices, one.answer) for one in task.examples] == [(("v", "w"), 1)]
    # letters as keys: the prompt lists the options, whichever way the answer is given
    for answer in ("B", "Nitro", 1):
        row = {"question": "x?", "options": {"a": "Amp", "b": "Nitro"}, "answer": answer}
        (task,) = read_tasks([written(tmp_path, lines(row), "letters.jsonl")])
        (one,) = task.examples
        assert (one.choices, one.answer, one.letters) == (("Amp", "Nitro"), 1, ("A", "B"))


def test_names_of_people_and_places_are_no_questions_of_a_task(tmp_path: Path) -> None:
    for kind in ("who asked", "who answered", "where it comes from", "what it is about"):
        (task,) = read_tasks([written(tmp_path, READ[kind][0], "t.jsonl")])
        assert [(one.question, *one.references) for one in task.examples] == PAIRS


def packed(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "x")
    return content.getvalue()


REFUSED: dict[str, tuple[str | bytes, str]] = {
    # `用户` is the column of names, and which column is the question is not known
    "a shop's reviews": (
        table(["用户", "评价", "商家回复"], [["张三", "不错", "谢谢！"]] * 3),
        "`question` is missing: it has '用户', '评价', '商家回复'",
    ),
    "questions of MT-bench": (
        lines({"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}),
        "`turns` holds questions alone",
    ),
    "marked as bad": (
        lines(*({"prompt": q, "completion": a, "label": False} for q, a in PAIRS)),
        "`label` is false: the answer is a bad one",
    ),
    "preferences": (
        lines(*({"prompt": q, "chosen": a, "rejected": "不知道。"} for q, a in PAIRS)),
        "a better and a worse answer, which `minigpt finetune --task dpo` learns from",
    ),
    "a diary with times": (
        "".join(f"2024-01-{n:02} 10:00 起床：好\n2024-01-{n:02} 22:00 睡觉：累\n" for n in range(1, 9)),
        "no message is an answer to another; to learn from it: minigpt train --text",
    ),
    "deleted": (lines({"question": "a?", "answer": "[deleted]"}), "`answer` was deleted"),
    "another number of answers": (
        lines({"questions": ["a", "b", "c"], "answers": ["x", "y"]}),
        "`question` is missing: it has 'questions', 'answers'",
    ),
    "a passage with questions and their options": (
        lines(
            {"article": "x", "questions": ["a?", "b?"], "options": [["c", "d"]] * 2, "answers": ["A", "B"]}
        ),
        "holds texts, no questions and answers",
    ),
    "options without a right answer": ("q,a,b,c,d\nq1,x,y,z,w\n", "`answer` is missing"),
    "a system text after the user's": (
        lines({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "Be polite."}]}),
        "no turn is an assistant's",
    ),
    "a piece of a web page": ("<div class='qa'><p>问：几点？</p></div>\n" * 3, "is a piece of a web page"),
    "a dump of a forum": (
        '<?xml version="1.0"?>\n<posts>\n  <row Id="1" Title="a" Body="&lt;p&gt;b&lt;/p&gt;"/>\n</posts>',
        "is XML",
    ),
    "a Word document": (packed("word/document.xml"), r"is a Word document \(save it as text\)"),
    "a zip archive": (packed("a.jsonl"), r"is a zip archive \(unpack it\)"),
    "a PDF": (b"%PDF-1.7\n%\xe2\xe3\n", "is a PDF file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path: Path, kind: str) -> None:
    content, said = REFUSED[kind]
    with pytest.raises(InputError, match=said) as caught:
        read_conversations(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_what_is_no_text(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for content, said in (
        (json.dumps(turns), "holds questions and answers, no texts"),
        ("text,label\r\n", "holds no record"),
    ):
        with pytest.raises(InputError, match=said):
            list(read_texts(written(tmp_path, content, "d.csv")))


CAPTIONS = ["第一句。", "第二句，", "第三句。"]
TEXTS: dict[str, tuple[str, list[str]]] = {
    "SubRip": (
        "".join(
            f"{n}\r\n00:00:0{n},000 --> 00:00:0{n},900\r\n<i>{text}</i>\r\n\r\n"
            for n, text in enumerate(CAPTIONS, 1)
        ),
        ["".join(f"{text}\n" for text in CAPTIONS)],
    ),
    "WebVTT": (
        "WEBVTT\n\nNOTE a remark\n\n"
        + "\n".join(
            f"00:0{n}.000 --> 00:0{n}.900 align:start\n<v Anna>{text}\nnoch\n"
            for n, text in enumerate(CAPTIONS)
        ),
        ["".join(f"Anna: {text} noch\n" for text in CAPTIONS)],
    ),
    "a caption with an empty line": (
        "".join(
            f"{n}\n00:00:{n:02},000 --> 00:00:{n:02},900\ntext {n}\n\n" + "more\n\n" * (n == 3)
            for n in range(1, 21)
        ),
        ["".join(f"text {n}{' more' * (n == 3)}\n" for n in range(1, 21))],
    ),
    "a credit above captions": (
        "Subtitles by Ann\n\n"
        + "".join(f"{n}\n00:00:0{n},000 --> 00:00:0{n},500\nx{n}\n\n" for n in range(1, 6)),
        ["Subtitles by Ann\nx1\nx2\nx3\nx4\nx5\n"],
    ),
    "prose with a few times": (
        "One.\n\nTwo.\n\n00:00:01,000 --> 00:00:02,500\nx\n\n00:00:03,000 --> 00:00:04,500\ny\n\nEnd.\n", [],
    ),
    "a text about subtitles": ("A time is written as\n\n00:00:01,000 --> 00:00:02,000\n\nin them.\n", []),
    "paragraphs that begin with a tab": ("\t天气很好，我们去公园。\n\t晚上回家。\n" * 5, []),
    "a README with a picture": ('<p align="center"><img src="a.png"></p>\n\n# A name\n\nText.\n' * 2, []),
    "README.md": ('<div align="center">\n<h1>A name</h1>\n<p>b</p>\n</div>\n', []),
    "TABLE.md": ("<table>\n<tr><td>a</td></tr>\n</table>\n\nText.\n", []),
    "short": ("<p>a</p>\n", []),
    "a notebook": (
        json.dumps(
            {"cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# 标题\n", "说明"]},
                       {"cell_type": "code", "metadata": {}, "source": ["print(1)"], "outputs": []}],
             "metadata": {}, "nbformat": 4}
        ),
        ["# 标题\n说明", "print(1)"],
    ),
    "prices.csv": (
        table(["商品", "单价(元)", "日期"], [["苹果", "1,234.50", "2024-01-02"]] * 3),
        ["苹果"] * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_what_is_learned_as_text(tmp_path: Path, kind: str) -> None:
    content, expected = TEXTS[kind]
    if "." not in kind and kind != "a notebook":
        assert recognise(written(tmp_path, content, kind)).holds_texts
    assert list(read_texts(written(tmp_path, content, kind))) == (expected or [content])


def test_a_folder_of_data_files(tmp_path: Path) -> None:
    for n, (question, answer) in enumerate(PAIRS):
        (tmp_path / f"{n}.jsonl").write_text(lines({"question": question, "answer": answer}), "utf-8")
    with pytest.raises(InputError, match=r"is a folder; give one of its files, such as .*0\.jsonl") as caught:
        read_conversations(tmp_path)
    command, goal = str(caught.value).partition("join them: cat ")[2].split(" > ")
    assert goal == "all.jsonl"
    joined = "".join(path.read_text("utf-8") for path in sorted(tmp_path.glob(Path(command).name)))
    conversations, _ = read_conversations(written(tmp_path, joined))
    assert [(each.question, each.answer) for each in conversations] == PAIRS
