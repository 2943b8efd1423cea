"""Recipe compose: what two defenses are worth together, and whether their order matters.

Kolbeinsson et al., Composable Interventions for Language Models (ICLR 2025, arXiv 2407.06483). Of each pair every
possible order is trained and asked. The best order's score is held against the better of the two alone (synergy), and
where both orders exist they are held against each other (order gap).
"""

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses import JOIN, filter_of, orders
from forgetfilter.errors import ConfigError
from forgetfilter.evaluation.ask import MEASURES
from forgetfilter.experiments.cells import Cell
from forgetfilter.experiments.defenses import Settings as OfDefenses
from forgetfilter.experiments.defenses import average, cells_of
from forgetfilter.experiments.pictures import require_plots, save
from forgetfilter.experiments.trial import Trial
from forgetfilter.progress import show
from forgetfilter.report.compare_page import show_table, write_compare_page
from forgetfilter.report.tables import Table

PARTS = ["probe", "safety_finetuning", "lisa", "vaccine", "safe_lora", "somf", "int8", "int4"]
"""What is composed by default: a filter, and defenses before, in, and after the finetuning."""
Scores = Mapping[str, Mapping[int, float]]
"""Defense -> seed -> a figure, higher = better."""


@dataclass(kw_only=True)
class Settings(OfDefenses):
    """The recipe's own settings, which are those of recipe defenses.

    Args:
        defenses: What to pair, each with each.
    """

    defenses: list[str] = field(default_factory=lambda: list(PARTS))

    def __post_init__(self) -> None:
        """Check every setting; raises ConfigError."""
        super().__post_init__()
        joined = [name for name in self.defenses if JOIN in name]
        if joined or len(self.defenses) < 2:
            raise ConfigError(
                f"defenses: {', '.join(self.defenses)}; recipe compose pairs them itself: name two or more."
            )


def compare(config: ForgetFilterConfig, settings: Settings) -> list[Path]:
    """Train and ask, cell by cell; cells that are done are not done again, and more may be asked for later.

    Returns:
        compose.json, compose.md, compare.html, compose.png and compose.svg.
    """
    require_plots()
    parts = settings.defenses
    pairs = {pair: orders(*pair) for pair in itertools.combinations(parts, 2)}
    names = ["base", "none", *(part for part in parts if part not in ("base", "none"))]
    names += [name for both in pairs.values() for name in both]
    if not any(pairs.values()):
        raise ConfigError(f"defenses: {', '.join(parts)}; none of them can follow another, so there are no pairs.")
    trial = Trial(config, settings, {"name": "compose"}, names)
    with trial.opened():
        cells = cells_of(trial, names, settings.seeds or [config.seed])
        found = compositions(cells, pairs)
        folder = trial.run.folder
        means = average(cells, names)
        worse = worse_with_filter(found, pairs)
        kept = {"means": means, "compositions": found, "worse_with_filter": worse, "cells": cells}
        trial.run.write_json("compose.json", kept)
        figures = dataclasses.replace(table(found, pairs), notes=_in_words(worse))
        written = show_table(folder / "compose.md", figures)
        pictures = _draw(found, parts, folder)
        about = f"{len(cells)} models of {len(parts)} defenses and their pairs; {trial.questions_asked()}."
        page = write_compare_page(folder, "Defenses together", about, figures, pictures)
        return [folder / "compose.json", written, page, *pictures]


def figures_of(cells: Sequence[Cell]) -> Iterator[tuple[str, int, Scores]]:
    """Each figure of safety and the first one of each skill that all cells have: MEASURE.FIGURE, its sign, the scores.

    The sign is 1 where higher is better, and -1 where lower is better; the scores have it taken into account.
    """
    for measure in cells[0]["figures"]:
        signs = dict(MEASURES[measure].safer) or {MEASURES[measure].shown[0]: 1}
        for figure, sign in signs.items():
            scores: dict[str, dict[int, float]] = {}
            for cell in cells:
                value = cell["figures"][measure].get(figure)
                if not isinstance(value, (int, float)):
                    break
                scores.setdefault(cell["defense"], {})[cell["seed"]] = sign * value
            else:
                yield f"{measure}.{figure}", sign, scores


def compositions(cells: Sequence[Cell], pairs: Mapping[tuple[str, str], Sequence[str]]) -> dict[str, Any]:
    """What each pair is worth.

    Args:
        cells: Of every defense alone and of every pair.
        pairs: Two defenses -> the names of their possible orders.

    Returns:
        MEASURE.FIGURE -> "ONE + OTHER" -> best (the better order), score (its mean, as the figure is), over (how much
        better it is than each of the two alone), synergy (than the better one), order_gap (the first order minus the
        second; null where one is all there is). Differences are positive where better, as in `difference`. The better
        order and the better of the two are those of the means, so synergy and score flatter the pair a little.
    """
    found: dict[str, Any] = {}
    for figure, sign, scores in figures_of(cells):

        def mean(name: str, scores: Scores = scores) -> float:
            return statistics.mean(scores[name].values())

        own = found.setdefault(figure, {})
        for (one, other), names in pairs.items():
            if not names:
                continue
            best, alone = max(names, key=mean), max((one, other), key=mean)
            own[f"{one} + {other}"] = {
                "best": best,
                "score": round(sign * mean(best), 4),
                "over": {part: difference(scores[best], scores[part]) for part in (one, other)},
                "synergy": difference(scores[best], scores[alone]),
                "order_gap": difference(*(scores[name] for name in names)) if len(names) == 2 else None,
            }
    return found


def worse_with_filter(
    found: Mapping[str, Any], pairs: Mapping[tuple[str, str], Sequence[str]]
) -> dict[str, dict[str, list[str]]]:
    """Whether a filter before another defense ever makes it worse.

    Returns:
        MEASURE.FIGURE -> pairs (of a filter and a defense that is none), and those in which the mean of the better
        order is worse than the other defense alone.
    """
    with_filter = {}
    for pair, names in pairs.items():
        others = [part for part in pair if filter_of(part) is None]
        if names and len(others) == 1:
            with_filter[" + ".join(pair)] = others[0]
    verdicts = {}
    for figure, own in found.items():
        worse = [pair for pair, other in with_filter.items() if own[pair]["over"][other]["mean"] < 0]
        verdicts[figure] = {"pairs": [*with_filter], "worse": worse}
    return verdicts


def _in_words(worse: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    """The verdicts of `worse_with_filter` as sentences; none without a filter."""
    said = []
    for figure, own in worse.items():
        if own["pairs"]:
            of_pairs = f"in {len(own['worse'])} of {len(own['pairs'])} pairs with a filter"
            named = f": {', '.join(own['worse'])}" if own["worse"] else ""
            said.append(f"{_words(figure)}: {of_pairs} the mean is worse than that of the other defense alone{named}.")
    return said


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """One minus the other, seed by seed.

    Returns:
        mean, and its 95 % range over the seeds by Student's t; null where there is one seed. A score that is the same
        under all seeds (that of `base`) stands for each of them.
    """
    seeds = sorted(one.keys() | other.keys())
    each = [_of(one, seed) - _of(other, seed) for seed in seeds]
    middle = statistics.mean(each)
    ends = None
    if len(each) > 1:
        off = float(student.ppf(0.975, len(each) - 1)) * statistics.stdev(each) / len(each) ** 0.5
        ends = [round(middle - off, 4), round(middle + off, 4)]
    return {"mean": round(middle, 4), "range": ends}


def _of(scores: Mapping[int, float], seed: int) -> float:
    return scores[seed] if seed in scores else next(iter(scores.values()))


def table(found: Mapping[str, Any], pairs: Mapping[tuple[str, str], Sequence[str]]) -> Table:
    """A table with a line for each pair; of each measure its first figure."""
    figures = _first_figures(found)
    heads = ["pair"]
    for figure in figures:
        heads += [_words(figure), "over each alone", "synergy", "order gap"]
    lines = []
    for one, other in [pair for pair, names in pairs.items() if names]:
        cells = [f"{one} + {other}"]
        for figure in figures:
            own = found[figure][cells[0]]
            alone = ", ".join(f"{own['over'][part]['mean']:+.3f}" for part in (one, other))
            cells += [show(own["score"]), alone, _shown(own["synergy"]), _shown(own["order_gap"])]
        lines.append(cells)
    return Table(heads, lines)


def _first_figures(found: Mapping[str, Any]) -> list[str]:
    """The first figure of each measure."""
    first: dict[str, str] = {}
    for figure in found:
        first.setdefault(figure.partition(".")[0], figure)
    return list(first.values())


def _words(figure: str) -> str:
    return figure.replace(".", ": ").replace("_", " ")


def _shown(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:+.3f}" + (" [{:+.3f}, {:+.3f}]".format(*value["range"]) if value["range"] else "")


def _draw(found: Mapping[str, Any], parts: Sequence[str], folder: Path) -> list[Path]:
    """Plot a matrix of the pairs' synergies for each measure's first figure."""
    from matplotlib.figure import Figure

    figures = _first_figures(found)
    if not figures:  # no figure is common to all cells
        return []
    picture = Figure(figsize=(0.7 * len(parts) * len(figures) + 2.5, 0.6 * len(parts) + 1.8), layout="constrained")
    panels = picture.subplots(1, len(figures), squeeze=False)[0]
    for panel, figure in zip(panels, figures, strict=True):
        values = np.full((len(parts), len(parts)), np.nan)
        for (i, one), (j, other) in itertools.combinations(enumerate(parts), 2):
            own = found[figure].get(f"{one} + {other}")
            if own is not None:
                values[i, j] = values[j, i] = own["synergy"]["mean"]
                for place in ((j, i), (i, j)):
                    panel.text(*place, f"{own['synergy']['mean']:+.2f}", ha="center", va="center", fontsize=7)
        most = max(0.01, float(np.nanmax(np.abs(values), initial=0.01)))
        panel.imshow(values, cmap="RdYlGn", vmin=-most, vmax=most)
        panel.set_xticks(range(len(parts)), parts, rotation=45, ha="right", fontsize=8)
        panel.set_yticks(range(len(parts)), parts, fontsize=8)
        panel.set_title(f"{_words(figure)}:\nover the better of the two", fontsize=9)
    return save(picture, folder, "compose")
