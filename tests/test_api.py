"""pytest tests/test_api.py: captions from Python."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint import write

import pvtcap
from pvtcap.config import Config
from pvtcap.errors import CheckpointError, ConfigError, ShardError


def test_importing_pvtcap_loads_nothing_heavy() -> None:
    program = (
        "import pvtcap, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); dir(pvtcap); "
        "pvtcap.Captioner; pvtcap.load_combined_model; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'captioners'"):
        pvtcap.captioners  # noqa: B018


@pytest.fixture
def captioner(config: Config) -> pvtcap.Captioner:
    return pvtcap.Captioner.from_checkpoint(write(config, 1).parent.parent, device="cpu")


def test_every_kind_of_image_gives_the_same_caption(captioner: pvtcap.Captioner, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "x.png")
    images = [image, pixels, torch.from_numpy(pixels).permute(2, 0, 1), tmp_path / "x.png", str(tmp_path / "x.png"),
              (tmp_path / "x.png").read_bytes()]  # fmt: skip
    captions = captioner.caption(images, num_beams=2)
    assert len(captions) == 6
    assert {caption.text for caption in captions} == {captioner.caption(image, num_beams=2)[0].text}
    assert captioner.caption([]) == []


def test_a_photo_is_turned_upright(captioner: pvtcap.Captioner) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    buffer, upright = io.BytesIO(), io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(upright, "PNG")
    assert torch.equal(captioner.square(buffer.getvalue()), captioner.square(upright.getvalue()))
    assert torch.equal(captioner.square(Image.open(buffer)), captioner.square(upright.getvalue()))


def test_the_score_is_the_mean_log_probability_of_the_tokens(captioner: pvtcap.Captioner) -> None:
    image = np.random.default_rng(4).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (caption,) = captioner.caption(image, num_beams=1)
    tokenizer, model = captioner.tokenizer, captioner.model
    with torch.inference_mode():
        patches = model.patches(captioner.square(image)[None])
        how = captioner.search(num_beams=1)
        row = model.decoder.generate(patches, tokenizer.prefix, tokenizer.end_id, tokenizer.pad_id, how)[0].tolist()
        logs = []
        for length in range(len(tokenizer.prefix), len(row)):
            inputs: dict[str, Any] = {"input_ids": torch.tensor([row[:length]]), "encoder_hidden_states": patches}
            logs.append(float(model.decoder.lm(**inputs).logits[0, -1].log_softmax(0)[row[length]]))
            if row[length] == tokenizer.end_id:
                break
    assert caption.score == pytest.approx(sum(logs) / len(logs), abs=1e-5)
    assert -math.inf < caption.score < 0


def test_what_is_not_an_image_or_a_setting(captioner: pvtcap.Captioner, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_text("no photo")
    for photo, says in (
        (tmp_path / "cat.jpg", r"cat\.jpg: not a photo"),
        (tmp_path / "none.jpg", r"none\.jpg: missing photo"),
        (b"no photo", "bytes: not a photo"),
    ):
        with pytest.raises(ShardError, match=says):
            captioner.caption([photo])
    with pytest.raises(ConfigError, match=r"not an image; got ndarray, float64 \(3, 4\)"):
        captioner.caption(np.zeros((3, 4)))
    with pytest.raises(ConfigError, match="num_beam"):
        captioner.caption([], num_beam=3)
    with pytest.raises(ConfigError, match=r"evaluate\.num_beams"):
        captioner.caption([], num_beams=0)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        pvtcap.Captioner.from_checkpoint(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(CheckpointError, match="not a model that pvtcap exported"):
        pvtcap.Captioner.from_checkpoint(tmp_path)
