"""Greedy completions, in batches; what agrees with the references is found by one forward pass, not generated."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig

from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.errors import TrainingError
from forgetfilter.model.learner import Learner
from forgetfilter.model.memory import one_memory_error
from forgetfilter.progress import progress

MARGIN = 8
"""Tokens a completion may run over its reference before it is stopped."""
LEAP = 8
"""Tokens generated before finished rows are taken out of the batch, if the model's cache allows it."""


@torch.no_grad()
def complete(
    learner: Learner,
    examples: Sequence[Example],
    what: str,
    favourites: Sequence[Sequence[int]] | None = None,
    most_tokens: int | None = None,
    bar: Any = None,
) -> list[str]:
    """The learner's greedy answer to each example's prompt, about as long as its reference at most.

    A greedy answer agrees with its reference until some token of the reference is not the model's likeliest one. One
    forward pass over the reference finds this token; only the tokens after it are generated. A row's answer doesn't
    depend on the other rows of its batch: each row stops at its own length.

    Args:
        learner: Whose answers.
        examples: Rows with a prompt and a reference.
        what: Name for the progress bar.
        favourites: For each example, the likeliest token in place of each trained one (model.reading), if known.
        most_tokens: Largest length of an answer; by default the reference's length plus MARGIN.
        bar: A bar of the caller's that counts the rows instead.

    Returns:
        One text an example, in order; without special tokens.

    Raises:
        TrainingError: If the memory does not hold one.
    """
    learner.model.eval()
    answers: list[list[int]] = [[] for _ in examples]
    if favourites is not None:
        answers = [_follow(example, row) for example, row in zip(examples, favourites, strict=True)]
    limits = [most_tokens or len(example.input_ids) - example.prompt_length + MARGIN for example in examples]
    if learner.longest is not None:  # the last token of an answer needs no position
        rooms = [learner.longest + 1 - example.prompt_length for example in examples]
        limits = [min(limit, room) for limit, room in zip(limits, rooms, strict=True)]
    ends = _ends(learner, examples)
    unfinished = [i for i, answer in enumerate(answers) if not ends & {*answer[-1:]} and len(answer) < limits[i]]
    order = sorted(unfinished, key=lambda i: (limits[i] - len(answers[i]), examples[i].prompt_length))
    size = learner.config.per_device_eval_batch_size
    with progress(what, len(examples), "rows", bar=bar) as bar, learner.generating():
        bar.update(len(examples) - len(order))
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            begun = [examples[i].input_ids[: examples[i].prompt_length] + answers[i] for i in batch]
            most = [limits[i] - len(answers[i]) for i in batch]
            for row, new in _in_halves(learner, begun, most, ends):
                answers[batch[row]] += new
                bar.update()
    return [str(learner.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]


def _in_halves(
    learner: Learner, begun: list[list[int]], most: list[int], ends: set[int]
) -> Iterator[tuple[int, list[int]]]:
    """As _generate; if the memory does not hold the batch, the unfinished rows are generated in two halves."""
    left = list(range(len(begun)))
    try:
        with one_memory_error():
            others = _one_by_one if learner.packs else _write_without_cache
            write = _generate if learner.generates else others
            for row, new in write(learner, begun, most, ends):
                left.remove(row)
                yield row, new
        return
    except torch.OutOfMemoryError as error:
        if len(begun) == 1:
            raise TrainingError(
                f"the memory does not hold an answer to {len(begun[0])} tokens. Take a shorter --max_length."
            ) from error
    for part in (left[: (len(left) + 1) // 2], left[(len(left) + 1) // 2 :]):
        if part:
            for row, new in _in_halves(learner, [begun[i] for i in part], [most[i] for i in part], ends):
                yield part[row], new


def _ends(learner: Learner, examples: Sequence[Example]) -> set[int]:
    """Tokens that end an answer: the end-of-sequence token, and the one that the chat template writes after a turn."""
    trained = ([label for label in example.labels if label != IGNORED] for example in examples if not example.cut)
    last = {labels[-1] for labels in trained if labels}
    return {learner.tokenizer.eos_token_id, *(last & set(learner.tokenizer.get_added_vocab().values()))}


def _generate(
    learner: Learner, begun: list[list[int]], most: list[int], ends: set[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield each row's number and new tokens once it ends, after most[row] tokens at most; it leaves the batch then."""
    tokenizer = learner.tokenizer
    inputs = tokenizer.pad({"input_ids": begun}, padding_side="left", return_attention_mask=True, return_tensors="pt")
    ids, mask = inputs["input_ids"].to(learner.model.device), inputs["attention_mask"].to(learner.model.device)
    cache, leap = (prefilled(learner, begun), LEAP) if learner.packs else (None, max(most))
    settings = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(ends), "return_dict_in_generate": True}
    rows, width = list(range(len(begun))), ids.shape[1]
    last = max if learner.longest is None else min  # no row may outgrow the positions that the model has learnt
    while True:
        left = width + last(most[row] for row in rows) - ids.shape[1]
        _forget_pictures(learner.model)
        output = learner.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **({} if cache is None else {"cache": cache}),
            generation_config=GenerationConfig(max_new_tokens=min(leap, left), do_sample=False, **settings),
        )
        ids, cache = output.sequences, output.cache if learner.packs else None
        going = []
        for place, new in enumerate(ids[:, width:].tolist()):
            new = new[: most[rows[place]]]
            end = next((i for i, token in enumerate(new) if token in ends), None)
            if end is not None or len(new) == most[rows[place]]:
                yield rows[place], new if end is None else new[: end + 1]
            else:
                going.append(place)
        if not going:
            return
        rows, chosen = [rows[place] for place in going], torch.tensor(going, device=ids.device)
        ids = ids[chosen]
        mask = pad(mask[chosen], (0, ids.shape[1] - mask.shape[1]), value=1)
        if cache is not None:
            cache.batch_select_indices(chosen)


def _one_by_one(
    learner: Learner, begun: list[list[int]], most: list[int], ends: set[int]
) -> Iterator[tuple[int, list[int]]]:
    """As _generate, for models whose `generate` counts the positions of padded prompts wrongly: nothing is padded."""
    for row in range(len(begun)):
        for _, new in _generate(learner, [begun[row]], [most[row]], ends):
            yield row, new


def _forget_pictures(model: Any) -> None:
    """Models of images keep by how much those of the last batch shifted its rows' positions; text shifts nothing."""
    for part in model.modules():
        if getattr(part, "rope_deltas", None) is not None:
            part.rope_deltas = None


def _write_without_cache(
    learner: Learner, begun: list[list[int]], most: list[int], ends: set[int]
) -> Iterator[tuple[int, list[int]]]:
    """As _generate, for padded batches and whatever the model's cache does: each token takes a pass over all rows."""
    new: list[list[int]] = [[] for _ in begun]
    going = list(range(len(begun)))
    while going:
        rows = [begun[row] + new[row] for row in going]
        batch = learner.collate(rows, rows)
        del batch["labels"]
        logits = learner.model(**batch, use_cache=False).logits
        for place, row in enumerate(going):
            new[row].append(int(logits[place, len(rows[place]) - 1].argmax()))
            if new[row][-1] in ends or len(new[row]) == most[row]:
                yield row, new[row]
        going = [row for row in going if new[row][-1] not in ends and len(new[row]) < most[row]]


def prefilled(learner: Learner, begun: Sequence[list[int]]) -> Any:
    """The cache of all but each row's last token, filled without padding; for models that pack rows."""
    heads = [row[:-1] for row in begun]
    batch = learner.collate(heads, [[IGNORED] * len(row) for row in heads])
    longest, opening = batch["row_tokens"].shape[1], range(batch["opening"])
    tokens = [[*opening, *row[len(opening) :]] for row in batch["row_tokens"].tolist()]
    padded = [[0] * (longest - len(head)) + row[: len(head)] for head, row in zip(heads, tokens, strict=True)]
    index = torch.tensor(padded, device=learner.model.device)
    del batch["labels"]
    cache = learner.model(**batch, use_cache=True, logits_to_keep=1).cache
    for layer in cache.layers:
        layer.keys, layer.values = (x[0][:, index].transpose(0, 1) for x in (layer.keys, layer.values))
    return cache


def _follow(example: Example, favourites: Sequence[int]) -> list[int]:
    """The reference's tokens up to the first that isn't the favourite, and the favourite in its place."""
    reference = [label for label in example.labels[example.prompt_length :] if label != IGNORED]
    answer = []
    for token, favourite in zip(reference, favourites[len(favourites) - len(reference) :], strict=True):
        answer.append(favourite)
        if token != favourite:
            break
    return answer
