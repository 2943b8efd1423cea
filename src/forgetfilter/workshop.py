"""M0 in memory and a run's folder: all training, reading and keeping of models, each thing done once."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter import processes
from forgetfilter.config import ForgetFilterConfig, StageSettings
from forgetfilter.costs import TRAINING, Account, Cost
from forgetfilter.data.loading import Data
from forgetfilter.data.templates import MADE_UP
from forgetfilter.data.tokenization import Example, mean_length
from forgetfilter.files import digest
from forgetfilter.hooks import Hooks
from forgetfilter.judge import Judge
from forgetfilter.m0 import M0
from forgetfilter.model import folders
from forgetfilter.model.generation import complete
from forgetfilter.model.gradients import gradients
from forgetfilter.model.learner import Learner, load_learner
from forgetfilter.model.memory import free_dropped_models
from forgetfilter.model.reading import read
from forgetfilter.model.states import hidden_states, stored_states
from forgetfilter.model.training import seconds_a_row, train
from forgetfilter.progress import say, silent
from forgetfilter.runs import Run
from forgetfilter.shelf import Shelf


@dataclass
class Readings:
    """A model's log-probabilities of each row's trained tokens, each given the true tokens before it.

    Attributes:
        token_log_probs: A list array: for each row the log-probabilities of its trained tokens, in nats; null = none.
        log_likelihood: (rows,) their means, at most 0; NaN = the row cannot be scored.
    """

    token_log_probs: pa.ListArray
    log_likelihood: np.ndarray


def _tokens(examples: Sequence[Example]) -> int:
    """Tokens of the rows that can be scored."""
    return sum(len(example.input_ids) for example in examples if example.scorable)


class Workshop:
    """Trains, reads and keeps models, each thing once.

    Models and readings are kept in the run's folder. What was made before from the same rows, settings, start and seed
    is taken from there.

    Args:
        m0: The model that everything starts from.
        config: All settings.
        run: The folder that models and readings are kept in; None where nothing is to be kept.
        start: The adapter that a final training starts from; None for M0 itself.
    """

    def __init__(self, m0: M0, config: ForgetFilterConfig, run: Run | None = None, start: Path | None = None) -> None:
        """Load nothing yet."""
        self.m0, self.config, self.start = m0, config, start
        self.shelf = Shelf(run)

    @property
    def run(self) -> Run:
        """The folder that models and readings are kept in."""
        return self.shelf.run

    @property
    def account(self) -> Account:
        """What the work costs."""
        return self.shelf.account

    @cached_property
    def learner(self) -> Learner:
        """M0 in memory, with its adapter; loaded at first need."""
        return load_learner(self.m0.folder, self.m0.tokenizer, self.config)

    def become(self, model: Path | None) -> Learner:
        """Turn the learner into the model saved in a folder, or into M0 for None, and return it."""
        self.learner.restore(model)
        return self.learner

    def expect(
        self, stages: Mapping[str, tuple[StageSettings, Sequence[Example]]], rows: Sequence[Example], also: str = ""
    ) -> None:
        """Before a filter's work: make the learner ready for it, and say how long it will take.

        Args:
            stages: Name -> settings and rows of every training to come.
            rows: Noisy rows, which M0 and each stage's model will read.
            also: What else takes time, which the estimate leaves out.
        """
        self.learner.refuse_unknown(example.input_ids for example in rows)
        self.learner.prepare(sum(settings.rows() * mean_length(own) for settings, own in stages.values()))
        minutes = seconds_a_row(self.learner, rows) / 60 / processes.count()
        passes = len(stages) + 1
        trained = sum(settings.rows() for settings, _ in stages.values())
        scoring = minutes * (trained + passes * len(rows) / 3)  # a pass costs a third of training
        steps = ", ".join(f"{settings.max_steps} {name}" for name, (settings, _) in stages.items())
        everything = self.run.manifest.get("noisy", {}).get("rows", len(rows))
        if "probe" in self.config.filter:  # for which M0's lower half reads all rows
            scoring += minutes * everything / 6
        final = minutes * self.config.final_stage(everything).rows()
        say(
            f"about {max(1, round(scoring))} min ({steps} steps, {passes} scoring passes{also}), "
            f"then {max(1, round(final))} min at most to finetune"
        )

    def train(
        self,
        name: str,
        examples: Sequence[Example],
        settings: StageSettings,
        start: Path | None = None,
        hooks: Hooks | None = None,
        *,
        in_order: bool = False,
        beside: Callable[[Path], object] | None = None,
        into: Path | None = None,
    ) -> Path:
        """Finetune M0, or the model of another stage, unless the same was trained before.

        An interrupted training continues from its last checkpoint. One with hooks starts again: it has no
        checkpoints, since none could hold their state.

        Args:
            name: What the stage is called. With hooks or in_order, the name must also tell what these do: two trainings
                with the same name, rows, settings and start count as the same.
            examples: What to learn.
            settings: Rates and lengths.
            start: Folder of the model to start from, in the run or elsewhere; None for M0.
            hooks: What a method does inside the training.
            in_order: Take the examples in the order given.
            beside: Writes more files into the model's folder, once the training is done.
            into: The model's folder, in place of one in stages/; the tokenizer is then saved with it.

        Returns:
            The folder of its adapter, or of all weights with use_peft off.
        """
        rules = [name, in_order, hooks and hooks.constants()] if hooks is not None or in_order else None
        key = self._key(examples, dataclasses.asdict(settings), start, rules)
        part, folder = self.shelf.place(name, key) if into is None else (name, into)
        if self.shelf.has(part, key):
            return folder
        checkpoints = self.run.stage(f"{name}-{key}") / "checkpoints"
        if hooks is not None:
            shutil.rmtree(checkpoints, ignore_errors=True)
        with self.account.measuring(part) as cost:
            found = self._trained(examples, settings, start, checkpoints, f"{name} stage", hooks, in_order=in_order)

        def fill(temporary: Path) -> None:
            self.learner.save(temporary)
            if into is not None:
                self._save_tokenizer(temporary)
            if beside is not None:
                beside(temporary)

        self.shelf.fill(part, folder, fill, made_of=key, cost=cost.facts(), **found)
        self.learner.stage = folder
        left = [checkpoints] if into is None else self.run.folder.glob(f"stages/{name}-*")  # also of other settings
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return folder

    def _trained(
        self,
        examples: Sequence[Example],
        settings: StageSettings,
        start: Path | None,
        checkpoints: Path,
        what: str,
        hooks: Hooks | None,
        *,
        in_order: bool = False,
    ) -> dict[str, Any]:
        """Train the learner from a start, and count what that costs."""
        learner = self.learner
        learner.refuse_unknown(example.input_ids for example in examples)
        tokens = settings.rows() * mean_length(examples)
        learner.prepare(tokens)
        learner.restore(start)
        found = train(learner, examples, settings, checkpoints, what, hooks, in_order=in_order)
        passes = 1.0 if hooks is None else hooks.passes_of(learner.model)
        self._count(TRAINING * passes * tokens)
        return found

    def keep(self, name: str, fill: Callable[[Path], object], made_of: Any) -> Path:
        """Keep a model that is made without training, unless the same was made before.

        Args:
            name: What it is called.
            fill: Writes its files into the folder given.
            made_of: What distinguishes it from others of its name: anything that JSON can hold.
        """
        key = digest([name, made_of, self.m0.sha256])
        part, folder = self.shelf.place(name, key)
        if not self.run.done(part, key):
            self.shelf.fill(part, folder, fill, made_of=key)
        return folder

    def base(self, name: str, examples: Sequence[Example], settings: StageSettings, hooks: Hooks | None = None) -> M0:
        """Finetune M0 into a new M0 with merged weights, kept in the cache folder for every run.

        Args:
            name: What it is called; with hooks it also tells what they do.
            examples: What to learn.
            settings: Rates and lengths.
            hooks: What a method does inside the training.
        """
        rules = name if hooks is None else [name, hooks.constants()]
        called = f"{name}-{self._key(examples, dataclasses.asdict(settings), None, rules)}"
        folder = folders.cache_folder() / called
        here = folder.exists()
        if processes.is_so_for_everyone(here):
            self.account.reuse(called, {called: folders.made_with(folder)})
        else:
            with folders.checkpoints_for(called) as checkpoints:
                with self.account.measuring(called) as cost:
                    self._trained(examples, settings, None, checkpoints, name, hooks)
                if processes.is_first_on_its_machine():  # each has a cache of its own
                    # where a peer lacks it, this machine's may be another one than what is made now
                    folders.cached(called, self.learner.save_merged, anew=here, cost=cost.facts())
            processes.wait_for_everyone()
            self.drop_learner()  # its adapter is merged into its weights, so it is of no further use
        return dataclasses.replace(self.m0, folder=folder, made_of=None)

    def read(self, examples: Sequence[Example], model: Path | None = None) -> Readings:
        """Log-probabilities of each row under a model (None: M0); computed once, in shards, and kept."""
        name = self._name(model)

        def make(rows: slice, bar: Any) -> pa.Table:
            readings = read(self.become(model), examples[rows], f"{name}: scoring", bar)
            self._count(_tokens(examples[rows]))
            log_probs = [None if reading is None else reading.log_probs for reading in readings]
            means = [None if reading is None else reading.log_likelihood for reading in readings]
            columns = {
                "token_log_probs": pa.array(log_probs, pa.list_(pa.float32())),
                "log_likelihood": pa.array(means, pa.float64()),
            }
            return pa.table(columns)

        table = pq.read_table(self._once("log_probs", "scoring", name, examples, model, make))
        log_probs = table["token_log_probs"].combine_chunks()
        return Readings(log_probs, table["log_likelihood"].to_numpy().astype(float))

    def answer(self, examples: Sequence[Example], model: Path | None = None) -> list[str | None]:
        """A model's (None: M0's) own greedy answer to each row's prompt; None where a row cannot be scored."""
        name = self._name(model)

        def make(rows: slice, bar: Any) -> pa.Table:
            learner = self.become(model)
            readings = read(learner, examples[rows], f"{name}: following", silent())
            scorable = [i for i, reading in enumerate(readings) if reading is not None]
            favourites = [reading.favourites for reading in readings if reading is not None]
            asked = [examples[rows][i] for i in scorable]
            texts = complete(learner, asked, f"{name}: answering", favourites, bar=bar)
            self._count(2 * _tokens(examples[rows]))  # read, and answered at about the same length
            answers = dict(zip(scorable, texts, strict=True))
            return pa.table({"answer": pa.array([answers.get(i) for i in range(len(readings))], pa.string())})

        table = pq.read_table(self._once("answers", "answering", name, examples, model, make))
        return list(table["answer"].to_pylist())

    def states(self, examples: Sequence[Example], called: str) -> np.ndarray:
        """M0's hidden states of each row at half depth, pooled; read once, in shards, and kept.

        Args:
            examples: The rows.
            called: What the run's manifest calls them, so that their states are found without them.

        Returns:
            (rows, 2, hidden size) float16: the mean over a row's trained tokens, and the last one's; NaN for rows
            that cannot be scored.
        """

        def make(rows: slice, bar: Any) -> pa.Table:
            found = hidden_states(self.become(None), examples[rows], "M0: hidden states", bar)
            self._count(_tokens(examples[rows]) / 2)
            flat = pa.array(found.reshape(-1), pa.float16())
            return pa.table({"states": pa.FixedSizeListArray.from_arrays(flat, found[0].size)})

        path = self._once("states", "hidden states", "M0", examples, None, make)
        noted = self.run.manifest.setdefault("states", {})
        part = str(path.relative_to(self.run.folder).with_suffix(""))
        if noted.get(called) != part:
            noted[called] = part
            self.run.save()
        return stored_states(path)

    def states_of(self, data: Data) -> tuple[np.ndarray, np.ndarray]:
        """M0's hidden states of the noisy and of the safe rows; see `states`. The run notes which are which."""
        return self.states(data.noisy.examples, "noisy"), self.states(data.safe.examples, "safe")

    def gradients(self, examples: Sequence[Example], tokens: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """The gradient of M0's mean loss on each row, with respect to its adapter; nothing is kept.

        Args:
            examples: The rows.
            tokens: Take the first so many trained tokens of each row; None for all.

        Yields:
            For each row that can be scored, its number and its gradient: (weights,) float32.
        """
        self._count(TRAINING * _tokens(examples))
        for row, gradient in gradients(self.become(None), examples, "M0: gradients", tokens):
            yield row, gradient.cpu().numpy()

    def on(self, m0: M0 | None, **changes: Any) -> "Workshop":
        """A workshop of the same run with another M0 or changed settings; this one's model leaves the memory.

        Args:
            m0: The M0; None for this one's. Without changes that is this workshop itself.
            changes: Settings and their values.
        """
        if m0 is None and not changes:
            return self
        self.drop_learner()
        found = Workshop(m0 or self.m0, dataclasses.replace(self.config, **changes))
        found.shelf = self.shelf
        return found

    def other(self, model: str) -> "Workshop":
        """A workshop of the same run for another model, such as a guard; this one's model leaves the memory."""
        read: dict[str, Any] = {"lora_target_modules": "all-linear", "lora_layers_to_transform": None, "use_peft": True}
        named = dataclasses.replace(self.config, model_name_or_path=model, **read)  # it is not trained
        return self.on(M0.named(named), model_name_or_path=model, **read)

    def judge(self, model: str) -> "Judge":
        """Another model, which judges texts; this one's leaves the memory."""
        self.drop_learner()
        return Judge(model, self.config, self.shelf)

    def _once(
        self,
        what: str,
        doing: str,
        name: str,
        examples: Sequence[Example],
        model: Path | None,
        make: Callable[[slice, Any], pa.Table],
    ) -> Path:
        """The file of a model's table of all rows, which is made now if it does not exist."""
        key = self._key(examples, what, model, None)
        part = f"readings/{name}-{what}-{key}"
        return self.shelf.table(part, key, len(examples), make, f"{name}: {doing}", lambda: self.become(model))

    def finetuning_passes(self, examples: Sequence[Example]) -> float:
        """What finetuning on all of these rows costs, in the unit of Cost.passes."""
        tokens = self.config.final_stage(len(examples)).rows() * mean_length(examples)
        return TRAINING * self._passes(tokens)

    def _count(self, tokens: float) -> None:
        """Count tokens that went through the model in memory."""
        self.account.add(Cost(passes=self._passes(tokens)))

    def _passes(self, tokens: float) -> float:
        """What reading tokens costs, in the unit of Cost.passes."""
        return tokens * float(self.learner.model.num_parameters()) / 1e6

    def drop_learner(self) -> None:
        """Take the model out of memory."""
        self.__dict__.pop("learner", None)
        free_dropped_models()

    def _save_tokenizer(self, folder: Path) -> None:
        """The tokenizer beside a model; the model's card says where its chat template is ours."""
        self.m0.tokenizer.save_pretrained(folder)
        if self.m0.chat.made_up:
            with (folder / "README.md").open("a", encoding="utf-8") as card:
                card.write(f"\n## Chat template\nIn `chat_template.jinja`; {MADE_UP}.\n")

    def _name(self, model: Path | None) -> str:
        """What a model is called: by its stage."""
        return "M0" if model is None else model.parent.name.rpartition("-")[0] or model.name

    def _key(self, examples: Sequence[Example], what: Any, model: Path | None, rules: Any) -> str:
        """A hash of all that a result depends on: rows, settings or kind of reading, start, M0, what hooks do."""
        rows = hashlib.sha256()
        for example in examples:
            for ids in (example.input_ids, example.labels):
                rows.update(np.array([len(ids), *ids], np.int64).tobytes())
        start = None if model is None else folders.weights_hash(model)
        made_of = [rows.hexdigest(), what, start, rules, self.m0.sha256, self.config.training(), processes.count()]
        return digest(made_of)
