"""pytest tests/test_packing.py: packed captions, their mask, attention and dropout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from smallmodel import CAPTIONS, batch, loss_and_gradients, model_of

from pvtcap import packing
from pvtcap.packing import Packed, Rows, attend_to_caption, attend_to_photo, dropout_mask, packed_mask
from pvtcap.text import SHARED


@pytest.fixture
def photos() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_packed_captions_give_the_loss_and_the_gradients_of_unpacked_rows(
    tree: dict[str, Any], photos: torch.Tensor
) -> None:
    # float64 all through but for the normalised photo and the cross-entropy, which are float32 on both sides.
    model = model_of(tree, model={"dropout": 0.0}).double().eval()
    packed = batch(CAPTIONS, photos)
    unpacked = [batch([[caption]], photos[row : row + 1]) for row, group in enumerate(CAPTIONS) for caption in group]
    assert packed.num_labels == sum(one.num_labels for one in unpacked)
    loss, gradients = loss_and_gradients(model, [packed])
    expected_loss, expected = loss_and_gradients(model, unpacked)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert any(name.startswith("encoder.") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
        if not name.endswith("key.bias"):  # softmax does not see a constant added to all keys
            assert gradient.abs().max() > 0, name


def test_a_token_sees_its_own_caption_up_to_itself_and_padding_sees_something() -> None:
    mask = packed_mask(torch.tensor([[1, 1, 2, 2, -1], [SHARED, 1, 2, 2, -1]]))[:, 0, :4].int().tolist()
    assert mask[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert mask[1] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0]]
    assert packed_mask(torch.full((1, 2), -1))[0, 0].int().tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_cpus_drops_that_share_and_enlarges_the_rest(dtype: torch.dtype) -> None:
    states = torch.ones((999, 101), dtype=dtype)  # no multiple of four
    torch.manual_seed(3)
    mask = dropout_mask(states, 0.1)
    zeros = mask == 0
    assert mask.dtype == dtype
    assert zeros.sum().item() == pytest.approx(0.1 * states.numel(), rel=0.05)  # 5 %: five standard deviations
    assert mask[~zeros].unique().tolist() == pytest.approx([1 / 0.9], rel=1e-4 if dtype == torch.float32 else 4e-3)
    # Of pairs of neighbours, in a row and in a column, a hundredth: nothing within a word of four is alike.
    for step in ((0, 1), (0, 2), (0, 3), (1, 0)):
        both = zeros[: 999 - step[0], : 101 - step[1]] & zeros[step[0] :, step[1] :]
        assert both.float().mean().item() == pytest.approx(0.01, rel=0.2)
    torch.manual_seed(3)
    assert torch.equal(dropout_mask(states, 0.1), mask)
    assert dropout_mask(states, 1 - 1e-9).isfinite().all()


def test_padding_of_shorter_rows_changes_no_attention_and_no_gradient() -> None:
    groups = [["red circle on the left", "star"], ["blue"], ["small blue star"]]

    def rows_of(some: list[list[str]]) -> Rows:
        return Packed.of(batch(some, torch.zeros(len(some), 3, 32, 32, dtype=torch.uint8))).rows

    def attended(of_tokens: torch.Tensor, of_photos: torch.Tensor, rows: Rows) -> list[torch.Tensor]:
        """Both attentions, and the gradients of all that they take: (N, H, d) and (B, P, H, d)."""
        weights, *asked = of_tokens.unbind()
        leaves = [one.clone().requires_grad_() for one in (*asked, *of_photos.unbind())]
        both = attend_to_caption(*leaves[:3], rows, 0.0), attend_to_photo(leaves[0], *leaves[3:], rows, 0.0)
        return [*both, *torch.autograd.grad(both, leaves, [weights, weights])]

    rows = rows_of(groups)
    torch.manual_seed(2)
    of_tokens = torch.randn(4, len(rows.slots_N), 2, 4, dtype=torch.float64)
    of_photos = torch.randn(2, len(groups), 5, 2, 4, dtype=torch.float64)
    sizes = rows.starts.diff().tolist()
    assert sizes[0] > sizes[2] > sizes[1]
    alone = [
        attended(tokens, photo, rows_of([group]))
        for tokens, photo, group in zip(of_tokens.split(sizes, 1), of_photos.split(1, 1), groups, strict=True)
    ]
    for together, parts in zip(attended(of_tokens, of_photos, rows), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(parts))


def test_attention_with_dropout_on_cpus_is_torchs_but_for_the_weights_that_are_dropped() -> None:
    rows = Packed.of(batch([["red circle on the left", "star"]], torch.zeros(1, 3, 32, 32, dtype=torch.uint8))).rows
    count = len(rows.slots_N)
    torch.manual_seed(1)
    query, key = torch.randn(2, count, 2, count)
    weights_of = torch.eye(count)[:, None].expand(-1, 2, -1)  # as values: what is attended are the weights
    shown = key[None], weights_of[None].contiguous()
    for attend, others in ((attend_to_caption, (key, weights_of)), (attend_to_photo, shown)):
        usual = attend(query, *others, rows, 0.0)
        dropped = attend(query, *others, rows, 0.25)
        stays = dropped != 0
        torch.testing.assert_close(dropped[stays], usual[stays] / 0.75)
        seen = usual != 0
        assert not (stays & ~seen).any()
        assert 0 < (seen & ~stays).sum() < seen.sum()


def test_attention_with_dropout_on_cpus_has_the_gradients_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Packed.of(batch(CAPTIONS, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))).rows
    count = len(rows.slots_N)
    torch.manual_seed(4)
    leaves = [torch.randn(count, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    leaves += [torch.randn(2, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def formula(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float
    ) -> torch.Tensor:
        scores = query @ key.mT / 2
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        return (weights * dropout_mask(weights, dropout)) @ value

    def found() -> list[torch.Tensor]:
        torch.manual_seed(5)
        both = attend_to_caption(*leaves[:3], rows, 0.3), attend_to_photo(leaves[0], *leaves[3:], rows, 0.3)
        return [*both, *torch.autograd.grad(both, leaves, [leaves[1].detach(), leaves[2].detach()])]

    ours = found()
    monkeypatch.setattr(packing, "_attention", formula)
    torch.testing.assert_close(ours, found())


def test_a_caption_changed_in_a_row_changes_no_other_captions_loss(tree: dict[str, Any], photos: torch.Tensor) -> None:
    model = model_of(tree).eval()

    @torch.no_grad()
    def first_caption_alone(second: str) -> float:
        both = batch([["red circle", second]], photos[:1])
        labels = both.labels.clone()
        labels[:, 3:] = -100  # red, circle, the end
        return float(model(replace(both, labels=labels)))

    assert first_caption_alone("blue star on the left") == first_caption_alone("green star on the left")
    # The photo, on the other hand, matters.
    with torch.no_grad():
        one, other = (float(model(batch([["red circle"]], photos[row : row + 1]))) for row in (0, 1))
    assert one != other
