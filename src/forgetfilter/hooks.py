"""What a method does inside a training (model/training.py calls it)."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forgetfilter.methods import constants

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Hooks:
    """What a method does inside a training. Checkpoints do not hold its state, so such a training is not resumed.

    Attributes:
        around: Called with the model before its optimiser is made; gives the context in which all of the training runs,
            uncompiled. The weights are saved as the context leaves them.
        before: Called once, before the first step.
        each_step: Called after each optimiser step with its number, from 1.
        loss: Makes a batch's loss of the losses of its trained tokens, (tokens,), row after row; in place of their
            mean. The losses of the batches of an optimiser step are summed.
        objective: Called with the model, gives a batch's loss from rows of its own, in place of that of the batch.
        penalty: Gives a term that depends on the current weights and is added to each step's loss; None adds nothing.
        perturbed: For methods that make two passes per step, such as sharpness-aware ones. It is called with the model
            when this has the gradients of the first pass, and gives the context in which the second pass runs. Only
            the gradients of the second pass are used.
        passes: Called with the model, says what a step costs, in passes over its rows, if the objective is its own.
    """

    around: Callable[[Any], AbstractContextManager[object]] | None = None
    before: Callable[[], object] | None = None
    each_step: Callable[[int], object] | None = None
    loss: "Callable[[Tensor], Tensor] | None" = None
    objective: "Callable[[Any], Tensor] | None" = None
    penalty: "Callable[[], Tensor | None] | None" = None
    perturbed: Callable[[Any], AbstractContextManager[object]] | None = None
    passes: Callable[[Any], float] | None = None

    def passes_of(self, model: Any) -> float:
        """How much a step costs, in passes of the model over the step's rows."""
        if self.passes is not None:
            return self.passes(model)
        return 1.0 if self.perturbed is None else 2.0

    def constants(self) -> dict[str, Any]:
        """The constants of the files that the hooks are from: trained with others, a stage is another one."""
        given = [hook for hook in vars(self).values() if hook is not None]
        modules = (sys.modules.get(hook.__module__ or "") for hook in given)  # a builtin has no module
        return constants(*filter(None, modules))
