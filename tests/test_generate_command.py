"""`minigpt generate`: a conversation, one question, many questions, and one helpful line for bad input."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import minigpt
from minigpt import devices
from minigpt.generation.api import GenerationOptions, generate_ids
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from tests import prepared
from tests.commands import Result, RunCommand, path_of, swallowed
from tests.talking import Talk, learn_by_heart

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = {"天？": "黑。", "地是什么？": "黄的", "月": "白\n又白\\", "山呢": "青\u2028", "水": "蓝"}
QUESTIONS = list(ANSWERS)
PRINTED = ["黑。", "黄的", "白\\n又白\\", "青\\u2028", "蓝"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of a tiny model that has memorised five pairs."""
    return learn_by_heart(ANSWERS, tmp_path_factory.mktemp("generate") / "model")


Command = Callable[..., Result]


@pytest.fixture
def command(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Return a function that runs `python ./minigpt/generate.py` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(run_command, "generate.py")


def lines(*texts: str) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def jsonl(*questions: str) -> bytes:
    return lines(*(json.dumps({"question": q, "answer": "?"}, ensure_ascii=False) for q in questions))


# -- answers ------------------------------------------------------------------------------------------------


def test_one_question(command: Command, model: Path) -> None:
    assert command("--model", model, "--question", "地是什么？") == (0, "黄的\n", "")
    result = command("--model", model, "--question", "月", "--json")
    assert json.loads(result.out) == {"question": "月", "answer": ANSWERS["月"], "stop_reason": "eos"}


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_standard_input_gives_a_line_for_each_line(command: Command, model: Path, batch_size: int) -> None:
    result = command("--model", model, "--batch_size", batch_size, stdin=lines(*QUESTIONS))
    assert (result.code, result.err) == (0, "")
    assert result.out.split("\n") == [*PRINTED, ""]


@pytest.mark.parametrize(
    "content",
    [
        lines(*QUESTIONS),
        lines(*QUESTIONS).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + lines(*QUESTIONS).removesuffix(b"\n"),
        jsonl(*QUESTIONS),
        b"\xef\xbb\xbf" + jsonl(*QUESTIONS).replace(b"\n", b"\n\n"),
    ],
    ids=["text", "CRLF", "byte order mark, no last line end", "JSONL", "JSONL with blank lines"],
)
def test_a_file_of_questions(command: Command, model: Path, content: bytes) -> None:
    Path("questions").write_bytes(content)
    result = command("--model", model, "--file", "questions")
    assert (result.code, result.err) == (0, "")
    assert result.out.split("\n") == [*PRINTED, ""]


def test_a_blank_line_gets_a_blank_answer(command: Command, model: Path) -> None:
    result = command("--model", model, stdin=lines("天？", "", " ", "水"))
    assert (result.code, result.out) == (0, "黑。\n\n\n蓝\n")
    assert result.err == "warning: 2 of 4 lines are blank: their answers are too\n"


def test_jsonl_out(command: Command, model: Path) -> None:
    expected = [{"question": q, "answer": a, "stop_reason": "eos"} for q, a in ANSWERS.items()]
    printed = command("--model", model, "--json", stdin=lines(*QUESTIONS))
    assert [json.loads(line) for line in printed.out.strip("\n").split("\n")] == expected
    Path("answers.jsonl").write_text("old")
    written = command("--model", model, "--output", "answers.jsonl", stdin=lines(*QUESTIONS))
    assert written == (0, "5 answers written to answers.jsonl\n", "")
    content = Path("answers.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in content.removesuffix("\n").split("\n")] == expected
    assert [entry.name for entry in Path().iterdir()] == ["answers.jsonl"]  # no temporary file
    summary = command("--model", model, "--output", "answers.jsonl", "--json", stdin=lines(*QUESTIONS))
    assert json.loads(summary.out.splitlines()[-1]) == {"questions": 5, "output": "answers.jsonl"}


def test_unknown_characters_are_named_once(command: Command, model: Path) -> None:
    result = command("--model", model, stdin=lines("天😀？", "月", "😀㐀"))
    assert result.code == 0
    assert len(result.out.split("\n")) == 4
    warnings = [line for line in result.err.splitlines() if "vocabulary" in line]
    assert warnings == ["warning: not in the vocabulary, read as <unk>: '😀' '㐀'; in 2 of 3 questions"]


def test_half_a_character_is_no_crash(command: Command, model: Path) -> None:
    """Linux passes a --question whose bytes are not UTF-8 in this form."""
    result = command("--model", model, "--question", "水\udcff", "--output", "answers.jsonl")
    assert result.code == 0
    assert "\\udcff" in result.err
    assert json.loads(Path("answers.jsonl").read_text(encoding="utf-8"))["question"] == "水\udcff"


def test_answers_that_were_cut_short_are_said_to_be(command: Command, model: Path) -> None:
    result = command("--model", model, "--max_new_tokens", 1, stdin=lines("天？", "水"))
    assert result.out == "黑\n蓝\n"
    assert result.err == "warning: 2 of 2 answers were cut short: 2 at --max_new_tokens 1\n"


def test_sampling(command: Command, model: Path) -> None:
    sampled = ("--model", model, "--do_sample", "--temperature", 3, "--top_k", 9, "--top_p", 0.99)
    stdin = lines(*QUESTIONS * 4)
    first, again, other = (command(*sampled, "--seed", seed, stdin=stdin).out for seed in (1, 1, 2))
    assert first == again != other
    assert command(*sampled, "--seed", 1, "--no_use_cache", "--batch_size", 3, stdin=stdin).out == first


def test_the_other_options(command: Command, model: Path) -> None:
    ask = ("--model", model, "--question", "水")
    assert command(*ask, "--num_beams", 3, "--length_penalty", 0.5, "--early_stopping").out == "蓝\n"
    assert command(*ask, "--stop_strings", "黄", "蓝").out == "\n"
    stopped = command("--model", model, "--question", "月", "--stop_strings", "\n", "--json")
    assert json.loads(stopped.out) == {"question": "月", "answer": "白", "stop_reason": "stop_string"}
    assert stopped.err == ""  # it ended where it should: it was not cut short
    lengths = ("--min_new_tokens", 4, "--max_new_tokens", 4)
    apart = ("--repetition_penalty", 1.1, "--presence_penalty", 9, "--frequency_penalty", 9)
    for flags in (("--no_repeat_ngram_size", 1), apart):
        shown = command(*ask, *lengths, *flags).out.removesuffix("\n")
        assert shown.startswith("蓝")
        assert shown.count("蓝") == 1
    sampled = ("--do_sample", "--seed", 1, "--min_p", 0.01, "--typical_p", 0.9)
    assert command(*ask, *sampled).out == command(*ask, *sampled).out


def test_the_answer_is_one_of_some(command: Command, model: Path) -> None:
    ask = ("--model", model, "--question", "水")
    assert command(*ask, "--choices", "黄", "白").out in ("黄\n", "白\n")
    assert command(*ask, "--regex", "[黑白]{2}").out.strip() in ("黑黑", "黑白", "白黑", "白白")
    assert "蓝" not in command(*ask, "--bad_words", "蓝").out


def test_several_answers_to_each_question(command: Command, model: Path) -> None:
    flags = ("--do_sample", "--temperature", 3, "--seed", 1, "--num_return_sequences", 3)
    result = command("--model", model, *flags, stdin=lines("天？", "", "水"))
    assert result.code == 0
    assert len(result.out.splitlines()) == 9
    assert result.out.splitlines()[3:6] == ["", "", ""]
    records = command("--model", model, *flags, "--json", stdin=lines("天？", "水")).out.splitlines()
    assert [json.loads(record)["question"] for record in records] == ["天？"] * 3 + ["水"] * 3
    assert [json.loads(record)["answer"] for record in records[:3]] == [
        text.replace("\\n", "\n") for text in result.out.splitlines()[:3]
    ]


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_weights_in_fewer_bits(command: Command, model: Path, precision: str) -> None:
    result = command("--model", model, "--precision", precision, stdin=lines(*QUESTIONS))
    assert result.out.split("\n") == [*PRINTED, ""]  # learned by heart: rounding changes no choice


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_folder_of_16_bits_answers_with_what_it_holds(
    command: Command, model: Path, dtype: torch.dtype
) -> None:
    net, tokenizer = minigpt.load_model(model), minigpt.load_tokenizer(model)
    minigpt.save_pretrained(net, "narrow", tokenizer, dtype=dtype)
    flags = ("--model", "narrow", "--json", "--do_sample", "--temperature", 2, "--seed", 3)
    as_stored, wide = (
        command(*flags, *more, stdin=lines(*QUESTIONS)) for more in ((), ("--precision", "float32"))
    )
    assert (as_stored.code, as_stored.err) == (0, "")
    assert as_stored.out == wide.out


def test_writing_on_from_a_prompt(command: Command, model: Path) -> None:
    net, tokenizer = minigpt.load_model(model), minigpt.load_tokenizer(model)
    ids = tokenizer.encode_text("地是")  # and no <sep>
    options = GenerationOptions(max_new_tokens=5)
    text = tokenizer.decode(generate_ids(net, [ids], options, tokenizer.sep_token_id)[0].ids)
    flags = ("--model", model, "--prompt", "地是", "--max_new_tokens", 5)
    assert command(*flags).out == f"{text}\n"
    assert command(*flags, "--stream").out == f"{text}\n"
    found = json.loads(command(*flags, "--json").out)
    assert (found["prompt"], found["text"]) == ("地是", text)


def test_a_model_of_bytes_writes_on(command: Command) -> None:
    tokenizer = BpeTokenizer.train(["天地玄黄"] * 3, 270)
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    config = GPTConfig(n_embd=16, n_head=2, n_layer=1, block_size=32, vocab_size=size + 5, dropout=0.0)
    net = GPTLMHeadModel(config)
    minigpt.save_pretrained(net, "bytes", tokenizer)
    options = GenerationOptions(max_new_tokens=8, min_new_tokens=8)
    prompt = [tokenizer.encode_text("天")]
    ids = generate_ids(minigpt.load_model("bytes"), prompt, options, 1, tokenizer=tokenizer)[0].ids
    flags = ("--model", "bytes", "--max_new_tokens", 8, "--min_new_tokens", 8, "--json")
    for name in ("prompt", "question"):  # without a template, a question is a text to continue
        found = json.loads(command(*flags, f"--{name}", "天").out)
        assert found["text" if name == "prompt" else "answer"] == tokenizer.decode(ids)


def test_guesses_and_a_small_cache_change_no_answer(command: Command, model: Path) -> None:
    for flags in (
        ("--prompt_lookup_num_tokens", 3),
        ("--prompt_lookup_num_tokens", 3, "--max_matching_ngram_size", 1),
        ("--assistant_model", model, "--num_assistant_tokens", 2),
        ("--max_cache_mib", 1),
        ("--window", 10, "--sinks", 2),
    ):
        result = command("--model", model, *flags, stdin=lines(*QUESTIONS))
        assert (result.code, result.err) == (0, ""), flags
        assert result.out.split("\n") == [*PRINTED, ""], flags
        asked = command("--model", model, *flags, "--question", "月", "--stream")
        assert asked == (0, "白\\n又白\\\n", ""), flags


def test_a_window_writes_beyond_the_context(command: Command, model: Path) -> None:
    flags = ("--model", model, "--prompt", "地是什么？" * 9, "--window", 12, "--sinks", 2)
    lengths = ("--max_new_tokens", 50, "--min_new_tokens", 50)
    found = json.loads(command(*flags, *lengths, "--json").out)
    assert found["stop_reason"] == "length"
    net, tokenizer = minigpt.load_model(model), minigpt.load_tokenizer(model)
    options = GenerationOptions(max_new_tokens=50, min_new_tokens=50)
    ids = tokenizer.encode_text("地是什么？" * 9)
    chosen = dataclasses.replace(options, window=12, sinks=2)
    slid = generate_ids(net, [ids], chosen, tokenizer.sep_token_id, tokenizer=tokenizer)[0].ids
    assert len(slid) == 50  # of a model that reads 20
    assert found["text"] == tokenizer.decode(slid)


def test_an_assistant_with_another_vocabulary(command: Command, model: Path) -> None:
    other = learn_by_heart({"天？": "黑"}, Path("other"))
    result = command("--model", model, "--assistant_model", other, "--question", "水")
    assert_refused(result, "the assistant model has vocab_size=", "both must have one tokenizer")


def test_a_streamed_answer_is_the_answer(command: Command, model: Path) -> None:
    for question, answer in zip(QUESTIONS, PRINTED):
        streamed = command("--model", model, "--question", question, "--stream")
        assert (streamed.code, streamed.out, streamed.err) == (0, f"{answer}\n", "")
    cut = command("--model", model, "--question", "天😀？", "--stream", "--max_new_tokens", 1)
    assert len(cut.out) == 2
    assert cut.err.splitlines() == [
        "warning: not in the vocabulary, read as <unk>: '😀'",
        "warning: 1 of 1 answers were cut short: 1 at --max_new_tokens 1",
    ]


def test_an_assistant_goes_with_itself(command: Command, model: Path) -> None:
    base = ("--model", model, "--question", "水", "--assistant_model", model)
    for flags, message in (
        (
            ("--prompt_lookup_num_tokens", 2),
            "assistant_model does not go with prompt_lookup_num_tokens: both",
        ),
        (("--num_beams", 2), "num_beams=2 does not go with assistant_model: a guess follows one sequence"),
    ):
        assert_refused(command(*base, *flags), message)


def test_what_guesses_nothing_says_so(command: Command, model: Path) -> None:
    flags = ("--max_matching_ngram_size", 2, "--num_assistant_tokens", 2)
    result = command("--model", model, "--question", "水", *flags)
    assert (result.code, result.out) == (0, "蓝\n")
    assert result.err.splitlines() == [
        "warning: without --prompt_lookup_num_tokens nothing is looked up: --max_matching_ngram_size changes "
        "nothing",
        "warning: without --assistant_model there are no guesses: --num_assistant_tokens changes nothing",
    ]


def test_greedy_says_once_that_it_ignores_the_temperature(command: Command, model: Path) -> None:
    flags = ("--temperature", 0.5, "--top_k", 3, "--seed", 7)
    result = command("--model", model, *flags, stdin=lines("水", "水"))
    assert (result.code, result.out) == (0, "蓝\n蓝\n")
    assert result.err.count("\n") == 1
    assert "without --do_sample" in result.err
    assert "--temperature, --top_k, --seed change" in result.err
    beams = command("--model", model, "--length_penalty", 0.5, "--early_stopping", stdin=lines("水"))
    assert beams.err == (
        "warning: without --num_beams one beginning is followed: --length_penalty, --early_stopping "
        "changes nothing\n"
    )


def test_the_verb_is_the_script(model: Path) -> None:
    done = prepared.run("-m", "minigpt", "generate", "--model", str(model), "--question", "水")
    assert (done.returncode, done.stdout, done.stderr) == (0, "蓝\n", "")


# -- what is refused ----------------------------------------------------------------------------------------


def assert_refused(result: Result, *fragments: str) -> None:
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("generate.py: error: ")
    for fragment in fragments:
        assert fragment in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temprature", "1"], "unknown flag '--temprature'; did you mean '--temperature'?"),
        (
            ["--temperature", "nan"],
            "temperature must be from 1e-06 to 1e+06 (do_sample=False takes the most likely token)",
        ),
        (["--temperature", "0", "--do_sample"], "got temperature=0.0"),
        (["--top_k", "-1"], "top_k must be from 0 to 1000000000: got top_k=-1"),
        (["--top_p", "0"], "top_p must be from 1e-12 to 1: got top_p=0.0"),
        (["--max_new_tokens", "0"], "max_new_tokens must be from 1 to 1000000000"),
        (["--max_new_tokens", "many"], "--max_new_tokens must be a whole number: got 'many'"),
        (["--max_new_tokens", "10000000"], "max_new_tokens=10000000 can never be reached: the model reads"),
        (["--min_new_tokens", "9", "--max_new_tokens", "8"], "min_new_tokens must be at most max_new_tokens"),
        (["--stop_strings", ""], "stop_strings must be texts of at least one character: got ''"),
        (["--num_beams", "1000000"], "num_beams must be from 1 to 1000: got num_beams=1000000"),
        (["--threads", "100000000"], "threads must be from 0 to 1024: got threads=100000000"),
        (["--temperature", "1" + "0" * 400], "got temperature=inf"),
        (["--seed", "1" + "0" * 400], "got seed=a number of 1329 bits"),
        (["--num_beams", "0"], "num_beams must be from 1 to 1000: got num_beams=0"),
        (["--num_beams", "2", "--do_sample"], "num_beams=2 does not go with do_sample: beam search takes"),
        (["--num_beams", "2", "--stream"], "num_beams=2 cannot be streamed"),
        (["--seed", "x"], "--seed must be a whole number: got 'x'"),
        (["--prompt", "x"], "--prompt is not a question: leave out --question and --file, or --prompt"),
        (["--bad_words", ""], "--bad_words must be texts of at least one character"),
        (["--num_return_sequences", "2"], "num_return_sequences=2 needs do_sample"),
        (["--choices", "a", "--regex", "b"], "choices and regex both say what the answer is"),
        (["--json_schema", "{"], "--json_schema is neither a file nor JSON: Expecting property name"),
        (["--json_schema", "nowhere.json"], "--json_schema is neither a file nor JSON: Expecting value"),
        (["--think", "on"], "--think is for chat models: this one has no chat_template"),
        (["--tools", "[]"], "--tools is for chat models: this one has no chat_template"),
        (["--precision", "int3"], "--precision"),
        (["--window", "0"], "window must be from 1 to 1000000000: got window=0"),
        (
            ["--window", "20"],
            "window must be fewer tokens than the model reads, block_size=20: got window=20",
        ),
        (["--sinks", "2"], "sinks are the first tokens of a window, and fewer than it has: got sinks=2"),
        (["--sinks", "5", "--window", "5"], "fewer than it has: got sinks=5, window=5"),
        (["--num_beams", "2", "--prompt_lookup_num_tokens", "2"], "num_beams=2 does not go with prompt_look"),
        (
            ["--prompt_lookup_num_tokens", "0"],
            "prompt_lookup_num_tokens must be from 1 to 1000",
        ),
        (
            ["--prompt_lookup_num_tokens", "2", "--max_matching_ngram_size", "0"],
            "max_matching_ngram_size must",
        ),
        (["--assistant_model", "nowhere"], "nowhere does not exist"),
        (["--max_cache_mib", "0.001"], "max_cache_mib=0.001 is too little: a cache of 1 rows of"),
        (["--max_cache_mib", "-1"], "max_cache_mib must be from 1e-06 to 1e+12"),
        (
            ["--temperature", "-1"],
            "temperature must be from 1e-06 to 1e+06 (do_sample=False takes the most likely token)",
        ),
        (["--top_p", "1.5"], "top_p must be from 1e-12 to 1: got top_p=1.5"),
        (["--top_p", "nan"], "top_p must be from 1e-12 to 1: got top_p=nan"),
        (["--stream", "--json"], "--stream shows text while it is being written"),
        (["--batch_size", "0"], "batch_size must be from 1 to 1000000: got batch_size=0"),
        (["--threads", "-1"], "threads must be from 0 to 1024: got threads=-1"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (
            ["--model", "nowhere"],
            "nowhere does not exist: train a model first (`minigpt train`; or `make demo`",
        ),
        (["--file", "questions.txt"], "--question asks one question, --file many: give one of them"),
        (["--question", " "], "--question is empty"),
        (
            ["--question", "水" * 20],
            "has 21 tokens; the model reads block_size=20, answer included: at most 19",
        ),
    ],
)
def test_bad_flags(command: Command, model: Path, arguments: list[str], message: str) -> None:
    given = arguments if "--question" in arguments else [*arguments, "--question", "水"]
    given = given if "--model" in given else [*given, "--model", str(model)]
    assert_refused(command(*given), message)


def test_prompts_that_are_none(command: Command, model: Path) -> None:
    assert_refused(
        command("--model", model, "--prompt", "水" * 20), "prompt 1 has 20 tokens; the model reads"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no question: one a line, or JSONL"),
        (b"\n \r\n", "holds no question"),
        ("你好\n再见\n".encode("gbk"), ":1: not UTF-8 (byte 0xc4 at column 1); convert it"),
        ("水\n月\n".encode("utf-16"), ":1: not UTF-8 (byte 0xff at column 1)"),
        (lines("水") + b"abc\xff\n", ":2: not UTF-8 (byte 0xff at column 4)"),
        (b'{"question": "a"}\n{"question": \n', ":2: broken JSON"),
        (b'{"question": "a"}\n{"answer": "b"}\n', ':2: no object with "question"'),
        (b'{"question": "a"}\n["b"]\n', ':2: no object with "question"'),
        (b'{"question": 5}', ':1: "question" must be text that is not empty: got 5'),
        (b'{"question": " "}', ':1: "question" must be text that is not empty'),
        (lines("天", "水" * 30), "question 2 ('水水水"),
    ],
)
def test_bad_questions(command: Command, model: Path, content: bytes, message: str) -> None:
    Path("questions").write_bytes(content)
    assert_refused(command("--model", model, "--file", "questions"), message)
    assert_refused(command("--model", model, stdin=content), message)


def test_many_answers_cannot_be_streamed(command: Command, model: Path) -> None:
    Path("questions").write_bytes(lines("水"))
    for flags in (["--file", "questions"], []):
        result = command("--model", model, "--stream", *flags, stdin=lines("水"))
        assert_refused(result, "--stream shows one answer: give --question, or ask in conversation")


def test_files_that_cannot_be_read(command: Command, model: Path) -> None:
    assert_refused(command("--model", model, "--file", "nothing.txt"), "nothing.txt", "No such file")
    assert_refused(command("--model", model, "--file", "."), "Is a directory")


def test_an_output_that_cannot_be_written(command: Command, model: Path) -> None:
    Path("folder").mkdir()
    result = command("--model", model, "--question", "水", "--output", "folder")
    assert_refused(result, "cannot write folder", "is a directory")


def test_model_folders_that_are_none(command: Command, model: Path) -> None:
    for name, message in (
        ("tokenizer.json", "tokenizer.json is missing"),
        ("config.json", "config.json is missing"),
        ("model.safetensors", "model.safetensors is missing"),
    ):
        folder = Path(f"without-{name}")
        shutil.copytree(model, folder)
        (folder / name).unlink()
        assert_refused(command("--model", folder, "--question", "水"), message)
    shutil.copytree(model, "cut")
    weights = Path("cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(command("--model", "cut", "--question", "水"), "model.safetensors")
    assert_refused(command("--model", weights, "--question", "水"), "is a file")


# -- a conversation -----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
class TestConversation:
    """The command on a pseudo-terminal, as a user sees it."""

    @pytest.fixture
    def talk(self, model: Path) -> Iterator[Talk]:
        talk = Talk("generate.py", "--model", str(model))
        yield talk
        talk.close()

    def test_until_an_empty_line(self, talk: Talk) -> None:
        talk.until("Q: ")
        assert "A: 黄的\r\n" in talk.say("地是什么？").until("Q: ")
        shown = talk.say("水" * 30).until("Q: ")
        assert "has 31 tokens" in shown  # and it goes on
        shown = talk.say("水😀").until("Q: ")
        assert "not in the vocabulary, read as <unk>: '😀'" in shown
        assert "A: 白\\n又白\\\r\n" in talk.say("  月 ").until("Q: ")
        talk.say("")
        assert talk.exit_code() == 0

    def test_in_pieces(self, model: Path) -> None:
        talk = Talk("generate.py", "--model", str(model), "--stream")
        talk.until("Q: ")
        assert "A: 黄的\r\n" in talk.say("地是什么？").until("Q: ")
        assert "has 31 tokens" in talk.say("水" * 30).until("Q: ")
        assert "A: 白\\n又白\\\r\n" in talk.say("月").until("Q: ")
        talk.say("")
        assert talk.exit_code() == 0
        talk.close()

    def test_until_ctrl_d_or_ctrl_c(self, talk: Talk, model: Path) -> None:
        talk.until("Q: ")
        talk.press("\x04")
        assert talk.exit_code() == 0
        other = Talk("generate.py", "--model", str(model))
        other.until("Q: ")
        other.interrupt()
        assert other.exit_code() == 130
        assert "Traceback" not in other.close()


@pytest.mark.parametrize("name", ["generate.py", "chat"])
@pytest.mark.parametrize("error", [None, ImportError("of torch")])
def test_a_signal_that_is_lost_while_the_model_is_loaded_is_obeyed(
    name: str,
    error: Exception | None,
    run_command: RunCommand,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "pick_device", swallowed(devices.pick_device, error))
    result = run_command(name, "--model", model, stdin=lines("月"))
    assert result == (143, "", f"{path_of(name).name}: terminated\n")
    monkeypatch.undo()
    assert run_command(name, "--model", model, stdin=lines("月")).code == 0  # nothing is remembered
