"""What fits below a parameter budget: exact counts, lists that leave nothing out, and refusals that say what to change."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import CONFIGS, NAMES, ROOT

from merge.fusion.budget import (
    FUSER_MODES,
    NORMS,
    Backbone,
    BudgetError,
    Combination,
    Fusers,
    Part,
    alone,
    backbone_parameters,
    check_budget,
    fitting,
    fuser_parameters,
    largest_donor,
    largest_host,
    largest_rank,
    pairings,
    read_backbone,
    tap_layers,
)
from merge.fusion.errors import FusionError
from merge.layer_config import cut_config
from merge.records import read_json
from merge.tiny import tiny_config

FOUR = ("llama3-8b", "mistral-7b", "gemma2-2b", "phi3-mini")


def config_of(name):
    return read_json(CONFIGS / "models" / f"{name}.json")["config"]


def backbone(name):
    return read_backbone(config_of(name), name)


def combination(host, layers, *donors, **settings):
    """`donors` are (name, layers), each with three taps."""
    parts = tuple(Part(backbone(name), depth, tap_layers((0.5, 0.75, 1), depth)) for name, depth in donors)
    return Combination(Part(backbone(host), layers), parts, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Counting


@pytest.mark.parametrize(
    ("name", "layer", "embeddings", "head", "total"),
    [
        ("llama3-8b", 218_112_000, 525_336_576, 525_336_576, 8_030_261_248),
        ("mistral-7b", 218_112_000, 131_072_000, 131_072_000, 7_241_732_096),
        ("gemma2-2b", 77_865_984, 589_824_000, 0, 2_614_341_888),
        ("phi3-mini", 113_252_352, 98_500_608, 98_500_608, 3_821_079_552),
    ],
)
def test_the_four_models(name, layer, embeddings, head, total):
    found = backbone(name)
    assert (found.layer, found.head) == (layer, head)
    assert found.rest == embeddings + found.hidden_size
    assert backbone_parameters(config_of(name)) == total
    assert backbone_parameters(config_of(name), head=False) == total - head
    assert backbone_parameters(config_of(name), layers=5) == total - (found.num_hidden_layers - 5) * layer


@pytest.mark.parametrize(
    ("host", "layers", "donor", "depth", "parameters", "room"),
    [
        ("llama3-8b", 19, "gemma2-2b", 26, 7_809_147_136, 190_852_864),
        ("llama3-8b", 19, "gemma2-2b", 21, 7_419_817_216, 580_182_784),
        ("llama3-8b", 21, "gemma2-2b", 22, 7_933_907_200, 66_092_800),
        ("llama3-8b", 20, "gemma2-2b", 26, 8_027_259_136, -27_259_136),
        ("phi3-mini", 32, "gemma2-2b", 26, 6_435_421_440, 1_564_578_560),
        ("mistral-7b", 22, "phi3-mini", 24, 7_877_172_224, 122_827_776),
        ("mistral-7b", 18, "phi3-mini", 32, 7_910_743_040, 89_256_960),
        ("mistral-7b", 23, "gemma2-2b", 26, 7_893_065_984, 106_934_016),
        ("llama3-8b", 19, "phi3-mini", 21, 7_671_608_320, 328_391_680),
        ("llama3-8b", 18, "phi3-mini", 24, 7_793_253_376, 206_746_624),
    ],
)
def test_two_models(host, layers, donor, depth, parameters, room):
    found = combination(host, layers, (donor, depth))
    assert (found.backbone_parameters, found.room) == (parameters, room)
    assert found.fused_away == backbone(host).num_hidden_layers - layers
    assert found.fits == (room > found.fuser_parameters)


@pytest.mark.parametrize("layers", [None, 1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_transformers(name, layers):
    """Hosts are causal language models; donors are the bare model, as it comes without a head."""
    config = tiny_config(config_of(name))
    cut = cut_config(config, range(layers or config["num_hidden_layers"])).config
    data = dict(cut)
    settings = transformers.AutoConfig.for_model(data.pop("model_type"), **data)
    for kind, head in ((transformers.AutoModelForCausalLM, True), (transformers.AutoModel, False)):
        with torch.device("meta"):
            model = kind.from_config(settings)
        unique = sum(parameter.numel() for parameter in model.parameters())
        assert backbone_parameters(config, layers=layers, head=head) == unique


# K = 4 taps of widths 32, 32, 48, 48, d = 64, r = 32, H = 4; matrices, then what is normed
KNOWN = {  # by hand; test_fusion.py compares every mode with its module
    "concat": (32 * 64 + 32 * 160 + 64 * 5 * 32, 160),
    "weighted": (32 * 160 + 64 * 32 + 4, 160),
    "gate": (32 * 160 + 64 * 32 + 5 * 64 + 5, 160),
    "attention": (2 * 32 * 64 + 2 * 32 * 160 + 32, 224),
    "cross": (2 * 32 * 64 + 2 * 32 * 160 + 4, 224),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", KNOWN)
def test_fusers(mode, norm):
    matrices, normed = KNOWN[mode]
    assert fuser_parameters(mode, 64, [32, 32, 48, 48], 32, norm=norm) == matrices + NORMS[norm] * normed


@pytest.mark.parametrize(
    ("mode", "parameters"),
    [("concat", 35_136), ("weighted", 14_664), ("gate", 15_306), ("attention", 29_184), ("cross", 29_120 + 2 * 4)],
)
def test_fusers_at_two_sites(mode, parameters):
    """As counted in a prototype whose cross had no learned distance; here it has one number for each head."""
    assert Fusers(mode, 32, sites=2).parameters(64, [32, 32, 48, 48]) == parameters


@pytest.mark.parametrize(
    ("mode", "one", "three"),
    [
        ("concat", 14.95, 28.1),
        ("weighted", 6.56, 11.3),
        ("gate", 6.60, 11.4),
        ("attention", 13.13, 22.6),
        ("cross", 13.13, 22.6),
    ],
)
def test_fusers_of_llama_and_gemma(mode, one, three):
    """Millions at four sites of rank 256, with one tap and with three."""
    fusers = Fusers(mode, 256, sites=4)
    assert fusers.parameters(4096, [2304]) / 1e6 == pytest.approx(one, abs=0.006)
    assert fusers.parameters(4096, [2304] * 3) / 1e6 == pytest.approx(three, abs=0.06)


@given(st.sampled_from(FUSER_MODES), st.sampled_from(list(NORMS)), st.integers(1, 50), st.lists(st.integers(1, 50), min_size=1))
def test_parameters_are_affine_in_the_rank(mode, norm, hidden, widths):
    """Which `largest_rank` relies on."""
    a, b, c = (fuser_parameters(mode, hidden, widths, rank, norm=norm) for rank in (4, 8, 12))
    assert 0 < a < b < c == 2 * b - a


def test_taps():
    assert tap_layers((0.5, 0.75, 1), 26) == (13, 20, 26)
    assert tap_layers((1, 0.5), 21) == (11, 21)
    assert tap_layers((0.25, 0.5), 8) == (4, 8)  # the last tap is where the donor ends
    assert tap_layers((0.98, 0.99, 1), 4) == (2, 3, 4)  # no two at the same place
    assert tap_layers((0.01, 0.02, 1), 4) == (1, 2, 4)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5, unique=True), st.integers(1, 40))
def test_taps_ascend_to_the_last_layer(taps, layers):
    assume(layers >= len(taps))
    found = tap_layers(taps, layers)
    assert len(found) == len(taps)
    assert found[0] >= 1
    assert found[-1] == layers
    assert all(one < two for one, two in itertools.pairwise(found))


# ---------------------------------------------------------------------------------------------------------------------
# What fits


@st.composite
def backbones(draw, name):
    size = st.integers(1, 40)
    return Backbone(name, draw(st.integers(1, 8)), draw(st.integers(3, 7)), draw(size), draw(size), draw(st.just(0) | size))


@st.composite
def settings(draw):
    """Arguments of `fitting` for a host and one or two donors; the budget is between nothing and everything."""
    host, *donors = (draw(backbones(name)) for name in "abc"[: draw(st.integers(2, 3))])
    mode = draw(st.sampled_from(FUSER_MODES))
    taps = draw(st.lists(st.sampled_from([0.2, 0.5, 0.9, 1.0]), min_size=1, max_size=3, unique=True))
    fusers = Fusers(mode, rank=2, sites=draw(st.integers(1, 2)), heads=1)
    parts = tuple(Part(one, one.num_hidden_layers, tap_layers(taps, one.num_hidden_layers)) for one in donors)
    whole = Combination(Part(host, host.num_hidden_layers), parts, fusers).parameters
    options = {"budget": draw(st.integers(1, whole + 1)), "max_fused": draw(st.sampled_from([0, 0.5, 0.9]))}
    return host, donors, options | {"fusers": fusers, "taps": taps}


def with_host(one, layers):
    return replace(one, host=replace(one.host, layers=layers))


def with_donor(one, index, layers):
    """Donor `index` at another depth with as many taps; where they are does not count."""
    parts = list(one.donors)
    parts[index] = replace(parts[index], layers=layers)
    return replace(one, donors=tuple(parts))


@pytest.mark.parametrize("every_cut", [False, True])
@given(settings())
def test_listed_is_what_fits_and_no_larger_host_does(every_cut, setting):
    host, donors, options = setting
    for one in fitting(host, donors, every_cut=every_cut, **options):
        assert one.fits
        assert one.parameters < options["budget"]
        assert one.parameters == one.backbone_parameters + one.fuser_parameters
        assert one.fused_away <= options["max_fused"] * host.num_hidden_layers
        assert [part.taps[-1] for part in one.donors] == [part.layers for part in one.donors]
        if one.fused_away:
            assert not with_host(one, one.host.layers + 1).fits


@given(settings())
def test_every_cut_leaves_nothing_out(setting):
    """Against all combinations one by one: each that fits is a listed one or has fewer layers, and no listed one can grow."""
    host, donors, options = setting
    budget, taps = options["budget"], options["taps"]
    deepest = [max(len(taps), math.floor(max(taps) * one.num_hidden_layers + 0.5)) for one in donors]
    fewest = max(options["fusers"].sites, math.ceil(host.num_hidden_layers * (1 - options["max_fused"]) - 1e-9))
    fit = set()
    for layers, *cuts in itertools.product(
        range(fewest, host.num_hidden_layers + 1), *(range(len(taps), most + 1) for most in deepest)
    ):
        parts = tuple(Part(one, cut, tap_layers(taps, cut)) for one, cut in zip(donors, cuts, strict=True))
        if Combination(Part(host, layers), parts, options["fusers"], budget).parameters < budget:
            fit.add((layers, *cuts))
    listed = [
        (one.host.layers, *(part.layers for part in one.donors)) for one in fitting(host, donors, every_cut=True, **options)
    ]
    assert len(listed) == len(set(listed))
    largest = {one for one in fit if not any(one != two and all(a <= b for a, b in zip(one, two, strict=True)) for two in fit)}
    assert set(listed) == largest


@given(settings())
def test_a_short_list_leaves_out_no_pairing_that_fits_at_its_depths(setting):
    """Depths fall and hosts grow along the list."""
    host, donors, options = setting
    found = fitting(host, donors, **options)
    assert all(one.host.layers < two.host.layers for one, two in itertools.pairwise(found))
    assert all(one.donors[0].layers >= two.donors[0].layers for one, two in itertools.pairwise(found))
    if found:
        assert fitting(host, donors, every_cut=True, **options)


@given(settings())
def test_largest(setting):
    """Each of the three is the largest that fits when everything else stays."""
    host, donors, options = setting
    parts = tuple(Part(one, one.num_hidden_layers, tap_layers(options["taps"], one.num_hidden_layers)) for one in donors)
    one = Combination(Part(host, host.num_hidden_layers), parts, options["fusers"], options["budget"])
    layers = largest_host(one)
    assert layers == 0 or with_host(one, layers).fits
    assert layers == host.num_hidden_layers or not with_host(one, layers + 1).fits
    for index, donor in enumerate(donors):
        depth = largest_donor(one, index)
        assert depth == 0 or with_donor(one, index, depth).fits
        assert depth == donor.num_hidden_layers or not with_donor(one, index, max(depth + 1, len(options["taps"]))).fits
    rank = largest_rank(one)
    assert rank == 0 or replace(one, fusers=replace(one.fusers, rank=rank)).fits
    assert not replace(one, fusers=replace(one.fusers, rank=rank + one.fusers.heads)).fits


def test_llama_and_gemma():
    """Thirteen layers fused away, as the published merge does; fewer where the donor is cut."""
    found = fitting(backbone("llama3-8b"), [backbone("gemma2-2b")])
    assert [str(one) for one in found] == [f"llama3-8b[{n}] + gemma2-2b[{m}]" for n, m in ((19, 26), (21, 21), (23, 16))]
    assert found[0].donors[0].taps == (13, 20, 26)
    assert found[0].fuser_parameters == 16_942_080


def test_all_four_at_once_need_shallow_donors():
    """Beside half of any host, three donors fit only if one of them is cut below half."""
    models = [backbone(name) for name in FOUR]
    four = [(host, donors) for host, donors in pairings(models, 3) if len(donors) == 3]
    assert len(four) == 4
    for host, donors in four:
        for one in fitting(host, donors):
            assert min(part.layers / part.backbone.num_hidden_layers for part in one.donors) < 0.5


def test_alone():
    assert alone(backbone("llama3-8b")).parameters == 7_812_149_248
    assert alone(backbone("llama3-8b"), budget=8_030_261_249).fused_away == 0
    assert alone(backbone("llama3-8b"), budget=8_030_261_248).fused_away == 1  # strictly below
    assert alone(backbone("llama3-8b"), budget=4_000_000_000) is None


def test_pairings():
    models = [backbone(name) for name in FOUR]
    found = [(host.name, *(one.name for one in donors)) for host, donors in pairings(models)]
    assert len(found) == len(set(found)) == 4 * 3 + 4 * 3
    assert all(len(set(names)) == len(names) for names in found)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_over_budget_says_what_fits():
    with pytest.raises(BudgetError) as caught:
        check_budget(combination("llama3-8b", 20, ("gemma2-2b", 26)))
    assert str(caught.value) == (
        "llama3-8b[20] + gemma2-2b[26] has 8,044,201,216 parameters, 16,942,080 of them in fusers: 44,201,217 too many to be "
        "below 8,000,000,000; what fits: 1 more host layer fused away (down to 19), or gemma2-2b cut to its first 25 layers, "
        "with no tap above"
    )
    check_budget(combination("llama3-8b", 19, ("gemma2-2b", 26)))
    check_budget(combination("llama3-8b", 20, ("gemma2-2b", 25)))


def test_over_budget_by_the_fusers_alone():
    wide = combination("mistral-7b", 25, ("gemma2-2b", 21), fusers=Fusers("attention", 1024))
    with pytest.raises(BudgetError, match=r"or rank 908 or less$"):
        check_budget(wide)
    check_budget(replace(wide, fusers=Fusers("attention", 908)))
    with pytest.raises(BudgetError):
        check_budget(replace(wide, fusers=Fusers("attention", 912)))


def test_exactly_the_budget_is_one_too_many():
    fits = combination("phi3-mini", 32, ("gemma2-2b", 26))
    check_budget(replace(fits, budget=fits.parameters + 1))
    with pytest.raises(BudgetError, match=r"fusers: 1 too many to be below"):
        check_budget(replace(fits, budget=fits.parameters))


def test_a_host_alone_over_budget():
    with pytest.raises(BudgetError, match=r"0 of them in fusers: .* what fits: 1 more host layer fused away \(down to 31\)$"):
        check_budget(combination("llama3-8b", 32))


def test_no_single_change_fits():
    with pytest.raises(BudgetError, match=r"no single change fits; see scripts/plan_budget\.py$"):
        check_budget(combination("llama3-8b", 32, ("mistral-7b", 32), ("gemma2-2b", 26)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "none"}, f"fusion mode 'none' is not known; known: {', '.join(FUSER_MODES)}"),
        ({"norm": "batch"}, "norm 'batch' is not known; known: none, rms, layer"),
        ({"widths": []}, "no taps to read"),
        ({"rank": 0}, "rank is 0, expected at least 1"),
        ({"heads": 0}, "heads is 0, expected at least 1"),
        ({"hidden": 0}, "hidden size is 0"),
        ({"widths": [4, 0]}, "hidden size is 0"),
        ({"rank": 6}, "rank 6 is not divided by 4 heads"),
    ],
)
def test_impossible_fusers(changes, said):
    with pytest.raises(FusionError, match=said):
        fuser_parameters(**{"mode": "gate", "hidden": 8, "widths": [8], "rank": 8} | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "x: the sizes of model_type 'mamba' are not known; known: llama, mistral"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": None}, "x: 'hidden_size' of its config is None, expected a whole number"),
        ({"num_hidden_layers": "32"}, "'num_hidden_layers' of its config is '32'"),
        ({"vocab_size": True}, "'vocab_size' of its config is True"),
        ({"head_dim": -1}, "'head_dim' of its config is -1"),
    ],
)
def test_impossible_configs(changes, said):
    with pytest.raises(FusionError, match=said):
        read_backbone(config_of("llama3-8b") | changes, "x")


def test_layers_outside_the_model():
    for layers in (0, 33):
        with pytest.raises(FusionError, match=rf"cannot have {layers} layers; expected 1 to 32"):
            backbone_parameters(config_of("llama3-8b"), layers=layers)


def test_impossible_plans():
    small, large = Backbone("small", 8, 2, 10, 10, 0), Backbone("large", 8, 9, 10, 10, 0)
    with pytest.raises(FusionError, match="small has 2 layers, too few for 3 taps"):
        fitting(large, [small])
    with pytest.raises(FusionError, match="small has 2 layers, too few for 3 sites"):
        fitting(small, [large])
    with pytest.raises(FusionError, match="expected relative depths above 0 and up to 1"):
        tap_layers((0.0, 1.0), 9)
    with pytest.raises(FusionError, match="3 taps need as many layers, found 2"):
        tap_layers((0.5, 0.75, 1), 2)
    with pytest.raises(FusionError, match="sites is 0, expected at least 1"):
        Fusers(sites=0).parameters(8, [8])
    with pytest.raises(FusionError, match=r"layers to fuse away is 1\.0"):
        alone(large, max_fused=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture
def run(tmp_path):
    """Runs scripts/plan_budget.py from a folder that is not the checkout."""

    def call(*arguments, status=0):
        command = [sys.executable, str(ROOT / "scripts" / "plan_budget.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    return call


def test_the_documented_command(run):
    said = run("--budget", "8e9").stdout
    assert said == run().stdout == run("--budget", "8B").stdout
    lines = [line.split() for line in said.splitlines()]
    assert ["llama3-8b", "31/32", "1", "(alone)", "7,812,149,248", "187,850,752"] in lines
    assert "llama3-8b 19/32 13 gemma2-2b 26/26 13,20,26 7,809,147,136 190,852,864 16,942,080 2,888".split() in lines
    assert "phi3-mini 32/32 - gemma2-2b 26/26 13,20,26 6,435,421,440 1,564,578,560 15,366,144 any".split() in lines
    assert max(map(len, said.splitlines())) < 128
    assert "does not fit" not in said
    page = (ROOT / "docs" / "cross-architecture.md").read_text()
    assert said.strip() in page


def test_json(run):
    found = json.loads(run("--json", "--budget", "8e9", "--mode", "gate", "--rank", 64, "--taps", "0.5,1").stdout)
    assert found["budget"] == 8_000_000_000
    assert found["fusers"] == {"mode": "gate", "rank": 64, "sites": 3, "heads": 4, "norm": "rms", "taps": [0.5, 1.0]}
    for one in found["combinations"]:
        assert one["fits"]
        assert one["parameters"] == one["backbone_parameters"] + one["fuser_parameters"] < 8_000_000_000
        assert one["room"] == 8_000_000_000 - one["backbone_parameters"]
        assert one["fused_away"] == one["host"]["num_hidden_layers"] - one["host"]["layers"]
        assert all(donor["taps"][-1] == donor["layers"] for donor in one["donors"])
    names = {(one["host"]["name"], *(donor["name"] for donor in one["donors"])) for one in found["combinations"]}
    models = [backbone(name) for name in FOUR]
    assert names == {(name,) for name in FOUR} | {
        (host.name, *(one.name for one in donors)) for host, donors in pairings(models)
    }


def test_all_is_the_library_s_list(run):
    arguments = ("--json", "--all", "--host", "llama3-8b", "--donor", "gemma2-2b")
    rows = json.loads(run(*arguments).stdout)["combinations"][1:]
    expected = fitting(backbone("llama3-8b"), [backbone("gemma2-2b")], every_cut=True)
    assert [(one["host"]["layers"], one["donors"][0]["layers"]) for one in rows] == [
        (one.host.layers, one.donors[0].layers) for one in expected
    ]
    assert (21, 22) in [(one.host.layers, one.donors[0].layers) for one in expected]


def test_folders_are_models_too(run, tmp_path):
    """A layer-fused folder is counted as it is: its config says how many layers are left."""
    folder = tmp_path / "fused"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of("llama3-8b") | {"num_hidden_layers": 19}))
    said = run("--host", "fused", "--donor", "gemma2-2b").stdout
    assert "fused 19/19 - gemma2-2b 26/26 13,20,26 7,809,147,136 190,852,864 16,942,080 2,888".split() in [
        line.split() for line in said.splitlines()
    ]
    assert "fused" in run("--models", f"gemma2-2b,{folder}").stdout
    (folder / "config.json").write_text("[]")
    assert "is no config" in run("--host", "fused", status=1).stderr
    (folder / "config.json").unlink()
    assert "fused has no config.json" in run("--host", "fused", status=1).stderr


def test_two_donors_have_a_line_each(run):
    lines = run("--host", "mistral-7b", "--donor", "gemma2-2b", "phi3-mini").stdout.splitlines()
    (row,) = (n for n, line in enumerate(lines) if line.startswith("mistral-7b") and "gemma2-2b" in line)
    assert lines[row].split()[:5] == ["mistral-7b", "16/32", "16", "gemma2-2b", "16/26"]
    assert lines[row + 1].split() == ["phi3-mini", "19/32", "10,14,19"]
    assert lines[row].index("gemma2-2b") == lines[row + 1].index("phi3-mini")


def test_what_does_not_fit_is_named_once(run):
    """Neither with more donors: what fails alone is not repeated with company."""
    said = run("--budget", "4e9", "--models", "llama3-8b,gemma2-2b,phi3-mini").stdout
    named = said.partition("does not fit, nor with more donors: ")[2].partition("\n\n")[0]
    assert " ".join(named.split()).split(", ") == [
        "llama3-8b",
        "gemma2-2b + llama3-8b + phi3-mini",
        "phi3-mini + llama3-8b + gemma2-2b",
    ]
    record = json.loads(run("--budget", "1000", "--json").stdout)
    assert record["combinations"] == []
    assert record["too_large"] == list(FOUR)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "llama3-8"], "no folder llama3-8 and no config of that name (did you mean llama3-8b?)"),
        (["--models", "llama3-8b,nothing"], "no folder nothing and no config of that name (known: gemma-2b"),
        (["--rank", "0"], "rank is 0"),
        (["--rank", "250"], "rank 250 is not divided by 4 heads"),
        (["--sites", "0"], "sites is 0"),
        (["--sites", "40"], "llama3-8b has 32 layers, too few for 40 sites"),
        (["--max-fused", "1"], "share of layers to fuse away is 1.0"),
        (["--max-fused", "nan"], "share of layers to fuse away is nan"),
    ],
)
def test_wrong_input(arguments, said, run):
    done = run(*arguments, status=1)
    assert done.stdout == ""
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "lots"], "'lots' is no number of parameters; expected one as 8e9 or 8B"),
        (["--budget", "nan"], "no number of parameters"),
        (["--budget", "0"], "no number of parameters"),
        (["--budget", "1e99999999"], "no number of parameters"),
        (["--budget=-8e9"], "no number of parameters"),
        (["--taps", "0,1"], "expected different depths above 0 and up to 1"),
        (["--taps", "0.5,0.5"], "expected different depths"),
        (["--taps", "half"], "expected depths as 0.5,0.75,1"),
        (["--mode", "none"], "invalid choice: 'none'"),
        (["--models", "llama3-8b,"], "expected names as"),
        (["--models", "llama3-8b,llama3-8b"], "--models names llama3-8b twice"),
        (["--donor", "llama3-8b", "llama3-8b"], "--donor names llama3-8b twice"),
        (["--models", "gemma2-2b", "--donor", "gemma2-2b"], "every model is a donor"),
    ],
)
def test_wrong_usage(arguments, said, run):
    done = run(*arguments, status=2)
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_help_has_examples(run):
    said = run("--help").stdout
    assert said.count("  python scripts/plan_budget.py") == 3


def test_starts_without_torch(tmp_path):
    code = (
        "import runpy, sys; sys.argv = {argv}; sys.path.insert(0, {scripts!r})\n"
        "try: runpy.run_path({path!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {{'torch', 'transformers', 'datasets'}} & sys.modules.keys(), 'heavy imports'"
    )
    path = ROOT / "scripts" / "plan_budget.py"
    text = code.format(argv=[str(path), "--all"], scripts=str(path.parent), path=str(path))
    subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True, capture_output=True)
