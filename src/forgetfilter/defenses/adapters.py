"""What defenses share that change a trained adapter: its weights, layer by layer, and an adapter of other weights."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from forgetfilter.defenses.result import Defended
from forgetfilter.errors import ConfigError, ModelError
from forgetfilter.model.folders import ADAPTER, weights_hash
from forgetfilter.workshop import Workshop

BEFORE, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
"""How PEFT names a weight's two factors: BEFORE + its layer + DOWN or UP."""


@dataclass
class Update:
    """What finetuning added to a layer's weight: scale * up @ down.

    Attributes:
        layer: Name of the layer, as the whole model has it.
        down: (rank, inputs), PEFT's A.
        up: (outputs, rank), PEFT's B.
    """

    layer: str
    down: Tensor
    up: Tensor

    def norm(self) -> Tensor:
        """Frobenius norm of up @ down, without its scale."""
        down, up = self.down.double(), self.up.double()
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


def require_adapter(name: str, workshop: Workshop, tuned: Defended) -> Path:
    """The folder of the adapter that a defense is to repair.

    Raises:
        ConfigError: If all weights were trained, or none.
    """
    if not workshop.config.use_peft:
        raise ConfigError(f"{name} repairs a LoRA adapter: it does not work with use_peft off.")
    if tuned.model is None:
        raise ConfigError(f"{name} repairs what a finetuning has added, and here nothing has been finetuned before it.")
    return tuned.model


def updates(tensors: Mapping[str, Tensor]) -> Iterator[Update]:
    """The update of each layer, in the order of their names."""
    for name in sorted(tensors):
        if name.endswith(DOWN):
            whole = name.removesuffix(DOWN)
            yield Update(whole.removeprefix(BEFORE), tensors[name], tensors[whole + UP])


def up_name(layer: str) -> str:
    """PEFT's name of a layer's B."""
    return f"{BEFORE}{layer}{UP}"


def load(adapter: Path) -> dict[str, Tensor]:
    """An adapter's weights by PEFT's names."""
    return load_file(adapter / ADAPTER)


def changed(
    workshop: Workshop, name: str, adapter: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> Path:
    """Keep an adapter with other weights than the one that it was made of.

    Args:
        workshop: Keeps it.
        name: The defense's.
        adapter: The adapter it was made of.
        tensors: All of its weights, by PEFT's names.
        facts: What, besides the adapter, its weights depend on.
    """

    def fill(folder: Path) -> None:
        for path in adapter.iterdir():
            if path.name != ADAPTER:
                shutil.copy(path, folder)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / ADAPTER, {"format": "pt"})

    return workshop.keep(name, fill, [weights_hash(adapter), dict(facts)])


def turned(adapter: Path) -> bool:
    """Whether the layers that an adapter is of hold their weights as (inputs, outputs), as GPT-2's do."""
    return bool(PeftConfig.from_pretrained(str(adapter)).fan_in_fan_out)


PLAIN = ("F32", "F16", "BF16", "F64")
"""Types of weights that mean what they say; those of fewer bits come with scales."""


class Weights:
    """A whole model's weights on disk, read one by one.

    Args:
        folder: Where they are.
        turned: Whether they are stored as (inputs, outputs).
    """

    def __init__(self, folder: Path, turned: bool = False) -> None:
        """Look which file holds which weight."""
        self.folder, self.turned = folder, turned
        self.files: dict[str, Path] = {}
        self.stored: dict[str, tuple[list[int], str]] = {}  # name -> shape, type
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    own = opened.get_slice(name)
                    self.files[name], self.stored[name] = path, (list(own.get_shape()), own.get_dtype())

    def of(self, layer: str) -> Tensor:
        """(outputs, inputs) float32, a layer's weight; files of the Hub may leave out the first part of its name.

        Raises:
            ModelError: If there is none.
        """
        name = self._name(f"{layer}.weight")
        with safe_open(self.files[name], "pt") as opened:
            found: Tensor = opened.get_tensor(name)
        return found.float().T if self.turned else found.float()

    def require_same_shapes(self, other: "Weights") -> None:
        """Raise ModelError unless another model has all matrices of this one's blocks; no weight is read for it."""
        for name, (shape, _) in self.stored.items():
            in_block = len(shape) == 2 and name.endswith(".weight") and any(part.isdigit() for part in name.split("."))
            if not in_block:
                continue
            theirs, kind = other.stored[other._name(name)]
            if theirs != shape:
                raise ModelError(f"{other.folder}: {name} has another shape, {theirs}, than in {self.folder}, {shape}.")
            if kind not in PLAIN:
                raise ModelError(f"{other.folder}: {name} is stored as {kind}: give a model in {', '.join(PLAIN)}.")

    def _name(self, name: str) -> str:
        """A weight's name in these files, which may leave out its first part, or have one more.

        Raises:
            ModelError: If there is none.
        """
        for found in (name, name.partition(".")[2], self._longer.get(name)):
            if found in self.files:
                return str(found)
        raise ModelError(f"{self.folder}: it has no weight {name}, so it is no other version of the same model.")

    @cached_property
    def _longer(self) -> dict[str, str]:
        """Names without their first part -> the whole ones."""
        return {name.partition(".")[2]: name for name in self.files}
