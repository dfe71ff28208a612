"""From a recipe to a folder: assembled without loading, trained with exact resume, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from fused import loaded_elsewhere
from safetensors.torch import load_file
from tiny import CONFIGS, ROOT, load, tiny_source
from transformers import AutoModelForCausalLM

import merge.fusion.train as training
from eval.fusion_bench import read_bench
from merge.alphas import plan_from_alphas, read_alphas
from merge.api import Options, merge_checkpoint
from merge.errors import MergeError, OutputError
from merge.fusion import register
from merge.fusion.assemble import FUSERS_FILE, RECORD_FILE, fused_config, make_parts, write_assembled
from merge.fusion.errors import FusionError
from merge.fusion.make import fuse, load_fused
from merge.fusion.recipe import Backbone, Recipe, Training, layer_numbers, read_recipe, recipe_from
from merge.fusion.text import read_documents, split_blocks, token_blocks
from merge.fusion.streams import ALIGNMENTS
from merge.fusion.train import held_out_loss, learning_rate
from merge.publish import work_folder
from merge.source import resolve

HOST, DONORS = "llama3.2-1b", ("gemma2-2b", "phi3-mini")
FUSION = {"mode": "attention", "sites": [0.5, 1.0], "rank": 8, "heads": 2}
TEXT = "".join(f"Line {i} of a text that says {i * i} and then some more.\n" for i in range(60))
CONFIG = """\
schema_version: 1
host: {model: "tiny:llama3.2-1b"}
donors: [{model: "tiny:phi3-mini", taps: [3], alignment: prefix}]
fusion: {mode: gate, sites: [1.0], rank: 8, heads: 2}
training: {text: [text.txt], updates: 4, block: 16, batch: 2, learning_rate: 0.01, evaluate_every: 2}
"""

register()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def recipe_of(text=None, **changes):
    settings = Training((str(text),), updates=6, block=16, batch=2, learning_rate=0.01, evaluate_every=3) if text else None
    donors = (Backbone("tiny:gemma2-2b", taps=(0.1, 0.2)), Backbone("tiny:phi3-mini", taps=(3,), alignment="prefix"))
    return replace(Recipe(Backbone(f"tiny:{HOST}"), donors, FUSION, training=settings), **changes)


def parts_of(recipe, cache, **options):
    names = [one.model.removeprefix("tiny:") for one in (recipe.host, *recipe.donors)]
    return make_parts(recipe, [tiny_source(name, cache) for name in names], **options)


def test_assembled_it_has_the_sources_bytes_and_is_its_host(tmp_path, tiny_cache):
    parts = parts_of(recipe_of(), tiny_cache)
    assert [len(one.plan.rows) for one in parts.blueprints] == [16, 5, 3]
    assert parts.taps == ((3, 5), (3,))
    found = fuse(parts, tmp_path / "out")
    model = load(tmp_path / "out")
    assert sum(value.numel() for value in model.parameters()) == found.parameters == parts.combination.parameters
    tensors = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    sources = [tiny_source(name, tiny_cache).checkpoint() for name in (HOST, *DONORS)]
    for number, source in enumerate(sources):
        for file in source.files:
            for name, value in load_file(source.folder / file.name).items():
                new = f"host.{name}" if number == 0 else f"donors.{number - 1}.{name.removeprefix('model.')}"
                if new in tensors:
                    assert torch.equal(tensors.pop(new), value)
                else:  # heads, and layers above the last tap
                    assert number
                    assert name == "lm_head.weight" or int(name.split(".")[2]) >= (5, 3)[number - 1]
    assert {name.partition(".")[0] for name in tensors} == {"fusers", "tables"}
    ids = torch.tensor([[256, *TEXT.encode()[:40]]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(sources[0].folder)(ids).logits)


def test_a_host_whose_layers_are_fused_on_the_way_is_the_merged_model(tmp_path, tiny_cache):
    alphas = ROOT / "alphas" / "base.json"
    recipe = recipe_of(host=Backbone("tiny:llama3-8b", alphas=str(alphas)))
    fuse(parts_of(recipe, tiny_cache, dtype="float32"), tmp_path / "out")
    source = tiny_source("llama3-8b", tiny_cache)
    merge_checkpoint(plan_from_alphas(read_alphas(alphas)), source, tmp_path / "merged", Options(dtype="float32"))
    ids = torch.tensor([[256, *TEXT.encode()[:40]]])
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids).logits, load(tmp_path / "merged")(ids).logits)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_donors_read_the_hosts_bytes(tmp_path, tiny_cache, alignment):
    recipe = recipe_of()
    recipe = replace(recipe, donors=(replace(recipe.donors[0], alignment=alignment), recipe.donors[1]))
    fuse(parts_of(recipe, tiny_cache), tmp_path / "out")
    assert (tmp_path / "out" / "donor-0").is_dir() == (alignment == "prefix")
    assert (tmp_path / "out" / "donor-1").is_dir()
    model = load(tmp_path / "out")
    ids = torch.tensor([[256, *TEXT.encode()[:30]]])
    with torch.no_grad():
        donor = load(tiny_source("gemma2-2b", tiny_cache).folder)
        expected = donor(ids, output_hidden_states=True).hidden_states  # the twins have one vocabulary of bytes
    aligned = model.features(ids).aligned
    for tap, found in zip((3, 5), aligned, strict=False):
        torch.testing.assert_close(found, expected[tap], rtol=0, atol=1e-4)


def test_donors_with_another_tokenizer_read_the_same_bytes(tmp_path, tiny_cache):
    import shutil

    folder = tmp_path / "donor"
    shutil.copytree(tiny_source("phi3-mini", tiny_cache).folder, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    recipe = recipe_of(donors=(Backbone(str(folder), taps=(3,)),))
    parts = make_parts(recipe, [tiny_source(HOST, tiny_cache), resolve(str(folder))])
    fuse(parts, tmp_path / "out")
    model, same = load(tmp_path / "out"), tokenizer(tiny_cache)
    a, b = same.convert_tokens_to_ids(["a", "b"])
    ids = torch.tensor([same("abba cab")["input_ids"]])
    swapped = ids.where(ids != a, b).where(ids != b, a)
    with torch.no_grad():
        expected = load(folder)(swapped, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(model.features(ids).aligned[0], expected, rtol=0, atol=1e-5)


def test_training_lowers_the_loss_and_changes_fusers_only(tmp_path, tiny_cache, text):
    parts = parts_of(recipe_of(text), tiny_cache)
    rows = []
    found = fuse(parts, tmp_path / "out", training=lambda tokens, row: rows.append((tokens, row)))
    assert found.held_out < found.held_out_before
    assert [row["update"] for _, row in rows] == [1, 2, 3, 4, 5, 6]
    assert sum(tokens for tokens, _ in rows) == found.tokens == 6 * 32
    assert not (tmp_path / "out.work").exists()
    log = (tmp_path / "out" / "training.csv").read_text().splitlines()
    assert len(log) == 7
    fuse(parts_of(recipe_of(), tiny_cache), tmp_path / "plain")
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert (path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()) == (path.name != FUSERS_FILE)
    model = load_fused(tmp_path / "out", "cpu")
    blocks = split_blocks(token_blocks([TEXT], tokenizer(tiny_cache), 16), 0.05, 0)[1]
    assert held_out_loss(model, blocks, 2, Accelerator(cpu=True)) == pytest.approx(found.held_out, abs=0.02)  # bf16 fusers
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert record["training"]["updates"] == 6
    assert [one["spec"] for one in record["sources"]] == [f"tiny:{name}" for name in (HOST, *DONORS)]


def test_the_folder_brings_its_code(tmp_path, tiny_cache):
    fuse(parts_of(recipe_of(), tiny_cache, dtype="float32"), tmp_path / "out")
    ids = torch.tensor([[256, *TEXT.encode()[:40]]])
    with torch.no_grad():
        expected = load(tmp_path / "out")(ids).logits[0, -1]
    loaded_elsewhere(tmp_path / "out", ids, expected)


def tokenizer(cache):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_source(HOST, cache).folder)


class StoppedError(Exception):
    """Stands for a kill."""


def test_a_run_that_was_stopped_ends_in_the_same_bytes(tmp_path, tiny_cache, text, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)
    recipe = recipe_of(text, fusion=FUSION | {"dropout": 0.3})

    def stop(tokens, row):
        if row["update"] == 4:
            raise StoppedError

    with pytest.raises(StoppedError):
        fuse(parts_of(recipe, tiny_cache), tmp_path / "out", training=stop)
    assert not (tmp_path / "out").exists()
    seen = []
    fuse(parts_of(recipe, tiny_cache), tmp_path / "out", training=lambda tokens, row: seen.append(row["update"]))
    assert seen == [4, 5, 6]  # the checkpoint is written after the progress is told
    fuse(parts_of(recipe, tiny_cache), tmp_path / "whole")
    assert (tmp_path / "out" / FUSERS_FILE).read_bytes() == (tmp_path / "whole" / FUSERS_FILE).read_bytes()


def test_going_on_with_something_else_is_refused(tmp_path, tiny_cache, text, monkeypatch):
    recipe = recipe_of(text)

    def stop(tokens, row):
        raise StoppedError

    with pytest.raises(StoppedError):
        fuse(parts_of(recipe, tiny_cache), tmp_path / "out", training=stop)
    other = replace(recipe, fusion=FUSION | {"rank": 4})
    wide = parts_of(recipe, tiny_cache, dtype="float32")
    for changed in (parts_of(other, tiny_cache), wide):
        with pytest.raises(FusionError, match=r"out\.work is of another recipe; give another --out, or remove that folder"):
            fuse(changed, tmp_path / "out")
    parts = parts_of(recipe, tiny_cache)
    record = json.loads((tmp_path / "out.work" / "assembled" / RECORD_FILE).read_text())
    record["sources"][1]["header_sha256"] = {"model.safetensors": "0" * 64}
    (tmp_path / "out.work" / "assembled" / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(FusionError, match="is of sources that have changed since"):
        fuse(parts, tmp_path / "out")
    (tmp_path / "out.work" / "assembled" / RECORD_FILE).unlink()
    with pytest.raises(FusionError, match=r"fusion\.json cannot be read: .*; remove .*out\.work to begin anew"):
        fuse(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_training_goes_on_with_the_untrained_model(tmp_path, tiny_cache, text, monkeypatch):
    def stop(tokens, row):
        raise StoppedError

    recipe = recipe_of(text)
    with pytest.raises(StoppedError):
        fuse(parts_of(recipe, tiny_cache), tmp_path / "out", training=stop)
    written = (tmp_path / "out.work" / "assembled" / "config.json").stat().st_mtime_ns
    other = replace(recipe, training=replace(recipe.training, updates=2, learning_rate=0.02))
    fuse(parts_of(other, tiny_cache), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == written
    fuse(parts_of(other, tiny_cache), tmp_path / "anew")
    assert (tmp_path / "out" / FUSERS_FILE).read_bytes() == (tmp_path / "anew" / FUSERS_FILE).read_bytes()
    mode = (tmp_path / "out").stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()} == {mode}


def test_what_is_damaged_is_named(tmp_path, tiny_cache, text, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)

    def stop(tokens, row):
        if row["update"] == 3:
            raise StoppedError

    recipe, work = recipe_of(text), tmp_path / "out.work"
    with pytest.raises(StoppedError):
        fuse(parts_of(recipe, tiny_cache), tmp_path / "out", training=stop)
    for file, said in (
        (work / "training" / "state.safetensors", "is damaged .*; remove it to train anew"),
        (next((work / "assembled").glob("model-host-*.safetensors")), "is damaged .*; remove .*out.work to begin anew"),
    ):
        whole = file.read_bytes()
        file.write_bytes(whole[:-200])
        with pytest.raises(FusionError, match=said):
            fuse(parts_of(recipe, tiny_cache), tmp_path / "out")
        file.write_bytes(whole)


def test_a_donor_that_is_not_finite_leaves_nothing(tmp_path, tiny_cache, text, monkeypatch):
    def refuse(*arguments):
        raise FusionError("not finite")

    with monkeypatch.context() as patch:
        patch.setattr("merge.fusion.make.check_finite", refuse)
        with pytest.raises(FusionError, match="not finite"):
            fuse(parts_of(recipe_of(text), tiny_cache), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    fuse(parts_of(recipe_of(text), tiny_cache, dtype="float32"), tmp_path / "out")


def test_one_run_at_a_time(tmp_path, tiny_cache):
    with (
        work_folder(tmp_path / "out.work"),
        pytest.raises(OutputError, match=r"out\.work is in use by another run; wait for it"),
    ):
        fuse(parts_of(recipe_of(), tiny_cache), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    fuse(parts_of(recipe_of(), tiny_cache), tmp_path / "deep" / "er" / "out")
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["out"]


def test_what_a_killed_run_left_behind_its_finished_folder_is_removed(tmp_path, tiny_cache, monkeypatch):
    parts, work = parts_of(recipe_of(), tiny_cache), tmp_path / "out.work"

    def killed(*folders):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("merge.fusion.make._empty", killed)
        with pytest.raises(KeyboardInterrupt):
            fuse(parts, tmp_path / "out")
    assert (work / "assembled").is_dir()
    with work_folder(work), pytest.raises(OutputError, match="not empty; choose another name"):
        fuse(parts, tmp_path / "out")
    assert (work / "assembled").is_dir()  # in use
    with pytest.raises(OutputError, match="not empty; choose another name"):
        fuse(parts, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load(tmp_path / "out")


def test_what_another_run_goes_on_with_is_kept(tmp_path, tiny_cache, monkeypatch):
    """A finished folder of that name says nothing of it."""
    (tmp_path / "other").mkdir()
    fuse(parts_of(recipe_of(), tiny_cache), tmp_path / "other" / "out")
    parts = parts_of(recipe_of(), tiny_cache)
    with monkeypatch.context() as patched:
        patched.setattr("merge.fusion.make._fill", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fuse(parts, tmp_path / "out")
    (tmp_path / "other" / "out").rename(tmp_path / "out")
    with pytest.raises(OutputError, match="not empty; choose another name"):
        fuse(parts, tmp_path / "out")
    assert (tmp_path / "out.work" / "assembled").is_dir()


def test_training_that_goes_on_is_kept(tmp_path, tiny_cache):
    """Although somebody has linked the untrained model to where the trained one is to be."""
    parts, work = parts_of(recipe_of(), tiny_cache), tmp_path / "out.work"
    fuse(parts, work / "assembled")
    (work / "training").mkdir()
    (work / "training" / "state.safetensors").write_text("hours")
    shutil.copytree(work / "assembled", tmp_path / "out", copy_function=os.link)
    with pytest.raises(OutputError, match="not empty; choose another name"):
        fuse(parts, tmp_path / "out")
    assert (work / "training" / "state.safetensors").read_text() == "hours"


@pytest.mark.parametrize("change", [{"gradient_accumulation_steps": 3}, {"distil": "tiny-model-that-is-not-there"}], ids=str)
def test_what_would_fail_later_is_refused_before_anything_is_written(tmp_path, tiny_cache, text, change):
    recipe = recipe_of(text)
    with pytest.raises((FusionError, MergeError)):
        fuse(parts_of(replace(recipe, training=replace(recipe.training, **change)), tiny_cache), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_parts_of_a_batch_are_the_batch(tmp_path, tiny_cache, text):
    """The same updates in pieces; rounding grows through the updates."""
    recipe, found = recipe_of(text), []
    for steps in (1, 2):
        trained = replace(recipe, training=replace(recipe.training, gradient_accumulation_steps=steps))
        out = tmp_path / f"out-{steps}"
        fuse(parts_of(trained, tiny_cache, dtype="float32"), out)
        found.append(load_file(out / FUSERS_FILE))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)
    uneven = replace(recipe, training=replace(recipe.training, gradient_accumulation_steps=3))
    with pytest.raises(FusionError, match="a batch of 2 rows is not shared evenly by 1 process in 3 parts each"):
        fuse(parts_of(uneven, tiny_cache), tmp_path / "uneven")


def test_a_teacher_changes_what_is_learned(tmp_path, tiny_cache, text):
    folder = str(tiny_source(HOST, tiny_cache).folder)
    recipe = recipe_of(text)
    taught = replace(recipe, training=replace(recipe.training, distil=folder))
    for name, one in (("plain", recipe), ("taught", taught)):
        fuse(parts_of(one, tiny_cache), tmp_path / name)
    plain, taught = (load_file(tmp_path / name / FUSERS_FILE) for name in ("plain", "taught"))
    assert not torch.equal(plain["fusers.0.out.weight"], taught["fusers.0.out.weight"])
    wrong = replace(recipe, training=replace(recipe.training, distil="nowhere-at-all"))
    with pytest.raises((FusionError, MergeError, OSError)):
        fuse(parts_of(wrong, tiny_cache), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_the_rate_rises_and_falls():
    recipe = Training(("x",), updates=100, warmup=0.1, learning_rate=2.0)
    rates = [learning_rate(recipe, update) for update in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(rates) == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_states_that_are_not_finite_are_refused(tmp_path, tiny_cache, text):
    from merge.fusion.make import check_finite

    fuse(parts_of(recipe_of(), tiny_cache), tmp_path / "out")
    model = load_fused(tmp_path / "out", "cpu")
    model.donors[1].embed_tokens.weight[65:70] = float("inf")
    with pytest.raises(FusionError, match=r"donor 1: its states after layer 3 are not finite in bfloat16; run it in float32"):
        check_finite(model, torch.tensor([[65, 66, 67]]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 1000}, r"parameters, .* too many to be below 1,000"),
        ({"fusion": FUSION | {"mode": "mix"}}, "no mode 'mix'"),
        ({"fusion": FUSION | {"sites": [17]}}, "site 17 is outside the model; expected 1 to 16"),
        ({"fusion": FUSION | {"sites": [0.5, 8]}}, "name one layer twice"),
        ({"fusion": FUSION | {"sites": [1.5]}}, "site 1.5 is outside the model; expected a share"),
        (
            {"donors": (Backbone("tiny:phi3-mini", taps=(33,)),)},
            "tiny:phi3-mini: tap 33 is outside the model; expected 1 to 32",
        ),
        ({"donors": (Backbone("tiny:phi3-mini", taps=("x",)),)}, "tap 'x' is no layer"),
    ],
)
def test_what_cannot_be_fused_is_refused(tiny_cache, changes, said):
    with pytest.raises((FusionError, MergeError), match=said):
        parts_of(recipe_of(**changes), tiny_cache)


def test_layers_are_numbers_or_shares():
    assert layer_numbers("tap", [0.5, 0.75, 1.0], 26) == [13, 20, 26]
    assert layer_numbers("tap", [0.01, 26], 26) == [1, 26]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("donors:", "doners:", "unknown key 'doners' (did you mean 'donors'?)"),
        ("updates: 4", "updates: 0", "'updates' is 0, expected at least 1"),
        ("block: 16", "block: 1", "'block' is 1, expected at least 2"),
        ("mode: gate", "modus: gate", "fusion: unknown key 'modus' (did you mean 'mode'?)"),
        ("mode: gate", "mode: [gate]", "fusion: 'mode' is"),
        ("sites: [1.0]", "sites: 1.0", "fusion: 'sites' is 1.0"),
        (", block: 16", ", seed: -1", "'seed' is -1, expected 0 to 2 ** 32"),
        ("learning_rate: 0.01", "learning_rate: -1e-3", "'learning_rate' is -0.001, expected a number above 0"),
        ("learning_rate: 0.01", "clip: 0", "'clip' is 0, expected a number above 0"),
        ('"tiny:llama3.2-1b"', '""', "host: 'model' is empty"),
        ("[text.txt]", "[.]", ". is a folder; expected files, such as"),
        ("[text.txt]", "[]", "'text' must name at least one"),
        ("[text.txt]", "[missing.txt]", "missing.txt: there is no such file"),
        ("[text.txt]", "[empty.txt]", "empty.txt holds no text"),
        ("[text.txt]", "[nobody/nothing]", "nobody/nothing cannot be read"),
        ("block: 16", "block: 100000", "not one block of 100000"),
        ("batch: 2", "batch: 2, held_out: 0.001", "blocks are too few to hold out"),
        ("tiny:phi3-mini", "tiny:phi4-mini", "there is no tiny model 'phi4-mini'"),
        ("schema_version: 1", "schema_version: 2", "'schema_version' is 2, expected 1"),
        ("host:", "host: {model: a}\nhost:", "host stands twice"),
    ],
)
def test_a_wrong_config_is_one_line_and_nothing_is_written(tmp_path, tiny_cache, monkeypatch, old, new, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "fuse.yaml").write_text(CONFIG.replace(old, new))

    def attempt():
        recipe = read_recipe(tmp_path / "fuse.yaml")
        sources = [resolve(one.model, configs=CONFIGS, cache=tiny_cache) for one in (recipe.host, *recipe.donors)]
        fuse(make_parts(recipe, sources), tmp_path / "out")

    with pytest.raises((FusionError, MergeError)) as caught:
        attempt()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def run(tmp_path, tiny_cache):
    """Runs a script in a folder with a config and a text."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "fuse.yaml").write_text(CONFIG)
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}

    def call(script, *arguments, status=0, launcher=(), **changes):
        command = [sys.executable, *launcher, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment | changes, capture_output=True, text=True, timeout=240)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    return call


def test_the_script(run, tmp_path):
    listed = run("fuse", "--config", "fuse.yaml", "--dry-run").stdout
    assert "donor   tiny-phi3-mini: 3 of 32 layers, read after 3" in listed
    assert not (tmp_path / "runs").exists()
    done = run("fuse", "--config", "fuse.yaml", "--out", "out", "-v")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == 4 * 32
    assert done.stdout.startswith(f"tiny-llama3.2-1b reads tiny-phi3-mini: {found['parameters']:,} parameters, ")
    said = f"held-out text: {found['held_out_before']:.4f} -> {found['held_out']:.4f} nats per token after 128 tokens\n"
    assert said in done.stdout
    assert "update 2: loss" in done.stderr
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(value.numel() for value in model.parameters()) == found["parameters"]
    (tmp_path / "wrong.yaml").write_text(CONFIG.replace("gate", "mix"))
    assert run("fuse", "--config", "wrong.yaml", "--out", "new", status=1).stderr.startswith(
        "error: wrong.yaml: there is no mode 'mix'; there"
    )
    assert not list(tmp_path.glob("new*"))
    assert "is not empty" in run("fuse", "--config", "fuse.yaml", "--out", "out", status=1).stderr
    run("fuse", "--config", "fuse.yaml", "--out", "out", "--overwrite", "--no-training")
    assert not (tmp_path / "out" / "training.csv").exists()
    assert (
        "--no-training goes with neither"
        in run("fuse", "--config", "fuse.yaml", "--no-training", "--updates", 3, status=2).stderr
    )


def test_two_processes_train_what_one_does(run, tmp_path):
    one = json.loads(run("fuse", "--config", "fuse.yaml", "--out", "one", "--device", "cpu").stdout.splitlines()[-1])
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = run("fuse", "--config", "fuse.yaml", "--out", "two", "--device", "cpu", launcher=launcher, OMP_NUM_THREADS="1")
    two = json.loads(done.stdout.splitlines()[-1])
    assert two["held_out"] == pytest.approx(one["held_out"], abs=1e-3)
    assert (tmp_path / "two" / "config.json").read_bytes() == (tmp_path / "one" / "config.json").read_bytes()
    odd = CONFIG.replace("batch: 2", "batch: 3")
    (tmp_path / "fuse.yaml").write_text(odd)
    failed = run("fuse", "--config", "fuse.yaml", "--out", "odd", "--device", "cpu", launcher=launcher, status=1)
    assert "a batch of 3 rows is not shared evenly by 2 processes" in failed.stderr


def test_text_comes_from_files_of_every_kind(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.py").write_text("three = 3\n")
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n{"text": "five"}\n')
    parquet.write_table(pa.table({"text": ["six", " "]}), tmp_path / "d.parquet")
    names = [str(tmp_path / name) for name in ("a.txt", "*.py", "c.jsonl", "d.parquet")]
    assert read_documents(names) == ["one\n\ntwo", "three = 3\n", "four", "five", "six"]
    parquet.write_table(pa.table({"words": ["six"]}), tmp_path / "e.parquet")
    with pytest.raises(FusionError, match="has the columns words; expected one named 'text'"):
        read_documents([str(tmp_path / "e.parquet")])


def test_examples_can_be_read():
    for path in sorted((CONFIGS / "fusion").iterdir()):
        recipe = recipe_from(read_bench(path)[1], str(path)) if "bench" in path.name else read_recipe(path)
        assert recipe.donors


def test_the_config_says_where_its_code_is(tmp_path, tiny_cache):
    parts = parts_of(recipe_of(), tiny_cache)
    config = fused_config(parts, [1, 1])
    (tmp_path / "out").mkdir()
    write_assembled(parts, tmp_path / "out", progress=lambda total: lambda done: None)
    for reference in config.auto_map.values():
        file, name = reference.split(".")
        assert f"class {name}" in (tmp_path / "out" / f"{file}.py").read_text()
