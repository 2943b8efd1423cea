"""What the filter costs, as ratios of pairs measured in turn: `make bench`, or with names of parts.

python benchmarks/speed/run.py [--parts scoring training filter score memory peak growth many] [--rounds 5]
                               [--dataset_name FILE --safe_dataset_name FILE]

Each pair is run in turn, round after round, in one process, so that a busy machine slows both; memory
and growth take a process a measurement. Results go to benchmarks/speed/results/, a JSON a device and data set.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from forgetfilter import ForgetFilter, ForgetFilterConfig, Result, StageConfig
from forgetfilter.config import NOISY_EPOCHS
from forgetfilter.data.loading import load_rows
from forgetfilter.data.tokenization import Example, mean_length
from forgetfilter.demo import demo_file
from forgetfilter.m0 import M0
from forgetfilter.model.batches import PACKED, label_logits
from forgetfilter.model.generation import MARGIN, complete
from forgetfilter.model.learner import Learner
from forgetfilter.model.reading import read
from forgetfilter.model.training import train
from forgetfilter.model.weights import pick_device, pick_dtype
from forgetfilter.new_rows import score
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop

STEPS = 12
"""Optimiser steps of a training round."""
SCORED, ONE_BY_ONE = 192, 12
"""Rows of a scoring round, and how many of them are generated one by one, other ones each round."""
FILTERED = 96
"""Noisy rows that forgetting sees in the filter, score and memory parts."""
COPIES = 4
"""How often `score` reads the noisy rows in a round."""
GROWTH = (500, 2000, 8000, 16000)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of what the rounds gave."""
    middle, lowest, highest = (round(f(values), 3) for f in (statistics.median, min, max))
    return {"median": middle, "lowest": lowest, "highest": highest, "rounds": len(values)}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of some work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Bench:
    """The embedded model with a trained adapter, and rows to work on."""

    def __init__(self, args: Namespace) -> None:
        """Load everything once."""
        self.args = args
        self.config = ForgetFilterConfig(
            dataset_name=args.dataset_name, safe_dataset_name=args.safe_dataset_name, torch_compile=True
        )
        self.m0 = M0.named(self.config)
        self.rows = load_rows(args.dataset_name, "dataset_name", self.m0.chat, self.config)
        self.examples = self.rows.trainable()

    @cached_property
    def learner(self) -> Learner:
        """M0 with an adapter, in memory once a part needs it."""
        learner = Workshop(self.m0, self.config).learner
        learner.prepare(1)
        return learner

    def train(self, examples: Sequence[Example], steps: int) -> None:
        """Train the learner on from where it is."""
        settings = dataclasses.replace(self.config.noisy_stage(len(examples)), max_steps=steps)
        with tempfile.TemporaryDirectory() as folder:
            train(self.learner, examples, settings, Path(folder), "bench")

    def scoring(self) -> dict[str, object]:
        """(a) rouge1 and (b) log_likelihood against greedy generation one row at a time, by stock generate."""
        self.train(self.examples, 2 * len(self.examples) // 8)
        rows = self.examples[:SCORED]

        def log_likelihood() -> float:
            return seconds(lambda: read(self.learner, rows, "log_likelihood"))

        def rouge1() -> float:
            def work() -> None:
                favourites = [reading.favourites for reading in read(self.learner, rows, "rouge1") if reading]
                complete(self.learner, rows, "rouge1", favourites)

            return seconds(work)

        def one_by_one(number: int) -> float:
            """An even choice of the rows, in proportion: the slowest part of all."""
            share = max(1, len(rows) // ONE_BY_ONE)
            chosen = rows[number % share :: share]
            return seconds(lambda: self.generate(chosen)) * len(rows) / len(chosen)

        one_by_one(0), rouge1(), log_likelihood()
        rounds = [(one_by_one(number), rouge1(), log_likelihood()) for number in range(self.args.rounds)]
        return {
            "a_rouge1_vs_one_by_one": spread([one / ours for one, ours, _ in rounds]),
            "b_log_likelihood_vs_one_by_one": spread([one / ours for one, _, ours in rounds]),
            "mean_row_tokens": round(mean_length(rows), 1),
            "mean_answer_tokens": round(mean_length(rows) - statistics.mean(row.prompt_length for row in rows), 1),
        }

    def generate(self, rows: Sequence[Example]) -> None:
        """Stock greedy generation one row at a time, each stopped where ours is; by stock attention."""
        model = self.learner.model.eval()
        model.set_attn_implementation("sdpa")
        with torch.compiler.set_stance("force_eager"), self.learner.mixed:
            for row in rows:
                prompt = torch.tensor([row.input_ids[: row.prompt_length]], device=model.device)
                most = len(row.input_ids) - row.prompt_length + MARGIN
                model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=most,
                    do_sample=False,
                    pad_token_id=self.m0.tokenizer.pad_token_id,
                    eos_token_id=self.m0.tokenizer.eos_token_id,
                )
        model.set_attn_implementation(PACKED)

    def stock(self, **length: float) -> float:
        """Seconds of stock TRL finetuning of M0 on the same rows: same batch, adapter, dtype and rates."""
        settings = self.config.noisy_stage(len(self.examples))
        with tempfile.TemporaryDirectory() as folder:
            model = AutoModelForCausalLM.from_pretrained(self.m0.folder, dtype=pick_dtype("auto", frozen=True))
            data = Dataset.from_list(
                [
                    {
                        "prompt": [{"role": "user", "content": row["prompt"]}],
                        "completion": [{"role": "assistant", "content": row["completion"]}],
                    }
                    for row in self.rows.source.rows()
                ]
            )
            trainer = SFTTrainer(
                model,
                args=SFTConfig(
                    output_dir=folder,
                    learning_rate=settings.learning_rate,
                    per_device_train_batch_size=settings.per_device_train_batch_size,
                    use_cpu=pick_device().type == "cpu",
                    gradient_checkpointing=False,
                    report_to="none",
                    disable_tqdm=True,
                    save_strategy="no",
                    **length,
                ),
                train_dataset=data,
                processing_class=self.m0.tokenizer,
                peft_config=LoraConfig(
                    r=self.config.lora_r, lora_alpha=self.config.lora_alpha, target_modules="all-linear"
                ),
            )
            return seconds(trainer.train)

    def training(self) -> dict[str, object]:
        """(c) training tokens a second against stock TRL: both train so many steps on the same rows."""
        self.train(self.examples, STEPS)
        rounds = [
            (self.stock(max_steps=STEPS), seconds(lambda: self.train(self.examples, STEPS)))
            for _ in range(self.args.rounds)
        ]
        return {"c_training_vs_stock_trl": spread([stock / ours for stock, ours in rounds])}

    def fit(self, folder: str, rows: int | None = FILTERED) -> Result:
        """A whole filter on so many noisy rows (None: all), of which forgetting sees FILTERED."""
        noisy = list(self.rows.source.rows())[:rows]
        safe = [json.loads(line) for line in Path(self.args.safe_dataset_name).read_text().splitlines()][:FILTERED]
        config = ForgetFilterConfig(output_dir=f"{folder}/run", sample_rows=FILTERED, torch_compile=True)
        return ForgetFilter(config).fit(noisy, safe)

    def filter_once(self, rows: int | None = FILTERED) -> float:
        """Seconds of a whole filter, loading of the model included."""
        with tempfile.TemporaryDirectory() as folder:
            return seconds(lambda: self.fit(folder, rows))

    def filter(self) -> dict[str, object]:
        """(d) a filter against one plain finetuning with as many epochs, by stock TRL; (h) the same by a sample.

        In (h) the filter has all rows, of which forgetting sees FILTERED, and the finetuning is as much longer.
        """
        steps = NOISY_EPOCHS * -(-FILTERED // 8)
        rounds = [
            (self.filter_once(), self.filter_once(None), self.stock(max_steps=steps)) for _ in range(self.args.rounds)
        ]
        count = len(self.examples)
        sampled = [by_sample / (stock * count / FILTERED) for _, by_sample, stock in rounds]
        return {
            "d_filter_vs_stock_trl": spread([whole / stock for whole, _, stock in rounds]) | {"rows": FILTERED},
            "h_filter_by_sample_vs_stock_trl": spread(sampled) | {"rows": count, "sample_rows": FILTERED},
        }

    def score(self) -> dict[str, object]:
        """(i) `forgetfilter score` against one scoring pass of the whole model over the same rows."""
        with tempfile.TemporaryDirectory() as folder:
            run = self.fit(folder).run
            more = [{name: row[name] for name in ("prompt", "completion")} for row in self.rows.source.rows()] * COPIES

            def scored(number: int) -> float:
                found = json.loads((score(run, more, f"{folder}/scored-{number}") / "metrics.json").read_text())
                return found["seconds"]

            def passed() -> float:
                return seconds(lambda: read(self.learner, self.examples, "log_likelihood")) * COPIES

            passed()
            rounds = [(scored(number), passed()) for number in range(self.args.rounds)]
        return {
            "i_score_vs_scoring_pass": spread([ours / whole for ours, whole in rounds]),
            "i_score_rows_a_second": spread([len(more) / ours for ours, _ in rounds]),
        }

    def peak(self) -> dict[str, object]:
        """(f) share of the machine's matrix-product rate, on this model's shapes, that training and scoring reach."""

        def batch(size: int) -> dict[str, torch.Tensor]:
            rows = self.examples[:size]
            return self.learner.collate([row.input_ids for row in rows], [row.labels for row in rows])

        def step() -> None:
            with self.learner.mixed:
                logits, targets = label_logits(self.learner.model, training)
                loss = cross_entropy(logits.float(), targets)
            loss.backward()
            self.learner.model.zero_grad()

        def forward() -> None:
            with torch.no_grad(), self.learner.mixed:
                label_logits(self.learner.model, scoring)

        def operations(work: Callable[[], None]) -> int:
            with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
                work()
            return counter.get_total_flops()

        training, scoring = batch(8), batch(self.config.per_device_eval_batch_size)
        found: dict[str, object] = {}
        for name, work, inputs in (("f_training", step, training), ("f_scoring", forward, scoring)):
            tokens = int(inputs["input_ids"].numel())
            count = operations(work)
            work()
            rounds = [(count / seconds(work), matrix_rate(self.learner.model, tokens)) for _ in range(self.args.rounds)]
            rates = [round(peak / 1e9) for _, peak in rounds]
            shares = spread([own / peak for own, peak in rounds])
            found[f"{name}_share_of_peak"] = shares | {"tokens": tokens, "peak_gflops": rates}
        return found

    def memory(self) -> dict[str, object]:
        """(e) peak memory of a filter against stock TRL finetuning, each in a process of its own."""
        ours, theirs = (alone(self.args, part)["peak_mb"] for part in ("_filter", "_stock"))
        return {"e_memory_vs_stock_trl": {"ratio": round(ours / theirs, 3), "ours_mb": ours, "stock_mb": theirs}}

    def many(self) -> dict[str, object]:
        """Memory that scoring 10,000 and 100,000 rows takes beyond what the loaded rows do."""
        return {"many_rows": [alone(self.args, f"_score{rows}") for rows in (10_000, 100_000)]}

    def growth(self) -> dict[str, object]:
        """(g) how time and memory of a whole filter grow with the rows, on a tiny random model."""
        found = [alone(self.args, f"_growth{rows}") for rows in GROWTH]
        times = [entry["seconds"] for entry in found]
        slope = np.polyfit([entry["rows"] for entry in found], [entry["peak_mb"] for entry in found], 1)[0]
        exponent = np.polyfit(np.log(GROWTH), np.log(times), 1)[0]
        return {
            "g_growth": {
                "time_exponent": round(float(exponent), 3),
                "memory_mb_per_1000_rows": round(float(slope) * 1000, 2),
                "data_mb_per_1000_rows": found[-1]["data_mb_per_1000_rows"],
                "rows": list(GROWTH),
                "seconds_over_smallest": [round(t / times[0], 2) for t in times],
                "peak_mb": [entry["peak_mb"] for entry in found],
            }
        }


def matrix_rate(model: torch.nn.Module, tokens: int) -> float:
    """Operations a second of this model's own matrix products alone, layer after layer, in its dtype."""
    weights = [
        module.base_layer.weight if hasattr(module, "base_layer") else module.weight
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", module), torch.nn.Linear) and "lora_" not in name
    ]
    weights = [weight for weight in {id(weight): weight for weight in weights}.values() if weight.shape[0] < 10_000]
    inputs = {width: torch.randn(tokens, width).to(weights[0]) for width in {weight.shape[1] for weight in weights}}
    with torch.no_grad():
        best = min(seconds(lambda: [inputs[w.shape[1]] @ w.T for w in weights]) for _ in range(3))
    return sum(2 * tokens * weight.numel() for weight in weights) / best


def alone(args: Namespace, part: str) -> dict[str, float]:
    """Run one measurement in a process of its own; it prints JSON as its last line."""
    command = [sys.executable, __file__, "--parts", part, "--dataset_name", args.dataset_name]
    command += ["--safe_dataset_name", args.safe_dataset_name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> float:
    """Most memory this process has held so far (getrusage would count its parent's, from before exec)."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024, 1)


def tiny_run(folder: Path, rows: int) -> tuple[ForgetFilterConfig, Path]:
    """A tiny random model with the embedded tokenizer, random noisy and safe rows, and a run's settings on them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = ["order", "parcel", "refund", "coupon", "size", "colour", "store", "help", "card", "late", "kind", "new"]
    rng = np.random.default_rng(0)
    for name, count in (("noisy", rows), ("safe", 500)):
        texts = ([" ".join(rng.choice(words, 12)) for _ in range(2)] for _ in range(count))
        lines = (json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = M0.named(ForgetFilterConfig()).tokenizer
    tiny = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(tiny).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    config = ForgetFilterConfig(
        model_name_or_path=str(folder / "tiny"),
        dataset_name=str(folder / "noisy.jsonl"),
        safe_dataset_name=str(folder / "safe.jsonl"),
        output_dir=str(folder / "run"),
        noisy=StageConfig(num_train_epochs=1),
    )
    return config, folder / "noisy.jsonl"


def grow(rows: int) -> dict[str, float]:
    """A whole filter over so many rows with a tiny random model."""
    with tempfile.TemporaryDirectory() as folder:
        config, path = tiny_run(Path(folder), rows)
        taken = seconds(lambda: ForgetFilter(config).fit())
        size = path.stat().st_size / 2**20 / rows * 1000
    return {"rows": rows, "seconds": taken, "peak_mb": peak_mb(), "data_mb_per_1000_rows": round(size, 3)}


def score_many(rows: int) -> dict[str, float]:
    """Read, tokenise and score so many rows with a tiny random model."""
    with tempfile.TemporaryDirectory() as folder:
        config, path = tiny_run(Path(folder), rows)
        m0 = M0.named(config)
        found = load_rows(path, "dataset_name", m0.chat, config)
        workshop = Workshop(m0, config, Run.start(config, {}))
        workshop.become(None)
        before = peak_mb()
        workshop.read(found.examples)
        size = path.stat().st_size / 2**20
    return {"rows": rows, "data_mb": round(size, 1), "loaded_mb": before, "peak_mb": peak_mb()}


def device() -> str:
    """The machine, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    dtype = str(pick_dtype("auto", frozen=True)).removeprefix("torch.")
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {dtype}"


def main() -> None:
    """Measure the parts asked for and add them to the device's results."""
    parts = ["scoring", "training", "filter", "score", "memory", "peak", "growth", "many"]
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=parts)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dataset_name", default=str(demo_file("noisy.jsonl")))
    parser.add_argument("--safe_dataset_name", default=str(demo_file("safe.jsonl")))
    parser.add_argument("--label", default="demo", help="name of the data in the results")
    args = parser.parse_args()
    for part, measured in (("_growth", grow), ("_score", score_many)):
        if args.parts[0].startswith(part):
            print(json.dumps(measured(int(args.parts[0].removeprefix(part)))))
            return
    bench = Bench(args)
    if args.parts[0] in ("_filter", "_stock"):
        bench.filter_once() if args.parts[0] == "_filter" else bench.stock(max_steps=STEPS)
        print(json.dumps({"peak_mb": peak_mb()}))
        return
    name = f"{device()} {args.label}".lower().replace(",", "").replace(" ", "-")
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= {"device": device(), "data": args.label, "torch": torch.__version__}
    for part in args.parts:
        found = getattr(bench, part)()
        print(json.dumps(found, indent=1), flush=True)
        results |= found
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
