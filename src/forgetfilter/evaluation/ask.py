"""Ask a model the questions of the measures. No other module asks the model that is measured.

`forgetfilter evaluate MODEL --on bias=FILE,qa=FILE`, and every cell of `forgetfilter compare`.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forgetfilter import processes
from forgetfilter.config import BUILTIN, ForgetFilterConfig
from forgetfilter.data.formats import RowError
from forgetfilter.data.sources import load_source
from forgetfilter.data.tokenization import ChatTokenizer, Example, hash_of
from forgetfilter.data.turns import Turn, preceded
from forgetfilter.errors import ConfigError, DataError, RunError
from forgetfilter.evaluation import arithmetic, bias, harmfulness, over_refusal, question_answering, toxicity
from forgetfilter.evaluation.questions import Figures, Judge, Measure, Question
from forgetfilter.files import at_home
from forgetfilter.m0 import M0
from forgetfilter.model.generation import complete
from forgetfilter.model.learner import Learner
from forgetfilter.model.reading import read
from forgetfilter.model.weights import pick_dtype
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop

MEASURES: dict[str, Measure] = {
    "bias": bias.MEASURE,
    "toxicity": toxicity.MEASURE,
    "harmfulness": harmfulness.MEASURE,
    "over_refusal": over_refusal.MEASURE,
    "qa": question_answering.MEASURE,
    "arithmetic": arithmetic.MEASURE,
}
"""All measures by name: a new one is a file beside these, and a line here."""


@dataclass
class Answers:
    """A model's answers to the questions of one measure.

    Attributes:
        questions: What was asked.
        texts: The model's own greedy answers; empty where none was wanted.
        log_probs: For each question the (tokens,) log-probabilities of each of its options, in nats.
    """

    questions: list[Question]
    texts: list[str]
    log_probs: list[list[np.ndarray]]

    def records(self, measure: str) -> list[dict[str, object]]:
        """One record for each question: prompt, answer, what the measure knows, mean log-likelihood of each option."""
        return [
            {
                "measure": measure,
                "prompt": question.prompt,
                "answer": text,
                **question.about,
                "log_likelihoods": [round(float(option.mean()), 4) for option in options],
            }
            for question, text, options in zip(self.questions, self.texts, self.log_probs, strict=True)
        ]


def load_questions(files: Mapping[str, str], most: int | None = None, seed: int = 42) -> dict[str, list[Question]]:
    """The questions of each measure.

    Args:
        files: Measure -> data set; "builtin" names the questions in the box, where a measure has some.
        most: Largest number of questions per measure, drawn at random; by default all.
        seed: Seed of the draw.

    Raises:
        ConfigError: If there is no such measure.
        DataError: If a data set cannot be read, or lacks what the measure needs.
    """
    questions = {}
    for name, file in files.items():
        if name not in MEASURES:
            raise ConfigError(f"no measure {name!r}: choose among {', '.join(MEASURES)}.")
        found = MEASURES[name].questions_of(load_source(questions_file(name, file)))
        questions[name] = random.Random(seed).sample(found, most) if most and most < len(found) else found
    return questions


def questions_file(measure: str, file: str) -> str:
    """The data set that a name stands for: "builtin" for the measure's questions in the box, if it has some."""
    return MEASURES[measure].in_box or file if file == BUILTIN else at_home(file)


def leave_out(
    questions: Mapping[str, list[Question]],
    chat: ChatTokenizer,
    training: Iterable[Example] = (),
    sentence: str = "",
    reasoning: str = "",
) -> tuple[dict[str, list[Question]], dict[str, int]]:
    """Leave out questions that are in the training data, and questions that max_length would cut.

    Args:
        questions: By measure.
        chat: The model's tokenizer.
        training: Rows of the training files. A question is left out if the tokens before any trained turn of a row are
            exactly its prompt.
        sentence: Text that may be put before the prompts of safety measures; they must fit max_length with it.
        reasoning: Text that may be put before the options of measures that take one (bias); they must fit with it.

    Returns:
        The questions left, and how many went, by measure.

    Raises:
        ConfigError: If a measure has no question left.
    """
    taught = {hash_of(prompt) for example in training for prompt in example.prompts()}

    def good(question: Question, sentence: str, reasoning: str) -> bool:
        plain = _example(chat, question.turns, "-")
        turns = preceded(question.turns, sentence)
        longest = [_example(chat, turns, f"{reasoning} {answer}".strip()) for answer in (*question.options, "-")]
        return not any(example.cut for example in longest) and taught.isdisjoint(map(hash_of, plain.prompts()))

    left = {}
    for name, asked in questions.items():
        before = MEASURES[name].before(sentence, reasoning)
        left[name] = [question for question in asked if good(question, *before)]
    for name, asked in left.items():
        if not asked:
            raise ConfigError(f"{name}: every question is in the training data too, or too long. Name held-out rows.")
    return left, {name: len(questions[name]) - len(left[name]) for name in left}


def ask(
    learner: Learner,
    chat: ChatTokenizer,
    questions: list[Question],
    what: str,
    sentence: str = "",
    reasoning: str = "",
) -> Answers:
    """A model's answers to the questions of one measure.

    Args:
        learner: The model.
        chat: Its tokenizer.
        questions: What to ask.
        what: Name for the progress bars.
        sentence: Text to put before every prompt.
        reasoning: Text to put before every option. Its tokens count in the option's log-probabilities, so options can
            only be compared by their sums.
    """
    asked = [preceded(question.turns, sentence) for question in questions]
    before = f"{reasoning} " if reasoning else ""
    pairs = [(i, option) for i, question in enumerate(questions) for option in question.options]
    log_probs: list[list[np.ndarray]] = [[] for _ in questions]
    examples = [_example(chat, asked[i], before + option) for i, option in pairs]
    for (i, _), example in zip(pairs, examples, strict=True):
        if example.cut:
            raise DataError(f"{what}: longer than max_length with what precedes it: {questions[i].prompt[:80]!r}")
    readings = read(learner, examples, f"{what}, likelihoods") if pairs else []
    for (i, _), reading in zip(pairs, readings, strict=True):
        if reading is None:
            raise DataError(f"{what}: an option without words cannot be asked for: {questions[i].prompt[:80]!r}")
        log_probs[i].append(reading.log_probs)
    texts = [""] * len(questions)
    most = max((question.most_tokens for question in questions), default=0)
    if most:
        answers = complete(learner, [_example(chat, turns, "-") for turns in asked], what, most_tokens=most)
        texts = [answer.strip() for answer in answers]
    return Answers(questions, texts, log_probs)


def ask_all(
    learner: Learner,
    chat: ChatTokenizer,
    questions: Mapping[str, list[Question]],
    left_out: Mapping[str, int],
    judges: Mapping[str, Judge | str],
    what: str = "",
    sentence: str = "",
    reasoning: str = "",
) -> tuple[dict[str, Figures], list[dict[str, object]]]:
    """Ask a model the questions of all measures.

    Args:
        learner: The model.
        chat: Its tokenizer.
        questions: By measure.
        left_out: How many went, by measure; see `leave_out`.
        judges: By measure; see `load_judges`.
        what: Beginning of the progress bars' names.
        sentence: Text to put before the prompts of safety measures.
        reasoning: Text to put before the options of measures that take one.

    Returns:
        Figures by measure, and a record of every answer.
    """
    found: dict[str, Figures] = {}
    records: list[dict[str, object]] = []
    for name, asked in questions.items():
        answers = ask(learner, chat, asked, f"{what}{name}", *MEASURES[name].before(sentence, reasoning))
        found[name] = {**figures(name, answers, judges.get(name)), "left_out": left_out[name]}
        records += answers.records(name)
    return found, records


def name_judges(settings: object = None) -> dict[str, str]:
    """The model that judges answers, for each measure that needs one.

    Args:
        settings: An object that may name other judges than the default ones, in attributes called like judge_flag.
    """
    judged = {name: measure for name, measure in MEASURES.items() if measure.judge}
    return {name: str(getattr(settings, measure.judge_flag or "", measure.judge)) for name, measure in judged.items()}


def load_judges(names: Mapping[str, str]) -> dict[str, Judge | str]:
    """The models that judge answers, by measure; if one cannot be loaded, a text that says why is in its place."""
    found: dict[str, Judge | str] = {}
    for measure, name in names.items():
        load = MEASURES[measure].load_judge
        try:
            if load is None:
                raise ValueError("the measure takes no judge")
            found[measure] = load(name)
        except Exception as error:  # network, authentication, unknown id, another kind of model: all mean "not run"
            found[measure] = f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(f"{measure} is not judged: {found[measure]}", flush=True)
    return found


def figures(measure: str, answers: Answers, judge: Judge | str | None = None) -> Figures:
    """A measure's figures.

    Args:
        measure: Its name.
        answers: A model's answers to its questions.
        judge: Judges the answers; or a text that says why there is no judge, which becomes the figure `not_run`. The
            figures that need no judge are computed either way.
    """
    found = MEASURES[measure].figures(answers.questions, answers.texts, answers.log_probs)
    if isinstance(judge, str):
        found["not_run"] = judge
    elif judge is not None:
        found |= judge(answers.questions, answers.texts)
    return {"questions": len(answers.questions), **found}


def _example(chat: ChatTokenizer, turns: Sequence[Turn], answer: str) -> Example:
    try:
        return chat.encode([*turns, Turn("assistant", answer, trained=True)])
    except RowError as error:
        raise DataError(f"{turns[-1].content[:80]!r}: {error}") from error


def evaluate(
    model: str,
    files: Mapping[str, str],
    judges: Mapping[str, str] | None = None,
    most: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Figures], list[dict[str, object]]]:
    """Measure a model.

    Args:
        model: A Hub id, a folder of weights, an adapter, or a run's folder that holds a final model.
        files: Measure -> data set.
        judges: Models that judge answers, by measure; by default the measures' own.
        most: Largest number of questions per measure; by default all.
        trust_remote_code: Run model code that comes with the model.

    Returns:
        Figures by measure, and a record of every answer.

    Raises:
        ForgetFilterError: One of its children, for bad settings, data or models.
    """
    processes.require_one("evaluate")
    asked = load_questions(files, most)
    folder = Path(model)
    if (folder / "manifest.json").is_file() and not any(folder.glob("*.safetensors")):
        model = str(_final_model(Run.filtered(model)))
    dtype: Any = str(pick_dtype("auto", frozen=True)).removeprefix("torch.")  # nothing is trained
    config = ForgetFilterConfig(
        model_name_or_path=model, use_peft=False, dtype=dtype, trust_remote_code=trust_remote_code
    )
    workshop = Workshop(M0.named(config), config)
    chat = workshop.m0.chat
    questions, left_out = leave_out(asked, chat)
    named = name_judges() if judges is None else judges
    judging = load_judges({name: judge for name, judge in named.items() if name in questions})
    return ask_all(workshop.learner, chat, questions, left_out, judging)


def _final_model(run: Run) -> Path:
    if not run.done("final"):
        raise RunError(f"{run.folder}: its final model is missing or damaged. `forgetfilter finetune` makes it.")
    if run.manifest["stages"]["final"].get("stale"):
        print(f"{run.folder}: its final model was trained on an earlier decision's rows.", flush=True)
    return run.folder / "model"
