"""Learning and forgetting curves by group, as in the paper's study: recipe `curves` on reported data.

python benchmarks/quality/curves.py [toxicity] [bias] [toxicity-top-block] --data_dir DATA [--work DIR]

Half of 200 noisy rows are unsafe. Reviewed are safe rows of the kind, safe rows of the other kind (domain shift),
and unsafe rows of the explored half; sixty rows are looked at and never trained on. A study takes a quarter of
an hour on two cores; its means and picture go to results/curves/.
"""

import json
import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from argparse import Namespace as Cell
from pathlib import Path

import yaml
from cells import DEFAULTS, build_noisy

from forgetfilter import experiments

RESULTS = Path(__file__).parent / "results" / "curves"
STUDIES = {"toxicity": None, "bias": None, "toxicity-top-block": [29]}
"""Studies, and the blocks of the embedded model (30) that get adapters, if not all."""
MODULES = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def study(name: str, data_dir: Path, folder: Path) -> None:
    """Build the data, run the recipe, keep means and picture."""
    kind = name.partition("-")[0]
    other = "bias" if kind == "toxicity" else "toxicity"
    cell = {**DEFAULTS, "rows": 200, "unsafe_share": 0.5, "heldout_rows": 60, "data_dir": data_dir}
    own = build_noisy.build(Cell(**cell, kind=kind, part="report", seed=1))
    others = build_noisy.build(Cell(**cell, kind=other, part="report", seed=1))
    explored = build_noisy.build(Cell(**cell, kind=kind, part="explore", seed=0))
    unsafe = [row for row in explored["noisy"] if row["group"].endswith("/unsafe")]
    files = {"noisy": own["noisy"], "heldout": own["heldout"], "safe": own["safe"]}
    build_noisy.write({**files, "other_safe": others["safe"], "unsafe": unsafe}, folder)
    settings = {
        "recipe": "curves",
        "dataset_name": f"{folder}/noisy.jsonl",
        "untrained_dataset_name": f"{folder}/heldout.jsonl",
        "reviews": {review: f"{folder}/{review}.jsonl" for review in ("safe", "other_safe", "unsafe")},
        "looks": 4,
        "torch_compile": True,
        "output_dir": f"{folder}/run",
    }
    if STUDIES[name]:
        settings |= {"lora_layers_to_transform": STUDIES[name], "lora_target_modules": MODULES}
    (folder / "compare.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    means, *_, picture = experiments.compare(folder / "compare.yaml")
    manifest = json.loads((folder / "run" / "manifest.json").read_text(encoding="utf-8"))
    found = {key: manifest[key] for key in ("versions", "git_sha", "model", "looked", "reviews")}
    RESULTS.mkdir(parents=True, exist_ok=True)
    found["curves"] = json.loads(means.read_text(encoding="utf-8"))
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.copy(picture, RESULTS / f"{name}.svg")


def main() -> None:
    """Run the studies named, or all."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("quality-work"))
    args = parser.parse_args()
    for name in args.studies or STUDIES:
        study(name, args.data_dir, args.work / f"curves-{name}")


if __name__ == "__main__":
    main()
