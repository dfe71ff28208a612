"""Alphas files: both formats, the shipped ones, and every way to get them wrong."""

import json
import math

import pytest
from hypothesis import given
from strategies import steps_and_layers
from tiny import ROOT

from merge.alphas import Alphas, alphas_from_dict, alphas_to_dict, plan_from_alphas, read_alphas
from merge.errors import PlanError, RecordError
from merge.plan import Step

GOOD = {
    "schema_version": 1,
    "name": "x",
    "model": "org/name",
    "num_hidden_layers": 4,
    "steps": [{"into": 2, "remove": 3, "alpha": 0.5}],
}
LISTED = [{"layer_to_merge_into": 2, "layer_to_remove": 3, "ratio_i_alpha": 0.5, "step": 0}]


def write(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@given(steps_and_layers())
def test_round_trip(case):
    steps, layers = case
    alphas = Alphas(steps, "x", "org/name", layers, {"method": "by hand"})
    assert alphas_from_dict(json.loads(json.dumps(alphas_to_dict(alphas)))) == alphas


def test_both_formats_say_the_same(tmp_path):
    ours = read_alphas(write(tmp_path, GOOD))
    theirs = read_alphas(write(tmp_path, LISTED))
    assert ours.steps == theirs.steps == (Step(2, 3, 0.5),)
    assert plan_from_alphas(theirs, 4).rows == plan_from_alphas(ours).rows
    with pytest.raises(PlanError, match="do not say how many layers"):
        plan_from_alphas(theirs)


@pytest.mark.parametrize(
    ("name", "c18", "c19", "tail"),
    [
        ("base", 0.6216, 0.2323, 0.0012),
        ("optimized", 0.3818, 0.3549, 0.0130),
        ("gradient", 0.6021, 0.2086, 0.0013),
        ("optimized_all", 0.6284, 0.1193, 0.0190),
    ],
)
def test_shipped_sets_have_the_published_mixtures(name, c18, c19, tail):
    """Effective coefficients computed independently of this code (notes on layer merging, section 2)."""
    plan = plan_from_alphas(read_alphas(ROOT / "alphas" / f"{name}.json"))
    assert [row.is_unit for row in plan.rows] == [True] * 18 + [False]
    mix = plan.rows[18].mix
    assert mix[18] == pytest.approx(c18, abs=6e-5)
    assert mix[19] == pytest.approx(c19, abs=6e-5)
    assert math.fsum(mix[layer] for layer in range(25, 32)) == pytest.approx(tail, abs=1.1e-4)
    assert math.fsum(mix.values()) == pytest.approx(1.0, abs=1e-12)


def test_all_shipped_files_are_read():
    paths = sorted((ROOT / "alphas").glob("*.json"))
    assert {path.stem for path in paths} == {"base", "gradient", "optimized", "optimized_all", "smollm2", "smollm2_base"}
    for path in paths:
        assert read_alphas(path).name == path.stem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD | {"steps": []}, "there are no steps"),
        (GOOD | {"steps": [{"into": 2, "remove": 3, "alpha": 1.5}]}, "alpha is 1.5, expected a number from 0 to 1"),
        (GOOD | {"steps": [{"into": 2, "remove": 3, "alpha": "0.5"}]}, "'alpha' is '0.5', expected a number"),
        (GOOD | {"steps": [{"into": 1, "remove": 3, "alpha": 0.5}]}, "not neighbours"),
        (GOOD | {"steps": [{"into": 3, "remove": 4, "alpha": 0.5}]}, "there is no layer 4"),
        (GOOD | {"steps": [{"into": 2, "remove": 3}]}, "step 0: 'alpha' is missing"),
        (GOOD | {"schema_version": 3}, "'schema_version' is 3, expected 1"),
        (GOOD | {"nmae": "y"}, "unknown key 'nmae' .did you mean 'name'"),
        (GOOD | {"num_hidden_layers": -4}, "'num_hidden_layers' is -4"),
        (LISTED + LISTED, "layer 3 was removed in step 0"),
        ([{"layer_to_merge_into": 2}], "'layer_to_remove' is missing"),
        ([1, 2], "step 0: found 1, expected an object"),
        ([], "there are no steps"),
        ("[1, 2", "not valid JSON"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice"),
        ('{"a": NaN}', "found NaN"),
        (json.dumps(GOOD).replace("0.5", "1e999"), "alpha is inf"),
        ("[" * 100_000, "not valid JSON"),
        (GOOD | {"num_hidden_layers": 10**9}, "expected 1 to 100,000"),
        (GOOD | {"steps": [{"into": 2, "remove": 3, "alpha": 10**400}]}, "'alpha' is a number beyond 64 bits"),
        ([{"layer_to_merge_into": 10**9, "layer_to_remove": 10**9 + 1, "ratio_i_alpha": 0.5}], "beyond 100,000"),
        ('"text"', "found 'text', expected an object"),
    ],
)
def test_bad_files_are_named(content, said, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(RecordError, match=said) as caught:
        read_alphas(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_at_once(tmp_path):
    with pytest.raises(RecordError) as caught:
        read_alphas(write(tmp_path, {"schema_version": "1", "nam": "x", "steps": [{"into": 1}]}))
    assert str(caught.value).count(";") >= 4


def test_wrong_layer_count_for_the_model():
    with pytest.raises(PlanError, match="are for 4 layers but the model has 32"):
        plan_from_alphas(alphas_from_dict(GOOD), 32)


def test_missing_file(tmp_path):
    with pytest.raises(RecordError, match=r"none\.json cannot be read: no such file or folder$"):
        read_alphas(tmp_path / "none.json")
    (tmp_path / "base.json").write_text("{}")
    with pytest.raises(
        RecordError, match=rf"bas\.json cannot be read: no such file or folder; did you mean {tmp_path}/base\.json\?"
    ):
        read_alphas(tmp_path / "bas.json")
    with pytest.raises(RecordError, match=rf"there is no folder {tmp_path}/none"):
        read_alphas(tmp_path / "none" / "base.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(RecordError, match="Is a directory"):
        read_alphas(tmp_path / "folder.json")


@pytest.mark.parametrize("name", ['"\\ud800"', '"\\uDC00x"', '{"\\ud800": 1}'])
def test_half_a_character_is_refused(name, tmp_path):
    """JSON has escapes for halves of characters, which can be written to no file."""
    (tmp_path / "a.json").write_text(f'{{"name": {name}}}')
    with pytest.raises(RecordError, match=r"is not valid JSON: .* surrogates not allowed"):
        read_alphas(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"name": "\\ud83d\\ude00"}')
    with pytest.raises(RecordError, match="'steps' is missing"):
        read_alphas(tmp_path / "b.json")
