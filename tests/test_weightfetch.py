"""pytest tests/test_weightfetch.py: a hub on loopback, its cache, and a machine without network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_weights import blip_folder, pvt_weights


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with a sharded BLIP, a PVT and BERT's vocabulary, and what was asked of it."""
    files = tmp_path / "hub"
    (files / "timm/pvt_v2_b0.in1k").mkdir(parents=True)
    pvt_weights(files / "timm/pvt_v2_b0.in1k/model.safetensors")
    state = {name: value.clone() for name, value in blip_folder(tmp_path / "blip").state_dict().items()}
    blip = files / "Salesforce/blip"
    blip.mkdir(parents=True)
    halves = [dict(list(state.items())[part::2]) for part in (0, 1)]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, half in zip(names, halves, strict=True):
        save_file(half, blip / name)
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (blip / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (blip / "config.json").write_text((tmp_path / "blip/config.json").read_text())
    (files / "bert-base-uncased").mkdir()
    (files / "bert-base-uncased/vocab.txt").write_text("[PAD]\n[UNK]\n[SEP]\n")
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repo, _, name = self.path.strip("/").partition("/resolve/main/")
            path = files / repo / name
            asked.append(f"{self.command} {repo}/{name}")
            found = path.is_file()
            self.send_response(200 if found else 404)
            body = path.read_bytes() if found else b""
            if found:
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", "a" * 40)
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def pvtcap(endpoint: str, cache: Path, *words: object, offline: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline)),
                   "HF_HUB_DISABLE_XET": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    command = [sys.executable, "-m", "pvtcap", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_what_the_hub_has_is_fetched_copied_and_used(
    hub: tuple[str, list[str]], tree: dict[str, Any], tmp_path: Path
) -> None:
    endpoint, asked = hub
    tree["model"] |= {"encoder_weights": "timm", "decoder": "Salesforce/blip"}
    tree["text"]["vocab"] = "bert-base-uncased"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    cache, out = tmp_path / "cache", tmp_path / "weights"
    nothing = pvtcap(endpoint, cache, "fetch-weights", tmp_path / "run.yaml", "--to", out, offline=True)
    assert nothing.returncode == 2
    assert "neither in the Hugging Face cache nor reachable" in nothing.stderr
    assert "pvtcap fetch-weights CONFIG --to DIR" in nothing.stderr

    fetched = pvtcap(endpoint, cache, "fetch-weights", tmp_path / "run.yaml", "--to", out)
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout.split() == [
        f"model.encoder_weights={out}/pvt_v2_b0.in1k/model.safetensors",
        f"model.decoder={out}/blip",
        f"text.vocab={out}/bert-base-uncased/vocab.txt",
    ]
    assert len(list((out / "blip").iterdir())) == 4
    assert all(not path.is_symlink() for path in out.rglob("*"))
    # The words that it printed, and the filled cache by its names, both work without network: nothing left to fetch.
    num_asked = len(asked)
    used = pvtcap(endpoint, tmp_path / "empty", "fetch-weights", tmp_path / "run.yaml", "--to", tmp_path / "x",
                  *fetched.stdout.split(), offline=True)  # fmt: skip
    assert "nothing to fetch" in used.stderr
    cached = pvtcap(endpoint, cache, "fetch-weights", tmp_path / "run.yaml", "--to", tmp_path / "again", offline=True)
    assert cached.returncode == 0, cached.stderr
    first, again = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (out, tmp_path / "again")
    )
    assert first == again
    assert len(first) == 6
    assert len(asked) == num_asked
    from pvtcap.weightfiles import read_weights

    merged = read_weights(out / "blip").tensors
    whole = read_weights(tmp_path / "blip").tensors
    assert all(torch.equal(merged[name], value) for name, value in whole.items())
