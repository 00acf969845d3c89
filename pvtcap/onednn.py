"""oneDNN's products that do what comes next as they go, for float32 on CPUs: what torch's compiler makes use of there.

torch's own product copies the bias to where the result will be and reads it again. For a wide result of a narrow
product that takes as long as the product (benchmarks/LOG.md). They have no backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def suits(weight: Tensor) -> bool:
    """Whether they may be used with this weight, here and now: in float32, on a CPU with AVX."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):  # torch's own products are those that it knows to cast for
        return False
    if hasattr(weight, "ds_id"):  # ZeRO-3 gathers a module's weights when it is called
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")  # type: ignore[no-untyped-call]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``functional.linear`` of float32, one bit or two away from torch's."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class Linear(nn.Linear):
    """torch's, but by oneDNN for some rows of float32 from which nothing is learned: three quarters of the time.

    With more both reach what the processor can do, with fewer torch's is the quicker one (benchmarks/LOG.md).
    """

    ROWS = range(5, 400)

    def forward(self, x: Tensor) -> Tensor:
        # Rows are counted last: torch's compiler, which ``suits`` sends away, has no number for them.
        if torch.is_grad_enabled() or x.dtype != torch.float32 or not suits(self.weight):
            return super().forward(x)
        if x.numel() // self.in_features not in self.ROWS:
            return super().forward(x)
        return linear(x, self.weight, self.bias)


def quicken(module: nn.Module) -> None:
    """Let all of torch's linear layers in it be ``Linear``; they keep their parameters."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = Linear


def convolution_gelu(x_BHWC: Tensor, convolution: nn.Conv2d) -> Tensor:
    """GELU of what ``convolution`` gives, channels last, (B, H, W, C) in and out; its weight should be so, too."""
    how = convolution.padding, convolution.stride, convolution.dilation, convolution.groups, "gelu"
    parameters = convolution.weight, convolution.bias
    found: Tensor = torch.ops.mkldnn._convolution_pointwise(x_BHWC.permute(0, 3, 1, 2), *parameters, *how, [], "none")
    return found.permute(0, 2, 3, 1)
