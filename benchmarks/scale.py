"""Do 64 ranks read what the paper model says? python benchmarks/scale.py [--shards 1000] [--epochs 3]

Simulates the data of 1, 8, 16 and 64 ranks, eight a node, in one process: the order, the cache and the reader are those
of a run (pvtcap.order, shardcache, shardset), a step at a time, rank by rank, with one reading process a rank. Only
the store is ours: it gives any shard the bytes of one and counts who fetched it. Nothing is decoded or trained, and
there is no read-ahead, which fetches the same earlier. Beside it what pvtcap.scaling predicts; then the curve of step
times at 1 to 64 nodes, from pvtcap.scaling alone, to docs/scaling.png.
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
from rich.console import Console
from rich.table import Table

from pvtcap.config import BatchPlan, Config, DataConfig, batch_plan
from pvtcap.configfile import load
from pvtcap.plan import plan
from pvtcap.scaling import NETWORKS, Messages, StepTime, Storage
from pvtcap.shardcache import LEDGER
from pvtcap.shardset import MANIFEST, ShardReader
from pvtcap.sources import Sources

ROOT = Path(__file__).parents[1]
RANKS_A_NODE, GLOBAL_BATCH, SAMPLES = 8, 256, 32
NODES = (1, 2, 4, 8, 16, 32, 64)


class Store(fsspec.AbstractFileSystem):
    """simulated://NODE/FILE: all nodes see the same ShardSet, whose shards are all one; fetches of tars are counted."""

    protocol = "simulated"
    cachable = True  # one for all
    files: dict[str, bytes]
    fetched: Counter[tuple[str, str]]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        node, _, name = self._strip_protocol(path).partition("/")
        if name.endswith(".tar") and not start:
            self.fetched[node, name] += 1
        suffix = name.partition(".")[2]
        return self.files[suffix if suffix in self.files else name][start:end]


def make_store(folder: Path, shards: int) -> tuple[Store, int]:
    """A ShardSet of so many times the same shard; the bytes of its tar."""
    main = runpy.run_path(str(ROOT / "shards" / "shapes.py"))["main"]
    words = ("--num-samples", str(SAMPLES), "--image-px", "64", "--processes", "1", "--out", str(folder / "one"))
    main(list(words))
    manifest = json.loads((folder / "one" / MANIFEST).read_text())
    (entry,) = manifest["shards"]
    tar = (folder / "one" / entry["file"]).read_bytes()
    index = (folder / "one" / entry["file"]).with_suffix(".index.json").read_bytes()
    manifest["shards"] = [entry | {"file": f"shard-{number:06}.tar"} for number in range(shards)]
    for name in ("num_samples", "num_captions"):
        manifest[name] *= shards
    fsspec.register_implementation("simulated", Store)
    store = fsspec.filesystem("simulated")
    store.files = {"tar": tar, "index.json": index, MANIFEST: json.dumps(manifest).encode()}
    return store, len(tar)


def open_tars(caches: dict[str, Path]) -> dict[str, set[str]]:
    """The tars that readers have open, by node: asked of the system."""
    found: dict[str, set[str]] = {node: set() for node in caches}
    for descriptor in Path("/proc/self/fd").iterdir():
        if not descriptor.is_symlink():
            continue  # it was the listing's own
        path = descriptor.readlink()
        for node, cache in caches.items():
            if path.suffix == ".tar" and path.is_relative_to(cache):
                found[node].add(path.name)
    return found


def simulate(store: Store, tar_bytes: int, shards: int, ranks: int, lanes: int, share: float, epochs: int) -> Any:
    """``share`` is the cache's limit over what a node reads of the data in an epoch."""
    nodes = -(-ranks // RANKS_A_NODE)
    batches = batch_plan(DataConfig(global_batch=GLOBAL_BATCH), ranks)
    data_bytes = tar_bytes * shards
    of_node = Storage.of(data_bytes, shards * SAMPLES, GLOBAL_BATCH, nodes, lanes, data_bytes).node_bytes
    limit = share * of_node
    # The indexes and the manifest are in the cache as well.
    others = limit * len(store.files["index.json"]) / tar_bytes + len(store.files[MANIFEST])
    paper = Storage.of(data_bytes, shards * SAMPLES, GLOBAL_BATCH, nodes, lanes, limit)
    store.fetched = Counter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        caches = {f"node-{node}": Path(folder) / f"node-{node}" for node in range(nodes)}
        readers = []
        for rank in range(ranks):
            node = f"node-{rank // RANKS_A_NODE}"
            data = DataConfig(train=f"simulated://{node}", global_batch=GLOBAL_BATCH, lanes=lanes,
                              cache_dir=caches[node], cache_gb=(limit + others) / 1e9)  # fmt: skip
            sources = Sources.open(data)
            order = sources.order(data, seed=0)
            slots = range(rank * GLOBAL_BATCH // ranks, (rank + 1) * GLOBAL_BATCH // ranks)
            # As stream's own reader: the windows of its lanes, and a shard more of each where one ends.
            most_open = len(order.lanes(slots)) * (data.shuffle_window_shards + 1)
            reader = stack.enter_context(ShardReader(sources.shardsets[0], most_open))
            readers.append((order, slots, reader))
        steps = shards * SAMPLES // GLOBAL_BATCH
        by_epoch, peak, most_open, most_wanted, burst = [], 0, 0, 0, 0
        for step in range(epochs * steps):
            for order, slots, reader in readers:
                for slot in slots:
                    place = order.place(step * batches.global_batch + slot)
                    reader.read(place.shard, place.sample)
            if step == 0:
                burst = store.fetched.total()
            if step % 4 == 0:
                opened = open_tars(caches)
                most_open = max(most_open, *(len(names) for names in opened.values()))
                wanted = Counter(name for names in opened.values() for name in names)
                most_wanted = max(most_wanted, *wanted.values())
            peak = max(peak, *(int((cache / LEDGER).read_text()) for cache in caches.values()))
            if (step + 1) % steps == 0:
                by_epoch.append(store.fetched.total())
    fetched = [after - before for before, after in zip([0, *by_epoch], by_epoch, strict=False)]
    later = sum(fetched[1:]) / (epochs - 1)
    of_nodes: defaultdict[str, int] = defaultdict(int)
    for node, _ in store.fetched:
        of_nodes[node] += 1
    return {
        "ranks": ranks,
        "nodes": nodes,
        "lanes": lanes,
        "cache_share": share,
        "shards_a_node": [min(of_nodes.values()), max(of_nodes.values())],
        "first_over_ideal": fetched[0] / shards,
        "first_over_ideal_paper": paper.nodes_a_shard,
        "again": later / fetched[0],
        "again_paper": paper.again,
        "peak_cache_over_limit": peak / (limit + others),
        "most_open_a_node": most_open,
        "nodes_with_one_shard_open": most_wanted,
        "fetched_in_step_0": burst,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="fetched by the real order and cache, and what the paper model says (in brackets)", title_justify="left"
    )
    names = ("ranks", "nodes", "lanes", "cache / a node's data", "shards a node", "epoch 1 / data", "again later",
             "peak / limit", "open a node", "nodes at one shard", "in step 0")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        least, most = row["shards_a_node"]
        table.add_row(
            *(str(row[name]) for name in ("ranks", "nodes", "lanes")),
            f"{row['cache_share']:g}",
            f"{least}" if least == most else f"{least}–{most}",
            f"{row['first_over_ideal']:.2f} ({row['first_over_ideal_paper']:.2f})",
            f"{row['again']:.2f} ({row['again_paper']:.2f})",
            f"{row['peak_cache_over_limit']:.2f}",
            *(str(row[name]) for name in ("most_open_a_node", "nodes_with_one_shard_open", "fetched_in_step_0")),
        )
    return table


def curve(config: Config) -> list[dict[str, Any]]:
    """Captions a second at 1 to 64 nodes of eight: the global batch of one node at all, and a node's batch at each."""
    rows = []
    compute = plan(config, "", 1, RANKS_A_NODE).speed.compute
    print(f"compute {compute.source}: {compute.photo_s * 1000:.3f} ms a photo", flush=True)
    sizes = plan(config, "", 1, 1)
    for weak in (False, True):
        for nodes in NODES:
            batch = config.data.global_batch * (nodes if weak else 1)
            ranks = nodes * RANKS_A_NODE
            batches = BatchPlan(batch, batch // ranks, ranks, 1)
            messages = Messages.of(config.zero.stage, sizes.trainable, sizes.frozen, 2)
            for network in NETWORKS:
                step = StepTime.of(compute, batches, messages, nodes, network)
                rows.append({"weak": weak, "nodes": nodes, "global_batch": batch, "network": network.name,
                             "step_s": step.seconds, "waited_share": step.waited_share,
                             "captions_s": batch * config.data.captions_per_photo / step.seconds})  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]], batch: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, weak in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for network in NETWORKS:
            line = [row for row in rows if row["weak"] == weak and row["network"] == network.name]
            axes.plot(
                [row["nodes"] for row in line], [row["captions_s"] for row in line], marker=".", label=network.name
            )
        first = line[0]["captions_s"]
        axes.plot(NODES, [first * nodes for nodes in NODES], color="0.6", linestyle=":", label="as many times one node")
        axes.set(xscale="log", yscale="log", xlabel="nodes of 8 GPUs", xticks=NODES, xticklabels=NODES)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        each = f"global batch {batch:,} × nodes" if weak else f"global batch {batch:,} at any number of nodes"
        axes.set_title(each, fontsize=10)
    figure.axes[0].set_ylabel("captions/s (estimate)")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=75, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    cases = [(ranks, 32, share) for share in (1.1, 0.5) for ranks in (1, 8, 16, 64)]
    cases += [(64, 8, 0.5), (64, 4, 1.1), (64, 64, 0.5)]
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        store, tar_bytes = make_store(Path(folder), args.shards)
        for case in cases:
            rows.append(simulate(store, tar_bytes, args.shards, *case, args.epochs))
            print(f"{time.monotonic() - started:.0f} s  {rows[-1]}", flush=True)
    config = load("coco", ["data.global_batch=2048", "data.train=null"])
    points = curve(config)
    Console(width=150).print(table_of(rows))
    draw(points, config.data.global_batch, ROOT / "docs" / "scaling.png")
    results = {"options": vars(args), "tar_bytes": tar_bytes, "simulated": rows, "curve": points}
    (ROOT / "benchmarks" / "results" / "scale.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
