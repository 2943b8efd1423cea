"""Recipe filters: score the same rows with several filters; what each finds, what it drops in vain, what it costs."""

import dataclasses
import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forgetfilter import processes
from forgetfilter.alignment import aligned
from forgetfilter.config import ForgetFilterConfig, refuse_marked, require_run_data
from forgetfilter.costs import Cost
from forgetfilter.data.by_hand import read_statements
from forgetfilter.data.loading import Data, load_data, read_labels
from forgetfilter.decision.choice import check_marks
from forgetfilter.decision.opened import decision_settings
from forgetfilter.defenses import constants_of, parameters_of
from forgetfilter.defenses import names as defenses_known
from forgetfilter.defenses import require_inputs as require_defense_inputs
from forgetfilter.defenses.keeping import decision_of
from forgetfilter.errors import ConfigError, DataError, ModelError
from forgetfilter.evaluation.ask import load_questions
from forgetfilter.evaluation.filter_quality import filter_quality, paired_ranges, ranking_quality, unscored_last
from forgetfilter.experiments import defenses, pictures
from forgetfilter.experiments.cells import Cell, Cells
from forgetfilter.files import at_home, digest
from forgetfilter.filters import require_filter, require_inputs
from forgetfilter.filters.scoring import part_with_scores, scores_key, scores_of
from forgetfilter.m0 import M0
from forgetfilter.methods import require_known
from forgetfilter.model.memory import free_dropped_models
from forgetfilter.model.training import require_trackers
from forgetfilter.progress import say, show
from forgetfilter.report.compare_page import show_table, write_compare_page
from forgetfilter.report.tables import Table
from forgetfilter.runs import Run, git_sha, locked
from forgetfilter.scored import Scored
from forgetfilter.workshop import Workshop

SHOWN = {
    "average_precision": "average precision",
    "auroc": "AUROC",
    "recall_at_1": "recall at 1 %",
    "recall_at_2": "recall at 2 %",
    "f1": "F1 by its rule",
    "best_f1": "best F1",
    "flag_all_f1": "F1 of dropping all",
    "clean_dropped": "clean dropped",
    "unscored": "unscored",
    "clean_data_dropped": "dropped of clean data",
    "seconds": "seconds",
    "of_finetuning": "of the finetuning",
    "gigabytes": "GB",
}
"""Figures for the table, and what they are called there."""


@dataclass(kw_only=True)
class Settings:
    """The recipe's own settings; all others are those of `filter`. label_column or marks say which rows are unsafe.

    Args:
        filters: Which to compare.
        seeds: Seeds to score with; by default the run's seed.
        marks: JSONL of rows that a person marked, such as a run's marks.jsonl, in place of label_column. The figures
            are then over the marked rows alone.
        on_clean_data: Also run each filter on the clean rows alone: what does it drop where nothing is to be found?
        defenses: Filters and other defenses whose finetuned models are compared, too, in OUT/defenses, beside M0 and
            finetuning on everything; needs evaluate.
        evaluate: Measure -> questions, as in the recipe `defenses`; likewise notions.
        notions: See there.
    """

    filters: list[str] = field(
        default_factory=lambda: [
            *("probe", "forgetting", "safe_only", "hidden_safe_noisy", "m0_loss"),
            *("self_judge", "gradient_norm", "words", "length", "random"),
        ]
    )
    seeds: list[int] | None = None
    marks: str | None = None
    on_clean_data: bool = False
    defenses: list[str] = field(default_factory=list)
    evaluate: dict[str, str] = field(default_factory=dict)
    notions: list[str] | None = None

    def __post_init__(self) -> None:
        """Check every setting; raises ConfigError."""
        if not self.filters or len(set(self.filters)) < len(self.filters):
            raise ConfigError(f"filters: {', '.join(self.filters) or 'none named'}; name each once.")
        defenses.require_seeds(self.seeds)


@dataclass(frozen=True)
class Truth:
    """Which rows are unsafe, as far as it is known.

    Attributes:
        rows: (known,) numbers of the rows of which it is known.
        unsafe: (known,) bool.
    """

    rows: np.ndarray
    unsafe: np.ndarray

    @classmethod
    def of(cls, data: Data, config: ForgetFilterConfig, marks: str | None) -> "Truth":
        """By the label column, or by a person's marks.

        Raises:
            ConfigError: If neither is named, or both are.
            DataError: If the file of marks, or the column, cannot be read, or nothing is marked.
        """
        if (config.label_column is None) == (marks is None):
            raise ConfigError("recipe filters needs either label_column or marks, to compare the filters with.")
        source = data.noisy.source
        if marks is None:
            unsafe = np.array(read_labels(source, str(config.label_column)))
            return cls(np.arange(len(unsafe)), unsafe)
        drawn, others = read_statements(source, Path(at_home(marks)))
        said = {row: what for row, what in sorted({**others, **drawn}.items()) if what != "skipped"}
        if not said:
            raise DataError(f"{marks}: no row is marked clean or unsafe.")
        return cls(np.array(list(said), int), np.array([what == "unsafe" for what in said.values()], bool))

    def clean(self) -> list[int]:
        """Numbers of the rows known to be clean."""
        return [int(row) for row in self.rows[~self.unsafe]]


def compare(config: ForgetFilterConfig, settings: Settings) -> list[Path]:
    """Score and decide, filter by filter; what is done is not done again.

    Returns:
        compare.json, compare.md, the picture and compare.html; then those of the models, if any are compared.
    """
    require_run_data(config)
    refuse_marked(config)
    config = dataclasses.replace(config, filter=",".join(settings.filters))
    for name in config.filters:
        require_filter(name, config)
    require_known(config.parameters, defenses_known())
    processes.require_one("recipe filters")
    require_trackers(config)
    models = _models(config, settings)
    m0 = M0.named(config)
    data = load_data(config, m0.chat)
    workshop = Workshop(m0, config)
    not_run = _without_model(workshop, data)
    if models:
        models[1].defenses = [name for name in models[1].defenses if _can_run(name, workshop, data, not_run)]
    truth = Truth.of(data, config, settings.marks)
    if settings.on_clean_data and not truth.clean():
        raise DataError("on_clean_data: no row is known to be clean.")
    check_marks(data.noisy, config)
    known = {**data.facts(), "recipe": {"name": "filters"}}
    m0 = aligned(m0, config, known)
    seeds = settings.seeds or [config.seed]
    with locked(config.folder):
        run = Run.start(config, {**m0.facts(config), **known})
        found: dict[str, list[Cell]] = {name: [] for name in settings.filters if name not in not_run}
        for seed in seeds:
            workshop = Workshop(m0, dataclasses.replace(config, seed=seed), run)
            workshop.become(None)  # loaded now, so that its time counts for no filter
            for name in found:
                found[name].append(_cell(workshop, data, truth, name, on_clean_data=settings.on_clean_data))
            del workshop  # and its model, before the next seed's is loaded
            free_dropped_models()
        shown = _show(run, found, not_run, truth, seeds)
    return [*shown, *(defenses.compare(*models) if models else [])]


def _without_model(workshop: Workshop, data: Data) -> dict[str, str]:
    """The filters whose own model, such as a guard's, is not to be had, with the reason: the others are compared.

    Raises:
        ModelError: If that is so for all of them.
        ForgetFilterError: As require_inputs does for want of another input.
    """
    found = {}
    for name in workshop.config.filters:
        try:
            require_inputs(name, workshop, data)
        except ModelError as error:
            found[name] = str(error)
            say(f"{name} is not run: {error}")
            if len(found) == len(workshop.config.filters):
                raise
    return found


def _can_run(name: str, workshop: Workshop, data: Data, not_run: dict[str, str]) -> bool:
    """Whether a defense can be run: False if its filter, or one of them, has no model.

    Raises:
        ForgetFilterError: As require_inputs does for want of another input.
    """
    try:
        require_defense_inputs(name, workshop, data)
    except ModelError as error:
        if str(error) not in not_run.values():
            raise
        say(f"{name} is not run: {error}")
        return False
    return True


def _models(config: ForgetFilterConfig, settings: Settings) -> tuple[ForgetFilterConfig, defenses.Settings] | None:
    """What the recipe `defenses` is asked for, if anything; what is wrong with it is found before any work.

    Raises:
        ConfigError: If a defense, a parameter or a measure is unknown, or something is asked of no model.
    """
    if not settings.defenses:
        if settings.evaluate or settings.notions:
            raise ConfigError("recipe filters asks `evaluate` and `notions` of models: name them, `defenses: [...]`.")
        return None
    pictures.require_plots()
    load_questions(settings.evaluate, None, config.seed)
    own = defenses.Settings(
        defenses=["base", "none", *settings.defenses],
        evaluate=settings.evaluate,
        notions=settings.notions,
        seeds=settings.seeds,
    )
    for name in own.defenses:
        parameters_of(name, config)
    return dataclasses.replace(config, output_dir=str(config.folder / "defenses")), own


def _cell(workshop: Workshop, data: Data, truth: Truth, name: str, *, on_clean_data: bool) -> Cell:
    """One filter under one seed: every row's score and decision, and the figures."""
    config, run = workshop.config, workshop.run
    made_of = {
        "filter": name,
        "scores": scores_key(workshop, data, name),
        "constants": constants_of(name, config),
        "decision": decision_settings(config),
        "final": config.final_settings(),
        "truth": digest([truth.rows.tolist(), truth.unsafe.tolist()]),
        "on_clean_data": on_clean_data,
    }
    if config.trusted_rows is not None:
        made_of["rows decided by hand"] = "left out"

    def make() -> Cell:
        part = part_with_scores(workshop, data, name)
        cost = Cost.noted(run.manifest["stages"][part])
        scored = Scored.load(run.table_file(part))
        made = decision_of(name, scored, data.noisy, workshop, config)
        suspicion, by_filter = unscored_last(scored.suspicion)[truth.rows], ~made.by_hand[truth.rows]
        decided = filter_quality(truth.unsafe[by_filter], made.dropped[truth.rows][by_filter], suspicion[by_filter])
        ranked = filter_quality(truth.unsafe, made.dropped[truth.rows], suspicion)
        figures: dict[str, Any] = {**ranking_quality(truth.unsafe, suspicion), **decided}
        figures |= {name: ranked[name] for name in ("auroc", "average_precision")}
        figures["unscored"] = int(np.isnan(scored.suspicion).sum())
        figures["seconds"] = round(cost.seconds, 1)
        figures["of_finetuning"] = cost.passes / workshop.finetuning_passes(data.noisy.trainable())
        figures["gigabytes"] = cost.memory / 2**30
        if on_clean_data and config.trusted_rows is None:  # those name rows of the whole
            figures["clean_data_dropped"] = _dropped_of(workshop, data, truth.clean(), name)
        return {
            "filter": name,
            "seed": config.seed,
            "git_sha": git_sha(),
            "figures": figures,
            "says": made.threshold.says,
            "suspicion": [None if np.isnan(value) else float(f"{value:.9g}") for value in scored.suspicion],
            "decision": made.words,
        }

    return Cells(run.folder / "cells").once(f"{name}-{config.seed}", made_of, make)


def _dropped_of(workshop: Workshop, data: Data, rows: list[int], name: str) -> float:
    """Share of some rows that the filter drops where they are all of the noisy data."""
    alone = dataclasses.replace(data, noisy=data.noisy.select(rows))
    scored = scores_of(workshop, alone, name)
    return float(decision_of(name, scored, alone.noisy, workshop, workshop.config).dropped.mean())


def _show(
    run: Run, found: dict[str, list[Cell]], not_run: Mapping[str, str], truth: Truth, seeds: Sequence[int]
) -> list[Path]:
    """Write the table, the picture and the page."""
    scores = {name: [unscored_last(_suspicion(cell))[truth.rows] for cell in cells] for name, cells in found.items()}
    ranges = paired_ranges(truth.unsafe, scores)
    run.write_json("compare.json", {"cells": found, "ranges": ranges, "not_run": dict(not_run)})
    figures = dataclasses.replace(table(found, ranges), notes=_not_run_in_words(not_run))
    written = show_table(run.folder / "compare.md", figures)
    drawn = []
    if importlib.util.find_spec("matplotlib"):
        drawn = picture(found, run.folder)
    about = (
        f"{len(found)} filters on the same {len(truth.rows)} rows, {truth.unsafe.sum()} of them unsafe; "
        f"{len(seeds)} seeds each."
    )
    page = write_compare_page(run.folder, "Filters side by side", about, figures, drawn)
    return [run.folder / "compare.json", written, *drawn, page]


def _not_run_in_words(not_run: Mapping[str, str]) -> list[str]:
    """A sentence for each filter that was not run."""
    again = "The same command runs it once it is there, and keeps what is done."
    return [f"{name}: not run. {why.rstrip('.')}. {again}" for name, why in not_run.items()]


def _suspicion(cell: Cell) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in cell["suspicion"]], float)


def table(found: dict[str, list[Cell]], ranges: dict[str, dict[str, list[float]]]) -> Table:
    """A table with a line for each filter, best average precision first.

    Figures are means over the seeds, ± their sample standard deviation. In brackets: the 95 % range of the average
    precision; an arrow says that it is surely above or below that of the filter named first.
    """
    known = [name for name in SHOWN if any(name in cells[0]["figures"] for cells in found.values())]
    lines = []
    for name in sorted(found, key=lambda name: -(_mean(found[name], "average_precision") or 0)):
        shown = [_with_spread(found[name], figure) for figure in known]
        if name in ranges:
            low, high = ranges[name]["average_precision"]
            shown[0] += f" ({low:.3f} to {high:.3f}){_lead(ranges[name]['lead'])}"
        lines.append([name, *shown])
    heads = [SHOWN[name] for name in known]
    if ranges:
        heads[0] += f" (↑ above, ↓ below {next(iter(found))})"
    return Table(["filter", *heads], lines)


def _lead(lead: Sequence[float]) -> str:
    """An arrow if a range of differences lies on one side of 0."""
    if lead[0] > 0:
        return " ↑"
    return " ↓" if lead[1] < 0 else ""


def picture(found: dict[str, list[Cell]], folder: Path) -> list[Path]:
    """Average precision over cost, a point a filter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, cells in found.items():
        cost, precision = _mean(cells, "of_finetuning"), _mean(cells, "average_precision")
        if cost is None or precision is None:
            continue
        axes.plot(cost, precision, "o", color="C0")
        axes.annotate(name, (cost, precision), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1)
    axes.set_xlabel("cost, in finetunings on the same rows")
    axes.set_ylabel("average precision")
    return pictures.save(figure, folder, "filters")


def _numbers(cells: Sequence[Cell], figure: str) -> list[float]:
    values = [cell["figures"].get(figure) for cell in cells]
    return [float(value) for value in values if value is not None]


def _mean(cells: Sequence[Cell], figure: str) -> float | None:
    numbers = _numbers(cells, figure)
    return statistics.mean(numbers) if len(numbers) == len(cells) else None


def _with_spread(cells: Sequence[Cell], figure: str) -> str:
    numbers = _numbers(cells, figure)
    spread = f" ± {show(statistics.stdev(numbers))}" if len(numbers) == len(cells) > 1 else ""
    return show(_mean(cells, figure)) + spread
