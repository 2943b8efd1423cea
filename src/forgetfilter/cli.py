"""The command line. Heavy imports stand inside the handlers, so that --help is instant."""

import io
import json
import logging
import os
import select
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from forgetfilter.command_parser import SIGNAL_IS_GONE, fail, files_first
from forgetfilter.config import BUILTIN, ForgetFilterConfig, require_run_data
from forgetfilter.errors import ConfigError, ForgetFilterError
from forgetfilter.files import at_home, disk_trouble
from forgetfilter.flags import READING, build_parser

if TYPE_CHECKING:
    from forgetfilter.data.source import Source
    from forgetfilter.result import Result


def run_demo(args: Namespace) -> None:
    """Filter the demo data and finetune on the kept rows, with the embedded model: takes minutes."""
    from forgetfilter import demo

    demo.run_demo(Path(args.output_dir))


def run_filter(args: Namespace) -> None:
    """Score the noisy data and split it into kept and dropped rows."""
    values = args.clone().as_dict()
    values.pop("config", None)
    config = ForgetFilterConfig.from_flags(values)
    require_run_data(config)
    noisy = _read_and_say(config)
    from forgetfilter import processes
    from forgetfilter.forgetting import ForgetFilter
    from forgetfilter.summary import print_summary

    result = ForgetFilter(config).fit(noisy)
    if processes.is_main_process():
        print_summary(result, result.report())


def _read_and_say(config: ForgetFilterConfig) -> Any:
    """Read the noisy data, and say what was taken before the libraries are loaded, which takes seconds."""
    from forgetfilter import processes
    from forgetfilter.data.formats import detect_format
    from forgetfilter.data.sources import load_source

    source = load_source(config.dataset_name, config.dataset_config, config.dataset_train_split, config.output_dir)
    rows = source.rows()
    if rows and processes.is_main_process():
        found = detect_format(rows, source.name, config.columns) if config.format == "auto" else config.format
        model = config.model_name_or_path
        print(f"{source.name}: {len(source)} rows, format {found}; model {model}; into {config.output_dir}", flush=True)
    return source


def _result_of(args: Namespace) -> "Result":
    """The run that a command is about."""
    from forgetfilter.result import Result
    from forgetfilter.runs import Run

    return Result(Run.filtered(args.run))


def run_finetune(args: Namespace) -> None:
    """Finetune M0 on the kept rows of a run, into OUT/model."""
    from forgetfilter import processes

    result = _result_of(args)
    model = result.finetune(trust_remote_code=args.trust_remote_code)
    if processes.is_main_process():
        result.report()
        print(f"final model: {model}")


def run_decide(args: Namespace) -> None:
    """Decide again over a run's stored scores: seconds, no model."""
    from forgetfilter.summary import print_summary

    result = _result_of(args).decide(
        args.threshold,
        filter=args.filter,
        drop_share=args.drop_share,
        decisions=args.decisions,
        trusted_rows=args.trusted_rows,
        max_clean_loss=args.max_clean_loss,
    )
    print_summary(result, result.report())


def run_review(args: Namespace) -> None:
    """Mark a few rows in a local page; all others are ranked anew after each mark."""
    from forgetfilter.review.server import serve
    from forgetfilter.review.session import open_review

    print(f"{args.run}: reading rows and hidden states", flush=True)
    try:
        review = open_review(args.run, trust_remote_code=args.trust_remote_code)
        if args.marks is not None:
            print(f"{args.marks}: {review.add_file(Path(args.marks))} new or changed marks taken over")
        serve(
            review,
            args.port,
            host=args.host,
            allow_other_machines=args.allow_other_machines,
            open_browser=not args.no_browser,
        )
    except KeyboardInterrupt:
        folder = shlex.quote(str(args.run))
        print(f"\nYour marks are kept. To go on: `forgetfilter review {folder}`.", end=" ")
        print(f"To decide by them now: `forgetfilter decide {folder}`.")


def run_score(args: Namespace) -> None:
    """Keep or drop new rows by a run's probe, however many: no training, one half pass through M0 a row."""
    from forgetfilter import processes
    from forgetfilter.progress import show

    reading = {name: getattr(args, name) for name in ("trust_remote_code", *READING)}
    folder = _result_of(args).score(args.dataset_name, args.output_dir, **reading)
    if not processes.is_main_process():
        return
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    print(f"{found['rows']} rows: {found['kept']} kept, {found['dropped']} dropped, {found['unscored']} unscored")
    for name, count in found.get("unread", {}).items():  # older folders do not know
        print(f"{count} rows have {name!r}, which is not read")
    print(f"threshold {show(found['threshold'])}, {found['rows_a_second']:.0f} rows a second")
    print(f"files: {folder}  (kept, dropped, scores.parquet, metrics.json)")


def run_report(args: Namespace) -> None:
    """Write OUT/report.html again: the page that shows every decision and lets you change it."""
    print(_result_of(args).report(args.group_column))


def run_sample(args: Namespace) -> None:
    """Draw random rows for a person to mark clean or not, to give as --trusted_rows."""
    from forgetfilter.data.export import write_sample
    from forgetfilter.report.sample_page import write_sample_page

    _refuse_inside(args.output, args.dataset_name)
    source, row_format = _rows_of(args.dataset_name, args)
    skip = args.malformed == "skip"
    sample = write_sample(source, args.rows, Path(args.output), args.seed, row_format=row_format, skip=skip)
    print(f"rows to mark: {sample}, or in a browser: {write_sample_page(sample, args.dataset_name)}")


def _refuse_inside(output: str, data: str) -> None:
    """Raise ConfigError if a file is to be written into a folder of data, whose files are all read as rows."""
    from forgetfilter.data.folders import is_read_whole

    folder = Path(data)
    if is_read_whole(folder) and Path(output).absolute().resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{output}: lies in {data}, whose files are all read as rows. Give another --output.")


def _rows_of(data: str, args: Namespace) -> tuple["Source", str]:
    """A data set and the format of its rows, by the flags that say how data are read."""
    from forgetfilter.data.loading import find_format
    from forgetfilter.data.sources import load_source

    folder = Path(args.output).absolute().parent
    scratch = folder if folder.is_dir() else None
    source = load_source(data, args.dataset_config, args.dataset_train_split, scratch_folder=scratch)
    return source, find_format(source, args.format, args.columns)


def run_safe_data(args: Namespace) -> None:
    """Write safe rows to a file, to look over: those in the box, or a served model's answers to your prompts."""
    from forgetfilter.data.export import write_safe_data

    if not args.output.endswith(".jsonl"):
        raise ConfigError(f"--output is {args.output}: it must end in .jsonl.")
    if args.like is not None:
        _refuse_inside(args.output, args.like)
    if args.base_url is not None:
        _serve_safe_data(args)
        return
    if args.model is not None:
        raise ConfigError("--model needs --base_url, its server, and --like, a file with the prompts to answer.")
    if args.rows is not None:
        raise ConfigError("--rows needs --base_url, the server that answers so many of your prompts.")
    notions = BUILTIN if args.notions is None else f"{BUILTIN}:{args.notions}"
    named = [name for name in READING[:-1] if args[name] != getattr(ForgetFilterConfig, name)]
    if args.like is None and named:
        raise ConfigError(f"--{named[0]} needs --like: it says how the rows of that file are read.")
    if args.like is None:
        count = write_safe_data(notions, Path(args.output))
    else:
        count = write_safe_data(notions, Path(args.output), *_rows_of(args.like, args))
    print(f"{args.output}: {count} safe rows. Edit it, and give it as --safe_dataset_name {shlex.quote(args.output)}.")
    print("While half of its rows or more are these, a run ranks your rows and drops none: add some of your own.")


def _serve_safe_data(args: Namespace) -> None:
    """Let a served model answer the prompts of the user's data."""
    from forgetfilter.data.served import write_served

    if args.like is None or args.model is None or args.notions is not None:
        raise ConfigError("--base_url needs --like YOURS.jsonl and --model NAME, and takes no --notions.")
    rows = 200 if args.rows is None else args.rows
    if rows < 1:
        raise ConfigError(f"--rows is {rows}: it must be 1 or more.")
    noisy, row_format = _rows_of(args.like, args)
    print(f"sending up to {rows} prompts of {args.like} to {args.base_url}", flush=True)
    found = write_served(noisy, Path(args.output), args.base_url, args.model, rows, row_format=row_format)
    why = f" (most often: {found.why})" if found.refused else ""
    print(f"{args.output}: {found.rows} safe rows; {found.refused} prompts without an answer{why}")
    print(f"cost: {found.prompt_tokens} tokens read and {found.answer_tokens} written by {args.model}")
    print("Look them over before you use them: a model wrote them. Delete or edit what you would not teach, then")
    print(f"give the file as --safe_dataset_name {shlex.quote(args.output)}.")


def run_evaluate(args: Namespace) -> None:
    """Measure a model: bias, toxicity, harmfulness, over-refusal, question answering, arithmetic."""
    from forgetfilter.evaluation.ask import evaluate, name_judges
    from forgetfilter.files import require_writable, write_jsonl, write_text
    from forgetfilter.progress import show

    named = [part.partition("=") for part in args.on.split(",")]
    if not all(file for _, _, file in named) or len({name for name, _, _ in named}) < len(named):
        raise ConfigError(
            "--on takes pairs MEASURE=FILE, each measure once: bias=bbq.jsonl,qa=squad.jsonl (docs/evaluation.md)."
        )
    output = Path(args.output)
    if output.suffix != ".json" or output.is_dir():
        raise ConfigError(f"--output is {output}: it must be a file that ends in .json.")
    if args.max_questions is not None and args.max_questions < 1:
        raise ConfigError(f"--max_questions is {args.max_questions}: it must be 1 or more.")
    taken = [str(path) for path in (output, output.with_suffix(".jsonl")) if path.exists()]
    if taken:
        raise ConfigError(f"{' and '.join(taken)}: there already. Give another --output, or move it away.")
    require_writable(output)
    files = {name: file for name, _, file in named}
    found, answers = evaluate(
        args.model, files, name_judges(args), args.max_questions, trust_remote_code=args.trust_remote_code
    )
    write_jsonl(output.with_suffix(".jsonl"), answers)
    write_text(output, json.dumps(found, indent=2) + "\n")
    for measure, figures in found.items():
        print(f"{measure}: " + "  ".join(f"{name} {show(value)}" for name, value in figures.items()))
    print(f"figures: {output}, answers: {output.with_suffix('.jsonl')}")


def run_compare(args: Namespace) -> None:
    """Run an experiment that a YAML file describes, and draw it."""
    from forgetfilter import experiments

    for path in experiments.compare(Path(args.config)):
        print(path)


def run_export(args: Namespace) -> None:
    """Write a run's kept rows in the format of a trainer."""
    for path in _result_of(args).export(args.format, args.output_dir):
        print(path)


READER_GONE = 141
"""Exit code where whoever read what we print has ended, as a shell gives it."""
HANDLERS = {
    "demo": run_demo,
    "filter": run_filter,
    "finetune": run_finetune,
    "decide": run_decide,
    "review": run_review,
    "score": run_score,
    "report": run_report,
    "sample": run_sample,
    "safe_data": run_safe_data,
    "evaluate": run_evaluate,
    "compare": run_compare,
    "export": run_export,
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exits with 2 after a clear message where the input is at fault."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # addressed to us, not to our users
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is installed
    _spell_out_what_the_terminal_lacks()
    parser = build_parser(HANDLERS)
    arguments = files_first(sys.argv[1:] if arguments is None else arguments)
    if any(argument.partition("=")[0] == "--signal" for argument in arguments):
        fail(SIGNAL_IS_GONE, 2)
    try:
        args = parser.parse_args(arguments)
    except (UnicodeError, RecursionError) as error:
        fail(f"--config: cannot be read as YAML: {error}", 2)
    if args.version:
        from forgetfilter import __version__

        print(__version__)
        return
    if args.command is None:
        parser.print_help()
        return
    continues = args.command in ("demo", "filter", "finetune", "score", "compare", "safe_data")
    try:
        with _stoppable():
            HANDLERS[args.command](_with_home(args[args.command]))
            sys.stdout.flush()
    except ForgetFilterError as error:
        fail(str(error), 2)
    except _Stopped as stop:
        fail("stopped" + (": the same command continues where it was." if continues else "."), 128 + stop.number)
    except Exception as error:
        _end_if_not_ours(error, continues)
        raise


def _end_if_not_ours(error: Exception, continues: bool) -> None:
    """Exit if an error is no fault of ours: nobody reads what we print any more, or the disk does not take a file."""
    if isinstance(error, BrokenPipeError) and _reader_has_gone():
        sys.exit(READER_GONE)
    trouble = disk_trouble(error)
    if trouble is not None:
        kept = "What was finished is kept: make room, or give another folder; the same command continues."
        fail(f"{trouble} {kept if continues else 'Make room, or give another folder.'}", 2)


def _reader_has_gone() -> bool:
    """Whether nobody reads what we print any more, as after `| head -1`; what is left to print is then dropped."""
    if not hasattr(select, "poll"):
        return False
    watched = select.poll()
    for stream in (sys.stdout, sys.stderr):
        watched.register(stream.fileno(), 0)
    gone = [number for number, state in watched.poll(0) if state & select.POLLERR]
    for number in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(gone)


def _with_home(args: Namespace) -> Namespace:
    """The same arguments with ~ spelt out, as in --output_dir=~/out, where no shell does so.

    Raises:
        ConfigError: If the place to write to is empty, as --output_dir=$UNSET is.
    """
    for name, value in vars(args).items():
        if name.startswith("output") and value == "":
            raise ConfigError(f"--{name} is empty: name a place, or leave it out.")
        if isinstance(value, str):
            args[name] = at_home(value)
    return args


def _spell_out_what_the_terminal_lacks() -> None:
    """Rows of any script are shown, also where the terminal's encoding has no letters for them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP (a closed terminal), as an exception that unwinds the work."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raise _Stopped on SIGINT, SIGTERM and SIGHUP, and again every second in case other code catches and drops it."""

    def stop(number: int, frame: object) -> None:
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, lambda *_: stop(number, None))
            signal.setitimer(signal.ITIMER_REAL, 1, 1)
        raise _Stopped(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else nohup has started it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
