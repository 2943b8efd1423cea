"""The CPU's memory: keep freed memory for reuse, and raise the same error as on a GPU if there is no more."""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from forgetfilter import processes
from forgetfilter.errors import ModelError, TrainingError

Row = TypeVar("Row")
Made = TypeVar("Made")
RELEASE_EVERY = 4
"""Freed memory goes back to the kernel after so many batches: often enough, and at almost no cost."""
NO_MORE = ("DefaultCPUAllocator", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch says that there is no memory, where it does not raise OutOfMemoryError."""


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of handing each large tensor back to the kernel.

    On the CPU a training step frees and takes the same gigabyte again and again; without this a
    quarter of its time goes to page faults. Nothing happens where there is no glibc.
    """
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def release_freed_memory() -> None:
    """Give unused memory back to the kernel: it piles up in gaps between tensors of changing sizes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_dropped_models() -> None:
    """Free the memory of models no longer used: trainers leave reference cycles, and torch keeps freed GPU memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def to_device(model: Any, device: torch.device) -> None:
    """Take a model to its device.

    Raises:
        ModelError: If the memory does not hold it.
    """
    try:
        with one_memory_error():
            model.to(device)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{model.config.name_or_path}: the memory of {device} does not hold this model. Take a smaller one, "
            "--load_in_4bit true (if its weights are stored in 16 bits), or several GPUs (docs/scale.md)."
        ) from error


def in_halves(work: Callable[[Sequence[Row]], list[Made]], rows: Sequence[Row]) -> list[Made]:
    """What `work` makes of some rows, one result a row; of one half after the other where the memory does not hold all.

    Raises:
        TrainingError: If it does not hold one row.
    """
    try:
        with one_memory_error():
            return work(rows)
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            raise TrainingError("the memory does not hold a row. Take a shorter --max_length.") from error
    half = len(rows) // 2
    return [*in_halves(work, rows[:half]), *in_halves(work, rows[half:])]


@contextlib.contextmanager
def one_memory_error() -> Iterator[None]:
    """Raise torch.OutOfMemoryError for the CPU's memory, too; torch raises a RuntimeError for it.

    Raises:
        TrainingError: In its place, if the model is sharded: the other processes wait for the pass that has failed, so
            it cannot be tried again with less.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not lacking and not any(words in str(error) for words in NO_MORE):
            raise
        if processes.sharded():
            raise TrainingError(
                "the memory does not hold a batch. Take a smaller one (--per_device_train_batch_size, "
                "--per_device_eval_batch_size), a shorter --max_length, or more processes."
            ) from error
        raise torch.OutOfMemoryError(str(error)) from error
