"""Temporary: note in committed results what made them, so that the runs that made them are not made again.

python benchmarks/migrate_results.py --data_dir DATA

Results of version 0.1.0 name no settings, but were made at the defaults, which are today's (the noisy stage's length
and rate, those of the reviews, the score's constants, the threshold). Their rows are built anew, and must have the
fingerprints that the result noted. Prints every result's figures before and after; trains nothing.
"""

import importlib.util
import json
import sys
import tempfile
from argparse import ArgumentParser
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType

from forgetfilter.data.sources import load_source
from forgetfilter.experiments.cells import Cell, Cells

HERE = Path(__file__).parent


def script(path: str) -> ModuleType:
    """A benchmark's script as a module: several are called run."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), HERE / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def migrate_limits(data_dir: Path, folder: Path) -> None:
    """The cases of people who know the filter."""
    limits = script("limits/run.py")
    cells = Cells(limits.RESULTS)
    for found in cells.all():
        name, kind = found["case"], found["kind"]
        with redirect_stdout(StringIO()):
            config = limits.build_case(name, kind, data_dir, folder / f"{kind}-{name}")
        note(cells, f"{kind}-{name}", found, limits.what_makes(name, kind, config), folder / f"{kind}-{name}")


def migrate_quality(data_dir: Path, folder: Path) -> None:
    """The reported cells; naive Bayes on words is the filter `words` today."""
    sys.path.insert(0, str(HERE / "quality"))
    quality = script("quality/run.py")
    cells = Cells(quality.RESULTS)
    for found in cells.all():
        name, work = found["cell"], folder / found["cell"]
        with redirect_stdout(StringIO()):
            config, names = quality.build_cell(name, data_dir, work)
        for part in ("figures", "rows"):
            found[part] = {"words" if key == "naive_bayes" else key: value for key, value in found[part].items()}
        note(cells, name, found, quality.what_makes(name, config, names, work), work)


def note(cells: Cells, key: str, before: Cell, made_of: Cell, folder: Path) -> None:
    """Store a result with what made it, once its rows are known to be those built in a folder; all else stays."""
    for part in ("noisy", "safe"):
        built = load_source(folder / f"{part}.jsonl").fingerprint()
        if built != before[part]["sha256"]:
            raise SystemExit(f"error: {key}: {part} rows built today are not those the result was made of.")
    cells.store(key, made_of, before)
    after = cells.load(key)
    print(f"{key}\n  before {json.dumps(before['figures'])}\n  after  {json.dumps(after['figures'])}")
    if not cells.done(key, made_of) or any(after[name] != value for name, value in before.items() if name != "made_of"):
        raise SystemExit(f"error: {key}: not as it was.")


def main() -> None:
    """Migrate every benchmark's results."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        migrate_limits(args.data_dir, Path(folder) / "limits")
        migrate_quality(args.data_dir, Path(folder) / "quality")


if __name__ == "__main__":
    main()
