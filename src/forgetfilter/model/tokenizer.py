"""Tokenizers: loaded with what every row needs of them, and held against the model that they are for."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.errors import ModelError

TEMPLATE_FILE = "chat_template.json"
"""Where processors of some models keep the chat template; tokenizers do not look there."""


def load_tokenizer(folder: Path, config: ForgetFilterConfig, *, ends: bool = True) -> PreTrainedTokenizerBase:
    """A model's tokenizer, with a padding token; `ends`: it must have an end-of-sequence token, as text models do."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the libraries raise dozens of kinds over files of odd shape
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
    if ends and tokenizer.eos_token is None:
        raise ModelError(f"{folder}: its tokenizer has no end-of-sequence token, so the model could not learn to stop.")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = template_beside(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def template_beside(folder: Path) -> str | None:
    """The chat template in a model's chat_template.json, None without such a file.

    Raises:
        ModelError: If the file cannot be read.
    """
    path = folder / TEMPLATE_FILE
    if not path.exists():
        return None
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: holds no chat template: {error!r}. Repair or remove it.") from error
    if not isinstance(template, str):
        raise ModelError(f"{path}: holds no chat template: a {type(template).__name__}. Repair or remove it.")
    return template


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """See that the model has an embedding for each token that every row gets; another padding token is found for it.

    Args:
        tokenizer: The model's; its padding token is changed if the model does not know it.
        model: The model, or its outline.

    Raises:
        ModelError: If the model does not know a token that begins or ends texts or turns.
    """
    rows = len(model.get_input_embeddings().weight)
    if tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    template = str(tokenizer.chat_template)
    every = {tokenizer.bos_token, tokenizer.eos_token, *(t for t in tokenizer.get_added_vocab() if t in template)}
    ids = tokenizer.get_vocab()
    unknown = sorted(token for token in every - {None} if int(ids[token]) >= rows)
    if unknown:
        raise ModelError(
            f"{tokenizer.name_or_path}: the model has embeddings of {rows} tokens, and none of {', '.join(unknown)}. "
            "Save it anew after model.resize_token_embeddings(len(tokenizer)), and train the new embeddings."
        )
