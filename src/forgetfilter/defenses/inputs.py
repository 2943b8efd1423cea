"""What every defense is given, what it gives back, and the stages that several of them share."""

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from forgetfilter.config import ForgetFilterConfig, StageSettings
from forgetfilter.data.loading import Rows
from forgetfilter.data.tokenization import ChatTokenizer, Example, mean_length
from forgetfilter.files import whole_folder
from forgetfilter.models import Learner
from forgetfilter.runs import Run
from forgetfilter.training import train


@dataclass
class Inputs:
    """What a defense is given.

    Attributes:
        run: The folder stages are trained and kept in.
        learner: M0 in memory, with its adapter.
        chat: Its tokenizer, for rows a defense makes.
        noisy: The noisy data.
        safe: The safe data.
        notions: What it is safe about: bias, toxicity, harmfulness.
        start: The adapter that finetuning starts from; None for M0 itself.
    """

    run: Run
    learner: Learner
    chat: ChatTokenizer
    noisy: Rows
    safe: Rows
    notions: Sequence[str]
    start: Path | None = None

    def budget(self, config: ForgetFilterConfig, examples: Sequence[Example]) -> StageSettings:
        """The final training of a defense: as many epochs as any, and no more steps than the noisy data gives.

        So few rows are not seen more often than `none` sees them, and many get no more training than it.
        """
        most = len(self.noisy.trainable())
        rows = min(len(examples), most)
        return config.stage("final", rows, share=rows / most)

    def review(self, config: ForgetFilterConfig) -> StageSettings:
        """A training on the safe data after that on the noisy data: as many epochs."""
        rows = len(self.safe.trainable())
        return config.stage("final", rows, share=rows / len(self.noisy.trainable()))

    def train(
        self,
        name: str,
        examples: Sequence[Example],
        settings: StageSettings,
        start: Path | None,
        *,
        in_order: bool = False,
        each_step: Callable[[int], object] | None = None,
        penalty: Callable[[], Tensor | None] | None = None,
    ) -> Path:
        """Train an adapter, unless the same was trained before: same name, start, rows, settings and seed.

        Args:
            name: What the stage is called; stages of one name are trained in the same way.
            examples: What to learn.
            settings: Rates and lengths.
            start: The adapter to start from; None for M0.
            in_order: See training.train; so for each_step and penalty. A stage with one of these two, which
                remember what no checkpoint holds, starts anew after an interruption.
            each_step: Called after each step.
            penalty: Added to the loss.

        Returns:
            The adapter's folder.
        """
        stage = self.stage(name, examples, settings, start)
        folder = self.run.stage(stage)
        if not self.run.done(stage):
            checkpoints = folder / "checkpoints"
            if each_step is not None or penalty is not None:
                shutil.rmtree(checkpoints, ignore_errors=True)
            self.learner.prepare(settings.rows() * mean_length(examples))
            self.learner.restore(start)
            facts = train(
                self.learner, examples, settings, checkpoints, name, each_step, in_order=in_order, penalty=penalty
            )
            self._keep(stage, self.learner.save, **facts)
            self.learner.stage = folder / "model"
            shutil.rmtree(checkpoints, ignore_errors=True)
        return folder / "model"

    def adopt(
        self, name: str, examples: Sequence[Example], settings: StageSettings, start: Path | None, model: Path
    ) -> None:
        """Take an adapter that was trained elsewhere as this stage's."""
        stage = self.stage(name, examples, settings, start)
        if not self.run.done(stage):
            self._keep(stage, lambda folder: shutil.copytree(model, folder, dirs_exist_ok=True))

    def _keep(self, stage: str, fill: Callable[[Path], object], **facts: Any) -> None:
        """Fill a stage's folder with its adapter, and note it as done."""
        folder = self.run.stage(stage) / "model"
        with whole_folder(folder) as temporary:
            fill(temporary)
        self.run.mark(stage, sorted(folder.iterdir()), **facts)

    def stage(self, name: str, examples: Sequence[Example], settings: StageSettings, start: Path | None) -> str:
        """Name of a stage, by rows, settings, start and seed; what else it does its name must tell."""
        parts = [
            [(example.input_ids, example.labels) for example in examples],
            dataclasses.asdict(settings),
            None if start is None else str(start.relative_to(self.run.folder)),
            self.learner.config.seed,
        ]
        return f"{name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


@dataclass
class Result:
    """What a defense gives back.

    Attributes:
        model: The adapter of the model it ends with; None for M0.
        sentence: What precedes every prompt of a measure of safety.
        reasoning: What the model was taught to begin answers about bias with.
        facts: What else there is to say: rows dropped, figures of a filter.
    """

    model: Path | None
    sentence: str = ""
    reasoning: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """So many of the examples at random; all of them as often as they go in, then some once more."""
    whole, rest = divmod(count, len(examples))
    return [*(list(examples) * whole), *random.Random(seed).sample(list(examples), rest)]
