"""A checkpoint's model as files that others read. On a CPU, by one process, at any ZeRO stage and world size.

    export(checkpoint, "safetensors", Path("model.safetensors"))      pvtcap's own names; only what trained, if asked
    export(checkpoint, "combined", Path("blip_pvt_combined.pth"))     {'pvt': …, 'blip': …, 'projection': …}
    export(checkpoint, "hf", Path("folder"))                          for AutoModel.from_pretrained(folder)

Nothing is overwritten, and what is not finished has another name. Memory: the model, and for .safetensors files the
bytes that are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from pvtcap import __version__
from pvtcap.captioner import Captioner
from pvtcap.checkpoint import Checkpoint
from pvtcap.errors import CheckpointError, ConfigError, did_you_mean
from pvtcap.modelcard import model_card
from pvtcap.text import CaptionTokenizer
from pvtcap.weightfiles import read_weights
from pvtcap.weightnames import TEXT_DECODER, TOKEN_TYPES
from pvtcap.weights import tied_names

FORMS = ("safetensors", "combined", "hf")
MODEL, CODE = "model.safetensors", "modeling_pvtcap.py"


def export(
    checkpoint: Checkpoint,
    to: str,
    out: Path,
    *,
    only_trained: bool = False,
    whole_blip: Path | None = None,
    **model: str | None,
) -> Path:
    """Write ``out`` and return it. ``to`` is one of FORMS.

    ``only_trained`` leaves out of a .safetensors what was frozen. ``whole_blip``, a BLIP model's file or folder, makes
    a combined file's 'blip' the whole of that model with our text decoder in it. ``model`` is as in
    ``Checkpoint.captioner``.
    """
    check(to, out, only_trained=only_trained, whole_blip=whole_blip)
    captioner = checkpoint.captioner(torch.device("cpu"), (), **model)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    _remove(partial)
    if to == "hf":
        _hub_folder(checkpoint, captioner, partial)
    elif to == "combined":
        torch.save(combined(captioner, whole_blip), partial)
    else:
        state: Mapping[str, Tensor] = captioner.trainable() if only_trained else own_state(captioner)
        _save(state, partial, checkpoint)
    partial.rename(out)
    return out


def check(to: str, out: Path, *, only_trained: bool, whole_blip: Path | None) -> None:
    """ConfigError for words that do not fit together."""
    if to not in FORMS:
        do = did_you_mean(to, FORMS) or f"Known: {', '.join(FORMS)}."
        raise ConfigError("not a form of export", where="--to", got=to, do=do)
    if (only_trained and to != "safetensors") or (whole_blip is not None and to != "combined"):
        option, form = ("--only-trained", "safetensors") if only_trained else ("--whole-blip", "combined")
        raise ConfigError(f"{option} is for --to {form}", got=f"--to {to}")
    if out.exists():
        raise ConfigError("not exported: this exists already", where=out, do="Remove it or name another place.")
    if to == "safetensors" and out.suffix != ".safetensors":
        raise ConfigError("not a name for this form", where="--out", got=out, wanted="….safetensors")


def own_state(captioner: Captioner) -> dict[str, Tensor]:
    """The whole model by pvtcap's names, BERT's tied head once."""
    left_out = tied_names(captioner)
    return {name: value for name, value in captioner.state_dict().items() if name not in left_out}


def combined(captioner: Captioner, whole_blip: Path | None = None) -> dict[str, dict[str, Tensor]]:
    """Three state dicts: timm's names, BLIP's (the text decoder's own, or the whole model's), the projection's."""
    lm = {name: value for name, value in captioner.decoder.lm.state_dict().items() if name != TOKEN_TYPES}
    if whole_blip is not None:
        read = read_weights(whole_blip, "blip")
        rest = {name: value for name, value in read.tensors.items() if not name.startswith(TEXT_DECODER)}
        if len(rest) in (0, len(read.tensors)):
            raise CheckpointError("not a whole BLIP model", where=read.path, wanted=f"'{TEXT_DECODER}…' and its vision")
        lm = {**rest, **{TEXT_DECODER + name: value for name, value in lm.items()}}
    return {
        "pvt": dict(captioner.encoder.pvt.state_dict()),
        "blip": lm,
        "projection": dict(captioner.projection.net.state_dict()),
    }


def hub_config(checkpoint: Checkpoint, captioner: Captioner, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """config.json: all that modeling_pvtcap.py needs to build the model and to caption as ``evaluate`` does."""
    config = checkpoint.config
    theirs = GenerationConfig().to_dict()  # type: ignore[no-untyped-call]
    generation = {name: value for name, value in config.evaluate.model_dump(mode="json").items() if name in theirs}
    if generation.get("top_p") is not None:
        generation |= {"do_sample": True, "top_k": 0}
    pvt = captioner.encoder.pvt
    bert = captioner.decoder.lm.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "max_position_embeddings", "layer_norm_eps", "is_decoder", "add_cross_attention")  # fmt: skip
    module = CODE.removesuffix(".py")
    return {
        "model_type": "pvtcap",
        "architectures": ["PvtcapModel"],
        "auto_map": {"AutoConfig": f"{module}.PvtcapConfig", "AutoModel": f"{module}.PvtcapModel"},
        "dtype": "float32",
        "encoder": config.model.encoder,
        "encoder_stages": config.model.encoder_stages,
        "encoder_width": captioner.encoder.width,
        "projection": config.model.projection,
        "bert": {name: getattr(bert, name) for name in names},
        "image_px": config.data.image_px,
        "image_mean": list(pvt.pretrained_cfg["mean"]),
        "image_std": list(pvt.pretrained_cfg["std"]),
        "prefix_ids": tokenizer.prefix,
        "generation": {
            **generation,
            "bos_token_id": tokenizer.begin_id,
            "eos_token_id": tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
        },
        "pvtcap": config.model_dump(mode="json"),
    }


def _hub_folder(checkpoint: Checkpoint, captioner: Captioner, folder: Path) -> None:
    folder.mkdir()
    tokenizer = checkpoint.tokenizer()
    config = hub_config(checkpoint, captioner, tokenizer)
    _write_json(folder / "config.json", config)
    _save(own_state(captioner), folder / MODEL, checkpoint)
    shutil.copy(Path(__file__).parent / "hub" / CODE, folder / CODE)
    special = {"bos_token": "[DEC]", "eos_token": "[SEP]", "sep_token": "[SEP]", "pad_token": "[PAD]",
               "unk_token": "[UNK]", "additional_special_tokens": ["[ENC]"]}  # fmt: skip
    theirs: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer.backend,
        model_max_length=config["bert"]["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    theirs.save_pretrained(folder)
    tokenizer.save(folder / "vocab.txt")
    side = config["image_px"]
    processor = {
        "image_processor_type": "BlipImageProcessor",
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "image_mean": config["image_mean"],
        "image_std": config["image_std"],
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    }
    _write_json(folder / "preprocessor_config.json", processor)
    (folder / "README.md").write_text(model_card(checkpoint), encoding="utf-8")


def _save(state: Mapping[str, Tensor], path: Path, checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest
    about = {"format": "pt", "pvtcap": __version__, "step": str(manifest.step),
             "weight_files": json.dumps([source.model_dump() for source in manifest.weight_files])}  # fmt: skip
    save_file({name: value.detach().contiguous() for name, value in state.items()}, path, metadata=about)
    path.chmod(0o644)  # the library makes it the owner's alone


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
