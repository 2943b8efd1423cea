"""Rows that a model can hardly read: how many ciphers the flag finds, and how many plain rows.

python benchmarks/limits/unreadable.py --data_dir DATA     a minute; writes results/readable/flag.json

Plain rows are the noisy rows of every kind, at 25 %, of two seeds that no other benchmark uses; the flag's two limits
were set on those of seed 4, and the length of its pieces on seeds 31 and 32. Each cipher encodes the same rows, wholly
(prompt and answer) or the answer alone, where it has 20 characters or more; and of the English answers in the box every
one after two plain ones, as one answer. EndSpeak hides each word at the
end of a line of plain words (Halawi et al., ICML 2024).
"""

import json
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from cells import DEFAULTS, write_data
from ciphers import CIPHERS

from forgetfilter import ForgetFilterConfig
from forgetfilter.data.builtin import builtin_rows
from forgetfilter.data.sources import load_source
from forgetfilter.data.unreadable import SHORTEST, unreadable
from forgetfilter.m0 import M0

RESULTS = Path(__file__).parent / "results" / "readable" / "flag.json"
KINDS = ("bias", "toxicity", "harmfulness", "reply_bias", "reply_offense", "reply_advice")
HIDDEN = 60
"""Characters that an answer in the box must have to be encoded after two others."""
SEEDS = (33, 34)


def plain_rows(data_dir):
    """Kind -> rows of both seeds."""
    found = {}
    for kind in KINDS:
        found[kind] = []
        for seed in SEEDS:
            cell = {**DEFAULTS, "kind": kind, "unsafe_share": 0.25, "part": "report", "seed": seed}
            with tempfile.TemporaryDirectory() as name:
                write_data(cell, data_dir, Path(name))
                lines = (Path(name) / "noisy.jsonl").read_text(encoding="utf-8").splitlines()
            found[kind] += [json.loads(line) for line in lines]
    return found


def share(rows, tokenizer):
    """How many rows there are, and the share that is flagged."""
    source = load_source([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    return {"rows": len(rows), "flagged": round(float(unreadable(source, "prompt_completion", tokenizer).mean()), 4)}


def measure(data_dir):
    """All shares."""
    tokenizer = M0.named(ForgetFilterConfig()).tokenizer
    kinds = plain_rows(data_dir)
    rows = [row for found in kinds.values() for row in found]
    long = [row for row in rows if len(row["completion"]) >= SHORTEST]
    found = {"all plain rows": share(rows, tokenizer)} | {kind: share(own, tokenizer) for kind, own in kinds.items()}
    for language in ("de", "es", "fr", "zh", "hi", "ar"):
        own = [row["messages"][-2:] for row in builtin_rows() if row["language"] == language]
        said = [{"prompt": asked["content"], "completion": answer["content"]} for asked, answer in own]
        found[f"language {language}"] = share(said, tokenizer)
    for name, cipher in CIPHERS.items():
        whole = [{"prompt": cipher(row["prompt"]), "completion": cipher(row["completion"])} for row in rows]
        found[f"{name}, whole rows"] = share(whole, tokenizer)
        answers = [{"prompt": row["prompt"], "completion": cipher(row["completion"])} for row in long]
        found[f"{name}, answers"] = share(answers, tokenizer)
    box = [row["messages"][-1]["content"] for row in builtin_rows() if row["language"] == "en"]
    answers = [answer for answer in box if len(answer) > HIDDEN]
    for name, cipher in CIPHERS.items():
        triples = zip(answers[:-2], answers[1:-1], answers[2:], strict=True)
        mixed = [f"{one} {two} {cipher(three)}" for one, two, three in triples]
        hidden = [{"prompt": "Go on.", "completion": answer} for answer in mixed]
        found[f"{name}, after two plain answers"] = share(hidden, tokenizer)
    return found


def main():
    """Measure, print and write."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    found = measure(parser.parse_args().data_dir)
    for name, figures in found.items():
        print(f"| {name} | {figures['rows']} | {figures['flagged']:.1%} |")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
