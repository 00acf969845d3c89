"""pytest tests/test_spikes.py"""

from __future__ import annotations

import json
import random

from pvtcap.config import Config
from pvtcap.dist import World
from pvtcap.monitor import Monitor
from pvtcap.spikes import SpikeWatch


def losses(seed: int = 0) -> list[float]:
    """A run's: falling fast, then slowly, with noise."""
    draw = random.Random(seed)
    return [2 + 6 / (1 + step / 10) + draw.gauss(0, 0.05) for step in range(400)]


def test_an_ordinary_run_has_none_and_a_jump_is_one() -> None:
    for seed in range(20):
        watch, calm = SpikeWatch(6.0), losses(seed)
        assert sum(watch.sees(loss) for loss in calm) == 0
        assert not watch.sees(watch.expected + 0.1)
        assert watch.sees(watch.expected + 2.0)
        assert not watch.sees(watch.expected)  # the jump itself is hardly expected of the next


def test_a_loss_that_stays_high_is_soon_no_spike() -> None:
    watch = SpikeWatch(6.0)
    for loss in losses():
        watch.sees(loss)
    high = [watch.sees(5.0) for _ in range(200)]
    assert high[0]
    assert not high[-1]
    assert sum(high) < 100


def test_none_and_the_first_steps_see_nothing() -> None:
    off = SpikeWatch(None)
    assert sum(off.sees(loss) for loss in (1.0,) * 100 + (1e9,)) == 0
    young = SpikeWatch(1.0)
    assert sum(young.sees(loss) for loss in (1.0, 100.0, 1.0, 1e6)) == 0


def test_the_log_has_all_keys_of_a_spike_and_the_person_some(config: Config) -> None:
    keys = [[f"photo-{rank}-{number}" for number in range(6)] for rank in range(2)]
    with Monitor(config, {}, World.alone("cpu"), 0, 100) as monitor:
        monitor.spike(70, 9.5, 4.0, keys)
    (line,) = (json.loads(one) for one in (config.run.dir / "log.jsonl").read_text().splitlines())
    assert (line["kind"], line["step"], line["train/loss"], line["expected"]) == ("spike", 70, 9.5, 4.0)
    assert line["keys"] == keys[0] + keys[1]
