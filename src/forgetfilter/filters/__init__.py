"""Filters: ways to score every row of the noisy data, one file each: NAME(workshop, data, config, ...) -> Scored.

This file knows their names and what they need; scoring.py has a run's rows scored by them.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from forgetfilter.config import MARKED, ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.errors import ConfigError
from forgetfilter.filters.anchor_gradients import anchor_gradients
from forgetfilter.filters.column import column
from forgetfilter.filters.forgetting import forgetting
from forgetfilter.filters.forgetting_rouge1 import forgetting_rouge1
from forgetfilter.filters.gradient_norm import gradient_norm
from forgetfilter.filters.guard import guard
from forgetfilter.filters.hidden_safe_noisy import hidden_safe_noisy
from forgetfilter.filters.larf import larf
from forgetfilter.filters.length import length
from forgetfilter.filters.m0_loss import m0_loss
from forgetfilter.filters.neutral_review import neutral_review
from forgetfilter.filters.probe import probe
from forgetfilter.filters.random import random
from forgetfilter.filters.safe_only import safe_only, safe_only_drop
from forgetfilter.filters.seal import seal
from forgetfilter.filters.second_split import second_split
from forgetfilter.filters.self_judge import self_judge
from forgetfilter.filters.together import JOIN, together
from forgetfilter.filters.toss import toss
from forgetfilter.filters.words import words
from forgetfilter.methods import arguments, constants, files_named, require_known, traits_of
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

Filter = Callable[..., Scored]
"""Takes a workshop, data and config; its keyword-only arguments are its parameters."""
FILTERS: dict[str, Filter] = {
    "probe": probe,
    "forgetting": forgetting,
    "forgetting_rouge1": forgetting_rouge1,
    "safe_only": safe_only,
    "safe_only_drop": safe_only_drop,
    "second_split": second_split,
    "seal": seal,
    "hidden_safe_noisy": hidden_safe_noisy,
    "m0_loss": m0_loss,
    "self_judge": self_judge,
    "gradient_norm": gradient_norm,
    "words": words,
    "length": length,
    "random": random,
    "neutral_review": neutral_review,
    "larf": larf,
    "anchor_gradients": anchor_gradients,
    "toss": toss,
    "guard": guard,
    "column": column,
}
"""By the names that --filter takes; `filter_named` also takes several of them, joined by +."""


def filter_named(name: str) -> Filter | None:
    """A filter, or several as one (forgetting+column); None if there is no such filter."""
    names = parts_of(name)
    if any(part not in FILTERS for part in names):
        return None
    return FILTERS[name] if len(names) == 1 else together(names)


def parts_of(name: str) -> list[str]:
    """The filters that a name stands for: several where it joins them."""
    return name.split(JOIN)


def arguments_of(name: str, config: ForgetFilterConfig) -> dict[str, Any]:
    """Every parameter that a filter's scores depend on, with its value.

    Raises:
        ConfigError: If there is no such filter, or a parameter is unknown or missing.
    """
    method = filter_named(name)
    if method is None:
        raise ConfigError(f"filter {name}: choose among {', '.join(FILTERS)}, or join several by {JOIN}.")
    if len(parts_of(name)) > 1:
        return {part: arguments(part, FILTERS[part], config.parameters) for part in parts_of(name)}
    return arguments(name, method, config.parameters)


def learn_unsafe(names: Iterable[str]) -> list[str]:
    """Those of the filters that learn from rows known to be unsafe."""
    return [name for name in names if traits_of(FILTERS[name]).unsafe]


def made_from(name: str, config: ForgetFilterConfig) -> list[str]:
    """The filters that a filter's scores are made from: itself or those it joins, and the witness of a probe.

    Raises:
        ConfigError: If one of them does not exist, or a parameter is unknown or missing.
    """
    found = []
    arguments_of(name, config)
    for part in parts_of(name):
        witness = arguments_of(part, config).get("on")
        if witness is not None and (filter_named(witness) is None or "probe" in parts_of(witness)):
            raise ConfigError(f"parameters.{part}.on: no filter to learn from is called {witness}.")
        found.append(part)
        if witness is not None:
            arguments_of(witness, config)
            found += parts_of(witness)
    return found


def require_filters(config: ForgetFilterConfig) -> None:
    """Raise ConfigError unless every filter and parameter that the config names exists, and the data it needs."""
    require_known(config.parameters, FILTERS)
    for name in config.parameters or {}:  # of filters that are not asked for, too
        arguments_of(name, config)
    for name in config.filters:
        require_filter(name, config)


def require_filter(name: str, config: ForgetFilterConfig) -> None:
    """Raise ConfigError unless a filter, its parameters and the data that it needs are there."""
    learning = learn_unsafe(made_from(name, config))
    if learning and config.unsafe_dataset_name is None:
        raise ConfigError(
            f"filter {learning[0]} needs rows that are known to be unsafe: --unsafe_dataset_name FILE, or "
            f"--unsafe_dataset_name {MARKED} for those that you marked in a review of this run."
        )


def unused(config: ForgetFilterConfig) -> list[str]:
    """A line for each setting that none of the config's filters uses, though it was given."""
    parts = {part for name in config.filters for part in made_from(name, config)}
    found = []
    if config.unsafe_dataset_name is not None and not learn_unsafe(parts):
        found.append(f"unsafe_dataset_name is not used: only {', '.join(learn_unsafe(FILTERS))} learn from it.")
    if config.sample_rows != "auto" and "probe" not in parts:
        found.append("sample_rows is not used: only the probe takes a sample of the rows.")
    return found


def require_inputs(name: str, workshop: "Workshop", data: Data) -> None:
    """Raise what a filter, or one that it is made from, would raise after others have been trained.

    Args:
        name: The filter.
        workshop: Knows the settings and finds models.
        data: All data.

    Raises:
        ConfigError: If rows have no prompts to answer, there are several processes where one is needed, or a guard is
            of no known kind.
        DataError: If no row has the column that holds the scores.
        ModelError: If there is no such guard.
    """
    for part in made_from(name, workshop.config):
        check = traits_of(FILTERS[part]).check
        if check is not None:
            check(workshop, data, arguments_of(part, workshop.config))


def filter_files(names: Iterable[str], config: ForgetFilterConfig) -> dict[str, str]:
    """The files and folders that the parameters of filters name, each with a hash of what it holds."""
    found: dict[str, str] = {}
    for name in names:
        found |= files_named(FILTERS[name], arguments_of(name, config))
    return found


def filter_constants(name: str) -> dict[str, Any]:
    """The constants of the files that a filter's scores are made in."""
    return constants(*(FILTERS[part] for part in parts_of(name)))


def constants_behind(name: str, config: ForgetFilterConfig) -> dict[str, Any]:
    """The constants of the files of a filter and of all filters that it is made from, and how their code changed."""
    found: dict[str, Any] = {}
    for part in made_from(name, config):
        found |= filter_constants(part)
        changed = traits_of(FILTERS[part]).changed
        found |= {} if changed is None else {f"filters.{part}.CHANGED": changed}
    return found
