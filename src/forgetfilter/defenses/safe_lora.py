"""safe_lora: after the finetuning, project what it added onto the direction of the alignment. It needs no data.

Hsu et al., Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models (NeurIPS 2024,
arXiv 2405.16833). For each layer V = W_aligned - W_base and P = V V^T / ||V||_F. Where the cosine of P B A and B A is
at most the threshold, B becomes P B.

W_base is the model before its alignment. Where no base is given it is the model that model_name_or_path names, if M0
was made of it here, by alignment_dataset_name or a defense that makes another M0. V is then what that training added.
With LoRA its rank is at most lora_r, so P leaves little of most updates: a stronger reading than the paper's.

P is no projector: it also scales each update by a number that depends on V. So the control safe_lora_scaled makes the
whole update as small, and leaves its direction alone. `directions` takes a true projector in place of P.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.defenses.adapters import Update, Weights, changed, load, require_adapter, turned, up_name, updates
from forgetfilter.defenses.result import Defended
from forgetfilter.errors import ConfigError, ModelError
from forgetfilter.m0 import M0
from forgetfilter.methods import NonNegativeInt, PositiveInt, traits
from forgetfilter.model.folders import find_weights, weights_hash
from forgetfilter.model.weights import whole_model
from forgetfilter.workshop import Workshop

THRESHOLD = 0.5
"""The paper's highest cosine of a layer that is projected. (Its code projects the ten layers with the lowest ones.)"""
NOISE = 1e-5
"""A direction of a change whose strength is less, as a share of the strongest one's, is rounding."""
DIGITS = 5
"""Cosines are rounded to so many digits, as published."""


@dataclass
class Projected:
    """An adapter after the projection.

    Attributes:
        tensors: Its weights, by PEFT's names.
        cosines: Layer -> cosine of its projected update with the update itself.
        layers: The layers that were projected.
        shrink: Norm of all updates together, after by before.
    """

    tensors: dict[str, Tensor]
    cosines: dict[str, float]
    layers: list[str]
    shrink: float

    def facts(self) -> dict[str, Any]:
        """What a result records."""
        mean = sum(self.cosines.values()) / len(self.cosines)
        return {
            "projected_layers": len(self.layers),
            "of_layers": len(self.cosines),
            "mean_cosine": round(mean, DIGITS),
            "shrink": round(self.shrink, DIGITS),
        }


def projection(change: Tensor, directions: int | None = None) -> Tensor:
    """P of a layer, (outputs, outputs).

    Args:
        change: V = W_aligned - W_base, (outputs, inputs).
        directions: Project onto so many of V's strongest directions, U U^T; None for the published V V^T / ||V||_F.
    """
    if not change.any():
        return torch.zeros(len(change), len(change))
    if directions is None:
        return torch.div(torch.mm(change, change.T), change.norm())
    found, strengths, _ = torch.linalg.svd(change, full_matrices=False)
    strongest = found[:, :directions][:, strengths[:directions] > NOISE * strengths[0]]
    return torch.mm(strongest, strongest.T)


def cosine(one: Update, other: Update) -> float:
    """Of the updates of a layer, rounded as published; 0 where one of them is 0."""
    inner = ((one.up.double().T @ other.up.double()) * (one.down.double() @ other.down.double().T)).sum()
    norms = one.norm() * other.norm()
    return round(float(inner / norms), DIGITS) if norms > 0 else 0.0


def project(
    tensors: dict[str, Tensor],
    aligned: Weights,
    base: Weights,
    layers: int | None = None,
    threshold: float = THRESHOLD,
    directions: int | None = None,
) -> Projected:
    """Project an adapter's updates.

    Args:
        tensors: Its weights, by PEFT's names.
        aligned: The aligned model, which the adapter is of.
        base: The model before its alignment.
        layers: Project so many layers, those with the lowest cosines; None for those up to the threshold.
        threshold: The highest cosine of a layer that is projected.
        directions: As in `projection`.

    Raises:
        ModelError: If the two models differ in shape, or have the same weights in every layer of the adapter.
    """
    before = list(updates(tensors))
    after, cosines, differ = {}, {}, False
    for update in before:
        one, other = aligned.of(update.layer), base.of(update.layer)
        if one.shape != other.shape:
            raise ModelError(f"{base.folder}: {update.layer} has another shape than in {aligned.folder}.")
        change = one - other
        differ = differ or bool(change.any())
        after[update.layer] = replace(update, up=projection(change, directions) @ update.up.float())
        cosines[update.layer] = cosine(after[update.layer], update)
    if not differ:
        raise ModelError(
            f"{base.folder}: the same weights as {aligned.folder}, so they show no direction of alignment."
        )
    ordered = sorted(cosines, key=lambda layer: cosines[layer])
    chosen = [layer for layer in ordered if cosines[layer] <= threshold] if layers is None else ordered[:layers]
    found = dict(tensors)
    for layer in chosen:
        name = up_name(layer)
        found[name] = after[layer].up.to(tensors[name].dtype)
    return Projected(found, cosines, chosen, _whole_norm(found) / max(_whole_norm(tensors), 1e-30))


def _whole_norm(tensors: dict[str, Tensor]) -> float:
    """Norm of all updates together."""
    return float(torch.stack([update.norm() ** 2 for update in updates(tensors)]).sum().sqrt())


@traits(unaligned=True, adapter=True, files=("base",))
def safe_lora(
    workshop: Workshop,
    data: Data,
    config: ForgetFilterConfig,
    tuned: Defended,
    *,
    base: str | None = None,
    layers: NonNegativeInt | None = None,
    threshold: float = THRESHOLD,
    directions: PositiveInt | None = None,
) -> Defended:
    """Project the adapter.

    Args:
        workshop: Keeps the adapter.
        data: Not used.
        config: All settings.
        tuned: The finetuned model.
        base: The model before its alignment, a folder or a Hub id; None for that of model_name_or_path, which must
            then not be M0 itself.
        layers: Project so many layers, those with the lowest cosines, in place of those up to the threshold; all, if
            there are no more.
        threshold: The highest cosine of a layer that is projected.
        directions: Project onto so many of the alignment's strongest directions in each layer, by a true projector;
            None for the published P.

    Raises:
        ConfigError: If nothing tells what the model was before its alignment.
        ModelError: If that model is another one.
    """
    adapter, made_of, found = _projected("safe_lora", workshop, config, tuned, base, layers, threshold, directions)
    model = changed(workshop, "safe_lora", adapter, found.tensors, made_of)
    return replace(tuned, model=model, facts={**tuned.facts, **found.facts()})


@traits(unaligned=True, adapter=True, files=("base",))
def safe_lora_scaled(
    workshop: Workshop,
    data: Data,
    config: ForgetFilterConfig,
    tuned: Defended,
    *,
    base: str | None = None,
    layers: NonNegativeInt | None = None,
    threshold: float = THRESHOLD,
    directions: PositiveInt | None = None,
) -> Defended:
    """The control: scale the whole update to the norm that `safe_lora` leaves of it. Parameters as in `safe_lora`."""
    name = "safe_lora_scaled"
    adapter, made_of, found = _projected(name, workshop, config, tuned, base, layers, threshold, directions)
    tensors = load(adapter)
    for update in updates(tensors):
        tensors[up_name(update.layer)] = update.up * found.shrink
    model = changed(workshop, name, adapter, tensors, made_of)
    return replace(tuned, model=model, facts={**tuned.facts, "shrink": round(found.shrink, DIGITS)})


def before_alignment(name: str, config: ForgetFilterConfig, m0: M0, base: str | None) -> Path:
    """The folder of the model before its alignment.

    Args:
        name: Who wants to know.
        config: All settings.
        m0: The aligned model.
        base: What the user named; see `safe_lora`.

    Raises:
        ConfigError: If nothing tells which it is.
        ModelError: If there is no such model, or it is no other version of the same one.
    """
    before = whole_model(find_weights(base or config.model_name_or_path), config)
    if before.resolve() == m0.folder.resolve():
        raise ConfigError(
            f"{name} needs the model before its alignment: name it, `parameters: {{{name}: {{base: MODEL}}}}`, or "
            "align one with alignment_dataset_name."
        )
    Weights(m0.folder).require_same_shapes(Weights(before))
    return before


def _projected(
    name: str,
    workshop: Workshop,
    config: ForgetFilterConfig,
    tuned: Defended,
    base: str | None,
    layers: int | None,
    threshold: float,
    directions: int | None,
) -> tuple[Path, dict[str, Any], Projected]:
    """The adapter, what its projection depends on, and the projection."""
    adapter = require_adapter(name, workshop, tuned)
    before = before_alignment(name, config, workshop.m0, base)
    made_of = {"base": weights_hash(before), "layers": layers, "threshold": threshold, "directions": directions}
    aligned, base_weights = (Weights(folder, turned(adapter)) for folder in (workshop.m0.folder, before))
    found = project(load(adapter), aligned, base_weights, layers, threshold, directions)
    return adapter, made_of, found
