"""pytest tests/test_onednn.py: oneDNN's product is torch's, and is taken where it is the quicker one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from pvtcap import onednn
from pvtcap.config import ModelConfig
from pvtcap.decoder import Decoder

FEW, MOST = onednn.Linear.ROWS[0], onednn.Linear.ROWS[-1]
needs_it = pytest.mark.skipif(not onednn.suits(torch.zeros(1)), reason="torch has no oneDNN for this processor")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that oneDNN was asked for."""
    rows, product = [], onednn.linear

    def spied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows.append(x.numel() // x.shape[-1])
        return product(x, weight, bias)

    monkeypatch.setattr(onednn, "linear", spied)
    return rows


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias)
    onednn.quicken(plain)
    assert type(plain) is onednn.Linear
    return plain


@needs_it
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0,), (1,), (FEW - 1,), (FEW,), (4, 12), (MOST,), (MOST + 1,), (2, 3, MOST)])
def test_it_gives_what_torch_gives_and_counts_rows(shape: tuple[int, ...], bias: bool, calls: list[int]) -> None:
    ours, x = layer(bias), torch.randn(*shape, 24)
    rows = x.numel() // 24
    with torch.no_grad():
        torch.testing.assert_close(ours(x), functional.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-6)
    assert calls == ([rows] if FEW <= rows <= MOST else [])


def test_torchs_own_is_taken_to_learn_from_and_in_16_bits(calls: list[int]) -> None:
    x = torch.randn(FEW, 24)
    ours = layer()
    ours(x).sum().backward()
    assert ours.weight.grad is not None
    with torch.no_grad():
        ours.bfloat16()(x.bfloat16())
    assert calls == []


@pytest.mark.parametrize("learning", [True, False])
def test_a_compiler_sees_torchs_own_for_any_number_of_rows(learning: bool, calls: list[int]) -> None:
    ours = layer()
    compiled = torch.compile(ours, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (FEW, FEW + 2):
        x = torch.randn(rows, 24)
        with torch.set_grad_enabled(learning):
            torch.testing.assert_close(compiled(x), functional.linear(x, ours.weight, ours.bias))
    assert calls == []


@needs_it
def test_the_decoder_makes_captions_with_it(calls: list[int]) -> None:
    small = ModelConfig(decoder_layers=1, decoder_width=32, decoder_heads=2, decoder_feedforward=64)
    decoder = Decoder(small, 50).eval()
    linears = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 12  # eight of attention, two of feed-forward, two of the head
    with torch.inference_mode():
        decoder.lm(input_ids=torch.ones(2, FEW, dtype=torch.int64), encoder_hidden_states=torch.randn(2, FEW, 32))
    assert calls == [2 * FEW] * len(linears)
