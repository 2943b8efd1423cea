"""What filters and defenses say of themselves in their files: their parameters, their constants, and what they need.

Parameters are the keyword-only arguments of their functions, with their default values; their annotations say of what
type they are and, as PositiveInt does, how small they may be. What they need stands in `@traits(...)` above them.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from forgetfilter.errors import ConfigError
from forgetfilter.files import at_home, sha256


@dataclass(frozen=True)
class Least:
    """The least value that a parameter may have, in its annotation.

    Attributes:
        value: That value.
        above: Whether it must be more than that.
    """

    value: float
    above: bool = False

    def check(self, where: str, value: float) -> None:
        """Raise ConfigError for a value that is too small, or no number."""
        if not (value > self.value if self.above else value >= self.value):
            wanted = f"above {self.value}" if self.above else f"{self.value} or more"
            raise ConfigError(f"{where} is {value}: it must be {wanted}.")


PositiveInt = Annotated[int, Least(1)]
NonNegativeInt = Annotated[int, Least(0)]
PositiveFloat = Annotated[float, Least(0, above=True)]
NonNegativeFloat = Annotated[float, Least(0)]
Given = Mapping[str, Mapping[str, Any]] | None
"""What the user gave: method -> parameter -> value."""
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Traits:
    """What must be known of a filter or a defense before it is run.

    Attributes:
        unsafe: It learns from rows known to be unsafe (`--unsafe_dataset_name`).
        pairs: It learns from such rows, each beside a safe row of the same prompt.
        unaligned: It needs the model before its alignment, which its parameter `base` may name.
        adapter: It repairs a LoRA adapter, so it does not work where all weights are trained.
        whole: It makes another M0, of whole weights, so it does not work with weights in 4 bits.
        keeps_by: The filter by which it keeps rows.
        scores_by: The filter whose scores it uses in another way.
        check: Raises what it would raise for want of an input, before others are trained. Takes the workshop, the data
            and its parameters.
        files: Its parameters that may name files or folders; what these hold counts where results are stored.
        own_scale: Its scale owes nothing to the safe rows, so it means as much with those in the box.
        row_by_row: A row's score is its own, whatever rows that say the same have.
        changed: A note to change whenever the code gives other scores: stored ones are then computed anew.
    """

    unsafe: bool = False
    pairs: bool = False
    unaligned: bool = False
    adapter: bool = False
    whole: bool = False
    keeps_by: str | None = None
    scores_by: str | None = None
    check: Callable[..., None] | None = None
    files: tuple[str, ...] = ()
    own_scale: bool = False
    row_by_row: bool = False
    changed: str | None = None


def traits(**known: Any) -> Callable[[Method], Method]:
    """Note the Traits of the method below.

    Raises:
        TypeError: If `files` names what is no parameter of it.
    """

    def noted(method: Method) -> Method:
        missing = [name for name in known.get("files", ()) if name not in inspect.signature(method).parameters]
        if missing:
            raise TypeError(f"traits of {method.__name__}: files names {missing[0]}, and it has no such parameter.")
        vars(method)["traits"] = Traits(**known)
        return method

    return noted


def traits_of(method: Callable[..., Any]) -> Traits:
    """What a method has said of itself; nothing special if it has said nothing."""
    found: Traits = getattr(method, "traits", Traits())
    return found


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


def files_named(method: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, str]:
    """The files and folders that a method's parameters name, each with a hash of what it holds.

    Args:
        method: Its traits say which parameters may name some.
        values: Every parameter with its value.
    """
    found = {}
    for name in filter(None, (values[key] for key in traits_of(method).files)):
        with suppress(OSError):  # a text too long for a name
            path = Path(at_home(name))
            inside = sorted(path.rglob("*")) if path.is_dir() else [path]
            if path.exists():
                found[name] = sha256(*filter(Path.is_file, inside))
    return found


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


def _typed(where: str, value: Any, annotation: Any) -> Any:
    """A value as its annotation wants it; numbers that a command line left as text are read."""
    in_union = get_origin(annotation) in (Union, UnionType)
    members = [_parted(member) for member in (get_args(annotation) if in_union else (annotation,))]
    for kind, rules in members:
        if kind is NoneType and value is None:
            return None
        if kind in (int, float) and not isinstance(value, bool):
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if kind is float or number.is_integer():
                for rule in rules:
                    rule.check(where, kind(number))
                if not math.isfinite(number):
                    raise ConfigError(f"{where} is {value!r}: it must be a finite number.")
                return kind(number)
        elif kind in (str, bool) and isinstance(value, kind):
            return value
        elif kind is bool and value in ("true", "false"):
            return value == "true"
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind, _ in members)
    raise ConfigError(f"{where} is {value!r}: it must be a value of type {names}.")


def _parted(annotation: Any) -> tuple[Any, tuple["Least", ...]]:
    """A type, and the rules for its values."""
    if get_origin(annotation) is not Annotated:
        return annotation, ()
    kind, *rules = get_args(annotation)
    return kind, tuple(rules)
