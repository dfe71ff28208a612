# PYTHON_ARGCOMPLETE_OK
"""Which hosts and donors fit below a parameter budget: layers fused away, taps, room for fusers. Reads configs only."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import difflib
import json
import math
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _cli import CONFIGS, UsageError, parser, run

from merge.errors import ModelNotFoundError
from merge.fusion.budget import (
    BUDGET,
    FUSER_MODES,
    MAX_FUSED,
    MIXER_MODES,
    NORMS,
    TAPS,
    Backbone,
    Combination,
    Fusers,
    Part,
    largest_rank,
    pairings,
    plan_budget,
    read_backbone,
)
from merge.records import read_json
from merge.tiny import tiny_names

EXAMPLES = """\
  python scripts/plan_budget.py
  python scripts/plan_budget.py --host llama3-8b --donor gemma2-2b --mode gate --rank 512 --all
  python scripts/plan_budget.py --budget 4e9 --models phi3-mini,gemma2-2b,./my-checkpoint --json"""
MODELS = ("llama3-8b", "mistral-7b", "gemma2-2b", "phi3-mini")
COLUMNS = ("host", "layers", "fused away", "donor", "layers", "taps after", "backbones", "room", "fusers", "rank up to")
WIDTH = 110  # of a table with numbers of ten digits
LEFT = (0, 3, 5)  # columns of text; numbers are aligned on the right


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    what = result.add_argument_group("models (names in configs/models, or folders with a config.json)")
    what.add_argument("--budget", type=_parameters, default=BUDGET, metavar="N", help="parameters, as 8e9 (default) or 8B")
    what.add_argument(
        "--models", type=_names, metavar="A,B,...", help=f"each as host and as donor (default: {','.join(MODELS)})"
    )
    what.add_argument("--host", metavar="X", help="only this host")
    what.add_argument("--donor", type=_names, nargs="+", metavar="Y", help="only these donors, all of them in one model")
    what.add_argument(
        "--max-fused", type=float, default=MAX_FUSED, metavar="SHARE", help="of a host's layers at most (default: %(default)s)"
    )
    default = Fusers()
    fusers = result.add_argument_group("fusers")
    fusers.add_argument(
        "--taps",
        type=_depths,
        default=TAPS,
        metavar="DEPTHS",
        help=f"relative depths in a donor (default: {_commas(TAPS)}); where a donor is cut, they all move down with the cut",
    )
    fusers.add_argument(
        "--mode",
        choices=(*FUSER_MODES, *MIXER_MODES),
        default=default.mode,
        help="(default: %(default)s); the last three mix outputs: donors stay whole, and what is said of fusers does not apply",
    )
    fusers.add_argument("--rank", type=int, default=default.rank, help="width in which a fuser works (default: %(default)s)")
    fusers.add_argument(
        "--sites", type=int, default=default.sites, help="layers of the host with a fuser (default: %(default)s)"
    )
    fusers.add_argument("--heads", type=int, default=default.heads, help="of attention and cross (default: %(default)s)")
    fusers.add_argument("--norm", choices=NORMS, default=default.norm, help="of every tap (default: %(default)s)")
    result.add_argument("--all", action="store_true", help="donors cut at any layer: all that cannot be made larger")
    result.add_argument("--json", action="store_true", help="the same as JSON")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Prints what fits."""
    fusers = Fusers(arguments.mode, arguments.rank, arguments.sites, arguments.heads, arguments.norm)
    found = plan_budget(
        *_candidates(arguments), budget=arguments.budget, fusers=fusers, taps=arguments.taps, max_fused=arguments.max_fused,
        every_cut=arguments.all,
    )  # fmt: skip
    rows = found.combinations
    names = [" + ".join(one.name for one in (host, *others)) for host, others in found.too_large]
    if arguments.json:
        print(json.dumps(_record(arguments, fusers, rows, names), indent=2))
    else:
        _print(arguments, fusers, rows, names)


# ---------------------------------------------------------------------------------------------------------------------
# What to plan


def _candidates(arguments: argparse.Namespace) -> tuple[list[Backbone], list[tuple[Backbone, tuple[Backbone, ...]]]]:
    """The hosts, and every host with donors that the options ask for."""
    donors = tuple(name for names in arguments.donor or () for name in names)
    for names, option in ((donors, "--donor"), (arguments.models or (), "--models")):
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"{option} names {name} twice")
    known: dict[str, Backbone] = {}

    def model(name: str) -> Backbone:
        if name not in known:
            known[name] = _read(name)
            if [one.name for one in known.values()].count(known[name].name) > 1:
                raise UsageError(f"two models are called {known[name].name}: {', '.join(known)}; give one of them another name")
        return known[name]

    models = [model(name) for name in arguments.models or MODELS]
    chosen = tuple(model(name) for name in donors)
    if arguments.host is None:
        hosts = [one for one in models if one not in chosen]
        if not hosts:
            raise UsageError("every model is a donor; name a host with --host or in --models")
    else:
        hosts = [model(arguments.host)]
    if chosen:
        return hosts, [(host, chosen) for host in hosts]
    others = [*hosts, *(one for one in models if one not in hosts)]
    return hosts, [(host, found) for host, found in pairings(others) if host in hosts]


def _read(name: str) -> Backbone:
    """The sizes of a model that is named on the command line; a folder that exists wins."""
    folder, path = Path(name), CONFIGS / "models" / f"{name}.json"
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise ModelNotFoundError(f"{folder} has no config.json; expected the folder of a model")
        config = read_json(path)
        if not isinstance(config, dict):
            raise ModelNotFoundError(f"{path} is no config: expected an object with model_type and sizes")
        return read_backbone(config, folder.resolve().name)
    names = tiny_names(CONFIGS)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        raise ModelNotFoundError(f"there is no folder {name} and no config of that name ({hint})")
    return read_backbone(read_json(path)["config"], name)


def _parameters(text: str) -> int:
    """8e9, 8_000_000_000 or 8B."""
    scale = {"M": 1e6, "B": 1e9}.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if scale > 1 else text.replace(",", "")) * scale
    except ValueError:
        value = math.nan
    if not 1 <= value <= 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters; expected one as 8e9 or 8B")
    return round(value)


def _depths(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected depths as 0.5,0.75,1") from None
    if not all(0 < depth <= 1 for depth in found) or len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected different depths above 0 and up to 1")
    return tuple(sorted(found))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected names as {','.join(MODELS[:2])}")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def _print(arguments: argparse.Namespace, fusers: Fusers, rows: list[Combination], too_large: list[str]) -> None:
    print(f"fewer than {arguments.budget:,} parameters, at most {arguments.max_fused:.0%} of a host's layers fused away")
    if fusers.fuses_outputs:
        print(f"fusers: {fusers.mode} of the outputs of host and donors, which are whole and have their heads")
    else:
        print(
            f"fusers: {fusers.mode}, rank {fusers.rank}, at {_many(fusers.sites, 'site')} of the host, "
            f"each reads taps at {_commas(arguments.taps)} of every donor"
        )
    lines, before = [COLUMNS], None
    for row in rows:
        group = (len(row.donors), row.host.backbone.name if row.donors else "")
        if group != before:
            lines.append(("",) * len(COLUMNS))
        before = group
        lines += _lines(row)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for cells in lines:
        padded = (cell.ljust(w) if i in LEFT else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))
        print("  ".join(padded).rstrip())
    if too_large:
        print(
            "\n" + textwrap.fill("does not fit, nor with more donors: " + ", ".join(too_large), WIDTH, subsequent_indent="  ")
        )
    print(
        "\nEvery line has as many host layers as fit, fusers included; fewer fit as well."
        "\nroom: what the backbones leave for fusers; rank up to: the largest that fits (any: beyond the host's hidden size)"
    )


def _lines(row: Combination) -> list[tuple[str, ...]]:
    """The cells of a combination; a second donor has a line of its own."""
    first, *others = row.donors or (None,)
    host = (row.host.backbone.name, _of(row.host), str(row.fused_away or "-"))
    fusers = (f"{row.fuser_parameters:,}", _rank(row)) if row.donors else ("", "")
    line = (*host, *_donor(first), f"{row.backbone_parameters:,}", f"{row.room:,}", *fusers)
    return [line, *(("", "", "", *_donor(donor), "", "", "", "") for donor in others)]


def _donor(donor: Part | None) -> tuple[str, str, str]:
    return (donor.backbone.name, _of(donor), _commas(donor.taps)) if donor else ("(alone)", "", "")


def _rank(row: Combination) -> str:
    if row.fusers.fuses_outputs:
        return "-"
    rank = largest_rank(row)
    return f"{rank:,}" if rank < row.host.backbone.hidden_size else "any"  # a wider fuser would add nothing


def _of(part: Part) -> str:
    return f"{part.layers}/{part.backbone.num_hidden_layers}"


def _commas(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _record(arguments: argparse.Namespace, fusers: Fusers, rows: list[Combination], too_large: list[str]) -> dict[str, Any]:
    return {
        "budget": arguments.budget,
        "max_fused": arguments.max_fused,
        "fusers": vars(fusers) | {"taps": list(arguments.taps)},
        "combinations": [_values(row) for row in rows],
        "too_large": too_large,
    }


def _values(one: Combination) -> dict[str, Any]:
    parts = [
        {"name": part.backbone.name, "layers": part.layers, "num_hidden_layers": part.backbone.num_hidden_layers}
        for part in (one.host, *one.donors)
    ]
    return {
        "host": parts[0],
        "fused_away": one.fused_away,
        "donors": [part | {"taps": list(donor.taps)} for part, donor in zip(parts[1:], one.donors, strict=True)],
        "backbone_parameters": one.backbone_parameters,
        "room": one.room,
        "fuser_parameters": one.fuser_parameters,
        "parameters": one.parameters,
        "fits": one.fits,
        "max_rank": largest_rank(one) if one.donors else None,
    }


if __name__ == "__main__":
    run(main, options())
