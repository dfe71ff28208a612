"""The scripts as a user runs them: as files, from another folder, with good and with wrong input."""

import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
from fake_hub import COMMIT, serving
from tiny import ROOT

STEPS = [{"into": 30, "remove": 31, "alpha": 0.6}, {"into": 4, "remove": 5, "alpha": 0.9}]
ALPHAS = {"schema_version": 1, "name": "two", "model": "org/name", "num_hidden_layers": 32, "steps": STEPS}
UP = "model.layers.30.mlp.up_proj.weight"


@pytest.fixture
def run(tmp_path, tiny_cache):
    """Runs a script from a folder that is not the checkout."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "two.json").write_text(json.dumps(ALPHAS))
    # Tiny models land in the cache of this test run; twins that another test built are found again.
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}

    def call(script, *arguments, status=0, **changes):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path / "here", env=environment | changes, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    call.folder = tmp_path / "here"
    call.environment = environment
    return call


def test_merge_explain_verify(run):
    done = run("merge", "--alphas", "two.json", "--model", "tiny:llama3-8b")
    assert done.stdout == "merged/tiny-llama3-8b-two\n"
    assert "32 -> 30 layers, 21,032 parameters" in done.stderr
    out = run.folder / "merged" / "tiny-llama3-8b-two"
    assert (out / "model.safetensors").is_file()
    said = run("verify", out).stdout
    assert "7 recomputed" not in said
    assert "14 recomputed and equal" in said
    assert "layer 29 (base 30)" in run("explain", out / "plan.json").stdout
    again = run("merge", "--plan", out / "plan.json", "--model", "tiny:llama3-8b", "--out", "again")
    assert again.stdout == "again\n"
    for name in ("model.safetensors", "plan.json", "config.json"):
        assert (run.folder / "again" / name).read_bytes() == (out / name).read_bytes()


def test_the_documented_dry_run(run):
    """Llama-3-8B's alphas on its twin: the plan, and nothing written."""
    done = run("merge", "--alphas", ROOT / "alphas" / "base.json", "--model", "tiny:llama3-8b", "--dry-run")
    assert "layers 0-17: original layers 0-17, unchanged" in done.stdout
    assert "layer 18: 0.6216 x layer 18 + 0.2323 x layer 19" in done.stdout
    assert "174: 167 kept, 7 mixed, 0 converted" in done.stdout
    assert not (run.folder / "merged").exists()
    plan = json.loads(
        run("merge", "--method", "uniform", "--layers", 3, "--model", "tiny:phi3-mini", "--dry-run", "--json").stdout
    )
    assert len(plan["rows"]) == 29


def test_the_dry_run_says_what_a_plan_mixes_of_its_own(run):
    groups = {"input_layernorm": {"0": 0.5, "1": 0.5}}
    plan = {"schema_version": 1, "num_hidden_layers": 32, "rows": [{"base": 0, "groups": groups}]}
    (run.folder / "found.json").write_text(json.dumps(plan))
    own = run("merge", "--plan", "found.json", "--model", "tiny:llama3-8b", "--dry-run").stdout
    assert "tensors projections, and what the plan names\n" in own
    none = run("merge", "--alphas", "two.json", "--model", "tiny:llama3-8b", "--dry-run").stdout
    assert "tensors projections\n" in none


def test_no_torch_before_it_is_needed(run):
    """--help and --dry-run answer at once because nothing heavy is imported."""
    code = (
        "import runpy, sys; sys.argv = {argv}; sys.path.insert(0, {scripts!r})\n"
        "try: runpy.run_path({path!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {{'torch', 'transformers', 'sklearn', 'datasets'}} & sys.modules.keys(), 'heavy imports'"
    )
    for script, arguments in (
        ("merge", ["--help"]),
        ("merge", ["--alphas", "two.json", "--model", "tiny:llama3-8b", "--dry-run"]),
        ("merge", ["--method", "drop-last", "--layers", "2", "--model", "tiny:llama3-8b", "--out", "dropped"]),
        ("explain", ["two.json"]),
        ("verify", ["dropped"]),
    ):
        path = ROOT / "scripts" / f"{script}.py"
        text = code.format(argv=[str(path), *arguments], scripts=str(path.parent), path=str(path))
        subprocess.run([sys.executable, "-c", text], cwd=run.folder, env=run.environment, check=True, capture_output=True)


def test_explain_needs_no_model(run):
    said = run("explain", ROOT / "alphas" / "base.json").stdout
    assert "32 -> 19 layers; 1 of them differ" in said
    assert "effectively 2.92 layers" in said
    assert "30 <- 31  0.6258   1.7e-05" in said
    record = json.loads(run("explain", ROOT / "alphas" / "base.json", "--json").stdout)
    assert record["steps"][-1]["sensitivity"] == pytest.approx(2.0)


def test_scripts_work_from_anywhere(run):
    for folder in ("/", ROOT, ROOT / "scripts"):
        command = [sys.executable, str(ROOT / "scripts" / "explain.py"), str(run.folder / "two.json")]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, env=run.environment)


@pytest.mark.parametrize("script", ["merge", "explain", "verify", "demo"])
def test_help_has_examples(script, run):
    assert f"python scripts/{script}.py" in run(script, "--help").stdout


# ---------------------------------------------------------------------------------------------------------------------
# Wrong usage: exit status 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of the arguments --alphas --plan --method is required"),
        (["--alphas", "two.json", "--method", "uniform"], "not allowed with"),
        (["--method", "uniform", "--model", "tiny:llama3-8b"], "--method uniform needs --layers N"),
        (["--method", "slerp"], "invalid choice: 'slerp'"),
        (["--alphas", "two.json", "--layers", "3"], "--layers goes with --method"),
        (["--method", "drop", "--model", "tiny:llama3-8b"], "--remove and --method drop go together"),
        (["--method", "drop", "--remove", "a,b", "--model", "tiny:llama3-8b"], "expected layer numbers"),
        (["--method", "drop-last", "--layers", "3"], "give --model"),
        (["--method", "drop-last", "--layers", "3", "--compat", "sequential"], "--compat sequential needs steps"),
        (["--alphas", "two.json", "--json"], "--json goes with --dry-run"),
        (["--alphas", "two.json", "--dtype", "int4"], "invalid choice"),
        (["--alphas", "two.json", "--dryrun"], "unrecognized arguments: --dryrun; did you mean --dry-run"),
    ],
)
def test_wrong_usage(arguments, said, run):
    done = run("merge", *arguments, status=2)
    (line,) = done.stderr.strip().splitlines()
    assert said in line
    assert line.endswith("; merge.py --help lists the options")
    assert os.listdir(run.folder) == ["two.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input: exit status 1, one line, nothing written


def refused(run, said, *arguments, model="damaged", **changes):
    """Runs merge.py on bad input and checks the promise made for it."""
    before = sorted(os.listdir(run.folder))
    if "--alphas" not in arguments and "--method" not in arguments and "--plan" not in arguments:
        arguments = ("--alphas", "two.json", *arguments)
    out = () if "--out" in arguments else ("--out", "deep/er/out")
    done = run("merge", "--model", model, *out, *arguments, status=1, **changes)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in [said] if isinstance(said, str) else said:
        assert part in lines[0]
    assert done.stdout == ""
    assert sorted(os.listdir(run.folder)) == before, "something was left behind"
    return lines[0]


@pytest.fixture
def damaged(run, llama):
    """A copy of the tiny Llama to be damaged, under the name `damaged` in the folder of the run."""
    shutil.copytree(llama.folder, run.folder / "damaged")
    return run.folder / "damaged"


def shard_of(folder, name):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit_header(path, change):
    """Rewrites a shard's header; data stay where they are."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_shard(run, damaged):
    shard_of(damaged, UP).unlink()
    refused(run, ["model-00002-of-00003.safetensors, which is not there"])


@pytest.mark.parametrize(("size", "said"), [(0, "not a whole safetensors file"), (100, "not a whole"), (-10, "truncated")])
def test_truncated_shard(run, damaged, size, said):
    path = shard_of(damaged, UP)
    data = path.read_bytes()
    path.write_bytes(data[:size])
    refused(run, [path.name, said])


def test_shard_too_long(run, damaged):
    path = shard_of(damaged, UP)
    path.write_bytes(path.read_bytes() + b"x")
    refused(run, [path.name, "too long"])


def test_overlapping_tensors(run, damaged):
    def overlap(header):
        entry = header[UP]
        entry["data_offsets"] = [offset - 4 for offset in entry["data_offsets"]]

    edit_header(shard_of(damaged, UP), overlap)
    refused(run, ["starts at byte", "expected"])


def test_lying_header(run, damaged):
    edit_header(shard_of(damaged, UP), lambda header: header[UP].update(shape=[8, 999]))
    refused(run, [UP, "bytes are declared, expected 15,984"])


def test_header_that_claims_to_be_huge(run, damaged):
    path = shard_of(damaged, UP)
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    refused(run, ["declares a header of 1,152,921,504,606,846,976"])


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_index_that_leaves_the_folder(run, damaged, name):
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    index["weight_map"][UP] = name
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(run, [UP, repr(name), "in the same folder"])


def test_index_and_shards_disagree(run, damaged):
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    missing = dict(index["weight_map"])
    del missing[UP]
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": missing}))
    refused(run, [UP, "does not name"])
    (damaged / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index["weight_map"] | {"ghost": "model-00001-of-00003.safetensors"}})
    )
    refused(run, ["ghost", "but it is not"])


def test_layer_count_differs_from_config(run, damaged):
    edit_json(damaged / "config.json", num_hidden_layers=30)
    refused(
        run,
        "config.json declares 30 layers but the weights hold 32 (layer 30 is extra)",
        "--method",
        "drop-last",
        "--layers",
        2,
    )
    edit_json(damaged / "config.json", num_hidden_layers=40)
    refused(run, "(layer 32 is missing)", "--method", "drop-last", "--layers", 2)


def rename(folder, old, new):
    """Renames a tensor in its shard and in the index; None removes it from both (its bytes become padding)."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"].pop(old)

    def change(header):
        header[new] = header.pop(old)

    edit_header(path, change)
    index["weight_map"][new] = path.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_tensor_missing_in_one_layer(run, damaged):
    rename(damaged, UP, "model.other.weight")
    refused(run, ["layer 30 lacks mlp.up_proj.weight, unlike other layers"])


def test_head_missing(run, damaged):
    rename(damaged, "lm_head.weight", "model.head.weight")
    refused(run, ["lm_head.weight is missing; a loader would fill it with random numbers"])


def test_tensor_of_no_known_kind(run, damaged):
    for layer in range(32):
        rename(damaged, f"model.layers.{layer}.mlp.down_proj.weight", f"model.layers.{layer}.mlp.w2.weight")
    refused(run, ["mlp.w2.weight is of no known kind"])


def test_shapes_that_differ(run, damaged):
    edit_header(shard_of(damaged, UP), lambda header: header[UP].update(shape=header[UP]["shape"][::-1]))
    refused(run, ["31.mlp.up_proj.weight is (16, 8) but", f"{UP} is (8, 16); only equal shapes can be mixed"])


def test_dtypes_that_differ(run, damaged):
    edit_header(shard_of(damaged, UP), lambda header: header[UP].update(dtype="F16"))
    refused(run, ["31.mlp.up_proj.weight is stored as BF16", f"{UP} as F16", "save the model in one dtype"])


@pytest.mark.parametrize(("bits", "layer"), [(0x7FC0, 30), (0x7F80, 31), (0xFF80, 31)])
def test_nan_or_infinity_in_a_mixed_tensor(run, damaged, bits, layer):
    from merge.checkpoint import read_checkpoint

    tensor = read_checkpoint(damaged).tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    data = bytearray((damaged / tensor.file).read_bytes())
    data[tensor.start + 20 : tensor.start + 22] = struct.pack("<H", bits)
    (damaged / tensor.file).write_bytes(data)
    refused(run, [tensor.name, tensor.file, "NaN or infinity (element 10)"])


def test_pickled_weights_only(run, damaged):
    for path in damaged.glob("*.safetensors*"):
        path.unlink()
    (damaged / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused(run, ["only pickled weights (pytorch_model.bin)", "save_pretrained"])


def test_quantised_weights(run, damaged):
    edit_json(damaged / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(run, ["weights are quantised", "dequantise"])
    run("merge", "--model", damaged, "--method", "drop-last", "--layers", 2, "--out", "dropped", "--verify")
    refused(run, "names single layers", "--method", "drop", "--remove", "3", model=quantised_by_layer(damaged))


def quantised_by_layer(folder):
    edit_json(folder / "config.json", quantization_config={"modules_to_not_convert": ["model.layers.3.mlp"]})
    return folder


def test_integer_weights(run, damaged):
    for layer in range(32):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        edit_header(shard_of(damaged, name), lambda header, name=name: header[name].update(dtype="I16"))
    refused(run, ["stored as I16", "cannot be averaged"])


def test_no_config(run, damaged):
    (damaged / "config.json").unlink()
    refused(run, "has no config.json")
    (damaged / "config.json").write_text("{")
    refused(run, ["config.json is not valid JSON"])
    (damaged / "config.json").write_text('{"num_hidden_layers": "32"}')
    refused(run, ["'num_hidden_layers' is '32'"])


def test_nested_config(run, damaged):
    edit_json(damaged / "config.json", text_config={"num_hidden_layers": 32})
    refused(run, "nests its decoder in 'text_config'")


def test_keys_that_describe_layers_by_index(run, damaged):
    edit_json(damaged / "config.json", full_attention_interval=4)
    refused(run, ["'full_attention_interval' = 4 describes layers by index"])
    run("merge", "--model", damaged, "--method", "drop-last", "--layers", 2, "--out", "dropped")


def test_alphas_for_another_model(run):
    refused(run, "are for 32 layers but the model has 26", model="tiny:gemma2-2b")


def test_plan_for_another_model(run):
    (run.folder / "p.json").write_text(json.dumps({"schema_version": 1, "num_hidden_layers": 4, "rows": [{"base": 0}]}))
    refused(run, "is for 4 layers but", "--plan", "p.json", model="tiny:llama3-8b")


def test_unknown_group(run):
    rows = [{"base": 0, "groups": {"mlp.w1": {"0": 0.5, "1": 0.5}}}]
    (run.folder / "p.json").write_text(json.dumps({"schema_version": 1, "num_hidden_layers": 32, "rows": rows}))
    refused(run, "no tensor group 'mlp.w1'", "--plan", "p.json", model="tiny:llama3-8b")


def test_negative_weights_on_norms(run):
    arguments = ("--method", "laco", "--layers", 3, "--tensors", "all")
    refused(run, "norms cannot be mixed with negative weights", *arguments, model="tiny:llama3-8b")


def test_sequential_and_fold_norms(run):
    refused(run, "cannot", "--compat", "sequential", "--tensors", "fold-norms", model="tiny:llama3-8b")


def test_bad_shard_size(run):
    refused(run, "shard size 'big' cannot be read", "--max-shard-size", "big", model="tiny:llama3-8b")


def test_unknown_models(run):
    refused(run, "no tiny model 'llama9'; known: gemma-2b", model="tiny:llama9")
    refused(run, "no such folder or file", model="./nothing/here/at/all")
    refused(run, "expected a folder, a .gguf file or a Hub id", model="a" * 5000)
    refused(run, "home directory", model="~nobody-of-this-name/model")
    refused(run, "HF_HUB_OFFLINE is set", model="org/name")
    (run.folder / "file.txt").write_text("x")
    refused(run, "is a file; expected a folder", model="file.txt")


def test_no_network(run):
    """Nobody listens there: a refused connection stands for every kind of missing network."""
    refused(run, "the Hub cannot be reached", model="org/name", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")


def test_broken_gguf(run):
    (run.folder / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    refused(run, "x.gguf cannot be converted", "-q", model="x.gguf")


def test_device_that_is_not_there(run):
    refused(run, "device 'cuda:77' cannot be used here", "--device", "cuda:77", model="tiny:llama3-8b")


def test_output_folder_in_use(run):
    (run.folder / "mine").mkdir()
    (run.folder / "mine" / "notes.txt").write_text("precious")
    arguments = ("--method", "drop-last", "--layers", "2", "--out", "mine")
    refused(run, "mine is not empty", *arguments, model="tiny:llama3-8b")
    refused(run, "holds no plan.json", *arguments, "--overwrite", model="tiny:llama3-8b")
    assert (run.folder / "mine" / "notes.txt").read_text() == "precious"
    (run.folder / "link").symlink_to("mine")
    refused(run, "is a link", *arguments[:-1], "link", model="tiny:llama3-8b")
    refused(run, "is a file", *arguments[:-1], "two.json", model="tiny:llama3-8b")


def test_the_source_is_never_written_to(run, damaged):
    arguments = ("--method", "drop-last", "--layers", 2, "--overwrite", "--out")
    (damaged / "plan.json").write_text("{}")  # as if the source were an output itself
    (run.folder / "alias").symlink_to("damaged")
    before = {path.name: path.read_bytes() for path in damaged.iterdir()}
    for out in ("damaged", "damaged/sub", "alias/sub", "../here"):
        refused(run, "", *arguments, out)
    assert {path.name: path.read_bytes() for path in damaged.iterdir()} == before


def test_overwrite_replaces(run):
    merge = ("merge", "--model", "tiny:llama3-8b", "--out", "out", "--method", "drop-last", "--layers")
    run(*merge, 2)
    first = (run.folder / "out" / "config.json").read_text()
    run(*merge, 5, "--overwrite")
    assert json.loads(first)["num_hidden_layers"] == 30
    assert json.loads((run.folder / "out" / "config.json").read_text())["num_hidden_layers"] == 27
    assert sorted(os.listdir(run.folder)) == ["out", "two.json"]
    run("verify", "out")


def test_traceback_only_with_v(run):
    done = run("merge", "--alphas", "none.json", "--model", "tiny:llama3-8b", "-v", status=1)
    assert "Traceback" in done.stderr


def test_verify_wrong_folder(run, damaged):
    assert "has no report.json" in run("verify", damaged, status=1).stderr


def test_verify_finds_a_flipped_bit(run):
    run("merge", "--model", "tiny:llama3-8b", "--out", "out", "--alphas", "two.json")
    path = run.folder / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x10
    path.write_bytes(data)
    done = run("verify", "out", status=1)
    assert "differs from" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Disk and signals


def test_disk_too_small(run, tmp_path):
    """Refused before writing: the file system is told to have a megabyte left."""
    code = (
        "import runpy, shutil, sys; from collections import namedtuple\n"
        "shutil.disk_usage = lambda path: namedtuple('Usage', 'total used free')(10**9, 0, 10**6)\n"
        "sys.argv = {argv}; sys.path.insert(0, {scripts!r})\n"
        "runpy.run_path({path!r}, run_name='__main__')"
    )
    path = ROOT / "scripts" / "merge.py"
    arguments = ["--alphas", "two.json", "--model", "tiny:llama3-8b", "--out", "out"]
    text = code.format(argv=[str(path), *arguments], scripts=str(path.parent), path=str(path))
    done = subprocess.run([sys.executable, "-c", text], cwd=run.folder, env=run.environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "bytes are needed but only 1,000,000 are free" in done.stderr
    assert os.listdir(run.folder) == ["two.json"]


def test_disk_full_on_the_way(run):
    """A limit on file sizes stands for a disk that fills up: the write fails in the middle."""
    script = ROOT / "scripts" / "merge.py"
    command = (
        f"trap '' XFSZ; ulimit -f 20; exec {sys.executable} -B {script} --alphas two.json --model tiny:llama3-8b --out out"
    )
    run("merge", "--alphas", "two.json", "--model", "tiny:llama3-8b", "--dry-run")  # the twin is in the cache now
    done = subprocess.run(["bash", "-c", command], cwd=run.folder, env=run.environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [f"error: {run.folder}/out cannot be written: File too large"]
    assert os.listdir(run.folder) == ["two.json"]


# ---------------------------------------------------------------------------------------------------------------------
# The Hub, on the loopback interface


def test_from_the_hub(run, llama, tmp_path):
    with serving("org/name", llama.folder) as (address, sent):
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
        run("merge", "--alphas", "two.json", "--dry-run", **online)
        weights = sum(size for name, size in sent if name.endswith(".safetensors"))
        assert 0 < weights < 100_000  # headers by range; of real models this is a few hundred kB of 16 GB
        run("merge", "--alphas", "two.json", "--out", "out", "--verify", **online)
    plan = json.loads((run.folder / "out" / "plan.json").read_text())
    assert (plan["model"], plan["revision"]) == ("org/name", COMMIT)
    assert "base_model:\n- org/name" in (run.folder / "out" / "README.md").read_text()
    run("verify", "out")  # offline, from the cache
    with serving("org/name", llama.folder) as (address, _):
        refused(run, "no such repository on the Hub", model="org/none", **online | {"HF_ENDPOINT": address})
