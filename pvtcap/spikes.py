"""Loss spikes: steps whose loss is far above what the steps before let one expect."""

from __future__ import annotations

import math

_DECAY = 0.98  # of a step's weight with each further step: some 50 steps count
_LEARNING_STEPS = 50  # the first losses fall too fast to expect anything


class SpikeWatch:
    """Follows the loss's mean and spread; ``sigmas`` None: sees nothing. Equal losses are equal spikes on all ranks."""

    def __init__(self, sigmas: float | None) -> None:
        self.sigmas, self.expected = sigmas, 0.0
        self._variance, self._steps = 0.0, 0

    def sees(self, loss: float) -> bool:
        """Is this loss a spike? One counts as far as its limit only, and a loss that stays high is soon no spike."""
        self._steps += 1
        off = loss - self.expected
        limit = math.inf if self.sigmas is None else self.sigmas * math.sqrt(self._variance)
        spike = self._steps > _LEARNING_STEPS and off > limit
        off = min(off, limit) if spike else off
        weight = max(1 - _DECAY, 1 / self._steps)  # the plain mean at first
        self.expected += weight * off
        self._variance = (1 - weight) * (self._variance + weight * off * off)
        return spike
