"""pytest tests/test_weightfiles.py: weights read from files, whole, damaged and hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from pvtcap.errors import CheckpointError
from pvtcap.weightfiles import read_tensors, read_weights

BROKEN = ROOT.parent / "shared" / "data" / "broken"


class Harmful:
    """What a pickle of somebody else's could do."""

    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_files_that_are_not_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": Harmful()}, tmp_path / "harmful.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"weight": torch.rand(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:900])
    save_file({"weight": torch.rand(4000)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:9000])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pth").write_text("hello")
    for name in ("harmful.pth", "list.pth", "cut.pth", "cut.safetensors", "text.safetensors", "text.pth", "none.pth"):
        with pytest.raises(CheckpointError) as caught:
            read_tensors(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.skipif(not BROKEN.is_dir(), reason="shared/data/broken is not here")
def test_a_real_file_cut_short() -> None:
    with pytest.raises(CheckpointError, match="not a readable weights file") as caught:
        read_tensors(BROKEN / "pvt_v2_b2_truncated.pth")
    assert "unexpected EOF" in str(caught.value)
    assert "download it again" in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", ""])
def test_a_state_dict_is_found_inside_what_scripts_put_around_it(tmp_path: Path, wrapper: str, legacy: bool) -> None:
    state = {"module.a.weight": torch.rand(3), "module.b": torch.tensor(2)}
    tree: dict[str, Any] = {wrapper: state, "epoch": 3, "config": {"lr": 0.1}} if wrapper else state
    torch.save(tree, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    found = read_tensors(tmp_path / "x.pth")
    assert list(found) == ["a.weight", "b"]
    assert torch.equal(found["a.weight"], state["module.a.weight"])


def test_parts_of_a_combined_file(tmp_path: Path) -> None:
    parts: dict[str, Any] = {name: {"w": torch.full((2,), number)} for number, name in enumerate(("pvt", "blip"))}
    torch.save({**parts, "epoch": 4}, tmp_path / "combined.pth")
    assert read_tensors(tmp_path / "combined.pth", "blip")["w"].tolist() == [1, 1]
    for part, says in (("projection", "a combined file without 'projection'; got pvt, blip, epoch"), (None, "several")):
        with pytest.raises(CheckpointError, match=says):
            read_tensors(tmp_path / "combined.pth", part)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_by_their_index(tmp_path: Path, kind: str) -> None:
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    names = [f"{stem}-0000{number}-of-00002.{kind}" for number in (1, 2)]
    for number, name in enumerate(names):
        save({f"t{number}": torch.full((2,), float(number))}, tmp_path / name)
    index = tmp_path / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"t0": names[0], "t1": names[1]}}))
    found = read_weights(tmp_path)
    assert {name: value.tolist() for name, value in found.tensors.items()} == {"t0": [0, 0], "t1": [1, 1]}
    assert [path.name for path in found.files] == [*names, index.name]
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{names[1]}: a shard of these weights is missing"):
        read_weights(tmp_path)
    for text, says in (("[]", "not an index"), ("{", "not an index"), ('{"weight_map": {"a": "../x"}}', "outside")):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=says):
            read_weights(tmp_path)
