"""ForgetFilter: clean finetuning data of unsafe rows before a model learns them."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forgetfilter.config import ForgetFilterConfig, StageConfig
    from forgetfilter.errors import ForgetFilterError
    from forgetfilter.forgetting import ForgetFilter
    from forgetfilter.result import Result

__version__ = version("forgetfilter")
__all__ = ["ForgetFilter", "ForgetFilterConfig", "ForgetFilterError", "Result", "StageConfig"]

_HOMES = {
    "ForgetFilter": "forgetting",
    "ForgetFilterConfig": "config",
    "ForgetFilterError": "errors",
    "Result": "result",
    "StageConfig": "config",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import forgetfilter`` is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'forgetfilter' has no attribute {name!r}")
    return getattr(import_module(f"forgetfilter.{_HOMES[name]}"), name)
