"""Names of tensors in files that others made → names in ours. Pure functions over state dicts.

    encoder     timm's ``pvt_v2_*``; whai362's own names for the same model (patch_embed1, block1, norm1 …)
    decoder     BLIP, Hugging Face's or Salesforce's (``text_decoder.bert.…``); its text decoder alone (``bert.…``
                with cross-attention); BERT (``bert.…`` without)
    projection  one convolution or linear layer, or two of them, under whatever name

and of all three, pvtcap's own exports. What a file has beyond that is ignored only where it is known, and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pvtcap.errors import CheckpointError

OUR_ENCODER, OUR_PROJECTION, OUR_DECODER = "encoder.pvt.", "projection.net.", "decoder.lm."
TEXT_DECODER = "text_decoder."
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"
_POSITION_IDS = "bert.embeddings.position_ids"
_BERT_ONLY = ("bert.pooler.", "cls.seq_relationship.")


@dataclass
class Renamed:
    """``state`` has our names; ``ignored`` counts tensors by module; ``notes`` are for a user."""

    state: dict[str, Tensor]
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def encoder_names(tensors: Mapping[str, Tensor], stages: int, where: Path) -> Renamed:
    """timm's names; the classifier and the stages after the first ``stages`` are left out."""
    if any(name.startswith("pos_embed1") for name in tensors):
        raise CheckpointError(
            "weights of PVT version 1, which has position tables for one image size",
            where=where,
            wanted="PVT v2",
            do="Use pvt_v2_b1.pth, whose size is PVT-Tiny's.",
        )
    tensors = _ours(tensors, OUR_ENCODER)
    original = any(name.startswith("patch_embed1.") for name in tensors)
    found = Renamed({}, notes=["whai362's names"] if original else [])
    for name, value in tensors.items():
        new = _from_original(name) if original else name
        stage = re.match(r"stages\.(\d+)\.", new)
        if new.startswith("head."):
            found.ignored["head"] += 1
        elif stage and int(stage[1]) >= stages:
            found.ignored[f"stages.{stage[1]}"] += 1
        else:
            found.state[new] = value
    return found


def decoder_names(tensors: Mapping[str, Tensor], where: Path) -> Renamed:
    """BertLMHeadModel's names. Of BERT, token types are folded into the position table, since ours have none."""
    tensors = _ours(tensors, OUR_DECODER)
    if any(name.startswith(TEXT_DECODER) for name in tensors):
        found = Renamed({}, notes=["BLIP's text decoder"])
        for name, value in tensors.items():
            if name.startswith(TEXT_DECODER):
                found.state[name.removeprefix(TEXT_DECODER)] = value
            else:
                found.ignored[name.split(".")[0]] += 1
    else:
        found = Renamed({_from_bert(name): value for name, value in tensors.items()})
        if not any(name.startswith("bert.encoder.layer.") for name in found.state):
            raise CheckpointError(
                "no text decoder in this file",
                where=where,
                got=f"{len(tensors)} tensors, such as {next(iter(tensors))}",
                wanted=f"tensors named '{TEXT_DECODER}…' or 'bert.…'",
                do="Give a BLIP captioning model (Salesforce/blip-image-captioning-base), or BERT (bert-base-uncased).",
            )
    if found.state.pop(_POSITION_IDS, None) is not None:
        found.ignored["position_ids"] += 1
    if not any(".crossattention." in name for name in found.state):
        _only_bert(found)
    return found


def projection_names(tensors: Mapping[str, Tensor], where: Path) -> Renamed:
    """The names of ``Projection.net``: one layer's weight and bias, or two layers' in their order."""
    tensors = _ours(tensors, OUR_PROJECTION)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".")
        layers.setdefault(layer, {})[kind] = value
    if len(layers) not in (1, 2) or any(set(layer) != {"weight", "bias"} for layer in layers.values()):
        raise CheckpointError(
            "not a projection", where=where, got=", ".join(list(tensors)[:4]), wanted="one or two layers: weight, bias"
        )
    places = ("",) if len(layers) == 1 else ("0.", "2.")
    state = {}
    for place, name in zip(places, sorted(layers, key=_natural), strict=True):
        weight = layers[name]["weight"]
        # A linear layer is a convolution over one patch.
        state[f"{place}weight"] = weight[:, :, None, None] if weight.dim() == 2 else weight
        state[f"{place}bias"] = layers[name]["bias"]
    return Renamed(state)


def _ours(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """One part of pvtcap's own export, if this is one."""
    mine = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return mine or tensors


def _from_original(name: str) -> str:
    """whai362's module numbers count from 1 and stand in the name; its depthwise convolution is wrapped once more."""
    if match := re.match(r"patch_embed(\d)\.(.+)", name):
        stage = int(match[1]) - 1
        return f"stages.{stage}.downsample.{match[2]}" if stage else f"patch_embed.{match[2]}"
    if match := re.match(r"block(\d)\.(\d+)\.(.+)", name):
        rest = match[3].replace("dwconv.dwconv.", "dwconv.")
        return f"stages.{int(match[1]) - 1}.blocks.{match[2]}.{rest}"
    if match := re.match(r"norm(\d)\.(.+)", name):
        return f"stages.{int(match[1]) - 1}.norm.{match[2]}"
    return name


def _from_bert(name: str) -> str:
    """BERT's files from TensorFlow say gamma and beta, and BertModel's have no 'bert.' in front."""
    if name.startswith(("embeddings.", "encoder.layer.", "pooler.")):
        name = f"bert.{name}"
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def _only_bert(found: Renamed) -> None:
    found.notes.append("BERT without cross-attention")
    for name in [name for name in found.state if name.startswith(_BERT_ONLY)]:
        del found.state[name]
        found.ignored[".".join(name.split(".")[:2])] += 1
    types = found.state.pop(TOKEN_TYPES, None)
    if types is not None and POSITIONS in found.state:
        # Every token of a caption has type 0: a constant, which the position table can carry.
        found.state[POSITIONS] = found.state[POSITIONS] + types[0]
        found.notes.append("token type 0 added to the positions")


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
