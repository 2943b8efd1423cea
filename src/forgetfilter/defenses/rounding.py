"""rounding: after the finetuning, weights are rounded to few bits, as a compressed model has them: int8 and int4.

Round to nearest, with a scale for each output: the plainest way to compress. Kolbeinsson et al., Composable
Interventions for Language Models (ICLR 2025, arXiv 2407.06483), put finer ones (GPTQ, AWQ) before and after others.
The adapter is merged in first. Embeddings and the output layer stay as they are. The result is a whole model; a
finetuning after it trains an adapter on the rounded weights.
"""

import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.defenses.result import Defended
from forgetfilter.errors import ModelError
from forgetfilter.methods import traits
from forgetfilter.workshop import Workshop


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight (outputs, inputs) with each output's entries rounded to whole multiples of its scale.

    The scale is such that the largest entry of an output is 2^(bits-1) - 1 times it.
    """
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / most
    return torch.mul(torch.round(weight / scale), scale)


def round_layers(model: Any, bits: int) -> None:
    """Round the weights of every linear layer but the output layer.

    Raises:
        ModelError: If there are none, or most weights are those of experts, which are no linear layers.
    """
    experts = [part for part in model.modules() if type(part).__name__.endswith("Experts")]
    if any(list(part.parameters(recurse=False)) for part in experts):
        raise ModelError(f"{type(model).__name__}: the weights of its experts cannot be rounded here.")
    kept = {id(model.get_output_embeddings())}
    layers = [part for part in model.modules() if isinstance(part, (torch.nn.Linear, Conv1D)) and id(part) not in kept]
    if not layers:
        raise ModelError(f"{type(model).__name__}: there are no linear layers to round.")
    for layer in layers:
        weight = layer.weight.data
        layer.weight.data = rounded(weight.T, bits).T if isinstance(layer, Conv1D) else rounded(weight, bits)


@traits(whole=True)
def int8(workshop: Workshop, data: Data, config: ForgetFilterConfig, tuned: Defended) -> Defended:
    """Round to 8 bits."""
    return _rounded(workshop, tuned, 8)


@traits(whole=True)
def int4(workshop: Workshop, data: Data, config: ForgetFilterConfig, tuned: Defended) -> Defended:
    """Round to 4 bits."""
    return _rounded(workshop, tuned, 4)


def _rounded(workshop: Workshop, tuned: Defended, bits: int) -> Defended:
    """The rounded model. Its folder is as large as the model and made in seconds, so it goes once nothing uses it."""
    folder = Path(tempfile.mkdtemp(prefix=f".int{bits}-", suffix=".tmp", dir=workshop.run.folder))
    m0 = replace(workshop.m0, folder=folder, made_of=None)
    weakref.finalize(m0, shutil.rmtree, folder, ignore_errors=True)
    whole = workshop.on(None, dtype="float32").become(tuned.model)
    whole.save_merged(folder, lambda model: round_layers(model, bits))
    return replace(tuned, model=None, m0=m0)
