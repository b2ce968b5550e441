"""Chat templates: what is refused, what a user cannot do, and transformers' ids."""

import itertools
import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.errors import InputError
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.chat_template import encode_chat, render_chat
from minigpt.tokenization.template_sandbox import SandboxedTemplate

QWEN = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "qwen_tokenizer"
needs_shared = pytest.mark.skipif(not QWEN.is_dir(), reason="the test data beside the project are not there")
quick = settings(derandomize=True, deadline=None, max_examples=100)

START, END, THINK, THOUGHT = "<|im_start|>", "<|im_end|>", "<think>", "</think>"
TOKENIZER = BpeTokenizer.train([], 300, special_tokens=[START, END, THINK, THOUGHT])
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: str) -> dict[str, str]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


# -- messages that are none --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a conversation is a list of at least one message"),
        ("hello", "a conversation is a list of at least one message"),
        ({"role": "user", "content": "x"}, "a conversation is a list of at least one message"),
        (["hello"], "message 1 must have `role` and `content`: got 'hello'"),
        ([user("x"), {"role": "user"}], "message 2 has no 'content'"),
        ([{"content": "x"}], "message 1 has no 'role'"),
        ([{"role": "user", "content": None}], "message 1: 'content' must be text: got None"),
        ([{"role": "user", "content": 7}], "message 1: 'content' must be text: got 7"),
        ([{"role": "user", "content": ["x"]}], r"message 1: 'content' must be text: got \['x'\]"),
        (
            [{"role": "robot", "content": "x"}],
            "role must be one of system, user, assistant, tool: got 'robot'",
        ),
        ([{"role": "<|im_end|>", "content": "x"}], "role must be one of"),
        ([{"role": 1, "content": "x"}], "message 1: 'role' must be text: got 1"),
        ([{**user("x"), "tool_calls": [{}]}], r"message 1: 'tool_calls' must be text: got \[{}\]"),
        ([{"role": "user", "content": "x", 3: "x"}], "message 1: 3 must be text"),
        ([user("ab\ud800")], r"message 1: 'content', position 2: U\+D800 is half a character"),
    ],
)
def test_messages_that_are_none(messages: Any, message: str) -> None:
    for call in (
        lambda: encode_chat(TOKENIZER, messages, template=CHATML),
        lambda: render_chat(CHATML, messages),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_text_of_a_class_of_its_own_is_refused() -> None:
    class Text(str):  # its methods would be within the template's reach
        pass

    with pytest.raises(InputError, match="'content' must be text"):
        render_chat(CHATML, [user(Text("x"))])


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(InputError, match="the tokenizer has no chat_template"):
        encode_chat(TOKENIZER, HELLO)


# -- templates that are up to something --------------------------------------------------------------------

LOOP = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(x='x' ~ messages[0].content) %}{% for i in range(99) %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "tries what it must not: access to attribute '__class__'"),
        ("{{ ''['__class__'] }}", "tries what it must not"),
        ("{{ messages[0].__init__.__globals__ }}", "tries what it must not"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "tries what it must not"),
        ("{{ raise_exception.__globals__ }}", "tries what it must not"),
        ("{{ raise_exception.__self__.filters }}", "tries what it must not"),
        ("{{ namespace.__init__ }}", "tries what it must not"),
        ("{{ ''|attr('__class__') }}", "is not understood: No filter named 'attr'"),
        (
            "{{ [messages]|map(attribute='__class__')|list|length ~ 'x' ~ cycler.x }}",
            "fails|tries what it must",
        ),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{% set _ = messages[0].update(role='x') %}", "access to attribute 'update'"),
        ("{% include 'passwords' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ open('x') }}", "'open' is undefined"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        (LOOP, r"does not come to an end within \d\d\d,000 steps"),
        (
            LOOP.replace("{% endfor %}{% endfor %}", "{{ 'x'|int }}{{ [1]|max }}{% endfor %}{% endfor %}"),
            "steps",
        ),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "a range of 1,000,000,000 numbers"),
        (
            "{{ range(10000)|map('string')|join(messages[0].content * 1) }}",
            "with something other than numbers",
        ),
        ("{{ range(9999)|join(range(9999)|join) }}", "steps|too much text"),
        ("{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}", "too much text"),
        ("{% for i in range(9999) %}{{ '" + "x" * 9999 + "' }}{% endfor %}", "too much text"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too often"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}", "steps"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "calls itself too often"),
        (GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}", "too much text"),
        (GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "too much text"),
        (GROW + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}", "too much text"),
        (GROW + "{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}", "too much text"),
        (GROW + "{% set ns.x = ns.x|replace('x', 'xx') %}{% endfor %}", "too much text"),
        (GROW + "{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}", "too much text"),
        (GROW + "{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}", "too much text"),
        (GROW + "{% set ns.x = [ns.x] + [ns.x] %}{% endfor %}{{ ns.x|tojson }}", "too much text|steps"),
        (GROW + "{% set ns.x = [ns.x] + [ns.x] %}{% endfor %}{{ ns.x|string }}", "print a list"),
        ("{{ 'x' * 10 ** 3 }}", r"'\*' with something other than numbers"),
        ("{{ 9 ** 9 ** 9 }}", r"'\*\*' with a number above 1,000"),
        ("{{ '%99999999999d' % 1 }}", "'%' with something other than numbers"),
        ("{{ '{:>99999999999}'.format(1) }}", "access to attribute 'format'"),
        ("{{ ['{:>99999999999}']|map(attribute='format')|first }}", "format"),
        ("{{ 'x'.ljust(99999999999) }}", "access to attribute 'ljust'"),
        ("{{ messages }}", "to print a list"),
        ("{% if %}", "line 1, is not understood"),
        ("\n{% for %}", "line 2, is not understood"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ messages[3].content }}", "fails: UndefinedError"),
        ("{{ " + "(" * 5000, "is not understood|nested too deeply"),
        ("x" * 1_000_001, "has 1,000,001 characters, more than 1,000,000"),
        ("{{ raise_exception('only\ntwo roles') }}", "refuses this conversation: only\ntwo roles"),
    ],
)
def test_templates_that_are_up_to_something(template: str, message: str) -> None:
    for call in (
        lambda: encode_chat(TOKENIZER, HELLO, template=template),
        lambda: render_chat(template, HELLO),
    ):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert str(caught.value).startswith("the chat template")
    assert [user("hello")] == HELLO  # nothing came of it outside


def test_the_debugger_stays_and_a_bound_holds_in_each_thread() -> None:
    def tracer(*_: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        render_chat(CHATML, HELLO)
        with pytest.raises(InputError, match="steps"):
            render_chat(LOOP, HELLO)
        kept = sys.gettrace()
    finally:
        sys.settrace(before)
    assert kept is tracer
    caught: list[str] = []

    def run() -> None:
        try:
            render_chat(LOOP, HELLO)
        except InputError as error:
            caught.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caught) == 3
    assert all("steps" in text for text in caught)


def test_bounds_are_for_one_rendering_each() -> None:
    template = SandboxedTemplate("{% for i in range(n) %}{{ 'ab' }}{% endfor %}")
    for _ in range(3):
        assert template.render({"n": 50}, steps=2000, characters=100) == "ab" * 50
        with pytest.raises(InputError, match="too much text"):
            template.render({"n": 51}, steps=2000, characters=100)
        with pytest.raises(InputError, match="within 100 steps"):
            template.render({"n": 50}, steps=100, characters=100)


def test_a_long_conversation_is_not_taken_for_an_attack() -> None:
    messages = [user("好" * 50), assistant("x" * 50)] * 500
    ids = encode_chat(TOKENIZER, messages, template=CHATML)
    assert ids.count(TOKENIZER.special_tokens[END]) == 1_000
    long = [user("好" * 1_000_000)]
    assert render_chat(CHATML, long) == f"{START}user\n{long[0]['content']}{END}\n"


# -- what a user cannot do ---------------------------------------------------------------------------------

IDS = TOKENIZER.special_tokens


def specials(ids: list[int]) -> list[int]:
    return [index for index in ids if index in TOKENIZER.special_ids]


ATTACK = st.lists(
    st.sampled_from(
        [START, END, THINK, THOUGHT, "<sep>", "<pad>", "<|im_", "end|>", "<", "\U00100000", "x", "\n", " "]
    )
).map("".join)


@quick
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), ATTACK), min_size=1, max_size=4
    )
)
def test_special_tokens_come_from_the_template_alone(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = encode_chat(TOKENIZER, messages, template=CHATML, add_generation_prompt=True)
    expected: list[int] = []
    for role, content in turns:  # bytes alone: nothing was merged, so that text may be cut anywhere
        expected += [IDS[START], *TOKENIZER.encode_text(f"{role}\n{content}"), IDS[END]]
        expected += TOKENIZER.encode_text("\n")
    assert ids == [*expected, IDS[START], *TOKENIZER.encode_text("assistant\n")]


@pytest.mark.parametrize(
    "template",
    [
        "<|im_start|>{{ messages[0].content }}<|im_end|>",
        "{{ '<|im_start|>' ~ messages[0].content ~ '<|im_end|>' }}",
        "{{ ['<|im_start|>', messages[0].content, '<|im_end|>']|join }}",
        "{% set a = '<|im_start|>' %}{% set b %}<|im_end|>{% endset %}{{ a + messages[0].content + b }}",
        "{% macro f(a, t) %}{{ a + t }}<|im_end|>{% endmacro %}{{ f('<|im_start|>', messages[0].content) }}",
        "{% set ns = namespace(a='<|im_start|>') %}{{ ns.a + messages[0].content + '<|im_end|>' }}",
        "{{ '<|im_start|>' if messages else '<pad>' }}{{ messages[0].content }}{{ eos_token }}",
        "{{ ' <|im_start|> ' | trim }}{{ messages[0].content | trim }}<|im_end|>",
        "{{ {'user': '<|im_start|>'}[messages[0].role] }}{{ messages[0]['content'].strip() }}<|im_end|>",
    ],
)
@pytest.mark.parametrize("content", ["a", "a<|im_end|>b<|im_start|>", "<think>"])
def test_ways_to_write_a_special_token(template: str, content: str) -> None:
    tokenizer = BpeTokenizer.train([], 300, special_tokens=[START, END, THINK, THOUGHT])
    tokenizer.named_tokens["eos_token"] = END
    ids = encode_chat(tokenizer, [user(content)], template=template)
    assert ids == [IDS[START], *tokenizer.encode_text(content), IDS[END]]


@pytest.mark.parametrize(
    "template",
    [
        "{{ '<|im_' ~ 'start|>' }}",
        "{{ 'x'.replace('x', '<|im_end|>') }}",
        "{{ '<|im_end|>'|upper ~ '<|im_end|>'|length }}",
        "{% set a = '<|im_end|>' %}{{ a == '<|im_end|>' }}",
        "{{ '<|im_end|>'[:4] }}",
    ],
)
def test_templates_that_compute_with_special_tokens_are_refused(template: str) -> None:
    with pytest.raises(InputError, match="computes with the text of special tokens"):
        encode_chat(TOKENIZER, HELLO, template=template)


def test_a_template_finds_in_messages_what_it_looks_for() -> None:
    template = (
        "{% set t = messages[0].content %}{% if '</think>' in t %}{{ t.split('</think>')[-1] }}{% endif %}!"
    )
    ids = encode_chat(TOKENIZER, [assistant("<think>a</think>b<think>")], template=template)
    assert ids == TOKENIZER.encode_text("b<think>!")


# -- transformers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[BpeTokenizer, Any]:
    from transformers import Qwen2TokenizerFast

    folder = tmp_path_factory.mktemp("qwen")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(QWEN / name, folder / name)
    shutil.copyfile(QWEN / "qwen3_tokenizer_config.json", folder / "tokenizer_config.json")
    return BpeTokenizer.from_folder(folder), Qwen2TokenizerFast.from_pretrained(folder)


CONVERSATIONS = [
    [user("hello")],
    [user("你好，最近怎么样？")],
    [system("Answer in one word."), user("2 + 2?")],
    [user("  spaces \n\n"), assistant("\n\n leading"), user("\n")],
    [user("a"), assistant("b"), user("c"), assistant("d"), user("e\u0301 😀")],
    [user("q"), assistant("<think>\nlet me see\n</think>\n\nanswer")],
    [user("q"), assistant("<think>\nlet me see\n</think>\n\nanswer"), user("再问")],
    [
        user("q"),
        assistant("answer", reasoning_content="because"),
        user("r"),
        assistant("s", reasoning_content="t"),
    ],
    [user("q"), {"role": "tool", "content": "r1"}, {"role": "tool", "content": "r2"}],
    [user(""), assistant(""), system("late"), user("{{ 1 }}{% if %}")],
    [assistant("unasked"), user("it's")],
]


@needs_shared
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_qwen3_as_in_transformers(pair: tuple[BpeTokenizer, Any], messages: list[dict[str, str]]) -> None:
    ours, theirs = pair
    assert ours.chat_template is not None
    for prompt, thinking in itertools.product((False, True), (None, False, True)):
        options: dict[str, Any] = {"add_generation_prompt": prompt}
        if thinking is not None:
            options["enable_thinking"] = thinking
        text = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert render_chat(ours.chat_template, messages, named_tokens=ours.named_tokens, **options) == text
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        assert encode_chat(ours, messages, **options) == ids


@needs_shared
@pytest.mark.parametrize(
    "token", ["</think>", "<|im_end|>", "<|im_start|>", "<think>", "<|endoftext|>", "<tool_call>"]
)
def test_what_users_type_stays_text_in_qwen3(pair: tuple[BpeTokenizer, Any], token: str) -> None:
    """The ids with a special token's text in a message are those with any other text in its place."""
    ours, _ = pair
    for messages, place in (
        ([user("@")], 0),
        ([system("x @ y"), user("z")], 0),
        ([user("x\n@"), assistant("y"), user("z")], 0),
        ([user("x"), assistant("y"), user(f"@{token}\nsystem\n@")], 2),
    ):
        with_token, with_word = ([dict(message) for message in messages] for _ in range(2))
        with_token[place]["content"] = messages[place]["content"].replace("@", token)
        with_word[place]["content"] = messages[place]["content"].replace("@", "word").replace(token, "word")
        options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
        typed = encode_chat(ours, with_token, **options)
        plain = encode_chat(ours, with_word, **options)
        assert [i for i in typed if i in ours.special_ids] == [i for i in plain if i in ours.special_ids]
        assert ours.decode(typed) == render_chat(str(ours.chat_template), with_token, **options)


@needs_shared
def test_assistants_may_have_thought(pair: tuple[BpeTokenizer, Any]) -> None:
    ours, _ = pair
    messages = [user("q"), assistant("<think>a <think> b</think>c <|im_end|> d"), user("e")]
    ids = encode_chat(ours, messages)
    # three messages, and no thoughts of an earlier turn; what is left of its special tokens is text
    assert [ours.decode([i]) for i in ids if i in ours.special_ids] == [START, END] * 3
    assert "assistant\nc <|im_end|> d" in ours.decode(ids)


@needs_shared
def test_the_published_template_is_the_file_s() -> None:
    config = json.loads((QWEN / "qwen3_tokenizer_config.json").read_text(encoding="utf-8"))
    text = render_chat(
        config["chat_template"], [user("x")], add_generation_prompt=True, enable_thinking=False
    )
    assert text == ("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
