"""pytest tests/test_shardfolder.py: builds that are stopped, killed, out of space, or given another's folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_shardwriter import BUILDER, candidate, files, picture

from pvtcap.errors import ShardError
from pvtcap.shardset import ShardSet
from pvtcap.shardtar import ShardTar
from pvtcap.shardwriter import (
    BuildOptions,
    Candidate,
    build,
)


def test_out_folder_of_another_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "cats"
    out.mkdir()
    build([candidate(0)], out, BuildOptions(), BUILDER)  # an empty folder will do
    before = files(out)
    with pytest.raises(ShardError, match="already built"):
        build([candidate(1)], out, BuildOptions(), BUILDER)
    assert files(out) == before

    def complains() -> Iterator[Candidate]:
        raise ShardError("no such caption file")
        yield

    with pytest.raises(ShardError, match="no such caption file"):
        build(complains(), out, BuildOptions(overwrite=True), BUILDER)
    assert files(out) == before
    build([candidate(1)], out, BuildOptions(overwrite=True), BUILDER)
    assert list(ShardSet.open(out).keys()) == ["cat1"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis-000000.tar").write_text("mine")
    with pytest.raises(ShardError, match="other files"):
        build([candidate(0)], tmp_path / "thesis", BuildOptions(overwrite=True), BUILDER)
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="not a folder"):
        build([candidate(0)], tmp_path / "file", BuildOptions(), BUILDER)


def interrupted_at(number: int, error: BaseException, photos: list[Candidate]) -> Iterator[Candidate]:
    yield from photos[:number]
    raise error


def test_ctrl_c_and_other_settings(tmp_path: Path) -> None:
    photos = [candidate(n, b"" if n == 3 else None) for n in range(40)]
    options = BuildOptions(samples_per_shard=5)
    build(photos, tmp_path / "whole/cats", options, BUILDER)
    out = tmp_path / "cats"
    with pytest.raises(KeyboardInterrupt):
        build(interrupted_at(38, KeyboardInterrupt(), photos), out, options, BUILDER)
    left = files(out)
    assert "cats-000003.tar" in left
    assert not any(name.endswith(".partial") for name in left)
    assert "manifest.json" not in left
    with pytest.raises(ShardError, match=r"other settings.*now jpeg_quality=80; wanted jpeg_quality=90.*--overwrite"):
        build(photos, out, BuildOptions(samples_per_shard=5, jpeg_quality=80), BUILDER)
    with pytest.raises(ShardError, match="not the one this build was begun with"):
        build(photos[1:], out, options, BUILDER)
    with pytest.raises(ShardError, match="shorter"):
        build(photos[:7], out, options, BUILDER)
    assert files(out) == left
    report = build(photos, out, BuildOptions(samples_per_shard=5, processes=0), BUILDER)
    assert report.num_resumed >= 15
    assert files(out) == files(tmp_path / "whole/cats")


def test_a_gap_among_finished_shards_is_closed(tmp_path: Path) -> None:
    photos = [candidate(n) for n in range(40)]
    options = BuildOptions(samples_per_shard=5)
    build(photos, tmp_path / "whole/cats", options, BUILDER)
    out = tmp_path / "cats"
    with pytest.raises(KeyboardInterrupt):
        build(interrupted_at(38, KeyboardInterrupt(), photos), out, options, BUILDER)
    os.truncate(out / "cats-000001.tar", 5_000)
    (out / "cats-000009.tar.partial").write_text("half")
    assert build(photos, out, options, BUILDER).num_resumed == 5
    assert files(out) == files(tmp_path / "whole/cats")


def test_a_full_disk_keeps_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = [candidate(n) for n in range(20)]
    options = BuildOptions(samples_per_shard=4)
    add = ShardTar.add

    def full(self: ShardTar, sample: object) -> None:
        if self.path.name == "cats-000002.tar":
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, sample)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ShardTar, "add", full)
        with pytest.raises(ShardError, match=r"no space left on the disk.*run the same command again"):
            build(photos, tmp_path / "cats", options, BUILDER)
    assert sorted(files(tmp_path / "cats")) == [
        "building.json",
        "cats-000000.index.json",
        "cats-000000.tar",
        "cats-000001.index.json",
        "cats-000001.tar",
    ]
    build(photos, tmp_path / "cats", options, BUILDER)
    build(photos, tmp_path / "whole/cats", options, BUILDER)
    assert files(tmp_path / "cats") == files(tmp_path / "whole/cats")


KILLED = """
    import sys, time
    from pathlib import Path
    from pvtcap.shardwriter import *

    def candidates(pause):
        for number in range(60):
            time.sleep(pause)
            yield Candidate(str(number), number, ("a cat",), "test", PhotoFile(Path(sys.argv[1]) / f"{number % 7}.png"))

    if __name__ == "__main__":
        options = BuildOptions(samples_per_shard=4, processes=2)
        build(candidates(float(sys.argv[3])), Path(sys.argv[2]), options, {"builder": "killed"})
"""


def test_killed_build_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(picture(40 + number, kind="PNG"))
    command = [sys.executable, str(script), str(tmp_path)]
    out = tmp_path / "cats"
    with subprocess.Popen([*command, str(out), "0.03"], start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not (out / "cats-000003.index.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    kept = (out / "cats-000000.tar").stat().st_ino
    deadline = time.monotonic() + 20
    while _alive_in_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive_in_session(process.pid), "workers outlived the build"
    subprocess.run([*command, str(out), "0"], check=True)
    subprocess.run([*command, str(tmp_path / "whole/cats"), "0"], check=True)
    assert (out / "cats-000000.tar").stat().st_ino == kept
    assert files(out) == files(tmp_path / "whole/cats")


def _alive_in_session(session: int) -> bool:
    """Whether a process of the group is left (zombies apart, which nobody may be there to reap)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False
