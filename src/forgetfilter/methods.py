"""Parameters of filters and defenses: the keyword-only arguments of their functions, with their default values."""

import inspect
from collections.abc import Callable, Collection, Mapping
from types import ModuleType, NoneType
from typing import Any, get_args

from forgetfilter.errors import ConfigError

Given = Mapping[str, Mapping[str, Any]] | None
"""What the user gave: method -> parameter -> value."""


def arguments(name: str, method: Callable[..., Any], given: Given) -> dict[str, Any]:
    """Every parameter of a method with its value: the one given, else its default.

    Args:
        name: The method's name, by which values are given.
        method: A function; its keyword-only arguments are its parameters.
        given: What the user gave for all methods.

    Raises:
        ConfigError: If a parameter is unknown, is missing and has no default, or has a value of another type.
    """
    signature = inspect.signature(method)
    known = {key: item for key, item in signature.parameters.items() if item.kind is item.KEYWORD_ONLY}
    own = (given or {}).get(name) or {}
    unknown = [key for key in own if key not in known]
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"parameters.{name}: no parameter {', '.join(map(str, unknown))}; {has}.")
    values = {key: item.default for key, item in known.items()}
    for key, value in own.items():
        annotation = known[key].annotation
        if isinstance(annotation, str):  # of a file with postponed annotations
            annotation = eval(annotation, method.__globals__)
        values[key] = _typed(f"parameters.{name}.{key}", value, annotation)
    missing = [key for key, value in values.items() if value is inspect.Parameter.empty]
    if missing:
        raise ConfigError(
            f"{name} needs {', '.join(missing)}: give it in the file of --config, as "
            f"`parameters: {{{name}: {{{missing[0]}: VALUE}}}}`."
        )
    return values


def constants(*sources: ModuleType | Callable[..., Any]) -> dict[str, Any]:
    """The numbers and texts that are defined in capitals: MODULE.NAME -> value. Results note them beside parameters.

    Args:
        sources: Modules, and methods for the modules that define them.
    """
    found: dict[str, Any] = {}
    for source in sources:
        names = vars(source) if isinstance(source, ModuleType) else source.__globals__
        module = str(names["__name__"]).removeprefix("forgetfilter.") if "__name__" in names else "method"
        for name, value in names.items():
            if name.isupper() and isinstance(value, (bool, int, float, str)):
                found[f"{module}.{name}"] = value
    return dict(sorted(found.items()))


def require_known(given: Given, names: Collection[str]) -> None:
    """Raise ConfigError if parameters are given for a method that does not exist."""
    unknown = [name for name in given or {} if name not in names]
    if unknown:
        raise ConfigError(
            f"parameters: no filter or defense {', '.join(map(str, unknown))}; there are {', '.join(names)}."
        )


def require_least(name: str, least: float = 1, **values: float) -> None:
    """Raise ConfigError unless each value of a method's parameters is `least` or more."""
    for key, value in values.items():
        if value < least:
            raise ConfigError(f"parameters.{name}.{key} is {value}: it must be {least} or more.")


def require_above_0(name: str, **values: float) -> None:
    """Raise ConfigError unless each value of a method's parameters is above 0."""
    for key, value in values.items():
        if value <= 0:
            raise ConfigError(f"parameters.{name}.{key} is {value}: it must be above 0.")


def _typed(where: str, value: Any, annotation: Any) -> Any:
    """A value as its annotation wants it; numbers that a command line left as text are read."""
    wanted = get_args(annotation) or (annotation,)  # the members of a union
    if value is None and NoneType in wanted:
        return None
    for kind in wanted:
        if kind in (int, float) and not isinstance(value, bool):
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if kind is float or number.is_integer():
                return kind(number)
        elif kind in (str, bool) and isinstance(value, kind):
            return value
        elif kind is bool and value in ("true", "false"):
            return value == "true"
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in wanted)
    raise ConfigError(f"{where} is {value!r}: it must be a value of type {names}.")
