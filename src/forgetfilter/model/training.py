"""One stage of finetuning: the only module that calls TRL's trainer."""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig, SFTTrainer

from forgetfilter import processes
from forgetfilter.config import ForgetFilterConfig, StageSettings
from forgetfilter.costs import TRAINING
from forgetfilter.data.lazy import in_parts, table_on_disk
from forgetfilter.data.tokenization import Example
from forgetfilter.errors import ConfigError, TrainingError
from forgetfilter.files import sha256, write_text
from forgetfilter.hooks import Hooks
from forgetfilter.model.batches import label_logits, labelled
from forgetfilter.model.learner import Learner, without_peft
from forgetfilter.model.memory import RELEASE_EVERY, free_dropped_models, one_memory_error, release_freed_memory
from forgetfilter.model.weights import pick_device
from forgetfilter.progress import progress, say

WHOLE = "whole.json"
"""File that marks a checkpoint as completely written, with the checksums of the others."""


class _Progress(TrainerCallback):
    """Draws the bar, marks checkpoints that are whole, and calls the hooks around steps."""

    def __init__(self, what: str, hooks: Hooks) -> None:
        self.what = what
        self.hooks = hooks
        self.stack = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.hooks.before is not None:
            self.hooks.before()
        self.bar = self.stack.enter_context(progress(self.what, state.max_steps, "steps", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()
        if state.global_step % RELEASE_EVERY == 0:
            release_freed_memory()
        if self.hooks.each_step is not None:
            self.hooks.each_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        logs = more["logs"]
        if "loss" in logs:
            loss = float(logs["loss"])
            _check_loss(loss, self.what, state.global_step)
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        processes.wait_for_everyone()  # each writes a part of it
        if processes.is_main_process():
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            digests = {
                str(path.relative_to(checkpoint)): sha256(path) for path in checkpoint.rglob("*") if path.is_file()
            }
            write_text(checkpoint / WHOLE, json.dumps(digests))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stack.close()


class _Trainer(SFTTrainer):
    """TRL's trainer with its loss over the labelled tokens' logits alone (on CPU it makes all of them)."""

    losses: Tensor | float = 0.0
    """The sum of all losses: NaN or infinite as soon as one of them is."""

    def __init__(self, model: Any, hooks: Hooks, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self.hooks = hooks

    def _send_telemetry(self, *_: Any, **__: Any) -> None:
        """Tell nobody that a model is trained here: TRL would, where a program has not turned it off."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no model card: a checkpoint is gone once its stage is saved."""

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """A sharded model is wrapped here: accelerate refuses to, since its frozen weights are parts of tensors."""
        done = self.accelerator.unwrap_model(model, keep_torch_compile=False) is not model
        if done or not training or not processes.sharded():
            return super()._wrap_model(model, training, dataloader)
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # autocast alone
        return DistributedDataParallel(model, find_unused_parameters=not self.args.gradient_checkpointing)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """One pass, or two where a hook perturbs the model in between; gradients of earlier batches are kept."""
        if self.hooks.perturbed is None:
            return super().training_step(model, inputs, num_items_in_batch)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        earlier = [parameter.grad for parameter in trained]
        model.zero_grad()
        super().training_step(model, dict(inputs), num_items_in_batch)
        with self.hooks.perturbed(model):
            model.zero_grad()
            loss = super().training_step(model, inputs, num_items_in_batch)
        for parameter, gradient in zip(trained, earlier, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self._loss(model, inputs, num_items_in_batch)
        self.losses = self.losses + loss.detach()
        penalty = self.hooks.penalty and self.hooks.penalty()
        if penalty is None:
            return loss
        summed = num_items_in_batch is not None  # over the batches of a step; else the trainer takes their mean
        return loss + penalty / (self.args.gradient_accumulation_steps if summed else 1)

    def _loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """The batch's own loss, or the one that a hook makes in its place."""
        if self.hooks.objective is not None:
            return self.hooks.objective(model)
        outputs, logits, targets = labelled(model, inputs)
        if self.hooks.loss is not None:
            return self.hooks.loss(cross_entropy(logits.float(), targets, reduction="none"))
        if num_items_in_batch is None:
            return cross_entropy(logits.float(), targets) + self._imbalance(outputs)
        total = cross_entropy(logits.float(), targets, reduction="sum")
        # gradients are averaged over processes
        own = total / num_items_in_batch * self.accelerator.num_processes
        return own + self._imbalance(outputs) / self.current_gradient_accumulation_steps  # type: ignore[no-any-return]

    def _imbalance(self, outputs: Any) -> Tensor | float:
        """What TRL adds to the loss of a mixture of experts that tells how evenly these are used; 0 for others."""
        uneven = getattr(outputs, "aux_loss", None) if self.aux_loss_enabled else None
        return 0.0 if uneven is None else self.router_aux_loss_coef * uneven  # some models with experts give none


def train(
    learner: Learner,
    examples: Sequence[Example],
    settings: StageSettings,
    checkpoints: Path,
    what: str,
    hooks: Hooks | None = None,
    *,
    in_order: bool = False,
) -> dict[str, Any]:
    """Finetune the learner, as it is now, on examples; continue from a checkpoint if there is one.

    If the memory does not hold a batch, batches get smaller, and gradients are accumulated over more of them.

    Args:
        learner: The model; its weights change.
        examples: What to learn; the loss is on their labels.
        settings: Rates and lengths.
        checkpoints: Folder for checkpoints; removed by the caller once the stage is saved.
        what: Name for the progress bar.
        hooks: What a method does inside the training.
        in_order: Take the examples in the order given instead of shuffled anew in each epoch.

    Returns:
        steps, tokens (that went through the model; a batch's shared opening counts once) and losses (step -> loss).

    Raises:
        TrainingError: If the loss is NaN or infinite, or the memory does not hold a single row.
    """
    if hooks is not None and hooks.perturbed is not None and processes.count() > 1:
        raise TrainingError(f"{what}: two passes a step work in a single process only. Start it without `launch`.")
    start = learner.stage
    while True:
        try:
            with one_memory_error(), _around(learner, hooks or Hooks()):
                return _train(learner, examples, settings, checkpoints, what, hooks or Hooks(), in_order)
        except torch.OutOfMemoryError as error:
            batch = settings.per_device_train_batch_size
            if batch == 1 or processes.count() > 1 or hooks is not None:
                raise TrainingError(
                    f"{what}: the memory does not hold a batch of {batch}. Take a smaller one "
                    "(--per_device_train_batch_size), a shorter --max_length, or --gradient_checkpointing."
                ) from error
            part = next(n for n in range(2, batch + 1) if batch % n == 0)
            settings = dataclasses.replace(
                settings,
                per_device_train_batch_size=batch // part,
                gradient_accumulation_steps=settings.gradient_accumulation_steps * part,
            )
        say(
            f"{what}: out of memory, going on with batches of {settings.per_device_train_batch_size}, "
            f"{settings.gradient_accumulation_steps} to an optimiser step"
        )
        free_dropped_models()
        learner.restore(start)


@contextlib.contextmanager
def _around(learner: Learner, hooks: Hooks) -> Iterator[None]:
    """The context that a hook gives for the whole training. What is compiled would not see its changes."""
    if hooks.around is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"), hooks.around(learner.model):
        yield


def _train(
    learner: Learner,
    examples: Sequence[Example],
    settings: StageSettings,
    checkpoints: Path,
    what: str,
    hooks: Hooks,
    in_order: bool,
) -> dict[str, Any]:
    config = learner.config
    save_steps = min(500, max(10, -(-settings.max_steps // 4)))
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=pick_device().type == "cpu",
        bf16=learner.bf16,
        max_length=config.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=config.seed,
        train_sampling_strategy="sequential" if in_order else "random",
        logging_steps=min(10, settings.max_steps),
        logging_nan_inf_filter=False,
        save_strategy="steps" if save_steps < settings.max_steps and hooks == Hooks() else "no",
        save_steps=save_steps,
        save_total_limit=2,
        include_num_input_tokens_seen="all" if learner.packs else "non_padding",
        report_to=trackers(config),
        run_name=what,
        disable_tqdm=True,
        dataloader_pin_memory=False,  # batches are made on the device
    )
    trained = [weight for weight in learner.model.parameters() if weight.requires_grad]
    exact = [weight.data.float() for weight in trained]  # in 16 bits a step of the optimiser would be rounded away
    routing = learner.model.config.get_text_config()
    counts = getattr(routing, "output_router_logits", None)  # TRL sets it, and answers could not be generated with it
    trainer = _Trainer(
        learner.model,
        hooks,
        args=arguments,
        train_dataset=_on_disk(examples, checkpoints),
        data_collator=lambda rows: learner.collate([row["input_ids"] for row in rows], [row["labels"] for row in rows]),
        processing_class=learner.tokenizer,
        callbacks=[_Progress(what, hooks)],
    )
    for weight, data in zip(trained, exact, strict=True):  # TRL has rounded adapters on a quantized base to bfloat16
        weight.data = data
    del trained, exact
    trainer.remove_callback(PrinterCallback)
    if processes.is_main_process():
        _drop_broken(checkpoints)
    processes.wait_for_everyone()
    learner.stage = checkpoints  # from here on the weights are not those of any stage
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
        _check_loss(float(trainer.losses), what, trainer.state.global_step)
    except TrainingError:  # a checkpoint may already hold broken weights
        shutil.rmtree(checkpoints, ignore_errors=True)
        raise
    finally:
        _unwrap(learner.model)
        if counts is not None:
            routing.output_router_logits = counts
    history = trainer.state.log_history
    return {
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "losses": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
    }


def _on_disk(examples: Sequence[Example], folder: Path) -> Dataset:
    """The examples as a data set whose tokens lie on the disk of a folder, in a file that goes away with it."""
    tokens = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": tokens, "labels": tokens})

    def columns(part: Sequence[Example]) -> dict[str, list[list[int]]]:
        return {"input_ids": [e.input_ids for e in part], "labels": [e.labels for e in part]}

    tables = (pa.table(columns(part), schema=schema) for part in in_parts(examples))
    return Dataset(table_on_disk(schema, tables, folder), fingerprint="rows")  # else datasets reads all to make one


def _unwrap(model: Any) -> None:
    """Take off what accelerate has put around the forward pass: it would make the logits of every reading float32."""
    for part in (model, without_peft(model)):  # TRL puts its own around the base
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(part).pop(name, None)


def trackers(config: ForgetFilterConfig) -> list[str]:
    """Names of the trackers that losses are reported to; empty for "none"."""
    return [name for name in config.report_to.replace(",", " ").split() if name != "none"]


def require_trackers(config: ForgetFilterConfig) -> None:
    """Raise ConfigError, before any work, unless transformers knows every tracker and its package is there."""
    try:
        for callback in get_reporting_integration_callbacks(trackers(config)):
            callback()
    except (RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(f"--report_to {config.report_to}: {error}") from error


def _check_loss(loss: float, what: str, step: int) -> None:
    """Raise TrainingError if a loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"{what}: the loss is {loss} at step {step}. Take a lower learning rate or --dtype float32, "
            "with another --output_dir."
        )


def seconds_a_row(learner: Learner, examples: Sequence[Example]) -> float:
    """Seconds that training on a row of this data takes here, measured on eight rows of all lengths.

    A sharded model only reads them: if the memory did not hold a backward pass, it could not be tried with fewer rows.
    """
    order, whole = np.argsort([len(example.input_ids) for example in examples]), not processes.sharded()
    count = 8 if whole else min(8, learner.config.per_device_eval_batch_size)
    while True:
        rows = [examples[order[i * len(order) // count]] for i in range(count)]
        batch = learner.collate([e.input_ids for e in rows], [e.labels for e in rows])
        try:
            _one_pass(learner, batch, whole)  # the first time also pays for warming up
            start = _now()
            _one_pass(learner, batch, whole)
            return (_now() - start) / len(rows) * (1 if whole else TRAINING)
        except torch.OutOfMemoryError:
            if count == 1:
                return 0.0  # training will say what is wrong
        finally:
            learner.model.zero_grad()
        count //= 2


def _one_pass(learner: Learner, batch: dict[str, Any], backward: bool) -> None:
    """One pass through the model and, if asked to, back. What it made is gone when it fails, so fewer rows may fit."""
    with one_memory_error(), torch.set_grad_enabled(backward):
        with learner.mixed:
            logits, targets = label_logits(learner.model, batch)
            loss = cross_entropy(logits.float(), targets)
        if backward:
            loss.backward()


def _now() -> float:
    """Seconds on a clock, once the GPU has done what it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _drop_broken(folder: Path) -> None:
    """Remove checkpoints that were not written to the end, or were damaged since."""
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            digests = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
            whole = all(sha256(checkpoint / name) == digest for name, digest in digests.items())
        except (OSError, ValueError):
            whole = False
        if not whole:
            shutil.rmtree(checkpoint)


def _last_checkpoint(folder: Path) -> str | None:
    found = folder.glob("checkpoint-*")
    return max(map(str, found), key=lambda path: int(path.rpartition("-")[2]), default=None)
