"""Memory of one rank of a training run, term by term, for each ZeRO stage.

P are the elements of what trains, F those of what is frozen, n the ranks, p = P / n a rank's part, e the bytes of an
element of the dtype that trains (4, or 2 in 16 bits), b = min(P, ``reduce_bucket_size``) the elements that DeepSpeed
gathers before it reduces gradients. Rajbhandari et al., "ZeRO", 2020, has the first three terms; the others come from
reading DeepSpeed 0.19 and from measuring it on CPUs, and ``benchmarks/memory.py`` compares the sum with ranks.

    parameters    e (P + F); ZeRO-3: e (P + F) / n
    optimizer     float32 master weights and Adam's two moments: 12 p; in float32 the parameters are their own master
                  but for ZeRO-3 (``zerogradients``): 8 p; ZeRO-0: so much times n
    activations   what the forward pass keeps for the backward pass: counted by ``dryrun``
    gradients, buffers, temporary
                  at the higher one of two points, since not all are there at the same time:
                  the end of the backward pass, when gradients are reduced
                      ZeRO-0      gradients e P, and their flat copy e b
                      ZeRO-1, 2   the bucket 4 b (e b in ZeRO-2), and its flat copy; a lone rank of ZeRO-2 in float32
                                  has neither, and the highest point is the step
                      ZeRO-3      a rank's part 4 p, the bucket e b, and twice that for reducing it; and with more
                                  than one rank the gathered parameters e P (DeepSpeed keeps what is used again within
                                  ``max_reuse_distance``, 10^9 elements, and these models are smaller)
                  the optimizer's step
                      ZeRO-0      gradients e P
                      ZeRO-1, 2   a rank's part 4 p and its flat copy 4 p, which a lone rank does without in float32
                      ZeRO-3      the same, the bucket, which stays, and the gathered parameters, as malloc does
    base          on CPUs only: Python, torch, transformers and DeepSpeed, before there is a model (measured)

With the optimizer offloaded 12 p for it in float32 too, 4 p that gradients arrive in for all of the step, and beside
them e p for the way back in ZeRO-1 and 2, 4 p for adding gradients up in ZeRO-3. ``host`` is that, which the machine of
a GPU has then, and not the GPU; with parameters offloaded their part as well. On CPUs it is the same memory.

A rank on CPUs gives no freed memory back (``hostmemory``), and blocks of other sizes do not always fit where one was:
activations count in the step as well, and ``temporary`` has a constant and a multiple of e P that were measured, in
float32. AdamW is fused and has no temporaries. ``gpu``, the most that is allocated on a GPU, has none of these, but
buckets are there in full, and attention keeps no weights: 1.05 to 1.11 times what one H200 took (ZeRO-2, bf16, 64 to
2,048 photos; benchmarks/gpu.py). Compiled, a step takes some 0.85 of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pvtcap.captioner import Captioner
from pvtcap.dryrun import StepBytes

MIB = 1 << 20
BASE = 790 * MIB  # measured: torch 2.14 (a build with CUDA), DeepSpeed 0.19, transformers 5.24 on Linux
RESIDUE = 100 * MIB  # measured: what malloc keeps of a step beside the activations and the multiple below
RESIDUE_OF_WEIGHTS = (0.83, 2.55, 0.1, 2.25)  # measured: times e P, for each stage, of a rank that is alone
# Of 2 and 4: new parameters are broadcast to where they belong (zerogradients). Offloaded, of one as well.
_OF_SEVERAL = (0.83, 1.4, 1.25, 2.25)


@dataclass(frozen=True)
class Sizes:
    """Elements of a model: those that train, and those that do not."""

    trained: int
    frozen: int

    @classmethod
    def of(cls, model: Captioner) -> Self:
        trained = sum(parameter.numel() for parameter in model.trainable().values())
        return cls(trained, sum(parameter.numel() for parameter in model.parameters()) - trained)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the highest point of a step; the terms but ``gpu`` and ``host`` add up to ``peak``.

    ``gpu`` and ``host`` are those of a rank with a GPU; ``host`` is what is offloaded to its machine, and nothing else.
    """

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    temporary: int
    base: int
    gpu: int
    host: int

    @property
    def peak(self) -> int:
        """Highest resident memory of a rank on a CPU."""
        held = self.parameters + self.gradients + self.optimizer + self.activations
        return held + self.buffers + self.temporary + self.base


@dataclass(frozen=True)
class _Point:
    """What is there at one point of a step beside parameters, optimizer and activations."""

    gradients: int
    buffers: int
    temporary: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.buffers + self.temporary


def rank_memory(
    sizes: Sizes, step: StepBytes, stage: int, precision: str, ranks: int, bucket_elements: int, offload: str = "none"
) -> RankMemory:
    """Memory of each of ``ranks`` at a ZeRO ``stage``; ``bucket_elements`` is DeepSpeed's reduce_bucket_size.

    ``offload`` is ``zero.offload``, of which a stage heeds what there is at that stage.
    """
    element = 4 if precision == "fp32" else 2
    offloads = offload != "none" and stage > 0
    whole, part = sizes.trained, -(-sizes.trained // ranks)
    parameters = element * (whole + sizes.frozen)
    if stage == 3:
        parameters = -(-parameters // ranks)
    own_master = precision == "fp32" and stage < 3 and not offloads
    optimizer = (8 if own_master else 12) * (part if stage else whole)
    points = _points(stage, element, sizes, part, min(whole, bucket_elements), offloads)
    highest = max(points, key=lambda point: point.total)
    gathered = element * whole if stage == 3 and ranks > 1 else 0
    multiples = RESIDUE_OF_WEIGHTS if ranks == 1 and not offloads else _OF_SEVERAL
    residue = RESIDUE + round(multiples[stage] * element * whole)
    gradients = 4 * part if stage >= 2 else element * whole
    gpu = parameters + step.gpu_peak + gathered + element * (bucket_elements if stage else 0)
    host = 0
    if offloads:
        host = optimizer + _offloaded_gradients(stage, element, part)
        if stage == 3 and offload == "optimizer+parameters":
            gpu, host = gpu - parameters, host + parameters
    else:
        gpu += gradients + optimizer
    return RankMemory(
        stage=stage,
        parameters=parameters,
        gradients=highest.gradients,
        optimizer=optimizer,
        activations=step.saved,
        buffers=highest.buffers + gathered,
        temporary=highest.temporary + residue,
        base=BASE,
        gpu=gpu,
        host=host,
    )


def _offloaded_gradients(stage: int, element: int, part: int) -> int:
    """What the optimizer takes its gradients from, and the room beside it (see above)."""
    return 4 * part + (4 if stage == 3 else element) * part


def _points(stage: int, element: int, sizes: Sizes, part: int, bucket: int, offloads: bool) -> tuple[_Point, _Point]:
    """The end of the backward pass, and the optimizer's step."""
    whole = sizes.trained
    if stage == 0:
        gradients = element * whole
        return _Point(gradients, element * bucket), _Point(gradients, 0)
    staged = element if stage >= 2 else 4
    if offloads:
        held = _offloaded_gradients(stage, element, part)
        return _Point(held, (3 if stage == 3 else 2) * staged * bucket), _Point(held, staged * bucket)
    flat = 0 if part == whole and element == 4 and stage < 3 else 4 * part
    step = _Point(4 * part, staged * bucket if stage == 3 else 0, flat)
    if stage == 3:
        return _Point(4 * part, 3 * staged * bucket), step
    return _Point(0, 2 * staged * bucket), step
