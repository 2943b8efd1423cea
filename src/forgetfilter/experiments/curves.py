"""Recipe curves: what the noisy stage learns, and what each of several reviews makes the model forget, by group.

The paper's study of learning and forgetting (its section 3). A curve is the mean log-likelihood of a group of rows over
the steps of a stage: the noisy stage, then reviews that all start from the same noisy model. A review may have safe
rows, safe rows of another kind (domain shift) or unsafe rows. Rows that are never trained on can be shown, too.

To look at the rows means to compute the log-likelihood of each one at some step of a stage.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter import processes
from forgetfilter.alignment import aligned
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.columns import encodable
from forgetfilter.data.lazy import joined
from forgetfilter.data.loading import Rows, load_rows, require_column
from forgetfilter.data.tokenization import Example
from forgetfilter.errors import ConfigError
from forgetfilter.experiments.pictures import require_plots, save
from forgetfilter.filters.forgetting import review_settings
from forgetfilter.hooks import Hooks
from forgetfilter.m0 import M0
from forgetfilter.model.reading import read
from forgetfilter.model.training import require_trackers
from forgetfilter.report.compare_page import write_compare_page
from forgetfilter.runs import Run, locked
from forgetfilter.workshop import Workshop

LOOKS = "looks.parquet"
"""File with every look at the rows during a stage, beside the stage's model."""
UNTRAINED = "never trained on: "
"""What the names of groups begin with whose rows are never trained on."""


@dataclass(kw_only=True)
class Settings:
    """The recipe's own settings; all others are those of `filter`.

    Args:
        reviews: Data sets to review, by a name for each.
        group_column: Column of the noisy rows that names each one's group.
        untrained_dataset_name: Rows with the same column that are looked at and never trained on.
        looks: Number of looks at all rows in each stage: at its end, at half of its steps, at a quarter and so on. One
            more look comes before the stage.
    """

    reviews: dict[str, str]
    group_column: str = "group"
    untrained_dataset_name: str | None = None
    looks: int = 5

    def __post_init__(self) -> None:
        """Check every setting; raises ConfigError."""
        plain = all(name.replace("_", "").replace("-", "").isalnum() for name in self.reviews)
        if not self.reviews or not plain or "noisy" in self.reviews:
            raise ConfigError("reviews: one or more, each with a name of letters, digits, - and _ that is not `noisy`.")
        if self.looks < 1:
            raise ConfigError(f"looks is {self.looks}: it must be 1 or more.")


def compare(config: ForgetFilterConfig, settings: Settings) -> list[Path]:
    """Train and look, stage by stage; stages that have been looked at are not trained again.

    Returns:
        curves.json, compare.html, curves.png and curves.svg in output_dir.
    """
    require_plots()
    processes.require_one("recipe curves")
    if config.output_dir is None:
        raise ConfigError("recipe curves needs output_dir.")
    require_trackers(config)
    m0 = M0.named(config)
    noisy = load_rows(config.dataset_name, "dataset_name", m0.chat, config)
    looked = [noisy]
    if settings.untrained_dataset_name is not None:
        looked.append(load_rows(settings.untrained_dataset_name, "untrained_dataset_name", m0.chat, config))
    groups = _groups(looked, settings.group_column)
    reviews = {name: load_rows(path, f"reviews.{name}", m0.chat, config) for name, path in settings.reviews.items()}
    output = Path(config.output_dir)
    known = {
        "recipe": {"name": "curves", **dataclasses.asdict(settings)},
        "looked": [rows.facts() for rows in looked],
        "reviews": {name: rows.facts() for name, rows in reviews.items()},
    }
    m0 = aligned(m0, config, known)
    with locked(output):
        facts = {**m0.facts(config), **known}
        workshop = Workshop(m0, config, Run.start(config, facts))
        looks = _train(workshop, looked, reviews, groups, settings.looks)
        found = {stage: _by_group(_read_looks(folder), groups) for stage, folder in looks.items()}
        workshop.run.write_json("curves.json", found)
    pictures = _draw(found, output)
    about = f"Mean log-likelihood of {len(groups)} rows by group, over the steps of each stage."
    page = write_compare_page(output, "Learning and forgetting", about, None, pictures)
    return [output / "curves.json", page, *pictures]


def _groups(looked: Sequence[Rows], column: str) -> list[str]:
    """Each row's group, of all data sets that are looked at."""
    groups = []
    for prefix, rows in zip(("", UNTRAINED), looked, strict=False):
        require_column(rows.source, column, "group_column")
        groups += [prefix + str(record.get(column)) for record in rows.source.rows()]
    return groups


def _train(
    workshop: Workshop, looked: Sequence[Rows], reviews: Mapping[str, Rows], groups: Sequence[str], count: int
) -> dict[str, Path]:
    """The noisy stage, then each review from where it ended; returns the folder of each one's model and looks."""
    noisy, examples = looked[0].trainable(), reduce(joined, (rows.examples for rows in looked))
    lengths = {"noisy": workshop.config.noisy_stage(len(noisy))}
    for name, rows in reviews.items():
        lengths[name] = review_settings(workshop.config, len(noisy), len(rows.trainable()))

    def stage(name: str, rows: Sequence[Example], start: Path | None) -> Path:
        looks = _Looks(workshop, examples, groups, name, lengths[name].max_steps, count)
        hooks = Hooks(before=looks.first, each_step=looks.after)
        return workshop.train(name, rows, lengths[name], start, hooks, beside=looks.write)

    folders = {"noisy": stage("noisy", noisy, None)}
    for name, rows in reviews.items():
        folders[name] = stage(name, rows.trainable(), folders["noisy"])
    return folders


class _Looks:
    """Looks at all rows during a stage: before it, at its end, at half of its steps, at a quarter and so on."""

    def __init__(
        self, workshop: Workshop, examples: Sequence[Example], groups: Sequence[str], name: str, steps: int, count: int
    ) -> None:
        self.workshop, self.examples, self.groups, self.name = workshop, examples, groups, name
        self.steps = {steps >> i for i in range(count)} - {0}
        self.seen: dict[int, list[float | None]] = {}

    def first(self) -> None:
        """Look before the first step."""
        self._look(0)

    def after(self, step: int) -> None:
        """Look after a step, if it is one to look at."""
        if step in self.steps:
            self._look(step)

    def _look(self, step: int) -> None:
        readings = read(self.workshop.learner, self.examples, f"{self.name}, step {step}")
        self.seen[step] = [None if reading is None else reading.log_likelihood for reading in readings]

    def write(self, folder: Path) -> None:
        """Write every look at every row."""
        columns = {
            "step": [step for step in self.seen for _ in self.examples],
            "row": [row for _ in self.seen for row in range(len(self.examples))],
            "group": [encodable(group) for group in self.groups] * len(self.seen),
            "log_likelihood": [value for values in self.seen.values() for value in values],
        }
        pq.write_table(pa.table(columns), folder / LOOKS)


def _read_looks(folder: Path) -> dict[int, np.ndarray]:
    """Mean log-likelihood of each row, (rows,) with NaN where there is none, by step."""
    table = pq.read_table(folder / LOOKS)
    steps, values = table["step"].to_numpy(), table["log_likelihood"].to_numpy().astype(float)
    return {int(step): values[steps == step] for step in np.unique(steps)}


def _by_group(looks: Mapping[int, np.ndarray], groups: Sequence[str]) -> dict[str, Any]:
    """Mean and standard error of each group at each step."""
    found: dict[str, Any] = {"steps": list(looks), "groups": {}}
    of = np.array(groups)
    for group in sorted(set(groups)):
        values = np.array([look[of == group] for look in looks.values()])
        values = values[:, ~np.isnan(values).any(0)]
        if values.shape[1]:
            spread = values.std(1) / max(1, values.shape[1] - 1) ** 0.5
            found["groups"][group] = {
                "rows": values.shape[1],
                "log_likelihood": values.mean(1).round(4).tolist(),
                "standard_error": spread.round(4).tolist(),
            }
    return found


def _plain(name: str) -> str:
    """A name from data or settings, which matplotlib must not take for a formula."""
    return name.replace("$", r"\$")


def _draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """One panel for each stage, one line for each group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(found) + 1.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (stage, curves) in zip(panels, found.items(), strict=True):
        for number, (group, values) in enumerate(curves["groups"].items()):
            mean, spread = np.array(values["log_likelihood"]), np.array(values["standard_error"])
            dash = "--" if group.startswith(UNTRAINED) else "-"
            panel.plot(curves["steps"], mean, dash, color=f"C{number}", marker=".", label=_plain(group))
            panel.fill_between(curves["steps"], mean - spread, mean + spread, color=f"C{number}", alpha=0.15)
        panel.set_title("noisy stage" if stage == "noisy" else f"review: {_plain(stage)}")
        panel.set_xlabel("optimiser steps")
    panels[0].set_ylabel("mean log-likelihood (nats a token)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return save(figure, folder, "curves")
