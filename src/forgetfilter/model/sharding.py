"""A base model that does not fit one device: each process holds a part of every frozen weight (torch's FSDP).

A pass gathers the weights of a block right before it is computed, and drops them after it. So every pass needs all
processes: rows are read in batches, a batch a process, round by round (`shared`), and whatever else passes through the
model is done by all of them alike. The adapter stays whole in every process. So training, saving and restoring it are
what they are with a model that fits.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from forgetfilter import processes
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.errors import ConfigError

Found = TypeVar("Found")
OFFLOADING = ("FSDP_OFFLOAD_PARAMS", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")
"""Where accelerate says whether its config file asks for weights in the CPU's memory."""


def refuse_unshardable(config: ForgetFilterConfig) -> None:
    """Raise ConfigError, before any work, if the model is to be sharded, and something else does not work with that."""
    if not processes.sharded():
        return
    if not config.use_peft:
        raise ConfigError(
            "a sharded model (FSDP, ZeRO stage 3) is trained by an adapter: --use_peft false needs all weights in each "
            "process. Launch with `--multi_gpu`, or without a launcher."
        )
    if config.load_in_4bit:
        raise ConfigError(
            "--load_in_4bit does not work with a sharded model (FSDP, ZeRO stage 3): leave it out, or launch with "
            "`--multi_gpu`, where each process holds all weights."
        )
    if config.torch_compile is True:
        raise ConfigError("--torch_compile true does not work with a sharded model (FSDP, ZeRO stage 3): leave it out.")
    if any(os.environ.get(name, "none").lower() not in ("false", "none") for name in OFFLOADING):
        raise ConfigError(
            "accelerate's config file asks for weights in the CPU's memory, which is not supported: take "
            "fsdp_offload_params or offload_param_device out, and use more processes."
        )
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        raise ConfigError(
            "accelerate's config file has fsdp_activation_checkpointing: take it out, and use "
            "--gradient_checkpointing true."
        )


def shard(model: Any, device: torch.device) -> None:
    """Take this process's part of every frozen weight to its device; what is trained goes there whole.

    Args:
        model: The model on the CPU, with its adapter.
        device: The process's own.

    Raises:
        ConfigError: If weights are quantized to integers.
    """
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise ConfigError("a quantized model cannot be sharded (FSDP, ZeRO stage 3): take its weights of 16 bits.")
    processes.wait_for_everyone()  # from here on they can talk to each other
    mesh = init_device_mesh(device.type, (processes.count(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for unit in (*_blocks(model), model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    frozen = [name for name, parameter in model.named_parameters() if parameter not in trained]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of a model's outermost lists of modules: the parts whose weights are gathered at once."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _blocks(child)


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """The weights outside of the blocks are whole as long as the context lasts, for passes that begin inside the model.

    A model that is not sharded is left as it is.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False, recurse=False)
    model.unshard()
    try:
        yield
    finally:
        model.set_reshard_after_forward(True, recurse=False)
        model.reshard()


def shared(
    batches: Iterable[Sequence[int]], work: Callable[[Sequence[int]], Found]
) -> Iterator[tuple[Sequence[int], Found]]:
    """Every batch, with what is made of it. With a sharded model each process works on its share, and gets all results.

    Args:
        batches: The batches, the same in every process.
        work: Makes one pass through the model.
    """
    if not processes.sharded():
        for batch in batches:
            yield batch, work(batch)
        return
    all_of_them = list(batches)
    for start in range(0, len(all_of_them), processes.count()):
        round_of_them = all_of_them[start : start + processes.count()]
        mine = round_of_them[min(processes.rank(), len(round_of_them) - 1)]  # who has none makes the last pass as well
        found: list[Any] = [None] * processes.count()
        distributed.all_gather_object(found, work(mine))
        yield from zip(round_of_them, found, strict=False)
