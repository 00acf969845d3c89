"""The run's configuration: every default, every unit, every rule that needs no data and no GPU to check.

``configfile`` reads one from a YAML file and the command line. Nothing here is changed after it is loaded: what depends
on the world size is derived by ``batch_plan``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from pvtcap.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunConfig(_Section):
    dir: Path = Field(Path("runs/unnamed"), description="The run folder: everything a run writes is below it.")
    seed: NonNegativeInt = Field(0, description="Seeds new weights, sample order, augmentation and dropout.")


class SourceConfig(_Section):
    path: str = Field(description="ShardSet: a folder, or a URL of one (https://…, s3://…, gs://…).")
    weight: PositiveFloat | None = Field(
        None, description="Share of the photos drawn from here, relative to the other weights; all have one, or none."
    )


class DataConfig(_Section):
    train: tuple[SourceConfig, ...] = Field(
        (),
        description="ShardSet to train on (a folder or a URL), or a list of them, each a path or {path, weight}. "
        "Without weights they are one set, of which an epoch shows each photo once; with them each has its own epochs.",
    )
    val: str | None = Field(None, description="ShardSet (folder or URL) for validation loss, captions and scores.")
    global_batch: PositiveInt = Field(64, description="Photos in one optimizer step, over all ranks and accumulation.")
    micro_batch: PositiveInt | None = Field(
        None, description="Photos in one forward pass of one rank; null: global_batch / world size."
    )
    captions_per_photo: PositiveInt = Field(
        5, description="Captions trained on each time a photo is seen, packed in one row; drawn where there are more."
    )
    image_px: PositiveInt = Field(384, description="Side of the square the model sees, in pixels.", multiple_of=32)
    crop_min_area: Fraction = Field(
        0.5, description="Random crops keep at least this share of the photo's area; 1: the whole photo, squeezed."
    )
    flip_probability: Fraction = Field(0.5, description="Chance that a photo is mirrored; 0 if captions say left.")
    blank_photos: bool = Field(False, description="Show the model grey pictures: how much does it know without them?")
    lanes: PositiveInt = Field(
        32,
        description="Places of the data from which a batch is drawn, at most; ranks share them out. More mix better, "
        "and keep more shards open at a time: lanes times shuffle_window_shards.",
    )
    shuffle_window_shards: PositiveInt = Field(2, description="Samples of a lane are shuffled within this many shards.")
    max_bad_fraction: Fraction = Field(
        0.001,
        description="Photos that cannot be decoded are left out, named in the log and the ledger; when they are more "
        "than this share of a source's photos in an epoch, the run stops.",
    )
    workers: NonNegativeInt = Field(2, description="Decoding processes a rank; 0 decodes in the training process.")
    worker_timeout_s: PositiveFloat = Field(
        45.0, description="A decoding process that spends this long on one photo hangs: the run stops and names it."
    )
    cache_dir: Path | None = Field(
        None, description="Where shards of URLs are kept: on a disk of each node. null: below the user's cache folder."
    )
    cache_gb: PositiveFloat = Field(100.0, description="What they may take there in all, in 10^9 bytes.")

    @field_validator("train", mode="before")
    @classmethod
    def _sources(cls, given: Any) -> Any:
        listed = given if isinstance(given, list | tuple) else () if given is None else (given,)
        sources = [{"path": str(source)} if isinstance(source, str | Path) else source for source in listed]
        if odd := [source for source in sources if not isinstance(source, dict | SourceConfig)]:
            raise ValueError(f"data.train: got {odd[0]!r}; wanted a path, {{path, weight}}, or a list of these")
        return tuple(sources)

    @field_validator("val", mode="before")
    @classmethod
    def _location(cls, given: Any) -> Any:
        return str(given) if isinstance(given, Path) else given

    @model_validator(mode="after")
    def _all_weighted_or_none(self) -> Self:
        if len({source.weight is None for source in self.train}) > 1:
            raise ValueError("data.train gives some sources a weight and others none: give it to all, or to none")
        return self


class TextConfig(_Section):
    vocab: str = Field(
        "bert-base-uncased",
        description="A Hugging Face name, a vocab.txt, or 'train': WordPiece learned from the training captions.",
    )
    vocab_size: PositiveInt = Field(4000, description="Pieces to learn with vocab: train.")
    prompt: str = Field("a picture of ", description="Begins every caption; masked from the loss. BLIP's by default.")
    max_tokens: PositiveInt = Field(40, description="Longer captions are cut here, prompt included.")


class ModelConfig(_Section):
    encoder: str = Field("pvt_v2_b1", description="timm name; pvt_v2_b1 is the 13.5M 'PVT-Tiny', pvt_v2_b0 has 3.4M.")
    encoder_weights: str = Field("timm", description="'timm' (pretrained), a file, or 'scratch'; docs/weights.md.")
    encoder_stages: int = Field(4, ge=2, le=4, description="Stages kept: 4 gives image_px/32 squared tokens, 3 /16.")
    projection: Literal["conv3x3", "linear", "mlp"] = Field("conv3x3", description="Encoder width to decoder width.")
    projection_weights: str = Field("scratch", description="'scratch', or a file to start from: a combined .pth.")
    decoder: str = Field(
        "Salesforce/blip-image-captioning-base",
        description="BLIP captioning model or BERT to begin with (hub name, folder or file), or 'scratch'.",
    )
    decoder_layers: PositiveInt = 12
    decoder_width: PositiveInt = 768
    decoder_heads: PositiveInt = 12
    decoder_feedforward: PositiveInt = 3072
    decoder_positions: PositiveInt = Field(512, description="Longest caption the position table holds, in tokens.")
    dropout: float = Field(0.1, ge=0, lt=1, description="In the decoder: hidden states and attention.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(f"decoder_width {self.decoder_width} is not a multiple of {self.decoder_heads} heads")
        return self


TRAINABLE = (
    "projection",
    "projection+cross_attention",
    "projection+decoder",
    "projection+encoder",
    "projection+cross_attention+encoder",
    "projection+decoder+encoder",
)


class TrainConfig(_Section):
    what: Literal[
        "projection",
        "projection+cross_attention",
        "projection+decoder",
        "projection+encoder",
        "projection+cross_attention+encoder",
        "projection+decoder+encoder",
    ] = Field("projection+decoder", description="Which parameters learn; all others are frozen.")
    epochs: PositiveFloat | None = Field(None, description="Length of the run in passes over data.train ...")
    steps: PositiveInt | None = Field(None, description="... or in optimizer steps; exactly one of the two.")
    log_every_steps: PositiveInt = 10
    val_every_steps: PositiveInt | None = Field(None, description="Loss on the whole of data.val; null: never.")
    stop_after_minutes: PositiveFloat | None = Field(
        None, description="Save and end with exit code 75 (go on later) when the run has gone on for so long."
    )
    spike_sigmas: PositiveFloat | None = Field(
        6.0, description="A loss so many standard deviations above the last steps' is logged with its photos' keys."
    )
    stall_minutes: PositiveFloat = Field(
        10.0, description="A rank that has not moved for so long is named, with what it was at, and the run ends."
    )
    device_peak_tflops: PositiveFloat | None = Field(
        None, description="What a device can do at best, for speed/mfu; null: known of NVIDIA's usual ones."
    )
    profile_steps: NonNegativeInt = Field(
        0, description="Trace so many steps of rank 0, after the third: RUN/profile, for Perfetto or chrome://tracing."
    )
    compile: bool = Field(False, description="torch.compile of encoder and decoder.")
    activation_checkpointing: bool = Field(
        False, description="Compute the decoder's activations again in the backward pass: less memory, a third slower."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("both epochs and steps are set: keep the one that ends the run")
        return self


class OptimConfig(_Section):
    lr: PositiveFloat = Field(1e-4, description="Peak learning rate of AdamW.")
    encoder_lr: PositiveFloat | None = Field(None, description="The encoder's own, where it trains; null: lr.")
    warmup_steps: NonNegativeInt = Field(500, description="Linear from 0 to lr.")
    min_lr_ratio: Fraction = Field(0.0, description="The cosine ends at lr times this.")
    weight_decay: NonNegativeFloat = Field(0.05, description="Not on biases and norms.")
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip_norm: PositiveFloat = Field(1.0, description="Global gradient norm is cut to this.")
    label_smoothing: Fraction = Field(0.0, description="BLIP trains with 0.1. Validation loss is never smoothed.")


class ZeroConfig(_Section):
    stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO: 1 shards optimizer states, 2 gradients, 3 all.")
    offload: Literal["none", "optimizer", "optimizer+parameters"] = Field(
        "none", description="What a GPU's memory has no room for and the CPU's has; parameters: stage 3 only."
    )
    deepspeed_json: Path | None = Field(
        None, description="Your own DeepSpeed configuration, merged over ours; a clash with what we derive is an error."
    )

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> Self:
        if self.offload != "none" and self.stage == 0:
            raise ValueError("zero.offload needs ZeRO: set zero.stage to 1, 2 or 3")
        if self.offload == "optimizer+parameters" and self.stage != 3:
            raise ValueError("zero.offload of parameters needs zero.stage 3, which shards them")
        return self


class CheckpointConfig(_Section):
    every_steps: PositiveInt | None = Field(None, description="null: at evaluations and at the end only.")
    every_minutes: PositiveFloat | None = Field(None, description="Also when the last one is so old.")
    keep_last: PositiveInt = Field(2, description="Older checkpoints are removed ...")
    keep_best: NonNegativeInt = Field(1, description="... but so many, the best by CIDEr + Bleu_4 of an evaluation.")


class EvaluateConfig(_Section):
    every_steps: PositiveInt | None = Field(None, description="Captions and scores on data.val while training.")
    at_start: bool = Field(False, description="Score the model before its first step too.")
    num_beams: PositiveInt = Field(3, description="Beam search; 1: greedy, or nucleus sampling with top_p.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Sample from the likeliest tokens that share this much probability; null: no sampling."
    )
    max_length: PositiveInt = Field(20, description="Longest caption in tokens, begin token and prompt included.")
    min_length: NonNegativeInt = Field(5, description="Shortest, counted the same way.")
    repetition_penalty: PositiveFloat = 1.0
    micro_batch: PositiveInt = Field(32, description="Photos captioned at a time on each rank.")
    sheet_photos: NonNegativeInt = Field(12, description="Photos on the picture of captions in TensorBoard.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Of the model that captions.")
    metric_timeout_s: PositiveFloat = Field(600.0, description="A metric that takes longer is reported unavailable.")
    metric_memory_mib: PositiveInt = Field(4096, description="A metric that takes more is, too.")
    java_heap_mib: PositiveInt = Field(2048, description="Heap of METEOR's, SPICE's and the tokenizer's java.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.top_p is not None and self.num_beams > 1:
            raise ValueError("top_p samples, num_beams searches: set num_beams to 1, or leave top_p out")
        return self


class Config(_Section):
    """A whole run. Section by section, the keys of the YAML file."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    zero: ZeroConfig = ZeroConfig()
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Of the forward and backward pass; the optimizer's weights are float32. fp16 scales its loss.",
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _frozen_encoder_has_weights(self) -> Self:
        if self.model.encoder_weights == "scratch" and "encoder" not in self.train.what:
            raise ValueError("model.encoder_weights is 'scratch', but train.what freezes the encoder: add '+encoder'")
        return self

    def to_yaml(self) -> str:
        """Every value, defaults included: what ran, readable without this version's defaults."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is cut: ``global_batch == micro_batch * world_size * accumulation`` photos."""

    global_batch: int
    micro_batch: int
    world_size: int
    accumulation: int


def ranks_in_words(number: int) -> str:
    """For messages: "1 rank", "2 ranks"."""
    return f"{number} rank{'s' if number != 1 else ''}"


def batch_plan(data: DataConfig, world_size: int) -> BatchPlan:
    """Derive accumulation from the world size; ConfigError, with all the numbers, when it does not divide."""
    micro = data.micro_batch or max(1, data.global_batch // world_size)
    accumulation, rest = divmod(data.global_batch, micro * world_size)
    if rest or not accumulation:
        raise ConfigError(
            "data.global_batch is not a multiple of micro_batch × ranks",
            got=f"global_batch {data.global_batch}, micro_batch {micro}, {ranks_in_words(world_size)}",
            wanted=f"a multiple of {micro * world_size}",
            do=f"Try data.global_batch={max(1, round(data.global_batch / (micro * world_size))) * micro * world_size}, "
            "another data.micro_batch, or another number of ranks.",
        )
    return BatchPlan(data.global_batch, micro, world_size, accumulation)
