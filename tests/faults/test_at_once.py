"""Two at once: merges into one name, searches in one study, evaluations into one file; a source replaced under a merge."""

import random
import shutil
import threading
import time

import pytest
from faults.attack import failed_well
from faults.commands import TRIALS, commands, finished_trials
from faults.harness import Warm, content

from merge import publish
from merge.api import merge_checkpoint
from merge.errors import CheckpointError
from merge.methods import plan_from_method
from merge.source import resolve
from merge.verify import verify_folder

FEW, MANY = 6, 200


@pytest.fixture(scope="module")
def other():
    """A second process that starts scripts."""
    process = Warm()
    yield process
    process.close()


def at_once(runs):
    """What (process, script, arguments, folder, seconds to wait) each end with, begun together."""
    ended = [None] * len(runs)

    def run(index, process, script, arguments, folder, after):
        time.sleep(after)
        ended[index] = process.run(script, arguments, folder, said=folder.parent / f"said-{index}")

    threads = [threading.Thread(target=run, args=(index, *one)) for index, one in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def merging(inputs, alphas, *options):
    return ["--model", inputs / "model", "--alphas", inputs / f"{alphas}.json", "--out", "out", *options]


def weights(folder):
    return {name: data for name, data in content(folder).items() if name.endswith(".safetensors")}


def two_merges(inputs, folder, warm, other, count, options):
    """Two merges with other alphas into one name; returns how often both succeeded."""
    alone = {}
    for name in "ab":
        assert warm.run("merge", merging(inputs, name), folder / name / "work").status == 0
        alone[name] = weights(folder / name / "work" / "out")
    took = warm.run("merge", merging(inputs, "a"), folder / "time" / "work").time_s
    rng, both = random.Random(str(options)), 0
    for turn in range(count):
        work = folder / str(turn) / "work"
        work.mkdir(parents=True)
        begun = [("merge", merging(inputs, name, *options), work, rng.uniform(0, took)) for name in "ab"]
        ended = at_once([(process, *one) for process, one in zip((warm, other), begun, strict=True)])
        won = [one.status == 0 for one in ended]
        assert any(won), [one.stderr for one in ended]
        both += all(won)
        for one in ended:
            if one.status != 0:
                failed_well(one, f"turn {turn}")
                assert "choose another name" in one.stderr
        verify_folder(work / "out", resolve(str(inputs / "model")))
        assert weights(work / "out") in [alone[name] for name, one in zip("ab", won, strict=True) if one]
        assert [path.name for path in work.iterdir()] == ["out"]
        shutil.rmtree(work.parent)
    return both


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_two_merges_into_one_name(options, commands_inputs, tmp_path, warm, other):
    both = two_merges(commands_inputs, tmp_path, warm, other, FEW, options)
    assert both == (FEW if options else 0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_very_many_merges_into_one_name(options, commands_inputs, tmp_path, warm, other):
    both = two_merges(commands_inputs, tmp_path, warm, other, MANY, options)
    assert both == (MANY if options else 0)
    print(f"two merges at once {MANY} times, {' '.join(options) or 'a new name'}: both succeeded {both} times")


def two_searches(inputs, folder, warm, other, count):
    """Two searches that share a study from the start; returns the numbers of finished trials."""
    search = commands(inputs)["search"]
    totals = []
    for turn in range(count):
        work = folder / str(turn) / "work"
        work.mkdir(parents=True)
        second = [*search.arguments[:-1], "found too"]
        runs = [(warm, search.script, search.arguments, work, 0.0), (other, search.script, second, work, 0.0)]
        ended = at_once(runs)
        assert [one.status for one in ended] == [0, 0], [one.stderr for one in ended]
        found = finished_trials(work / "s.db")
        assert len({number for number, _ in found}) == len(found)
        assert all((work / name / "search.json").is_file() for name in ("found", "found too"))
        totals.append(len(found))
        shutil.rmtree(work.parent)
    return totals


def test_two_searches_in_one_study(commands_inputs, tmp_path, warm, other):
    """A worker that asks while the other's last trial is running may begin one more."""
    assert set(two_searches(commands_inputs, tmp_path, warm, other, 2)) <= {TRIALS, TRIALS + 1}


@pytest.mark.slow
def test_many_searches_in_one_study(commands_inputs, tmp_path, warm, other):
    totals = two_searches(commands_inputs, tmp_path, warm, other, 40)
    assert set(totals) <= {TRIALS, TRIALS + 1}
    print(f"two searches at once 40 times: {totals.count(TRIALS)} times {TRIALS} trials, {totals.count(TRIALS + 1)} one more")


TOO_LATE = (  # while the first is under way, after it has ended, and in the moment between
    "is in use by another run; wait for it",
    "exists; give --overwrite, or another --out",
    "has been written by another run meanwhile; choose another name",
)


def two_evaluations(inputs, folder, warm, other, count):
    """Two evaluations with one --out; returns how often the second was refused."""
    command, refused = commands(inputs)["eval"], 0
    alone = folder / "alone" / "work"
    assert warm.run(command.script, command.arguments, alone).status == 0
    expected = command.same(alone)
    for turn in range(count):
        work = folder / str(turn) / "work"
        work.mkdir(parents=True)
        ended = at_once([(process, command.script, command.arguments, work, 0.0) for process in (warm, other)])
        assert any(one.status == 0 for one in ended), [one.stderr for one in ended]
        for one in ended:
            if one.status != 0:
                refused += 1
                said = [line for line in one.stderr.splitlines() if "error: " in line]
                assert len(said) == 1, one.stderr
                assert any(reason in said[0] for reason in TOO_LATE), one.stderr
        assert command.same(work) == expected
        assert sorted(path.name for path in work.iterdir()) == sorted(path.name for path in alone.iterdir())
        shutil.rmtree(work.parent)
    return refused


def test_two_evaluations_into_one_file(commands_inputs, tmp_path, warm, other):
    assert two_evaluations(commands_inputs, tmp_path, warm, other, FEW) > 0


@pytest.mark.slow
def test_very_many_evaluations_into_one_file(commands_inputs, tmp_path, warm, other):
    refused = two_evaluations(commands_inputs, tmp_path, warm, other, MANY)
    print(f"two evaluations at once {MANY} times: the second was refused {refused} times")


# ---------------------------------------------------------------------------------------------------------------------
# A source that changes under a merge


def fine_tuned(model, folder):
    """The model with other numbers of the same shapes: no header tells them apart."""
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:start] + bytes(byte ^ (index % 2 == 0) for index, byte in enumerate(content[start:])))


def swap_folders(model, fresh):
    publish._exchange(model, fresh)


def rename_files(model, fresh):
    for path in sorted(fresh.iterdir()):
        path.replace(model / path.name)


def write_in_place(model, fresh):
    for path in sorted(fresh.iterdir()):
        (model / path.name).write_bytes(path.read_bytes())


REPLACE = {"swap": swap_folders, "rename": rename_files, "write": write_in_place}


@pytest.mark.parametrize("how", REPLACE)
def test_source_is_replaced_between_two_reads(how, commands_inputs, tmp_path):
    """No header tells the two apart, and half of the output would be of one, half of the other."""
    shutil.copytree(commands_inputs / "model", tmp_path / "model")
    fine_tuned(commands_inputs / "model", tmp_path / "fresh")
    moved = []

    def progress(total):
        def advance(done):
            if not moved:
                moved.append(done)
                REPLACE[how](tmp_path / "model", tmp_path / "fresh")

        return advance

    plan, source = plan_from_method("uniform", 4, 1), resolve(str(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"was changed while it was read[;:] run again"):
        merge_checkpoint(plan, source, tmp_path / "out", progress=progress)
    assert moved
    assert not (tmp_path / "out").exists()


def replaced_under_it(how, inputs, folder, warm, count):
    """A merge without --verify while its source becomes another; returns how often it was refused."""
    fine_tuned(inputs / "model", folder / "fresh")
    allowed = []
    for name, model in (("old", inputs / "model"), ("new", folder / "fresh")):
        ended = warm.run(
            "merge", ["--model", model, "--method", "uniform", "--layers", 1, "--out", "out"], folder / name / "work"
        )
        assert ended.status == 0, ended.stderr
        allowed.append(weights(folder / name / "work" / "out"))
    assert allowed[0] != allowed[1]
    rng, refused = random.Random(how), 0
    for turn in range(count):
        work = folder / str(turn) / "work"
        shutil.copytree(inputs / "model", work / "model")
        shutil.copytree(folder / "fresh", work / "fresh")
        after = rng.uniform(0, ended.time_s)
        timer = threading.Timer(after, REPLACE[how], [work / "model", work / "fresh"])
        timer.start()
        one = warm.run("merge", ["--model", "model", "--method", "uniform", "--layers", 1, "--out", "out"], work)
        timer.join()
        if one.status != 0:
            refused += 1
            failed_well(one, f"{how} after {after:.3f} s")
            assert not (work / "out").exists()
        else:
            assert weights(work / "out") in allowed, f"{how} after {after:.3f} s: neither of the two"
        shutil.rmtree(work.parent)
    return refused


@pytest.mark.parametrize("how", REPLACE)
def test_source_is_replaced(how, commands_inputs, tmp_path, warm):
    replaced_under_it(how, commands_inputs, tmp_path, warm, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("how", REPLACE)
def test_source_is_replaced_at_very_many_moments(how, commands_inputs, tmp_path, warm):
    refused = replaced_under_it(how, commands_inputs, tmp_path, warm, MANY)
    print(f"source replaced by {how} {MANY} times: {refused} merges refused, the others are of the old or the new")
