import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from app.engines.local.model import LoadedModel
from app.engines.local.text import StopGuard, TextStream


def pushed(guard: StopGuard, pieces: list[str]) -> str:
    shown = "".join(guard.push(piece) for piece in pieces)
    return shown if guard.stopped else shown + guard.flush()


@given(st.lists(st.text("ab#", max_size=4)), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=4))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    # What a stream shows is cut at the first stop string to be complete, so feed the reference letter by letter.
    for end in range(len(whole) + 1):
        if found := [at for at in (whole[:end].find(stop) for stop in stops) if at >= 0]:
            assert pushed(StopGuard(stops), list(whole)) == whole[: min(found)]
            break
    else:
        assert pushed(StopGuard(stops), pieces) == whole
    guard = StopGuard(stops)
    shown = pushed(guard, pieces)
    assert whole.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert guard.stopped == any(stop in whole for stop in stops)


@given(st.lists(st.text("ab#", max_size=4)))
def test_only_what_may_begin_a_stop_string_is_held_back(pieces: list[str]) -> None:
    guard, given_text, shown = StopGuard(["ab#"]), "", ""
    for piece in pieces:
        given_text += piece
        shown += guard.push(piece)
        if guard.stopped:
            return
        held = given_text[len(shown) :]
        assert held in ("", "a", "ab")


def test_characters_are_never_torn(tiny: LoadedModel) -> None:
    text = "Grüße 🙂 日本 𝔘𝕹𝖎"
    stream = TextStream(tiny.vocabulary, [])
    ids = tiny.vocabulary.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text)  # So some characters take several tokens.
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_dropped(tiny: LoadedModel) -> None:
    ids = tiny.vocabulary.encode("ok🙃", add_special_tokens=False).ids
    stream = TextStream(tiny.vocabulary, [])
    assert "".join(stream.push(token) for token in ids[:-1]) + stream.flush() == "ok"


def test_special_tokens_are_left_out(tiny: LoadedModel) -> None:
    ids = tiny.vocabulary.encode("a<|im_start|>b", add_special_tokens=False).ids
    stream = TextStream(tiny.vocabulary, [])
    assert "".join(stream.push(token) for token in ids) == "ab"


LETTERS = ["a", "b", "▁", "▁b", "é", "日"]


@pytest.fixture(scope="module")
def of_bytes() -> Tokenizer:
    """A vocabulary as Llama 2's, Mistral's and Gemma's: what it has no token for is written in bytes."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary |= {letter: 257 + n for n, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def as_tokens(*parts: str | int) -> list[int]:
    return [part + 1 if isinstance(part, int) else 257 + LETTERS.index(part) for part in parts]


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (as_tokens("a", 0xC3, 0xA9, "b"), ["a", "", "é", "b"]),
        (as_tokens(0xC3, 0xA9, 0xFF, "b"), ["", "é", "", "\ufffdb"]),
        (as_tokens(0xC3, 0xA9, 0xFF, "▁b", "a"), ["", "é", "", "\ufffd b", "a"]),
        (as_tokens(0xC3, 0xA9, 0xC3, "b", 0xC3, 0xA9), ["", "é", "", "\ufffdb", "", "é"]),
    ],
)
def test_a_byte_that_cannot_follow_is_shown_as_none_and_takes_nothing_back(
    of_bytes: Tokenizer, tokens: list[int], pieces: list[str]
) -> None:
    stream = TextStream(of_bytes, [])
    assert [stream.push(token) for token in tokens] == pieces


@given(st.lists(st.one_of(st.sampled_from(LETTERS), st.integers(0x70, 0xFF)), max_size=40))
def test_any_tokens_are_text_and_every_letter_of_it_is_there(of_bytes: Tokenizer, parts: list[str | int]) -> None:
    stream = TextStream(of_bytes, [])
    shown = "".join(stream.push(token) for token in as_tokens(*parts, "a"))
    written = [part.replace("▁", "") for part in (*parts, "a") if isinstance(part, str)]
    rest = iter(shown)
    assert all(letter in rest for letter in "".join(written))
