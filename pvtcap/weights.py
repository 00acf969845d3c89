"""Weights into a Captioner: from timm, files of many layouts, a BLIP model, BERT, or what a checkpoint of ours trained.

    loaded = load_encoder(model, config), load_projection(model, config), load_decoder(model, config)
    print(weights_table(loaded))

``weightfiles`` reads, ``weightnames`` renames; here values are copied. A name that is missing or left over and not
explained is an error, and so is a value that is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pvtcap import jsonfile
from pvtcap.captioner import Captioner
from pvtcap.config import Config, TextConfig
from pvtcap.decoder import Decoder
from pvtcap.encoder import Encoder
from pvtcap.errors import CheckpointError, ConfigError
from pvtcap.text import CaptionTokenizer
from pvtcap.weightfiles import hub_file, hub_weights, read_tensors, read_weights
from pvtcap.weightnames import OUR_DECODER, TOKEN_TYPES, Renamed, decoder_names, encoder_names, projection_names
from pvtcap.weightreport import Loaded

SCRATCH = "scratch"
_WORDS, _BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
# The head is the embedding table: files store it once, under either name, or twice.
_TIED = {"cls.predictions.decoder.weight": _WORDS, "cls.predictions.decoder.bias": _BIAS}
# torch's, and those of the same names that transformers puts in their place.
_DRAWS = {"uniform_", "normal_", "erfinv_", "kaiming_uniform_"}
_BLIP_TOKENS = 2  # [DEC] and [ENC], which BERT's vocabulary lacks


class Undrawn(TorchFunctionMode):
    """Within it, modules are made without drawing random weights: for one whose every weight is then loaded."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(function, "__name__", "") in _DRAWS:
            return args[0] if args else given["tensor"]
        return function(*args, **given)


def load_encoder(encoder: Encoder, config: Config) -> Loaded:
    """Fill the encoder from ``model.encoder_weights``; 'scratch' leaves it as it was made."""
    source = config.model.encoder_weights
    if source == SCRATCH:
        return _scratch("encoder", encoder.pvt)
    pvt = encoder.pvt
    hub = pvt.pretrained_cfg["hf_hub_id"] if source == "timm" else ""
    path = hub_file(hub, ["model.safetensors"], "model.encoder_weights") if hub else Path(source)
    read = read_weights(path, "pvt")
    named = encoder_names(read.tensors, len(pvt.stages), read.path)
    new = fill(pvt, named.state, read.path)
    return _loaded("encoder", source, read.files, named, new)


def load_projection(model: Captioner, config: Config) -> Loaded:
    """Fill the projection from ``model.projection_weights``; 'scratch' leaves it as it was made."""
    source = config.model.projection_weights
    if source == SCRATCH:
        return _scratch("projection", model.projection)
    read = read_weights(Path(source), "projection")
    named = projection_names(read.tensors, read.path)
    new = fill(model.projection.net, named.state, read.path)
    return _loaded("projection", source, read.files, named, new)


def load_decoder(model: Captioner, config: Config) -> Loaded:
    """Fill the decoder from ``model.decoder``: a hub name, a folder or a file; 'scratch' leaves it as it was made."""
    source = config.model.decoder
    if source == SCRATCH:
        return _scratch("decoder", model.decoder)
    local = Path(source).exists() or Path(source).suffix in (".pth", ".pt", ".bin", ".safetensors", ".json")
    path = Path(source) if local else hub_weights(source, "model.decoder")
    read = read_weights(path, "blip")
    named = decoder_names(read.tensors, read.path)
    _check_heads(read.path.parent, config.model.decoder_heads)
    lm = model.decoder.lm
    new = fill_decoder(model.decoder, named.state, read.path)
    short = lm.bert.embeddings.word_embeddings.num_embeddings - len(named.state[_WORDS])
    if short:
        rows = f"{len(named.state[_WORDS]):,} to {len(named.state[_WORDS]) + short:,}"
        named.notes.append(f"vocabulary extended from {rows}: the rows of [DEC] and [ENC] are new")
    idle = sorted(f"decoder.lm.{name}" for name in new if not lm.get_parameter(name).requires_grad)
    if idle:
        raise CheckpointError(
            "new weights in the decoder that nothing would train",
            where=read.path,
            got=f"train.what={config.train.what}, {len(idle)} such tensors ({idle[0]}, …)",
            do="Train them (train.what=projection+decoder), or start from a BLIP captioning model.",
        )
    return _loaded("decoder", source, read.files, named, new)


def fill_decoder(decoder: Decoder, state: dict[str, Tensor], where: Path) -> set[str]:
    """Copy a decoder's ``state``, BLIP's or BERT's; returns the names of what it lacked and keeps its new values."""
    _untie(state, where)
    own = set(decoder.lm.state_dict())
    new = fill(decoder.lm, state, where, _may_lack(state, own), {_WORDS, _BIAS})
    return new - {TOKEN_TYPES, *_TIED}  # zero by design; tied


def tied_names(model: Captioner) -> set[str]:
    """What a file of a whole Captioner may leave out, since it is there under another name."""
    return {f"{OUR_DECODER}{name}" for name in _TIED} & set(model.state_dict())


def load_trained(model: Captioner, path: Path) -> None:
    """Fill the parameters that ``train.what`` trains from a checkpoint's ``trainable.safetensors``."""
    copy_trained(model, read_tensors(path), path)


def copy_trained(model: Captioner, state: Mapping[str, Tensor], where: Path) -> None:
    """Fill the parameters that ``train.what`` trains; ``state`` has each of them, and nothing else."""
    parameters = model.trainable()
    _check_names(state, set(parameters), set(), where)
    for name, parameter in parameters.items():
        _copy(name, parameter, state[name], where)


def load_vocab(text: TextConfig) -> CaptionTokenizer:
    """The vocabulary that ``text.vocab`` names: a vocab.txt, or a Hugging Face model's. Not 'train'."""
    path = Path(text.vocab)
    if path.is_dir():
        path = path / "vocab.txt"
    if not path.is_file():
        if path.suffix:
            raise ConfigError("no such vocabulary file", where="text.vocab", got=str(path))
        path = hub_file(text.vocab, ["vocab.txt"], "text.vocab")
    return CaptionTokenizer.from_file(path, text.prompt)


def fill(
    module: nn.Module,
    state: Mapping[str, Tensor],
    where: Path,
    may_lack: Set[str] = frozenset(),
    may_extend: Set[str] = frozenset(),
) -> set[str]:
    """Copy ``state`` into ``module``; returns the names that it lacked, and was allowed to.

    A name that is missing, unknown or of another shape is a CheckpointError naming it. ``may_extend`` are tables that
    may lack BLIP's two tokens at their end.
    """
    own = module.state_dict()
    _check_names(state, set(own), may_lack, where)
    for name, value in state.items():
        target = own[name]
        if name in may_extend and len(target) - len(value) == _BLIP_TOKENS:
            target = target[: len(value)]
        _copy(name, target, value, where)
    return set(own) - set(state)


def _check_heads(folder: Path, heads: int) -> None:
    """Attention heads leave no trace in a file's shapes; the config.json beside it, where there is one, knows them."""
    if not (folder / "config.json").is_file():
        return
    tree = jsonfile.read(folder / "config.json", CheckpointError)
    try:
        theirs = tree.get("text_config", tree).get("num_attention_heads", heads)
    except AttributeError as error:
        raise CheckpointError(f"not a model's configuration ({error})", where=folder / "config.json") from None
    if theirs != heads:
        raise CheckpointError(
            "a decoder with another number of attention heads",
            where=folder / "config.json",
            got=theirs,
            wanted=f"{heads}, as model.decoder_heads",
            do=f"Set model.decoder_heads={theirs}.",
        )


def _may_lack(state: Mapping[str, Tensor], own: Set[str]) -> set[str]:
    """What a decoder's file may leave out: cross-attention and the head only where it has nothing at all of them."""
    lack = {TOKEN_TYPES, *_TIED}
    for whole in (".crossattention.", "cls."):
        if not any(whole in name for name in state):
            lack |= {name for name in own if whole in name}
    return lack


def _untie(state: dict[str, Tensor], where: Path) -> None:
    """One name for each tied tensor; CheckpointError where a file has two values for it."""
    for copy, original in _TIED.items():
        value = state.pop(copy, None)
        if value is None:
            continue
        if original in state and not torch.equal(value, state[original]):
            raise CheckpointError(
                "an output layer of its own, where ours is the embedding table",
                where=where,
                got=f"'{copy}' unlike '{original}'",
                do="Such a model cannot be continued here.",
            )
        state.setdefault(original, value)


def _loaded(part: str, source: str, files: tuple[Path, ...], named: Renamed, new: Set[str]) -> Loaded:
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in named.state.values()} - {"float32"})
    notes = [*named.notes, *([f"{', '.join(dtypes)} converted to float32"] if dtypes else [])]
    parameters = sum(value.numel() for value in named.state.values())
    kept = tuple(sorted(new))
    return Loaded(part, source, files, len(named.state), parameters, kept, dict(named.ignored), tuple(notes))


def _scratch(part: str, module: nn.Module) -> Loaded:
    return Loaded(part, SCRATCH, new=tuple(name for name, _ in module.named_parameters()))


def _check_names(state: Mapping[str, Tensor], wanted: Set[str], may_lack: Set[str], where: Path) -> None:
    missing, unknown = sorted(wanted - set(state) - may_lack), sorted(set(state) - wanted)
    if missing or unknown:
        lists = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(
            "weights of another model",
            where=where,
            got=" and ".join(lists),
            do="Check the model and train.what sections of the configuration.",
        )


def _copy(name: str, target: Tensor, value: Tensor, where: Path) -> None:
    if target.shape != value.shape:
        raise CheckpointError(
            f"weights of another model: '{name}'",
            where=where,
            got=f"shape {tuple(value.shape)}",
            wanted=tuple(target.shape),
            do="Check the model section of the configuration.",
        )
    # One pass, and no memory: a NaN is the least and the greatest.
    if value.is_floating_point() and value.numel() and not all(torch.isfinite(end) for end in value.aminmax()):
        count = int((~torch.isfinite(value)).sum())
        raise CheckpointError(f"not finite: '{name}'", where=where, got=f"{count:,} of its {value.numel():,} numbers")
    with torch.no_grad():
        target.copy_(value)
