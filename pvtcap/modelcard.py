"""The README.md of an exported model: what it was trained on and how, what it scores, and from which files it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pvtcap import jsonfile
from pvtcap.checkpoint import Checkpoint
from pvtcap.config import ranks_in_words
from pvtcap.errors import CheckpointError

_USE = """\
```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
print(model.caption(["photo.jpg"], tokenizer))
```

`modeling_pvtcap.py` is all the code: it needs torch, transformers, timm and Pillow, and not pvtcap. `model.generate`
takes pixels of `model.preprocess` or of the image processor beside it."""


def model_card(checkpoint: Checkpoint) -> str:
    """Markdown with the hub's metadata in front; what is not known is said to be not known."""
    config, manifest = checkpoint.config, checkpoint.manifest
    run = checkpoint.path.parent.parent
    environment = _json(run / "environment.json")
    head = {"library_name": "transformers", "pipeline_tag": "image-to-text", "tags": ["image-captioning", "pvtcap"]}
    facts = [
        ("step", f"{manifest.step:,}"),
        ("photos seen", f"{manifest.num_samples_seen:,} (a global batch has {manifest.global_batch})"),
        ("training data", "; ".join(f"{of.name}, {of.num_samples:,} photos" for of in manifest.train_data)),
        ("encoder", f"{config.model.encoder}, {'trained' if 'encoder' in config.train.what else 'frozen'}"),
        ("what trained", config.train.what),
        ("photo size", f"{config.data.image_px} × {config.data.image_px} pixels"),
        ("ZeRO stage, precision", f"{config.zero.stage}, {config.precision}, {ranks_in_words(manifest.world_size)}"),
        ("pvtcap", manifest.pvtcap),
        ("git revision", environment.get("git_revision") or "not known"),
    ]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# An image captioner: {config.model.encoder} and BLIP's text decoder\n\nTrained with pvtcap.",
        f"## Use\n\n{_USE}",
        "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts),
        f"## Scores\n\n{_scores(_json(run / 'eval' / checkpoint.path.name / 'scores.json'))}",
        f"## Where the weights began\n\n{_sources(checkpoint)}",
        f"## Recipe\n\n```yaml\n{config.to_yaml()}```",
    ]
    return "\n\n".join(parts) + "\n"


def _scores(report: dict[str, Any]) -> str:
    if not report:
        return "This checkpoint was not evaluated in its run folder."
    rows = [f"| {name} | {'not available' if v is None else f'{v:.4f}'} |" for name, v in report["scores"].items()]
    how = ", ".join(f"{name} {value}" for name, value in report["generation"].items())
    return f"{_cell(report['data'])}, {report['num_photos']:,} photos ({how}).\n\n| | |\n|---|---|\n" + "\n".join(rows)


def _sources(checkpoint: Checkpoint) -> str:
    sources = checkpoint.manifest.weight_files
    if not sources:
        return "No file was taken in, or a pvtcap that did not write them down began this run."
    rows = [f"| {s.part} | {_cell(s.file)} | {s.size_bytes:,} | `{s.sha256}` |" for s in sources]
    return "| part | file | bytes | sha256 |\n|---|---|---|---|\n" + "\n".join(rows)


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _json(path: Path) -> dict[str, Any]:
    """What another command left beside the checkpoint, if it did."""
    if not path.is_file():
        return {}
    tree: dict[str, Any] = jsonfile.read(path, CheckpointError)
    return tree
