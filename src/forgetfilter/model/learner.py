"""One model in memory with its LoRA adapter: it becomes M0, the noisy model, the final one in turn."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed
from transformers.pytorch_utils import Conv1D

from forgetfilter import processes
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.errors import ConfigError, DataError, ModelError
from forgetfilter.model.batches import collate, packs
from forgetfilter.model.folders import ADAPTER, name_on_hub
from forgetfilter.model.memory import keep_freed_memory, to_device
from forgetfilter.model.selfcheck import settle_batches, writes_as_alone
from forgetfilter.model.sharding import gathered, shard
from forgetfilter.model.weights import (
    fill_adapter,
    learnt_positions,
    load_model,
    pick_device,
    pick_dtype,
    quantized,
)
from forgetfilter.progress import say

COMPILE_FROM = 4e12
"""Number of parameters * tokens to train from which torch.compile saves more time than the half minute it takes: about
two minutes of training on two cores."""


@dataclass
class Learner:
    """One model in memory that is, in turn, M0, the noisy model, the reviewed and the final one.

    With LoRA the base stays and only the adapter changes; with full finetuning all weights do.

    Attributes:
        model: The model, with its adapter.
        tokenizer: Its tokenizer.
        folder: Where its weights are.
        config: All settings.
        fresh_adapter: The untrained adapter's weights, by PEFT's names.
        stage: Folder of the stage that it is; None for M0.
        compiled: Whether its blocks are compiled.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    config: ForgetFilterConfig
    fresh_adapter: dict[str, Tensor]
    stage: Path | None = None
    compiled: bool = False

    @property
    def bf16(self) -> bool:
        """Whether matrix products are computed in bfloat16; weights that are trained stay in float32."""
        return pick_dtype(self.config.dtype, frozen=True) == torch.bfloat16

    @property
    def mixed(self) -> torch.autocast:
        """The context every forward pass runs in."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The context answers are generated in.

        They are greedy, whatever the model's own generation config says of penalties and bad words. Adapters are
        rounded to bfloat16 once, not at every token. Nothing is compiled, since each new length of the cache would be
        compiled again. The output layer gets contiguous input, since torch on the CPU would otherwise copy the layer's
        weights once for each row.
        """
        trained = [p for p in self.model.parameters() if self.bf16 and p.dtype == torch.float32]
        exact = [parameter.data for parameter in trained]
        for parameter in trained:
            parameter.data = parameter.data.bfloat16()
        head = self.model.get_output_embeddings()
        inner = without_peft(self.model)
        own, inner.generation_config = inner.generation_config, GenerationConfig()
        hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        try:
            with torch.compiler.set_stance("force_eager"), gathered(self.model):
                yield
        finally:
            hook.remove()
            inner.generation_config = own
            for parameter, data in zip(trained, exact, strict=True):
                parameter.data = data

    @property
    def packs(self) -> bool:
        """Whether batches are packed, without padding."""
        return packs(self.model)

    def collate(self, input_ids: Sequence[list[int]], labels: Sequence[list[int]]) -> dict[str, Any]:
        """A batch of rows for this model, on its device; see batches.collate."""
        self.refuse_unknown(input_ids)
        return collate(input_ids, labels, self.model, self.tokenizer.pad_token_id)

    def refuse_unknown(self, input_ids: Iterable[list[int]]) -> None:
        """Raise DataError if the model has no embedding for a token of some row."""
        known = len(self.model.get_input_embeddings().weight)
        highest = max((max(row, default=0) for row in input_ids), default=0)
        if highest >= known:
            raise DataError(
                f"a row has the token {self.tokenizer.convert_ids_to_tokens(highest)!r} ({highest}), but the model has "
                f"embeddings of {known} tokens only. Take such rows out, or save the model anew after "
                "model.resize_token_embeddings(len(tokenizer))."
            )

    @cached_property
    def longest(self) -> int | None:
        """The longest row in tokens, for a model that has learnt its positions; None for others."""
        return learnt_positions(self.model)

    @cached_property
    def generates(self) -> bool:
        """Whether answers may be written by the model's `generate`, with its cache; tried at first need."""
        return writes_as_alone(self)

    def prepare(self, tokens: float) -> None:
        """Compile the model's blocks before a training on so many tokens, if asked to or if it saves time.

        Without a working compiler nothing changes.
        """
        if processes.sharded():
            return
        wanted = self.config.torch_compile
        if wanted == "auto":
            long = self.model.num_parameters() * tokens > COMPILE_FROM
            wanted = long and self.model.device.type == "cpu" and not quantized(without_peft(self.model))
        if not wanted or self.compiled:
            return
        try:
            torch.compile(torch.neg)(torch.ones(8, device=self.model.device))
        except Exception as error:  # whatever is lacking: the run only gets slower
            say(f"torch.compile does not work here ({type(error).__name__}), going on without: slower.")
            return
        for module in self.model.modules():
            if type(module).__name__ in (self.model._no_split_modules or ()):
                module.compile(dynamic=True)
        self.compiled = True

    def save(self, folder: Path) -> None:
        """Save the adapter (or all weights) to a folder."""
        self.model.save_pretrained(folder)
        name_on_hub(folder, self.folder)

    def save_merged(self, folder: Path, change: Callable[[Any], object] | None = None) -> None:
        """Save the whole model, its adapter merged in and then changed, with the tokenizer: a model of its own."""
        model = self._merged() if self.config.use_peft else self.model
        if change is not None:
            change(model)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _merged(self) -> Any:
        """The model with its adapter's weights added to its own: a new one, where no process holds all weights."""
        if not processes.sharded():
            return self.model.merge_and_unload()
        with tempfile.TemporaryDirectory() as adapter:
            self.save(Path(adapter))
            return load_model(Path(adapter), self.config)

    def restore(self, stage: Path | None) -> None:
        """Become the model saved in a stage's folder, or M0 for None."""
        if stage == self.stage:
            return
        if self.config.use_peft:
            weights = load_file(stage / ADAPTER) if stage else self.fresh_adapter
            fill_adapter(self.model, weights, stage or self.folder)
        else:
            config = self.config
            if stage is not None:  # what was trained is exact
                config = dataclasses.replace(config, dtype="float32")
                self.model.float()
            self.model.load_state_dict(load_model(stage or self.folder, config).state_dict())
        self.stage = stage


def without_peft(model: Any) -> Any:
    """The model of transformers, with its adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_model(model: Any) -> Any:
    """What is below the output layer of a causal language model; in a composite model, of its text model."""
    inner = without_peft(model)
    composite = inner.config.get_text_config(decoder=True) is not inner.config
    return (inner.get_decoder() if composite else inner).base_model


def load_learner(folder: Path, tokenizer: PreTrainedTokenizerBase, config: ForgetFilterConfig) -> Learner:
    """Load M0, with an untrained LoRA adapter unless use_peft is off.

    Raises:
        ConfigError: If there are several GPUs but only one process.
        ModelError: If the model cannot be loaded, or has no such LoRA target modules.
    """
    if torch.cuda.device_count() > 1 and processes.count() == 1:
        raise ConfigError(
            f"{torch.cuda.device_count()} GPUs and one process: take one with CUDA_VISIBLE_DEVICES=0, "
            "or all with `accelerate launch` (docs/scale.md)."
        )
    keep_freed_memory()
    processes.wait_for_everyone()  # from here on each process has a device of its own
    model = load_model(folder, config, in_4bit=config.load_in_4bit)
    fresh: dict[str, Tensor] = {}
    if config.use_peft:
        names = config.lora_target_modules
        set_seed(config.seed)
        try:
            model = get_peft_model(
                model,
                LoraConfig(
                    r=config.lora_r,
                    lora_alpha=config.lora_alpha,
                    lora_dropout=config.lora_dropout,
                    target_modules=names if names == "all-linear" else names.replace(",", " ").split(),
                    exclude_modules=_without_adapter(model, names) or None,
                    layers_to_transform=config.lora_layers_to_transform,
                    task_type="CAUSAL_LM",
                ),
            )
        except ValueError as error:
            raise ModelError(f"--lora_target_modules {names}: {error}") from error
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ModelError(f"--lora_target_modules {names}: the output layer can have no adapter; name other layers.")
        fresh = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
        fill_adapter(model, fresh, folder)  # whether what is saved can be read again
    if processes.sharded():
        shard(model, pick_device())
    to_device(model, pick_device())
    learner = Learner(model, tokenizer, folder, config, fresh)
    settle_batches(learner)
    return learner


def _without_adapter(model: Any, names: str) -> list[str]:
    """Linear layers that get no adapter.

    These are the ones beside a composite model's text model (a vision tower), and for "all-linear" those that give
    something else than one tensor (a router), which no adapter can wrap.
    """
    text = text_model(model) if model.config.get_text_config(decoder=True) is not model.config else model
    inside = {*text.modules(), model.get_output_embeddings()}
    if names == "all-linear":
        inside -= _of_many_tensors(model)
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    return [name for name, module in linear if module not in inside]


@torch.no_grad()
def _of_many_tensors(model: Any) -> set[nn.Module]:
    """Linear layers of a class of their own that do not give one tensor, found by a forward pass over one token."""
    own = [one for one in model.modules() if isinstance(one, nn.Linear) and type(one).forward is not nn.Linear.forward]
    found: set[nn.Module] = set()

    def look(layer: nn.Module, _: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            found.add(layer)

    hooks = [layer.register_forward_hook(look) for layer in own]
    if own:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found
