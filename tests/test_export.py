"""pytest tests/test_export.py: what leaves pvtcap says the same as what stays, to the token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_tree, torchrun
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_cli import pvtcap as command
from test_weights import blip_folder, pvt_weights
from transformers import BlipForConditionalGeneration
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

import pvtcap
from pvtcap import weights
from pvtcap.captioner import Captioner
from pvtcap.checkpoint import Checkpoint
from pvtcap.configfile import parse
from pvtcap.errors import CheckpointError, ConfigError
from pvtcap.export import export

STAND_ALONE = """
import json, sys
class NoPvtcap:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pvtcap":
            raise ImportError(name)
sys.meta_path.insert(0, NoPvtcap())
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
folder, *photos = sys.argv[1:]
model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
model.eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
pixels = model.preprocess(photos)
upright = [Image.open(path) for path in photos[:3]]
processed = AutoImageProcessor.from_pretrained(folder)(upright, return_tensors="pt")["pixel_values"]
torch.save(pixels, folder + ".pixels")
with torch.no_grad():
    ids = model.generate(pixels)
    logits = model(pixels, ids).logits
print(json.dumps({
    "ids": ids.tolist(), "captions": model.caption(photos, tokenizer), "logits": logits.double().sum(-1).tolist(),
    "processor": (processed - pixels[:3]).abs().mean((1, 2, 3)).tolist(),
    "beams": model.caption(photos, tokenizer, num_beams=1), "parameters": sum(p.numel() for p in model.parameters()),
}))
"""


@pytest.fixture(scope="module")
def begun(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run takes in: blip/ and pvt.safetensors; vocab.txt; and four ranks' ZeRO-3 run/ of it."""
    folder = tmp_path_factory.mktemp("begun")
    blip_folder(folder / "blip")
    pvt_weights(folder / "pvt.safetensors")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "'", *"abcdefghijklmnopqrstuvwxyz"[1:]]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tree = tiny_tree(shapes, folder / "run")
    tree["data"] |= {"val": None}
    tree["text"] |= {"vocab": str(folder / "vocab.txt"), "prompt": "a b "}
    tree["model"] |= {"encoder_weights": str(folder / "pvt.safetensors"), "decoder": str(folder / "blip")}
    tree["train"] |= {"what": "projection+decoder", "steps": 5}
    tree["zero"] = {"stage": 3}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    done = torchrun(4, "-m", "pvtcap", "train", str(folder / "run.yaml"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ignored: vision_model (18)" in done.stdout
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Small, large, grey, transparent, and on its side."""
    draw = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        "small.png": (draw.integers(0, 256, (20, 30, 3), dtype=np.uint8), {}),
        "large.jpg": (np.kron(draw.integers(0, 256, (30, 40, 3)), np.ones((10, 10, 1))).astype(np.uint8), {}),
        "grey.jpg": (draw.integers(0, 256, (40, 50), dtype=np.uint8), {}),
        "clear.png": (draw.integers(0, 256, (40, 50, 4), dtype=np.uint8), {}),
        "turned.jpg": (draw.integers(0, 256, (40, 60, 3), dtype=np.uint8), {"exif": exif}),
    }
    for name, (values, extra) in made.items():
        Image.fromarray(values).save(tmp_path / name, **extra)
    return [tmp_path / name for name in made]


def said(captioner: pvtcap.Captioner, photos: list[Path]) -> tuple[list[list[int]], torch.Tensor]:
    """Token ids of the photos' captions, and the logits of these."""
    pixels = torch.stack([captioner.square(photo) for photo in photos])
    tokenizer, decoder = captioner.tokenizer, captioner.model.decoder
    with torch.inference_mode():
        patches = captioner.model.patches(pixels)
        ids = decoder.generate(patches, tokenizer.prefix, tokenizer.end_id, tokenizer.pad_id, captioner.search())
        return ids.tolist(), decoder.lm(input_ids=ids, encoder_hidden_states=patches).logits


def test_the_manifest_names_every_file_that_was_taken_in(begun: Path) -> None:
    files = Checkpoint.open(begun / "run").manifest.weight_files
    assert [file.part for file in files] == ["encoder", "decoder"]
    assert [file.file for file in files] == [str(begun / "pvt.safetensors"), str(begun / "blip/model.safetensors")]
    for file in files:
        told = subprocess.run(["sha256sum", file.file], capture_output=True, text=True, check=True).stdout
        assert told.split()[0] == file.sha256


def test_the_whole_way_round_says_the_same(begun: Path, tmp_path: Path, photos: list[Path]) -> None:
    """BLIP's folder → ZeRO-3 training → combined → a new model → Hugging Face's folder → AutoModel without pvtcap."""
    opened = Checkpoint.open(begun / "run")
    trained = pvtcap.Captioner.from_checkpoint(begun / "run", "cpu")
    ids, logits = said(trained, photos)
    export(opened, "combined", tmp_path / "combined.pth")
    model = {name: str(tmp_path / "combined.pth") for name in ("encoder_weights", "projection_weights", "decoder")}
    tree = opened.config.model_dump(mode="json")
    config = parse({**tree, "model": {**tree["model"], **model}, "run": {"seed": 77}}, "test")
    again = pvtcap.Captioner(Captioner(config, trained.tokenizer.size), trained.tokenizer, config)
    encoder = again.model.encoder
    loaded = [weights.load_encoder(encoder, config), weights.load_projection(again.model, config)]
    assert [one.new for one in [*loaded, weights.load_decoder(again.model, config)]] == [(), (), ()]
    again.model.eval()
    assert_same(said(again, photos), (ids, logits))

    assert export(opened, "hf", tmp_path / "hf") == tmp_path / "hf"
    assert_same(said(pvtcap.Captioner.from_checkpoint(tmp_path / "hf", "cpu"), photos), (ids, logits))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-c", STAND_ALONE, str(tmp_path / "hf"), *map(str, photos)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ids"] == ids
    assert told["captions"] == [caption.text for caption in trained.caption(photos)]
    assert told["beams"] == [caption.text for caption in trained.caption(photos, num_beams=1)]
    torch.testing.assert_close(torch.tensor(told["logits"]), logits.double().sum(-1).float(), rtol=1e-5, atol=1e-4)
    encoder = trained.model.encoder
    ours = (torch.stack([trained.square(photo) for photo in photos]) - encoder.mean) / encoder.std
    assert torch.equal(torch.load(tmp_path / "hf.pixels"), ours)
    # transformers' own image processor does not shrink large JPEGs while it reads them.
    assert max(told["processor"]) < 0.05
    assert told["parameters"] == sum(p.numel() for p in trained.model.parameters())


def assert_same(one: tuple[Any, torch.Tensor], other: tuple[Any, torch.Tensor]) -> None:
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


def test_the_card_says_where_the_model_comes_from(begun: Path, tmp_path: Path) -> None:
    (begun / "run/eval/step_00000005").mkdir(parents=True, exist_ok=True)
    report = {"scores": {"CIDEr": 0.5, "METEOR": None}, "data": "flickr8k|val", "num_photos": 9, "generation": {"a": 1}}
    (begun / "run/eval/step_00000005/scores.json").write_text(json.dumps(report))
    export(Checkpoint.open(begun / "run"), "hf", tmp_path / "hf")
    shutil.rmtree(begun / "run/eval")
    card = (tmp_path / "hf/README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    revision = json.loads((begun / "run/environment.json").read_text())["git_revision"]
    files = Checkpoint.open(begun / "run").manifest.weight_files
    for text in ("| CIDEr | 0.5000 |", "| METEOR | not available |", "flickr8k\\|val, 9 photos (a 1)", files[1].sha256,
                 f"| git revision | {revision or 'not known'} |", "decoder_heads: 2", "48 photos"):  # fmt: skip
        assert text in card, text
    kept = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert kept["train"]["what"] == "projection+decoder"
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "modeling_pvtcap.py", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    }  # fmt: skip


@pytest.fixture
def raw(begun: Path, tmp_path: Path) -> Path:
    """The checkpoint as DeepSpeed's files alone."""
    shutil.copytree(begun / "run/checkpoints/step_00000005", tmp_path / "raw")
    (tmp_path / "raw/trainable.safetensors").unlink()
    return tmp_path / "raw"


def test_a_raw_zero_3_checkpoint_of_four_ranks_is_exported_by_one_process(begun: Path, raw: Path) -> None:
    assert len(list(raw.glob("deepspeed/*_optim_states.pt"))) == 4
    whole = raw.parent / "whole.safetensors"
    told = command("export", raw, "--to", "safetensors", "--out", whole)
    assert told.returncode == 0, told.stderr
    assert told.stdout == f"{whole}\n"
    export(Checkpoint.open(begun / "run"), "safetensors", raw.parent / "expected.safetensors")
    with safe_open(whole, "pt") as ours, safe_open(raw.parent / "expected.safetensors", "pt") as expected:
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours.get_tensor(name), expected.get_tensor(name)) for name in ours.keys())  # noqa: SIM118
        assert json.loads(ours.metadata()["weight_files"])[0]["part"] == "encoder"
    assert oct(whole.stat().st_mode & 0o777) == "0o644"


def test_deepspeeds_files_that_lack_something_or_would_run_code(raw: Path) -> None:
    last = raw / "deepspeed/zero_pp_rank_3_mp_rank_00_optim_states.pt"
    whole = last.read_bytes()
    torch.save({"optimizer_state_dict": Harmful()}, last)
    forget_sizes(raw)
    with pytest.raises(CheckpointError, match=r"refused: this file would run code; got builtins\.print"):
        Checkpoint.open(raw).captioner(torch.device("cpu"))
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a readable DeepSpeed file"):
        Checkpoint.open(raw).captioner(torch.device("cpu"))
    last.unlink()
    with pytest.raises(CheckpointError, match=r"cannot put its files together .*Copy the files of all ranks"):
        Checkpoint.open(raw).captioner(torch.device("cpu"))


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def forget_sizes(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))


def test_only_what_trained_is_deepspeeds_and_ours(begun: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(begun / "run")
    export(opened, "safetensors", tmp_path / "trained.safetensors", only_trained=True)
    ours, kept = (load_file(path) for path in (tmp_path / "trained.safetensors", opened.path / "trainable.safetensors"))
    assert ours.keys() == kept.keys()
    assert all(torch.equal(ours[name], kept[name]) for name in kept)
    assert not any(name.startswith("encoder.") for name in ours)


def test_a_combined_file_is_what_older_scripts_load(begun: Path, tmp_path: Path, photos: list[Path]) -> None:
    opened = Checkpoint.open(begun / "run")
    trained = pvtcap.Captioner.from_checkpoint(begun / "run", "cpu")
    ids, logits = said(trained, photos)
    export(opened, "combined", tmp_path / "combined.pth")
    tree = torch.load(tmp_path / "combined.pth", weights_only=True)
    assert list(tree) == ["pvt", "blip", "projection"]
    assert list(tree["projection"]) == ["weight", "bias"]
    # BLIP's own class takes the text decoder, strictly.
    theirs = BlipForConditionalGeneration.from_pretrained(begun / "blip").eval()
    decoder: Any = BlipTextLMHeadModel(theirs.config.text_config).eval()
    decoder.load_state_dict(tree["blip"])
    pixels = torch.stack([trained.square(photo) for photo in photos])
    with torch.no_grad():
        patches = trained.model.patches(pixels)
        expected = decoder(input_ids=torch.tensor(ids), encoder_hidden_states=patches).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    # With the rest of BLIP, the whole class does.
    export(opened, "combined", tmp_path / "whole.pth", whole_blip=begun / "blip")
    theirs.load_state_dict(torch.load(tmp_path / "whole.pth", weights_only=True)["blip"])

    for name in ("combined.pth", "whole.pth"):
        pvt, blip, projection = pvtcap.load_combined_model(tmp_path / name, heads=2)
        normalised = (pixels - trained.model.encoder.mean) / trained.model.encoder.std
        with torch.no_grad():
            features = projection(pvt.forward_features(normalised))
        torch.testing.assert_close(features, patches)
        tokenizer, how = trained.tokenizer, trained.search()
        found = blip.generate(
            features, torch.tensor(tokenizer.prefix), eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.pad_id,
            num_beams=how.num_beams, max_length=how.max_length, min_length=how.min_length,
        )  # fmt: skip
        assert found.tolist() == ids
        assert blip.generate(features[:1], bos_token_id=58, eos_token_id=3, num_beams=1)[0, 0] == 58
        assert blip(features, torch.tensor(ids)).logits.shape == logits.shape
    with pytest.raises(CheckpointError, match="how many attention heads"):
        pvtcap.load_combined_model(tmp_path / "combined.pth")
    torch.save({**tree, "pvt": {"stages.0.x": torch.rand(2)}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="no PVT v2 that timm knows"):
        pvtcap.load_combined_model(tmp_path / "odd.pth")


def test_what_cannot_be_exported(begun: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(begun / "run")
    (tmp_path / "there.pth").write_text("")
    for to, out, options, says in (
        ("combine", "x.pth", {}, "Did you mean 'combined'"),
        ("combined", "there.pth", {}, "this exists already"),
        ("safetensors", "x.bin", {}, r"wanted ….safetensors"),
        ("hf", "x", {"only_trained": True}, "--only-trained is for --to safetensors; got --to hf"),
        ("hf", "x", {"whole_blip": begun / "blip"}, "--whole-blip is for --to combined"),
    ):
        with pytest.raises(ConfigError, match=says):
            export(opened, to, tmp_path / out, **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="not a whole BLIP model"):
        export(opened, "combined", tmp_path / "x.pth", whole_blip=begun / "pvt.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["there.pth"]


def test_frozen_weights_may_lie_elsewhere_but_are_the_same(begun: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(begun / "run/checkpoints/step_00000005", moved)
    tree = json.loads((moved / "manifest.json").read_text())
    tree["config"]["model"]["encoder_weights"] = "/nowhere/pvt.safetensors"
    (moved / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"/nowhere/pvt\.safetensors: no such weights file"):
        pvtcap.Captioner.from_checkpoint(moved, "cpu")
    assert pvtcap.Captioner.from_checkpoint(moved, "cpu", encoder_weights=str(begun / "pvt.safetensors"))
    pvt_weights(tmp_path / "other.safetensors", seed=9)
    with pytest.raises(CheckpointError, match="trained on other encoder weights"):
        export(Checkpoint.open(moved), "hf", tmp_path / "hf", encoder_weights=str(tmp_path / "other.safetensors"))
    assert not (tmp_path / "hf").exists()
