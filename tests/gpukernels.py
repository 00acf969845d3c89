"""TRITON_INTERPRET=1 pytest tests/gpukernels.py: what pvtcap has for GPUs in Triton, beside torch.

``test_gpukernels.py`` runs it: Triton asks whether to interpret when it is imported, so in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pvtcap import bertlayers, gpuattention, gpuloss, gpuresidual, packing
from pvtcap import decoder as decoders
from pvtcap.batch import Batch
from pvtcap.config import ModelConfig
from pvtcap.decoder import Decoder
from pvtcap.packing import Packed, Rows
from pvtcap.text import SHARED

# Rows of several captions: one longer than a program's 64 queries and keys, with a caption across its border. What
# stands first is shared by the others in the first row, and a caption of its own elsewhere.
CAPTIONS = [[4, 60, 30], [3], [7, 1, 9]]
FIRST_SEGMENTS = [SHARED, 1, 1]
HEADS, WIDTH, PATCHES = 2, 16, 70


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are interpreted one after the other."""
    monkeypatch.setattr(gpuresidual, "PROGRAMS", 8)


def rows() -> Rows:
    longest = max(map(sum, CAPTIONS))
    segments = torch.full((len(CAPTIONS), longest), -1)
    for row, first, lengths in zip(segments, FIRST_SEGMENTS, CAPTIONS, strict=True):
        numbers = [number for number, length in enumerate(lengths, first) for _ in range(length)]
        row[: len(numbers)] = torch.tensor(numbers)
    return Rows.of(segments, (segments.flatten() >= 0).nonzero().squeeze(1))


def states(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, HEADS, WIDTH, generator=generator, requires_grad=True) for shape in shapes]


def inputs(kind: str) -> list[Tensor]:
    count = sum(map(sum, CAPTIONS))
    return states(*([(count,)] * 3 if kind == "caption" else [(count,), *[(len(CAPTIONS), PATCHES)] * 2]))


def ours_of(kind: str) -> Callable[..., Tensor]:
    """``packing.attend_to_…`` as a GPU has it."""

    def to_caption(query: Tensor, key: Tensor, value: Tensor, of: Rows, dropout: float) -> Tensor:
        longest = of.mask_B1TT.shape[-1]
        states = torch.stack([query, key, value], 1)
        return gpuattention.to_caption(states, of.starts, of.firsts_N, of.own_B, longest, dropout)

    def to_photo(query: Tensor, key: Tensor, value: Tensor, of: Rows, dropout: float) -> Tensor:
        states, patches = torch.stack([key.flatten(0, 1), value.flatten(0, 1)], 1), key.shape[1]
        starts = torch.arange(len(of.starts), dtype=torch.int32, device=query.device) * patches
        longest = of.mask_B1TT.shape[-1]
        return gpuattention.to_photo(query, states, of.starts, starts, longest, patches, dropout)

    return to_caption if kind == "caption" else to_photo


def with_gradients(attend: Callable[[], Tensor], given: list[Tensor]) -> list[Tensor]:
    attended = attend()
    asked = torch.randn(attended.shape, generator=torch.Generator().manual_seed(1))
    return [attended.detach(), *torch.autograd.grad(attended, given, asked, materialize_grads=True)]


@pytest.mark.parametrize("kind", ["caption", "photo"])
def test_outputs_and_gradients_are_those_of_torch(kind: str) -> None:
    given, of = inputs(kind), rows()
    ours: Any = ours_of(kind)
    theirs: Any = getattr(packing, f"attend_to_{kind}")
    found = with_gradients(lambda: ours(*given, of, 0.0), given)
    expected = with_gradients(lambda: theirs(*given, of, 0.0), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["caption", "photo"])
def test_dropped_weights_are_the_same_ones_going_back_and_others_with_another_seed(kind: str) -> None:
    """What is dropped is found out with values that show weights, some keys at a time, and done again in torch."""
    given, of, dropout, ours = inputs(kind), rows(), 0.3, ours_of(kind)
    query, key, value = given
    num_keys = key.shape[:-2].numel()
    scores = torch.einsum("nhd,mhd->hnm", query, key.reshape(num_keys, HEADS, WIDTH)) / WIDTH**0.5
    weights = scores.masked_fill(~seen(of, num_keys, kind), -torch.inf).softmax(-1)

    @torch.no_grad()
    def kept(seed: int) -> Tensor:
        shown = []
        for first in range(0, num_keys, WIDTH):
            one_hot = torch.zeros(num_keys, HEADS, WIDTH)
            some = range(first, min(first + WIDTH, num_keys))
            one_hot[list(some), :, list(range(len(some)))] = 1
            torch.manual_seed(seed)
            shown.append(ours(query, key, one_hot.view(value.shape), of, dropout)[..., : len(some)])
        return (torch.cat(shown, -1).transpose(0, 1) > 0).float()

    mask = kept(0)
    expected = with_gradients(
        lambda: torch.einsum("hnm,mhd->nhd", weights * mask / (1 - dropout), value.reshape(num_keys, HEADS, WIDTH)),
        given,
    )
    torch.manual_seed(0)
    found = with_gradients(lambda: ours(*given, of, dropout), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    count = int(seen(of, num_keys, kind).sum()) * HEADS
    assert float(mask.sum()) / count == pytest.approx(1 - dropout, abs=4 * (dropout * (1 - dropout) / count) ** 0.5)
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask, kept(1))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_residual_norm_is_that_of_torch_and_drops_the_same_going_back(dropout: float) -> None:
    generator = torch.Generator().manual_seed(0)
    count, width = gpuresidual.PROGRAMS * 20 - 3, 48  # the last program has fewer rows, and lanes are 64
    branch, residual = (torch.randn(1, count, width, generator=generator, requires_grad=True) for _ in range(2))
    norm = torch.nn.LayerNorm(width, eps=1e-12)
    norm.weight.data, norm.bias.data = (torch.randn(width, generator=generator) for _ in range(2))
    given = [branch, residual, norm.weight, norm.bias]
    torch.manual_seed(5)
    found = with_gradients(lambda: gpuresidual.add_and_norm(branch, residual, norm, dropout), given)
    mask = (found[1] != 0).float()  # no gradient goes to what was dropped
    expected = with_gradients(lambda: norm(branch * mask / (1 - dropout) + residual), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    share = (dropout * (1 - dropout) / mask.numel()) ** 0.5
    assert float(mask.mean()) == pytest.approx(1 - dropout, abs=4 * share + 1e-6)
    if dropout:
        for one, other in ((mask[:, 0], mask[:, 1]), (mask[..., 0], mask[..., 1])):
            assert not torch.equal(one, other)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropies_are_those_of_torch_and_columns_that_are_no_pieces_get_no_gradient(smoothing: float) -> None:
    pieces, columns = gpuloss.TILE["num_columns"] + 5, gpuloss.TILE["num_columns"] + 8
    logits = torch.randn(7, columns, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, pieces - 1, pieces - 2, 17, 4000, 5])
    found = with_gradients(lambda: gpuloss.cross_entropies(logits, labels, pieces, smoothing), [logits])
    expected = with_gradients(
        lambda: functional.cross_entropy(logits[:, :pieces], labels, reduction="none", label_smoothing=smoothing),
        [logits],
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_decoder_of_kernels_gives_the_loss_and_the_gradients_of_one_without(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them together; ``frozen``: only cross-attention trains."""
    torch.manual_seed(0)
    config = ModelConfig(
        decoder_layers=2, decoder_width=32, decoder_heads=2, decoder_feedforward=48, decoder_positions=64, dropout=0.0
    )
    decoder = Decoder(config, vocab_size=50, label_smoothing=0.1).train()
    decoder.requires_grad_(not frozen)
    for parameter in decoder.cross_attention_parameters():
        parameter.requires_grad_(True)
    for parameter in decoder.parameters():  # norms and biases begin as ones and zeros
        parameter.data += 0.05 * torch.randn_like(parameter)
    lengths = [[4, 9], [3], [7, 1, 9]]
    segments = torch.full((3, 17), -1)
    for row, some in zip(segments, lengths, strict=True):
        row[: sum(some)] = torch.arange(len(some)).repeat_interleave(torch.tensor(some))
    tokens, labels = torch.randint(50, segments.shape), torch.randint(50, segments.shape)
    labels[:, 4:6], labels[segments < 0], positions = -100, -100, torch.arange(17).expand(3, -1)
    batch = Batch(torch.zeros(0), tokens, labels, positions.clamp(min=3), positions, segments, (), 6)
    patches = torch.randn(3, 5, 32, requires_grad=True)
    learning = [patches, *(one for one in decoder.parameters() if one.requires_grad)]

    def loss(kernels: bool) -> Tensor:
        for module in (bertlayers, decoders):
            monkeypatch.setattr(module, "has_kernels", lambda *_: kernels)
        return decoder(patches, Packed.of(batch))  # type: ignore[no-any-return]

    found, expected = (with_gradients(partial(loss, kernels), learning) for kernels in (True, False))
    assert len(found) > 20
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def seen(of: Rows, num_keys: int, kind: str) -> Tensor:
    """(N, keys): which a query looks at."""
    row_of_token = torch.searchsorted(of.starts, torch.arange(len(of.slots_N)), right=True) - 1
    if kind == "photo":
        return row_of_token[:, None] == torch.arange(num_keys) // PATCHES
    numbers = torch.arange(num_keys)
    in_row = row_of_token[None] == row_of_token[:, None]
    shared = in_row & (numbers[None] < of.own_B[row_of_token][:, None])
    return (numbers[None] <= numbers[:, None]) & (shared | (numbers[None] >= of.firsts_N[:, None]))
