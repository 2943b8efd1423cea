"""Filters: ways to score every row of the noisy data, one file each: NAME(workshop, data, config, ...) -> Scored."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetfilter import old_runs, processes
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.errors import ConfigError
from forgetfilter.files import digest, sha256
from forgetfilter.filters.forgetting import forgetting
from forgetfilter.filters.forgetting_rouge1 import forgetting_rouge1
from forgetfilter.filters.m0_loss import m0_loss
from forgetfilter.filters.neutral_review import neutral_review
from forgetfilter.filters.probe import probe
from forgetfilter.filters.random import random
from forgetfilter.filters.words import words
from forgetfilter.methods import arguments, constants, require_known
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

Filter = Callable[..., Scored]
"""Takes a workshop, data and config; its keyword-only arguments are its parameters."""
FILTERS: dict[str, Filter] = {
    "forgetting": forgetting,
    "forgetting_rouge1": forgetting_rouge1,
    "probe": probe,
    "m0_loss": m0_loss,
    "words": words,
    "neutral_review": neutral_review,
    "random": random,
}
"""By the names that --filter takes."""


def require_filters(config: ForgetFilterConfig) -> None:
    """Raise ConfigError unless every filter and parameter that the config names exists."""
    unknown = [name for name in config.filters if name not in FILTERS]
    if unknown:
        raise ConfigError(f"filter {', '.join(unknown)}: choose among {', '.join(FILTERS)}.")
    require_known(config.parameters, FILTERS)
    for name in config.filters:
        witness = arguments(name, FILTERS[name], config.parameters).get("on", "forgetting")
        if witness not in FILTERS or witness == name == "probe":
            raise ConfigError(f"parameters.{name}.on: no filter to learn from is called {witness}.")


def score(workshop: "Workshop", data: Data, name: str) -> Scored:
    """Score the noisy rows with a filter, and note in the workshop's run that they are scored by it.

    Args:
        workshop: Trains and reads models.
        data: The noisy and the safe data.
        name: The filter's, of FILTERS.

    Raises:
        ForgetFilterError: One of its children: ConfigError for parameters that are unknown or missing, others from
            data and models.
    """
    part = _scored_part(workshop, data, name)
    workshop.run.manifest.setdefault("filters", {})[name] = part
    return Scored.load(workshop.run.folder / f"{part}.parquet")


def scores_of(workshop: "Workshop", data: Data, name: str) -> Scored:
    """Scores by a filter for another filter's use, whatever part of the run's rows the data are; see `score`."""
    run, config = workshop.run, workshop.config
    if data.facts() == {key: run.manifest[key] for key in ("noisy", "safe")} and name not in (config.parameters or {}):
        found = old_runs.scored(run, name, config)
        if found is not None:
            return found
    return Scored.load(run.folder / f"{_scored_part(workshop, data, name)}.parquet")


def _scored_part(workshop: "Workshop", data: Data, name: str) -> str:
    """The part of the run that holds a filter's scores, which are made now if they do not exist."""
    config, run = workshop.config, workshop.run
    parameters = arguments(name, FILTERS[name], config.parameters)
    made_of = [*_made_of_filter(name, config), workshop.m0.sha256, data.facts(), config.identity()]
    if "on" in parameters:  # it learns from another filter, and what makes that one's scores makes its own
        made_of.append(_made_of_filter(parameters["on"], config))
    key = digest(made_of)
    part = f"scored/{name}-{key}"
    if not run.done(part, key):
        scored = FILTERS[name](workshop, data, config, **parameters)
        if processes.first():
            scored.save(run.folder / f"{part}.parquet")
        processes.together()
        run.mark(part, [run.folder / f"{part}.parquet"], made_of=key, filter=name, parameters=parameters)
    return part


def _made_of_filter(name: str, config: ForgetFilterConfig) -> list[Any]:
    """A filter's name, parameters and constants, and hashes of the files that its parameters name."""
    parameters = arguments(name, FILTERS[name], config.parameters)
    files = {str(value): sha256(Path(value)) for value in parameters.values() if _is_file(value)}
    return [name, parameters, constants(FILTERS[name]), files]


def _is_file(value: object) -> bool:
    return isinstance(value, str) and Path(value).is_file()
