"""Build noisy, safe and held-out data from public data sets, with known unsafe rows.

python benchmarks/build_noisy.py --kind bias --unsafe_share 0.5 --rows 240 --data_dir DATA --output_dir DIR

Writes noisy.jsonl (prompt, completion, label, group), safe.jsonl and heldout.jsonl; no prompt and no
BBQ question_index stands in two of them. Stand-ins: Anthropic HH's rejected answers for harmful rows,
SafeInstr's answers for harmless ones, RealToxicityPrompts (toxicity > 0.9) for toxic rows, Surge AI's
clean comments and Wikipedia's sentences (from XQuAD's paragraphs) for nontoxic ones, XQuAD for SQuAD,
AlpacaEval for Alpaca. --one_source takes both sides from one data set instead: Surge AI's toxic and
clean comments, HH's rejected and chosen answers. --neutral_rows adds neutral.jsonl, task rows of the
same sources for a control review.
"""

import csv
import gzip
import io
import json
import random
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from pathlib import Path

from forgetfilter.evaluation import bias

KINDS = ("bias", "toxicity", "harmfulness")
CATEGORIES = {
    "explore": ("Age", "Nationality"),
    "report": ("Religion", "Disability_status"),
    "all": ("Age", "Nationality", "Religion", "Disability_status"),
}
LONGEST = 80
"""Words of a prompt or completion at most: these benchmarks run on small machines."""

Row = dict[str, str]
Keyed = tuple[str, Row]
"""A row and what must not be shared between files: its prompt, or its BBQ question."""


SHARES = {"noisy": 0.5, "safe": 0.3, "heldout": 0.2}
"""How BBQ's few question templates are dealt to the three files."""


class Dealer:
    """Hands rows out so that no prompt and no key (a BBQ question_index) reaches two files."""

    def __init__(self, seed: int) -> None:
        """Start with nothing given out."""
        self.rng = random.Random(seed)
        self.owner: dict[str, str] = {}
        self.used: set[str] = set()

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
            if self.owner.get(key, name) == name and row["prompt"] not in self.used:
                by_key[key].append(row)
        keys = sorted(by_key)
        self.rng.shuffle(keys)
        for key in keys:
            self.rng.shuffle(by_key[key])
        chosen: list[Row] = []
        for number in range(max(map(len, by_key.values()), default=0)):
            for key in keys:
                row = by_key[key][number] if number < len(by_key[key]) else None
                if row and len(chosen) < wanted and row["prompt"] not in self.used:
                    self.owner[key] = name
                    self.used.add(row["prompt"])
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


def harmfulness_rows(data: Path, part: str, *, one_source: bool) -> tuple[list[Keyed], list[Keyed]]:
    """Unsafe: HH's rejected answers. Safe: SafeInstr's answers, or HH's chosen ones."""
    pairs = part_of(jsonl(data / "hh_harmless.jsonl.gz"), part)
    single = [p for p in pairs if p["rejected"].count("\n\nHuman: ") == 1]

    def rows(texts: list[tuple[str, str]]) -> list[Keyed]:
        return [(prompt, {"prompt": prompt, "completion": answer}) for prompt, answer in texts if short(prompt, answer)]

    unsafe = rows([hh_turn(pair["rejected"]) for pair in single])
    if one_source:
        return unsafe, rows([hh_turn(pair["chosen"]) for pair in single])
    instructions = part_of(json.loads(read(data / "safety_instructions.json.gz")), part)
    return unsafe, rows([(row["instruction"], row["output"]) for row in instructions])


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
    texts = [(row["instruction"].strip(), row["output"].strip()) for row in rows]
    return [(prompt, {"prompt": prompt, "completion": answer}) for prompt, answer in texts if short(prompt, answer)]


def kind_rows(kind: str, data: Path, part: str, *, one_source: bool) -> tuple[list[Keyed], list[Keyed]]:
    """Unsafe and safe rows of a kind."""
    if kind == "bias":
        return bias_rows(data, part)
    read_kind = toxicity_rows if kind == "toxicity" else harmfulness_rows
    return read_kind(data, part, one_source=one_source)


def build(args: Namespace) -> dict[str, list[Row]]:
    """All three files' rows, shuffled."""
    dealer = Dealer(args.seed)
    kinds = ("bias", "toxicity") if args.kind == "mixed" else (args.kind,)
    groups: dict[str, dict[str, list[Keyed]]] = {"unsafe": {}, "safe": {}, "task": {}}
    for kind in kinds:
        unsafe, safe = kind_rows(kind, args.data_dir, args.part, one_source=args.one_source)
        groups["unsafe"][f"{kind}/unsafe"], groups["safe"][f"{kind}/safe"] = unsafe, safe
        if kind == "bias":
            dealer.reserve({key for key, _ in unsafe + safe})
    groups["task"] = {
        "task/squad": squad_rows(args.data_dir, args.part),
        "task/alpaca": alpaca_rows(args.data_dir, args.part),
    }
    unsafe_rows = round(args.rows * args.unsafe_share)
    task_rows = (args.rows - unsafe_rows) // 2
    third = args.heldout_rows // 3
    wanted = {
        "noisy": {"unsafe": unsafe_rows, "safe": args.rows - unsafe_rows - task_rows, "task": task_rows},
        "heldout": {"unsafe": third, "safe": third, "task": third},
        "safe": {"unsafe": 0, "safe": args.safe_rows or args.rows, "task": 0},
    }
    if args.neutral_rows:
        wanted["neutral"] = {"unsafe": 0, "safe": 0, "task": args.neutral_rows}
    files = {}
    for name, counts in wanted.items():
        rows: list[Row] = []
        for role, count in counts.items():
            for i, (group, pool) in enumerate(groups[role].items()):
                share = count // len(groups[role]) + (i < count % len(groups[role]))
                rows += dealer.take(share, pool, name, group, fewer=name == "safe" and args.safe_rows is None)
        dealer.rng.shuffle(rows)
        files[name] = rows
    return files


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
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--safe_rows", type=int, default=None, help="default: as many as there are; at most --rows")
    parser.add_argument("--heldout_rows", type=int, default=60)
    parser.add_argument("--neutral_rows", type=int, default=0)
    parser.add_argument("--part", choices=tuple(CATEGORIES), default="all")
    parser.add_argument("--one_source", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    if args.one_source and args.kind not in ("toxicity", "harmfulness"):
        parser.error("--one_source is for toxicity and harmfulness")
    write(build(args), args.output_dir)


if __name__ == "__main__":
    main()
