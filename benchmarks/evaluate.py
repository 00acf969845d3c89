"""How fast is an evaluation? python benchmarks/evaluate.py [--references captions_val2017.json]

    generate    the 137.9M decoder (random weights, the true architecture) captions the same features of 144 patches,
                3 beams, 20 tokens, at the same batch size: pvtcap's ``Decoder.generate`` and transformers'
                ``BlipForConditionalGeneration.generate`` with those weights; they must give the same ids
    ranks       pvtcap's again, in 1 process and in 2 at once, each on one thread and its share of the batches
    score       5,000 photos with five references: ``pvtcap.metrics.score`` (without intervals, as the peer has none)
                and pycocoevalcap's own order: the tokenizer, BLEU, METEOR, ROUGE-L, CIDEr, one after the other

The peers take turns; the median of --repeat. On a machine with other work, look at the CPU seconds (the ranks' contain
their start). Random weights never end a caption early, which is the longest there is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Row, report

from pvtcap import java, metrics
from pvtcap.cocofiles import read_references
from pvtcap.config import EvaluateConfig, ModelConfig
from pvtcap.decoder import Decoder

ROOT = Path(__file__).parents[1]
Run = tuple[float, float]
PREFIX, END, PAD, VOCAB = [30522, 1037, 3861, 1997], 102, 0, 30524  # [DEC] a picture of
PATCHES, WIDTH = 144, 768  # a photo of 384 px
GOALS = (1.5, 1.8, 1.67)  # the last: in 0.6 of the time

PEER_SCORES = """
import json, sys
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.cider.cider import Cider
references, candidates = json.load(open(sys.argv[1]))
annotations = lambda captions: {key: [{"caption": one} for one in each] for key, each in captions.items()}
tokenizer = PTBTokenizer()
gts, res = tokenizer.tokenize(annotations(references)), tokenizer.tokenize(annotations(candidates))
scores = [scorer.compute_score(gts, res)[0] for scorer in (Bleu(4), Meteor(), Rouge(), Cider())]
print(json.dumps([*scores[0], *scores[1:]]))
"""


def measured(task: Callable[[], object]) -> Run:
    """(seconds, CPU seconds of this process and of those it started)."""

    def cpu_s() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    started, cpu_before = time.perf_counter(), cpu_s()
    task()
    return time.perf_counter() - started, cpu_s() - cpu_before


def features(batch: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, PATCHES, WIDTH, generator=torch.Generator().manual_seed(seed))


def our_decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(), VOCAB).eval()


def blip_of(decoder: Decoder) -> Any:
    """transformers' BLIP with the decoder's weights; its vision model gives what it is given."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {"vocab_size": VOCAB, "encoder_hidden_size": WIDTH, "bos_token_id": PREFIX[0], "sep_token_id": END}
    text |= {"num_attention_heads": 12}  # as in the published model; the default is 8
    config = BlipConfig(
        text_config={**text, "pad_token_id": PAD, "eos_token_id": END}, vision_config={"num_hidden_layers": 1}
    )
    model: Any = BlipForConditionalGeneration(config).eval()
    theirs = {name: value for name, value in decoder.lm.state_dict().items() if "token_type" not in name}
    model.text_decoder.load_state_dict(theirs)
    model.vision_model.forward = lambda pixel_values, **_: (pixel_values,)
    return model


def generation(args: argparse.Namespace) -> dict[str, list[Run]]:
    decoder, photos = our_decoder(), features(args.batch, 1)
    blip = blip_of(decoder)
    how = EvaluateConfig(num_beams=3, max_length=20, min_length=5)
    given = torch.tensor([[*PREFIX, END]]).repeat(args.batch, 1)
    ids: dict[str, torch.Tensor] = {}

    def ours() -> None:
        ids["pvtcap"] = decoder.generate(photos, PREFIX, END, PAD, how)

    def theirs() -> None:
        lengths = {"max_length": 20, "min_length": 5}
        ids["transformers"] = blip.generate(photos, input_ids=given, num_beams=3, do_sample=False, **lengths)

    seen: dict[str, list[Run]] = {"pvtcap": [], "transformers": []}
    for turn in range(args.repeat + 1):
        for name, task in (("pvtcap", ours), ("transformers", theirs)):
            run = measured(task)
            if turn:  # the first warms up
                seen[name].append(run)
    assert ids["pvtcap"].tolist() == ids["transformers"].tolist(), "other captions than transformers'"
    return seen


def one_rank(rank: int, size: int, batches: int, batch: int) -> None:
    """Caption a rank's share of the batches; prints when it began and when it ended."""
    torch.set_num_threads(1)
    decoder, how = our_decoder(), EvaluateConfig(num_beams=3, max_length=20, min_length=5)
    decoder.generate(features(2, 0), PREFIX, END, PAD, how)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(rank, batches, size):
        decoder.generate(features(batch, number), PREFIX, END, PAD, how)


def ranks(args: argparse.Namespace) -> dict[str, list[Run]]:
    seen: dict[str, list[Run]] = {"2 ranks": [], "1 rank": []}
    for _ in range(args.repeat):
        for size, name in ((1, "1 rank"), (2, "2 ranks")):
            words = [sys.executable, __file__, "--batch", args.batch, "--batches", args.batches]
            processes = [
                subprocess.Popen(
                    [str(word) for word in (*words, "--rank", rank, size)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
                for rank in range(size)
            ]
            for process in processes:
                assert process.stdout is not None
                process.stdout.readline()

            def go(processes: list[subprocess.Popen[bytes]] = processes) -> None:
                for process in processes:
                    assert process.stdin is not None
                    process.stdin.write(b"\n")
                    process.stdin.flush()
                assert [process.wait() for process in processes] == [0] * len(processes)

            seen[name].append(measured(go))
    return seen


def scoring(args: argparse.Namespace) -> dict[str, list[Run]]:
    references = dict(list(read_references(args.references).items())[: args.photos])
    draw, keys = np.random.default_rng(0), list(references)
    # Captions as a middling model would say: another person's of the same photo, or of another one.
    candidates = {key: references[key if draw.random() < 0.5 else draw.choice(keys)][-1] for key in keys}
    references = {key: captions[:-1] if len(captions) > 1 else captions for key, captions in references.items()}
    found: dict[str, list[Run]] = {}

    def ours() -> None:
        wanted = [metric for metric in metrics.METRICS if metric != "SPICE"]
        found["pvtcap"] = [
            value or 0.0 for value in metrics.score(references, candidates, wanted, resamples=0).values.values()
        ]

    seen: dict[str, list[Run]] = {"pvtcap": [], "pycocoevalcap": []}
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "captions.json"
        given.write_text(json.dumps([references, {key: [caption] for key, caption in candidates.items()}]))
        found_java = java.find_java()
        assert found_java is not None
        environment = {**os.environ, "PATH": f"{found_java.parent}{os.pathsep}{os.environ['PATH']}"}

        def theirs() -> None:
            words = [sys.executable, "-c", PEER_SCORES, str(given)]
            done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
            found["pycocoevalcap"] = json.loads(done.stdout.splitlines()[-1])

        for _ in range(args.repeat):
            seen["pvtcap"].append(measured(ours))
            seen["pycocoevalcap"].append(measured(theirs))
    assert np.allclose(found["pvtcap"], found["pycocoevalcap"], atol=1e-9), found
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=Path, help="COCO's captions_val2017.json; without it nothing is scored")
    parser.add_argument("--photos", type=int, default=5000, help="to score")
    parser.add_argument("--batch", type=int, default=16, help="photos captioned at a time")
    parser.add_argument("--batches", type=int, default=4, help="of the ranks")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rank", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        one_rank(*args.rank, args.batches, args.batch)
        return
    seen = {"captioning": generation(args), "captioning by ranks": ranks(args)}
    amounts = [args.batch, args.batch * args.batches, args.photos]
    if args.references:
        seen["scoring"] = scoring(args)
    rows = [
        Row.of(what, unit, {name: [amount / run[i] for run in each] for name, each in runs.items()}, goal=goal)
        for (what, runs), amount, goals in zip(seen.items(), amounts, GOALS, strict=False)
        for i, unit, goal in ((0, "captions/s", goals), (1, "captions a CPU s", None))
    ]
    title = f"batches of {args.batch}, {torch.get_num_threads()} threads; {args.photos:,} photos scored"
    options = {"batch": args.batch, "batches": args.batches, "photos": args.photos}
    report("evaluate", title, rows, {"options": options, "seconds_and_cpu_seconds": seen})


if __name__ == "__main__":
    main()
