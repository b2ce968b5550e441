"""Batches: masks are exact, an epoch has each row once, and a batch depends only on its number."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt.data.batches import (
    BatchPlan,
    EncodedExamples,
    encode_conversation,
    encode_conversations,
    encode_prompt,
)
from minigpt.data.conversation import Conversation, Turn, conversation_of_pair
from minigpt.errors import InputError
from minigpt.tokenizer import Tokenizer, build_vocabulary

TOKENIZER = Tokenizer.from_word2id(build_vocabulary(["天地玄黄宇宙洪荒"]))
texts = st.text(alphabet="天地玄黄宇宙洪荒", min_size=1, max_size=12)
pair_lists = st.lists(st.tuples(texts, texts), min_size=1, max_size=40)
fast = settings(derandomize=True, deadline=None, max_examples=60)


def encoded(items: list[tuple[str, str]], max_length: int = 64) -> EncodedExamples:
    return encode_conversations(
        [conversation_of_pair(q, a, i + 1, "") for i, (q, a) in enumerate(items)], TOKENIZER, max_length
    )


@fast
@given(items=pair_lists, pad_to=st.sampled_from([0, 40]))
def test_a_batch_says_what_the_tokenizer_says(items: list[tuple[str, str]], pad_to: int) -> None:
    batch = encoded(items).batch(np.arange(len(items)), pad_to)
    for row, (question, answer) in enumerate(items):
        ids, mask = TOKENIZER.encode(question, answer, max_length=batch.input_ids.shape[1] + 1)
        assert batch.input_ids[row].tolist() == ids[:-1]
        assert batch.targets[row].tolist() == ids[1:]
        assert batch.token_mask[row].tolist() == [bool(m) for m in mask[1:]]
        # The answer's characters and its <sep> follow the question and the first <sep>.
        start, end = len(question) + 1, len(question) + 1 + len(answer) + 1
        expected = [start <= position < end for position in range(1, batch.targets.shape[1] + 1)]
        assert batch.answer_mask[row].tolist() == expected


@fast
@given(
    items=pair_lists,
    batch_size=st.integers(1, 9),
    tokens=st.sampled_from([0, 20, 60]),
    pad_to=st.sampled_from([0, 15]),
    by_length=st.booleans(),
    seed=st.integers(0, 5),
)
@example(items=[("天", "地")] * 6, batch_size=9, tokens=20, pad_to=15, by_length=True, seed=0)
def test_an_epoch_is_a_partition_and_pure(
    items: list[tuple[str, str]], batch_size: int, tokens: int, pad_to: int, by_length: bool, seed: int
) -> None:
    data = encoded(items)

    def new_plan() -> BatchPlan:
        return BatchPlan(
            data,
            batch_size=batch_size,
            tokens_per_batch=tokens,
            pad_to=pad_to,
            by_length=by_length,
            seed=seed,
        )

    plan = new_plan()
    for epoch in range(3):
        batches = [plan.rows(number) for number in range(epoch * len(plan), (epoch + 1) * len(plan))]
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(items)))
        for rows in batches:
            assert len(rows) <= batch_size
            width = max(pad_to, data.lengths[rows].max())
            assert not tokens or len(rows) == 1 or len(rows) * width <= tokens
    backwards = new_plan()
    for number in reversed(range(3 * len(plan))):
        assert (
            backwards.rows(number).tolist() == new_plan().rows(number).tolist() == plan.rows(number).tolist()
        )


def test_seed_and_epoch_change_the_order() -> None:
    data = encoded([("天" * (1 + i % 7), "地") for i in range(50)])
    plan = BatchPlan(data, batch_size=8, seed=1)
    epochs = [[plan.rows(e * len(plan) + i).tolist() for i in range(len(plan))] for e in (0, 1)]
    other = BatchPlan(data, batch_size=8, seed=2)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [other.rows(i).tolist() for i in range(len(other))]


def test_by_length_wastes_less_on_padding() -> None:
    random = np.random.default_rng(0)
    data = encoded([("天" * int(n), "地") for n in random.integers(1, 50, size=200)])

    def padded(by_length: bool) -> int:
        plan = BatchPlan(data, batch_size=16, by_length=by_length)
        return sum(data.batch(plan.rows(i)).input_ids.numel() for i in range(len(plan)))

    real = int((data.lengths - 1).sum())
    # 16 neighbours of 200 sorted lengths differ by a few tokens; 16 random ones are padded to nearly 50 each
    assert padded(by_length=True) < 1.15 * real < 1.5 * real < padded(by_length=False)


def test_a_cut_answer_is_kept_and_a_lost_one_left_out() -> None:
    data = encoded([("天地", "玄黄宇宙"), ("天地玄黄宇宙", "洪荒"), ("天", "地")], max_length=5)
    assert (len(data), data.n_cut, data.n_without_answer) == (2, 2, 1)
    assert data.lines.tolist() == [1, 3]
    assert TOKENIZER.decode(data.ids[:5].tolist()) == "天地<sep>玄黄"
    with pytest.raises(InputError, match="max_length=3"):
        encoded([("天地玄", "黄")], max_length=3)


def test_every_row_once_in_order() -> None:
    data = encoded([("天" * (1 + i % 5), "地") for i in range(23)])
    rows = np.concatenate([batch.rows for batch in data.in_order(4)])
    assert sorted(rows.tolist()) == list(range(23))
    assert (np.diff(data.lengths[rows]) >= 0).all()


def test_the_fingerprint_knows_text_and_boundaries() -> None:
    prints = {
        encoded(items).fingerprint
        for items in ([("天地", "玄")], [("天", "地玄")], [("天地", "黄")], [("天地", "玄"), ("天", "地")])
    }
    assert len(prints) == 4


# -- conversations -------------------------------------------------------------------------------------------


def conversation(*texts: str) -> Conversation:
    return Conversation(tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)))


def test_a_conversation_is_one_row_with_the_loss_on_every_answer() -> None:
    tokenizer = Tokenizer.from_word2id(build_vocabulary(["abcdefgh"]))
    sep = tokenizer.sep_token_id
    ids, is_answer, is_cut = encode_conversation(conversation("a", "bc", "d", "e"), tokenizer, 99)
    expected = [*"a", "/", *"bc", "/", *"d", "/", *"e", "/"]
    assert ids.tolist() == [sep if c == "/" else tokenizer.word2id[c] for c in expected]
    assert [c for c, counts in zip(expected, is_answer) if counts] == ["b", "c", "/", "e", "/"]
    assert not is_cut


def test_cutting_keeps_whole_questions_newest_first_and_as_a_prompt_too() -> None:
    tokenizer = Tokenizer.from_word2id(build_vocabulary(["abcdefgh"]))
    long = conversation("a", "b", "cc", "d", "ee", "f")  # 4, 5 and 5 tokens
    for limit, kept in (
        (14, "a/b/cc/d/ee/f/"),
        (13, "cc/d/ee/f/"),
        (10, "cc/d/ee/f/"),
        (9, "ee/f/"),
        (4, "ee/f"),
    ):
        ids, _, is_cut = encode_conversation(long, tokenizer, limit)
        assert tokenizer.decode(ids).replace("<sep>", "/") == kept
        assert is_cut == (limit < 14)
    for limit, kept in ((12, "a/b/cc/d/ee/"), (11, "cc/d/ee/"), (8, "cc/d/ee/"), (7, "ee/"), (1, "ee/")):
        prompt = encode_prompt(long.exchanges[:-1], "ee", tokenizer, limit)
        assert tokenizer.decode(prompt).replace("<sep>", "/") == kept


def test_system_texts_and_other_roles_are_part_of_the_question() -> None:
    turns = (
        Turn("system", "s"),
        Turn("user", "q"),
        Turn("assistant", "a"),
        Turn("tool", "t"),
        Turn("assistant", "b"),
    )
    assert Conversation(turns).exchanges == (("s\nq", "a"), ("t", "b"))
    assert Conversation((*turns, Turn("user", "left"))).exchanges == (("s\nq", "a"), ("t", "b"))
    assert Conversation((Turn("assistant", "hi"), *turns[1:3])).exchanges == (("", "hi"), ("q", "a"))
