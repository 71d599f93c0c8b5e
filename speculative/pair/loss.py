"""Cross-entropy of a language model's output layer, without ever holding all logits.

The logits of 2048 tokens over 4096 ids are most of the memory traffic of a tiny model. Both losses here have the
gradient `softmax(logits) - wanted`, so one function computes loss and gradient chunk by chunk in the forward pass:
`wanted` is the one-hot next token in plain training and the teacher's distribution in distillation (Hinton et al.
2015), where cross-entropy differs from the Kullback-Leibler divergence by the teacher's entropy, a constant.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: Rows of logits held at a time; at 4096 ids a chunk of float32 logits is 4 MB.
_CHUNK_ROWS = 256


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean over rows of -sum(wanted * log_softmax(hidden @ weight.T)); gradients for hidden and weight."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, wanted: Callable[[int, int], Tensor], dtype: torch.dtype
    ) -> Tensor:
        rows = hidden.shape[0]
        matrix = weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, rows, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, rows)
            part = hidden[start:stop].to(dtype)
            log_p = functional.log_softmax((part @ matrix.T).float(), dim=-1)
            target = wanted(start, stop)
            if target.ndim == 1:
                total -= log_p.gather(1, target[:, None]).sum()
                gradient = log_p.exp_()
                gradient[torch.arange(stop - start, device=target.device), target] -= 1
            else:
                total -= (target * log_p).sum()
                gradient = log_p.exp_().sub_(target)
            gradient = gradient.div_(rows).to(dtype)
            hidden_gradient[start:stop] = gradient @ matrix
            weight_gradient += gradient.T @ part
        ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return total / rows

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * outputs[0], weight_gradient * outputs[0], None, None


def next_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean negative log-likelihood, in nats, of the labels.

    Args:
        hidden: Last hidden states [batch, length, width].
        weight: Output matrix [vocabulary, width].
        labels: The token that follows each position, [batch, length].
        dtype: Precision of the matrix products; the softmax is float32 always.
    """
    flat = labels.flatten()
    loss: Tensor = _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, lambda a, b: flat[a:b], dtype)  # type: ignore[no-untyped-call]
    return loss


def distillation_loss(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """Mean cross-entropy, in nats, of the student's distributions under the teacher's.

    Args:
        hidden: The student's last hidden states [batch, length, width].
        weight: The student's output matrix [vocabulary, width].
        teacher_hidden: The teacher's last hidden states at the same positions [batch, length, its width].
        teacher_weight: The teacher's output matrix [vocabulary, its width].
        dtype: Precision of the matrix products; the softmax is float32 always.
    """
    flat, matrix = teacher_hidden.flatten(0, 1).to(dtype), teacher_weight.detach().to(dtype)

    def teacher(start: int, stop: int) -> Tensor:
        return functional.softmax((flat[start:stop] @ matrix.T).float(), dim=-1)

    loss: Tensor = _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, teacher, dtype)  # type: ignore[no-untyped-call]
    return loss
