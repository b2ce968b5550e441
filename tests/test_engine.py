"""The engine: a request's result is the same as alone, whichever requests join, leave or are cancelled."""

import dataclasses
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.generation import native, sequence
from minigpt.generation.api import Completion, GenerationOptions, generate_ids
from minigpt.generation.cache import KeyValueCache, cache_bytes
from minigpt.generation.engine import Engine, EngineThread, QueueFullError, RequestHandle
from minigpt.generation.loop import DecodingLoop
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.weights.quantized import set_precision
from tests.marks import compiled

V, BLOCK, EOS = 40, 96, 2
MODELS: dict[str, Callable[[], LanguageModel]] = {
    "gpt": lambda: GPTLMHeadModel(GPTConfig(32, 2, 2, 0.1, BLOCK, V)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(V, 32, 40, 2, 4, 2, 8, BLOCK)),
}


def make(name: str = "gpt", seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Make a model with enlarged initial weights, like those of a trained model, so that its texts vary."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model.to(dtype)


def prompts_of(seed: int, count: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, V) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def options_of(seed: int, count: int) -> list[GenerationOptions]:
    """Return options of all kinds, and default options."""
    draw = random.Random(seed)
    kinds: list[Callable[[], dict[str, Any]]] = [
        dict,
        lambda: {"do_sample": True, "seed": draw.randrange(100), "temperature": 1.3, "top_p": 0.9},
        lambda: {"do_sample": True, "seed": draw.randrange(100), "top_k": 5, "repetition_penalty": 1.2},
        lambda: {"no_repeat_ngram_size": 2, "min_new_tokens": 1, "logit_bias": {5: 1.0}},
    ]
    return [
        GenerationOptions(max_new_tokens=draw.randint(1, 20), **draw.choice(kinds)()) for _ in range(count)
    ]


def alone(model: LanguageModel, prompt: list[int], options: GenerationOptions) -> Completion:
    return generate_ids(model, [prompt], options, EOS)[0]


def no_compiler(monkeypatch: pytest.MonkeyPatch, without: bool) -> None:
    if without:
        monkeypatch.setattr(native, "library", lambda: None)


# -- the same as alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_torch", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [64, 5])
def test_each_request_gets_what_it_gets_alone(
    name: str, chunk: int, in_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_compiler(monkeypatch, in_torch)
    model, prompts, options = make(name), prompts_of(1, 25), options_of(1, 25)
    expected = [alone(model, prompt, one) for prompt, one in zip(prompts, options)]
    assert {completion.stop_reason for completion in expected} == {"eos", "length"}
    engine = Engine(model, max_rows=4, chunk=chunk, prefix_mib=0.2)
    draw = random.Random(2)
    handles: list[RequestHandle] = []
    for prompt, one in zip(prompts, options):  # they come while others are written
        handles.append(engine.submit(prompt, one, EOS))
        for _ in range(draw.randint(0, 4)):
            engine.step()
    engine.run()
    assert [handle.result() for handle in handles] == expected
    assert [handle.tokens for handle in handles] == [completion.ids for completion in expected]
    assert engine.cache.n_free == 4
    assert engine.statistics.finished == 25
    assert engine.statistics.tokens_written == sum(len(completion.ids) for completion in expected)


@compiled
def test_int8_too() -> None:
    model = set_precision(make("qwen3"), "int8")
    prompts, options = prompts_of(3, 12), options_of(3, 12)
    engine = Engine(model, max_rows=5, chunk=7)
    handles = [engine.submit(prompt, one, EOS) for prompt, one in zip(prompts, options)]
    assert [handle.result() for handle in handles] == [
        alone(model, prompt, one) for prompt, one in zip(prompts, options)
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [96, 10])
def test_windows_slide_among_rows_that_have_none(name: str, chunk: int) -> None:
    model, prompts = make(name, dtype=torch.float64), prompts_of(7, 6)
    prompts[2] = prompts[2] * 60  # longer than the context
    prompts[2] = prompts[2][: 2 * BLOCK]
    options = [
        GenerationOptions(
            max_new_tokens=130 if number % 2 == 0 else 9, eos_token_id=[], do_sample=number < 3, seed=4,
            window=50 if number % 2 == 0 else None, sinks=4 if number % 4 == 0 else 0,
        )
        for number in range(6)
    ]  # fmt: skip
    expected = [alone(model, prompt, one) for prompt, one in zip(prompts, options)]
    assert max(len(completion.ids) for completion in expected) == 130
    engine = Engine(model, max_rows=3, chunk=chunk)
    handles = [engine.submit(prompt, one, EOS) for prompt, one in zip(prompts, options)]
    assert [handle.result() for handle in handles] == expected
    assert engine.cache.n_free == 3


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_rows_of_unlike_lengths_equal_rows_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the two views of the cache, and C, with the model without a cache, in double precision."""
    model, lengths = make(name, dtype=torch.float64).eval(), (3, 17, 1, 17)
    rows = [torch.randint(V, (length + 2,), generator=torch.Generator().manual_seed(7)) for length in lengths]
    cache = KeyValueCache(model.config, 4, 20, dtype=torch.float64)
    for held in (*cache.layer(0), *cache.layer(1)):
        assert not held.any()  # what is masked is a number
        held.fill_(1e3)  # what an earlier sequence may have left there
    slots = [cache.allocate() for _ in rows]
    for slot, row in zip(slots, rows):
        for piece in torch.split(row[:-2], 6):
            model.base_model(piece[None], past_key_values=cache.view([slot], [len(piece)]))
    for place in (-2, -1):
        view = cache.view(slots)
        ids = torch.stack([row[place] for row in rows])[:, None]
        hidden = model.base_model(ids, view.mask, view.positions, view)
        for row, found in zip(rows, hidden):
            expected = model.base_model(row[None, : len(row) + place + 1])[0, -1]
            # the same sums in double precision, in another order; outputs are of order 1
            torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)
    assert [cache.length(slot) for slot in slots] == [len(row) for row in rows]


@compiled
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_in_c_a_token_has_the_same_bits_in_any_company(name: str) -> None:
    model = make(name).eval()
    step = native.runner_for(model)
    assert isinstance(step, native.NativeRunner)
    texts = prompts_of(5, 4, longest=12)

    def pieces(text: list[int], seed: int) -> list[list[int]]:
        cuts = sorted(random.Random(seed).sample(range(1, len(text)), min(3, len(text) - 1)))
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]

    single = []
    for text in texts:
        cache = KeyValueCache(model.config, 1, 12)
        slot = cache.allocate()
        single.append(torch.cat([step.decode([[token]], [slot], cache).clone() for token in text]))
    # All texts are read at once, each in its own pieces, in shuffled slots. All logits are compared.
    cache = KeyValueCache(model.config, 6, 12)
    slots = random.Random(1).sample([cache.allocate() for _ in range(6)], 4)
    cut = [pieces(text, seed) for seed, text in enumerate(texts)]
    seen: list[list[torch.Tensor]] = [[] for _ in texts]
    for turn in range(max(map(len, cut))):
        going = [row for row in range(4) if turn < len(cut[row])]
        logits = step.prefill([cut[row][turn] for row in going], [slots[row] for row in going], cache)
        for place, row in enumerate(going):
            seen[row].append(logits[place].clone())
    for row, text in enumerate(texts):
        ends = [sum(map(len, cut[row][: turn + 1])) - 1 for turn in range(len(cut[row]))]
        assert torch.equal(torch.stack(seen[row]), single[row][ends])
        whole = KeyValueCache(model.config, 1, 12)
        found = step.decode([text], [whole.allocate()], whole)
        assert torch.equal(found, single[row])


# -- prefixes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_torch", [False, True])
def test_a_shared_beginning_is_read_once(in_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler(monkeypatch, in_torch)
    model, system = make("qwen3"), prompts_of(9, 1, longest=1)[0] * 21
    prompts = [system + prompt for prompt in prompts_of(4, 6, longest=10)]
    options = GenerationOptions(max_new_tokens=6)
    plain, shared = Engine(model, chunk=8), Engine(model, chunk=8, prefix_mib=1)
    expected = [plain.submit(prompt, options).result() for prompt in prompts]
    assert [shared.submit(prompt, options).result() for prompt in prompts] == expected
    first, *others = prompts
    # two whole blocks of 8 are common to all; where the third has the same ids by chance, it is, too
    assert shared.statistics.tokens_reused >= 16 * len(others)
    for engine in (plain, shared):
        assert engine.statistics.tokens_read + engine.statistics.tokens_reused == sum(map(len, prompts))
    assert plain.statistics.tokens_reused == 0
    # the same prompt again: all whole blocks, but never its last token
    before = shared.statistics.tokens_reused
    shared.submit(first[:16], options).result()
    assert shared.statistics.tokens_reused - before == 8


def test_the_store_stays_within_its_memory_and_drops_the_oldest_end() -> None:
    model = make()
    block = cache_bytes(model.config, 1, 8)
    engine = Engine(model, chunk=8, prefix_mib=3.5 * block / 2**20)
    assert engine.prefixes is not None
    assert engine.prefixes.bytes == 3 * block
    assert engine.bytes == engine.cache.bytes + 3 * block
    options = GenerationOptions(max_new_tokens=1)
    a, b, c = ([token] * 17 for token in (3, 4, 5))

    def reused(prompt: list[int]) -> int:
        before = engine.statistics.tokens_reused
        engine.submit(prompt, options).result()
        return engine.statistics.tokens_reused - before

    assert reused(a) == 0  # two blocks kept
    assert reused(a) == 16
    assert reused(b) == 0  # two more: the end of `a` goes, then its beginning
    assert reused(b) == 16
    assert reused(c[:9]) == 0
    assert reused(b) in (0, 16)
    assert reused(c) >= 8


def test_a_store_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"prefix_mib=0\.001 has no room for one block of 64 tokens, 0.03 MiB"
    ):
        Engine(make(), prefix_mib=0.001)


# -- joining and leaving ------------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_slot_at_the_next_token() -> None:
    model, options = make(), GenerationOptions(max_new_tokens=20, eos_token_id=[])
    engine = Engine(model, max_rows=2)
    first, second, third = (engine.submit([token], options) for token in (3, 4, 5))
    for _ in range(4):
        engine.step()
    assert (len(first.tokens), len(second.tokens), third.tokens) == (4, 4, [])
    assert (engine.running, engine.waiting, engine.cache.n_free) == (2, 1, 0)
    first.cancel()
    engine.step()
    assert first.result() == (first.tokens, "cancelled")
    assert (len(first.tokens), len(second.tokens), len(third.tokens)) == (4, 5, 1)
    assert (engine.running, engine.waiting) == (2, 0)
    third.cancel()
    third.cancel()
    engine.step()
    assert (engine.running, engine.cache.n_free, len(second.tokens)) == (1, 1, 6)
    assert second.result() == alone(model, [4], options)
    second.cancel()  # too late: no effect
    assert second.result().stop_reason == "length"
    assert engine.cache.n_free == 2
    assert (engine.statistics.cancelled, engine.statistics.finished) == (2, 1)


def test_cancelled_while_it_waits_or_is_being_read() -> None:
    engine = Engine(make(), max_rows=1, chunk=4)
    options = GenerationOptions(max_new_tokens=3)
    long, waits = engine.submit([3] * 40, options), engine.submit([4], options)
    engine.step()
    assert (engine.cache.length(0), long.tokens) == (4, [])
    waits.cancel()
    assert waits.result() == ([], "cancelled")
    long.cancel()
    assert not engine.step()
    assert long.result() == ([], "cancelled")
    assert engine.cache.n_free == 1


def test_a_long_prompt_does_not_stall_the_others() -> None:
    model = make()
    engine = Engine(model, max_rows=3, chunk=6)
    read: list[int] = []
    reader = engine.loop.runner
    original = reader.prefill

    def counting(pieces: Any, *rest: Any) -> Any:
        read.append(sum(map(len, pieces)))
        return original(pieces, *rest)

    reader.prefill = counting  # type: ignore[method-assign, assignment]
    options = GenerationOptions(max_new_tokens=30, eos_token_id=[])
    running = engine.submit([3, 4], options)
    engine.step()
    long = engine.submit([5] * 45, options)
    for step in range(1, 9):
        before = sum(read)
        engine.step()
        assert len(running.tokens) == 1 + step
        assert sum(read) - before <= 6
    assert len(long.tokens) == 1  # 45 tokens: 8 chunks
    engine.run()
    assert running.result() == alone(model, [3, 4], options)


def test_a_full_queue_is_an_error_and_empties() -> None:
    engine = Engine(make(), max_rows=2, max_waiting=1)
    options = GenerationOptions(max_new_tokens=3, eos_token_id=[])
    handles = [engine.submit([3], options) for _ in range(3)]
    for _ in range(2):
        with pytest.raises(
            QueueFullError, match=r"the queue is full: 1 requests wait already \(max_waiting\)"
        ):
            engine.submit([3], options)
        engine.step()
    handles[2].cancel()
    handles.append(engine.submit([4], options))
    engine.run()
    assert [handle.result().stop_reason for handle in handles] == ["length", "length", "cancelled", "length"]


def test_a_request_that_cannot_go_on_fails_alone() -> None:
    model = make()
    engine = Engine(model)
    options = GenerationOptions(max_new_tokens=5, eos_token_id=[])
    forbidding = GenerationOptions(bad_words_ids=[[token] for token in range(V)], max_new_tokens=5)
    good, bad = engine.submit([3], options), engine.submit([4], forbidding)
    with pytest.raises(InputError, match="the options forbid every token"):
        bad.result()
    with pytest.raises(InputError, match="the options forbid every token"):
        list(bad)
    assert good.result() == alone(model, [3], options)
    assert engine.cache.n_free == engine.cache.slots
    assert (engine.statistics.failed, engine.statistics.finished) == (1, 1)


class GivesUp:
    """A constraint that raises an error after some tokens, in `allowed` or in `after`."""

    def __init__(self, where: str, left: int = 3) -> None:
        self.where, self.left = where, left

    def allowed(self) -> range:
        if self.where == "allowed" and not self.left:
            raise InputError("regex is not understood: it grew too large")
        return range(3, V)

    def after(self, token: int) -> "GivesUp":
        if self.where == "after" and not self.left:
            raise InputError("regex is not understood: it grew too large")
        return GivesUp(self.where, self.left - 1)


GUESSES: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 1}, {"prompt_lookup_num_tokens": 3}]


@pytest.mark.parametrize("where", ["allowed", "after"])
@pytest.mark.parametrize("values", GUESSES)
def test_a_constraint_that_gives_up_ends_its_request_alone(
    where: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "make_constraint", lambda *_: GivesUp(where))
    model, options = make(), GenerationOptions(max_new_tokens=9, eos_token_id=[])
    engine = Engine(model)
    handles = [
        engine.submit([4], dataclasses.replace(options, regex=regex, **values)) for regex in ("a", None, "b")
    ]
    for bad in (handles[0], handles[2]):
        with pytest.raises(InputError, match=r"^regex is not understood: it grew too large$"):
            bad.result()
    assert handles[1].result() == alone(model, [4], dataclasses.replace(options, **values))
    assert engine.cache.n_free == engine.cache.slots
    assert (engine.statistics.failed, engine.statistics.finished) == (2, 1)


@pytest.mark.parametrize("where", ["allowed", "after"])
def test_of_sequences_whose_tokens_are_chosen_together_one_may_fail(where: str) -> None:
    model = make()
    request = sequence.Request(GenerationOptions(), [], constraint=GivesUp(where, 99))
    loop = DecodingLoop(model, KeyValueCache(model.config, 2, 20), 20)
    good, bad = sequence.Sequence([3], request, 5), sequence.Sequence([3], request, 5)
    bad.constraint = GivesUp(where, 1)
    for one in (good, bad):
        loop.add(one)
    ended = [loop.step() for _ in range(5)]
    assert [one for step in ended for one in step] == [bad, good]
    assert (str(bad.error), good.error) == ("regex is not understood: it grew too large", None)


@pytest.mark.parametrize("where", ["allowed", "after"])
@pytest.mark.parametrize("values", [{"num_beams": 3}, {"do_sample": True, "seed": 1}])
def test_beams_and_drawn_guesses_end_with_the_constraint_s_error(
    where: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "make_constraint", lambda *_: GivesUp(where))
    model, options = make(), GenerationOptions(max_new_tokens=9, regex="a", eos_token_id=[], **values)
    assistant = None if "num_beams" in values else make(seed=1)
    with pytest.raises(InputError, match=r"^regex is not understood: it grew too large$"):
        generate_ids(model, [[3]], options, EOS, assistant_model=assistant)


def test_numbers_that_a_failed_request_left_do_not_reach_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler(monkeypatch, True)  # C reads no masked column
    model = make("qwen3")
    model.base_model.embed_tokens.weight.data[V - 1] = torch.nan
    # tied: no row's scores may be NaN for that
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().nan_to_num())
    options = GenerationOptions(max_new_tokens=8, eos_token_id=[])
    engine = Engine(model, max_rows=2)
    long = engine.submit([3] * 40, options)
    with pytest.raises(InputError, match="the model's scores are not finite numbers"):
        engine.submit([4] * 20 + [V - 1], options).result()
    short = engine.submit([5], options)
    assert short.result() == alone(model, [5], options)
    assert long.result() == alone(model, [3] * 40, options)


def test_an_engine_may_be_made_in_inference_mode() -> None:
    model, options = make(), GenerationOptions(max_new_tokens=3)
    with torch.inference_mode():
        engine = Engine(model, chunk=8, prefix_mib=1)
    prompt = prompts_of(2, 1)[0] * 5
    expected = alone(model, prompt, options)
    assert [engine.submit(prompt, options).result().ids for _ in range(2)] == [expected.ids] * 2
    assert engine.statistics.tokens_reused > 0


def test_tokens_are_counted_by_one_thread() -> None:
    engine = Engine(make(), max_rows=1)
    options = GenerationOptions(max_new_tokens=3, eos_token_id=[])
    first, waits = engine.submit([3], options), engine.submit([4], options)
    update = waits._update

    def meanwhile(outcome: Any = None) -> int:  # while another thread cancels a waiting request
        assert first.result().ids
        return update(outcome)

    waits._update = meanwhile  # type: ignore[method-assign]
    waits.cancel()
    assert engine.statistics.tokens_written == 3


def test_stop_strings_and_ends_as_alone() -> None:
    class Letters:
        eos_token_id = EOS

        def encode_text(self, text: str) -> list[int]:
            return [ord(letter) - 60 for letter in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(60 + token) for token in ids)

        def unknown_characters(self, text: str) -> list[str]:
            return []

    model, tokenizer = make(seed=4), Letters()
    stops = ["A", "R", "CD", "H", "M"]
    options = GenerationOptions(stop_strings=stops, max_new_tokens=20, do_sample=True, seed=1)
    prompts = prompts_of(8, 12)
    expected = [generate_ids(model, [prompt], options, EOS, tokenizer=tokenizer)[0] for prompt in prompts]
    assert "stop_string" in {completion.stop_reason for completion in expected}
    engine = Engine(model)
    handles = [engine.submit(prompt, options, EOS, tokenizer) for prompt in prompts]
    assert [handle.result() for handle in handles] == expected


# -- threads ------------------------------------------------------------------------------------------------


def test_threads_may_ask_and_cancel_while_one_thread_writes() -> None:
    model, prompts, options = make(), prompts_of(6, 30), options_of(6, 30)
    expected = [alone(model, prompt, one) for prompt, one in zip(prompts, options)]
    before = threading.active_count()
    found: dict[int, list[int]] = {}
    with EngineThread(Engine(model, max_rows=4, max_waiting=100)) as engine:

        def ask(first: int) -> None:
            for number in range(first, 30, 3):
                handle = engine.submit(prompts[number], options[number], EOS)
                engine.submit(prompts[number], options[number], EOS).cancel()
                found[number] = list(handle)
                assert handle.result(timeout=60) == expected[number]

        users = [threading.Thread(target=ask, args=(first,)) for first in range(3)]
        for user in users:
            user.start()
        assert threading.active_count() <= before + 4
        for user in users:
            user.join(60)
    assert [found[number] for number in range(30)] == [completion.ids for completion in expected]
    assert engine.cache.n_free == 4
    assert engine.statistics.finished + engine.statistics.cancelled == 60
    assert threading.active_count() == before


def test_the_end_cancels_what_is_not_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    options = GenerationOptions(max_new_tokens=90, eos_token_id=[])
    thread = EngineThread(Engine(make(), max_rows=1))
    with thread as engine:
        step = engine.step

        def step_until_the_end_comes() -> bool:
            is_left = step()
            with engine.changed:  # after the first token: the end must come before the last one
                engine.changed.wait_for(lambda: thread._is_closing or engine.is_idle, timeout=60)
            return is_left

        monkeypatch.setattr(engine, "step", step_until_the_end_comes)
        handles = [engine.submit([3], options) for _ in range(3)]
        next(iter(handles[0]))
    reasons = [handle.result().stop_reason for handle in handles]
    assert reasons == ["cancelled"] * 3
    assert len(handles[0].tokens) == 1
    assert engine.is_idle
    assert engine.cache.n_free == 1
    with pytest.raises(InputError, match="the engine takes no more requests: it was closed"):
        engine.submit([3])


def test_a_failure_reaches_everybody_and_a_timeout_only_one() -> None:
    engine = Engine(make(), max_rows=1)
    gate = threading.Event()

    def broken(*_: object) -> torch.Tensor:
        gate.wait(60)
        raise RuntimeError("out of memory")

    engine.loop.runner.prefill = broken  # type: ignore[method-assign, assignment]
    with EngineThread(engine):
        handles = [engine.submit([3], GenerationOptions(max_new_tokens=3)) for _ in range(2)]
        with pytest.raises(TimeoutError, match=r"not ended after 0\.01 seconds"):
            handles[0].result(timeout=0.01)
        gate.set()
        for handle in handles:
            with pytest.raises(RuntimeError, match="out of memory"):
                handle.result(timeout=60)
        with pytest.raises(InputError, match="the engine takes no more requests: out of memory"):
            engine.submit([3])


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_rows": 0}, "max_rows must be at least 1: got max_rows=0"),
        ({"chunk": 0}, "chunk must be at least 1: got chunk=0"),
        (
            {"max_length": BLOCK + 1},
            f"max_length={BLOCK + 1} is more than the model reads: block_size={BLOCK}",
        ),
        ({"max_waiting": -1}, "must be at least 0: got max_waiting=-1"),
        (
            {"max_cache_mib": 0.1},
            "max_cache_mib=0.1 is too little: a cache of 8 rows of 95 tokens takes 0.37 MiB",
        ),
    ],
)
def test_sizes_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine(make(), **values)


@pytest.mark.parametrize(
    ("prompt", "values", "message"),
    [
        ([], {}, "prompt 1 is empty"),
        ([V], {}, f"prompt 1 has the id {V}"),
        ([3] * BLOCK, {}, f"prompt 1 has {BLOCK} tokens"),
        ([3] * 30, {}, "a prompt of 30 tokens and up to 1 new ones need max_length=31: .* max_length=30"),
        ([3] * 20, {"max_new_tokens": 11}, "up to 11 new ones need max_length=31"),
        ([3], {"num_beams": 2}, "num_beams=2: an engine writes one sequence for a request; use generate_ids"),
        ([3], {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2: an engine writes one"),
        ([3], {"output_logits": True}, "output_logits: an engine returns ids alone; use generate_output"),
        ([3], {"window": 30}, "window must be fewer tokens than max_length=30: got window=30"),
        ([3], {"max_cache_mib": 5}, "max_cache_mib=5 is the engine's: requests share a cache"),
        ([3], {"max_new_tokens": BLOCK}, "can never be reached"),
        ([3], {"stop_strings": "a"}, "stop_strings need the tokenizer"),
    ],
)
def test_what_is_refused_takes_no_slot(prompt: list[int], values: dict[str, Any], message: str) -> None:
    engine = Engine(make(), max_length=30)
    with pytest.raises(InputError, match=message):
        engine.submit(prompt, GenerationOptions(**values))
    assert engine.is_idle
    # room for 29 of its own and one new, or as many as there is room for
    assert len(engine.submit([3] * 29, GenerationOptions(eos_token_id=[])).result().ids) == 1
    assert len(engine.submit([3] * 20, GenerationOptions(eos_token_id=[])).result().ids) == 10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_windows_guesses_and_no_cache_go_with_an_engine(name: str, cuda_graph: bool) -> None:
    model, prompts = make(name, dtype=torch.float64), prompts_of(3, 8)
    values: list[dict[str, Any]] = [
        {"window": 9}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}, {},
        {"window": 20, "sinks": 3, "prompt_lookup_num_tokens": 2, "do_sample": True, "seed": 1},
        {"window": 9, "use_cache": False}, {"prompt_lookup_num_tokens": 3, "use_cache": False}, {},
    ]  # fmt: skip
    options = [
        GenerationOptions(max_new_tokens=110 if "window" in one else 15, eos_token_id=[], **one)
        for one in values
    ]
    expected = [alone(model, prompt, one) for prompt, one in zip(prompts, options)]
    engine = Engine(model, max_rows=3, cuda_graph=cuda_graph)
    handles = [engine.submit(prompt, one, EOS) for prompt, one in zip(prompts, options)]
    assert [handle.result() for handle in handles] == expected
    assert engine.cache.n_free == 3
