"""What a run is about to do, found out before its first step: data, tokenizer, model, and where to go on from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pvtcap import checkpoint, frozenencoder, resuming, weights
from pvtcap.captioner import Captioner
from pvtcap.config import BatchPlan, Config, batch_plan, ranks_in_words
from pvtcap.dist import World
from pvtcap.errors import ConfigError
from pvtcap.shardset import ShardSet
from pvtcap.sources import Sources, open_shardset
from pvtcap.stream import View
from pvtcap.text import CaptionTokenizer
from pvtcap.weightreport import Loaded, SourceFile, source_files


@dataclass(frozen=True)
class Job:
    """All that a run needs before it has an engine; equal on all ranks."""

    plan: BatchPlan
    train: Sources
    val: ShardSet | None
    view: View
    model: Captioner
    encoder_sha256: str | None
    resumed: checkpoint.Checkpoint | None
    refused: tuple[str, ...]  # newer checkpoints that cannot be used, and why
    total_steps: int
    loaded: tuple[Loaded, ...]
    weight_files: tuple[SourceFile, ...]

    @property
    def start_step(self) -> int:
        return self.resumed.manifest.step if self.resumed else 0

    def summary(self, config: Config, world: World) -> str:
        learning = sum(parameter.numel() for parameter in self.model.trainable().values())
        begin = f"going on from step {self.start_step} of" if self.resumed else "training"
        return (
            f"{begin} {self.total_steps} steps: {self.train.num_samples:,} photos, global batch "
            f"{self.plan.global_batch} = {self.plan.micro_batch} × {ranks_in_words(world.size)} × "
            f"{self.plan.accumulation}, {world.device.type}, ZeRO-{config.zero.stage}, {config.precision}"
            + (f", {learning:,} parameters learn ({config.train.what})" if learning else "")
            + ("" if (features := self.train.shardsets[0].manifest.features) is None else f", from {features}")
        )


def prepare(config: Config, world: World, resume: str) -> Job:
    """Open data, find the checkpoint, build the model; everything that can be wrong is found here, before step 1."""
    plan = world.on_first_rank(lambda: batch_plan(config.data, world.size))
    sources = world.on_first_rank(lambda: Sources.open(config.data))
    world.on_first_rank(lambda: sources.order(config.data, config.run.seed) and None)  # are the weights possible?
    val = world.on_first_rank(lambda: open_shardset(config.data.val, config.data) if config.data.val else None)
    shown = [*sources.shardsets, *([] if val is None else [val])]
    world.on_first_rank(lambda: frozenencoder.check(config, shown, trained=sources.shardsets))
    total_steps = world.on_first_rank(lambda: length(config, sources.num_samples))
    found = resuming.find(config, resume, world)
    resumed = found.checkpoint
    if resumed is not None:
        goes_on = resumed
        world.on_first_rank(lambda: resuming.check_resumable(goes_on, config, sources.describe()))
        tokenizer = resumed.tokenizer()
    else:
        tokenizer = world.on_first_rank(lambda: make_tokenizer(config, sources))
    model = Captioner(config, tokenizer.size)
    frozen_encoder = not model.encoder_trains
    loaded = load_weights(model, config, shown, resumed)
    if resumed is None:
        weight_files = world.on_first_rank(lambda: source_files(loaded))
    else:
        weight_files = resumed.manifest.weight_files  # what the run began with, all of it
    if resumed is not None and frozen_encoder:
        checkpoint.check_encoder(model, resumed.manifest, resumed.path)
    view = View(config.data, tokenizer, config.text.max_tokens)
    encoder_sha256 = model.encoder.fingerprint() if frozen_encoder else None
    return Job(
        plan, sources, val, view, model, encoder_sha256, resumed, found.refused, total_steps, loaded, weight_files
    )


def load_weights(
    model: Captioner, config: Config, shown: Sequence[ShardSet], resumed: checkpoint.Checkpoint | None
) -> tuple[Loaded, ...]:
    """Fill the model from what the configuration names; what trains is left out when a checkpoint has it."""
    encoder = frozenencoder.ready(model, config, shown)
    loaded = [] if encoder is None else [encoder]
    if resumed is None:
        loaded.append(weights.load_projection(model, config))
    if resumed is None or "decoder" not in config.train.what:
        loaded.append(weights.load_decoder(model, config))
    return tuple(loaded)


def length(config: Config, train_samples: int) -> int:
    """Optimizer steps of the whole run."""
    if config.train.steps is not None:
        return config.train.steps
    if config.train.epochs is None:
        raise ConfigError("no length", where="train", do="Set train.epochs or train.steps.")
    return math.ceil(config.train.epochs * train_samples / config.data.global_batch)


def make_tokenizer(config: Config, sources: Sources) -> CaptionTokenizer:
    """The vocabulary ``text.vocab`` names, or one learned from the training captions."""
    if config.text.vocab != "train":
        return weights.load_vocab(config.text)
    captions = (caption for group in sources.captions() for caption in group)
    return CaptionTokenizer.train(captions, config.text.vocab_size, config.text.prompt)
