"""The vocabulary's weights on a CPU in float32, looked up and multiplied with, and the cross-entropy of the product.

Of logits, their logarithms of probabilities, zeros that the labels are put in, and gradients torch makes a tensor
each. Here the first is overwritten until it is the last. And the gradient of what was looked up is added to the
product's: torch makes another one as large as the vocabulary, or, of its rows alone (``sparse``), copies the product's.

Shapes: N tokens, M of them with a label, D width, V pieces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pvtcap import onednn


def looked_up(tokens: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of these tokens (…, D), and the weight, of which ``cross_entropies`` is to make its product.

    No token is padding, whose row ``nn.Embedding`` gives no gradient: ``packing`` has left it out.
    """
    rows, weight = _LookedUp.apply(tokens, weight_VD)
    return rows, weight


def cross_entropies(hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_M: Tensor, smoothing: float) -> Tensor:
    """(M,), in nats, where ``onednn.suits`` the weight.

    ``smoothing`` as in torch, of Szegedy et al., 2016: so much of a label is all V pieces.
    """
    losses: Tensor = _CrossEntropies.apply(hidden_MD, weight_VD, bias_V, labels_M, smoothing)
    return losses


class _LookedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens)
        return functional.embedding(tokens, weight), weight.view(weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (tokens,), (of_rows, of_weight) = ctx.saved_tensors, gradients
        # In place: nobody else has the product's gradient.
        return None, of_weight.index_add_(0, tokens.flatten(), of_rows.flatten(0, -2))


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
