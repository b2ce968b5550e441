"""The page of an HTML file in a headless Chromium: its content, its keyboard, and no request to a network."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minigpt import lens
from minigpt.evaluation.report import write_report
from minigpt.evaluation.task_results import LoadedModel, run_task
from minigpt.evaluation.task_shapes import Style
from minigpt.evaluation.tasks import task_of_records
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.generation.api import generate_ids
from minigpt.generation.conversation import Conversation
from minigpt.generation.options import GenerationOptions
from minigpt.lens import curves, results
from minigpt.lens.reading import read_question
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.weights.html_file import write_html
from minigpt.weights.pretrained import save_pretrained
from tests.browser import Browser
from tests.commands import RunCommand

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or shutil.which("bash") is None, reason="chromium, which shows the page here, is missing"
)
CHARACTERS = Tokenizer.from_word2id(build_vocabulary(["天地玄黄宇宙洪荒？。，日月盈昃"]))
CODE = "document.documentElement.dataset.executed = 1"
# Each of these texts runs CODE if a page treats text as HTML, an attribute, an address, or a program.
ATTACKS = [
    attack.replace("CODE", CODE)
    for attack in (
        "<script>CODE</script>", "<img src=x onerror='CODE'>", "<svg onload='CODE'></svg>",
        "<svg><script>CODE</script></svg>", "</script><script>CODE</script>",
        "</title><script>CODE</script>", "</textarea><script>CODE</script>",
        "</style><script>CODE</script>", "--><script>CODE</script>", "<!--<script>CODE</script>",
        "<body onload='CODE'>", "<iframe srcdoc='<script>parent.CODE</script>'>",
        "<iframe src='javascript:parent.CODE'>", "<input autofocus onfocus='CODE'>",
        "<a href='javascript:CODE' autofocus onfocus='CODE'>x</a>",
        "<select autofocus onfocus='CODE'>", "<details open ontoggle='CODE'>",
        "<video><source onerror='CODE'></video>", "<audio src=x onerror='CODE'>",
        "<object data='javascript:CODE'>", "<embed src='javascript:CODE'>",
        "<meta http-equiv=refresh content='0;url=javascript:CODE'>", "<base href='javascript:CODE//'>",
        "<form action='javascript:CODE'><button>x</button></form>",
        "<math><mtext><img src=x onerror='CODE'></mtext></math>", "<marquee onstart='CODE'>x</marquee>",
        "<div style='animation:a' onanimationstart='CODE'>", "<p onmouseover='CODE'>x</p>",
        "<style>@import 'x'</style>", "<link rel=stylesheet href=x onerror='CODE'>",
        "<template><script>CODE</script></template>",
        "<noscript><p title='</noscript><img src=x onerror=CODE>'>", "\"><img src=x onerror='CODE'>",
        "'><img src=x onerror='CODE'>", "\" onfocus=\"CODE\" autofocus=\"", "' onclick='CODE' '",
        "javascript:CODE", "data:text/html,<script>CODE</script>", "${CODE}", "{{CODE}}", "`;CODE;`",
        "';CODE;'", "\";CODE;\"", "\\u003cscript\\u003eCODE\\u003c/script\\u003e",
        "&lt;script&gt;CODE&lt;/script&gt;", "&#60;img src=x onerror='CODE'&#62;",
        "<scr<script>ipt>CODE</scr</script>ipt>", "<IMG SRC=x OnErRoR='CODE'>",
        "<img/src=x/onerror=CODE>", "\u2028<script>CODE</script>\u2029",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> GPTLMHeadModel:
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "block_size": 64, "dropout": 0.0}
    network = GPTLMHeadModel(GPTConfig(**sizes, vocab_size=CHARACTERS.get_vocab_size()))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.eval()


@pytest.fixture(scope="module")
def page(model: GPTLMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("html") / "model.html"
    write_html(path, model, CHARACTERS, form="question", eos=[2], dtype="float32", name="天地")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as one:
        yield one


READY = "globalThis.minigptPage !== undefined"
DONE = "!minigptPage.busy"


def ask(browser: Browser, text: str) -> str:
    """Type a question, press Enter, and return the answer as the page shows it."""
    browser.run("document.getElementById('question').focus()")
    browser.type(text)
    browser.press("Enter")
    browser.until(DONE)
    shown: str = browser.run("[...document.querySelectorAll('.turn.model .body')].at(-1)?.textContent")
    return shown


def test_it_answers_as_minigpt_does(browser: Browser, page: Path, model: GPTLMHeadModel) -> None:
    browser.open(page)
    browser.until(READY)
    for question in ("天地？", "日月"):
        prompt = CHARACTERS.encode(question, None, pad_to_max_length=False)[0]
        [done] = generate_ids(model, [prompt], GenerationOptions(), [2])
        expected = CHARACTERS.decode(done.ids) + ("∎" if done.stop_reason == "eos" else "")
        assert ask(browser, question) == expected
    browser.run("document.getElementById('do_sample').click(), document.getElementById('seed').value = 7")
    prompt = CHARACTERS.encode("天？", None, pad_to_max_length=False)[0]
    [done] = generate_ids(model, [prompt], GenerationOptions(do_sample=True, seed=7), [2])
    assert ask(browser, "天？").removesuffix("∎") == CHARACTERS.decode(done.ids)
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]


def test_look_opens_the_page_with_its_question(
    browser: Browser, model: GPTLMHeadModel, tmp_path: Path, run_command: RunCommand
) -> None:
    save_pretrained(model, tmp_path / "model", CHARACTERS)
    path = tmp_path / "page.html"
    question = "天地？"
    flags = ["--layer", 1, "--head", 2, "--output", path]
    given = ["--model", tmp_path / "model", "--question", question]
    result = run_command("look", "attention", *given, *flags, "--language", "en")
    assert (result.code, result.err) == (0, "")
    assert str(path) in result.out
    seen = lens.attention(model, CHARACTERS, question)
    browser.open(path)
    browser.until(f"{READY} && {DONE}")
    turn = "document.querySelectorAll('.turn .body')"
    assert browser.run(f"{turn}[0].textContent") == question
    answer = CHARACTERS.decode(read_question(model, CHARACTERS, question).answer)
    assert browser.run(f"{turn}[1].textContent").removesuffix("∎") == answer
    tokens = "[...document.querySelectorAll('#strip .token')].map((one) => one.textContent)"
    assert browser.run(tokens) == seen.pieces
    first = seen.start + 1  # the first token of the answer is chosen
    assert browser.run("Number(document.querySelector('.token[aria-selected=true]').dataset.index)") == first
    assert browser.run("document.querySelector('#panel [aria-pressed=true]').dataset.control") == "head-2"
    drawn = browser.run(
        "((box) => [...minigptPage.model.attentionOf(box.layer, box.selected - 1)[2]])(minigptPage.glass)"
    )
    expected = seen.probabilities[1, 2, seen.start, : seen.start + 1]
    assert drawn == pytest.approx(expected.tolist(), abs=5e-3)  # weights of float16
    browser.run(
        "document.getElementById('tab-steps').click(), minigptPage.glass.stage = 99, minigptPage.glass.draw()"
    )
    assert "most likely" in browser.run("document.getElementById('panel').textContent")
    ask(browser, "日月")
    assert browser.run("document.querySelectorAll('.turn.model').length") == 2
    assert browser.errors == []
    assert browser.requests == [path.as_uri()]


def test_look_opens_the_page_with_a_text(
    browser: Browser, model: GPTLMHeadModel, tmp_path: Path, run_command: RunCommand
) -> None:
    """A text is read, not answered; a given answer is read, too."""
    save_pretrained(model, tmp_path / "model", CHARACTERS)
    (tmp_path / "text.txt").write_text("天地玄黄，" * 20, encoding="utf-8")
    given = ["--model", tmp_path / "model", "--output", tmp_path / "page.html"]
    result = run_command("look", "lens", *given, "--file", tmp_path / "text.txt")
    assert (result.code, result.err) == (0, "note: the text is long: its first 64 tokens are looked at\n")
    browser.open(tmp_path / "page.html", width=360, language="zh-CN")
    browser.until(f"{READY} && {DONE}")
    assert browser.run("document.querySelectorAll('#strip .token').length") == 64
    assert browser.run("[document.querySelectorAll('.turn.model').length, minigptPage.turns.length]") == [
        0,
        0,
    ]
    assert browser.run("minigptPage.glass.view") == "lens"
    assert browser.run("document.getElementById('tab-lens').getAttribute('aria-selected')") == "true"
    assert browser.run("document.documentElement.scrollWidth") <= 360
    result = run_command("look", *given, "--question", "天", "--answer", "月。")
    assert (result.code, result.err) == (0, "")
    browser.open(tmp_path / "page.html")
    browser.until(f"{READY} && {DONE}")
    assert browser.run("minigptPage.turns[0].answer") == "月。"
    browser.run(
        "document.getElementById('tab-steps').click(), minigptPage.glass.stage = 99, minigptPage.glass.draw()"
    )
    assert "read, not written" in browser.run("document.getElementById('panel').textContent")
    assert browser.errors == []


def test_the_views_follow_tokens_layers_and_sliders(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.until(READY)
    ask(browser, "天地玄黄？")
    panel = "document.getElementById('panel')"
    assert browser.run(f"{panel}.querySelectorAll('tbody tr').length") == 4  # heads
    heat = (
        "[...document.querySelectorAll('.token')].map((one) => one.style.getPropertyValue('--heat')).join()"
    )
    first = browser.run(heat)
    browser.run("document.querySelector('[data-control=head-2]').click()")
    assert (
        browser.run("document.querySelector('[data-control=head-2]').getAttribute('aria-pressed')") == "true"
    )
    assert browser.run(heat) != first
    which = f"{panel}.querySelector('.which').textContent"
    before = browser.run(which)
    over = "new MouseEvent('mouseover', {bubbles: true})"
    browser.run(f"document.querySelector('[data-index=\"9\"]').dispatchEvent({over})")
    assert "Token 10 " in browser.run(which) != before
    browser.run("document.getElementById('tab-distribution').click()")
    numbers = f"[...{panel}.querySelectorAll('tbody tr')].map((row) => row.children[2].textContent).join()"
    before = browser.run(numbers)
    slider = "document.getElementById('temperature')"
    browser.run(f"{slider}.value = 0.2, {slider}.dispatchEvent(new Event('input'))")
    assert browser.run(numbers) != before
    assert browser.run("document.getElementById('glass-temperature').value") == "0.2"
    browser.run("document.getElementById('tab-steps').click()")
    titles = []
    for _ in range(6):
        titles.append(browser.run(f"{panel}.querySelector('h3').textContent"))
        browser.run("document.querySelector('[data-control=stepOn]').click()")
    assert [title.split(":")[-1].split()[0] for title in titles] == [
        "Embedding",
        "attention",
        "MLP",
        "attention",
        "MLP",
        "Logits",
    ]
    assert browser.run("document.querySelector('[data-control=stepOn]').disabled")
    score = browser.run(f"{panel}.querySelector('td button').textContent")
    browser.run(f"{panel}.querySelector('td button').click()")
    last = "td:last-child')].map((one) => Number(one.textContent))"
    *products, total = browser.run(f"[...{panel}.querySelectorAll('.products tbody {last}")
    assert len(products) == 9
    assert abs(total - float(score)) < 0.006  # the score has two digits behind the point
    assert abs(sum(products) - total) < 0.001  # each has four
    browser.run("document.getElementById('tab-lens').click()")
    assert browser.run(f"{panel}.querySelectorAll('tbody tr').length") == 3
    assert browser.errors == []


def test_the_glass_box_follows_while_the_model_writes(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.until(READY)
    browser.run("document.getElementById('pace').value = 0.001")
    browser.run(
        "globalThis.seen = new Set(), new MutationObserver(() => seen.add(minigptPage.glass.selected))"
        ".observe(document.getElementById('panel'), {childList: true})"
    )
    ask(browser, "天地？")
    first, count = browser.run("[minigptPage.turns[0].prompt.length, minigptPage.turns[0].ids.length]")
    assert set(browser.run("[...seen]")) >= set(range(first, first + count))


def test_keys_do_all_of_it(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.until(READY)
    ask(browser, "天地玄黄？")
    browser.run("document.getElementById('strip').focus()")
    selected = "Number(document.querySelector('.token[aria-selected=true]').dataset.index)"
    for key, place in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        browser.press(key)
        assert browser.run(selected) == place
    browser.run("document.getElementById('tab-attention').focus()")
    browser.press("ArrowRight")
    assert browser.run("document.activeElement.id") == "tab-distribution"
    assert browser.run("minigptPage.glass.view") == "distribution"
    browser.run("document.getElementById('name').tabIndex = -1, document.getElementById('name').focus()")
    reached = set()
    for _ in range(40):
        browser.press("Tab")
        reached.add(browser.run("document.activeElement.id"))
    expected = {
        "language",
        "log",
        "question",
        "send",
        "clear",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
    }
    assert reached >= expected | {
        "repetition_penalty",
        "max_new_tokens",
        "seed",
        "strip",
        "tab-distribution",
        "panel",
    }


@pytest.mark.parametrize(("language", "title"), [("zh-CN", "对话"), ("en-US", "Conversation")])
def test_both_languages_at_the_width_of_a_phone(
    browser: Browser, page: Path, language: str, title: str
) -> None:
    browser.open(page, width=360, language=language)
    browser.until(READY)
    ask(browser, "天地玄黄？")
    for view in ("attention", "distribution", "steps", "lens"):
        browser.run(f"document.getElementById('tab-{view}').click()")
        if view == "steps":
            browser.run("minigptPage.glass.stage = 99, minigptPage.glass.draw()")
            browser.run("document.querySelector('#panel td button').click()")
        assert browser.run("document.documentElement.scrollWidth") <= 360, view
    assert browser.run("document.getElementById('chatTitle').textContent") == title
    assert browser.run("document.documentElement.lang") == language.replace("-US", "")
    browser.run("document.getElementById('language').click()")
    assert browser.run("document.getElementById('chatTitle').textContent") != title
    controls = "[...document.querySelectorAll('button, input, select, textarea')]"
    nameless = f"{controls}.filter((one) => !one.labels?.length && !one.textContent)"
    assert browser.run(f"{nameless}.length") == 0


def test_the_first_questions_can_be_looked_at_again(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.until(READY)
    ask(browser, "天地玄黄？")
    sequence = "minigptPage.glass.sequence.join()"
    first = browser.run(sequence)
    ask(browser, "日月")
    assert browser.run(sequence) != first
    browser.run("document.querySelectorAll('.turn.model .body')[0].firstChild.click()")
    assert browser.run(sequence) == first
    assert browser.run("minigptPage.model.ids.join()") == first.rsplit(",", 1)[0]


CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def test_a_chat_is_that_of_minigpt(browser: Browser, tmp_path: Path) -> None:
    # With 150 tokens of context and long answers, the oldest turns are finally left out, as in minigpt chat.
    tokenizer = BpeTokenizer.train(["low lower 你好"] * 3, 280, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = tokenizer.with_chat_template(CHATML)
    end = tokenizer.special_tokens["<|im_end|>"]
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    network = Qwen3ForCausalLM(Qwen3Config(size, 32, 48, 2, 4, 2, 8, max_position_embeddings=150)).eval()
    path = tmp_path / "a.html"
    options = {"do_sample": True, "temperature": 2.0, "top_k": 50}
    write_html(path, network, tokenizer, form="chat", eos=[end], options=options, dtype="float32")
    browser.open(path)
    browser.until(READY)
    browser.run("document.getElementById('max_new_tokens').value = 24")
    chosen = GenerationOptions(**options, max_new_tokens=24, seed=0, eos_token_id=end)  # type: ignore[arg-type]
    talk = Conversation(network, tokenizer, "chat", chosen)
    for text in ("你好", "low <|im_end|>", "lower\n", "你", "low", "好"):
        expected = "".join(talk.say(text))
        browser.run(f"document.getElementById('question').value = {json.dumps(text)}, minigptPage.ask()")
        browser.until(DONE)
        assert browser.run("minigptPage.turns.at(-1).prompt") == talk.turns[-1].prompt
        assert browser.run("minigptPage.turns.at(-1).ids") == talk.turns[-1].ids
        assert browser.run("minigptPage.turns.at(-1).answer") == expected
        shown = browser.run("[...document.querySelectorAll('.turn.model .body')].at(-1).textContent")
        assert shown.removesuffix("∎") == expected
    assert talk.forgotten > 0
    assert browser.errors == []


def test_what_cannot_be_said_is_said(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    browser.until(READY)
    ask(browser, "天" * 70)
    assert "71 tokens" in browser.run("document.getElementById('status').textContent")
    browser.run("document.getElementById('question').value = ''")
    ask(browser, "xyz")
    assert "x y z" in browser.run("document.getElementById('note').textContent")
    browser.open(page, before="delete globalThis.DecompressionStream")
    assert "DecompressionStream" in browser.run("document.getElementById('status').textContent")
    text = page.read_text(encoding="utf-8")
    place = text.index('class="weights">') + 3000
    (tmp_path / "cut.html").write_text(text[:place] + text[place + 400 :], encoding="utf-8")
    browser.open(tmp_path / "cut.html")
    browser.until("document.getElementById('status').textContent.includes('damaged')")


def harmless(browser: Browser, path: Path) -> None:
    assert browser.run("document.documentElement.dataset.executed") is None
    strange = (
        "img, svg, iframe, object, embed, video, audio, math, base, link, marquee, a, template, form + form"
    )
    assert browser.run(f"document.querySelectorAll('{strange}').length") == 0
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert browser.requests == [path.as_uri()]
    assert browser.errors == []


def test_attacks_in_questions_answers_and_tokens(browser: Browser, tmp_path: Path) -> None:
    # Each attack is one token, and part of the prompt. So views, tables and answers show all of them.
    assert len(ATTACKS) == 50
    tokenizer = BpeTokenizer.train([], 260).with_tokens(ATTACKS)
    size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    network = GPTLMHeadModel(
        GPTConfig(n_embd=16, n_head=2, n_layer=1, block_size=128, vocab_size=size, dropout=0.0)
    ).eval()
    path = tmp_path / "a.html"
    # The model writes nothing except attacks.
    only = {"do_sample": True, "temperature": 1.0}
    with torch.no_grad():
        network.transformer.ln_f.bias.copy_(torch.ones(16))
        network.lm_head.weight[size - 50 :] += 1
    write_html(path, network, tokenizer, form="text", eos=[1], options=only, name="x")
    browser.open(path)
    browser.until(READY)
    ids = tokenizer.definition.words
    for attack in ATTACKS:
        shown = ask(browser, attack)
        assert browser.run("minigptPage.turns.at(-1).prompt.join()") == str(ids[attack])
        assert any(other in shown for other in ATTACKS)
    for view in ("attention", "distribution", "steps", "lens"):
        browser.run(f"document.getElementById('tab-{view}').click()")
        for index in (1, 5, 9):
            browser.run(f"document.querySelector('#strip [data-index=\"{index}\"]').click()")
    said = browser.run("[...document.querySelectorAll('.turn.you .body')].map((one) => one.textContent)")
    assert said == ATTACKS
    harmless(browser, path)


def test_attacks_in_the_model_s_name(browser: Browser, model: GPTLMHeadModel, tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    for attack in ATTACKS:
        write_html(path, model, CHARACTERS, form="question", eos=[2], name=attack)
        browser.open(path)
        browser.until(READY)
        assert browser.run("document.getElementById('name').textContent") == attack
        assert browser.run("document.title") == attack
        harmless(browser, path)


# -- the pages of look and eval ----------------------------------------------------------------------------


def test_pages_of_look_and_eval_fit_a_phone_and_execute_nothing(
    browser: Browser, model: GPTLMHeadModel, tmp_path: Path
) -> None:
    question = "天地玄黄宇宙洪荒日月盈昃" * 3
    views = [lens.attention(model, CHARACTERS, question, "天"), lens.tokens(CHARACTERS, ATTACKS[0])]
    curve = curves.Curve(ATTACKS[1], 1, 2, 1.0, 1.0, 1, ([1, 2], [2.0, 1.0]), ([1], [1.0]), [1], ATTACKS)
    runs = curves.Runs([curve], ATTACKS)
    (tmp_path / "look.html").write_text(
        results.page([*views, runs], "zh", title=ATTACKS[5]), encoding="utf-8"
    )
    records = [{"question": f"天{a}", "choices": [f"地{a}", "日", "月"], "answer": 0} for a in ATTACKS]
    task = task_of_records(records, Style(), name=ATTACKS[1])
    found = run_task(LoadedModel(model, CHARACTERS), task)
    write_report(tmp_path, ATTACKS[0], [found])
    for name in ("look.html", "index.html"):
        browser.open(tmp_path / name, width=390)
        assert browser.run("document.documentElement.scrollWidth") == 390, name
        assert browser.run("document.documentElement.dataset.executed") is None
        assert browser.run("document.querySelectorAll('script, img, iframe, object, embed').length") == 0
        assert browser.requests == [(tmp_path / name).as_uri()]
