"""The product with the vocabulary and its cross-entropy, on a CPU in float32: one tensor of logits for all of it.

torch makes one of logits, one of their logarithms of probabilities, one of zeros that the labels are put in, and one of
gradients. Here the first is overwritten until it is the last.

Shapes: M tokens with a label, D width, V pieces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pvtcap import onednn


def cross_entropies(hidden_MD: Tensor, head: nn.Linear, labels_M: Tensor, smoothing: float) -> Tensor:
    """(M,), in nats, where ``onednn.suits`` the head's weight.

    ``smoothing`` as in torch, of Szegedy et al., 2016: so much of a label is all V pieces.
    """
    losses: Tensor = _CrossEntropies.apply(hidden_MD, head.weight, head.bias, labels_M, smoothing)
    return losses


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        logits = onednn.linear(hidden, weight, bias)
        torch.log_softmax(logits, 1, out=logits)
        losses = -logits.gather(1, labels[:, None]).squeeze(1)
        if smoothing:
            losses = (1 - smoothing) * losses - smoothing * logits.mean(1)
        ctx.save_for_backward(hidden, weight, logits, labels)
        ctx.smoothing = smoothing
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (hidden, weight, logits, labels), gradient_M1 = ctx.saved_tensors, gradients[0][:, None]
        of_logits = logits.exp_()
        if ctx.smoothing:
            of_logits.sub_(ctx.smoothing / len(weight))
        of_logits[torch.arange(len(labels)), labels] -= 1 - ctx.smoothing
        # A row's own factor is left to the narrow matrices.
        asked = ctx.needs_input_grad
        of_hidden = (of_logits @ weight).mul_(gradient_M1) if asked[0] else None
        of_weight = of_logits.T @ (hidden * gradient_M1) if asked[1] else None
        of_bias = (of_logits.T @ gradient_M1).squeeze(1) if asked[2] else None
        return of_hidden, of_weight, of_bias, None, None
