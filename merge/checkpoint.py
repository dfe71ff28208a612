"""A checkpoint as its headers describe it: every tensor's dtype, shape, file and byte range, checked and nothing loaded.

The safetensors library opens tensors but does not tell where their bytes lie, which is what copying them without decoding
needs; so the header (8 bytes of length, JSON, data) is read here, and each of its claims is checked against the file.
Format: github.com/huggingface/safetensors, README "Format".
"""

import hashlib
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ModelNotFoundError, RecordError
from .families import FAMILIES, Config
from .layer_config import layer_count
from .records import parse_json, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONVERT = 'convert them once with AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").save_pretrained(FOLDER)'
FUSED = "layerfuse_fusion"  # the model type of models that fusion/ makes: the host's layers count as the model's
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

# `model.layers.7.mlp.up_proj.weight`, also where the stack has another prefix.
_IN_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?(?:layers|h|blocks))\.(?P<layer>0|[1-9]\d*)\.(?P<name>.+)", re.DOTALL)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `nbytes` bytes from absolute offset `start` of `file` (a name within the folder)."""

    name: str
    dtype: str  # as safetensors spells it: "BF16"
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file: its size and the SHA-256 of its length field and header.

    `state` tells whether its data were changed since: the file's number on its disk and its time of change in ns.
    """

    name: str
    size_bytes: int
    header_sha256: str
    state: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder. `layers[i]` maps names within layer i to tensors; `rest` holds everything else."""

    folder: Path
    config: dict[str, Any]
    files: tuple[ShardFile, ...]
    tensors: Mapping[str, Tensor]  # by full name, in file order
    stack: str  # what stands before the layer number: "model.layers"
    layers: tuple[Mapping[str, Tensor], ...]
    rest: Mapping[str, Tensor]
    config_state: tuple[int, int] = (0, 0)  # of config.json, as `ShardFile.state`

    @property
    def model_type(self) -> str:
        """The `model_type` of the config; empty when it has none."""
        return str(self.config.get("model_type", ""))

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def quantised(self) -> bool:
        """Whether the config says that weights are stored in a packed or scaled form."""
        return bool(self.config.get("quantization_config"))

    def path(self, tensor: Tensor) -> Path:
        """The file that holds a tensor."""
        return self.folder / tensor.file


def read_checkpoint(folder: Path, headers: Mapping[str, tuple[ShardFile, list[Tensor]]] | None = None) -> Checkpoint:
    """The checkpoint in a folder, from config.json, the index and the headers of all shards.

    `headers` by file name stand in for the shards where those are elsewhere (a repository that was not downloaded).

    Raises:
        ModelNotFoundError: no such folder.
        CheckpointError: a file is missing, truncated, inconsistent with another, or not safetensors.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; expected one with config.json and *.safetensors")
    config_state = _state(os.stat(folder / "config.json")) if (folder / "config.json").is_file() else (0, 0)
    config = read_config(folder)
    files: list[ShardFile] = []
    tensors: dict[str, Tensor] = {}
    for name in sorted(headers) if headers is not None else _weight_files(folder):
        file, found = headers[name] if headers is not None else read_header(folder / name)
        for tensor in found:
            if tensor.name in tensors:
                other = tensors[tensor.name].file
                raise CheckpointError(f"{folder}: tensor {tensor.name} is in both {other} and {name}; remove one of them")
            tensors[tensor.name] = tensor
        files.append(file)
    if (folder / INDEX_FILE).exists():
        _check_index(folder, tensors)
    if config.get("model_type") == FUSED:
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("host.")}
        stack, layers, rest = _split_layers(folder, own, layer_count(config.get("text_config") or {}))
        rest |= {name: tensor for name, tensor in tensors.items() if name not in own}
    else:
        stack, layers, rest = _split_layers(folder, tensors, layer_count(config))
    checkpoint = Checkpoint(folder, config, tuple(files), tensors, stack, layers, rest, config_state)
    _check_head(checkpoint)
    return checkpoint


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, as JSON values."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a Hugging Face model folder")
    try:
        config = read_json(path)
    except RecordError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__}, expected an object")
    return config


def read_header(path: Path) -> tuple[ShardFile, list[Tensor]]:
    """What the header of one safetensors file says, in order of the data.

    Raises:
        CheckpointError: the file is too short, or the header is malformed or disagrees with the file's size.
    """
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            size = state.st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if length < 2 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(
                    f"{path} is not a whole safetensors file: it has {size:,} bytes and declares a header of {length:,}; "
                    "download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = parse_json(raw, f"{path}: header")
    except RecordError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not an object; download the file again")
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = [_tensor(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the one before it" if tensor.start < position else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {tensor.name} starts at byte {tensor.start:,}, expected {position:,} (it {what}); "
                "download the file again"
            )
        position += tensor.nbytes
    if position != size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, expected {position:,} by its header; it is "
            f"{'truncated' if size < position else 'too long'}: download it again"
        )
    return ShardFile(path.name, size, hashlib.sha256(prefix + raw).hexdigest(), _state(state)), tensors


def check_unchanged(before: Checkpoint, after: Checkpoint) -> None:
    """Raises CheckpointError where the config or a shard of a folder that is read again is not the file that it was before."""
    if (before.config_state, before.files) != (after.config_state, after.files):
        raise CheckpointError(f"{before.folder} was changed while it was read; run again")


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_ino, found.st_mtime_ns


def encode_header(entries: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The head of a safetensors file whose data follow in this order: (name, dtype, shape, nbytes) each.

    Padded with blanks to a multiple of 8 bytes, so that the data are aligned for every dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def is_tied(config: Config, has_head: bool) -> bool:
    """Whether the head is the embedding matrix, by the config or, where it is silent, by the model class's default."""
    said = config.get("tie_word_embeddings")
    if said is not None:
        return bool(said)
    family = FAMILIES.get(config.get("model_type", ""))
    return family.tied if family else not has_head


def _weight_files(folder: Path) -> list[str]:
    """The names of the folder's safetensors files, sorted."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() and index.exists():
        raise CheckpointError(f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is stale")
    if single.exists():
        return [SINGLE_FILE]
    if index.exists():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{index} names {name}, which is not there; download the model again")
        return names
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if loose:
        raise CheckpointError(f"{folder} has {len(loose)} safetensors files ({loose[0]}, ...) but no {INDEX_FILE}")
    pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")])
    if pickles:
        raise CheckpointError(f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened; {CONVERT}")
    raise CheckpointError(f"{folder} holds no {SINGLE_FILE} or {INDEX_FILE}; if the model has only pickled weights, {CONVERT}")


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    try:
        index = read_json(path)
    except RecordError as error:
        raise CheckpointError(str(error)) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map'; expected tensor names with the file of each")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {tensor} is said to be in {name!r}, expected the name of a safetensors file in the same folder"
            )
    return weight_map


def _check_index(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    weight_map = _weight_map(folder)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{folder}: {INDEX_FILE} says that {name} is in {file}, but it is not; download the model again"
            )
    extra = [name for name in tensors if name not in weight_map]
    if extra:
        raise CheckpointError(
            f"{folder}: {tensors[extra[0]].file} holds {extra[0]}, which {INDEX_FILE} does not name "
            f"({len(extra)} such tensors); the index is of another version: download the model again"
        )


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> Tensor:
    here = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{here} is described by {entry!r:.80}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{here} has dtype {dtype!r}, expected one of {', '.join(DTYPE_BITS)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{here} has shape {shape!r:.60} and data_offsets {offsets!r:.60}, expected whole numbers from 0")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if (end - begin) * 8 != bits:
        raise CheckpointError(
            f"{here}: {end - begin:,} bytes are declared, expected {bits // 8:,} for {dtype} {tuple(shape)}; "
            "the header is damaged: download the file again"
        )
    return Tensor(name, dtype, tuple(shape), path.name, data_start + begin, end - begin)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _split_layers(
    folder: Path, tensors: Mapping[str, Tensor], count: int
) -> tuple[str, tuple[dict[str, Tensor], ...], dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    stacks: dict[str, str] = {}
    for name, tensor in tensors.items():
        match = _IN_LAYER.fullmatch(name)
        if match is None:
            rest[name] = tensor
            continue
        stacks.setdefault(match["stack"], name)
        found.setdefault(int(match["layer"]), {})[match["name"]] = tensor
    if len(stacks) != 1:
        listed = ", ".join(stacks) or "none"
        raise CheckpointError(f"{folder}: expected one stack of layers such as 'model.layers', found {listed}")
    missing = next((layer for layer in range(count) if layer not in found), None)  # count may be any number
    extra = min((layer for layer in found if layer >= count), default=None)
    if missing is not None or extra is not None:
        what = f"layer {extra} is extra" if missing is None else f"layer {missing} is missing"
        raise CheckpointError(
            f"{folder}: config.json declares {count} layers but the weights hold {len(found)} ({what}); "
            "config and weights are of different models"
        )
    common = Counter(tuple(sorted(names)) for names in found.values()).most_common(1)[0][0]
    for layer in range(count):
        lacking = [name for name in common if name not in found[layer]]
        added = [name for name in found[layer] if name not in common]
        if lacking or added:
            what = f"lacks {lacking[0]}" if lacking else f"has {added[0]}"
            raise CheckpointError(
                f"{folder}: layer {layer} {what}, unlike other layers; the checkpoint is incomplete, or its layers are of "
                "different kinds, which cannot be merged"
            )
    return next(iter(stacks)), tuple(found[layer] for layer in range(count)), rest


def _check_head(checkpoint: Checkpoint) -> None:
    """A missing embedding, final norm or head is filled with random numbers by loaders, so it is refused here."""
    if checkpoint.model_type not in FAMILIES:
        return  # other families name these tensors differently
    prefix = checkpoint.stack.rpartition(".")[0]
    expected = [f"{prefix}.embed_tokens.weight", f"{prefix}.norm.weight"] if prefix else []
    has_head = "lm_head.weight" in checkpoint.rest
    if prefix and not has_head and not is_tied(checkpoint.config, has_head) and _is_causal(checkpoint.config):
        expected.append("lm_head.weight")
    for name in expected:
        if name not in checkpoint.rest:
            raise CheckpointError(f"{checkpoint.folder}: tensor {name} is missing; a loader would fill it with random numbers")


def _is_causal(config: Config) -> bool:
    named = config.get("architectures")
    return str(named[0] if isinstance(named, list) and named else "CausalLM").endswith("CausalLM")
