"""M0, the model that everything starts from: weights on disk, and its tokenizer."""

from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.templates import MADE_UP
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.files import digest
from forgetfilter.model import folders, weights
from forgetfilter.model.sharding import refuse_unshardable
from forgetfilter.model.tokenizer import TEMPLATE_FILE, fit_tokenizer, load_tokenizer, template_beside
from forgetfilter.progress import say
from forgetfilter.runs import first_day


@dataclass(frozen=True)
class M0:
    """A model by its folder; nothing of its weights is in memory.

    Attributes:
        folder: Where its weights are.
        tokenizer: The model's own.
        max_length: Longest row in tokens.
        made_of: The adapter's folder, if `folder` holds the adapter merged into its base model.
        today: What chat templates that print the date take for today, None = today: a run reads its rows as on its
            first day.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    made_of: Path | None = None
    today: date | None = None

    @classmethod
    def named(cls, config: ForgetFilterConfig) -> "M0":
        """The model that the config names.

        Rows are cut where the model has learnt no more positions.

        Raises:
            ConfigError: If it is to be held in 4 bits, and the package that does so is missing, or to be sharded, and a
                setting does not work with that.
            ModelError: If there is no such model, or its tokenizer does not fit it.
        """
        refuse_unshardable(config)
        weights.require_bitsandbytes(config)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        folder = folders.find_weights(config.model_name_or_path)
        tokenizer = load_tokenizer(folders.tokenizer_folder(folder), config)
        outline = weights.outline(folder, config)
        fit_tokenizer(tokenizer, outline)
        weights.require_targets(outline, config)
        most = weights.learnt_positions(outline) or config.max_length
        if most < config.max_length:
            say(f"{config.model_name_or_path}: has learnt {most} positions; rows are cut there (--max_length).")
        whole = weights.whole_model(folder, config)
        made_of = None if whole == folder else folder
        return cls(whole, tokenizer, min(most, config.max_length), made_of, first_day(config.output_dir))

    @cached_property
    def chat(self) -> ChatTokenizer:
        """The tokenizer for whole conversations."""
        return ChatTokenizer(self.tokenizer, self.max_length, self.today)

    def template_note(self) -> str | None:
        """Where the chat template comes from, if a trainer would not find it with the model."""
        if self.chat.made_up:
            return MADE_UP
        beside = template_beside(folders.tokenizer_folder(self.folder))
        return f"from {TEMPLATE_FILE}" if beside == self.tokenizer.chat_template else None

    @cached_property
    def sha256(self) -> str:
        """A hash of the weights."""
        return folders.model_hash(self.made_of or self.folder)

    @cached_property
    def template_sha256(self) -> str:
        """A hash of the chat template, the plain one's where the model has none."""
        return digest(self.chat.tokenizer.chat_template)

    def facts(self, config: ForgetFilterConfig) -> dict[str, Any]:
        """What the manifest of a run or of an experiment says of its M0."""
        model = {"name": config.model_name_or_path, "sha256": self.sha256}
        today = (self.today or date.today()).isoformat()
        return {"model": model, "chat_template": {"sha256": self.template_sha256}, "today": today}
