"""A whole study: what is compared, that nothing done is done again, that a stopped one goes on, and what it says."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from test_mmlu import run, write_archive  # noqa: F401 (a fixture)
from tiny import CONFIGS, tiny_source

import eval.pipeline.run as pipeline
from eval.compare import differences
from eval.errors import DataError, ScoreError
from eval.evaluation import evaluate_mmlu
from eval.load import load_model
from eval.mmlu import read_mmlu
from eval.pipeline import charts
from eval.pipeline.arms import make_arms, read_merges
from eval.pipeline.report import page, text_table, write_report
from eval.pipeline.run import run_study
from eval.pipeline.settings import CONTROLS, Settings, make_settings, merged, read_settings
from eval.pipeline.summary import Model, Study, answer, compare, read_study, table_rows, to_json, verdicts
from eval.results import Answer, read_results, summary
from eval.run import text_perplexity
from eval.speed import measure_speed
from merge.api import merge_checkpoint
from merge.errors import MergeError, OutputError, PlanError
from merge.methods import plan_from_method
from merge.source import resolve
from merge.verify import verify_folder

LAYERS = 6
TEXT = "Plain text to be predicted, and a little more of it, with a number 12 and a name. " * 60


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_cache):
    """A folder with a model of six layers, two alphas files for it, one for another model, and data."""
    folder = tmp_path_factory.mktemp("pipeline")
    merge_checkpoint(plan_from_method("drop-last", 32, 32 - LAYERS), tiny_source("llama3-8b", tiny_cache), folder / "model")
    (folder / "model" / "plan.json").unlink()  # an original
    for name, into, alpha in (("top", 4, 0.6), ("middle", 2, 0.3)):
        content = {"steps": [{"into": into, "remove": into + 1, "alpha": alpha}], "num_hidden_layers": LAYERS}
        (folder / f"{name}.json").write_text(json.dumps({"schema_version": 1, "name": name} | content))
    (folder / "other.json").write_text(
        json.dumps(
            {"schema_version": 1, "name": "x", "num_hidden_layers": 9, "steps": [{"into": 1, "remove": 2, "alpha": 0.5}]}
        )
    )
    write_archive(folder / "mmlu", count=6)
    (folder / "text.txt").write_text(TEXT)
    (folder / "cloze.jsonl").write_text("".join(json.dumps({"text": f"One two three {n} four five"}) + "\n" for n in range(5)))
    return folder


def settings_of(small, **changes):
    content = {
        "model": str(small / "model"),
        "merges": [str(small / "top.json"), str(small / "middle.json")],
        "mmlu": {"data_dir": str(small / "mmlu"), "subjects": ["anatomy", "virology"], "num_fewshot": 1},
        "text": {"file": str(small / "text.txt"), "tokens": 200, "choose_tokens": 100},
        "cloze": {"file": str(small / "cloze.jsonl")},
        "generation": {"prompts": ["The capital"], "tokens": 4},
        "speed": {"batches": [1, 2], "prompt": 8, "generate": 2, "repeats": 2},
    }
    return make_settings(merged(content, changes), "test")


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """A finished study."""
    out = tmp_path_factory.mktemp("done") / "study"
    assert run_study(settings_of(small), out) == {}
    return out


def times(out):
    return {path.relative_to(out): path.stat().st_mtime_ns for path in out.rglob("parts/*.json")}


def facts(out):
    """Everything measured that does not depend on the clock or on where it was done."""
    found = {}
    for model in read_study(out).models:
        parts = {name: dict(value) for name, value in model.parts.items() if name not in ("speed", "merge")}
        for value in parts.values():
            value.pop("time_s")
            value.pop("questions", None)  # of the run that finished
        found[model.name] = (parts, model.answers, model.record["scores"])
    return found


def test_every_arm_is_made_verified_and_measured(small, done):
    study = read_study(done)
    kinds = {model.name: model.kind for model in study.models}
    assert kinds == {
        "original": "original",
        "top": "merge",
        "middle": "merge",
        "drop-last-1": "drop-last",
        "drop-greedy-1": "drop-greedy",
        "uniform-1": "uniform",
        "middle-dropped": "dropped",
    } or kinds == {
        "original": "original",
        "top": "merge",
        "middle": "merge",
        "drop-last-1": "drop-last",
        "uniform-1": "uniform",
        "middle-dropped": "dropped",
    }  # fmt: skip (greedy removal may take the last layer, or the middle merge's)
    source = resolve(str(small / "model"))
    for model in study.models:
        folder = done / model.name
        assert {"results.json", "samples.parquet", "log.txt", "parts"} <= {path.name for path in folder.iterdir()}
        assert set(model.parts) >= {"mmlu", "text", "cloze", "generation", "speed"}
        if model.kind != "original":
            assert verify_folder(folder / "checkpoint", source).num_mixed == model.parts["verify"]["num_mixed"]
            assert model.depth == LAYERS - 1
        assert "took" in (folder / "log.txt").read_text()


def test_the_numbers_are_those_of_the_single_scripts(small, done):
    subjects = read_mmlu(small / "mmlu", ["anatomy", "virology"])
    study = read_study(done)
    for name in ("original", "middle"):
        folder = small / "model" if name == "original" else done / name / "checkpoint"
        record, answers = evaluate_mmlu(resolve(str(folder)), subjects, num_fewshot=1)
        assert [(a.index, a.prediction) for a in study.model(name).answers] == [(a.index, a.prediction) for a in answers]
        assert study.model(name).record["scores"] == record["scores"]
        lm, _ = load_model(resolve(str(folder)).checkpoint())
        expected = text_perplexity(lm, TEXT, max_tokens=200)
        assert study.model(name).parts["text"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)
        assert sum(study.model(name).parts["text"]["tokens"]) == expected.tokens


def test_results_are_what_compare_reads(done):
    one, two = (read_results(done / name / "results.json") for name in ("original", "top"))
    assert differences(one[1], two[1])[0].paired.count == 12
    assert one[0]["question_set"] == two[0]["question_set"]
    assert two[0]["plan"]["num_hidden_layers"] == LAYERS


def test_greedy_removal_takes_the_cheapest_layer(done):
    study = read_study(done).record
    losses = dict(study["layers"])
    assert len(losses) == LAYERS
    assert study["greedy"][0][0] == min(losses, key=lambda layer: losses[layer])


def test_nothing_that_is_done_is_done_again(small, done, tmp_path, monkeypatch):
    out = tmp_path / "again"
    shutil.copytree(done, out)
    before = times(out)
    monkeypatch.setattr(pipeline, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    assert run_study(settings_of(small), out, resume=True) == {}
    assert times(out) == before
    assert facts(out) == facts(done)


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"mmlu": {"limit": 3}}, {"mmlu"}),
        ({"text": {"tokens": 150}}, {"text"}),
        ({"cloze": {"limit": 2}}, {"cloze"}),
        ({"generation": {"tokens": 3}}, {"generation"}),
        ({"speed": {"repeats": 1}}, {"speed"}),
        ({"dtype": "float32"}, {"mmlu", "text", "cloze", "generation", "speed"}),
    ],
)
def test_what_changed_is_done_again_and_nothing_else(changes, again, small, done, tmp_path):
    out = tmp_path / "changed"
    shutil.copytree(done, out)
    only = {"merges": [str(small / "top.json")], "controls": ["drop-last"]}
    before = times(out)
    run_study(settings_of(small, **only, **changes), out, resume=True)
    changed = {path for path, time in times(out).items() if before[path] != time}
    assert {path.stem for path in changed} == again
    assert {path.parts[0] for path in changed} == {"original", "top", "drop-last-1"}


def test_another_model_is_measured_from_the_beginning(small, done, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(done, out)
    shutil.copytree(small / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    before = times(out)
    only = {"model": str(tmp_path / "model"), "merges": [str(small / "top.json")], "controls": [], "skip": ["speed", "cloze"]}
    run_study(settings_of(small, **only), out, resume=True)
    changed = {str(path) for path, time in times(out).items() if before[path] != time}
    assert changed == {
        f"{arm}/parts/{part}.json" for arm in ("original", "top") for part in ("mmlu", "text", "generation")
    } | {f"top/parts/{part}.json" for part in ("merge", "verify")}  # fmt: skip


@pytest.mark.parametrize("calls", [1, 2, 4, 7, 9, 11])
def test_a_stopped_study_goes_on(calls, small, done, tmp_path, monkeypatch):
    """Stopped at its n-th step by Ctrl-C; the same numbers come out, and what was done is kept."""
    out = tmp_path / "stopped"
    left = [calls]
    whole = pipeline._Run._timed

    def stopping(self, part, arm, make):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return whole(self, part, arm, make)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline._Run, "_timed", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_study(settings_of(small), out)
    before = times(out)
    assert len(before) == calls - 1
    assert run_study(settings_of(small), out, resume=True) == {}
    assert facts(out) == facts(done)
    after = times(out)
    assert all(after[path] == time for path, time in before.items())


def test_a_greedy_choice_goes_on_from_its_last_step(small, tmp_path, monkeypatch):
    steps = [{"into": 4, "remove": 5, "alpha": 0.5}, {"into": 3, "remove": 4, "alpha": 0.5}]
    alphas = {"schema_version": 1, "name": "two", "steps": steps, "num_hidden_layers": LAYERS}
    (tmp_path / "two.json").write_text(json.dumps(alphas))
    settings = settings_of(small, merges=[str(tmp_path / "two.json")], skip=["mmlu", "cloze", "speed", "generation"])
    assert run_study(settings, tmp_path / "whole") == {}
    whole, begun = pipeline.greedy_removal, []

    def stopping(tail, windows, layers, done, *, begun, chosen):
        def once(removed):
            chosen(removed)
            raise KeyboardInterrupt

        return whole(tail, windows, layers, done, begun=begun, chosen=once)

    def telling(tail, windows, layers, done, **how):
        begun.append(len(how["begun"]))
        return whole(tail, windows, layers, done, **how)

    monkeypatch.setattr(pipeline, "greedy_removal", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study(settings, tmp_path / "stopped")
    monkeypatch.setattr(pipeline, "greedy_removal", telling)
    run_study(settings, tmp_path / "stopped", resume=True)
    assert begun == [1]
    one, two = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("whole", "stopped"))
    assert (one["greedy"], one["layers"]) == (two["greedy"], two["layers"])


def test_finished_subjects_of_a_stopped_study_are_kept(small, done, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    asked = []
    ask = pipeline.ask

    def once(lm, subjects, *arguments, **options):
        asked.append([subject.name for subject in subjects])
        if len(asked) == 1:
            ask(lm, subjects[:1], *arguments, **options)
            raise KeyboardInterrupt
        return ask(lm, subjects, *arguments, **options)

    monkeypatch.setattr(pipeline, "ask", once)
    with pytest.raises(KeyboardInterrupt):
        run_study(settings_of(small), out)
    run_study(settings_of(small), out, resume=True)
    assert asked[:2] == [["anatomy", "virology"], ["virology"]]
    assert facts(out) == facts(done)


def test_results_of_other_questions_are_not_compared(small, done, tmp_path, monkeypatch):
    """Stopped with other settings after the first model, the report is of that one alone."""
    out = tmp_path / "study"
    shutil.copytree(done, out)
    whole = pipeline._Run._arm

    def stopping(self, arm, model):
        if arm.name != "original":
            raise KeyboardInterrupt
        whole(self, arm, model)

    monkeypatch.setattr(pipeline._Run, "_arm", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study(settings_of(small, mmlu={"limit": 3}), out, resume=True)
    study = read_study(out)
    assert [model.name for model in study.models] == ["original"]
    assert "nothing can be said" in page(study)


def test_what_is_no_number_fails_by_name(small, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.parts, "window_nll", lambda lm, ids: (np.array([np.nan]), np.array([3])))
    failed = run_study(settings_of(small, skip=["mmlu", "cloze", "speed"], controls=[]), tmp_path / "out")
    assert set(failed) == {"original", "top", "middle"}
    assert "the likelihood of the text is not a number" in failed["top"]
    with pytest.raises(DataError, match="holds no results yet"):
        read_study(tmp_path / "out")


def test_one_that_fails_leaves_the_others(small, done, tmp_path, monkeypatch):
    out = tmp_path / "failing"
    measure = pipeline._Run._measure

    def failing(self, part, arm, model):
        if arm.name == "top" and part == "cloze":
            raise ScoreError("the weights\nhold NaN")
        return measure(self, part, arm, model)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline._Run, "_measure", failing)
        assert run_study(settings_of(small), out) == {"top": "the weights hold NaN"}
    study = read_study(out)
    assert "top" not in {model.name for model in study.models}
    assert "top failed: the weights hold NaN." in answer(study, verdicts(study))
    assert "hold NaN" in page(study)
    assert run_study(settings_of(small), out, resume=True) == {}
    assert facts(out) == facts(done)


def test_checkpoints_that_are_not_kept(small, done, tmp_path):
    out = tmp_path / "study"
    settings = replace(settings_of(small, skip=["cloze"]), keep_checkpoints=False)
    run_study(settings, out)
    assert not list(out.rglob("*.safetensors"))
    before = times(out)
    run_study(settings, out, resume=True)
    assert times(out) == before  # nothing is made again for nothing
    run_study(replace(settings, skip=()), out, resume=True)  # a model is made again for what is new
    assert not list(out.rglob("*.safetensors"))
    assert facts(out) == facts(done)
    changed = {path.stem for path, time in times(out).items() if before.get(path) != time}
    assert changed == {"cloze"}


def test_files_for_other_models_are_left_out_and_named(small):
    arms, left_out = read_merges([str(small / name) for name in ("top.json", "other.json")], LAYERS)
    assert [arm.name for arm in arms] == ["top"]
    assert "it is for 9 layers, but the model has 6" in left_out[str(small / "other.json")]
    with pytest.raises(PlanError, match=r"other\.json: it is for 9 layers"):
        read_merges([str(small / "other.json")], LAYERS)
    with pytest.raises(DataError, match="two models of the study would be named 'top'"):
        read_merges([str(small / "top.json")] * 2, LAYERS)


def test_controls_stand_at_every_depth_and_none_twice(small):
    merges, _ = read_merges([str(small / "top.json"), str(small / "middle.json")], LAYERS)
    arms = make_arms(merges, CONTROLS, lambda count: [0, 1, 2][:count], LAYERS)
    assert [arm.name for arm in arms] == [
        "original",
        "top",
        "middle",
        "drop-last-1",
        "drop-greedy-1",
        "uniform-1",
        "middle-dropped",
    ]  # fmt: skip (the top merge's layers dropped are the last ones dropped)
    assert all(arm.depth == LAYERS - 1 for arm in arms[1:])
    without = make_arms(merges, ("drop-greedy",), lambda count: None, LAYERS)
    assert [arm.name for arm in without] == ["original", "top", "middle"]


def planted(name, kind, right, nll, depth=5):
    answers = [Answer("anatomy", i, (0.0, 0.0, 0.0, 0.0), int(not one), 0) for i, one in enumerate(right)]
    text = {"perplexity": float(np.exp(np.mean(nll))), "nll": list(nll), "tokens": [1.0] * len(nll)}
    record = {
        "parts": {"mmlu": {}, "text": text}, "scores": summary(answers), "num_parameters": 1, "bytes_total": 1, "plan": None,
    }  # fmt: skip
    return Model(name, kind, depth, record, answers)


def planted_study(*models):
    record = {
        "arms": [], "missing": {}, "failed": {}, "left_out": {}, "finished": True, "num_hidden_layers": 6, "layers": [],
        "greedy": [],
    }  # fmt: skip
    return Study(None, record, list(models))


NOISE = np.random.default_rng(0)
GOOD, BAD = [True] * 180 + [False] * 20, [True] * 60 + [False] * 140
LOW, HIGH = 2.0 + NOISE.normal(0, 0.1, 40), 3.0 + NOISE.normal(0, 0.1, 40)


@pytest.mark.parametrize(
    ("merge", "drops", "said"),
    [
        ((GOOD, LOW), [(BAD, HIGH), (BAD, HIGH)], {"mmlu": "better", "text": "better"}),
        ((GOOD, LOW), [(BAD, HIGH), (GOOD, LOW)], {"mmlu": "not shown", "text": "not shown"}),  # better than one is not enough
        ((BAD, HIGH), [(BAD, HIGH), (GOOD, LOW)], {"mmlu": "worse", "text": "worse"}),
        ((GOOD, HIGH), [(BAD, LOW)], {"mmlu": "better", "text": "worse"}),
    ],
)
def test_a_merge_has_to_beat_every_way_of_dropping(merge, drops, said):
    models = [planted(f"drop-{i}", "drop-last", *one) for i, one in enumerate(drops)]
    study = planted_study(planted("m", "merge", *merge), *models, planted("elsewhere", "drop-last", GOOD, LOW, depth=4))
    found = verdicts(study)
    assert {one.measure: one.outcome for one in found} == said
    assert all(one.controls == len(drops) for one in found)
    first = answer(study, found)[0]
    assert first.startswith("Yes") == ("better" in said.values())


def test_nothing_is_claimed_while_a_control_is_missing():
    models = [planted("m", "merge", GOOD, LOW), planted("d", "drop-last", BAD, HIGH)]
    study = planted_study(*models)
    assert {one.outcome for one in verdicts(study)} == {"better"}
    study.record["arms"] = [
        {"name": "g", "kind": "drop-greedy", "depth": 5},
        {"name": "far", "kind": "drop-greedy", "depth": 3},
    ]
    assert verdicts(study) == []
    said = answer(study, verdicts(study))
    assert not said[0].startswith("Yes")
    assert "Nothing is said of m: g, dropped to the same depth, has no results." in said


def test_many_merges_without_a_difference_are_not_called_better():
    """Of 200 studies with 10 equal merges, about 5 % at most may claim anything."""
    random = np.random.default_rng(1)
    claims = 0
    for _ in range(200):
        drop = planted("d", "drop-last", random.random(100) < 0.5, random.normal(3, 1, 20))
        merges = [planted(f"m{i}", "merge", random.random(100) < 0.5, random.normal(3, 1, 20)) for i in range(10)]
        found = verdicts(planted_study(drop, *merges))
        claims += any(one.outcome != "not shown" for one in found)
    assert claims <= 20  # three standard errors above 5 %


@pytest.mark.parametrize(
    ("right", "count", "said"),
    [
        (50, 200, "200 questions cannot tell the original itself from chance (accuracy 0.250 [0.195, 0.314])"),
        (2, 3, "3 questions cannot tell the original itself from chance (accuracy 0.667 [0.208, 0.939])"),
        (0, 1, "1 question cannot tell the original itself from chance"),
        (20, 200, "The original itself is worse than chance on 200 questions of MMLU"),
        (180, 200, None),
    ],
)
def test_what_questions_say_of_the_original_is_no_more_than_they_show(right, count, said):
    original = planted("original", "original", [True] * right + [False] * (count - right), LOW, 6)
    study = planted_study(original, planted("m", "merge", GOOD, LOW))
    found = [line for line in answer(study, verdicts(study)) if "chance" in line]
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(said)


def test_one_window_of_text_gives_no_interval():
    models = [planted("m", "merge", GOOD, LOW[:1]), planted("d", "drop-last", BAD, HIGH[:1])]
    study = planted_study(*models)
    found = {one.measure: one for one in verdicts(study)}
    assert (found["mmlu"].outcome, found["text"].outcome) == ("better", "not shown")  # text takes nothing from MMLU
    said = answer(study, list(found.values()))
    assert "On text: nothing can be said, there is too little text (1 window) to give an interval." in said
    assert "NaN" not in to_json(study)
    assert charts.differences([found["text"].nearest], "text") is None


def test_too_short_a_text_is_said_at_the_start_and_in_the_report(small, tmp_path, caplog):
    text = {"tokens": 300, "choose_tokens": 64}  # of a model that reads 512 at a time
    settings = settings_of(small, merges=[str(small / "top.json")], controls=["drop-last"], text=text)
    run_study(replace(settings, skip=("mmlu", "cloze", "generation", "speed")), tmp_path / "out")
    assert [one.getMessage() for one in caplog.records if one.name == pipeline.__name__] == [
        "the text to measure is 1 window of 512 tokens: too little to compare models by; give a longer --text"
    ]
    shown = page(read_study(tmp_path / "out"))
    assert "too little text (1 window)" in shown
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", shown, flags=re.DOTALL)


def test_differences_have_the_sign_of_the_model():
    better, worse = planted("a", "merge", GOOD, LOW), planted("b", "drop-last", BAD, HIGH)
    assert compare(better, worse, "mmlu").value == pytest.approx(60.0)
    assert compare(better, worse, "text").value == pytest.approx(float(np.mean(LOW) - np.mean(HIGH)))
    assert compare(better, worse, "mmlu").better
    assert compare(better, worse, "text").better
    assert not compare(worse, better, "text").better
    assert compare(better, worse, "cloze") is None


class Page(HTMLParser):
    """Collects what a page refers to, and checks that its tags are closed in order."""

    VOID = ("meta", "link", "br", "img", "path", "use", "rect", "image")

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.open, self.tags, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("href", "src", "xlink:href") if key in found]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_needs_nothing_else(done, tmp_path):
    path = write_report(read_study(done), tmp_path / "report.html")
    text = path.read_text()
    assert len(text) < 5_000_000
    found = Page()
    found.feed(text)
    assert not found.open
    assert len(found.ids) == len(set(found.ids))
    anchors = [link for link in found.links if link.startswith("#")]
    assert anchors
    assert {link[1:] for link in anchors} <= set(found.ids)
    assert all(link.startswith(("#", "data:")) for link in found.links)  # nothing is fetched
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert not [tag for tag, _ in found.tags if tag in ("script", "iframe", "object")]
    assert all(attributes.get("aria-label") for tag, attributes in found.tags if tag == "svg")
    assert all("scope" in attributes for tag, attributes in found.tags if tag == "th")
    assert sum(tag == "svg" for tag, _ in found.tags) >= 6
    words = " ".join(found.text)
    for row in table_rows(read_study(done)):
        assert row["name"] in words
        assert f"{100 * row['mmlu_micro']['acc']:.1f}" in words


def test_what_a_model_writes_cannot_become_part_of_the_page(done):
    study = read_study(done)
    for model in study.models:
        model.parts["generation"]["samples"][0]["text"] = "</td><script>alert(1)</script>"
    assert "<script>" not in page(study)
    assert "&lt;script&gt;" in page(study)


def test_the_table_has_a_line_for_every_model(done):
    lines = text_table(read_study(done)).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [model.name for model in read_study(done).models]
    assert lines[-1].startswith("+- is one standard error")


def test_all_right_is_not_certain():
    study = planted_study(planted("original", "original", [True] * 3, LOW, 6), planted("m", "merge", GOOD, LOW))
    shown = text_table(study)
    assert "1.0000 [0.44, 1.00]" in shown  # three of three
    assert "0.9000 +- 0.0213" in shown
    assert "+- 0.0000" not in shown


def test_what_was_not_measured_has_no_column(done):
    study = read_study(done)
    whole = {"MMLU micro", "MMLU macro", "perplexity", "LAMBADA"}
    assert whole < headings(page(study))
    assert "LAMBADA" in text_table(study)
    for model in study.models:
        del model.parts["cloze"]
    assert whole & headings(page(study)) == whole - {"LAMBADA"}
    assert "LAMBADA" not in text_table(study)
    del study.models[1].parts["text"]  # of one alone
    assert "perplexity" in headings(page(study))


def headings(text):
    return set(re.findall(r'<th scope="col">([^<]+)</th>', text))


def test_a_study_under_way_has_a_report(done, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(done, out)
    record = json.loads((out / "study.json").read_text())
    (out / "study.json").write_text(json.dumps(record | {"finished": False}))
    (out / "top" / "results.json").unlink()
    study = read_study(out)
    assert any("not finished" in line for line in answer(study, verdicts(study)))
    assert "not finished" in page(study)


def test_speed_is_tokens_over_time(tiny_cache):
    lm, _ = load_model(tiny_source("llama3-8b", tiny_cache).checkpoint(), "cpu", "float32", self_check=False)
    ticks = iter(range(1000))
    found = measure_speed(lm.model, 3, prompt=8, generate=4, repeats=2, clock=lambda: float(next(ticks)))
    assert found.prefill_per_s == 3 * 8  # one tick each
    assert found.decode_per_s == 3 * 4
    assert found.prefill_range == (24.0, 24.0)
    weights = sum(parameter.numel() * 4 for parameter in lm.model.parameters())
    assert found.peak_bytes > weights
    wider = measure_speed(lm.model, 12, prompt=8, generate=1, repeats=1)
    assert wider.peak_bytes > found.peak_bytes


def test_speed_of_every_family(any_tiny):
    lm, _ = load_model(any_tiny.checkpoint(), "cpu", "float32", self_check=False)
    found = measure_speed(lm.model, 2, prompt=6, generate=2, repeats=1)
    assert found.prefill_per_s > 0
    assert found.decode_per_s > 0


def test_a_file_and_the_command_line_are_one_study(tmp_path):
    (tmp_path / "study.yaml").write_text("model: m\nmerges: [a.json]\nmmlu: {limit: 5, num_fewshot: 0}\nskip: [speed]\n")
    content = merged(read_settings(tmp_path / "study.yaml"), {"model": None, "mmlu": {"limit": 7, "subjects": None}})
    found = make_settings(content, "x")
    assert (found.model, found.mmlu.limit, found.mmlu.num_fewshot, found.skip) == ("m", 7, 0, ("speed",))
    written = read_settings_of(found)
    assert make_settings(written, "x") == found


def read_settings_of(settings: Settings):
    """The settings as study.json holds them, without what is not set."""
    content = json.loads(json.dumps(settings.to_dict()))
    return {
        key: {inner: one for inner, one in value.items() if one is not None} if isinstance(value, dict) else value
        for key, value in content.items()
        if value is not None
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": "m"}, "'merges' is missing"),
        ({"model": "m", "merges": ["a"], "modle": 1}, "unknown key 'modle' \\(did you mean 'model'\\?\\)"),
        ({"model": "m", "merges": ["a"], "mmlu": {"limt": 1}}, "mmlu: unknown key 'limt' \\(did you mean 'limit'\\?\\)"),
        ({"model": "m", "merges": ["a"], "mmlu": {"limit": 0}}, "'limit' is 0, expected at least 1"),
        ({"model": "m", "merges": ["a"], "controls": ["drop-lst"]}, "did you mean 'drop-last'"),
        ({"model": "m", "merges": ["a"], "skip": ["mmul"]}, "did you mean 'mmlu'"),
        ({"model": "m", "merges": ["a"], "speed": {"batches": [0]}}, "expected positive whole numbers"),
        ({"model": "m", "merges": ["a"], "keep_checkpoints": "maybe"}, "expected true or false"),
        ({"model": "m", "merges": ["a"], "skip": ["mmlu", "text", "cloze", "generation", "speed"]}, "leave at least one"),
        ({"model": "m", "merges": [1]}, "merges holds 1"),
        ({"model": "m", "merges": ["a"], "generation": {"prompts": "x"}}, "expected a list"),
    ],
)
def test_wrong_settings_are_named(content, said):
    with pytest.raises((MergeError, DataError), match=said):
        make_settings(content, "study.yaml")


def test_folders_that_are_in_use(small, done, tmp_path):
    with pytest.raises(OutputError, match="go on with it by --resume"):
        run_study(settings_of(small), done)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    for resume in (True, False):
        with pytest.raises(OutputError, match="else"):
            run_study(settings_of(small), tmp_path / "else", resume=resume)
    with pytest.raises(DataError, match=r"holds no study\.json"):
        read_study(tmp_path / "else")
    with pytest.raises(DataError, match=r"none\.txt cannot be read"):
        run_study(settings_of(small, text={"file": str(tmp_path / "none.txt")}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_as_a_user_runs_it(run, small):  # noqa: F811 (the fixture)
    config = {
        "model": str(small / "model"), "merges": [str(small / "top.json"), str(small / "other.json")],
        "controls": ["drop-last", "uniform"], "speed": {"batches": [1], "prompt": 8, "generate": 2, "repeats": 1},
        "generation": {"prompts": ["A"], "tokens": 2}, "mmlu": {"data_dir": str(small / "mmlu"), "subjects": ["anatomy"]},
        "text": {"file": str(small / "text.txt"), "tokens": 150, "choose_tokens": 64}, "skip": ["cloze"],
    }  # fmt: skip
    (run.folder / "study.yaml").write_text(json.dumps(config))
    done = run("pipeline", "--config", "study.yaml", "--num-fewshot", 1, "--out", "runs/study")
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last == {"out": "runs/study", "models": 4, "failed": 0, "report": "runs/study/report.html"}
    assert "other.json is left out" in done.stderr
    assert "drop-last-1" in done.stdout
    refused = run("pipeline", "--config", "study.yaml", "--out", "runs/study", status=1)
    assert len(refused.stderr.strip().splitlines()) == 2  # the file that is left out, and why not
    run("pipeline", "--config", "study.yaml", "--num-fewshot", 1, "--out", "runs/study", "--resume")
    before = (run.folder / "runs/study/report.html").read_text()
    (run.folder / "runs/study/report.html").unlink()
    assert run("report", "runs/study").stdout.strip() == "runs/study/report.html"
    assert (run.folder / "runs/study/report.html").read_text() == before
    said = json.loads(run("report", "runs/study", "--json").stdout)
    assert [one["name"] for one in said["models"]] == ["original", "top", "drop-last-1", "uniform-1"]
    compared = run(
        "compare", "runs/study/original/results.json", "runs/study/top/results.json", "runs/study/drop-last-1/results.json"
    )
    assert "missing" not in compared.stdout
    assert re.search(r"  the text +no interval: too little text \(1 window\)\n", compared.stdout)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--alphas", "x.json"), 2, "give --model"),
        (("--model", "tiny:llama3-8b"), 2, "give --alphas"),
        (("--model", "tiny:llama3-8b", "--alphas", "x.json"), 1, "x.json cannot be read"),
        (("--model", "tiny:llama3-8b", "--alphas", "x.json", "--controls", "drp"), 1, "controls holds 'drp'"),
        (("--model", "tiny:llama3-8b", "--alphas", "x.json", "--limit", "0"), 1, "'limit' is 0"),
        (("--config", "none.yaml"), 1, "none.yaml cannot be read"),
    ],
)
def test_bad_usage(arguments, status, said, run):  # noqa: F811
    done = run("pipeline", *arguments, status=status)
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 or status == 2
    assert not list(run.folder.iterdir())


def test_no_study_no_report(run):  # noqa: F811
    done = run("report", "nothing", status=1)
    assert done.stderr.strip() == "error: nothing cannot be read: no such file or folder"
    assert CONFIGS.is_dir()
