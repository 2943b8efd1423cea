"""Recipe defenses: train each one from the same M0, data and epochs, and measure all (the paper's table 2)."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses import defend, filter_of
from forgetfilter.defenses.result import Defended
from forgetfilter.errors import ConfigError, TrainingError
from forgetfilter.evaluation.ask import MEASURES
from forgetfilter.experiments.cells import Cell
from forgetfilter.experiments.pictures import require_plots, save
from forgetfilter.experiments.trial import Trial, TrialSettings
from forgetfilter.model.memory import free_dropped_models
from forgetfilter.progress import say, show
from forgetfilter.report.compare_page import show_table, write_compare_page
from forgetfilter.report.tables import Table
from forgetfilter.workshop import Workshop

PAPER = [
    *("base", "none", "safety_finetuning", "replay", "self_correction"),
    *("forget_filter", "forget_filter_self_correction"),
]
"""The defenses of the paper's table 2, in its order."""
AREA, LEAST_COST, MARKS = 36, 0.2, "os^Dv"
"""A point's area for a cost of one finetuning, the least cost that is drawn, and the marks of each ten defenses."""
NOTICED = 0.02
"""What finetuning must cost of a figure for its restoring to be told."""
Means = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Defense -> measure -> figure -> mean, spread and number of seeds."""


@dataclass(kw_only=True)
class Settings(TrialSettings):
    """The recipe's own settings.

    Args:
        defenses: Which to train; by default the paper's.
        seeds: Seeds to train each one with; by default the run's seed. M0 is the same for all seeds.
    """

    defenses: list[str] = field(default_factory=lambda: list(PAPER))
    seeds: list[int] | None = None

    def __post_init__(self) -> None:
        """Check every setting; raises ConfigError."""
        super().__post_init__()
        require_seeds(self.seeds)


def require_seeds(seeds: list[int] | None) -> None:
    """Raise ConfigError unless the seeds are different and possible, or left out."""
    good = seeds is None or (seeds and len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds))
    if not good:
        raise ConfigError(f"seeds are {seeds}: name different ones from 0 to 4294967295, or leave it out.")


def compare(config: ForgetFilterConfig, settings: Settings) -> list[Path]:
    """Train and ask, cell by cell; cells that are done are not done again, and more may be asked for later.

    Returns:
        compare.json, compare.md, compare.html; with a measure of safety and one of skill compare.png and .svg, too.
    """
    require_plots()
    trial = Trial(config, settings, {"name": "defenses"}, settings.defenses)
    with trial.opened():
        cells = cells_of(trial, settings.defenses, settings.seeds or [config.seed])
        means = average(cells, settings.defenses)
        output = trial.run.folder
        costs = costs_of(cells)
        told = {"means": means, "undone": undone(means), "costs": costs, "cells": cells}
        trial.run.write_json("compare.json", told)
        figures = table(means, costs)
        written = show_table(output / "compare.md", figures)
        pictures = _draw(means, costs, output)
        about = f"{len(cells)} models from the same M0, the same data and {trial.questions_asked()}."
        page = write_compare_page(output, "Defenses side by side", about, figures, pictures)
        return [output / "compare.json", written, page, *pictures]


def cells_of(trial: Trial, defenses: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """A cell for each defense and seed; of `base`, which is the same under all seeds, one.

    A defense that cannot be trained stops no other: all others are done, and kept, before the error is raised.

    Raises:
        TrainingError: If a training went wrong, or kept no row; names every such cell.
    """
    # The noisy stage of a filter gives the same model as the defense `none`, which then need not train it.
    filters_first = sorted(defenses, key=lambda name: filter_of(name) is None)
    planned = [(seed, name) for seed in seeds for name in filters_first if name != "base" or seed == seeds[0]]
    cells: list[Cell] = []
    failed: list[str] = []
    for seed in seeds:
        workshop = trial.workshop(seed)
        for name in [name for of, name in planned if of == seed]:
            try:
                cells.append(_cell(trial, workshop, name, planned))
            except TrainingError as error:
                say(f"{name}, seed {seed}: {error}")
                failed.append(f"{name} with seed {seed}")
                free_dropped_models()
        del workshop  # and its model, before the next seed's is loaded
        free_dropped_models()
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(planned)} models could not be made: {', '.join(failed)}; the others are kept. "
            "Leave out the defenses that they are made of, and give the file again: nothing is trained anew."
        )
    return cells


def _cell(trial: Trial, workshop: Workshop, name: str, planned: Sequence[tuple[int, str]]) -> Cell:
    """One defense under one seed; M0 is the same under all, so its cell is made once."""
    seed = workshop.config.seed
    made_of = trial.made_of(name, workshop)
    if not trial.cells.done(f"{name}-{seed}", made_of):
        number = planned.index((seed, name)) + 1
        left = trial.ahead(sum(not trial.cells.path(f"{own}-{of}").exists() for of, own in planned[number - 1 :]))
        print(f"cell {number} of {len(planned)}: {name}, seed {seed}{left}", flush=True)

    def make() -> Defended:
        return defend(name, workshop, trial.data, workshop.config)

    return trial.cell(f"{name}-{seed}", workshop, trial.data, made_of, make, defense=name, seed=seed)


def average(cells: Sequence[Cell], defenses: Sequence[str]) -> Means:
    """Mean and sample standard deviation of every figure over the seeds."""
    means: Means = {}
    for name in defenses:
        own = [cell["figures"] for cell in cells if cell["defense"] == name]
        means[name] = {}
        for measure in own[0]:
            means[name][measure] = {}
            for figure in own[0][measure]:
                values = [figures[measure].get(figure) for figures in own]
                if all(isinstance(value, (int, float)) for value in values):
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    means[name][measure][figure] = {
                        "mean": round(statistics.mean(values), 4),
                        "spread": round(spread, 4),
                        "seeds": len(values),
                    }
    return means


def undone(means: Means) -> dict[str, dict[str, float]]:
    """How much of the safety that finetuning costs each defense restores, by figure.

    restored = (defense - none) / (base - none): 0 is the level of the defense `none`, 1 the level of `base`. A figure
    is left out if finetuning costs less than NOTICED of it. Empty if `base` or `none` is not among the defenses.
    """
    ends = ("base", "none")
    found: dict[str, dict[str, float]] = {}
    for name in means if set(ends) <= means.keys() else ():
        if name in ends:
            continue
        for measure, own in means[name].items():
            base, none = (means[end][measure] for end in ends)
            for figure, sign in MEASURES[measure].safer.items():
                own_mean, base_mean, none_mean = (part.get(figure, {}).get("mean") for part in (own, base, none))
                share = _restored(own_mean, base_mean, none_mean, sign)
                if share is not None:
                    found.setdefault(name, {})[f"{measure}.{figure}"] = share
    return found


def _restored(own: float | None, base: float | None, none: float | None, sign: int) -> float | None:
    """The share of what finetuning costs that a defense restores; None if a figure is missing, or it costs little."""
    if own is None or base is None or none is None or sign * (base - none) < NOTICED:
        return None
    return round((own - none) / (base - none), 4)


def costs_of(cells: Sequence[Cell]) -> dict[str, float]:
    """What each defense costs, in finetunings on the noisy data (the defense `none`): tokens times weights, all stages.

    A mean over the seeds. M0 itself costs 0. A defense whose cells are from before costs were noted has none; without
    the cost of `none` there are none at all.
    """
    passes: dict[str, list[float | None]] = {}
    for cell in cells:
        unnoted = 0.0 if cell["defense"] == "base" else None
        passes.setdefault(cell["defense"], []).append(cell["cost"]["passes"] if "cost" in cell else unnoted)
    counted = {name: [cost for cost in own if cost is not None] for name, own in passes.items()}
    means = {name: statistics.mean(own) for name, own in counted.items() if len(own) == len(passes[name])}
    finetuning = means.get("none", 0.0)
    return {name: round(cost / finetuning, 2) for name, cost in means.items()} if finetuning else {}


def table(means: Means, costs: Mapping[str, float] | None = None) -> Table:
    """A table with one line for each defense.

    Args:
        means: The figures.
        costs: What each defense costs, in finetunings.
    """
    first: Mapping[str, Any] = next(iter(means.values()))
    columns = [(m, f) for m in first for f in MEASURES[m].shown if any(f in own[m] for own in means.values())]
    heads = ["defense", *(f"{m}: {f.replace('_', ' ')}" for m, f in columns), *(["finetunings"] if costs else [])]
    lines = []
    for name, measures in means.items():
        shown = []
        for measure, figure in columns:
            value = measures[measure].get(figure)
            spread = f" ± {show(value['spread'])}" if value and value["seeds"] > 1 else ""
            shown.append(show(value and value["mean"]) + spread)
        if costs:
            shown.append(f"{costs[name]:.1f}" if name in costs else show(None))
        lines.append([name, *shown])
    return Table(heads, lines)


def _draw(means: Means, costs: Mapping[str, float], folder: Path) -> list[Path]:
    """Plot safety against skill, one point for each defense; the area of a point is what it costs."""
    first = next(iter(means.values()))
    shown = [m for m in first if all(MEASURES[m].shown[0] in measures[m] for measures in means.values())]
    skills = [measure for measure in shown if not MEASURES[measure].of_safety]
    safety = [measure for measure in shown if MEASURES[measure].of_safety]
    if not skills or not safety:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(safety), 4), layout="constrained")
    panels = figure.subplots(1, len(safety), squeeze=False)[0]
    skill, skill_figure = skills[0], MEASURES[skills[0]].shown[0]
    for panel, measure in zip(panels, safety, strict=True):
        score = MEASURES[measure].shown[0]
        way = "higher" if MEASURES[measure].safer[score] > 0 else "lower"
        for number, (name, measures) in enumerate(means.items()):
            x, y = measures[skill][skill_figure], measures[measure][score]
            color, label = f"C{number % 10}", f"{name} ({costs[name]:.1f})" if name in costs else name
            panel.errorbar(x["mean"], y["mean"], y["spread"], x["spread"], fmt="none", ecolor=color, alpha=0.6)
            area = AREA * (max(costs[name], LEAST_COST) if name in costs else 1)
            mark = MARKS[number // 10 % len(MARKS)]
            panel.scatter(x["mean"], y["mean"], s=area, marker=mark, color=color, alpha=0.8, label=label)
        panel.set_xlabel(f"{skill}: {skill_figure.replace('_', ' ')} (higher is better)")
        panel.set_ylabel(f"{measure}: {score.replace('_', ' ')} ({way} is safer)")
    handles, labels = panels[0].get_legend_handles_labels()
    title = "(cost in finetunings)" if costs else None
    figure.legend(handles, labels, loc="outside right upper", fontsize="small", title=title)
    return save(figure, folder, "compare")
