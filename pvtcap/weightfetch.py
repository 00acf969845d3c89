"""The files that a configuration takes from the Hugging Face hub, put into a plain folder.

DIR/pvt_v2_b1.in1k/model.safetensors
DIR/blip-image-captioning-base/model.safetensors, or its shards and their index
DIR/bert-base-uncased/vocab.txt
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pvtcap.config import Config
from pvtcap.encoder import Encoder
from pvtcap.errors import ConfigError
from pvtcap.weightfiles import INDEX_FILES, hub_file, hub_weights, index_shards


def fetch(config: Config, to: Path) -> list[str]:
    """Copy every file there; returns the overrides that name the copies. ConfigError when one cannot be had."""
    model = config.model
    words = []
    if model.encoder_weights == "timm":
        repo = str(Encoder(model.encoder).pvt.pretrained_cfg["hf_hub_id"])
        path = _copy(hub_file(repo, ["model.safetensors"], "model.encoder_weights"), to / _name(repo))
        words.append(f"model.encoder_weights={path}")
    if model.decoder != "scratch" and not Path(model.decoder).exists():
        found = hub_weights(model.decoder, "model.decoder")
        folder = to / _name(model.decoder)
        files = [*index_shards(found), found] if found.name in INDEX_FILES else [found]
        if (beside := found.with_name("config.json")).is_file():
            files.append(beside)
        for file in files:
            _copy(file, folder)
        words.append(f"model.decoder={folder}")
    if config.text.vocab != "train" and not Path(config.text.vocab).exists():
        found = hub_file(config.text.vocab, ["vocab.txt"], "text.vocab")
        words.append(f"text.vocab={_copy(found, to / _name(config.text.vocab))}")
    return words


def _name(repo: str) -> str:
    return repo.rpartition("/")[2]


def _copy(file: Path, folder: Path) -> Path:
    """A copy, not a link: the folder goes to another machine."""
    target = folder / file.name
    partial = target.with_name(f".{target.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, partial)
        partial.rename(target)
    except OSError as error:
        raise ConfigError(f"cannot copy weights ({error.strerror})", where=target) from None
    return target
