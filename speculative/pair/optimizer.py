"""Muon for the matrices inside the layers, AdamW for the embedding and the norms.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") replaces a matrix's momentum
by the nearest semi-orthogonal matrix, found with a Newton-Schulz iteration; matrices of one shape are
orthogonalised in one batch. Torch's own Muon works matrix by matrix and always in bfloat16, which a CPU without
bfloat16 arithmetic emulates slowly; this one works in the precision that it is told.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

#: Coefficients of the quintic iteration, chosen by its authors to lift small singular values fastest.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Pushes the singular values of each matrix [..., rows, columns] into about [0.7, 1.2]; same shape and dtype."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; decoupled weight decay.

    Args:
        parameters: Two-dimensional weights.
        lr: Step size, scaled per matrix by sqrt(max(1, rows / columns)).
        momentum: Decay of the (Nesterov) momentum.
        weight_decay: Share of the weight, times `lr`, taken off at each step.
        dtype: Precision of the Newton-Schulz iteration.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure is ever re-evaluated here
        """Updates every weight from its gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
                directions = orthogonalise(torch.stack(updates).to(self.dtype)).to(updates[0].dtype)
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-scale)

    def _momentum(self, parameter: nn.Parameter, decay: float) -> Tensor:
        """The Nesterov look-ahead of the parameter's momentum, which it advances by one step."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(gradient, 1 - decay)
        return torch.lerp(gradient, momentum, decay)
