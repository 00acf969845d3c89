"""Captions to token ids and back, and the packed rows that training reads.

BERT's uncased WordPiece with BLIP's two extra tokens at the end of the vocabulary: [DEC] begins a caption, [ENC] is
BLIP's for another task and kept so that its embedding table fits. A caption ends with [SEP]. All captions of a photo
are packed in one row. What they begin with alike, [DEC] and the prompt, is there once; then come the captions' own
tokens, with positions as if each caption were alone behind that, and a segment number of its own. The mask that keeps
them apart is made from the segments in ``packing``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer

from pvtcap.errors import ConfigError

IGNORE = -100  # torch's cross_entropy leaves this label out; here: prompt and padding
SHARED = 0  # the segment that all captions of a row see
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_BLIP_TOKENS = ["[DEC]", "[ENC]"]
_WORDS = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")
_ID = np.dtype(np.int32)
_MOST_KNOWN = 100_000  # words remembered: a bound on memory, far above the words of COCO's captions


@dataclass(frozen=True)
class PackedRows:
    """A row for each of B photos, with all its chosen captions one after the other; int64 arrays.

    ``tokens``, ``positions`` and ``segments`` are (B, T): first what the captions share, with segment SHARED, then
    their own, with segments 1, 2, …. T is the longest row's; what is behind the others has a segment of its own, -1.
    ``labels`` (B, L) are all tokens that are to be predicted, L being as many as a row has at most, and IGNORE behind
    the others'; ``predictors`` (B, L) the place in the row of the token that each should follow: the last one that is
    shared has a label of each caption.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    predictors: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]


class CaptionTokenizer:
    """WordPiece with BLIP's tokens. ``vocab`` is BERT's list of pieces, without [DEC] and [ENC]."""

    def __init__(self, vocab: Sequence[str], prompt: str = "") -> None:
        self.vocab = [piece for piece in vocab if piece not in _BLIP_TOKENS]
        self.prompt = prompt
        ids = {piece: number for number, piece in enumerate([*self.vocab, *_BLIP_TOKENS])}
        self.pad_id, self.end_id, self.begin_id = ids["[PAD]"], ids["[SEP]"], ids["[DEC]"]
        self.size = len(self.vocab) + len(_BLIP_TOKENS)  # one that is twice in a file has two rows, and uses the last
        self._tokenizer = _bert_pipeline(Tokenizer(WordPiece(ids, unk_token="[UNK]")))
        self._special = {ids[token] for token in [*_SPECIAL, *_BLIP_TOKENS] if token in ids}
        self._known: dict[str, bytes] = {}  # pieces of words
        self.prefix = [self.begin_id, *np.frombuffer(self._ids(prompt), dtype=_ID).tolist()]

    @classmethod
    def from_file(cls, path: Path, prompt: str = "") -> CaptionTokenizer:
        """Read a vocab.txt: one piece a line, the line number is the id. Raises ConfigError when it is not BERT's."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the vocabulary: {error}", where=path) from None
        vocab = text.removesuffix("\n").split("\n")  # no splitlines: U+2028 and the like may be pieces
        if missing := [token for token in ("[PAD]", "[UNK]", "[SEP]") if token not in vocab]:
            do = "Use a BERT vocab.txt."
            raise ConfigError("the vocabulary lacks BERT's special tokens", where=path, got=missing, do=do)
        return cls(vocab, prompt)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, prompt: str = "") -> CaptionTokenizer:
        """Learn a WordPiece vocabulary of at most ``vocab_size`` pieces: the same captions give the same pieces."""
        # The prompt's pieces are in every row whether or not a caption uses them.
        texts = [prompt, *captions]
        tokenizer = _bert_pipeline(Tokenizer(WordPiece(unk_token="[UNK]")))
        letters = sorted({letter for text in texts for letter in tokenizer.normalizer.normalize_str(text)} - {" "})
        # The trainer numbers "##x" in the order of a hash map, another one in each run, and breaks ties by number.
        # Numbering them first, as special tokens, takes chance out of it.
        fixed = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
        trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        ids = tokenizer.get_vocab()
        return cls(sorted(ids, key=lambda piece: ids[piece]), prompt)

    @property
    def backend(self) -> Tokenizer:
        """The tokenizers library's own object."""
        return self._tokenizer

    def save(self, path: Path) -> None:
        path.write_text("\n".join(self.vocab) + "\n", encoding="utf-8")

    def pack(self, photos: Sequence[Sequence[str]], max_tokens: int) -> PackedRows:
        """A row of each photo's captions. Alone, one is [DEC] prompt words, and its labels are words [SEP].

        A caption longer than ``max_tokens`` (begin token and prompt included) is cut, and then has no [SEP] to learn.
        Where no photo has any, a token without a label stands in: a rank that has nothing to learn from takes part.
        """
        shared = np.array(self.prefix[:max_tokens], dtype=np.int64)
        room = max(0, max_tokens + 1 - len(self.prefix))
        end, most_bytes = _ID.type(self.end_id).tobytes(), room * _ID.itemsize
        texts = [(self._ids(caption) + end)[:most_bytes] for caption in itertools.chain.from_iterable(photos)]
        # All captions at once, for a photo's few words are not worth a call of NumPy's each.
        captions_of = np.array([len(captions) for captions in photos])
        photo_of = np.repeat(np.arange(len(photos)), captions_of)
        first_of_photo = np.repeat(np.cumsum(captions_of) - captions_of, captions_of)
        labels_of = np.array([len(text) for text in texts], dtype=np.int64) // _ID.itemsize
        all_ids = np.frombuffer(b"".join(texts), dtype=_ID)
        tokens_of = np.maximum(labels_of - 1, 0)  # the last one is only predicted

        def before(counts: NDArray[np.int64]) -> NDArray[np.int64]:
            """How many there are in front of each caption in its row."""
            starts = np.cumsum(counts) - counts
            found: NDArray[np.int64] = starts - starts[first_of_photo]
            return found

        def in_photo(counts: NDArray[np.int64]) -> NDArray[np.int64]:
            """How many there are in all captions of each photo; bincount adds weights up as float64."""
            return np.bincount(photo_of, counts, len(photos)).astype(np.int64)

        def rows(widths: NDArray[np.int64], fill: int) -> NDArray[np.int64]:
            return np.full((len(photos), max(1, int(np.max(widths)))), fill, dtype=np.int64)

        caption_of = np.repeat(np.arange(len(texts)), labels_of)
        turn = np.arange(len(all_ids)) - np.repeat(np.cumsum(labels_of) - labels_of, labels_of)
        place = len(shared) + before(tokens_of)[caption_of] + turn
        labels = rows(in_photo(labels_of), IGNORE)
        predictors = np.zeros_like(labels)
        at = photo_of[caption_of], before(labels_of)[caption_of] + turn
        labels[at] = all_ids
        predictors[at] = np.where(turn == 0, len(shared) - 1, place - 1)

        with_captions = captions_of > 0
        tokens = rows(with_captions * len(shared) + in_photo(tokens_of), self.pad_id)
        positions, segments = np.zeros_like(tokens), np.full_like(tokens, -1)
        if texts:
            start = slice(len(shared))
            tokens[with_captions, start], positions[with_captions, start] = shared, np.arange(len(shared))
            segments[with_captions, start] = SHARED
        else:
            segments[0, 0] = SHARED
        own = turn < tokens_of[caption_of]
        behind = photo_of[caption_of[own]], place[own]
        tokens[behind], positions[behind] = all_ids[own], len(shared) + turn[own]
        segments[behind] = 1 + (caption_of - first_of_photo[caption_of])[own]
        return PackedRows(tokens, labels, predictors, positions, segments)

    def decode(self, ids: Iterable[int]) -> str:
        """Words of a generated row: begin token, prompt, padding and all behind [SEP] left out."""
        words = list(ids)
        if words[: len(self.prefix)] == self.prefix:
            words = words[len(self.prefix) :]
        if self.end_id in words:
            words = words[: words.index(self.end_id)]
        text = str(self._tokenizer.decode([word for word in words if word not in self._special]))
        # BERT splits at an apostrophe; transformers' clean-up, which BLIP's captions go through, joins it again.
        return text.replace(" ' ", "'")

    def words(self, caption: str) -> list[tuple[str, list[int]]]:
        """The words and signs of a caption, each with the ids of its pieces, as ``pack`` packs them."""
        encoding = self._tokenizer.encode(caption, add_special_tokens=False)
        found: list[tuple[str, list[int]]] = []
        last = None
        for id_, word, (start, end) in zip(encoding.ids, encoding.word_ids, encoding.offsets, strict=True):
            if word == last:
                text, pieces = found[-1]
                found[-1] = text + caption[start:end], [*pieces, id_]
            else:
                found.append((caption[start:end], [id_]))
            last = word
        return found

    def _ids(self, text: str) -> bytes:
        """Of its pieces, one _ID behind the other: lists of numbers lie all over memory, where each waits for it."""
        # Captions are mostly the same few thousand words: looking their pieces up is quicker by far.
        # In printable ASCII, words are what BERT's rules make of it: letters and digits, or one sign.
        if not (text.isascii() and text.isprintable()):
            return self._encoded(text)
        words = _WORDS.findall(text.lower())
        try:
            return b"".join(map(self._known.__getitem__, words))
        except KeyError:
            return b"".join(map(self._pieces, words))

    def _pieces(self, word: str) -> bytes:
        if (pieces := self._known.get(word)) is None:
            pieces = self._encoded(word)
            if len(self._known) < _MOST_KNOWN:
                self._known[word] = pieces
        return pieces

    def _encoded(self, text: str) -> bytes:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=_ID).tobytes()


def _bert_pipeline(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
