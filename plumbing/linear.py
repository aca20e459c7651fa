"""
The decoder's matrix product, and two other forms of it for training: in 8 bits, and with LoRA. Called by model.py. A
reader of the lessons need know only that `Linear` is nn.Linear.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Linear(nn.Linear):
    "nn.Linear; during training in 8 bits, if asked for (see Float8Product)."
    float8 = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.float8 and torch.is_grad_enabled():
            y = Float8Product.apply(x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.out_features)
        else:
            y = F.linear(x, self.weight)
        # Product and bias as two operations: torch.compile fuses the sum into its neighbours, but not one joint call.
        return y if self.bias is None else y + self.bias


def to_float8(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    "x -> (x / scale in 8 bits, scale): the largest entry becomes the largest number of the type."
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


class Float8Product(torch.autograd.Function):
    """
    x [n, in], w [out, in] -> x w^T [n, out]. A Hopper GPU multiplies 8-bit numbers twice as fast as 16-bit ones, and
    sums the products in more digits. Values get 3 bits of fraction (e4m3: up to 448), gradients, whose sizes differ
    more, 2 bits and a larger exponent (e5m2: up to 57,344); one scale for a whole tensor (arXiv 2209.05433).
    """

    @staticmethod
    def forward(ctx, x, w):
        (x, x_scale), (w, w_scale) = to_float8(x, torch.float8_e4m3fn), to_float8(w, torch.float8_e4m3fn)
        ctx.save_for_backward(x, x_scale, w, w_scale)  # half as much memory, too
        return torch._scaled_mm(x, w.t(), x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    @staticmethod
    def backward(ctx, grad):
        x, x_scale, w, w_scale = ctx.saved_tensors
        grad, scale = to_float8(grad, torch.float8_e5m2)
        # TRAP: the 8-bit product needs both factors contiguous along the summed axis, hence the transposed copies.
        grad_x = torch._scaled_mm(grad, w.t().contiguous().t(), scale, w_scale, out_dtype=torch.bfloat16)
        grad_w = torch._scaled_mm(grad.t().contiguous(), x.t().contiguous().t(), scale, x_scale,
                                  out_dtype=torch.bfloat16)
        return grad_x, grad_w


class LoRALinear(Linear):
    """
    LoRA (arXiv 2106.09685): the matrix W [out, in] stays frozen, and the product b a is added to it, with a [rank, in]
    and b [out, rank]. At rank 16 that trains 1 % of the weights, and the other 99 % need no optimizer state.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        nn.Module.__init__(self)  # not Linear's own: its weights would be drawn only to be replaced
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features, **like) * self.in_features ** -0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))  # at first nothing is added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)

    def merged(self) -> torch.Tensor:
        return self.weight + self.lora_b @ self.lora_a                                               # [out, in]
