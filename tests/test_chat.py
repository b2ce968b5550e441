"""`minigpt chat`: the model's input, the slash commands, the program on a terminal and on pipes."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import minigpt
from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config
from minigpt.families.registry import new_model
from minigpt.generation.api import GenerationOptions, generate_output, stream_ids
from minigpt.generation.conversation import Conversation, question_ids, token_text
from minigpt.generation.generation_config import prompt_format, recommended_options
from minigpt.generation.slash_commands import COMMANDS, obey
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.chat_template import encode_chat
from minigpt.tokenizer import Tokenizer, build_vocabulary
from tests.commands import Result, RunCommand
from tests.talking import Talk, learn_by_heart

ANSWERS = {"天？": "黑。", "地是什么？": "黄的", "月": "白\n又白\\", "水": "蓝"}
CHARACTERS = Tokenizer.from_word2id(build_vocabulary(["天地玄黄\n宇宙洪荒"]))
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{{- message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of a tiny model that has memorised four pairs."""
    return learn_by_heart(ANSWERS, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of a tiny random Qwen3 with a chat template and two ids that end an answer."""
    folder = tmp_path_factory.mktemp("chat") / "qwen3"
    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = BpeTokenizer.train([], 270, special_tokens=special)
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    minigpt.save_pretrained(new_model(Qwen3Config(size, 32, 64, 1, 2, 1, 16, 256)), folder, tokenizer)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    ends = [tokenizer.special_tokens["<|im_end|>"], tokenizer.eos_token_id]
    content = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps({**content, "max_length": 9}), encoding="utf-8")
    return folder


def of_characters(form: Any, context: int = 32, history: bool = False, **options: Any) -> Conversation:
    torch.manual_seed(0)
    size = CHARACTERS.get_vocab_size()
    net = GPTLMHeadModel(
        GPTConfig(n_embd=16, n_head=2, n_layer=1, block_size=context, vocab_size=size, dropout=0.0)
    )
    options = {"max_new_tokens": 4, "min_new_tokens": 4, **options}
    return Conversation(net, CHARACTERS, form, GenerationOptions(**options), history=history)


def of_chat(folder: Path, **options: Any) -> Conversation:
    model, tokenizer = minigpt.load_model(folder), minigpt.load_tokenizer(folder)
    return Conversation(model, tokenizer, "chat", GenerationOptions(**{"max_new_tokens": 5, **options}))


def said(talk: Conversation, text: str) -> str:
    return "".join(talk.say(text))


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/tempreture 1", "unknown command '/tempreture'; did you mean '/temperature'?"),
        ("/xyzzy", "unknown command '/xyzzy'; known: /reset, /temperature,"),
        ("/", "unknown command '/'; known: "),
        ("/t 1", "/t may be /temperature, /top_p, /top_k, /think: type one more letter"),
        ("/s", "/s may be /seed, /system, /save"),
        ("/history perhaps", "/history must be on or off"),
        ("/why 0", "/why must be a whole number from 1 to 50: got '0'"),
        ("/why many", "/why must be a whole number from 1 to 50: got 'many'"),
        ("/temperature hot", "/temperature must be a number: got 'hot'"),
        (
            "/temperature -1",
            "temperature must be from 1e-06 to 1e+06 (do_sample=False takes the most likely token)",
        ),
        (
            "/temperature nan",
            "temperature must be from 1e-06 to 1e+06 (do_sample=False takes the most likely token)",
        ),
        ("/top_p 2", "top_p must be from 1e-12 to 1: got top_p=2.0"),
        ("/top_k 1.5", "/top_k must be a whole number: got '1.5'"),
        ("/seed -1", "seed must be from 0 to 9223372036854775807"),
        ("/max_new_tokens 32", "max_new_tokens=32 can never be reached: the model reads block_size=32"),
        ("/system be brief", "/system is for chat models"),
        ("/think on", "/think is for models whose chat template can switch thinking"),
        ("/why", "there is no answer yet"),
        ("/save", "/save needs a file name"),
        ("/save x.jsonl", "nothing was said yet"),
    ],
)
def test_commands_that_cannot_be_obeyed_change_nothing(line: str, message: str) -> None:
    talk = of_characters("question")
    before = talk.options
    with pytest.raises(InputError) as refused:
        obey(talk, line) or talk.why()  # the latter is what the command does besides
    assert message in str(refused.value)
    assert talk.options == before


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    talk = of_characters("question")
    said(talk, "天")
    path = tmp_path / "mine.jsonl"
    path.write_text("precious")
    with pytest.raises(InputError, match="exists already: choose another name"):
        obey(talk, f"/save {path}")
    assert path.read_text() == "precious"


def test_a_text_that_is_too_long_leaves_no_turn() -> None:
    talk = of_characters("question")
    with pytest.raises(InputError, match="has 41 tokens; the model reads block_size=32"):
        said(talk, "天" * 40)
    assert talk.turns == []
    assert said(talk, "天")


@pytest.mark.parametrize("content", ["{", "[]", '{"temperature": "warm"}', '{"eos_token_id": [-1]}'])
def test_advice_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        recommended_options(tmp_path)


def test_forms_that_a_tokenizer_cannot_have(chat_folder: Path) -> None:
    with pytest.raises(InputError, match="form=chat needs"):
        of_characters("chat")
    tokenizer = minigpt.load_tokenizer(chat_folder)
    tokenizer.sep_token_id = None  # as of the published ones
    with pytest.raises(InputError, match="form=question needs a tokenizer with <sep>"):
        question_ids(tokenizer, "question", "x")


# -- what the model reads -----------------------------------------------------------------------------------


def test_a_question_is_read_alone_unless_there_is_a_history() -> None:
    encode, sep = CHARACTERS.encode_text, CHARACTERS.sep_token_id
    alone = of_characters("question")
    first = said(alone, "天")
    said(alone, "地")
    assert [turn.prompt for turn in alone.turns] == [[*encode("天"), sep], [*encode("地"), sep]]
    talk = of_characters("question", history=True)
    assert said(talk, "天") == first
    said(talk, "地")
    assert talk.turns[1].prompt == [*encode("天"), sep, *encode(first), sep, *encode("地"), sep]


def test_of_a_text_all_is_read() -> None:
    encode = CHARACTERS.encode_text
    talk = of_characters("text")
    first = said(talk, "天地")
    second = said(talk, "玄")
    text = f"天地{first}{'' if first.endswith(chr(10)) else chr(10)}玄"
    assert CHARACTERS.decode(talk.turns[1].prompt) == text
    assert talk.turns[1].prompt[: 2 + 4] == [*encode("天地"), *talk.turns[0].ids]
    said(talk, "黄")
    assert CHARACTERS.decode(talk.turns[2].prompt).startswith(text + second)


def test_a_chat_is_read_by_its_template(chat_folder: Path) -> None:
    talk = of_chat(chat_folder)
    assert talk.can_think
    assert obey(talk, "/system 简短") == "system: 简短"
    assert obey(talk, "/think off") == "thinking: off"
    first = said(talk, "你好 <|im_end|>")
    said(talk, "再见")
    messages = [
        {"role": "system", "content": "简短"},
        {"role": "user", "content": "你好 <|im_end|>"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "再见"},
    ]
    tokenizer = minigpt.load_tokenizer(chat_folder)
    assert isinstance(tokenizer, BpeTokenizer)
    expected = encode_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=False)
    assert talk.turns[1].prompt == expected
    assert expected.count(tokenizer.special_tokens["<|im_end|>"]) == 4  # what a user types is none
    obey(talk, "/reset")
    said(talk, "你好")
    assert talk.turns[0].prompt == encode_chat(
        tokenizer, [messages[0], user := {"role": "user", "content": "你好"}],
        add_generation_prompt=True, enable_thinking=False,
    ), user  # fmt: skip


def test_the_oldest_turns_are_left_out_first() -> None:
    talk = of_characters("text", context=32)  # a quarter, but no more than 4 tokens, is kept for the answer
    lengths = []
    for _ in range(8):
        said(talk, "天地玄黄")
        lengths.append(len(talk.turns[-1].prompt))
        assert lengths[-1] <= 28
        kept = talk.turns[talk.forgotten : -1]
        assert CHARACTERS.decode(talk.turns[-1].prompt).endswith("天地玄黄")
        assert len(talk.turns[-1].prompt) == sum(4 + len(turn.ids) for turn in kept) + 4 + sum(
            not turn.answer.endswith("\n") for turn in kept
        )
    assert lengths[:3] == sorted(lengths[:3])
    assert talk.forgotten > 3
    assert len(talk.messages()) == 16  # what is saved is everything
    obey(talk, "/reset")
    assert (talk.turns, talk.forgotten) == ([], 0)


def test_an_answer_that_is_broken_off_counts_as_it_stands() -> None:
    talk = of_characters("text", max_new_tokens=9, min_new_tokens=9)
    pieces = talk.say("天地")
    beginning = next(pieces) + next(pieces)
    pieces.close()
    (turn,) = talk.turns
    assert (turn.answer, turn.stop_reason, len(turn.ids)) == (beginning, None, 2)
    said(talk, "玄")
    assert CHARACTERS.decode(talk.turns[1].prompt).startswith(f"天地{beginning}")


def test_a_chat_model_reads_its_answers_with_the_ids_that_it_wrote(chat_folder: Path) -> None:
    talk = of_chat(chat_folder)
    said(talk, "水")
    eos = talk.tokenizer.eos_token_id
    assert eos is not None
    written = [*talk.tokenizer.encode_text("\n"), *talk.tokenizer.encode_text("\n"), 4]
    text = talk.tokenizer.decode(written)
    assert talk.tokenizer.encode_text(text) != written  # 4 is a special token
    turn = dataclasses.replace(talk.turns[0], answer=text, ids=[*written, eos], stop_reason="eos")
    assert str(written)[1:-1] in str(talk._prompt([turn], "火"))
    assert str([*written, eos])[1:-1] not in str(talk._prompt([dataclasses.replace(turn, answer="水")], "火"))
    talk.turns = [turn]
    assert "token_ids" not in str(talk.messages())


def test_what_a_folder_advises(chat_folder: Path, model: Path, tmp_path: Path) -> None:
    found = recommended_options(chat_folder)
    assert found.pop("eos_token_id") == [4, 1]
    assert found == {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}  # and no length
    assert recommended_options(tmp_path) == {}
    assert prompt_format(chat_folder, minigpt.load_tokenizer(chat_folder)) == "chat"
    assert prompt_format(model, minigpt.load_tokenizer(model)) == "question"
    assert prompt_format(tmp_path, BpeTokenizer.train([], 259)) == "text"
    (tmp_path / "training_state.json").write_text('{"config": {"text": "novel.txt"}}')
    assert prompt_format(tmp_path, CHARACTERS) == "text"  # characters, but trained on plain text


# -- commands -----------------------------------------------------------------------------------------------


def test_settings_are_those_of_generation() -> None:
    talk = of_characters("question")
    assert obey(talk, "/temperature 0.8") == "temperature 0.8 (drawn at random)"
    assert obey(talk, "/top_p 0.9") == "top_p 0.9 (drawn at random)"
    obey(talk, "/top_k 5")
    obey(talk, "/seed 7")
    obey(talk, "/max_new_tokens 6")
    o = talk.options
    assert (o.do_sample, o.temperature, o.top_p, o.top_k, o.seed, o.max_new_tokens) == (
        True,
        0.8,
        0.9,
        5,
        7,
        6,
    )
    assert obey(talk, "/top_k") == "top_k 5 (drawn at random)"
    drawn = [said(talk, "天") for _ in range(2)]
    assert drawn[0] == drawn[1]  # the same seed
    assert "always the most likely" in obey(talk, "/temperature 0")
    assert not talk.options.do_sample
    assert all(name in obey(talk, "/help") for name in COMMANDS)


def test_what_is_saved_can_be_learned_from(tmp_path: Path) -> None:
    from minigpt.data.reader import read_conversations

    talk = of_characters("question")
    answers = [said(talk, "天"), said(talk, "地")]
    path = tmp_path / "talk.jsonl"
    assert obey(talk, f"/save {path}") == f"2 turns written to {path}"
    ((conversation,), _) = read_conversations(path)
    assert conversation.exchanges == (("天", answers[0]), ("地", answers[1]))
    said(talk, "玄")
    obey(talk, f"/save {path}")  # its own file again


def test_why_says_what_generation_s_own_record_says() -> None:
    talk = of_characters("question", temperature=0.5, do_sample=True, seed=1)
    said(talk, "天地")
    choices = talk.why(others=3)
    (turn,) = talk.turns
    options = GenerationOptions(
        max_new_tokens=4, min_new_tokens=4, temperature=0.5, do_sample=True, seed=1, logprobs=4
    )
    with torch.inference_mode():
        out = generate_output(talk.model, [turn.prompt], options, CHARACTERS.sep_token_id, CHARACTERS)
    assert [choice.token for choice in choices] == turn.ids == out.completions[0].ids
    assert out.logprobs is not None
    assert out.top_ids is not None
    assert out.top_logprobs is not None
    for step, choice in enumerate(choices):
        # one pass instead of steps with a cache: sums of some dozen float32 terms in another order
        assert choice.probability == pytest.approx(float(out.logprobs[0, step].exp()), rel=1e-4)
        top = zip(out.top_ids[0, step].tolist(), out.top_logprobs[0, step].exp().tolist())
        expected = [(token, p) for token, p in top if token != choice.token][:3]
        assert [token for token, _ in choice.others] == [token for token, _ in expected]
        assert [p for _, p in choice.others] == pytest.approx([p for _, p in expected], rel=1e-4)


def test_first_letters_are_a_command_too() -> None:
    talk = of_characters("question")
    assert obey(talk, "/temp 0.8") == "temperature 0.8 (drawn at random)"
    assert obey(talk, "/max 6") == "max_new_tokens 6"
    assert obey(talk, "/hist on") == "history: on, earlier turns are read, too"
    assert talk.history
    assert obey(talk, "/history off").startswith("history: off")
    assert not talk.history


def test_why_says_what_was_drawn_from() -> None:
    talk = of_characters("question", temperature=0.5, top_k=2, do_sample=True, seed=1)
    said(talk, "天地")
    everything = talk.model.config.vocab_size
    before = [choice.drawn for choice in talk.why(others=everything)]
    talk.choose(GenerationOptions())  # of the answer, not of the next one
    for choice, drawn in zip(talk.why(others=everything), before, strict=True):
        assert len(choice.others) == everything - 1
        assert choice.drawn == drawn
        model = torch.tensor([choice.probability, *(p for _, p in choice.others)])
        best = model.topk(2)
        # temperature 0.5 squares the odds, top_k 2 keeps two tokens
        odds = (best.values[0] / best.values[1]) ** 2
        expected = torch.zeros(everything)
        expected[best.indices] = torch.stack([odds / (1 + odds), 1 / (1 + odds)])
        assert drawn == pytest.approx(expected.tolist(), abs=1e-4)
    said(talk, "天地")
    assert all(choice.drawn == [] for choice in talk.why())


def test_an_eos_that_ended_the_answer_is_explained_too(model: Path) -> None:
    net, tokenizer = minigpt.load_model(model), minigpt.load_tokenizer(model)
    talk = Conversation(net, tokenizer, "question", GenerationOptions())
    assert said(talk, "水") == "蓝"
    assert [token_text(tokenizer, choice.token) for choice in talk.why()] == ["蓝", "<sep>"]
    assert all(choice.probability > 0.5 for choice in talk.why())  # learned by heart


def test_tokens_for_people(chat_folder: Path) -> None:
    tokenizer = minigpt.load_tokenizer(chat_folder)
    half, _ = tokenizer.encode_text("你")[0], None
    assert token_text(tokenizer, half) == "\\xe4"  # 你 is e4 bd a0
    assert token_text(tokenizer, 4) == "<|im_end|>"
    assert token_text(tokenizer, 10**6) == "<1000000>"  # a row of the embedding without a token


def test_ids_are_reported_while_they_are_streamed() -> None:
    talk = of_characters("text")
    ids: list[int] = []
    pieces = stream_ids(talk.model, CHARACTERS, [4, 5], talk.options, ids)
    seen = [(piece, len(ids)) for piece in pieces]
    assert [count for _, count in seen] == [1, 2, 3, 4]
    assert CHARACTERS.decode(ids) == "".join(piece for piece, _ in seen)


# -- the command, without a terminal -----------------------------------------------------------------------


Command = Callable[..., Result]


@pytest.fixture
def command(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return partial(run_command, "chat")


def test_a_line_gets_a_line(command: Command, model: Path) -> None:
    typed = "\ufeff天？\n\n月\n/seed 3\n水\n/exit\n天？\n".encode()
    result = command("--model", model, stdin=typed)
    assert (result.code, result.out) == (0, "黑。\n\n白\\n又白\\\n蓝\n")
    assert result.err == "seed 3 (always the most likely token: /temperature 1 draws)\n"
    numbers = command("--model", model, "--json", "--precision", "int8", stdin="水".encode())
    assert (numbers.out, numbers.err) == ('蓝\n{"questions": 1}\n', "")


def test_guesses_and_a_small_cache_change_no_answer(command: Command, model: Path) -> None:
    typed = "天？\n月\n水\n".encode()
    for flags in (
        ("--prompt_lookup_num_tokens", 2),
        ("--assistant_model", model, "--num_assistant_tokens", 3),
        ("--max_cache_mib", 1),
    ):
        assert command("--model", model, *flags, stdin=typed) == (0, "黑。\n白\\n又白\\\n蓝\n", ""), flags


def test_a_backslash_joins_lines(command: Command, model: Path) -> None:
    result = command("--model", model, stdin="天\\\n？\n水\\\n".encode())
    assert result.code == 0
    assert len(result.out.splitlines()) == 2
    assert result.err == ""  # the line end is in this vocabulary


def test_questions_that_cannot_be_answered_get_a_blank_line(command: Command, model: Path) -> None:
    result = command("--model", model, stdin=("水" * 30 + "\n水😀\n水\n").encode())
    assert result.code == 0
    assert result.out.split("\n")[0] == ""
    assert result.out.split("\n")[2:] == ["蓝", ""]
    assert "has 31 tokens; the model reads block_size=20" in result.err
    assert "not in the vocabulary, read as <unk>: '😀'" in result.err


def test_a_chat_model_on_pipes(command: Command, chat_folder: Path) -> None:
    flags = ("--seed", 1, "--max_new_tokens", 6, "--think", "off", "--system", "简短", "--top_k", 3)
    first, again = (command("--model", chat_folder, *flags, stdin="你好\n再见\n".encode()) for _ in range(2))
    assert first == again
    assert (first.code, len(first.out.splitlines())) == (0, 2)


@pytest.mark.parametrize(
    ("flags", "stdin", "message"),
    [
        (("--model", "nowhere"), b"", "nowhere does not exist: train a model first"),
        (
            ("--temperature", "-1"),
            b"",
            "temperature must be from 1e-06 to 1e+06 (do_sample=False takes the most likely token)",
        ),
        (("--form", "chat"), b"", "form=chat needs a model whose tokenizer has a chat_template"),
        (("--think", "on"), b"", "/think is for models whose chat template can switch thinking"),
        (("--system", "x"), b"", "/system is for chat models"),
        (("--max_new_tokens", "20"), b"", "max_new_tokens=20 can never be reached"),
        (("--precision", "int3"), b"", "--precision"),
        (("--assistant_model", "nowhere"), b"", "nowhere does not exist"),
        (("--prompt_lookup_num_tokens", "0"), b"", "prompt_lookup_num_tokens must be from 1 to 1000: got"),
        (("--num_assistant_tokens", "0"), b"", "num_assistant_tokens must be from 1 to 1000"),
        (("--max_cache_mib", "0"), b"", "max_cache_mib must be from 1e-06 to 1e+12"),
        (("--threads", "-1"), b"", "threads must be from 0 to 1024"),
        (("--tempreture", "1"), b"", "did you mean '--temperature'?"),
        ((), b"/tempreture 1\n", "did you mean '/temperature'?"),
        ((), b"/why\n", "/why draws a table: it needs a terminal"),
        ((), "你好\n".encode("gbk"), "standard input:1: not UTF-8 (byte 0xc4 at column 1)"),
    ],
)
def test_what_the_command_refuses(
    command: Command, model: Path, flags: tuple[str, ...], stdin: bytes, message: str
) -> None:
    flags = flags if "--model" in flags else ("--model", str(model), *flags)
    result = command(*flags, stdin=stdin)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1, result.err
    assert message in result.err


# -- the command, on a terminal ----------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
class TestOnATerminal:
    def test_a_conversation(self, model: Path, tmp_path: Path) -> None:
        talk = Talk("chat.py", "--model", str(model))
        talk.until("> ")
        assert "黄的\r\n" in talk.say("地是什么？").until("> ")
        assert "白\r\n又白\\\r\n" in talk.say("月").until("> ")  # a line end is a line end
        assert "did you mean '/reset'?" in talk.say("/rest").until("> ")
        shown = talk.say("/why 2").until("└")
        talk.until("\r\n")
        talk.until("> ")
        assert re.search(r"白 +│ +\d", shown)
        assert "<sep>" in shown
        assert "has 31 tokens" in talk.say("水" * 30).until("> ")  # and it goes on
        assert "read as <unk>: '😀'" in talk.say("水😀").until("> ")
        talk.say("天\\").until("... ")
        talk.say("？").until("> ")
        shown = talk.say(f"/save {tmp_path / 'talk.jsonl'}").until("> ")
        assert "turns written to" in shown
        messages = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
        assert messages[1] == {"role": "assistant", "content": "黄的"}
        assert messages[-2]["content"] == "天\n？"
        talk.say("/exit")
        assert talk.exit_code() == 0
        assert "Traceback" not in talk.close()

    def test_lines_that_are_pasted(self, model: Path, tmp_path: Path) -> None:
        talk = Talk("chat.py", "--model", str(model))
        talk.until("> ")
        talk.press("\x1b[200~天\r？\x1b[201~")
        talk.press("\r")
        talk.until("> ")
        talk.say(f"/save {tmp_path / 'talk.jsonl'}").until("turns written")
        messages = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
        assert messages[0]["content"] == "天\n？"
        assert len(messages) == 2
        talk.close()

    def test_ctrl_c_stops_the_answer_and_then_the_program(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        size = CHARACTERS.get_vocab_size()
        slow = GPTLMHeadModel(
            GPTConfig(n_embd=128, n_head=2, n_layer=8, block_size=20000, vocab_size=size, dropout=0.0)
        )
        minigpt.save_pretrained(slow, tmp_path / "slow", CHARACTERS)
        # fresh tied weights say the same character again and again: an answer of many seconds
        talk = Talk(
            "chat.py", "--model", str(tmp_path / "slow"), "--form", "text", "--max_new_tokens", "19000"
        )
        talk.until("> ")
        talk.say("天").until("天")
        talk.press("\x03")
        assert "(stopped)" in talk.until("> ")
        talk.interrupt()
        assert "(Ctrl-C once more, or Ctrl-D, leaves)" in talk.until("> ")
        talk.say("/reset").until("forgotten")  # the user changes the topic
        talk.until("> ")
        talk.interrupt()
        talk.until("leaves)")
        talk.until("> ")
        talk.interrupt()
        assert talk.exit_code() == 130
        assert "Traceback" not in talk.close()

    def test_ctrl_d_leaves(self, model: Path) -> None:
        talk = Talk("chat.py", "--model", str(model))
        talk.until("> ")
        talk.press("\x04")
        assert talk.exit_code() == 0
        talk.close()
