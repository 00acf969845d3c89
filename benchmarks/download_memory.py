"""How much memory does a long download take? python benchmarks/download_memory.py [--rows 1000000]

A table of so many rows, of which all but one in a thousand are dead links (404), from a server on loopback. Prints the
peak memory of the building process and of its largest worker, early and at the end: it should not grow with the rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from results import Row, report

ROOT = Path(__file__).parents[1]


def write_table(path: Path, rows: int, address: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("caption\turl\n")
        for row in range(rows):
            file.write(f"caption of row {row}\t{address}/{'ok/photo.jpg' if row % 1000 == 0 else 'missing'}\n")


def build(folder: Path, rows: int, address: str) -> dict[str, float]:
    """Build from ``rows`` rows; seconds, rows/s and peak MiB of the builder and its workers."""
    write_table(folder / "urls.tsv", rows, address)
    command = [sys.executable, "-m", "pvtcap", "shards", "conceptual-captions", "--tsv", str(folder / "urls.tsv")]
    command += ["--allow-private-addresses", "127.0.0.0/8", "--per-host", "64", "--no-drop-duplicates"]
    command += ["--processes", "2", "--out", str(folder / f"out-{rows}")]
    # The peak of what a process has waited for is the largest of them all: a process of its own for each build.
    probe = ROOT / "benchmarks" / "descendants.py"
    started = time.perf_counter()
    told = subprocess.run([sys.executable, str(probe), *command], capture_output=True, text=True, check=True).stdout
    seconds = time.perf_counter() - started
    code, peak_mib = json.loads(told)
    assert code == 0, f"the build of {rows} rows failed"
    manifest = json.loads((folder / f"out-{rows}" / "manifest.json").read_text())
    assert manifest["num_samples"] == -(-rows // 1000)
    assert manifest["skipped"] == {"HTTP 404": rows - manifest["num_samples"]}
    return {"rows": rows, "seconds": seconds, "rows_per_s": rows / seconds, "peak_mib": peak_mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        Image.effect_noise((300, 200), 60).convert("RGB").save(folder / "photo.jpg")
        server = [sys.executable, str(ROOT / "tests" / "photoserver.py"), temporary, str(folder / "port")]
        with subprocess.Popen(server) as process:
            try:
                while not (folder / "port").exists():
                    time.sleep(0.05)
                address = f"http://127.0.0.1:{(folder / 'port').read_text()}"
                found = [build(folder, rows, address) for rows in (args.rows // 20, args.rows)]
            finally:
                process.kill()
    few, many = ({f"{row['rows']:,} rows": [row["peak_mib"]]} for row in found)
    rows = [
        Row.of("peak memory", "MiB", many | few, less_is_better=True),
        Row.of("peak memory", "MiB", many | {"limit": [1024.0]}, goal=1.0, less_is_better=True),
    ]
    report("download_memory", "memory of the largest process of a download", rows, {"runs": found})


if __name__ == "__main__":
    main()
