"""vaccine: finetune M0 on safe rows so that they stay learnt where hidden states drift, and start from there.

Huang et al., Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful Fine-tuning (NeurIPS 2024,
arXiv 2402.01109). Each step makes two passes over its batch. The first one finds G_m, the gradient of the loss with
respect to the output of each attention block m. The second one adds e_m = rho G_m / (||G|| + 1e-7) to these outputs,
where ||G|| is the norm of all G_m together, and its gradients are used.

The paper aligns a pretrained model so, for 50 epochs at rate 1e-3 with a cosine schedule, weight decay 0.1 and LoRA of
rank 8; here M0 is aligned once more, on the safe rows, with the settings of `final`. Two controls of the same rows
and steps: vaccine_plain trains without perturbation, vaccine_random adds noise of the same norm (theirs has a variance
of rho an entry, which is another norm).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.defenses.result import safe_budget, train_new_m0
from forgetfilter.errors import ModelError
from forgetfilter.hooks import Hooks
from forgetfilter.methods import NonNegativeFloat, traits
from forgetfilter.model.weights import outline
from forgetfilter.workshop import Workshop

VERSION = 3
"""Raised when the same settings give another model than before."""
SMALL = 1e-7
"""What keeps a norm from being 0."""


def attention_blocks(model: Any) -> list[Any]:
    """The model's attention blocks, from the first layer to the last.

    Raises:
        ModelError: If it has none that are called so.
    """
    found: list[Any] = []
    inside: set[int] = set()
    for module in model.modules():
        if type(module).__name__.endswith("Attention") and id(module) not in inside:
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    if not found:
        raise ModelError(f"{type(model).__name__}: vaccine finds no attention blocks (modules called ...Attention).")
    return found


class Perturbation:
    """Moves the outputs of the attention blocks in the second pass of each step, by a norm of rho in all.

    Args:
        rho: How far.
        random: Move them by noise, not along the gradient.
    """

    def __init__(self, rho: float, *, random: bool = False) -> None:
        """Nothing is known of any output yet."""
        self.rho, self.random = rho, random
        self.gradients: dict[int, Tensor] = {}
        self.moves: dict[int, Tensor] = {}

    @contextmanager
    def around(self, model: Any) -> Iterator[None]:
        """While this lasts, gradients are caught in a first pass, and moves made in a second."""
        handles = [block.register_forward_hook(self._hook(i)) for i, block in enumerate(attention_blocks(model))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def perturbed(self, _: Any) -> Iterator[None]:
        """The second pass of a step."""
        self.moves = self._moves()
        try:
            yield
        finally:
            self.moves, self.gradients = {}, {}

    def _moves(self) -> dict[int, Tensor]:
        """Block -> what is added to its output; all together have a norm of rho."""
        ways = self.gradients
        if self.random:
            ways = {block: _noise(gradient) for block, gradient in ways.items()}
        norm = torch.stack([way.float().norm() for way in ways.values()]).norm()
        return {block: self.rho * way / (norm + SMALL) for block, way in ways.items()}

    def _hook(self, block: int) -> Callable[..., Any]:
        def forward(module: Any, inputs: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            if block in self.moves:
                states = states + self.moves[block].to(states.dtype)
            elif torch.is_grad_enabled():
                if not states.requires_grad:  # nothing below is trained, but the block counts as any other
                    states = states.detach().requires_grad_()
                states.register_hook(lambda gradient: self.gradients.update({block: gradient}))
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return forward


def require_attention(workshop: Workshop, data: Data, parameters: Mapping[str, Any]) -> None:
    """Raise ModelError if M0 has no attention blocks."""
    attention_blocks(outline(workshop.m0.folder, workshop.config))


def _noise(gradient: Tensor) -> Tensor:
    """Noise where there is a gradient: on tokens, not on what fills up a batch."""
    return torch.randn_like(gradient) * (gradient != 0).any(-1, keepdim=True)


@traits(whole=True, check=require_attention)
def vaccine(workshop: Workshop, data: Data, config: ForgetFilterConfig, *, rho: NonNegativeFloat = 1.0) -> Workshop:
    """M0 after a perturbed finetuning on the safe rows.

    Args:
        workshop: Trains models.
        data: The safe data.
        config: All settings; `final` are those of this training.
        rho: Norm of the perturbation of a batch, over all attention blocks together. The paper takes 2 for 32 blocks
            of width 4,096; a small model has fewer and narrower ones.

    Raises:
        ConfigError: If rho is negative.
    """
    return _aligned("vaccine", workshop, data, config, Perturbation(rho))


@traits(whole=True, check=require_attention)
def vaccine_random(
    workshop: Workshop, data: Data, config: ForgetFilterConfig, *, rho: NonNegativeFloat = 1.0
) -> Workshop:
    """The control with noise of the same norm; arguments as in `vaccine`."""
    return _aligned("vaccine_random", workshop, data, config, Perturbation(rho, random=True))


@traits(whole=True)
def vaccine_plain(workshop: Workshop, data: Data, config: ForgetFilterConfig) -> Workshop:
    """The control without perturbation: M0 after a finetuning on the safe rows."""
    return _aligned("vaccine_plain", workshop, data, config, None)


def _aligned(
    name: str, workshop: Workshop, data: Data, config: ForgetFilterConfig, moves: Perturbation | None
) -> Workshop:
    """A workshop whose M0 is this one's after a training on the safe rows."""
    rows = data.safe.trainable()
    hooks = None if moves is None else Hooks(around=moves.around, perturbed=moves.perturbed)
    called = name if moves is None else f"{name}-{moves.rho}"
    return train_new_m0(workshop, called, rows, safe_budget(data, config), hooks)
