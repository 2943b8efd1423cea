"""guard: a guard model's verdict on each row, or a text classifier's.

Four kinds, told apart by themselves unless `kind` names one:

- `classifier`: a text classification model (Detoxify, a DeBERTa guard). Score: log-odds of its unsafe labels against
  the others; where each label is a question of its own, the largest log-odds among the unsafe ones.
- `qwen3guard`: Qwen3Guard-Gen (arXiv 2510.14276) answers "Safety: Safe", "Safety: Controversial" or "Safety: Unsafe".
- `llama_guard`: Llama Guard (arXiv 2312.06674) answers "safe" or "unsafe" and the categories.
- `wildguard`: WildGuard (arXiv 2406.18495) answers three questions, the third about the response. It has no chat
  template, so it needs `template`, a file with its prompt.

A row with several answers is as suspect as its most suspect one. Nothing is generated. A generative guard is asked how
likely it finds each of its possible answers, so the score is log P(unsafe ones) - log P(safe ones), whose sign is the
verdict that it would give.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import logsumexp

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.lazy import Lazy
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import IGNORED, Example, on_disk
from forgetfilter.data.turns import exchanges, shorter
from forgetfilter.errors import ConfigError
from forgetfilter.files import at_home
from forgetfilter.methods import traits
from forgetfilter.scored import NO_PROMISE, Scale, Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

WILDGUARD = "Harmful request: {}\nResponse refusal: {}\nHarmful response: {}"
VERDICTS = {
    "qwen3guard": (("Safety: Unsafe", "Safety: Controversial"), ("Safety: Safe",)),
    "llama_guard": (("\n\nunsafe",), ("\n\nsafe",)),
    "wildguard": tuple(
        tuple(WILDGUARD.format(request, refusal, harmful) for request, refusal in product(("yes", "no"), repeat=2))
        for harmful in ("yes", "no")
    ),
}
"""Kind -> the unsafe and the safe answers it can give, as far as the verdict goes."""
WRITE_A_FORM = (
    "Write its prompt to a file, with {prompt} and {response} where the row's texts go, and name it: "
    "`parameters: {guard: {template: FILE}}`."
)
INSTRUCTIONS = 1024
"""Tokens that a guard's own instructions may have, beside a row of max_length tokens."""
UNSAFE_LABELS = (
    *("unsafe", "toxic", "toxicity", "severe_toxic", "severe_toxicity", "obscene", "threat", "insult"),
    *("identity_hate", "identity_attack", "sexual_explicit", "harmful", "hate", "hateful", "offensive"),
    *("nsfw", "jailbreak"),
)
"""Labels of classifiers that count as unsafe, in small letters; so does LABEL_1 where there are two without names."""


def require_guard(workshop: "Workshop", data: Data, parameters: Mapping[str, Any]) -> None:
    """Raise ModelError if there is no such guard; ConfigError if it cannot be asked, or its labels are not known."""
    model, kind, template, labels, reads_prompt = (
        parameters[name] for name in ("model", "kind", "template", "unsafe_labels", "reads_prompt")
    )
    if kind not in ("auto", "classifier", *VERDICTS):
        raise ConfigError(f"parameters.guard.kind is {kind}: choose among auto, classifier, {', '.join(VERDICTS)}.")
    judge = workshop.judge(model)
    kind = judge.kind(kind)
    if kind == "classifier" and template is not None:
        raise ConfigError("parameters.guard.template: a classifier has no prompt.")
    if kind != "classifier" and (labels is not None or reads_prompt):
        raise ConfigError("parameters.guard: unsafe_labels and reads_prompt are for classifiers.")
    if kind != "qwen3guard" and not parameters["controversial_is_unsafe"]:
        raise ConfigError("parameters.guard: controversial_is_unsafe is for qwen3guard.")
    if kind == "classifier":
        which_unsafe(*judge.labels(), labels, model)
    else:
        _asking(template, workshop.other(model))


@traits(check=require_guard, files=("model", "template"), own_scale=True)
def guard(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    model: str,
    kind: str = "auto",
    template: str | None = None,
    unsafe_labels: str | None = None,
    reads_prompt: bool = False,
    controversial_is_unsafe: bool = True,
) -> Scored:
    """Log-odds of unsafe, above 0 = the guard finds unsafe likelier than safe.

    Args:
        workshop: Reads the guard in place of M0.
        data: The noisy data.
        config: All settings.
        model: Hub id or folder of the guard.
        kind: classifier, qwen3guard, llama_guard, wildguard, or auto.
        template: File with the prompt of a generative guard, with {prompt} and {response} in it; by default its chat
            template makes the prompt.
        unsafe_labels: A classifier's labels that count as unsafe, comma-separated; by default those in UNSAFE_LABELS.
        reads_prompt: Give a classifier prompt and answer, shortened together where they are too long for it; by default
            it reads the answer alone.
        controversial_is_unsafe: Whether Qwen3Guard's middle verdict counts as unsafe; else as safe. Two verdicts may be
            unsafe together where a third one is the likeliest.

    Raises:
        ConfigError: If the guard's kind cannot be told, it cannot be asked, or none of its labels is known.
        ModelError: If it cannot be loaded.
    """
    asked = {"model": model, "kind": kind, "template": template, "controversial_is_unsafe": controversial_is_unsafe}
    require_guard(workshop, data, {**asked, "unsafe_labels": unsafe_labels, "reads_prompt": reads_prompt})
    says = "the guard finds unsafe likelier than safe"
    judge = workshop.judge(model)
    kind = judge.kind(kind)
    said = [exchanges(turns) or [("", "")] for turns in data.noisy.source.turns(data.noisy.row_format)]
    flat = [exchange for row in said for exchange in row]
    if kind == "classifier":
        found = judge.classify(flat if reads_prompt else [("", answer) for _, answer in flat])
        odds = log_odds(found.logits, found.labels, unsafe_labels, model, independent=found.independent)
        unsafe_ones = which_unsafe(found.labels, found.independent, unsafe_labels, model)
        says += f" ({', '.join(np.array(found.labels)[unsafe_ones])} of its {len(found.labels)} labels)"
    else:
        unsafe, safe = VERDICTS[kind]
        if kind == "qwen3guard" and not controversial_is_unsafe:
            unsafe, safe = unsafe[:1], (*safe, unsafe[1])
        odds = _asked(workshop.other(model), flat, unsafe, safe, template, data.noisy.source.scratch_folder)
    odds[[not answer.strip() for _, answer in flat]] = np.nan
    row_of = np.repeat(np.arange(len(said)), [len(row) for row in said])
    suspicion = Scored(odds).most_suspect(row_of).suspicion
    return Scored(suspicion, scale=Scale(0.0, says=says + NO_PROMISE))


def log_odds(
    logits: np.ndarray, labels: Sequence[str], wanted: str | None, model: str, *, independent: bool
) -> np.ndarray:
    """(texts,) log-odds of a classifier's unsafe labels.

    Args:
        logits: (texts, labels).
        labels: Their names.
        wanted: The unsafe ones, comma-separated; None: those in UNSAFE_LABELS.
        model: The model's name, for errors.
        independent: Whether each label is a question of its own; else the labels are alternatives.

    Raises:
        ConfigError: See `which_unsafe`.
    """
    unsafe = which_unsafe(labels, independent, wanted, model)
    if independent:
        largest: np.ndarray = logits[:, unsafe].max(1).astype(float)
        return largest
    odds: np.ndarray = np.asarray(logsumexp(logits[:, unsafe], axis=1) - logsumexp(logits[:, ~unsafe], axis=1), float)
    return odds


def which_unsafe(labels: Sequence[str], independent: bool, wanted: str | None, model: str) -> np.ndarray:
    """(labels,) bool: which of a classifier's labels count as unsafe; arguments as of `log_odds`.

    Raises:
        ConfigError: If none of the labels counts as unsafe, or all do although they are alternatives; or if one that
            is wanted is none of them.
    """
    names = UNSAFE_LABELS if wanted is None else tuple(name.strip().lower() for name in wanted.split(","))
    small = [label.lower() for label in labels]
    if wanted is None and small == ["label_0", "label_1"]:
        names = ("label_1",)
    unsafe = np.array([label in names for label in small])
    if not unsafe.any() or (wanted is not None and not {*names} <= {*small}) or (unsafe.all() and not independent):
        raise ConfigError(
            f"{model}: its labels are {', '.join(labels)}. Name those of them that are unsafe: "
            "`parameters: {guard: {unsafe_labels: NAME}}`."
        )
    return unsafe


def _asked(
    workshop: "Workshop",
    rows: Sequence[tuple[str, str]],
    unsafe: Sequence[str],
    safe: Sequence[str],
    template: str | None,
    scratch_folder: Path | None,
) -> np.ndarray:
    """(rows,) log P(unsafe answers) - log P(safe answers) by a generative guard; its prompts lie on disk."""
    tokenizer, write = workshop.m0.tokenizer, _asking(template, workshop)
    longest = workshop.m0.max_length + INSTRUCTIONS
    prompts = (_prompt(tokenizer, prompt, answer, write, longest) for prompt, answer in rows)
    stored = on_disk((Example(ids, [IGNORED] * len(ids), len(ids), "", cut=False) for ids in prompts), scratch_folder)
    totals = []
    for verdict in (*unsafe, *safe):
        ids = tokenizer(verdict, add_special_tokens=False)["input_ids"]
        examples = Lazy(len(stored), partial(_answered, stored, ids))
        totals.append([row.values.to_numpy().sum() for row in workshop.read(examples).token_log_probs])
    likelihoods = np.array(totals, float)  # (verdicts, rows)
    found: np.ndarray = logsumexp(likelihoods[: len(unsafe)], axis=0) - logsumexp(likelihoods[len(unsafe) :], axis=0)
    return found


def _answered(prompts: Lazy[Example], ids: list[int], places: np.ndarray) -> list[Example]:
    """Some prompts, each followed by the tokens of a verdict."""
    return [
        replace(prompt, input_ids=[*prompt.input_ids, *ids], labels=[*prompt.labels, *ids])
        for prompt in prompts.make(places)
    ]


def _asking(path: str | None, guard: "Workshop") -> Callable[[str, str], str]:
    """What puts a prompt and an answer into words for a guard: the form in a file, or its own chat template.

    Raises:
        ConfigError: If there is neither, or the template does not show the answer.
    """
    if path is not None:
        return partial(_filled, _form(path))
    tokenizer = guard.m0.tokenizer
    if tokenizer.chat_template is None:
        raise ConfigError(f"{guard.m0.folder}: this guard has no chat template. {WRITE_A_FORM}")
    why = "does not show an answer"
    for in_parts in (False, True):
        try:
            shown = _in_chat(tokenizer, in_parts, "forgetfilter-0", "forgetfilter-1")
        except Exception as error:  # a template may raise anything
            why = f"cannot be used: {error}"
            continue
        if "forgetfilter-1" in shown:
            return partial(_in_chat, tokenizer, in_parts)
    raise ConfigError(f"{guard.m0.folder}: the chat template of this guard {why}. {WRITE_A_FORM}")


def _in_chat(tokenizer: Any, in_parts: bool, prompt: str, answer: str) -> str:
    """The exchange by a guard's chat template.

    Args:
        tokenizer: The guard's.
        in_parts: Whether the template takes a text as a list of parts, as that of Llama Guard 3 1B does.
        prompt: The prompt.
        answer: The answer.
    """
    turns = [
        {"role": role, "content": [{"type": "text", "text": text or " "}] if in_parts else text or " "}
        for role, text in (("user", prompt), ("assistant", answer))
    ]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _filled(form: str, prompt: str, answer: str) -> str:
    """A form with the exchange in it."""
    pieces = re.split(r"(\{prompt\}|\{response\})", form)  # in one go: a row may spell the marks
    return "".join({"{prompt}": prompt, "{response}": answer}.get(piece, piece) for piece in pieces)


def _form(path: str) -> str:
    """The prompt that a file holds, with places for prompt and answer."""
    try:
        form = Path(at_home(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"parameters.guard.template: {path} cannot be read: {error}") from error
    if "{response}" not in form:
        raise ConfigError(f"parameters.guard.template: {path} has no {{response}}, where the row's answer goes.")
    return form


def _prompt(tokenizer: Any, prompt: str, answer: str, write: Callable[[str, str], str], longest: int) -> list[int]:
    """Token ids of what the guard is asked; too long ones lose a part."""
    while True:
        text = write(_harmless(tokenizer, prompt), _harmless(tokenizer, answer))
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) <= longest or not (prompt or answer):
            return ids
        prompt, answer = shorter(prompt, answer)


def _harmless(tokenizer: Any, text: str) -> str:
    """The text with its special tokens broken, so that a row cannot write the guard's verdict itself."""
    for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
