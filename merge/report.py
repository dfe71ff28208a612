"""report.json: what went in (hashes of headers), what came out, with which versions, how long and how much."""

import json
import os
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .errors import RecordError
from .records import SCHEMA_VERSION, Fields, named, read_json, why_not_read

PLAN_FILE = "plan.json"
REPORT_FILE = "report.json"
PACKAGES = ("layerfuse", "torch", "transformers", "huggingface_hub", "numpy")


@dataclass(frozen=True)
class SourceRecord:
    """Where the source was found, and the SHA-256 of every file's header."""

    spec: str
    model: str | None
    revision: str | None
    header_sha256: dict[str, str]


@dataclass(frozen=True)
class Report:
    """What a merge did; sizes in bytes, times in seconds."""

    source: SourceRecord
    command: str
    dtype: str  # as asked for: 'auto' keeps every tensor's own
    device: str
    num_hidden_layers: int
    num_parameters: int
    bytes_total: int
    bytes_copied: int
    bytes_mixed: int
    bytes_linked: int
    linked_by: dict[str, str]
    notes: list[str]
    time_s: float
    peak_rss_bytes: int
    versions: dict[str, str]
    python: str
    platform: str


def header_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """File name -> SHA-256 of its header."""
    return {file.name: file.header_sha256 for file in checkpoint.files}


def versions() -> dict[str, str]:
    """Versions of the packages that the result depends on; those that are not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident so far, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, str]:
    """`python` and `platform` of a report."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def report_text(report: Report) -> str:
    """The content of report.json."""
    return json.dumps({"schema_version": SCHEMA_VERSION} | asdict(report), indent=2) + "\n"


def read_source_record(folder: Path) -> tuple[SourceRecord, str]:
    """The source and the `dtype` option that an output's report.json names.

    Raises:
        RecordError: there is no report, or it lacks what is needed to verify the output.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        if not folder.exists():
            raise RecordError(f"{folder} cannot be read: {why_not_read(folder, FileNotFoundError())}")
        raise RecordError(f"{folder} has no {REPORT_FILE}; expected an output of scripts/merge.py")
    data: Any = read_json(path)
    fields = Fields("report")
    with named(str(path)):
        if not isinstance(data, dict):
            raise RecordError("expected an object")
        fields.check_version(data.get("schema_version"))
        spec, model, revision, hashes = fields.take(
            data.get("source"), "source", spec=str, model=(str, None), revision=(str, None), header_sha256=dict
        )
        dtype = data.get("dtype")
        if not isinstance(dtype, str):
            fields.problem("'dtype' is missing")
        fields.done()
    return SourceRecord(spec, model, revision, hashes), str(dtype)
