"""Where weights come from: timm, a file, a Hugging Face BLIP model, or what a checkpoint of ours trained.

Nothing is unpickled that could run code: .safetensors, or torch files read with ``weights_only``.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pvtcap.captioner import Captioner
from pvtcap.config import Config, TextConfig
from pvtcap.encoder import Encoder
from pvtcap.errors import CheckpointError, ConfigError
from pvtcap.text import CaptionTokenizer

# Not in BLIP: token types (ours are zero, see decoder.py). Tied: the head is the embedding table, stored once or twice.
_BLIP_MAY_LACK = {
    "bert.embeddings.token_type_embeddings.weight",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
}
_BLIP_EXTRA = {"bert.embeddings.position_ids"}
_TEXT_DECODER = "text_decoder."
# torch's unpickler takes any byte for an instruction: a file of another kind fails wherever it makes no sense.
_NOT_WEIGHTS = (SafetensorError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError)


def load_encoder(encoder: Encoder, config: Config) -> None:
    """Fill the encoder from ``model.encoder_weights``; 'scratch' leaves it as it was made."""
    source = config.model.encoder_weights
    if source == "scratch":
        return
    pvt = encoder.pvt
    path = (
        _hub_file(pvt.pretrained_cfg["hf_hub_id"], ["model.safetensors"], "model.encoder_weights")
        if source == "timm"
        else Path(source)
    )
    wanted = set(pvt.state_dict())
    # The file also has timm's classifier, and the stages that encoder_stages cuts off.
    state = {
        name: value
        for name, value in read_tensors(path).items()
        if name in wanted or not name.startswith(("head.", "stages."))
    }
    fill(pvt, state, path)


def load_decoder(model: Captioner, config: Config) -> None:
    """Fill the decoder from ``model.decoder``, a BLIP captioning model of Hugging Face's; 'scratch' leaves it."""
    source = config.model.decoder
    if source == "scratch":
        return
    files = ["model.safetensors", "pytorch_model.bin"]
    path = _first_file(Path(source), files) if Path(source).is_dir() else _hub_file(source, files, "model.decoder")
    tensors = read_tensors(path)
    state = {
        name.removeprefix(_TEXT_DECODER): value
        for name, value in tensors.items()
        if name.startswith(_TEXT_DECODER) and name.removeprefix(_TEXT_DECODER) not in _BLIP_EXTRA
    }
    if not state:
        raise CheckpointError(
            "no text decoder in this file",
            where=path,
            wanted=f"tensors named '{_TEXT_DECODER}…'",
            do="Give a BLIP captioning model: Salesforce/blip-image-captioning-base.",
        )
    fill(model.decoder.lm, state, path, may_lack=_BLIP_MAY_LACK)


def load_trained(model: Captioner, path: Path) -> None:
    """Fill the parameters that ``train.what`` trains from a checkpoint's ``trainable.safetensors``."""
    state = read_tensors(path)
    parameters = model.trainable()
    _check_names(state, set(parameters), set(), path)
    for name, parameter in parameters.items():
        _copy(name, parameter, state[name], path)


def load_vocab(text: TextConfig) -> CaptionTokenizer:
    """The vocabulary that ``text.vocab`` names: a vocab.txt, or a Hugging Face model's. Not 'train'."""
    path = Path(text.vocab)
    if not path.is_file():
        if path.suffix:
            raise ConfigError("no such vocabulary file", where="text.vocab", got=text.vocab)
        path = _hub_file(text.vocab, ["vocab.txt"], "text.vocab")
    return CaptionTokenizer.from_file(path, text.prompt)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors or a torch file; CheckpointError when missing or not readable."""
    if not path.is_file():
        raise CheckpointError("no such weights file", where=path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
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
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("not a state dict (names to tensors)", where=path)
    return state


def fill(module: nn.Module, state: Mapping[str, Tensor], where: Path, may_lack: Set[str] = frozenset()) -> None:
    """Copy ``state`` into ``module``; a name that is missing, unknown or of another shape is an error naming it."""
    own = module.state_dict()
    _check_names(state, set(own), may_lack, where)
    for name, value in state.items():
        _copy(name, own[name], value, where)


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
    with torch.no_grad():
        target.copy_(value)


def _first_file(folder: Path, names: list[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError("no weights in this folder", where=folder, wanted=" or ".join(names))


def _hub_file(repo: str, names: list[str], key: str) -> Path:
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
        do=f"Fetch it where there is a network (hf download {repo}) and copy the cache, or point {key} to the file.",
    )
