"""How are the weights moved by one step? torch's own optimisers, called in their functional form.

`torch.optim.SGD` and its kin load torch's compiler when the first of them is made: seconds at start and 70 MB in every
agent, for something we never use. The functions below do the arithmetic of those classes, so a step is equal to
theirs to the bit (`tests/client/test_optimiser.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class Optimiser:
    """SGD with momentum (Sutskever 2013), Adam (Kingma 2015) or AdamW (Loshchilov 2019) over some parameters.

    Args:
        name: "sgd", "adam" or "adamw".
        parameters: changed in place by `step`; those without a gradient stay as they are.
        momentum: for sgd.
        weight_decay: added to the gradient (sgd, adam) or taken off the weights (adamw).
    """

    def __init__(self, name: str, parameters: Iterable[nn.Parameter], momentum: float, weight_decay: float) -> None:
        self._name, self._momentum, self._decay = name, momentum, weight_decay
        self._parameters = list(parameters)
        self._velocity: dict[int, Tensor] = {}
        self._moments: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def step(self, rate: float) -> None:
        """Move every parameter by its gradient at learning rate `rate`."""
        import torch

        moved = [(i, parameter) for i, parameter in enumerate(self._parameters) if parameter.grad is not None]
        if moved:
            with torch.no_grad():
                (self._sgd if self._name == "sgd" else self._adam)(moved, rate)

    def _sgd(self, moved: list[tuple[int, nn.Parameter]], rate: float) -> None:
        from torch.optim.sgd import sgd

        velocity = [self._velocity.get(i) for i, _ in moved]
        sgd(
            [parameter for _, parameter in moved],
            [parameter.grad for _, parameter in moved if parameter.grad is not None],
            velocity,
            weight_decay=self._decay,
            momentum=self._momentum,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if self._momentum:
            self._velocity.update((i, v) for (i, _), v in zip(moved, velocity, strict=True) if v is not None)

    def _adam(self, moved: list[tuple[int, nn.Parameter]], rate: float) -> None:
        import torch
        from torch.optim.adam import adam

        for i, parameter in moved:
            if i not in self._moments:
                self._moments[i] = (torch.zeros_like(parameter), torch.zeros_like(parameter), torch.tensor(0.0))
        first, second, steps = (list(part) for part in zip(*(self._moments[i] for i, _ in moved), strict=True))
        adam(
            [parameter for _, parameter in moved],
            [parameter.grad for _, parameter in moved if parameter.grad is not None],
            first,
            second,
            [],
            steps,
            decoupled_weight_decay=self._name == "adamw",
            amsgrad=False,
            beta1=BETA_1,
            beta2=BETA_2,
            lr=rate,
            weight_decay=self._decay,
            eps=EPSILON,
            maximize=False,
        )
