"""The comparison of fusions: bits per byte, what is computed once, low-rank adapters, and claims that controls can refute."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fused import fused, some_ids
from test_mmlu import write_archive
from tiny import CONFIGS, ROOT, load, tiny_source
from transformers import AutoTokenizer

from eval.bits import Bits, cut, difference, measure, pieces
from eval.errors import DataError, EvalError
from eval.fusion_bench import Arms, Bench, Measured, Row, bench_fusion, claims, pooled, read_bench, table
from eval.lora import LoraHost
from merge.fusion.assemble import make_parts
from merge.fusion.features import compute, from_entry, run_host
from merge.fusion.fusers import MODES as FUSERS
from merge.fusion.make import assemble
from merge.fusion.recipe import recipe_from
from merge.fusion.streams import ALIGNMENTS
from merge.records import RecordError

TEXT = "".join(f"Line {i} of a text that says {i * i} and then some more.\n" for i in range(60))
CONFIG = """\
schema_version: 1
host: {model: "tiny:llama3.2-1b"}
donors: [{model: "tiny:phi3-mini", taps: [3], alignment: prefix}]
fusion: {sites: [1.0], rank: 8, heads: 2}
training: {text: [text.txt], updates: 2, block: 16, batch: 2, learning_rate: 0.01}
bench:
  domains: {prose: text.txt, more: [text.txt]}
  mmlu: {data_dir: questions, subjects: [anatomy, virology], num_fewshot: 0, limit: 2}
  arms: [weighted, attention]
  documents: 6
  max_bytes: 60
"""


def test_bits_per_byte_are_the_log_probabilities_of_all_tokens(llama):
    model, tokenizer = load(llama.folder), AutoTokenizer.from_pretrained(llama.folder)
    documents = ["a", "some words é", "x" * 40]
    found = measure(model, tokenizer, documents, batch=2)
    for number, document in enumerate(documents):
        tokens = tokenizer(document)["input_ids"]
        ids = torch.tensor([[256, *tokens]])  # bos first
        with torch.no_grad():
            logprobs = model(ids).logits[0].float().log_softmax(-1)
        expected = -sum(float(logprobs[i, token]) for i, token in enumerate(tokens)) / math.log(2)
        assert found.bits[number] == pytest.approx(expected, rel=1e-5)
        assert found.bytes[number] == len(document.encode())
    assert found.per_byte == pytest.approx(found.bits.sum() / found.bytes.sum())
    with pytest.raises(DataError, match="no documents"):
        measure(model, tokenizer, [])


def test_documents_are_cut_between_characters():
    assert cut(["aé", "éé", " ", "abc"], 2) == ["a", "é", "ab"]


def test_long_texts_become_documents():
    text = "one\ntwo\n" + "é" * 10 + "\n\n   \nthree\n"
    found = pieces([text, "", "  "], 8)
    assert found == ["one\ntwo\n", "éééé", "éééé", "éé\n\n", "three\n"]
    assert "".join("".join(pieces([text], 3)).split()) == "".join(text.split())


def test_the_difference_is_of_sums_with_an_error_over_documents():
    random = np.random.default_rng(0)
    size = random.uniform(10, 1000, 400)
    noise = random.normal(0, 5, 400)
    one, other = Bits(2 * size + noise, size), Bits(1.9 * size, size)
    found = difference(one, other)
    assert found.value == pytest.approx(((one.bits - other.bits).sum()) / size.sum())
    assert found.low < 0.1 < found.high
    again = []
    for _ in range(300):  # the error is that of drawing documents again
        rows = random.integers(0, 400, 400)
        again.append((one.bits - other.bits)[rows].sum() / size[rows].sum())
    assert found.stderr == pytest.approx(np.std(again), rel=0.2)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("mode", FUSERS)
def test_from_stored_states_logits_are_the_same(mode, alignment):
    model = fused(mode, "gemma2-2b", ("llama3-8b", "phi3-mini"), alignment=alignment, dtype=torch.float64)
    blocks = some_ids(5, 11)
    store = compute(model, blocks, 2, tokens=mode == "cross")
    rows = [3, 0]
    with torch.no_grad():
        expected = model(blocks[rows], use_cache=False).logits
        with from_entry(model, store) as begin:
            begin(rows, "cpu")
            found = run_host(model, blocks[rows], store.features(rows))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert torch.equal(model(blocks[rows], use_cache=False).logits, expected)  # all is as it was
        zeroed, shuffled = store.zeroed(), store.shuffled()
        assert not zeroed.aligned[0].any()
        assert torch.equal(shuffled.aligned[1], store.aligned[1][[4, 0, 1, 2, 3]])
        if mode != "cross":
            model.control = "zero"
            zero = model(blocks[rows], use_cache=False).logits
            model.control = None
            assert (zero - expected).abs().max() > 0.1  # other features would be noticed
            with from_entry(model, zeroed) as begin:
                begin(rows, "cpu")
                torch.testing.assert_close(run_host(model, blocks[rows], zeroed.features(rows)), zero, rtol=0, atol=1e-5)


def test_low_rank_adapters_begin_with_nothing_and_leave_nothing():
    host = fused().host
    ids = some_ids()
    with torch.no_grad():
        before = host(ids).logits
        lora = LoraHost(host, range(2, 4), 500)
        assert torch.equal(lora(ids).logits, before)
        assert sum(value.numel() for value in lora.fuser_parameters().values()) == pytest.approx(500, rel=0.25)
        for value in lora.fuser_parameters().values():
            value.normal_()
        changed = lora(ids).logits
        matrix, adapter = host.model.layers[2].self_attn.o_proj, lora.fusers[0]
        matrix.weight.add_(adapter.up @ adapter.down)
        lora.fusers[0].up.zero_()
        torch.testing.assert_close(lora(ids).logits, changed, rtol=1e-3, atol=1e-3)
        matrix.weight.sub_(adapter.up @ adapter.down)
        lora.remove()
        after = host(ids).logits
    assert (changed - before).abs().max() > 0.01
    assert not torch.equal(after, changed)
    assert all(
        not module._forward_hooks for module in (host.model.layers[2].self_attn.o_proj, host.model.layers[3].mlp.down_proj)
    )


def rows_with(**gains):
    """Rows whose arms have so many bits per byte less than the host."""
    random = np.random.default_rng(0)
    size = random.uniform(100, 200, 30)
    base = 3 * size + random.normal(0, 9, 30)
    found = []
    for arm, gain in {"host": 0.0, **gains}.items():
        bits = base - gain * size + random.normal(0, 0.5, 30)
        found.append(Row(arm.replace("__", ", "), 0, 100, 10, Measured({"prose": Bits(bits, size)}, 5.0, 1.0, 10**6)))
    return found


def test_a_gain_is_claimed_only_beyond_every_control():
    bench = Bench({"prose": ("x",)}, ("attention",))
    controls = {"attention__zero": 0.1, "attention__shuffle": 0.1, "attention__random-donor": 0.1}
    (said,) = claims(rows_with(attention=0.3, **controls, lora=0.1), bench)
    assert said.startswith("prose: attention reads something of use in its donors: -0.199 [-0.2")
    (said,) = claims(rows_with(attention=0.3, **controls, lora=0.3), bench)
    assert "no gain from the donors is shown for attention; not better than lora" in said
    (said,) = claims(rows_with(attention=0.3, **controls), bench)  # a control is missing
    assert "not better than enough controls" in said
    (said,) = claims(rows_with(attention=-0.1, **controls, lora=0.1), bench)
    assert "host +0.099" in said
    assert claims(rows_with(weighted=0.1), bench) == []
    shown = table(rows_with(attention=0.3), bench).splitlines()
    assert shown[2].startswith("| host | 100 | 10 |")
    assert "-0.3" in shown[3]
    several = rows_with(attention=0.2) + rows_with(attention=0.4)
    assert pooled(several, "host", "prose").per_byte - pooled(several, "attention", "prose").per_byte == pytest.approx(
        0.3, abs=0.01
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bench:", "bank:", "has no 'bench'"),
        ("[weighted, attention]", "[weighed]", "no arm 'weighed'; there are concat"),
        ("[weighted, attention]", "[weighted]", "controls are of 'attention', which is not among the arms weighted"),
        ("documents: 6", "outputs: [sum]", "no output 'sum'; there are mixture"),
        ("documents: 6", "controls: [nothing]", "no control 'nothing'; there are zero"),
        ("documents: 6", "documents: 0", "must be at least 1"),
        ("more:", "mmlu:", "a domain is named mmlu"),
        ("limit: 2", "limit: 0", "limit at least 1"),
        ("num_fewshot: 0", "num_shot: 0", "unknown key 'num_shot'"),
    ],
)
def test_a_wrong_comparison_is_refused(tmp_path, old, new, said):
    (tmp_path / "bench.yaml").write_text(CONFIG.replace(old, new))
    with pytest.raises((EvalError, RecordError), match=said):
        read_bench(tmp_path / "bench.yaml")


@pytest.fixture
def inputs(tmp_path):
    """Writes what the config needs, and the config, into the test's folder."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "bench.yaml").write_text(CONFIG)
    write_archive(tmp_path / "questions")


@pytest.fixture
def run(tmp_path, tiny_cache, inputs):
    """Runs a script in a folder with a config and a text."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}

    def call(script, *arguments, status=0):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    return call


def test_every_seed_has_random_donors_of_its_own(tmp_path, tiny_cache, monkeypatch, inputs):
    monkeypatch.chdir(tmp_path)
    bench, content = read_bench(tmp_path / "bench.yaml")
    parts = make_parts(recipe_from(content, "bench"), [tiny_source(name, tiny_cache) for name in ("llama3.2-1b", "phi3-mini")])
    assemble(parts, tmp_path / "assembled")
    arms = Arms(parts, tmp_path / "assembled", bench, "cpu")
    stores = []
    monkeypatch.setattr(
        "eval.fusion_bench.compute", lambda *given, **named: stores.append(compute(*given, **named)) or stores[-1]
    )
    for seed in (0, 1, 0):
        arms.fused("attention", seed, "random-donor")
    one, two, again = stores
    assert not torch.equal(one.aligned[0], two.aligned[0])
    assert torch.equal(one.aligned[0], again.aligned[0])


@pytest.fixture
def small(tmp_path, tiny_cache, monkeypatch, inputs):
    """(a comparison, its recipe, a function that makes it into a folder); speed and memory are not measured."""
    monkeypatch.chdir(tmp_path)
    bench, content = read_bench(tmp_path / "bench.yaml")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny_cache))
    monkeypatch.setattr(Arms, "_generated_per_s", lambda arms, model: 1.0)
    monkeypatch.setattr(Arms, "_peak", lambda arms, model: 1)

    def make(bench, recipe, out, **options):
        return bench_fusion(bench, recipe, tmp_path / out, configs=CONFIGS, device="cpu", dtype="float32", **options)

    return bench, recipe_from(content, "bench"), make


def test_a_comparison_goes_on_where_it_stopped(small, tmp_path):
    """With the same rows as one that was not stopped, whatever it stopped after."""
    bench, recipe, make = small
    bench = replace(bench, outputs=("mixture",), controls=("shuffle", "random-donor", "lora"), seeds=2)
    whole = make(bench, recipe, "whole")
    assert len(whole) == 2 + 2 * 6
    results = tmp_path / "out" / "results.json"
    for stop in (2, 3, 6, 9):  # after the donor; an arm; a control; the first arm of the second seed

        def told(rows, stop=stop):
            if len(rows) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(bench, recipe, "out", told=told)
        assert len(json.loads(results.read_text())["rows"]) == stop
    found = make(bench, recipe, "out")
    for one, two in zip(whole, found, strict=True):
        assert (one.arm, one.seed, one.parameters, one.trained, one.losses) == (
            two.arm, two.seed, two.parameters, two.trained, two.losses
        )  # fmt: skip
        for name, bits in one.measured.bits.items():
            np.testing.assert_array_equal(bits.bits, two.measured.bits[name].bits)
            np.testing.assert_array_equal(bits.bytes, two.measured.bits[name].bytes)


def test_rows_of_another_comparison_are_kept_and_refused(small, tmp_path, monkeypatch):
    bench, recipe, make = small
    bench = replace(bench, arms=("attention",), outputs=(), controls=())
    results = tmp_path / "out" / "results.json"
    make(bench, recipe, "out")
    before = results.read_bytes()
    monkeypatch.setattr(Arms, "_measure", None)  # nothing is measured again
    make(bench, recipe, "out")
    longer = replace(recipe, training=replace(recipe.training, updates=3))
    with pytest.raises(EvalError, match=r"other settings \(training\); give another --out"):
        make(bench, longer, "out")
    with pytest.raises(EvalError, match=r"other settings \(bench\)"):
        make(replace(bench, documents=2), recipe, "out")
    for name in ("text.txt", "questions/test/anatomy_test.csv"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace("e", "a"))
        with pytest.raises(EvalError, match=r"other settings \(data_sha256\)"):
            make(bench, recipe, "out")
        (tmp_path / name).write_text(text)
    assert results.read_bytes() == before
    good = json.loads(before)
    wrong = {
        "is damaged": [good | {"rows": [{"arm": "host"}]}, good | {"rows": None}, good | {"settings": None}],
        "an earlier version": [[], {key: value for key, value in good.items() if key != "schema_version"}],
    }
    for said, contents in wrong.items():
        for content in contents:
            results.write_text(json.dumps(content))
            with pytest.raises(EvalError, match=said):
                make(bench, recipe, "out")


def test_a_row_that_is_not_a_number_can_be_gone_on_from(small, tmp_path, monkeypatch):
    """A donor that overflows above its taps is no reason to lose the others."""
    bench, recipe, make = small
    bench = replace(bench, arms=("attention",), outputs=(), controls=())
    measured = Arms._measure

    def broken(arms, model, tokenizer=None):
        found = measured(arms, model, tokenizer)
        if tokenizer is not None:  # a donor
            found.bits["prose"].bits[:] = math.nan
        return found

    monkeypatch.setattr(Arms, "_measure", broken)
    first = make(bench, recipe, "out")
    again = make(bench, recipe, "out")
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.measured.bits["prose"].bits, two.measured.bits["prose"].bits)
    assert math.isnan(again[1].measured.bits["prose"].per_byte)


def test_the_whole_comparison(run, tmp_path):
    done = run("bench_fusion", "--config", "bench.yaml", "--out", "out")
    assert json.loads(done.stdout.splitlines()[-1]) == {"out": "out", "arms": 11}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    arms = [row["arm"] for row in results["rows"]]
    assert arms[:4] == ["host", "donor 0: tiny-phi3-mini", "weighted", "attention"]
    assert arms[4:7] == ["mixture of outputs", "linear of outputs", "geometric of outputs"]
    assert arms[7:10] == ["attention, zero", "attention, shuffle", "attention, random-donor"]
    assert arms[10].startswith("lora, rank ")
    by_arm = {row["arm"]: row for row in results["rows"]}
    host, zero = by_arm["host"], by_arm["attention, zero"]
    assert host["bits_per_byte"]["prose"] == host["bits_per_byte"]["more"]
    assert zero["bits_per_byte"] == pytest.approx(host["bits_per_byte"], abs=1e-3)  # attention to nothing adds nothing
    assert by_arm["attention"]["bits_per_byte"]["prose"] != pytest.approx(host["bits_per_byte"]["prose"], abs=1e-6)
    assert abs(by_arm["attention"]["trained"] - by_arm[arms[10]]["trained"]) < 0.5 * by_arm["attention"]["trained"]
    assert [claim.partition(":")[0] for claim in results["claims"]] == ["prose", "more", "mmlu"]
    for row in results["rows"]:
        assert len(row["bits"]["mmlu"]) == 4  # two questions of each subject
        assert row["generated_per_s"] > 0
    assert by_arm["attention"]["peak_bytes"] > by_arm["host"]["peak_bytes"]
    assert (tmp_path / "out" / "differences.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "differences.csv").read_text().startswith("domain,arm,difference")
    assert "| attention, shuffle |" in (tmp_path / "out" / "table.md").read_text()


def test_a_fused_folder_is_evaluated_like_any_other(run, tmp_path, tiny_cache):
    config = CONFIG[: CONFIG.index("bench:")].replace("sites", "mode: concat, sites")
    (tmp_path / "fuse.yaml").write_text(config)
    run("fuse", "--config", "fuse.yaml", "--out", "fused", "--no-training")
    scores = []
    for name, model in (("fused", "fused"), ("host", str(tiny_source("llama3.2-1b", tiny_cache).folder))):
        run("eval", "--model", model, "--tasks", "arithmetic_x_plus_y", "--limit", 5, "--out", f"{name}.json", "--samples")
        samples = [json.loads(line) for line in (tmp_path / f"{name}.samples.jsonl").read_text().splitlines()]
        scores.append([float(answer[0]) for sample in samples for answer in sample["filtered_resps"]])
    assert scores[0] == pytest.approx(scores[1], abs=0.3)  # bf16, and other batches
    refused = run("merge", "--model", "fused", "--method", "drop-last", "--layers", 2, "--out", "less", status=1)
    assert (
        "is a fused model, whose fusers were made for its host as it is; fuse the host's layers first: 'alphas'"
        in refused.stderr
    )
