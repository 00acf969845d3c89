"""What a ShardSet's JSON files say: the manifest, the indexes, the texts; how they are read and written.

A tar that pvtcap wrote holds its texts, in the form of ``Text``. For a tar of another's (``pvtcap shards index``) they
lie beside it, a line a sample in that same form, and the manifest's entry of it has a ``foreign``. A ShardSet of
features (``pvtcap features``) has KEY.npy in place of KEY.jpg, and its manifest a ``features``.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

FORMAT = "pvtcap-shardset/1"
MANIFEST = "manifest.json"
MAX_FILE_BYTES = 230  # of a tar's name: with .texts.jsonl.partial it is still one
HEADER_BYTES = 512  # what stands before each member of a tar

# Narrower than pydantic's: a damaged manifest may hold a number of a thousand digits.
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ShardFile(NamedTuple):
    """A file of a shard, and what the manifest knows of it."""

    name: str
    size_bytes: int | None
    sha256: str


class Foreign(_Record):
    """What ``shards index`` adds of a tar that pvtcap did not write.

    ``key_prefix`` stands before each key of the index, and is empty unless tars of the ShardSet share keys.
    """

    texts_size_bytes: NonNegativeInt
    texts_sha256: str
    key_prefix: str = ""


class ShardEntry(_Record):
    """One shard, as the manifest knows it. Sizes are in bytes."""

    file: str = Field(pattern=r"^[^/\\]+\.tar$")
    num_samples: NonNegativeInt
    num_captions: NonNegativeInt
    size_bytes: NonNegativeInt
    sha256: str
    index_sha256: str
    foreign: Foreign | None = None

    @field_validator("file")
    @classmethod
    def _short_enough(cls, file: str) -> str:
        if len(file.encode()) > MAX_FILE_BYTES:
            raise ValueError("too long for the name of a file")
        return file

    @property
    def index_file(self) -> str:
        return index_name(self.file)

    @property
    def texts_file(self) -> str:
        return texts_name(self.file)

    @property
    def tar(self) -> ShardFile:
        return ShardFile(self.file, self.size_bytes, self.sha256)

    @property
    def index(self) -> ShardFile:
        return ShardFile(self.index_file, None, self.index_sha256)

    @property
    def texts(self) -> ShardFile:
        """Where the texts lie: in the tar itself, or beside a foreign one."""
        if self.foreign is None:
            return self.tar
        return ShardFile(self.texts_file, self.foreign.texts_size_bytes, self.foreign.texts_sha256)

    @model_serializer(mode="wrap")
    def _as_ever_unless_foreign(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A ShardSet that pvtcap builds is the same bytes as before there were others.
        return {name: value for name, value in dump(self).items() if name != "foreign" or value is not None}


class FeatureFormat(_Record):
    """What each KEY.npy holds (``featureformat`` has its bytes), and how the encoder was shown the photos.

    ``views`` says what each view is: the whole photo squeezed to a square, or a random crop, perhaps mirrored, drawn
    from (``seed``, view, number of the sample in the ShardSet). ``shape`` is a view's channels, rows and columns.
    ``encoder_weights`` is 'timm' or a file's name, ``encoder_sha256`` the fingerprint of what was in it.
    """

    dtype: Literal["fp16", "int8"]
    views: list[Literal["square", "augmented"]] = Field(min_length=1)
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    encoder: str
    encoder_weights: str
    encoder_sha256: str
    encoder_stages: PositiveInt
    image_px: PositiveInt
    transform: str
    crop_min_area: float
    flip_probability: float
    seed: NonNegativeInt

    def __str__(self) -> str:
        crops = "no crops" if len(self.views) == 1 else f"crops of {self.crop_min_area} or more"
        return f"{self.dtype} features of {self.encoder} at {self.image_px} px, {len(self.views)} views, {crops}"


class Manifest(_Record):
    """What a complete ShardSet says of itself; ``build`` is the builder's name and options."""

    format: str
    name: str
    num_samples: NonNegativeInt
    num_captions: NonNegativeInt
    shards: list[ShardEntry]
    skipped: dict[str, PositiveInt] = {}
    build: dict[str, Any] = {}
    features: FeatureFormat | None = None

    @property
    def photo_suffix(self) -> str:
        """What follows the key in the name of a photo, or of its features."""
        return ".jpg" if self.features is None else ".npy"

    @model_serializer(mode="wrap")
    def _as_ever_unless_features(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name != "features" or value is not None}


class SkippedItem(_Record):
    """Something that a build left out: which, why in two or three words that can be counted, and the details."""

    key: str
    reason: str
    detail: str = ""


class ShardIndex(_Record):
    """Where the members of one shard lie: ``photos`` and ``texts`` are [offset, size] in bytes, aligned with ``keys``.

    The rest lets an interrupted build go on behind its last finished shard, without reading it: ``candidates`` is the
    range [start, stop) of the build's input that this shard used up, ``skipped`` what was left out of it,
    ``photo_digests`` (only where duplicates are dropped) the photos it holds.
    """

    keys: list[str]
    photos: list[tuple[NonNegativeInt, PositiveInt]]
    texts: list[tuple[NonNegativeInt, PositiveInt]]
    num_captions: NonNegativeInt
    candidates: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    last_candidate: str = ""
    skipped: list[SkippedItem] = []
    tar_sha256: str = ""
    photo_digests: list[str] = []

    @classmethod
    def of_nothing(cls, candidates: tuple[int, int], last_candidate: str, skipped: list[SkippedItem]) -> Self:
        """What stands for a stretch of the input that gave no sample."""
        return cls(
            keys=[],
            photos=[],
            texts=[],
            num_captions=0,
            candidates=candidates,
            last_candidate=last_candidate,
            skipped=skipped,
        )


class ForeignIndex(ShardIndex):
    """Of a foreign tar: ``texts`` lie in its file of texts, ``headers`` are the ``header_crc`` of the photos."""

    headers: list[NonNegativeInt]


class Text(BaseModel):
    """The content of KEY.json, or of a line of texts. Unknown members are allowed: other tools may add theirs."""

    image_id: int | str
    captions: list[str] = Field(min_length=1)
    width: PositiveInt
    height: PositiveInt
    source: str = ""


class Sample(NamedTuple):
    """A photo (encoded, as stored; or its features) with all its captions. ``width`` and ``height`` are in pixels.

    A tuple, as frozen dataclasses take ten times as long on their way between processes.
    """

    key: str
    image_id: int | str
    captions: tuple[str, ...]
    photo: bytes
    width: int
    height: int
    source: str = ""


def header_crc(header: bytes, size: int) -> int:
    """CRC-32 of the block before a member of a tar and of the member's size, which may stand elsewhere."""
    return zlib.crc32(b"%d" % size, zlib.crc32(header))


def index_name(tar_name: str) -> str:
    """The index file that belongs to a tar."""
    return tar_name.removesuffix(".tar") + ".index.json"


def texts_name(tar_name: str) -> str:
    """The file of texts that belongs to a foreign tar."""
    return tar_name.removesuffix(".tar") + ".texts.jsonl"
