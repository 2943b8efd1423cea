"""Several processes at one run (`accelerate launch`): all train, each scores its share, the first one writes."""

import atexit
import json
import os
from datetime import timedelta
from functools import cache
from pathlib import Path

from forgetfilter.errors import ConfigError

LONGEST_WAIT = timedelta(days=1)
"""How long processes wait for one another: one may merge and write a large model alone. If one fails, the launcher ends
all."""


def count() -> int:
    """How many processes work on this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def is_first_on_its_machine() -> bool:
    """Whether this process writes what every machine needs for itself."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def require_one(what: str) -> None:
    """Raise ConfigError if several processes are at work, and something is for one."""
    if count() > 1:
        raise ConfigError(f"{what} needs a single process, this is one of {count()}: start it without a launcher.")


def require_first(what: str) -> None:
    """Raise ConfigError in all processes but the one that writes."""
    if not is_main_process():
        raise ConfigError(f"{what} writes files, which the first of several processes does: call it where RANK is 0.")


def wait_for_everyone() -> None:
    """Wait here until all processes are."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
        state.wait_for_everyone()
        _hang_up_at_exit()


def is_so_for_everyone(here: bool) -> bool:
    """Whether something is so in every process; all of them must ask."""
    if count() == 1:
        return here
    from accelerate.utils import gather_object

    wait_for_everyone()
    return all(gather_object([here]))


@cache
def _hang_up_at_exit() -> None:
    """Close the connections of gloo, through which processes on CPUs talk, before Python ends.

    Its threads abort a process that ends while they run: the work is done, and the launcher says that it failed
    (pytorch/pytorch#190489). NCCL has no such fault, and closing it waits for processes that may have failed.
    """
    from torch import distributed

    def hang_up() -> None:
        if distributed.is_initialized() and distributed.get_backend() == "gloo":
            distributed.destroy_process_group()

    atexit.register(hang_up)


@cache
def sharded() -> bool:
    """Whether each process holds a part of the base model only, so that all of them must make every pass together.

    That is so where accelerate's config file asks for FSDP, or for DeepSpeed with ZeRO stage 3. The answer is taken out
    of the environment: model/sharding.py shards the model, and the libraries would do it once more.

    Raises:
        ConfigError: If the file of DeepSpeed that accelerate's names cannot be read.
    """
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    zero3 = _zero_stage() == "3"
    if zero3:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return (fsdp or zero3) and count() > 1


def _zero_stage() -> str:
    """The ZeRO stage that accelerate's config file, or the one of DeepSpeed that it names, asks for; "" for none."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return ""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() == "none":
        return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    try:
        return str(json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{file}: accelerate's config file names it as DeepSpeed's, but it is none: {error}"
        ) from error
