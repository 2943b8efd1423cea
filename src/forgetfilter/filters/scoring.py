"""Score the noisy rows by a filter, once: what has been scored is found again in the run's folder."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetfilter import old_runs, processes
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data, Rows
from forgetfilter.data.single_answers import single_answers
from forgetfilter.files import digest
from forgetfilter.filters import (
    FILTERS,
    arguments_of,
    filter_constants,
    filter_files,
    filter_named,
    learn_unsafe,
    made_from,
    parts_of,
)
from forgetfilter.filters.forgetting import ranks_alone_if_builtin
from forgetfilter.methods import traits_of
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


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
    old = _of_version_0_1(workshop, data, name)
    if old is not None:
        return old
    part = part_with_scores(workshop, data, name)
    workshop.run.manifest.setdefault("filters", {})[name] = part
    return Scored.load(workshop.run.table_file(part))


def scores_of(workshop: "Workshop", data: Data, name: str) -> Scored:
    """Scores by a filter for another filter's use. The data may be a part of the run's rows; see `score`."""
    old = _of_version_0_1(workshop, data, name)
    if old is not None:
        return old
    return Scored.load(workshop.run.table_file(part_with_scores(workshop, data, name)))


def _of_version_0_1(workshop: "Workshop", data: Data, name: str) -> Scored | None:
    """The scores that version 0.1.0, which had no parameters, left of all of a run's rows; None if there are none."""
    run, config = workshop.run, workshop.config
    found = None if name in (config.parameters or {}) else old_runs.scored(run, name, config)
    if found is None or data.facts() != {key: run.manifest[key] for key in ("noisy", "safe")}:
        return None
    return found


def scores_key(workshop: "Workshop", data: Data, name: str) -> str:
    """A hash of everything that a filter's scores depend on: rows, M0, settings, parameters, constants and files."""
    config = workshop.config
    identity = config.identity()
    noted = workshop.run.manifest.get("settings", {})  # M0 may have moved since; its weights are hashed
    identity["model_name_or_path"] = noted.get("model_name_or_path", identity["model_name_or_path"])
    size = "per_device_eval_batch_size"
    identity[size] = noted.get(size, getattr(ForgetFilterConfig, size))  # only older runs depend on it
    if identity["sample_rows"] == "auto":
        identity.pop("sample_rows")  # older runs know no samples, and must continue
    made_of = [*_made_of_filter(name, config), workshop.m0.sha256, data.facts(), identity]
    others = made_from(name, config)
    made_of += [_made_of_filter(part, config) for part in others if part != name]
    if data.unsafe is not None and learn_unsafe(others):
        made_of.append(data.unsafe.facts())
    if data.noisy.copies().any():
        made_of.append("copies share their scores")  # in runs made before, they did not
        made_of += ["and count, each copy by its own rank"] if "probe" in parts_of(name) else []
        made_of += ["but for numbers of their own"] if _row_by_row(name) else []
    made_of += sorted({traits_of(FILTERS[part]).changed for part in others} - {None})
    if data.planted is not None:
        made_of.append(data.planted.facts())
        made_of += ["not counted as suspect"] if "probe" in parts_of(name) else []
    if data.noisy.several_answers:
        made_of.append("answers are judged one by one")  # in runs made before, they were not
    return digest(made_of)


def part_with_scores(workshop: "Workshop", data: Data, name: str) -> str:
    """The part of the run that holds a filter's scores, which are made now if they do not exist."""
    config, run = workshop.config, workshop.run
    parameters, key = arguments_of(name, config), scores_key(workshop, data, name)
    part = f"scored/{name}-{key}"
    if run.done(part, key):
        workshop.account.reuse(part, run.manifest["stages"])
    else:
        with workshop.account.measuring() as cost:
            scored = _of_all_rows(name, workshop, data, parameters if len(parts_of(name)) == 1 else {})
            made_with = workshop.account.parts()
        if processes.is_main_process():
            scored.save(run.table_file(part))
        processes.wait_for_everyone()
        facts = {"cost": cost.facts(), "made_with": made_with, "filter": name, "parameters": parameters}
        run.finish(part, [run.table_file(part)], made_of=key, **facts)
    return part


def _of_all_rows(name: str, workshop: "Workshop", data: Data, parameters: dict[str, Any]) -> Scored:
    """A filter's scores of all rows.

    It sees rows that say the same once, unless it scores row by row, and the planted rows among them.
    """
    rows = np.arange(len(data.noisy.examples))
    firsts = rows if _row_by_row(name) else data.noisy.first_copies
    seen = np.flatnonzero(firsts == rows)
    noisy = data.noisy
    if len(seen) < len(rows):
        times = np.bincount(firsts, weights=noisy.times).astype(int)  # a row may stand for several already
        noisy = replace(noisy.select(seen.tolist()), times=times[seen])
    if data.planted is not None:
        noisy = noisy.with_planted(data.planted)
    scored = _answer_by_answer(name, workshop, replace(data, noisy=noisy, planted=None), parameters)
    if not all(traits_of(FILTERS[part]).own_scale for part in parts_of(name)):
        scored = ranks_alone_if_builtin(scored, data)
    if data.planted is not None:
        scored = _planted_noted(scored, len(seen), name, parameters.get("on", name))
    if data.planted is None and len(seen) == len(rows):
        return scored
    return _given_to_copies(scored, data.noisy, firsts)


def _answer_by_answer(name: str, workshop: "Workshop", data: Data, parameters: dict[str, Any]) -> Scored:
    """A filter's scores; it sees each answer of a conversation by itself."""
    method, config = filter_named(name), workshop.config
    assert method is not None, "arguments_of has found it"
    answers = None if data.noisy.belongs is not None else single_answers(data.noisy, workshop.m0.chat)
    if answers is None:
        return method(workshop, data, config, **parameters)
    noisy, row_of = answers
    if not _row_by_row(name):  # it sees the rows that others see once more often
        workshop.run.keep_answers(np.bincount(row_of))
    return method(workshop, replace(data, noisy=noisy), config, **parameters).most_suspect(row_of)


def _row_by_row(name: str) -> bool:
    """Whether a filter, or one of those that it joins, gives rows that say the same scores of their own."""
    return any(traits_of(FILTERS[part]).row_by_row for part in parts_of(name))


def _planted_noted(scored: Scored, rows: int, name: str, witness: str) -> Scored:
    """Scores, with those of the planted rows, which stand after the first `rows`, noted by filter and by witness."""
    scores = {name: scored.suspicion, **scored.columns}
    return replace(scored, planted={by: scores[by][rows:] for by in (name, witness)})


def _given_to_copies(scored: Scored, noisy: Rows, firsts: np.ndarray) -> Scored:
    """The scores of each first row, given to all that say the same."""
    rows, numbers = noisy.examples, np.arange(len(firsts))
    same_tokens = np.ones(len(firsts), bool)
    for copy in np.flatnonzero(firsts != numbers).tolist():
        same_tokens[copy] = rows[copy].input_ids == rows[firsts[copy]].input_ids
    return scored.shared(np.searchsorted(np.flatnonzero(firsts == numbers), firsts), same_tokens)


def _made_of_filter(name: str, config: ForgetFilterConfig) -> list[Any]:
    """A filter's name, parameters and constants, and hashes of the files that its parameters name."""
    return [name, arguments_of(name, config), filter_constants(name), filter_files(parts_of(name), config)]
