"""Gives the operator of a kernel its shapes, for torch.compile, and its gradients, for autograd."""

import torch
from torch import Tensor
from torch.library import CustomOpDef


def register(forward: CustomOpDef, backward: CustomOpDef, *, heads_first: bool = False) -> None:
    """Registers output shapes of both operators, and `backward` as the gradients of `forward`.

    `forward(query, key, value, blocks, *sizes, valid, scale)` returns an output `[B, S, H, D]`, as the query,
    and a float32 log-sum-exp. `backward(grad, query, key, value, output, log-sum-exp, blocks, *sizes, valid,
    scale)` returns the three gradients.

    Args:
        heads_first: the log-sum-exp is `[B, H, S]`, not `[B, S, H]`, and its gradient or None is the second
            argument of `backward`; otherwise it has no gradient.
    """

    def empty_outputs(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        shape = query.transpose(1, 2).shape if heads_first else query.shape
        return query.new_empty(query.shape), query.new_empty(shape[:3], dtype=torch.float32)

    def empty_gradients(grad: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(grad.new_empty(grad.shape) for _ in range(3))

    def keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
        query, key, value, blocks, *sizes, valid, scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, *output, blocks, valid)
        ctx.sizes, ctx.scale = sizes, scale

    def gradients(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, lse_grad: Tensor | None
    ) -> tuple:
        *tensors, valid = ctx.saved_tensors
        grad = torch.zeros_like(tensors[0]) if grad is None else grad
        grads = (grad, lse_grad) if heads_first else (grad,)
        return *backward(*grads, *tensors, *ctx.sizes, valid, ctx.scale), *[None] * (len(ctx.sizes) + 3)

    forward.register_fake(empty_outputs)
    backward.register_fake(empty_gradients)
    forward.register_autograd(gradients, setup_context=keep)
