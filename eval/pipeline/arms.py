"""What a study compares: the original, every merge, and at each depth the controls that a merge has to beat.

drop-last     the top layers dropped (Gromov et al., arXiv 2403.17887, without its exception for the last layer)
drop-greedy   layers dropped one by one, each time the one without which a text is most probable (SLEB, arXiv 2402.09025)
dropped       the layers that the merge removes, dropped: what is gained beyond this, mixing gains
uniform       the top layers averaged into one: what is gained beyond this, the choice of weights gains
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge.alphas import Alphas, plan_from_alphas, read_alphas
from merge.errors import PlanError
from merge.methods import plan_dropping, plan_from_method
from merge.plan import Plan, read_plan
from merge.records import read_json

from ..errors import DataError

ORIGINAL = "original"
DROPS = ("drop-last", "drop-greedy", "dropped")  # the controls that only drop


@dataclass(frozen=True)
class Arm:
    """One model of a study.

    kind        "original", "merge", or one of the controls
    plan        None for the original
    command     what makes it by hand; `MODEL` stands for the model
    file        where a merge was read from
    """

    name: str
    kind: str
    plan: Plan | None
    command: str = ""
    file: str | None = None

    @property
    def depth(self) -> int | None:
        """Layers that are left."""
        return len(self.plan.rows) if self.plan else None


def read_merges(files: Sequence[str], num_hidden_layers: int) -> tuple[list[Arm], dict[str, str]]:
    """(the merges that alphas files and plans describe, named by their files; files that are for other models, and why).

    Raises:
        RecordError, PlanError: a file is malformed, or none fits a model of so many layers.
        DataError: two have one name.
    """
    arms: list[Arm] = []
    left_out: dict[str, str] = {}
    for path in map(Path, files):
        content = read_json(path)
        made_for: Plan | Alphas = read_plan(path) if isinstance(content, dict) and "rows" in content else read_alphas(path)
        if made_for.num_hidden_layers not in (None, num_hidden_layers):
            left_out[str(path)] = f"it is for {made_for.num_hidden_layers} layers, but the model has {num_hidden_layers}"
        else:
            arms.append(_arm(path, made_for, num_hidden_layers))
    if not arms:
        said = "; ".join(f"{path}: {why}" for path, why in left_out.items())
        raise PlanError(f"{said or 'there is no merge to study'}; give alphas files or plans made for this model")
    names = [ORIGINAL, *(arm.name for arm in arms)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"two models of the study would be named {twice[0]!r}; rename one of the files")
    return arms, left_out


def _arm(path: Path, found: Plan | Alphas, num_hidden_layers: int) -> Arm:
    """The merge in a file."""
    plan = found if isinstance(found, Plan) else plan_from_alphas(found, num_hidden_layers)
    option = "--plan" if isinstance(found, Plan) else "--alphas"
    # A search writes its plan as FOLDER/plan.json: then the folder has the name.
    name = path.resolve().parent.name if path.stem == "plan" else path.stem
    name = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "merge"
    kind = "drop-given" if all(row.is_unit for row in plan.rows) else "merge"
    command = f"python scripts/merge.py {option} {path} --model MODEL"
    return Arm(name, kind, replace(plan, name=name), command, str(path))


def make_arms(
    merges: Sequence[Arm], controls: Sequence[str], greedy: Callable[[int], Sequence[int] | None], num_hidden_layers: int
) -> list[Arm]:
    """The original, the merges, and their controls at equal depth; a control that equals an earlier one is not repeated.

    Args:
        greedy: gives the first so many layers that greedy removal takes; None where there is no text to choose by.
    """
    found = [Arm(ORIGINAL, ORIGINAL, None), *merges]
    for merge in merges:
        if merge.plan is None:
            continue
        gone = num_hidden_layers - len(merge.plan.rows)
        for control in controls:
            arm = _control(control, merge, gone, greedy, num_hidden_layers)
            if arm is not None and not any(_same(arm, other) for other in found):
                taken = {other.name for other in found}
                found.append(replace(arm, name=f"control-{arm.name}") if arm.name in taken else arm)
    return found


def _control(control: str, merge: Arm, gone: int, greedy: Callable[[int], Sequence[int] | None], layers: int) -> Arm | None:
    """A control of a merge; None where there is none."""
    assert merge.plan is not None
    by_hand = "python scripts/merge.py --method {} --model MODEL"
    if control == "dropped":
        plan = merge.plan.dropped()
        removed = sorted(set(range(layers)) - set(plan.keep))
        if not removed:
            return None
        # A layer that stands in a plan twice is no matter of removing; then the plan itself is the command's input.
        simple = len(removed) == gone
        how = f"drop --remove {','.join(map(str, removed))}" if simple else "drop, repeating layers as in plan.json"
        return Arm(plan.name, control, plan, by_hand.format(how))
    if gone <= 0:
        return None
    if control == "drop-greedy":
        chosen = greedy(gone)
        if chosen is None:
            return None
        plan = replace(plan_dropping(chosen, layers), name=f"drop-greedy-{gone}")
        return Arm(plan.name, control, plan, by_hand.format(f"drop --remove {','.join(map(str, sorted(chosen)))}"))
    plan = plan_from_method(control, layers, gone)
    return Arm(plan.name, control, plan, by_hand.format(f"{control} --layers {gone}"))


def _same(one: Arm, other: Arm) -> bool:
    """Whether two arms are the same model."""
    return one.plan is not None and other.plan is not None and one.plan.rows == other.plan.rows
