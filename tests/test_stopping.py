"""Text from ids, one by one: shown text never changes later, and in the end all text is shown."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.generation.options import GenerationOptions
from minigpt.generation.sequence import IncrementalDetokenizer, Request, StopChecker, cut


def from_bytes(ids: list[int]) -> str:
    """Decode a byte-level vocabulary. Ids below 256 are single bytes, the others several bytes."""
    longer = {256: b"\xe4\xbd\xa0", 257: b"\xe5\xa5", 258: b"\xbd ok", 259: b"\n\nQ", 260: b""}
    joined = b"".join(longer[index] if index > 255 else bytes([index]) for index in ids)
    return joined.decode("utf-8", "replace")


def pieces_of(ids: list[int], stops: list[str]) -> tuple[list[str], int]:
    """Return all pieces, and the number of ids that were read."""
    text = IncrementalDetokenizer(from_bytes, stops)
    pieces = []
    for count, token in enumerate(ids, 1):
        pieces.append(text.push(token))
        if text.stopped:
            return pieces, count
    return [*pieces, text.finish()], len(ids)


def test_a_character_of_several_tokens_comes_whole() -> None:
    pieces, _ = pieces_of([*"a你😀".encode(), 257, 258], [])
    assert pieces == ["a", "", "", "你", "", "", "", "😀", "", "好 ok", ""]


def test_half_a_character_at_the_end_is_shown_when_nothing_follows() -> None:
    assert pieces_of(list("你".encode()[:2]), []) == (["", "", "\ufffd"], 2)
    # Bytes that begin no character become U+FFFD as soon as another byte follows.
    assert pieces_of([0xFF, 0xFF, 0x61], [])[0] == ["", "\ufffd", "\ufffda", ""]
    # U+FFFD itself is a character of three bytes
    assert pieces_of([*"\ufffd".encode(), 0x61], [])[0] == ["", "", "", "\ufffda", ""]


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    assert pieces_of([*b"a<e<e", *b"nd>", *b"x"], ["<end>"]) == (["a", "", "", "<e", "", "", "", ""], 8)
    assert pieces_of([*b"a<en"], ["<end>"])[0] == ["a", "", "", "", "<en"]
    assert pieces_of([*b"ab", 259, *b"x"], ["\n"]) == (["a", "b", ""], 3)  # it ends inside a token
    assert pieces_of([257, 258, *b"x"], ["好 "]) == (["", ""], 2)  # and begins inside a character's bytes


def test_the_stop_string_that_begins_first_counts() -> None:
    assert cut("a12b", ["2b", "12"]) == "a"
    assert cut("a12b", ["x"]) == "a12b"
    assert cut("", ["x"]) == ""
    # "ab" is complete before "aabc" could be, so the text that was held back for "aabc" is cut, too.
    assert pieces_of([*b"xaab"], ["aabc", "ab"]) == (["x", "", "", "a"], 4)


STOPS = st.lists(st.text("ab你\n\ufffd", min_size=1, max_size=4), max_size=3)
IDS = st.lists(
    st.sampled_from([0x61, 0x62, 0x0A, 0xFF, *"你".encode(), 0xF0, 256, 257, 258, 259, 260]), max_size=20
)


@given(IDS, STOPS)
def test_pieces_joined_are_the_text(ids: list[int], stops: list[str]) -> None:
    pieces, read = pieces_of(ids, stops)
    assert "".join(pieces) == cut(from_bytes(ids[:read]), stops)
    if read < len(ids):
        assert cut(from_bytes(ids[:read]), stops) != from_bytes(ids[:read])


@given(IDS, STOPS)
def test_no_piece_needs_to_be_taken_back(ids: list[int], stops: list[str]) -> None:
    """The text that is shown after n ids is the beginning of every longer text."""
    pieces, read = pieces_of(ids, stops)
    for n in range(read):
        shown = "".join(pieces[:n])
        assert from_bytes(ids[:read]).startswith(shown)
        assert not any(stop in shown for stop in stops)
        for stop in stops:  # nor does what is shown end in a stop string's beginning, unless that has failed
            for length in range(1, len(stop)):
                continued = from_bytes(ids[:n])
                assert not (shown and shown == continued and continued.endswith(stop[:length]))


@given(st.text(), STOPS.filter(bool))
def test_cut_ends_at_the_first_match(text: str, stops: list[str]) -> None:
    found = re.search("|".join(map(re.escape, stops)), text)
    assert cut(text, stops) == (text[: found.start()] if found else text)


@pytest.mark.parametrize(
    ("limit", "pushed", "ids", "reason"),
    [
        (3, "ab", "ab", None),
        (3, "abc", "abc", "context"),  # three were possible, four were asked for
        (4, "abcd", "abcd", "length"),
        (4, "ab!", "ab", "eos"),
        (2, "a!", "a", "eos"),
        (4, "a..", "a..", "stop_string"),
        (3, "a..", "a..", "stop_string"),  # at the limit: what the text says counts
    ],
)
def test_why_a_row_has_ended(limit: int, pushed: str, ids: str, reason: str | None) -> None:
    options = GenerationOptions(max_new_tokens=4, stop_strings=[".."])
    checker = StopChecker(limit, Request(options, [ord("!")], lambda ids: "".join(map(chr, ids))))
    for character in pushed:
        assert checker.stop_reason is None
        checker.push(ord(character))
    assert (checker.ids, checker.stop_reason) == ([*map(ord, ids)], reason)
    assert checker.chosen == [*map(ord, pushed)]  # the eos, too
    if reason:
        assert checker.completion() == (checker.ids, reason)
