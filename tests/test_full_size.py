"""pytest tests/test_full_size.py: with the parts as large as the published ones, on random values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BlipConfig, BlipForConditionalGeneration

from pvtcap import weights
from pvtcap.captioner import Captioner
from pvtcap.config import Config
from pvtcap.configfile import parse

VOCAB = 30524
EXPORT = """
import json, re, sys
from pathlib import Path
from pvtcap.checkpoint import Checkpoint
from pvtcap.export import export

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = memory("VmRSS")
export(Checkpoint.open(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
print(json.dumps({"before": before, "peak": memory("VmHWM")}))
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlipForConditionalGeneration, Path]:
    """blip-image-captioning-base by its class with a small vision part; a PVT-Tiny file beside it."""
    folder = tmp_path_factory.mktemp("full")
    torch.manual_seed(1)
    vision = {"num_hidden_layers": 1, "intermediate_size": 64}
    # As in the published configuration: not the class's 8 heads, and no dropout.
    text = {"num_attention_heads": 12, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    blip = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    blip.save_pretrained(folder / "blip")
    save_file(timm.create_model("pvt_v2_b1", pretrained=False).state_dict(), folder / "pvt.safetensors")
    return blip, folder


def config_of(folder: Path) -> Config:
    model = {"encoder_weights": str(folder / "pvt.safetensors"), "decoder": str(folder / "blip")}
    return parse({"model": model, "run": {"dir": str(folder / "run")}}, "test")


@pytest.mark.slow
def test_logits_and_features_are_those_of_transformers_and_timm(
    parts: tuple[BlipForConditionalGeneration, Path],
) -> None:
    blip, folder = parts
    config = config_of(folder)
    model = Captioner(config, VOCAB).eval()
    loaded = [weights.load_encoder(model.encoder, config), weights.load_decoder(model, config)]
    assert [one.new for one in loaded] == [(), ()]
    tokens = torch.randint(1000, VOCAB - 2, (2, 12), generator=torch.Generator().manual_seed(2))
    patches = torch.randn(2, 144, 768, generator=torch.Generator().manual_seed(3))
    pvt = timm.create_model("pvt_v2_b1", pretrained=False, num_classes=0).eval()
    pvt.load_state_dict({n: v for n, v in weights.read_tensors(folder / "pvt.safetensors").items() if n[:5] != "head."})
    photos = torch.randint(0, 256, (1, 3, 384, 384), dtype=torch.uint8)
    with torch.no_grad():
        theirs = blip.text_decoder(input_ids=tokens, encoder_hidden_states=patches).logits
        ours = model.decoder.lm(input_ids=tokens, encoder_hidden_states=patches).logits
        features = model.encoder(photos)
        expected = pvt.forward_features((photos - model.encoder.mean) / model.encoder.std)
    print(f"logits differ by {float((ours - theirs).abs().max()):.1e} of {float(theirs.abs().max()):.1f}")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert features.shape == (1, 512, 12, 12)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["combined", "hf"])
def test_exporting_takes_no_more_memory_than_the_model_twice(
    parts: tuple[BlipForConditionalGeneration, Path], tmp_path: Path, to: str
) -> None:
    from test_checkpoint import write

    _, folder = parts
    config = config_of(folder)
    checkpoint = write(config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path})}), 1)
    # write() has a small vocabulary; what matters here are 12 layers of 768.
    files = [*checkpoint.glob("*.safetensors"), folder / "pvt.safetensors"]
    size = sum(path.stat().st_size for path in files)
    words = [sys.executable, "-c", EXPORT, str(checkpoint), to, str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"{to}: model {size / 2**20:,.0f} MiB, peak {(told['peak'] - told['before']) / 2**20:,.0f} MiB above imports")
    assert told["peak"] - told["before"] < 2 * size
