"""The parser of commands and flags: what is wrong with them is said in a line, and mistyped names are guessed."""

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

EXPECTED = re.compile(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.+?)\])")
"""How jsonargparse names the types of a value."""
SIGNAL_IS_GONE = (
    "`signal` is gone: `log_likelihood` is `filter: forgetting` (--filter forgetting) now, `rouge1` is "
    "`filter: forgetting_rouge1`."
)
"""What to say to flags of version 0.1."""


class Parser(ArgumentParser):
    """Says what is wrong in one line, with the nearest name where one is mistyped."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument; a yes-or-no flag without a value says yes, as TRL's do."""
        action = super().add_argument(*args, **kwargs)
        if kwargs.get("type") is bool:
            action.nargs, action.const = "?", "true"
        return action

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        if "accept option 'signal'" in message:  # a config.yaml of version 0.1
            fail(SIGNAL_IS_GONE, 2)
        missing = re.search(r"arguments are required: (.+)", message)
        if missing:
            parser, message = self._missing(missing[1].split(", "))
        flags = [flag for action in parser._actions for flag in action.option_strings]
        commands = [name for action in self._actions if isinstance(action.choices, dict) for name in action.choices]
        near = _nearest(message, [*flags, *commands])
        help_flag = f"`{parser.prog.replace(' [options]', '')} --help` lists all there are."
        fail(f"{_in_a_line(message)}. {f'Did you mean {near}? ' if near else ''}{help_flag}", 2)

    def _missing(self, names: Sequence[str]) -> tuple[ArgumentParser, str]:
        """The parser that misses arguments, called COMMAND.NAME, and which they are, as they are written."""
        command, _, _ = names[0].rpartition(".")
        found = next((a.choices for a in self._actions if command and isinstance(a.choices, dict)), {})
        parser = found.get(command, self)
        wanted = [name.rpartition(".")[2] for name in names]
        written = {action.dest: flag for action in parser._actions for flag in action.option_strings}
        return parser, f"missing: {', '.join(written.get(name, name.upper()) for name in wanted)}"


def files_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with every `--config FILE` before the other flags, which then win wherever they stand."""
    files: list[str] = []
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            files += [word, *islice(words, 1)]
        else:
            (files if word.startswith("--config=") else others).append(word)
    return [*others[:1], *files, *others[1:]]


def _in_a_line(message: str) -> str:
    """What jsonargparse says of a value that it cannot read, or of anything else, in a line."""
    key, value = re.search(r'Parser key "(.+?)"', message), re.search(r"(?:Given|Got) value: (.*)", message)
    wanted = [name or values.replace("'", "") for name, values in EXPECTED.findall(message)]
    if key and value and wanted:
        return f"--{key[1]} {value[1]}: expected {' or '.join(dict.fromkeys(wanted)).replace(' or NoneType', '')}"
    return " ".join(message.split())


def _nearest(message: str, names: Sequence[str]) -> str | None:
    """The name most like the first unknown one that a message of argparse speaks of, if any is like it."""
    unknown = re.search(r"(?:unrecognized arguments: |invalid choice: '|accept option ')(-*[\w.-]+)", message)
    wanted = unknown[1] if unknown else ""
    named = names if unknown and "option" not in unknown[0] else [name.removeprefix("--") for name in names]
    return next(iter(get_close_matches(wanted, named, n=1)), None)


def fail(message: str, code: int) -> NoReturn:
    """Print why a command ends, and exit with a code. Characters that a terminal would obey are spelt out."""
    shown = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in message)
    print(f"error: {shown}" if code == 2 else shown, file=sys.stderr)
    sys.exit(code)
