"""From what a person calls a model to a folder with config.json and safetensors.

In this order: `tiny:NAME` (a random twin, `tiny.py`), a folder, a .gguf file (dequantised once into the cache), a repository
on the Hub (only the files that are needed; cache, token and offline mode are huggingface_hub's own).
"""

import hashlib
import importlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from .checkpoint import INDEX_FILE, Checkpoint, ShardFile, Tensor, read_checkpoint
from .errors import CheckpointError, ModelNotFoundError, OutputError
from .publish import build_once
from .tiny import PREFIX, tiny_folder

log = logging.getLogger(__name__)

# What belongs to a model besides its weights and config and is handed on unchanged.
SIDE_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.tiktoken", "spiece.model", "sentencepiece*.model", "chat_template*", "preprocessor_config.json",
    "processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
CODE_FILES = "*.py"  # handed on where config.json's auto_map names them; never executed here
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A model to merge. `spec` finds it again from any folder; `model` and `revision` are set for Hub repositories.

    `headers` stands in for the weights where only headers were fetched.
    """

    spec: str
    folder: Path
    model: str | None = None
    revision: str | None = None
    headers: Mapping[str, tuple[ShardFile, list[Tensor]]] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """What to call it, without the path: the last part of the id, or the folder's or file's name."""
        return (self.model or self.spec).rstrip("/").rpartition("/")[2].replace(":", "-").removesuffix(".gguf")

    def checkpoint(self) -> Checkpoint:
        """The checked headers of the model."""
        return read_checkpoint(self.folder, self.headers)


def default_cache() -> Path:
    """Where converted and tiny models are kept: $XDG_CACHE_HOME/layerfuse, normally ~/.cache/layerfuse."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerfuse"


def resolve(
    spec: str,
    *,
    revision: str | None = None,
    configs: Path | None = None,
    cache: Path | None = None,
    headers_only: bool = False,
) -> Source:
    """The model that `spec` names.

    Args:
        configs: the folder whose models/ describes the tiny models; None where there are none.
        cache: where converted models go, `default_cache()` if None.
        headers_only: of a Hub repository that is not in the cache, fetch headers instead of weights.

    Raises:
        ModelNotFoundError: nothing of that name can be reached.
        CheckpointError: a .gguf file that cannot be converted.
        OutputError: what is made of it, or of a tiny model, cannot be written.
    """
    cache = cache or default_cache()
    if spec.startswith(PREFIX):
        if configs is None:
            raise ModelNotFoundError(f"{spec}: tiny models need the configs folder of a checkout")
        return Source(spec, tiny_folder(spec.removeprefix(PREFIX), configs, cache))
    try:
        path = Path(spec).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long; ~somebody who is not there
        why = getattr(error, "strerror", None) or error
        raise ModelNotFoundError(f"{spec}: {why}; expected a folder, a .gguf file or a Hub id such as org/name") from error
    if is_folder:
        return Source(str(path.resolve()), path)
    if is_file:
        if path.suffix != ".gguf":
            raise ModelNotFoundError(f"{spec} is a file; expected a folder, a .gguf file or a Hub id such as org/name")
        return Source(str(path.resolve()), convert_gguf(path, cache))
    if not _HUB_ID.fullmatch(spec):
        raise ModelNotFoundError(f"{spec}: no such folder or file; expected one, or a Hub id such as org/name")
    return _from_hub(spec, revision, headers_only)


def side_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files of a model folder that are handed on unchanged: tokenizer, chat template, licence and the like."""
    patterns = SIDE_FILES + ((CODE_FILES,) if config.get("auto_map") else ())
    return sorted(path for path in folder.iterdir() if path.is_file() and _matches(path.name, patterns))


def convert_gguf(path: Path, cache: Path) -> Path:
    """A folder with the dequantised weights (float32) and the tokenizer of a .gguf file, converted on first use.

    The key is the file's SHA-256, so a changed file is converted again.

    Raises:
        CheckpointError: transformers cannot read the file.
        OutputError: the folder cannot be written.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache / "gguf" / f"{path.stem}-{digest}"
    if folder.is_dir():
        return folder
    log.warning("converting %s once into %s", path.name, folder)
    transformers = importlib.import_module("transformers")
    if are_progress_bars_disabled():
        transformers.utils.logging.disable_progress_bar()
    torch = importlib.import_module("torch")
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the file's types unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)

    def build(scratch: Path) -> None:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # transformers raises many kinds here, none of them documented
            raise CheckpointError(
                f"{path} cannot be converted: {' '.join(str(error).split())[:300] or type(error).__name__}"
            ) from error
        try:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        except Exception as error:  # of Rust: a full disk is an Exception to it, and nothing else
            raise OutputError(f"{folder} cannot be written: {error}") from error

    build_once(folder, build)
    return folder


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _from_hub(repo_id: str, revision: str | None, headers_only: bool) -> Source:
    small = ["config.json", INDEX_FILE, "README.md", *SIDE_FILES, CODE_FILES]
    weights = ["model*.safetensors"]
    try:
        if headers_only:
            folder, headers = _fetch_headers(repo_id, revision, small, weights)
        else:
            folder, headers = _snapshot(repo_id, revision, small + weights), None
    except (hub_errors.NotASafetensorsRepoError, hub_errors.SafetensorsParsingError) as error:
        raise CheckpointError(f"{repo_id}: its safetensors weights cannot be read: {error}") from error
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ModelNotFoundError(f"{repo_id}: {_why(repo_id, revision, error)}") from error
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    log.info("%s is %s", repo_id, folder)
    return Source(repo_id, folder, repo_id, commit, headers)


def _snapshot(repo_id: str, revision: str | None, patterns: list[str], *, local: bool = False) -> Path:
    found = huggingface_hub.snapshot_download(
        repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=local
    )
    return Path(str(found))


def _fetch_headers(
    repo_id: str, revision: str | None, small: list[str], weights: list[str]
) -> tuple[Path, dict[str, tuple[ShardFile, list[Tensor]]] | None]:
    """The small files, and the headers by range requests unless the weights are in the cache already."""
    try:
        cached = _snapshot(repo_id, revision, small + weights, local=True)
        read_checkpoint(cached)
        return cached, None
    except (OSError, CheckpointError):  # not there, or not whole
        folder = _snapshot(repo_id, revision, small)
    metadata = huggingface_hub.get_safetensors_metadata(repo_id, revision=revision)
    headers = {}
    for file, one in metadata.files_metadata.items():
        tensors = [
            Tensor(name, str(t.dtype), tuple(t.shape), file, t.data_offsets[0], t.data_offsets[1] - t.data_offsets[0])
            for name, t in one.tensors.items()
        ]
        tensors.sort(key=lambda tensor: tensor.start)
        headers[file] = (ShardFile(file, sum(tensor.nbytes for tensor in tensors), ""), tensors)
    return folder, headers


def _why(repo_id: str, revision: str | None, error: Exception) -> str:
    """One line for what huggingface_hub says in many."""
    if isinstance(error, hub_errors.GatedRepoError):
        return "the repository is gated; accept its terms on the Hub and log in with 'hf auth login'"
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"there is no revision {revision!r}"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return "no such folder here and no such repository on the Hub (or it is private: 'hf auth login')"
    if isinstance(error, (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError)):
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        return (
            f"no such folder here, not in the Hub's cache, and {reason}; give a folder, or download it where there is network"
        )
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
