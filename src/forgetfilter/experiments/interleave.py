"""Recipe interleave: train one model on noisy, safe, noisy, safe ... data (the paper's long-term study).

The rows are dealt to sessions: with 3 sessions, rows 0, 3, 6 ... go to the first one. In each session a defense trains
on the noisy rows; then the model is finetuned on the safe rows, in the same way for all defenses. After each of these
trainings the model is asked all questions.
"""

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data, Rows
from forgetfilter.defenses import changes_m0, defend, require_pairs
from forgetfilter.defenses.result import Defended, safe_budget
from forgetfilter.errors import ConfigError
from forgetfilter.evaluation.ask import MEASURES
from forgetfilter.experiments.cells import Cell
from forgetfilter.experiments.pictures import require_plots, save
from forgetfilter.experiments.trial import Trial, TrialSettings
from forgetfilter.report.compare_page import write_compare_page
from forgetfilter.workshop import Workshop


@dataclass(kw_only=True)
class Settings(TrialSettings):
    """The recipe's own settings.

    Args:
        defenses: How to train on a session's noisy rows; base skips them.
        sessions: Pairs of a noisy and a safe training.
    """

    defenses: list[str] = field(default_factory=lambda: ["none", "self_correction", "forget_filter"])
    sessions: int = 3

    def __post_init__(self) -> None:
        """Check every setting; raises ConfigError."""
        super().__post_init__()
        if self.sessions < 1:
            raise ConfigError(f"sessions is {self.sessions}: it must be 1 or more.")


def compare(config: ForgetFilterConfig, settings: Settings) -> list[Path]:
    """Train and ask, session by session; what is done is not done again.

    Returns:
        interleave.json, compare.html, interleave.png and interleave.svg.
    """
    require_plots()
    if config.trusted_rows is not None:
        raise ConfigError("recipe interleave takes no trusted_rows, since it deals the rows to sessions.")
    for name in settings.defenses:
        if changes_m0(name):
            raise ConfigError(f"recipe interleave takes no {name}: it changes M0, and all sessions share one.")
    trial = Trial(config, settings, {"name": "interleave", "sessions": settings.sessions}, settings.defenses)
    for rows in (trial.data.noisy, trial.data.safe):
        sessions = range(settings.sessions)
        if not all(part(rows, session, settings.sessions).trainable() for session in sessions):
            raise ConfigError(
                f"sessions is {settings.sessions}: {rows.source.name} has no rows to learn for one of them. Give fewer."
            )
    for session, name in itertools.product(range(settings.sessions), settings.defenses):
        require_pairs(name, _data_of(trial.data, session, settings.sessions))
    with trial.opened():
        workshop = trial.workshop(config.seed)
        made_of = trial.made_of("base", workshop)
        start = trial.cell("start", workshop, trial.data, made_of, lambda: Defended(None), session=0, after="M0")
        found = {name: [start, *_sessions(trial, name, workshop, settings)] for name in settings.defenses}
        trial.run.write_json("interleave.json", found)
        pictures = _draw(found, trial.run.folder)
        about = f"{settings.sessions} pairs of a noisy and a safe training; {trial.questions_asked()} after each."
        page = write_compare_page(trial.run.folder, "Interleaved sessions", about, None, pictures)
        return [trial.run.folder / "interleave.json", page, *pictures]


def _key(name: str, session: int, after: str) -> str:
    return f"{name}-{session + 1}-{after}"


def _sessions(trial: Trial, name: str, workshop: Workshop, settings: Settings) -> list[Cell]:
    """One defense through all sessions; each session starts from the model that the previous one ended with."""
    cells, count, config = [], settings.sessions, workshop.config
    planned = [_key(*of) for of in itertools.product(settings.defenses, range(count), ("noisy", "safe"))]
    workshop.start = None
    for session in range(count):
        data = _data_of(trial.data, session, count)
        after_noisy = defend(name, workshop, data, config)
        model = workshop.train("safe", data.safe.trainable(), safe_budget(data, config), after_noisy.model)
        after_safe = dataclasses.replace(after_noisy, model=model, kept=None)
        for after, result in (("noisy", after_noisy), ("safe", after_safe)):
            key = _key(name, session, after)
            left = sum(not trial.cells.path(other).exists() for other in planned)
            print(f"{key}, of {count} sessions{trial.ahead(left)}", flush=True)
            cells.append(_asked(trial, workshop, data, key, result, name, session, after))
        workshop.start = model
    return cells


def _asked(
    trial: Trial, workshop: Workshop, data: Data, key: str, result: Defended, name: str, session: int, after: str
) -> Cell:
    """The questions put to a session's model."""
    about = {"session": session + 1, "after": after}
    made_of = trial.made_of(name, workshop, **about)
    return trial.cell(key, workshop, data, made_of, lambda: result, defense=name, **about)


def _data_of(data: Data, session: int, count: int) -> Data:
    """The data of one session."""
    return dataclasses.replace(data, noisy=part(data.noisy, session, count), safe=part(data.safe, session, count))


def part(rows: Rows, session: int, count: int) -> Rows:
    """The rows of one session: every count-th row, beginning with row number `session`."""
    return rows.select(list(range(session, len(rows.examples), count)))


def _draw(found: dict[str, list[Cell]], folder: Path) -> list[Path]:
    """One panel for each measure, one line for each defense; sessions from left to right, safe trainings shaded."""
    from matplotlib.figure import Figure

    measures = list(next(iter(found.values()))[0]["figures"])
    figure = Figure(figsize=(4.2 * len(measures) + 1.6, 3.8), layout="constrained")
    panels: Any = figure.subplots(1, len(measures), squeeze=False)[0]
    for panel, measure in zip(panels, measures, strict=True):
        shown = MEASURES[measure].shown[0]
        for name, cells in found.items():
            panel.plot([cell["figures"][measure][shown] for cell in cells], "o-", label=name)
        labels = ["M0" if cell["after"] == "M0" else f"{cell['after']} {cell['session']}" for cell in cells]
        panel.set_xticks(range(len(labels)), labels, rotation=45)
        for place, label in enumerate(labels):
            if label.startswith("safe"):
                panel.axvspan(place - 0.5, place + 0.5, color="0.93", zorder=0)
        panel.set_title(f"{measure}: {shown.replace('_', ' ')}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return save(figure, folder, "interleave")
