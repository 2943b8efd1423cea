"""The CPU's memory: not handed back and forth without need, and the same error as a GPU's where there is no more."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

import torch

RELEASE_EVERY = 4
"""Batches after which freed memory is handed back: rarely enough to cost next to nothing."""
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
    """Give what has piled up in the gaps between tensors of ever other sizes back to the kernel."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_dropped_models() -> None:
    """Take back what models hold that nobody uses any more: a trainer leaves cycles, a GPU's memory stays torch's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def one_memory_error() -> Iterator[None]:
    """Raise torch.OutOfMemoryError for the CPU's memory, too, which torch calls a RuntimeError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MORE):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
