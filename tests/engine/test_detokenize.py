"""Text as it comes: the whole of it, never a broken character, never a piece of a stop string."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mixattn.engine.detokenize import IncrementalDetokenizer, StopStringMatcher
from mixattn.types import SamplingParams

EOS = 256


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def make_tokenizer() -> Tokenizer:
    """One token per byte (id = byte), then ``</s>``, which is special, and ``<x>``, which is not."""
    alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<x>", special=False)])
    return backend


TOKENIZER = make_tokenizer()


def run(token_ids: list[int], **params) -> tuple[list[str], IncrementalDetokenizer]:
    """The pieces let out for each token, and one for the end, as a request that its length ends."""
    detokenizer = IncrementalDetokenizer(TOKENIZER, SamplingParams(max_tokens=None, **params))
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    return [*pieces, detokenizer.finish()], detokenizer


def test_alphabet_is_the_tokenizer_s() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界", "👩‍👩‍👧 family", "\u0e44\u0e17\u0e22", "a\u0301"], ids=ascii)
def test_push_multi_byte_text_comes_whole_characters_at_a_time(text: str) -> None:
    pieces, detokenizer = run(list(text.encode()))
    assert "".join(pieces) == text == detokenizer.text
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 257), max_size=40))
@settings(max_examples=300)
def test_push_any_tokens_add_up_to_the_decoded_whole(token_ids: list[int]) -> None:
    pieces, detokenizer = run(token_ids)
    assert "".join(pieces) == TOKENIZER.decode(token_ids, skip_special_tokens=True) == detokenizer.text


def test_finish_half_a_character_is_a_replacement_character() -> None:
    pieces, _ = run(list("é".encode())[:1])
    assert pieces == ["", "\ufffd"]


def test_push_special_tokens_are_left_out_unless_asked_for() -> None:
    ids = [*b"a", EOS, *b"b", EOS + 1]
    assert "".join(run(ids)[0]) == "ab<x>"
    assert "".join(run(ids, skip_special_tokens=False)[0]) == "a</s>b<x>"


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "ab</s>")])
def test_push_stop_token_is_left_out_unless_included(include: bool, text: str) -> None:
    params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=include)
    detokenizer = IncrementalDetokenizer(TOKENIZER, params)
    for token_id in b"ab":
        detokenizer.push(token_id)
    detokenizer.push(EOS, is_stop_token=True)
    detokenizer.finish()
    assert detokenizer.text == text


def test_prompt_context_keeps_the_first_space_of_sentencepiece_style_decoders() -> None:
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    for prompt, text in (([], "b a"), ([0], " b a")):
        detokenizer = IncrementalDetokenizer(backend, SamplingParams(), prompt)
        assert detokenizer.push(1) + detokenizer.push(0) == text


def test_prompt_ending_within_a_character_is_no_context() -> None:
    prompt, rest = list("é".encode())[:1], list("é".encode())[1:]
    detokenizer = IncrementalDetokenizer(TOKENIZER, SamplingParams(), prompt)
    assert detokenizer.push(rest[0]) + detokenizer.push(ord("x")) == "\ufffdx"


@pytest.mark.parametrize(
    ("stop", "pieces", "let_out", "matched"),
    [
        (["END"], ["a", "bE", "N", "D", "c"], ["a", "b", "", "", ""], "END"),
        (["END"], ["aE", "x"], ["a", "Ex"], None),
        (["END"], ["aEN", "END"], ["a", "EN"], "END"),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], "aab"),
        (["b", "abc"], ["a", "b", "c"], ["", "a", ""], "b"),
        (["b", "abc"], ["abc"], ["a"], "b"),
        (["bc", "abc"], ["xabc"], ["x"], "abc"),
        (["x"], ["no"], ["no"], None),
        (["\n\n"], ["one\n", "two\n\nthree"], ["one", "\ntwo"], "\n\n"),
    ],
)
def test_matcher_lets_out_what_cannot_become_a_stop(
    stop: list, pieces: list, let_out: list, matched: str | None
) -> None:
    matcher = StopStringMatcher(stop)
    assert [matcher.push(piece) for piece in pieces] == let_out
    assert matcher.matched == matched


def test_matcher_without_a_match_gives_back_all_in_the_end() -> None:
    matcher = StopStringMatcher(["END"])
    assert matcher.push("the EN") + matcher.flush() == "the EN"


def test_matcher_include_lets_the_stop_string_out_with_the_last_piece() -> None:
    matcher = StopStringMatcher(["END"], include_in_output=True)
    assert [matcher.push(piece) for piece in ("a", "EN", "Dx")] == ["a", "", "END"]


@given(
    st.text("ab", max_size=24), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.randoms()
)
@settings(max_examples=500)
def test_matcher_any_cuts_give_the_same_text_and_match(text: str, stop: list[str], rng: random.Random) -> None:
    """By definition: the text before the stop string that ends first (the longest of those)."""
    ends = [(end, end - len(s), s) for s in stop for end in range(len(text) + 1) if text[:end].endswith(s)]
    _, begin, matched = min(ends, default=(len(text), len(text), None))
    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    matcher, let_out = StopStringMatcher(stop), ""
    for piece in pieces:
        let_out += matcher.push(piece)
        assert text[:begin].startswith(let_out), "a part of the stop string leaked"
    assert let_out + matcher.flush() == text[:begin]
    assert matcher.matched == matched


def test_push_stop_string_ends_the_text_and_what_follows_is_dropped() -> None:
    pieces, detokenizer = run(list(b"one. Two. Three"), stop=[". T"])
    assert "".join(pieces) == "one" == detokenizer.text
    assert detokenizer.stop_string == ". T"


def test_push_stop_string_before_min_tokens_is_not_looked_for() -> None:
    pieces, detokenizer = run(list(b"a.b.c"), stop=["."], min_tokens=2)
    assert "".join(pieces) == "a.b"
    assert detokenizer.stop_string == "."


def test_finish_stop_string_in_the_last_bytes_is_found() -> None:
    pieces, detokenizer = run([ord("a"), 0xC3], stop=["\ufffd"])
    assert "".join(pieces) == "a"
    assert detokenizer.stop_string == "\ufffd"
