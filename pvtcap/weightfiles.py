"""Files of weights, read safely: .safetensors, torch's own, folders of Hugging Face's, sharded ones too.

Nothing is unpickled that could run code: torch files are read with ``weights_only``. What is read is never changed, and
large files are mapped into memory instead of copied.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pvtcap import jsonfile
from pvtcap.errors import CheckpointError, ConfigError

# In the order of preference; an index names the shards that a large model is cut into.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
COMBINED_PARTS = ("pvt", "blip", "projection")
# What training scripts put around a state dict.
_WRAPPERS = ("model", "state_dict", "module", "model_state_dict", "state_dict_ema")
# torch's unpickler takes any byte for an instruction: a file of another kind fails wherever it makes no sense.
_NOT_WEIGHTS = (
    *(SafetensorError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError),
    *(zipfile.BadZipFile, struct.error, AssertionError),
)


@dataclass(frozen=True)
class WeightFiles:
    """Tensors by name, and the files that they came from."""

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return self.files[0]


def read_weights(path: Path, part: str | None = None) -> WeightFiles:
    """All tensors behind a file, an index or a folder; ``part`` is the one to take out of a combined file.

    Raises CheckpointError when something is missing, unreadable, not weights, or lacks the part.
    """
    path = _in_folder(path) if path.is_dir() else path
    if path.name.endswith(".index.json"):
        shards = index_shards(path)
        tensors = {name: value for shard in shards for name, value in read_tensors(shard).items()}
        return WeightFiles(tensors, (*shards, path))
    return WeightFiles(read_tensors(path, part), (path,))


def read_tensors(path: Path, part: str | None = None) -> dict[str, Tensor]:
    """Tensors by name from one .safetensors or torch file, out of the dict around them if there is one."""
    tree = read_tree(path)
    if any(isinstance(tree.get(name), dict) for name in COMBINED_PARTS):
        if part not in tree:
            raise CheckpointError(
                f"a combined file without '{part}'" if part else "a combined file of several models",
                where=path,
                got=", ".join(map(str, tree)),
            )
        tree = _state_dict(tree[part], path)
    for wrapper in _WRAPPERS:
        if isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
            break
    return _state_dict(tree, path)


def read_tree(path: Path) -> dict[str, Any]:
    """What a weights file holds, as it holds it; CheckpointError when missing or not readable."""
    if not path.is_file():
        raise CheckpointError("no such weights file", where=path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # Only torch's newer format, a ZIP, can be mapped.
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "refused: the file holds more than tensors, or is damaged",
            where=path,
            do=f"torch says: {' '.join(str(error).split())[:160]}",
        ) from None
    except _NOT_WEIGHTS as error:
        raise CheckpointError(
            f"not a readable weights file ({' '.join(str(error).split())[:160]})",
            where=path,
            do="It may be cut short: copy or download it again.",
        ) from None
    if not isinstance(tree, dict):
        raise CheckpointError("not a state dict (names to tensors)", where=path, got=type(tree).__name__)
    return tree


def index_shards(index: Path) -> list[Path]:
    """The shard files that an index names, beside it; CheckpointError when it is not an index, or one is elsewhere."""
    content = jsonfile.read(index, CheckpointError, "not an index of shards")
    try:
        names = sorted(set(content["weight_map"].values()))
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not an index of shards ({type(error).__name__})", where=index) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError("an index that names a file outside its folder", where=index, got=repr(name))
        if not (index.parent / name).is_file():
            raise CheckpointError("a shard of these weights is missing", where=index.parent / name, do="Fetch it too.")
    return [index.parent / name for name in names]


def hub_weights(repo: str, key: str) -> Path:
    """A hub model's weights, from the cache or the network: the file, or the index when its shards are there too."""
    path = hub_file(repo, [*SINGLE_FILES, *INDEX_FILES], key)
    with suppress(ConfigError):  # it says how many heads, if it is there: the weights do without
        hub_file(repo, ["config.json"], key)
    if path.name in INDEX_FILES:
        weight_map: dict[str, str] = jsonfile.read(path, CheckpointError)["weight_map"]
        for name in sorted(set(weight_map.values())):
            hub_file(repo, [name], key)
    return path


def hub_file(repo: str, names: list[str], key: str) -> Path:
    """The first of these files that the repository has, from the cache or the network."""
    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError:
            continue  # not in the cache and no network: another name may be
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
            raise ConfigError(
                f"cannot fetch {repo} ({type(error).__name__})",
                where=key,
                do="Check the name; or point the key to a local folder or file.",
            ) from None
    raise ConfigError(
        f"{repo} is neither in the Hugging Face cache nor reachable",
        where=key,
        wanted=" or ".join(names),
        do="Where there is a network, 'pvtcap fetch-weights CONFIG --to DIR' fetches it and prints what to set here.",
    )


def _in_folder(folder: Path) -> Path:
    names = [*SINGLE_FILES, *INDEX_FILES]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError("no weights in this folder", where=folder, wanted=" or ".join(names))


def _state_dict(tree: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(tree, dict) or not tree or not all(isinstance(value, Tensor) for value in tree.values()):
        raise CheckpointError("not a state dict (names to tensors)", where=path)
    # nn.DataParallel and DistributedDataParallel put this before every name.
    wrapped = all(name.startswith("module.") for name in tree)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in tree.items()}
