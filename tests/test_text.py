"""pytest tests/test_text.py"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvtcap.errors import ConfigError
from pvtcap.text import IGNORE, SHARED, CaptionTokenizer, PackedRows

WORDS = ["a", "picture", "of", "cat", "dog", "##s", "on", "the", "mat", "'", "s", ",", "."]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
BERT = Path(__file__).parents[2] / "shared/data/blip"


def ids(tokenizer: CaptionTokenizer, text: str) -> list[int]:
    return [tokenizer.vocab.index(piece) for piece in text.split()]


def only_row(rows: PackedRows) -> PackedRows:
    """Its arrays without their first dimension."""
    return PackedRows(*(column for (column,) in vars(rows).values()))


def test_a_packed_row_spelled_out() -> None:
    tokenizer = CaptionTokenizer(VOCAB, prompt="a picture of ")
    row = only_row(tokenizer.pack([["Cats", "the dog"]], max_tokens=20))
    begin, end = tokenizer.begin_id, tokenizer.end_id
    prompt = ids(tokenizer, "a picture of")
    cats, the_dog = ids(tokenizer, "cat ##s"), ids(tokenizer, "the dog")
    assert row.tokens.tolist() == [begin, *prompt, *cats, *the_dog]
    assert row.positions.tolist() == [*range(4), 4, 5, 4, 5]
    assert row.segments.tolist() == [SHARED] * 4 + [1] * 2 + [2] * 2
    assert row.labels.tolist() == [*cats, end, *the_dog, end]
    assert row.predictors.tolist() == [3, 4, 5, 3, 6, 7]  # "of" has the first of both
    assert (tokenizer.begin_id, tokenizer.size) == (len(VOCAB), len(VOCAB) + 2)


def test_a_long_caption_is_cut_and_has_no_end_to_learn() -> None:
    tokenizer = CaptionTokenizer(VOCAB)
    row = only_row(tokenizer.pack([["the cat on the mat"]], max_tokens=4))
    assert row.tokens.tolist() == [tokenizer.begin_id, *ids(tokenizer, "the cat on")]
    assert row.labels.tolist() == ids(tokenizer, "the cat on the")


def test_padding_has_no_label_and_a_segment_of_its_own() -> None:
    tokenizer = CaptionTokenizer(VOCAB)
    rows = tokenizer.pack([["cat"], ["the dog on the mat", "a"]], 9)
    assert (rows.tokens.shape, rows.labels.shape) == ((2, 7), (2, 8))
    assert rows.labels[0].tolist()[2:] == [IGNORE] * 6
    assert rows.segments[0].tolist() == [SHARED, 1, -1, -1, -1, -1, -1]
    assert rows.tokens[0, 2:].tolist() == [tokenizer.pad_id] * 5


captions_of_a_photo = st.lists(st.sampled_from(["cat", "dogs", "on the mat", ""]), min_size=1, max_size=4)


@given(st.lists(captions_of_a_photo, min_size=1), st.sampled_from(["", "a picture of"]), st.integers(5, 7))
def test_each_row_of_a_batch_is_the_row_of_its_photo_alone(photos: list[list[str]], prompt: str, longest: int) -> None:
    tokenizer = CaptionTokenizer(VOCAB, prompt)
    rows = tokenizer.pack(photos, longest)
    for number, captions in enumerate(photos):
        alone = only_row(tokenizer.pack([captions], longest))
        for name in vars(rows):
            row, expected = getattr(rows, name)[number], getattr(alone, name)
            assert row[: len(expected)].tolist() == expected.tolist()
        assert set(rows.segments[number, len(alone.tokens) :].tolist()) <= {-1}
        assert set(rows.labels[number, len(alone.labels) :].tolist()) <= {IGNORE}
        # And of its captions alone, one behind the other, with what they share before them.
        each = [only_row(tokenizer.pack([[caption]], longest)) for caption in captions]
        shared = len(tokenizer.prefix)
        for name in ("tokens", "positions"):
            own = [value for row in each for value in getattr(row, name)[shared:].tolist()]
            assert getattr(alone, name).tolist() == getattr(each[0], name)[:shared].tolist() + own
        places = [place for place, row in enumerate(each, start=1) for _ in row.tokens[shared:]]
        assert alone.segments.tolist() == [SHARED] * shared + places
        assert alone.labels.tolist() == [label for row in each for label in row.labels.tolist()]
        following = [alone.tokens[place] for place in alone.predictors]
        assert following == [row.tokens[place] for row in each for place in row.predictors]


@pytest.mark.parametrize("longest", [1, 3, 4, 5])
def test_a_caption_has_no_room_behind_a_long_prompt(longest: int) -> None:
    tokenizer = CaptionTokenizer(VOCAB, "a picture of")
    row = only_row(tokenizer.pack([["cat on", "the dog"]], longest))
    own = ids(tokenizer, "cat the") if longest == 5 else []
    labels = {4: "cat the", 5: "cat on the dog"}.get(longest)
    assert row.tokens.tolist() == [*tokenizer.prefix[:longest], *own]
    assert row.labels.tolist() == ([IGNORE] if labels is None else ids(tokenizer, labels))


def test_where_no_photo_has_a_caption_a_token_without_a_label_stands_in() -> None:
    rows = CaptionTokenizer(VOCAB, "a picture of").pack([[], []], 7)
    assert (rows.segments.tolist(), rows.labels.tolist()) == ([[SHARED], [-1]], [[IGNORE], [IGNORE]])


@given(st.lists(st.sampled_from([word for word in WORDS if word.isalpha()]), min_size=1, max_size=12))
def test_words_come_back(words: list[str]) -> None:
    tokenizer = CaptionTokenizer(VOCAB, prompt="a picture of")
    row = only_row(tokenizer.pack([[" ".join(words)]], max_tokens=40))
    generated = [*row.tokens.tolist(), tokenizer.end_id, tokenizer.pad_id, tokenizer.begin_id]
    assert tokenizer.decode(generated) == " ".join(words)


def test_a_learned_vocabulary_survives_its_file(tmp_path: Path) -> None:
    captions = ["A red circle.", "the circle's left", "blue squares"] * 5
    learned = CaptionTokenizer.train(captions, vocab_size=80, prompt="a picture of ")
    learned.save(tmp_path / "vocab.txt")
    again = CaptionTokenizer.from_file(tmp_path / "vocab.txt", prompt="a picture of ")
    assert learned.size <= 82
    assert learned.size == again.size
    assert learned.pack([captions], 30).tokens.tolist() == again.pack([captions], 30).tokens.tolist()
    assert "[UNK]" not in learned.decode(learned.pack([["red squares"]], 30).tokens[0].tolist())


def test_a_file_that_is_not_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("some\nwords\n")
    with pytest.raises(ConfigError, match="lacks BERT's special tokens"):
        CaptionTokenizer.from_file(tmp_path / "vocab.txt")
    with pytest.raises(ConfigError, match="cannot read the vocabulary"):
        CaptionTokenizer.from_file(tmp_path / "none.txt")


@given(st.text(st.characters(max_codepoint=0x17F), max_size=40) | st.text("catsdog'.-_ ", max_size=40))
def test_words_that_are_remembered_have_the_pieces_that_the_whole_caption_gives_them(text: str) -> None:
    tokenizer = CaptionTokenizer(VOCAB)
    expected = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    for _ in ("found", "remembered"):
        assert tokenizer.pack([[text]], 99).tokens[0].tolist() == [tokenizer.begin_id, *expected]


@pytest.mark.skipif(not BERT.is_dir(), reason="shared/data/blip is not here")
def test_ids_are_those_of_berts_own_tokenizer_and_blips() -> None:
    from transformers import BertTokenizer

    path = next(BERT.rglob("vocab.txt"))
    ours, theirs = CaptionTokenizer.from_file(path, "a picture of "), BertTokenizer(str(path))
    assert (ours.pad_id, ours.end_id, ours.begin_id, ours.size) == (0, 102, 30522, 30524)
    for caption in ("Two young guys with shaggy hair look at their hands.", "A girl's naïve café — déjà vu, isn't it?"):
        row = only_row(ours.pack([[caption]], 99))
        expected = theirs(f"a picture of {caption}")["input_ids"]  # [CLS] … [SEP]
        assert row.tokens.tolist() == [30522, *expected[1:-1]]
        assert row.labels.tolist()[-1] == 102


def test_learning_a_vocabulary_has_no_chance_in_it() -> None:
    captions = [f"the {colour} {shape} {number}" for colour in ("red", "blue") for shape in ("star", "square")
                for number in range(50)]  # fmt: skip
    assert len({tuple(CaptionTokenizer.train(captions, vocab_size=70).vocab) for _ in range(5)}) == 1
