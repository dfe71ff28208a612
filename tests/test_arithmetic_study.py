"""The arithmetic study from its configuration to its table: who shares what, averaging, resuming, honest numbers."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIGS, ROOT

from eval.arithmetic import precision
from eval.arithmetic.average import average, matched, permuted, target, widened
from eval.arithmetic.batches import Recipe
from eval.arithmetic.execute import begin, flops_per_update, is_source, make_all, read_log, read_result, silent, split_of
from eval.arithmetic.hugging_face import num_updates, read_grid, run_grid
from eval.arithmetic.layers import Sequences
from eval.arithmetic.models import Model, Source, initialise, logits, num_parameters
from eval.arithmetic.report import markdown, on_disk, read_published, summarise, table
from eval.arithmetic.run import run_arithmetic
from eval.arithmetic.results import final_info, metrics, spread
from eval.arithmetic.study import Cell, cells, chosen, definition, needs, read_study
from eval.arithmetic.tasks import make_task, split
from eval.arithmetic.text import documents
from eval.errors import StudyError
from merge.errors import OutputError, RecordError
from merge.publish import work_folder

STUDY = ROOT / "configs" / "arithmetic" / "study.yaml"
TINY = ROOT / "configs" / "arithmetic" / "tiny-hf.yaml"
SMALL = """
schema_version: 1
datasets: [x_plus_y]
seeds: 2
modulus: 11
training: {updates: 30, batch: 32, drawn: 64, exhaustive_every: 10, warmup: 5}
runs:
  baseline: {sources: [{width: 16, heads: 2}]}
  wide: {sources: [{width: 32, heads: 4, layers: 3}]}
  joined: {mode: frozen, trained: [baseline, wide], fusion: adapters, compare: wide}
  concat: {mode: finetune, trained: [baseline, wide], fusion: concat, learning_rate: 0.0001}
  untrained: {mode: frozen, trained: [untrained], sources: [{width: 16, heads: 2}, {width: 16, heads: 2}], fusion: concat}
  both: {mode: frozen, trained: [baseline, wide], fusion: mean-logits, updates: 0}
  mean: {mode: average, trained: [baseline, wide], updates: 0}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return read_study(path)


def test_the_study_names_every_published_run():
    study, published = read_study(STUDY), read_published(ROOT / "configs" / "arithmetic" / "published.json")
    named = {run.published for run in study.runs if run.published}
    repeated = {"001-0", "002-0"}  # the baseline again
    assert named | repeated == set(published["runs"])
    assert study.recipe == Recipe()
    assert (study.seeds, study.modulus, study.fraction) == (3, 97, 0.5)
    for wiring in ("", "-parallel"):
        for kind in ("basic", "weighted", "attention", "dropout", "layer-norm"):
            assert study.run(f"feature-fusion-{kind}{wiring}").mode == "cotrain"
    for run in study.runs:
        assert run.compare in {"none", *(one.name for one in study.runs)}, run.name
        if run.mode == "finetune" and run.model.fusion == "none":  # what more updates do shows beside the network before them
            assert run.compare in run.trained, run.name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: 2", "seed: 2", "unknown key 'seed' .did you mean 'seeds'"),
        ("fusion: concat", "fusion: concatt", "no fusion 'concatt'; did you mean concat"),
        ("mode: finetune", "mode: finetuned", "no mode 'finetuned'; did you mean finetune"),
        ("trained: [baseline, wide], fusion: adapters", "trained: [baselin, wide], fusion: adapters", "did you mean baseline"),
        ("[x_plus_y]", "[x_plus]", "no data set 'x_plus'; did you mean x_plus_y"),
        ("heads: 4, layers: 3", "heads: 5, layers: 3", "5 heads do not divide the width 32"),
        ("width: 32, heads: 4", "width: 24, heads: 4", "width 16 does not divide 24"),
        ("updates: 30,", "updates: 30.5,", "'updates' is 30.5, expected a whole number"),
        ("modulus: 11", "modulus: 11\nmodulus: 13", "modulus stands twice"),
        ("  both:", "  none: {}\n  both:", "'none' is not a name for a run"),
        ("runs:", "runs: [", "not valid YAML"),
        ("compare: wide", "compare: wid", "no run 'wid' to compare with; did you mean wide"),
        ("warmup: 5", "warmup: -5", "must not be negative"),
        ("[x_plus_y]", "[x_plus_y, x_plus_y]", "named twice"),
        ("modulus: 11", "modulus: 11\nfraction: 5.0", "fraction is 5.0"),
        ("fusion: concat, learning", "fusion: concat, heads: 0, learning", "has 0 heads"),
        ("updates: 30,", "updates: 30, matmul_precision: bf16,", "no matmul_precision 'bf16'; did you mean bfloat16"),
        ("compare: wide", "compare: wide, matmul_precision: half", "run joined: there is no matmul_precision 'half'"),
        ("mode: average", "mode: average, fusion: concat", "leave `fusion` out"),
        ("mode: finetune, trained: [baseline, wide]", "mode: finetune", "mode finetune goes with `trained`"),
        ("[x_plus_y]\nseeds: 2\nmodulus: 11", "[x_div_y]\nseeds: 2\nmodulus: 12", "prime modulus, found 12"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path, old, new, message):
    assert old in SMALL
    path = tmp_path / "wrong.yaml"
    path.write_text(SMALL.replace(old, new, 1))
    with pytest.raises((StudyError, RecordError), match=message):
        read_study(path)


def test_a_run_brings_what_it_needs():
    study = chosen(read_study(STUDY), ["merge-layers-adapters"])
    assert [run.name for run in study.runs] == ["baseline", "source-4-layers", "merge-layers-adapters"]
    assert needs(study, Cell("merge-layers-adapters", "x_div_y", 2)) == [
        Cell("baseline", "x_div_y", 2),
        Cell("source-4-layers", "x_div_y", 2),
    ]
    with pytest.raises(StudyError, match="no run 'base-line'; did you mean baseline"):
        chosen(study, ["base-line"])


def test_all_runs_of_a_seed_share_their_split():
    """Otherwise a source has seen pairs that the fused network is validated on."""
    study = read_study(STUDY)
    for dataset in ("x_plus_y", "three_operations"):
        everything = split_of(study, Cell("baseline", dataset, 1))
        for run in study.runs:
            if dataset in study.datasets_of(run) or run.name == "baseline":
                own = split_of(study, Cell(run.name, dataset, 1))
                assert not set(own.train.tolist()) & set(everything.validation.tolist()), run.name
                if run.operation is None:
                    assert torch.equal(own.train, everything.train)


def test_what_is_made_of_trained_networks(small, tmp_path):
    out = tmp_path / "out"
    assert make_all(small, out, workers=1) == {}
    for seed in range(2):
        result = {run.name: read_result(out, Cell(run.name, "x_plus_y", seed)) for run in small.runs}
        assert result["joined"]["start_full_val_acc"] == result["wide"]["full_val_acc"]
        weights = {run.name: load_file(out / run.name / f"x_plus_y_{seed}" / "weights.safetensors") for run in small.runs}
        for name, value in weights["joined"].items():
            if is_source(name):
                s, _, rest = name.partition(".")
                assert torch.equal(value, weights["baseline" if s == "s0" else "wide"][f"s0.{rest}"]), name
        assert not torch.equal(weights["concat"]["s0.layers.0.up.weight"], weights["baseline"]["s0.layers.0.up.weight"])
        assert torch.equal(weights["both"]["s1.head.weight"], weights["wide"]["s0.head.weight"])
        assert result["joined"]["trained_parameters"] < result["joined"]["parameters"]
        assert result["both"]["trained_parameters"] == 0
        assert result["both"]["step_val_acc_99"] == 0
        assert not result["both"]["reached"]
    info = json.loads((out / "baseline" / "final_info.json").read_text())["x_plus_y"]
    values = info["final_info_dict"]["final_val_acc"]
    assert info["means"]["final_val_acc_mean"] == pytest.approx(np.mean(values))
    assert info["stderrs"]["final_val_acc_stderr"] == pytest.approx(np.std(values, ddof=1) / 2**0.5)
    rows = summarise(small, out, read_published(ROOT / "configs" / "arithmetic" / "published.json"))
    assert [row.run for row in rows] == [run.name for run in small.runs]
    assert rows[0].published is None  # another modulus is another experiment
    assert "> 30" in table(small, rows)
    assert "not trained on" in markdown(rows)


def test_other_settings_do_not_touch_results(small, tmp_path):
    out = tmp_path / "out"
    begin(small, out)
    other = replace(small, recipe=replace(small.recipe, batch=16))
    with pytest.raises(StudyError, match=r"other settings \(recipe.batch: 32 there, 16 here\)"):
        begin(other, out)
    more = replace(small, seeds=3, datasets=("x_plus_y", "x_minus_y"))
    begin(more, out)  # these add cells
    changed = replace(small.runs[0], model=Model((Source(2, 32, 2),)))
    assert definition(small, small.run("joined")) != definition(
        replace(small, runs=(changed, *small.runs[1:])), small.run("joined")
    )


def test_a_precision_is_part_of_what_a_run_is(small, tmp_path):
    """The study's or the run's own; float32 is not written down, so results from before there was another stay good."""
    wide, joined = small.run("wide"), small.run("joined")
    assert "matmul_precision" not in json.dumps(definition(small, joined))
    other = replace(small, recipe=replace(small.recipe, matmul_precision="bfloat16"))
    assert definition(other, wide)["recipe"]["matmul_precision"] == "bfloat16"
    own = replace(small, runs=(small.runs[0], replace(wide, matmul_precision="bfloat16"), *small.runs[2:]))
    assert definition(own, own.run("wide")) == definition(other, wide)
    assert definition(own, joined) != definition(small, joined)  # it is made of that network
    begin(small, tmp_path / "out")
    with pytest.raises(StudyError, match=r"other settings .*recipe.matmul_precision: 'float32' there, 'bfloat16' here"):
        begin(other, tmp_path / "out")
    with pytest.raises(StudyError, match="other settings"):  # also by a run that would stand beside it in one table
        run_arithmetic(chosen(other, ["wide"]), tmp_path / "out", whole=other, workers=1)


def test_products_that_a_machine_does_not_make_are_refused(small, tmp_path, monkeypatch):
    other = replace(small, recipe=replace(small.recipe, matmul_precision="bfloat16"))
    with pytest.raises(StudyError, match="works only on CPUs, found cuda"):
        make_all(other, tmp_path / "out", workers=1, device="cuda")
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda: False)
    with pytest.raises(StudyError, match="makes no such products on this CPU"):
        make_all(other, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_run_is_made_by_one_process(small, tmp_path):
    """Two would train the same cells; another's runs, and runs that are done, are no hindrance."""
    study = replace(chosen(small, ["baseline"]), seeds=1)
    with work_folder(tmp_path / "out" / "baseline"), pytest.raises(OutputError, match="baseline is in use by another run"):
        make_all(study, tmp_path / "out", workers=None)
    with work_folder(tmp_path / "out" / "wide"):
        assert make_all(study, tmp_path / "out", workers=None) == {}
    with work_folder(tmp_path / "out" / "baseline"):
        assert make_all(study, tmp_path / "out", workers=None) == {}


def test_a_network_that_diverges_is_no_source(small, tmp_path):
    """Its cell is told, what is made of it fails with a reason, and the rest goes on."""
    wild = replace(small.run("wide"), learning_rate=1e30)
    study = replace(small, seeds=1, runs=(small.runs[0], wild, small.run("joined")))
    out = tmp_path / "out"
    failed = make_all(study, out, workers=1)
    assert list(failed) == ["joined/x_plus_y_0"]
    assert "diverged" in failed["joined/x_plus_y_0"]
    assert read_result(out, Cell("wide", "x_plus_y", 0))["diverged_at"] is not None
    assert read_result(out, Cell("baseline", "x_plus_y", 0))["diverged_at"] is None
    row = next(one for one in summarise(study, out) if one.run == "wide")
    assert (row.diverged, row.reached) == (1, 0)


def test_groups_are_single_cells(small, tmp_path):
    """Cells trained together, as on a GPU, against each alone."""
    study = chosen(small, ["joined"])
    alone, together = Counter(), Counter()  # updates of each cell
    make_all(study, tmp_path / "alone", workers=1, progress=lambda cell, n: alone.update({cell: n}))
    from eval.arithmetic.execute import _in_groups

    begin(study, tmp_path / "together")

    def advance(cell, updates):
        together[cell] += updates

    assert _in_groups(study, tmp_path / "together", cells(study), "cpu", advance, lambda cell, result: None) == {}
    assert together == dict.fromkeys(cells(study), 30)
    assert alone.total() > 0
    assert alone <= together  # a worker's last word may come after its result
    for cell in cells(study):
        one, two = read_log(tmp_path / "alone", cell), read_log(tmp_path / "together", cell)
        np.testing.assert_allclose(one[:, :4], two[:, :4], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Averaging


PAIRS = [
    (Source(2, 16, 2), Source(4, 16, 2)),
    (Source(2, 16, 2), Source(2, 32, 2)),
    (Source(2, 16, 2), Source(2, 16, 4)),
    (Source(2, 16, 2), Source(4, 32, 4)),
]


def trained_like(source, task, seed=0):
    """Values in which nothing is 0 or 1 by construction."""
    p = initialise(Model((source,)), task, seed)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)) for name, value in p.items()
    }


def consecutive(values):
    """The layers of a widened network numbered without gaps."""
    numbers = sorted({int(name.split(".")[2]) for name in values if name.startswith("s0.layers.")})
    renamed = {}
    for name, value in values.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(numbers.index(int(parts[2])))
        renamed[".".join(parts)] = value
    return renamed, len(numbers)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("which", [0, 1])
def test_widening_changes_nothing(pair, which):
    task, wide = make_task("x_plus_y", 7), target(pair)
    source = pair[which]
    p = trained_like(source, task)
    q, layers = consecutive(widened(p, source, wide))
    s = Sequences(task.a, task.op, task.b, 7, 1)
    model = Model((replace(wide, layers=layers),))
    torch.testing.assert_close(logits(model, q, s), logits(Model((source,)), p, s), atol=2e-5, rtol=1e-4)


def test_matching_finds_a_planted_order():
    """Also that an order changes nothing that is computed, and that a wrong one is seen."""
    task, source = make_task("x_plus_y", 7), Source(2, 16, 4)
    p = trained_like(source, task)
    generator = torch.Generator().manual_seed(1)
    order = {"residual": torch.randperm(16, generator=generator)}
    for layer in "01":
        order[f"{layer} heads"] = torch.randperm(4, generator=generator)
        order[f"{layer} hidden"] = torch.randperm(64, generator=generator)
    other = permuted(p, order, source)
    assert not torch.equal(other["s0.layers.1.up.weight"], p["s0.layers.1.up.weight"])
    s = Sequences(task.a, task.op, task.b, 7, 1)
    torch.testing.assert_close(logits(Model((source,)), other, s), logits(Model((source,)), p, s), atol=2e-5, rtol=1e-4)
    found = permuted(other, matched(p, other, source), source)
    for name, value in p.items():
        assert torch.equal(found[name], value), name
    mean = average([p, other], [source, source], 0)
    for name, value in p.items():
        torch.testing.assert_close(mean[name], value)
    plain = average([p, other], [source, source], 0, "none")
    assert (plain["s0.layers.0.up.weight"] - p["s0.layers.0.up.weight"]).abs().max() > 0.1


def test_an_average_of_depths_takes_what_is_there():
    task = make_task("x_plus_y", 7)
    small, deep = Source(2, 16, 2), Source(4, 16, 2)
    p, q = trained_like(small, task), trained_like(deep, task, 1)
    found = average([p, q], [small, deep], 1, "none")
    name = "s0.layers.{}.up.bias"
    torch.testing.assert_close(found[name.format(0)], q[name.format(0)])  # the small one's layers stand at slots 1 and 3
    torch.testing.assert_close(found[name.format(1)], (p[name.format(0)] + q[name.format(1)]) / 2)
    torch.testing.assert_close(found[name.format(3)], (p[name.format(1)] + q[name.format(3)]) / 2)
    assert num_parameters(Model((target([small, deep]),)), task) == sum(value.numel() for value in found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def log_of(accuracies):
    """A log with these sampled validation accuracies, every ten updates."""
    rows = [[0, np.nan, np.nan, np.nan, np.nan, 5.0, 0.01]]
    for i, accuracy in enumerate(accuracies):
        full = (1.0, accuracy) if i == len(accuracies) - 1 else (np.nan, np.nan)
        rows.append([10 * (i + 1), 0.5, 0.9, 1.0, accuracy, *full])
    return np.array(rows, dtype=float)


def test_a_time_that_is_not_known_is_not_a_time():
    found = metrics(log_of([0.1, 0.99, 0.5]), 30)  # 0.99 is not above 0.99
    assert (found["step_val_acc_99"], found["reached"], found["fell_below_99"]) == (30, False, None)
    found = metrics(log_of([0.1, 0.995, 0.5, 1.0]), 40)
    assert (found["step_val_acc_99"], found["reached"]) == (20, True)
    assert found["fell_below_99"] == pytest.approx(1 / 3)


def test_a_spike_at_the_end_does_not_decide():
    found = metrics(log_of([0.1] * 5 + [1.0] * 30 + [0.158]), 360)
    assert found["final_val_acc"] == 0.158
    assert found["median_val_acc"] == 1.0


def test_spread_is_of_the_sample():
    one = spread([1.0, 2.0, 3.0])
    assert (one.mean, one.count) == (2.0, 3)
    assert one.stderr == pytest.approx(1 / 3**0.5)
    assert str(spread([2.0])) == "2"
    assert str(spread([3710.0, 4890.0, 5080.0])) == "4560 +- 430"  # without exponents
    assert str(spread([12340.0, 12350.0])) == "12345 +- 5"
    assert str(spread([0.9998, 1.0])) == "0.9999 +- 0.0001"
    info = final_info({"x": [{**dict.fromkeys(("final_train_loss", "final_val_loss", "final_train_acc", "final_val_acc"), None),
                              "step_val_acc_99": 7.0}]})  # fmt: skip
    assert info["x"]["means"]["final_val_acc_mean"] is None


def write_cell(out, run, seed, step, reached=True, **changes):
    folder = out / run / f"x_plus_y_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    found = dict.fromkeys(("final_train_loss", "final_val_loss", "final_train_acc", "final_val_acc", "median_val_acc",
                           "full_val_acc", "start_full_val_acc"), 0.5)  # fmt: skip
    found |= {"run": run, "dataset": "x_plus_y", "seed": seed, "updates": 7500, "step_val_acc_99": step, "reached": reached,
              "diverged_at": None, "parameters": 1, "trained_parameters": 1, "gflop_per_update": 1.0, "cpu_s": 1.0}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(found | changes))


def test_the_table_pairs_counts_and_compares(tmp_path):
    """Updates are compared where all are known, else accuracies; nobody is left out because of how it ended."""
    published = read_published(ROOT / "configs" / "arithmetic" / "published.json")
    fusion = "feature-fusion-basic-parallel"
    study = chosen(read_study(STUDY), ["baseline", fusion])
    for seed, (a, b) in enumerate([(3000, 2900), (2000, 1910), (2500, 2390)]):
        write_cell(tmp_path, "baseline", seed, a)
        write_cell(tmp_path, fusion, seed, b)
    base, fused = summarise(study, tmp_path, published)
    assert (fused.paired.value, fused.paired_in) == (pytest.approx(-100), "updates")
    assert fused.paired.high < 0
    assert fused.verdict == "earlier"
    assert fused.z == pytest.approx((2400 - 2454) / (440 * (1 / 3 + 1 / 18) ** 0.5))
    assert base.paired is None
    assert fused.published["step_val_acc_99"] == 1890
    assert fused.published_z == pytest.approx((1890 - 2454) / (440 * (1 / 3 + 1 / 18) ** 0.5))
    assert "earlier" in markdown([base, fused])
    rounded = replace(study, recipe=replace(study.recipe, matmul_precision="bfloat16"))
    found = summarise(rounded, tmp_path, published)
    assert [row.title for row in found] == [f"{row.title} (bfloat16 products)" for row in (base, fused)]
    assert [replace(row, title="") for row in found] == [replace(row, title="") for row in (base, fused)]
    shorter = replace(study, recipe=replace(study.recipe, batch=256))
    assert summarise(shorter, tmp_path, published)[1].z is None
    write_cell(tmp_path, fusion, 2, 7500, reached=False, full_val_acc=0.3)
    _, censored = summarise(study, tmp_path, published)
    assert censored.reached == 2
    assert censored.steps == (2900, 1910, None)
    assert censored.z is None  # one time is unknown
    assert (censored.paired.value, censored.paired_in) == (pytest.approx(-0.2 / 3), "accuracy")
    assert censored.verdict == "no difference shown"
    alone = replace(study, runs=(study.runs[0], replace(study.runs[1], compare="none")))
    assert summarise(alone, tmp_path, published)[1].paired is None
    write_cell(tmp_path, "baseline", 1, 2000, diverged_at=10)
    assert summarise(study, tmp_path)[1].paired is None


def test_verdicts_count_how_many_were_tested(tmp_path):
    study = chosen(read_study(STUDY), ["baseline", *(f"feature-fusion-{kind}" for kind in ("basic", "weighted", "dropout"))])
    for seed, base in enumerate((3000, 2000, 2500)):
        write_cell(tmp_path, "baseline", seed, base)
        for run, gain in (("basic", (100, 90, 120)), ("weighted", (1, -2, 3)), ("dropout", (50, 10, 25))):
            write_cell(tmp_path, f"feature-fusion-{run}", seed, base - gain[seed])
    found = {row.run: row for row in summarise(study, tmp_path)}
    assert found["feature-fusion-basic"].verdict == "earlier"
    alone = found["feature-fusion-basic"].adjusted_p
    assert found["feature-fusion-weighted"].verdict == "no difference shown"
    two = summarise(chosen(study, ["baseline", "feature-fusion-basic"]), tmp_path)[1].adjusted_p
    assert alone == pytest.approx(3 * two)


def test_what_starts_trained_is_compared_in_accuracy(tmp_path):
    study = chosen(read_study(STUDY), ["merge-layers-adapters", "source-4-layers-750"])
    for seed in range(3):
        write_cell(tmp_path, "source-4-layers", seed, 3000, full_val_acc=0.8)
        write_cell(tmp_path, "source-4-layers-750", seed, 10, full_val_acc=0.9)
        write_cell(tmp_path, "merge-layers-adapters", seed, 10, full_val_acc=0.9 + 0.01 * seed)
    row = next(one for one in summarise(study, tmp_path) if one.run == "merge-layers-adapters")
    assert (row.paired_in, row.paired.value) == ("accuracy", pytest.approx(0.01))
    assert row.z is None


def test_a_report_is_of_everything_that_is_there(small, tmp_path):
    out = tmp_path / "out"
    study = replace(small, seeds=1, runs=small.runs[:2], datasets=("x_plus_y", "x_minus_y"))
    make_all(study, out, workers=1)
    part = replace(study, datasets=("x_plus_y",), runs=study.runs[:1])
    make_all(part, out, workers=1)
    assert set(json.loads((out / "baseline" / "final_info.json").read_text())) == {"x_plus_y", "x_minus_y"}
    found = on_disk(small, out)
    assert [run.name for run in found.runs] == ["baseline", "wide"]
    assert (found.datasets, found.seeds) == (("x_minus_y", "x_plus_y"), 1)
    assert len(summarise(found, out)) == 4
    assert on_disk(replace(small, modulus=13), out).runs == ()  # of another experiment


def test_one_bad_source_fails_what_is_made_of_it_alone(small, tmp_path):
    study, out = chosen(small, ["joined"]), tmp_path / "out"
    make_all(chosen(small, ["baseline", "wide"]), out, workers=1)
    path = out / "wide" / "x_plus_y_1" / "result.json"
    path.write_text(path.read_text().replace('"diverged_at": null', '"diverged_at": 10'))
    failed = make_all(study, out, workers=1)
    assert list(failed) == ["joined/x_plus_y_1"]
    (out / "joined" / "x_plus_y_0" / "result.json").unlink()
    from eval.arithmetic.execute import _in_groups

    waiting = [Cell("joined", "x_plus_y", seed) for seed in range(2)]
    bad = _in_groups(study, out, waiting, "cpu", silent, lambda cell, result: None)
    assert [cell.seed for cell in bad] == [1]
    assert read_result(out, waiting[0]) is not None


def test_flops_are_those_of_the_definition():
    """2 x 3 x multiply-adds of a forward pass, distinct rows once: 4 n, 1 to 4 rows of the batch."""
    study = read_study(STUDY)
    task, d, n, b = make_task("x_plus_y"), 128, 97, 512
    first = 3 * d * d * (2 * n + 2) + 9 * d * d * (2 * n + 2 * b)
    last = 2 * d * d * (2 * n + 2 * b) + d * d * b + 9 * d * d * b
    forward = 2 * (first + last + d * n * b)
    found = flops_per_update(study.run("baseline"), task, study.recipe)
    assert found == pytest.approx(3 * forward, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Scripts


@pytest.fixture
def run(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (tmp_path / "small.yaml").write_text(SMALL)

    def call(script, *arguments, status=0, wait=True):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
        if not wait:
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    return call


def test_the_scripts(run, tmp_path):
    done = run("arithmetic", "--config", "small.yaml", "--runs", "joined", "--out", "out", "--workers", 1)
    assert json.loads(done.stdout.splitlines()[-1]) == {"out": "out", "cells": 6, "failed": 0}
    figures = sorted((tmp_path / "out" / "plots").glob("*.png"))
    quantities = ["train_acc", "train_loss", "val_acc", "val_loss"]
    assert [one.stem for one in figures] == [f"{one}_x_plus_y" for one in quantities]
    with figures[0].with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"baseline", "wide", "joined"}
    html = (tmp_path / "out" / "index.html").read_text()
    assert all(f'src="plots/{one.name}"' in html for one in figures)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("result.json")}
    again = run("arithmetic", "--config", "small.yaml", "--runs", "joined", "--out", "out", "--workers", 1)
    assert again.stdout == done.stdout
    assert {path: path.read_bytes() for path in before} == before  # nothing is made twice
    for path in figures:
        path.unlink()
    run("plot_arithmetic", "out", "--config", "small.yaml", "--runs", "joined", "--log-x")
    assert all(path.exists() for path in figures)
    assert "not compared" not in done.stderr
    alone = run("arithmetic", "--config", "small.yaml", "--runs", "untrained", "--out", "alone", "--workers", 1, "--no-plots",
                "--seeds", 3)  # fmt: skip
    assert "not compared, as there is no result of baseline: untrained on x_plus_y" in alone.stderr
    listed = run("arithmetic", "--dry-run", "--runs", "merge-all-adapters", "--datasets", "x_div_y")
    assert "4,374,631" in listed.stdout
    assert "779,111" in listed.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--runs", "base"], 1, "no run 'base'; did you mean baseline"),
        (["--datasets", "x_plus"], 1, "no data set 'x_plus'; did you mean x_plus_y"),
        (["--datasets", "x_div_y", "--modulus", "12"], 1, "prime modulus, found 12"),
        (["--runs", "only-plus", "--datasets", "x_plus_y"], 1, "there are no runs"),
        (["--config", "nothing.yaml"], 1, "nothing.yaml cannot be read"),
        (["--seeds", "0"], 2, "--seeds is 0"),
        (["--matmul-precision", "float16"], 1, "no matmul_precision 'float16'; did you mean"),
        (["--config", TINY, "--matmul-precision", "bfloat16"], 2, "--matmul-precision is of the study's own networks"),
        (["--device", "cuda:9"], 1, "cannot be used here"),
    ],
)
def test_wrong_input_is_one_line(run, tmp_path, arguments, status, said):
    done = run("arithmetic", *arguments, "--out", "out", status=status)
    (message,) = done.stderr.strip().splitlines()
    assert said in message
    assert not (tmp_path / "out").exists()


def test_killed_and_run_again_is_as_if_never_killed(run, tmp_path):
    arguments = ("--config", "small.yaml", "--runs", "wide", "--steps", 600, "--seeds", 1, "--workers", 1, "--no-plots")
    run("arithmetic", *arguments, "--out", "whole")
    process = run("arithmetic", *arguments, "--out", "killed", wait=False)
    log = tmp_path / "killed" / "wide" / "definition.json"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3.0)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not psutil.wait_procs(workers, timeout=90)[1]  # none goes on beside the next run's
    run("arithmetic", *arguments, "--out", "killed")
    cell = "wide/x_plus_y_0"
    assert (tmp_path / "killed" / cell / "log.csv").read_text() == (tmp_path / "whole" / cell / "log.csv").read_text()
    one, two = (load_file(tmp_path / name / cell / "weights.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list((tmp_path / "killed").rglob("*checkpoint*"))


# ---------------------------------------------------------------------------------------------------------------------
# As text, and in Hugging Face models

GRID = """
schema_version: 1
families: [llama3-8b, mistral-7b, gemma2-2b, phi3-mini]
datasets: [x_plus_y]
modulus: 5
size: {hidden_size: 16, intermediate_size: 32, num_attention_heads: 4, num_hidden_layers: 4}
training: {updates: 60, warmup: 5}
layers: [1]
alphas: [0.62, 1.0]
"""
JOINED = """
schema_version: 1
families: [llama3-8b, gemma2-2b]
datasets: [x_minus_y]
modulus: 5
size: {hidden_size: 16, intermediate_size: 32, num_attention_heads: 4, num_hidden_layers: 3}
training: {updates: 150, warmup: 5}
layers: [1]
alphas: []
features: {modes: [attention], updates: 60, rank: 8}
"""


@pytest.mark.parametrize(
    ("name", "text", "answer"), [("x_minus_y", "3 - 5 mod 7 =", "5"), ("permutation", "120 o 102 =", "210")]
)
def test_pairs_as_text(name, text, answer):
    found = documents(name, seed=1, modulus=7, permuted=3, version=1.0)
    both = [*found["train"], *found["validation"]]
    assert len(both) == len(make_task(name, 7, 3))
    (one,) = [document for document in both if document["question"] == text]
    assert one["choices"][one["answer"]] == answer


def test_lm_eval_asks_what_the_study_validates_on():
    from eval.run import own_tasks

    found = own_tasks(modulus=7, seed=2, fraction=0.5).load(["arithmetic_x_div_y"])["tasks"]["arithmetic_x_div_y"]
    task, parts = make_task("x_div_y", 7), split(make_task("x_div_y", 7), 2)
    asked = [found.doc_to_text(document) for document in found.test_docs()]
    assert asked == [f"{int(task.a[i])} / {int(task.b[i])} mod 7 =" for i in parts.validation]
    document = found.test_docs()[0]
    assert found.doc_to_choice(document) == [str(i) for i in range(7)]
    assert found.doc_to_target(document) == int(task.answer[parts.validation[0]])


def test_small_models_of_every_family_are_trained_fused_and_scored(run, tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID)
    done = run("arithmetic", "--config", "grid.yaml", "--out", "hf")
    assert json.loads(done.stdout.splitlines()[-1]) == {"out": "hf", "cells": 4}
    assert "pretrained" not in done.stderr  # lm-eval's alarms of models that it did not load itself
    for family in ("llama3-8b", "mistral-7b", "gemma2-2b", "phi3-mini"):
        folder = tmp_path / "hf" / family / "x_plus_y_0"
        scores = json.loads((folder / "scores.json").read_text())
        assert list(scores) == ["trained", "fused-1-alpha-0.62", "fused-1-alpha-1", "dropped-1"]
        assert scores["fused-1-alpha-1"] == scores["dropped-1"]  # an alpha of 1 keeps the lower layer alone
        trained, fused = (load_file(folder / name / "model.safetensors") for name in ("trained", "fused-1-alpha-0.62"))
        name = "model.layers.{}.mlp.down_proj.weight"
        expected = 0.62 * trained[name.format(2)] + 0.38 * trained[name.format(3)]
        torch.testing.assert_close(fused[name.format(2)], expected)
    assert done.stdout.count("| x_plus_y |") == 4
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").rglob("*.safetensors")}
    again = run("arithmetic", "--config", "grid.yaml", "--out", "hf")
    assert again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (tmp_path / "grid.yaml").write_text(GRID.replace("updates: 60", "updates: 61"))
    assert "made with other settings" in run("arithmetic", "--config", "grid.yaml", "--out", "hf", status=1).stderr
    assert "one after the other" in run("arithmetic", "--config", "grid.yaml", "--workers", "2", status=2).stderr


def test_a_model_that_lost_layers_reads_one_of_another_family(run, tmp_path):
    (tmp_path / "grid.yaml").write_text(JOINED)
    done = run("arithmetic", "--config", "grid.yaml", "--out", "hf")
    for family, other in (("llama3-8b", "gemma2-2b"), ("gemma2-2b", "llama3-8b")):
        folder = tmp_path / "hf" / family / "x_minus_y_0"
        scores = json.loads((folder / "scores.json").read_text())
        assert list(scores) == ["trained", "dropped-1", "dropped-1-reads-attention", "dropped-1-reads-untrained"]
        host, trained = (load_file(folder / name / "model.safetensors") for name in ("dropped-1", "trained"))
        tensors = {}
        for path in (folder / "dropped-1-reads-attention").glob("*.safetensors"):
            tensors |= load_file(path)
        for name, value in host.items():
            assert torch.equal(tensors[f"host.{name}"], value)
        donor = load_file(tmp_path / "hf" / other / "x_minus_y_0" / "trained" / "model.safetensors")
        name = "layers.2.mlp.down_proj.weight"
        assert torch.equal(tensors[f"donors.0.{name}"], donor[f"model.{name}"])
        assert tensors["fusers.1.out.weight"].any()
        assert not torch.equal(trained[f"model.{name}"], donor[f"model.{name}"])
    assert "dropped-1-reads-untrained |" in done.stdout
    assert "neither marked" not in done.stderr
    shutil.rmtree(folder / "dropped-1-reads-attention")
    shutil.rmtree(folder / "trained")
    grid, made = read_grid(tmp_path / "grid.yaml", CONFIGS), []
    again = run_grid(grid, tmp_path / "hf", CONFIGS, progress=made.append)
    assert sum(made) == num_updates(grid)
    assert made.count(1) == grid.training.updates + grid.features.updates
    assert again[Cell("gemma2-2b", "x_minus_y", 0)].keys() == scores.keys()
    (tmp_path / "grid.yaml").write_text(JOINED.replace("updates: 60", "updates: 61"))
    assert "other settings of features" in run("arithmetic", "--config", "grid.yaml", "--out", "hf", status=1).stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("alphas: [0.62, 1.0]", "features: {modes: [sum]}", "no mode 'sum' of reading a donor"),
        ("alphas: [0.62, 1.0]", "features: {rank: 6}", "rank a multiple of 4"),
        ("llama3-8b", "llama3-8", "no model 'llama3-8'; did you mean llama3-8b"),
        ("[x_plus_y]", "[three_operations]", "no data set 'three_operations' as text"),
        ("layers: [1]", "layers: [4]", "4 layers cannot be removed from 4"),
        ("modulus: 5", "modulos: 5", "unknown key 'modulos'"),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path, old, new, said):
    (tmp_path / "grid.yaml").write_text(GRID.replace(old, new))
    with pytest.raises((StudyError, RecordError), match=said):
        read_grid(tmp_path / "grid.yaml", CONFIGS)
