# PYTHON_ARGCOMPLETE_OK
"""Fuses layers of a checkpoint into a smaller one: a Hugging Face folder that loads everywhere, whole or not at all."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from _cli import UsageError, add_model_options, find_model, parser, publishes, relative, run
from _progress import bar

from merge.alphas import plan_from_alphas, read_alphas
from merge.api import Options, blueprint_for, merge_checkpoint
from merge.blueprint import DEFAULT_SHARD_SIZE, Blueprint, count_parameters
from merge.card import plan_in_words
from merge.hub import check_push, push_folder, retry_command
from merge.methods import METHODS, plan_dropping, plan_from_method
from merge.plan import TENSOR_MODES, Plan, check_arithmetic, plan_to_dict, read_plan
from merge.runtime import DTYPES
from merge.source import Source

EXAMPLES = """\
  python scripts/merge.py --alphas alphas/base.json                            Llama-3-8B from the Hub, 32 -> 19 layers
  python scripts/merge.py --alphas alphas/base.json --model DIR --dry-run      what would be written, from headers alone
  python scripts/merge.py --method drop-last --layers 13 --model DIR           the control: the same depth, nothing mixed
  python scripts/merge.py --method drop --remove 5,14 --model DIR              exactly these layers dropped
  python scripts/merge.py --alphas alphas/base.json --model tiny:llama3-8b     a random twin, no weights needed
  python scripts/merge.py --alphas alphas/base.json --push-to-hub USER/NAME    then to a private repository of the Hub"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    what = result.add_argument_group("what to merge (one of)")
    one = what.add_mutually_exclusive_group(required=True)
    one.add_argument("--alphas", type=Path, metavar="FILE", help="steps with weights; alphas/README.md has the format")
    one.add_argument("--plan", type=Path, metavar="FILE", help="a plan, written by an earlier merge or by hand")
    one.add_argument("--method", choices=[*METHODS, "drop"], help="a rule that needs no weights")
    what.add_argument("--layers", type=int, metavar="N", help="layers to remove, with --method")
    what.add_argument("--remove", metavar="I,J,...", help="original numbers of the layers to remove, with --method drop")
    modes = "; ".join(f"{name}: {text}" for name, text in TENSOR_MODES.items())
    what.add_argument("--tensors", choices=list(TENSOR_MODES), help=f"what is mixed (default projections). {modes}")
    what.add_argument(
        "--compat", choices=["sequential"], help="sequential: round after every step, for bit parity with the original tool"
    )
    what.add_argument(
        "--allow-mixed-attention", action="store_true", help="accept plans that mix sliding with global attention layers"
    )
    add_model_options(result, "what the alphas or plan name")
    out = result.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: merged/MODEL-ALPHAS)")
    out.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as the source (default)")
    out.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1; same arithmetic everywhere (default: auto, which is cpu)"
    )
    out.add_argument(
        "--max-shard-size", default=DEFAULT_SHARD_SIZE, metavar="SIZE", help=f"decimal units (default: {DEFAULT_SHARD_SIZE})"
    )
    out.add_argument(
        "--link",
        action="store_true",
        help="share unchanged source shards instead of copying them: reflinks where the file system can, otherwise hard links "
        "(then never edit the output in place: the source would change too)",
    )
    out.add_argument(
        "--overwrite", action="store_true", help="replace an earlier output of this program, with --push-to-hub there too"
    )
    out.add_argument("--verify", action="store_true", help="recompute and compare everything before the folder appears")
    out.add_argument(
        "--push-to-hub",
        metavar="USER/NAME",
        help="upload the finished folder to this repository, private unless --public; needs 'hf auth login' or HF_TOKEN",
    )
    out.add_argument("--public", action="store_true", help="with --push-to-hub: let everybody see it")
    out.add_argument("--base-model", metavar="ID", help="Hub id for the model card when --model is a folder")
    out.add_argument("--dry-run", action="store_true", help="print what would be written; reads headers only")
    out.add_argument("--json", action="store_true", help="with --dry-run: print the plan as JSON, which --plan accepts")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Merges and pushes, or prints what would be merged."""
    _check_usage(arguments)
    if arguments.push_to_hub is not None:
        check_push(arguments.push_to_hub, public=arguments.public, overwrite=arguments.overwrite)
    source, plan = _source_and_plan(arguments)
    settings = Options(
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        link=arguments.link,
        allow_mixed_attention=arguments.allow_mixed_attention,
        device=arguments.device,
        overwrite=arguments.overwrite,
        verify=arguments.verify,
    )
    out = arguments.out or Path("merged") / f"{source.name}-{plan.name or 'plan'}"
    if arguments.dry_run:
        blueprint = blueprint_for(plan, source, settings)
        print(json.dumps(plan_to_dict(plan), indent=2) if arguments.json else _outline(blueprint, source, out))
        return
    publishes(arguments, out)
    report = merge_checkpoint(
        plan,
        source,
        out,
        settings,
        base_model=arguments.base_model,
        command=f"python scripts/merge.py {shlex.join(sys.argv[1:])}",
        progress=bar("merging", arguments.quiet),
    )
    if not arguments.quiet:
        say = [
            f"{source.spec}: {plan.num_hidden_layers} -> {report.num_hidden_layers} layers, "
            f"{report.num_parameters:,} parameters, {report.bytes_total / 1e9:.2f} GB "
            f"in {report.time_s:.1f} s ({report.device})"
        ]
        how = sorted(set(report.linked_by.values()))
        if how:
            say.append(f"{report.bytes_linked / 1e9:.2f} GB of that shared with the source by {' and '.join(how)}")
        if "hard link" in how:
            say.append("hard-linked files are the source's own: never edit them in place")
        say += [f"note: {note}" for note in report.notes]
        say += [f"verified: every tensor is what {relative(out)}/plan.json says"] if arguments.verify else []
        print("\n".join(say), file=sys.stderr)
    print(out, flush=True)
    if arguments.push_to_hub is not None:
        _push(arguments, out)


def _push(arguments: argparse.Namespace, out: Path) -> None:
    how = {"public": arguments.public, "overwrite": arguments.overwrite}
    again = retry_command(out, arguments.push_to_hub, **how)
    arguments.stopped = f"stopped while pushing; {out} is whole; push it with: {again}"
    print(push_folder(out, arguments.push_to_hub, **how))


def _check_usage(arguments: argparse.Namespace) -> None:
    by_count = arguments.method in METHODS
    if by_count and arguments.layers is None:
        raise UsageError(f"--method {arguments.method} needs --layers N")
    if arguments.layers is not None and not by_count:
        raise UsageError(f"--layers goes with --method {', '.join(METHODS)}")
    if (arguments.remove is not None) != (arguments.method == "drop"):
        raise UsageError("--remove and --method drop go together")
    if arguments.compat and arguments.method:
        raise UsageError("--compat sequential needs steps: --alphas, or a --plan that has them")
    if arguments.public and arguments.push_to_hub is None:
        raise UsageError("--public goes with --push-to-hub; without it nothing leaves this machine")
    if arguments.push_to_hub is not None and arguments.dry_run:
        raise UsageError("--push-to-hub does not go with --dry-run, which writes nothing that could be pushed")
    if arguments.json and not arguments.dry_run:
        raise UsageError("--json goes with --dry-run")


def _source_and_plan(arguments: argparse.Namespace) -> tuple[Source, Plan]:
    alphas = read_alphas(arguments.alphas) if arguments.alphas else None
    plan = read_plan(arguments.plan) if arguments.plan else None
    named = (alphas and alphas.model) or (plan and plan.model)
    spec = arguments.model or named
    if not spec:
        raise UsageError("give --model: nothing else names one")
    revision_of_plan = plan.revision if plan and not arguments.model else None
    arguments.revision = arguments.revision or revision_of_plan
    source = find_model(spec, arguments, headers_only=arguments.dry_run)
    changes = {"tensors": arguments.tensors, "arithmetic": arguments.compat}
    changes = {key: value for key, value in changes.items() if value}
    if plan is None:
        layers = source.checkpoint().num_hidden_layers
        if alphas:
            plan = plan_from_alphas(alphas, layers)
        elif arguments.method == "drop":
            plan = plan_dropping(_numbers(arguments.remove), layers)
        else:
            plan = plan_from_method(arguments.method, layers, arguments.layers)
    plan = replace(plan, **changes)
    check_arithmetic(plan)
    return source, replace(plan, model=source.model or arguments.base_model, revision=source.revision)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--remove is {text!r}, expected layer numbers such as 5,14") from None


def _outline(blueprint: Blueprint, source: Source, out: Path) -> str:
    """The dry run's answer, for a person."""
    plan, outputs = blueprint.plan, blueprint.outputs
    kept = sum(output.kept for output in outputs)
    mixed = [output for output in outputs if output.mixed]
    before = count_parameters(blueprint.checkpoint.tensors, blueprint.checkpoint.config)
    linked = [shard for shard in blueprint.shards if shard.linked_to]
    converted = len(outputs) - kept - len(mixed)
    own = ", and what the plan names" if any(row.groups for row in plan.rows) else ""
    lines = [
        f"plan        {plan.name}: {plan.num_hidden_layers} -> {len(plan.rows)} layers of {source.spec}",
        *(f"            {line}" for line in plan_in_words(plan)),
        f"arithmetic  {plan.arithmetic}, tensors {plan.tensors}{own}",
        f"tensors     {len(outputs):,}: {kept:,} kept, {len(mixed):,} mixed, {converted:,} converted",
        f"parameters  {before:,} -> {blueprint.num_parameters:,}",
        f"bytes       {blueprint.bytes_to_read:,} to read, {blueprint.bytes_to_write:,} to write",
        *(
            f"shard       {s.file}: {s.nbytes:,} bytes{f', shared with {s.linked_to}' if s.linked_to else ''}"
            for s in blueprint.shards
        ),
        *(f"config      {note}" for note in blueprint.cut.notes),
        *(f"warning     {warning}" for warning in blueprint.warnings),
        f"out         {relative(out)} (nothing written)",
    ]
    if linked:
        lines.insert(-1, f"linked      {len(linked)} of {len(blueprint.shards)} shards")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, options())
