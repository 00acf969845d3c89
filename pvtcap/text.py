"""Captions to token ids and back, and the packed rows that training reads.

BERT's uncased WordPiece with BLIP's two extra tokens at the end of the vocabulary: [DEC] begins a caption, [ENC] is
BLIP's for another task and kept so that its embedding table fits. A caption ends with [SEP]. All captions of a photo
are packed in one row. What they begin with alike, [DEC] and the prompt but for its last token, is there once; then come
the captions, each with positions as if it were alone behind that, and a segment number of its own. The mask that keeps
them apart is made from the segments in ``packing``.
"""

from __future__ import annotations

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
_MOST_KNOWN = 100_000  # words remembered: a bound on memory, far above the words of COCO's captions


@dataclass(frozen=True)
class PackedRows:
    """A row for each of B photos, with all its chosen captions one after the other; int64 arrays (B, T).

    ``labels[b, t]`` is the token that should follow ``tokens[b, t]``. What the captions share stands first, with label
    IGNORE and segment SHARED; theirs are 1, 2, …. T is the longest row's; what is behind the others has label IGNORE
    and a segment of its own, -1.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]


class CaptionTokenizer:
    """WordPiece with BLIP's tokens. ``vocab`` is BERT's list of pieces, without [DEC] and [ENC]."""

    def __init__(self, vocab: Sequence[str], prompt: str = "") -> None:
        missing = [token for token in ("[PAD]", "[UNK]", "[SEP]") if token not in vocab]
        if missing:
            raise ConfigError("the vocabulary lacks BERT's special tokens", got=missing, do="Use a BERT vocab.txt.")
        self.vocab = [piece for piece in vocab if piece not in _BLIP_TOKENS]
        self.prompt = prompt
        ids = {piece: number for number, piece in enumerate([*self.vocab, *_BLIP_TOKENS])}
        self.pad_id, self.end_id, self.begin_id = ids["[PAD]"], ids["[SEP]"], ids["[DEC]"]
        self.size = len(ids)
        self._tokenizer = _bert_pipeline(Tokenizer(WordPiece(ids, unk_token="[UNK]")))
        self._special = {ids[token] for token in [*_SPECIAL, *_BLIP_TOKENS] if token in ids}
        self._known: dict[str, list[int]] = {}  # pieces of words
        self.prefix = [self.begin_id, *self._ids(prompt)]

    @classmethod
    def from_file(cls, path: Path, prompt: str = "") -> CaptionTokenizer:
        """Read a vocab.txt: one piece a line, the line number is the id."""
        try:
            return cls(path.read_text(encoding="utf-8").splitlines(), prompt)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the vocabulary: {error}", where=path) from None

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
        """A row of each photo's captions. Alone, one is [DEC] prompt words, and its labels words [SEP], the first of
        which follows the prompt's last token.

        A caption longer than ``max_tokens`` (begin token and prompt included) is cut, and then has no [SEP] to learn.
        Where no photo has any, a token without a label stands in: a rank that has nothing to learn from takes part.
        """
        shared, last = self.prefix[:-1][:max_tokens], self.prefix[-1]
        room = max_tokens + 1 - len(shared)
        ids: list[int] = []
        lengths = []  # of pieces: what is shared, if anything is, and the captions
        for captions in photos:
            if captions and shared:
                ids += [*shared, last]
                lengths.append(len(shared))
            for caption in captions:
                caption_ids = [last, *self._ids(caption), self.end_id][:room]
                lengths.append(len(caption_ids) - 1)
                ids += caption_ids
        # All pieces at once, for a photo's few words are not worth a call of NumPy's each.
        pieces_of = np.array([len(captions) + bool(captions and shared) for captions in photos])
        of_piece, all_ids = np.array(lengths, dtype=np.int64), np.array(ids, dtype=np.int64)
        starts = np.cumsum(of_piece) - of_piece
        # A piece has one id more than tokens: each is preceded by as many as there are pieces before it.
        number = np.repeat(np.arange(len(lengths)), of_piece)
        places = np.arange(len(number)) + number
        first_of_photo = np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
        segments = number - first_of_photo[number] + (SHARED if shared else SHARED + 1)
        positions = np.arange(of_piece.sum()) - np.repeat(starts, of_piece) + len(shared) * (segments != SHARED)
        following = np.where(segments == SHARED, IGNORE, all_ids[places + 1])
        row_lengths = np.bincount(np.repeat(np.arange(len(photos)), pieces_of), of_piece, len(photos))
        used = np.arange(max(1, int(row_lengths.max()))) < row_lengths[:, None]

        def rows(values: NDArray[np.int64], fill: int) -> NDArray[np.int64]:
            filled = np.full(used.shape, fill, dtype=np.int64)
            filled[used] = values
            return filled

        found = PackedRows(
            rows(all_ids[places], self.pad_id), rows(following, IGNORE), rows(positions, 0), rows(segments, -1)
        )
        if not lengths:
            found.segments[0, 0] = SHARED
        return found

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

    def _ids(self, text: str) -> list[int]:
        # Captions are mostly the same few thousand words: looking their pieces up is quicker by far.
        # In printable ASCII, words are what BERT's rules make of it: letters and digits, or one sign.
        if not (text.isascii() and text.isprintable()):
            return self._encoded(text)
        ids: list[int] = []
        known = self._known
        for word in _WORDS.findall(text.lower()):
            ids += known.get(word) or self._pieces(word)
        return ids

    def _pieces(self, word: str) -> list[int]:
        if (pieces := self._known.get(word)) is None:
            pieces = self._encoded(word)
            if len(self._known) < _MOST_KNOWN:
                self._known[word] = pieces
        return pieces

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _bert_pipeline(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
