"""Converts records of known data sets and chat exports to records of question and answer, or of messages.

    ChatGPT's and DeepSeek's export     {"mapping": {id: {"message": ..., "parent": ..., "children": [...]}}}
    Claude's export                     {"chat_messages": [{"sender": "human", "text": ...}, ...]}
    SQuAD, CMRC, DRCD                   {"paragraphs": [{"context": ..., "qas": [{"question", ...}, ...]}]}
    WebQA                               {"question": ..., "evidences": {id: {"answer": [...]}}}
    MOSS                                {"chat": {"turn_1": {"Human", "MOSS"}}} or {"plain_text"}
    OpenAssistant                       {"prompt": {"text", "role", "replies": [...]}}, or a message in each
                                        row with message_id and parent_id
    UltraChat                           {"id": ..., "data": [text, text, ...]}
    COIG's exams                        {"textbox_question": ..., "textbox_answer": ..., ...}
    intents of a chatbot                {"tag": ..., "patterns": [...], "responses": [...]}
    several phrasings of a question     {"questions": [...], "answer": ...}, as in QnA Maker

Some records are trees, in which a message has several replies. Only one path of a tree is read, because the
other branches repeat the same questions. In a chat export, this is the path that the user saw last. If
that path is unknown, the last reply to each message is read. In OpenAssistant, the reply with the best rank
is read; without ranks, the first reply.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from minigpt.data.field_names import FIELDS, OPTIONS
from minigpt.data.json_values import NESTED, BadLine, Record, as_json, structure_in
from minigpt.data.records import NO_ANSWER, lower_keys, parts_of

__all__ = ["is_message_tree", "message_trees", "unfolded"]

# For the two formats of the data set MOSS. _MARK matches the marks in a text, such as <|Human|>: and <eoh>.
# _SAID matches one turn of a conversation that stands in one text: its speaker, and what is said.
_MARK = re.compile(r"<\|[^|<>]{1,20}\|>:?\s*|<eo[a-z]{1,2}>")
_SAID = re.compile(r"\[(Human|MOSS)\]:\s*(.*?)\s*(?:<eo[a-z]{1,2}>|(?=\[(?:Human|MOSS)\]:)|\Z)", re.DOTALL)
_NO_PARENT = ("None", "", "nan")  # what str() makes of a missing parent: None, an empty cell, NaN
# If a record has one of these fields, its `questions` are different questions: about a text, or with options.
# Without such a field, they are several phrasings of one question.
_PASSAGE = {"context", "article", "passage", "document", "story", *FIELDS["text"], *OPTIONS}
_SHOWN = ("text", "multimodal_text")  # types of a message's content that the user sees


def unfolded(records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records. A record of a known shape, such as SQuAD's, is replaced by the records inside it."""
    for record in records:
        inner = _inner(record.value) if isinstance(record.value, Mapping) else None
        if inner is None:
            yield record
            continue
        for value in inner:
            yield Record(record.line, value, "" if isinstance(value, BadLine) else as_json(value))


def _inner(record: Mapping[Any, Any]) -> list[Any] | None:
    keys = {str(key).strip().lower() for key in record}
    if keys.isdisjoint((*NESTED, "questions")) and keys != {"id", "data"}:
        return None
    item = lower_keys(record)
    # In a table, lists and objects in these fields are texts, in JSON or Python's notation. So parse them.
    for key in item.keys() & {*NESTED, "data", "responses"}:
        if isinstance(item[key], str):
            item[key] = structure_in(item[key])
    match item:
        case {"mapping": Mapping() as nodes} if nodes and all(
            isinstance(each, Mapping) for each in nodes.values()
        ):
            return [_messages(_path(nodes, item.get("current_node")))]
        case {"chat_messages": list(said)}:
            return [_messages([_of_sender(each) for each in said if isinstance(each, Mapping)])]
        case {"paragraphs": [{"qas": list()}, *_] as paragraphs}:
            return [pair for each in paragraphs if isinstance(each, Mapping) for pair in _questions(each)]
        case {"qas": [Mapping(), *_]}:
            return _questions(item)
        case {"question": question, "evidences": Mapping() as evidences}:
            return [_with_evidence(question, evidences)]
        case {"chat": Mapping() as turns} if turns and all(
            re.fullmatch(r"turn_\d{1,9}", str(key)) for key in turns
        ):
            return [_messages([*_system(item.get("meta_instruction")), *_of_moss(turns)])]
        case {"plain_text": str(text)} if text.lstrip().startswith("[Human]:"):
            said = [(who == "MOSS", words) for who, words in _SAID.findall(text)]
            return [_messages([_turn("assistant" if is_moss else "user", words) for is_moss, words in said])]
        case {"prompt": {"text": str(), "replies": list()} as root}:
            return [_messages(_replies(root))]
        case {"patterns": [str(), *_] as patterns, "responses": [str() as answer, *_]}:
            return [{"question": question, "answer": answer} for question in patterns]
        case {"questions": [str(), *_] | str() as questions, **rest}:
            return _of_questions([questions] if isinstance(questions, str) else questions, rest)
        case {"textbox_question": question, "textbox_answer": answer}:
            above = (item.get("textbox_q_instruction"), item.get("textbox_q_context"), question)
            asked = "\n".join(text.strip() for text in above if isinstance(text, str) and text.strip())
            return [{"question": asked, "answer": answer}]
        case {"data": [str(), str(), *_] as texts} if len(texts) % 2 == 0:
            return [{"messages": texts}] if all(isinstance(text, str) for text in texts) else None
    return None


def _of_questions(questions: list[Any], rest: Mapping[str, Any]) -> list[Any] | None:
    """Return a record for each question, with the other fields, such as `system`, copied into each.

    A single answer goes with all questions. If there are as many answers as questions, each has its own.
    Returns None for any other number of answers, and if `rest` has a question, turns, or a text that the
    questions are about.
    """
    name = next((name for name in ("answer", "answers", "答案", "response") if name in rest), "")
    answers = rest.get(name)
    others = {key: value for key, value in rest.items() if key != name and value not in (None, "", [], {})}
    parts = parts_of(others)
    if parts["question"] or parts["turns"] or parts["input"] or not _PASSAGE.isdisjoint(others):
        return None
    if isinstance(answers, list) and len(answers) == 1:
        (answers,) = answers
    if answers is None or (isinstance(answers, list) and len(answers) != len(questions)):
        return None
    each = answers if isinstance(answers, list) else [answers] * len(questions)
    return [{**others, "question": question, "answer": answer} for question, answer in zip(questions, each)]


def _turn(role: str, text: object) -> dict[str, Any]:
    return {"role": role, "content": text}


def _messages(turns: list[dict[str, Any]]) -> Any:
    kept = [turn for turn in turns if str(turn["content"]).strip()]
    return {"messages": kept} if kept else BadLine("a conversation without text")


def _system(text: object) -> list[dict[str, Any]]:
    return [_turn("system", text)] if isinstance(text, str) and text.strip() else []


# -- exports -------------------------------------------------------------------------------------------------


def _path(nodes: Mapping[str, Any], last: Any) -> list[dict[str, Any]]:
    """Return the turns on the path from the root to the node `last`, which the user saw last.

    If there is no node `last`, the path begins at the root and goes from each node to its last child.
    """
    if not isinstance(last, str) or last not in nodes:
        parents = {key: node.get("parent") for key, node in nodes.items()}
        roots = (key for key, up in parents.items() if not isinstance(up, str) or up not in nodes)
        last = next(roots, next(iter(nodes)))
        seen = {last}
        while children := [
            key
            for key in _list(nodes[last].get("children"))
            if isinstance(key, str) and key in nodes and key not in seen
        ]:
            last = children[-1]
            seen.add(last)
    path: list[Any] = []
    seen = set()
    while isinstance(last, str) and last in nodes and last not in seen:
        seen.add(last)
        path.append(nodes[last].get("message"))
        last = nodes[last].get("parent")
    return [turn for message in reversed(path) if isinstance(message, Mapping) for turn in _shown(message)]


def _shown(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield turns that the user wrote or saw. Tool calls, reasoning, hidden instructions are left out."""
    for part in _list(message.get("fragments")):  # DeepSeek's export divides a message into fragments
        role = (
            {"REQUEST": "user", "RESPONSE": "assistant"}.get(str(part.get("type")))
            if isinstance(part, Mapping)
            else None
        )
        if role:
            yield _turn(role, part.get("content"))
    author, content = message.get("author"), message.get("content")
    if not isinstance(author, Mapping) or not isinstance(content, Mapping):
        return
    hidden = isinstance(message.get("metadata"), Mapping) and message["metadata"].get(
        "is_visually_hidden_from_conversation"
    )
    role = str(author.get("role"))
    if role not in ("user", "assistant", "system") or hidden or message.get("recipient") not in (None, "all"):
        return
    if content.get("content_type") in _SHOWN:
        texts = [part for part in _list(content.get("parts")) if isinstance(part, str) and part.strip()]
        yield _turn(role, "\n".join(texts))


def _of_sender(message: Mapping[str, Any]) -> dict[str, Any]:
    parts = _list(message.get("content"))
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    text = "\n".join(each for each in texts if isinstance(each, str)) or message.get("text") or ""
    return _turn(str(message.get("sender")), text)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


# -- questions about a text ----------------------------------------------------------------------------------


def _questions(paragraph: Mapping[str, Any]) -> list[Any]:
    """Return one record for each question about a paragraph.

    The paragraph becomes the `input` of each record, so the model reads the question, then the paragraph.
    """
    context = paragraph.get("context", paragraph.get("context_text"))
    found: list[Any] = []
    for each in _list(paragraph.get("qas")):
        if not isinstance(each, Mapping):
            continue
        question = each.get("question", each.get("query_text"))
        answers = each.get("answers", each.get("answer"))
        if not answers:
            found.append(BadLine(NO_ANSWER))
            continue
        found.append({"question": question, "input": context, "answer": answers})
    return found


def _with_evidence(question: object, evidences: Mapping[str, Any]) -> Any:
    for each in evidences.values():
        answers = each.get("answer") if isinstance(each, Mapping) else None
        answers = [answers] if isinstance(answers, str) else _list(answers)
        answers = [text for text in answers if text != "no_answer"]
        if answers:
            return {"question": question, "answer": answers}
    return BadLine(NO_ANSWER)


# -- MOSS, OpenAssistant -------------------------------------------------------------------------------------


def _of_moss(turns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key in sorted(turns, key=lambda name: int(name[5:])):
        parts = lower_keys(turns[key]) if isinstance(turns[key], Mapping) else {}
        for name, role in (
            ("human", "user"),
            ("commands", "assistant"),
            ("tool responses", "tool"),
            ("moss", "assistant"),
        ):
            text = _MARK.sub("", str(parts.get(name, ""))).strip()
            if text and (name in ("human", "moss") or text.lower() != "none"):
                yield _turn(role, text)


def _replies(root: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    node: Any = root
    while node is not None:
        turns.append(_turn(_role(node), node.get("text")))
        node = _best([each for each in _list(node.get("replies")) if isinstance(each, Mapping)])
    return turns


def _role(message: Mapping[str, Any]) -> str:
    return "user" if message.get("role") == "prompter" else str(message.get("role"))


def _best(replies: list[Any]) -> Any:
    """Return the reply with the best rank, or the first if no reply has a rank; None without replies."""
    return min(replies, key=_rank, default=None)


def _rank(reply: Mapping[str, Any]) -> float:
    try:
        rank = float(reply.get("rank"))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):  # OverflowError: an integer too large for a float
        return math.inf
    return math.inf if math.isnan(rank) else rank


def is_message_tree(values: Iterable[Any]) -> bool:
    """Return True if each record is one message that names the message to which it replies (parent_id)."""
    items = [lower_keys(value) for value in values if isinstance(value, Mapping)]
    return bool(items) and all({"message_id", "parent_id", "role", "text"} <= item.keys() for item in items)


def message_trees(records: Iterable[Record]) -> Iterator[Record]:
    """Join messages into conversations. Each message that is not a reply begins a conversation.

    Records that are not messages are yielded before the conversations, each with a BadLine as its value.
    """
    roots: list[tuple[int, Any]] = []
    replies: dict[Any, list[Any]] = {}
    for record in records:
        item = lower_keys(record.value) if isinstance(record.value, Mapping) else {}
        if not isinstance(item.get("message_id"), str):
            bad = (
                record.value if isinstance(record.value, BadLine) else BadLine("no message with a message_id")
            )
            yield record._replace(value=bad)
        elif str(item.get("parent_id")).strip() in _NO_PARENT:
            roots.append((record.line, item))
        elif not isinstance(item["parent_id"], str):
            yield record._replace(value=BadLine("the parent_id of a message is no text"))
        else:
            replies.setdefault(item["parent_id"], []).append(item)
    for line, root in roots:
        turns, node, seen = list[dict[str, Any]](), root, set[str]()
        while node is not None and node["message_id"] not in seen:
            seen.add(node["message_id"])
            turns.append(_turn(_role(node), node.get("text")))
            node = _best(replies.get(node["message_id"], []))
        value = _messages(turns)
        yield Record(line, value, "" if isinstance(value, BadLine) else as_json(value))
