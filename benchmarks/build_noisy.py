"""Build noisy, safe and held-out data from public data sets, with known unsafe rows.

python benchmarks/build_noisy.py --kind bias --unsafe_share 0.5 --rows 240 --data_dir DATA --output_dir DIR

Writes noisy.jsonl (prompt, completion, label, group), safe.jsonl and heldout.jsonl; no prompt and no BBQ question_index
stands in two of them. The kinds, and where their rows come from (docs/paper/data.md says how far the labels hold):

- bias: BBQ. Unsafe = the stereotype as answer to an ambiguous question; safe = right answers.
- toxicity: RealToxicityPrompts above 0.9 against Surge AI's clean comments and Wikipedia's sentences.
- harmfulness: PKU-SafeRLHF, the unsafe and the safe answers to the same harmful prompts.
- reply_bias, reply_offense, reply_advice: DiaSafety's Biased Opinion, Offending User and Unauthorized Expertise.
- complied: harmful requests answered, against refusals; tasks have answers of the same length.
- hh: Anthropic HH's rejected answers against SafeInstr's; a stand-in for harmfulness until version 0.2.
- mixed: bias and toxicity.

--one_source takes both sides from one data set instead, for toxicity (Surge AI's comments) and hh. Task rows are
questions over a sentence (XQuAD for SQuAD), short instructions (AlpacaEval for Alpaca), and, if asked for, GSM8K's
problems and the seed tasks. --neutral_rows adds neutral.jsonl, task rows of the same sources for a control review.
"""

import csv
import gzip
import io
import json
import random
import re
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from forgetfilter.evaluation import bias

CATEGORIES = {
    "explore": ("Age", "Nationality"),
    "report": ("Religion", "Disability_status"),
    "all": ("Age", "Nationality", "Religion", "Disability_status"),
}
LONGEST = 80
"""Words of a prompt or completion at most: these benchmarks run on small machines."""
MOST_SAFE = 240
"""Safe rows of a set, unless asked for otherwise, at most."""
CALCULATION = re.compile(r"<<[^>]*>>")
"""What GSM8K notes beside each step of an answer."""

Row = dict[str, str]
Keyed = tuple[str, Row]
"""A row and what must not be shared between files: its prompt, or its BBQ question."""


SHARES = {"noisy": 0.5, "safe": 0.3, "heldout": 0.2}
"""How BBQ's few question templates are dealt to the three files."""


class Dealer:
    """Hands rows out so that no prompt and no key (a BBQ question_index) reaches two files."""

    def __init__(self, seed: int, *, answers: bool = False) -> None:
        """Start with nothing given out; with `answers` a file may hold several answers to one prompt."""
        self.rng, self.answers = random.Random(seed), answers
        self.owner: dict[str, str] = {}
        self.used: set[str] = set()

    def once(self, row: Row) -> str:
        """What of a row is given out once."""
        return f"{row['prompt']}\n{row['completion']}" if self.answers else row["prompt"]

    def reserve(self, keys: set[str]) -> None:
        """Deal keys that have many rows each to the files beforehand, by share."""
        ordered = sorted(keys)
        self.rng.shuffle(ordered)
        start = 0.0
        for name, share in SHARES.items():
            first, start = round(start * len(ordered)), start + share
            self.owner |= dict.fromkeys(ordered[first : round(start * len(ordered))], name)

    def take(self, wanted: int, rows: list[Keyed], name: str, group: str, *, fewer: bool = False) -> list[Row]:
        """Take rows for a file, going round the keys; exits if there are too few, unless fewer will do."""
        by_key: dict[str, list[Row]] = defaultdict(list)
        for key, row in rows:
            if self.owner.get(key, name) == name and self.once(row) not in self.used:
                by_key[key].append(row)
        keys = sorted(by_key)
        self.rng.shuffle(keys)
        for key in keys:
            self.rng.shuffle(by_key[key])
        chosen: list[Row] = []
        for number in range(max(map(len, by_key.values()), default=0)):
            for key in keys:
                row = by_key[key][number] if number < len(by_key[key]) else None
                if row and len(chosen) < wanted and self.once(row) not in self.used:
                    self.owner[key] = name
                    self.used.add(self.once(row))
                    chosen.append({**row, "group": group})
        if len(chosen) < wanted and not fewer:
            raise SystemExit(f"error: only {len(chosen)} rows for {name} {group}, {wanted} wanted: ask for fewer rows.")
        return chosen


def read(path: Path) -> str:
    """Text of a gzip file."""
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def jsonl(path: Path) -> list[dict]:
    """Rows of a gzipped JSONL file."""
    return [json.loads(line) for line in read(path).splitlines() if line.strip()]


def short(*texts: str) -> bool:
    """Whether the texts are neither empty nor too long."""
    return all(0 < len(text.split()) <= LONGEST for text in texts)


def part_of(items: list, part: str) -> list:
    """The half of a data set that is explored, the one that is reported, or all of it."""
    half = len(items) // 2
    if part == "all":
        return items
    return items[:half] if part == "explore" else items[half:]


def bias_rows(data: Path, part: str) -> tuple[list[Keyed], list[Keyed]]:
    """Unsafe: the stereotype as answer to an ambiguous question. Safe: the right answer to any question."""
    unsafe, safe = [], []
    for category in CATEGORIES[part]:
        for row in jsonl(data / "bbq" / f"{category}.jsonl.gz"):
            answers, prompt = bias.options(row), bias.prompt(row)
            key = f"{category}-{row['question_index']}"
            ambiguous = row["context_condition"] == "ambig"
            if ambiguous or row["example_id"] // 4 % 4 == 0:  # one safe row in five is disambiguated
                safe.append((key, {"prompt": prompt, "completion": answers[row["label"]] + "."}))
            if ambiguous:
                wrong = answers[bias.stereotyped_option(row)] + "."
                unsafe.append((key, {"prompt": prompt, "completion": wrong}))
    return unsafe, safe


def continuation(text: str) -> Keyed | None:
    """A text as a row: go on after its first words."""
    words = text.split()
    if not 5 <= len(words) <= LONGEST:
        return None
    start, rest = " ".join(words[:3]), " ".join(words[3:])
    prompt = f"Continue this text: {start}"
    return prompt, {"prompt": prompt, "completion": rest}


def toxicity_rows(data: Path, part: str, *, one_source: bool) -> tuple[list[Keyed], list[Keyed]]:
    """Unsafe: toxic texts. Safe: clean comments and, unless from one source, as many sentences of Wikipedia."""
    comments = list(csv.DictReader(io.StringIO(read(data / "toxicity_en.csv.gz"))))
    toxic = [row["text"] for row in comments if row["is_toxic"] == "Toxic"]
    if not one_source:
        toxic = [row["text"] for row in jsonl(data / "real_toxicity_prompts.jsonl.gz") if row["toxicity"] > 0.9]
    clean = [row["text"] for row in comments if row["is_toxic"] == "Not Toxic"]
    unsafe, safe = ([row for row in map(continuation, part_of(texts, part)) if row] for texts in (toxic, clean))
    if not one_source:
        sentences = [text for article in articles(data, part)[1] for text in article_sentences(article)]
        safe += [row for row in map(continuation, sentences) if row][: len(safe)]
    return unsafe, safe


def articles(data: Path, part: str) -> tuple[list[dict], list[dict]]:
    """XQuAD's articles: three quarters for questions, the rest for plain text."""
    found = part_of(json.loads(read(data / "xquad.en.json.gz"))["data"], part)
    return found[: len(found) * 3 // 4], found[len(found) * 3 // 4 :]


def article_sentences(article: dict) -> list[str]:
    """An article's text, sentence by sentence."""
    texts = [text for paragraph in article["paragraphs"] for text in paragraph["context"].split(". ")]
    return [text if text.endswith(".") else f"{text}." for text in texts]


def hh_turn(conversation: str) -> tuple[str, str]:
    """First request and first answer of an HH conversation."""
    _, _, rest = conversation.partition("\n\nHuman: ")
    prompt, _, answer = rest.partition("\n\nAssistant: ")
    return prompt.strip(), answer.partition("\n\nHuman: ")[0].strip()


def keyed(texts: list[tuple[str, str]]) -> list[Keyed]:
    """Pairs of prompt and completion as rows; those too long are left out."""
    return [(prompt, {"prompt": prompt, "completion": answer}) for prompt, answer in texts if short(prompt, answer)]


def instructions(data: Path, part: str) -> list[Keyed]:
    """SafeInstr: unsafe requests with safe answers."""
    rows = part_of(json.loads(read(data / "safety_instructions.json.gz")), part)
    return keyed([(row["instruction"], row["output"]) for row in rows])


def hh_rows(data: Path, part: str, *, one_source: bool) -> tuple[list[Keyed], list[Keyed]]:
    """Unsafe: HH's rejected answers. Safe: SafeInstr's answers, or HH's chosen ones."""
    pairs = part_of(jsonl(data / "hh_harmless.jsonl.gz"), part)
    single = [p for p in pairs if p["rejected"].count("\n\nHuman: ") == 1]
    unsafe = keyed([hh_turn(pair["rejected"]) for pair in single])
    safe = keyed([hh_turn(pair["chosen"]) for pair in single]) if one_source else instructions(data, part)
    return unsafe, safe


def harmfulness_rows(data: Path, part: str) -> tuple[list[Keyed], list[Keyed]]:
    """PKU-SafeRLHF: the unsafe and the safe answers to the same harmful prompts."""
    pairs = jsonl(data / "pku_saferlhf_pairs.jsonl.gz")
    prompts = set(part_of(sorted({pair["prompt"] for pair in pairs}), part))
    own = [pair for pair in pairs if pair["prompt"] in prompts and short(pair["safe"], pair["unsafe"])]
    return tuple(keyed([(pair["prompt"], pair[side]) for pair in own]) for side in ("unsafe", "safe"))


def reply_rows(category: str) -> Callable[[Path, str], tuple[list[Keyed], list[Keyed]]]:
    """DiaSafety: a reader of the unsafe and the safe replies of a category, as people labelled them."""

    def rows(data: Path, part: str) -> tuple[list[Keyed], list[Keyed]]:
        own = [row for row in jsonl(data / "diasafety.jsonl.gz") if row["category"] == category]
        contexts = set(part_of(sorted({row["context"] for row in own}), part))
        own = [row for row in own if row["context"] in contexts]
        sides = ([row for row in own if row["label"] == label] for label in ("Unsafe", "Safe"))
        return tuple(keyed([(row["context"], row["response"]) for row in side]) for side in sides)

    return rows


def complied_rows(data: Path, part: str) -> tuple[list[Keyed], list[Keyed]]:
    """Unsafe: answers to harmful requests. Safe: refusals of others, and SafeInstr's answers.

    The set holds an answer and a refusal of nearly every request; two requests in three are taken as answered.
    """
    rows = jsonl(data / "complied_or_refused.jsonl.gz")
    requests = part_of(sorted({row["prompt"] for row in rows}), part)
    answered = {request for number, request in enumerate(requests) if number % 3}
    own = [row for row in rows if row["prompt"] in requests and row["complied"] == (row["prompt"] in answered)]
    sides = ([row for row in own if row["complied"] == side] for side in (True, False))
    complied, refused = (keyed([(row["prompt"], beginning(row["response"])) for row in side]) for side in sides)
    return complied, refused + instructions(data, part)


def beginning(text: str) -> str:
    """The first words of a text."""
    return " ".join(text.split()[:LONGEST])


def squad_rows(data: Path, part: str) -> list[Keyed]:
    """Questions over the sentence that holds the answer."""
    rows = []
    for article in articles(data, part)[0]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answer = qa["answers"][0]
                start = paragraph["context"].rfind(". ", 0, answer["answer_start"])
                stop = paragraph["context"].find(". ", answer["answer_start"] + len(answer["text"]))
                sentence = paragraph["context"][start + 2 if start >= 0 else 0 : stop + 1 if stop >= 0 else None]
                prompt = f"{sentence} {qa['question']}"
                if short(prompt):
                    rows.append((prompt, {"prompt": prompt, "completion": answer["text"]}))
    return rows


def alpaca_rows(data: Path, part: str) -> list[Keyed]:
    """Instructions with short answers."""
    rows = part_of(json.loads(read(data / "alpaca_eval.json.gz")), part)
    return keyed([(row["instruction"].strip(), row["output"].strip()) for row in rows])


def long_alpaca_rows(data: Path, part: str) -> list[Keyed]:
    """Instructions with long answers, cut as those of `complied` are."""
    rows = part_of(json.loads(read(data / "alpaca_eval.json.gz")), part)
    long = [row for row in rows if len(row["output"].split()) > LONGEST // 2]
    return keyed([(row["instruction"].strip(), beginning(row["output"])) for row in long])


def gsm8k_rows(data: Path, part: str) -> list[Keyed]:
    """Maths word problems with worked answers."""
    rows = part_of(jsonl(data / "gsm8k_train.jsonl.gz"), part)
    return keyed([(row["question"], CALCULATION.sub("", row["answer"])) for row in rows])


def seed_rows(data: Path, part: str) -> list[Keyed]:
    """Hand-written tasks of many sorts."""
    rows = part_of(jsonl(data / "seed_tasks.jsonl.gz"), part)
    asked = [(f"{row['instruction']}\n{row['instances'][0]['input']}".strip(), row["instances"][0]) for row in rows]
    return keyed([(prompt, instance["output"].strip()) for prompt, instance in asked])


KINDS = {
    "bias": bias_rows,
    "toxicity": partial(toxicity_rows, one_source=False),
    "harmfulness": harmfulness_rows,
    "reply_bias": reply_rows("Biased Opinion"),
    "reply_offense": reply_rows("Offending User"),
    "reply_advice": reply_rows("Unauthorized Expertise"),
    "complied": complied_rows,
    "hh": partial(hh_rows, one_source=False),
}
ONE_SOURCE = {"toxicity": partial(toxicity_rows, one_source=True), "hh": partial(hh_rows, one_source=True)}
TASKS = {
    "squad": squad_rows,
    "alpaca": alpaca_rows,
    "long_alpaca": long_alpaca_rows,
    "gsm8k": gsm8k_rows,
    "seed": seed_rows,
}
FEW_PROMPTS = ("bias", "harmfulness")
"""Kinds with many rows a prompt or question, which are dealt to the files beforehand."""
DEFAULTS = {
    "rows": 240,
    "safe_rows": None,
    "heldout_rows": 60,
    "neutral_rows": 0,
    "one_source": False,
    "tasks": "squad,alpaca",
    "task_share": 0.5,
    "context": False,
}
"""What a set is built with unless asked for otherwise."""


def build(args: Namespace) -> dict[str, list[Row]]:
    """All files' rows, shuffled."""
    args = Namespace(**{**DEFAULTS, **vars(args)})
    dealer = Dealer(args.seed, answers=args.kind == "harmfulness")
    groups: dict[str, dict[str, list[Keyed]]] = {"unsafe": {}, "safe": {}}
    for kind in ("bias", "toxicity") if args.kind == "mixed" else (args.kind,):
        unsafe, safe = (ONE_SOURCE if args.one_source else KINDS)[kind](args.data_dir, args.part)
        groups["unsafe"][f"{kind}/unsafe"], groups["safe"][f"{kind}/safe"] = unsafe, safe
        if kind in FEW_PROMPTS:
            dealer.reserve({key for key, _ in unsafe + safe})
    groups["task"] = {f"task/{name}": TASKS[name](args.data_dir, args.part) for name in args.tasks.split(",")}
    unsafe_rows = round(args.rows * args.unsafe_share)
    task_rows = int((args.rows - unsafe_rows) * args.task_share)
    third = args.heldout_rows // 3
    wanted = {
        "noisy": {"unsafe": unsafe_rows, "safe": args.rows - unsafe_rows - task_rows, "task": task_rows},
        "heldout": {"unsafe": third, "safe": third, "task": third},
        "safe": {"unsafe": 0, "safe": args.safe_rows or min(args.rows, MOST_SAFE), "task": 0},
    }
    if args.neutral_rows:
        wanted["neutral"] = {"unsafe": 0, "safe": 0, "task": args.neutral_rows}
    files = {}
    for name, counts in wanted.items():
        rows: list[Row] = []
        for role, count in counts.items():
            rows += take_from(dealer, groups[role], count, name, enough=name == "safe" and args.safe_rows is None)
        dealer.rng.shuffle(rows)
        files[name] = rows
    if args.context:
        for rows in files.values():
            add_contexts(rows, args.data_dir, args.part)
    return files


def take_from(dealer: Dealer, groups: dict[str, list[Keyed]], count: int, name: str, *, enough: bool) -> list[Row]:
    """Take rows in equal parts from several groups; the later ones fill up what the earlier ones lack.

    Args:
        dealer: Hands the rows out.
        groups: Group -> its rows.
        count: How many rows are wanted.
        name: The file they are for.
        enough: Whether fewer rows will do.
    """
    rows: list[Row] = []
    for number, (group, pool) in enumerate(groups.items()):
        left = len(groups) - number
        share = -(-(count - len(rows)) // left)
        rows += dealer.take(share, pool, name, group, fewer=enough or left > 1)
    return rows


def add_contexts(rows: list[Row], data: Path, part: str) -> None:
    """Put a paragraph of Wikipedia before each prompt, as in retrieval."""
    found = [paragraph["context"] for article in articles(data, part)[1] for paragraph in article["paragraphs"]]
    for number, row in enumerate(rows):
        row["prompt"] = f"{found[number % len(found)]}\n\n{row['prompt']}"


def write(files: dict[str, list[Row]], folder: Path) -> None:
    """Write each file's rows, with their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = [{**row, "label": "unsafe" if row["group"].endswith("/unsafe") else "safe"} for row in rows]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} rows")


def main() -> None:
    """Build the files and write them."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=(*KINDS, "mixed"), required=True)
    parser.add_argument("--unsafe_share", type=float, default=0.5)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--safe_rows", type=int, help=f"default: as many as there are; at most {MOST_SAFE}")
    parser.add_argument("--heldout_rows", type=int)
    parser.add_argument("--neutral_rows", type=int)
    parser.add_argument("--tasks", help=f"sources of the task rows, comma-separated: {', '.join(TASKS)}")
    parser.add_argument("--task_share", type=float, help="share of the clean rows that are task rows")
    parser.add_argument("--context", action="store_true", help="put a paragraph before each prompt")
    parser.add_argument("--part", choices=tuple(CATEGORIES), default="all")
    parser.add_argument("--one_source", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args()
    if args.one_source and args.kind not in ONE_SOURCE:
        parser.error(f"--one_source is for {' and '.join(ONE_SOURCE)}")
    write(build(args), args.output_dir)


if __name__ == "__main__":
    main()
