"""The contract of every method, mode and family: what is written loads, computes what the plan says, and verifies."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import NAMES, TOKENS, load, logits, surgery, tiny_source

from merge.alphas import Alphas, plan_from_alphas
from merge.api import Options, merge_checkpoint
from merge.checkpoint import read_checkpoint
from merge.errors import PlanError, VerificationError
from merge.families import FAMILIES, kind_of, norm_read_by
from merge.methods import METHODS, plan_dropping, plan_from_method
from merge.plan import Plan, Row, Step, chain, unit_row
from merge.verify import verify_folder

REMOVED = 3
ALPHAS = (0.7, 0.45, 0.6)


def by_method(method):
    return lambda layers: plan_from_method(method, layers, REMOVED)


def by_alphas(layers, **options):
    return plan_from_alphas(Alphas(chain(ALPHAS, layers), "test"), layers, **options)


def scattered(layers):
    """Two separate pairs in the middle, so that layers above them are renumbered."""
    steps = (Step(2, 3, 0.8), Step(7, 8, 0.3))
    return plan_from_alphas(Alphas(steps, "scattered"), layers)


PLANS = {
    **{method: by_method(method) for method in METHODS},
    "drop": lambda layers: plan_dropping([1, 5, 6], layers),
    "alphas": by_alphas,
    "alphas, all": lambda layers: by_alphas(layers, tensors="all"),
    "alphas, fold-norms": lambda layers: by_alphas(layers, tensors="fold-norms"),
    "alphas, sequential": lambda layers: by_alphas(layers, arithmetic="sequential"),
    "scattered": scattered,
}


def merged_by_hand(model, plan, family):
    """The plan carried out on modules in float64, rounded once to bf16; the order of sums is torch's own."""
    source = [dict(layer.named_parameters()) for layer in model.model.layers]

    def mixed(index, name, parameter):
        row = plan.rows[index]
        kind = kind_of(name)
        if row.is_unit or not (kind == "projection" or (kind == "norm" and plan.tensors == "all")):
            return None
        norm = norm_read_by(name, list(source[0])) if plan.tensors == "fold-norms" else None

        def gain(layer):
            return source[layer][norm].double() + family.norm_offset if norm else 1.0

        if plan.arithmetic == "sequential":
            values = {layer: source[layer][name] for layer in range(len(source))}
            for step in plan.steps:
                summed = step.alpha * values[step.into] + (1 - step.alpha) * values[step.remove]
                values[step.into] = summed.to(torch.bfloat16).float()
            return values[row.base]
        total = sum(c * source[layer][name].double() * gain(layer) for layer, c in row.mix.items()) / gain(row.base)
        return total.to(torch.bfloat16)

    return surgery(model, plan.keep, mixed)


@pytest.fixture(scope="session")
def models(tiny_cache):
    """The original model of each family, loaded once."""
    return {name: load(tiny_source(name, tiny_cache).folder) for name in NAMES}


@pytest.mark.parametrize("which", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, which, tiny_cache, models, tmp_path):
    source = tiny_source(name, tiny_cache)
    checkpoint = source.checkpoint()
    plan = PLANS[which](checkpoint.num_hidden_layers)
    out = tmp_path / "out"
    report = merge_checkpoint(plan, source, out, Options(allow_mixed_attention=True))

    model = load(out)  # complains about missing and unexpected tensors
    assert model.config.num_hidden_layers == len(plan.rows) == report.num_hidden_layers
    assert sum(p.numel() for p in model.parameters()) == report.num_parameters

    expected = merged_by_hand(models[name], plan, FAMILIES[checkpoint.model_type])
    # By hand the sum is exact, so a few near-ties may fall on the other side in the last place of bf16.
    tolerance = {"atol": 0.05, "rtol": 0.02} if any(not row.is_unit for row in plan.rows) else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(logits(model), logits(expected), **tolerance)
    for (key, value), (other, reference) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert key == other
        torch.testing.assert_close(value, reference, rtol=2**-7, atol=1e-9)  # a unit in the last place of bf16
        assert (value != reference).sum() <= max(1, 0.05 * value.numel()), key

    with torch.inference_mode():
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 258}
        cached = model.generate(TOKENS, use_cache=True, **settings)
        uncached = model.generate(TOKENS, use_cache=False, **settings)
    assert cached.tolist() == uncached.tolist()

    found = verify_folder(out, source)
    assert found.num_kept + found.num_mixed == len(read_checkpoint(out).tensors)
    assert (found.num_mixed > 0) == any(not row.is_unit for row in plan.rows)


@pytest.mark.parametrize("target", ["kept", "mixed", "header"])
def test_one_flipped_bit_is_found(target, llama, tmp_path):
    out = tmp_path / "out"
    merge_checkpoint(by_alphas(32), llama, out)
    verify_folder(out, llama)
    name = {"kept": "model.layers.3.mlp.up_proj.weight", "mixed": "model.layers.28.mlp.up_proj.weight"}.get(target)
    tensor = read_checkpoint(out).tensors[name or "lm_head.weight"]
    path = out / tensor.file
    data = bytearray(path.read_bytes())
    if target == "header":
        position = data.index(b'"model.layers.5.')
        data[position + 14] ^= 1  # layer 5 becomes layer 4
    else:
        data[tensor.start + tensor.nbytes // 2] ^= 1  # the lowest bit of one mantissa
    path.write_bytes(data)
    with pytest.raises((VerificationError, ValueError), match=name and name.replace(".", r"\.")):
        verify_folder(out, llama)


@pytest.mark.parametrize("bit", range(16))
def test_any_bit_of_a_mixed_element_is_found(bit, llama, tmp_path):
    out = tmp_path / "out"
    merge_checkpoint(by_alphas(32), llama, out)
    tensor = read_checkpoint(out).tensors["model.layers.28.self_attn.q_proj.weight"]
    path = out / tensor.file
    data = bytearray(path.read_bytes())
    data[tensor.start + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=r"q_proj\.weight element 0"):
        verify_folder(out, llama)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_changed_side_files_are_found(file, llama, tmp_path):
    out = tmp_path / "out"
    merge_checkpoint(by_alphas(32), llama, out)
    text = (out / file).read_text()
    (out / file).write_text(text.replace('"rope_theta": 500000.0', '"rope_theta": 10000.0').replace("message", "text"))
    if file == "tokenizer.json":
        (out / file).write_text(text + " ")
    with pytest.raises(VerificationError, match=file):
        verify_folder(out, llama)


def test_verify_needs_the_same_source(llama, tiny_cache, tmp_path):
    out = tmp_path / "out"
    merge_checkpoint(by_alphas(32), llama, out)
    with pytest.raises(VerificationError, match="another version"):
        verify_folder(out, tiny_source("smollm3-3b", tiny_cache))


def test_a_plan_made_wrong_is_found(llama, tmp_path):
    """The verifier reads the plan, not the executor's mind: other coefficients in plan.json are a difference."""
    out = tmp_path / "out"
    merge_checkpoint(replace(by_alphas(32), steps=()), llama, out)
    plan = json.loads((out / "plan.json").read_text())
    plan["rows"][-1]["mix"]["28"] += 0.01
    (out / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(VerificationError, match="element"):
        verify_folder(out, llama)


def test_groups_have_their_own_coefficients(llama, tmp_path):
    groups = {"self_attn.q_proj": {4: 0.5, 9: 0.5}, "input_layernorm": {5: 1.0}}
    plan = Plan((unit_row(0), Row(4, {4: 1.0}, groups)), 32)
    out = tmp_path / "out"
    merge_checkpoint(plan, llama, out)
    verify_folder(out, llama)
    original, result = load(llama.folder).model.layers, load(out).model.layers
    torch.testing.assert_close(result[1].input_layernorm.weight, original[5].input_layernorm.weight, rtol=0, atol=0)
    torch.testing.assert_close(result[1].mlp.up_proj.weight, original[4].mlp.up_proj.weight, rtol=0, atol=0)
    mean = (original[4].self_attn.q_proj.weight + original[9].self_attn.q_proj.weight) / 2
    torch.testing.assert_close(result[1].self_attn.q_proj.weight, mean.to(torch.bfloat16).float(), rtol=0, atol=0)
    assert "norms stay the base layer's; beside them, the groups named above." in (out / "README.md").read_text()


def test_layers_can_be_repeated(llama, models, tmp_path):
    plan = Plan(tuple(unit_row(layer) for layer in [0, 1, 2, 1, 2, 31]), 32)
    out = tmp_path / "out"
    report = merge_checkpoint(plan, llama, out)
    verify_folder(out, llama)
    torch.testing.assert_close(logits(load(out)), logits(surgery(models["llama3-8b"], plan.keep)), rtol=0, atol=0)
    assert report.num_hidden_layers == 6


@pytest.mark.parametrize("family", ["llama3-8b", "gemma2-2b", "phi3-mini"])
def test_fold_norms_averages_maps(family, tiny_cache, tmp_path):
    """On any input, what q (or gate) computes behind the base's norm is the mean of what the layers compute behind theirs."""
    source = tiny_source(family, tiny_cache)
    layers = source.checkpoint().num_hidden_layers
    out = tmp_path / "out"
    plan = Plan((unit_row(0), Row(4, {4: 0.25, 6: 0.75})), layers, tensors="fold-norms")
    merge_checkpoint(plan, source, out, Options(allow_mixed_attention=True))
    original, result = load(source.folder).model.layers, load(out).model.layers[1]
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))

    def maps(layer):
        attention = getattr(layer.self_attn, "qkv_proj", None) or layer.self_attn.q_proj
        gate = getattr(layer.mlp, "gate_up_proj", None) or layer.mlp.gate_proj
        norm = getattr(layer, "pre_feedforward_layernorm", None) or layer.post_attention_layernorm
        return attention(layer.input_layernorm(hidden)), gate(norm(hidden))

    with torch.no_grad():
        for got, one, two in zip(maps(result), maps(original[4]), maps(original[6]), strict=True):
            torch.testing.assert_close(got, 0.25 * one + 0.75 * two, rtol=0.02, atol=0.02)


def test_bias_follows_its_matrix(tiny_cache, tmp_path):
    source = tiny_source("qwen2-0.5b", tiny_cache)
    out = tmp_path / "out"
    merge_checkpoint(Plan((Row(0, {0: 0.5, 1: 0.5}),), 24), source, out)
    original, result = load(source.folder).model.layers, load(out).model.layers
    mean = (original[0].self_attn.k_proj.bias + original[1].self_attn.k_proj.bias) / 2
    torch.testing.assert_close(result[0].self_attn.k_proj.bias, mean.to(torch.bfloat16).float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_converts_everything(dtype, llama, tmp_path):
    out = tmp_path / "out"
    merge_checkpoint(by_alphas(32), llama, out, Options(dtype=dtype, verify=True))
    stored = {tensor.dtype for tensor in read_checkpoint(out).tensors.values()}
    assert stored == {{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype
    kept = "model.layers.3.mlp.up_proj.weight"
    torch.testing.assert_close(load(out).state_dict()[kept], load(llama.folder).state_dict()[kept], rtol=1e-3, atol=1e-6)


def test_shard_size_does_not_matter(llama, tmp_path):
    weights = {}
    for size in ("2KB", "20KB", "5GB"):
        out = tmp_path / size
        merge_checkpoint(by_alphas(32), llama, out, Options(max_shard_size=size))
        weights[size] = load(out).state_dict()
        assert (len(list(out.glob("*.safetensors"))) == 1) == (size == "5GB")
    for other in ("2KB", "20KB"):
        assert weights[other].keys() == weights["5GB"].keys()
        for name, value in weights[other].items():
            torch.testing.assert_close(value, weights["5GB"][name], rtol=0, atol=0)


def test_two_merges_write_the_same_bytes(llama, tmp_path):
    for name in ("one", "two"):
        merge_checkpoint(by_alphas(32), llama, tmp_path / name, command="same")
    for path in (tmp_path / "one").iterdir():
        if path.name != "report.json":  # holds times
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_inputs_are_untouched(llama, tmp_path):
    before = {path.name: path.read_bytes() for path in llama.folder.iterdir()}
    merge_checkpoint(by_alphas(32), llama, tmp_path / "out", Options(verify=True, link=True))
    assert {path.name: path.read_bytes() for path in llama.folder.iterdir()} == before


def test_link_shares_unchanged_shards(llama, tmp_path):
    """Shards in which nothing changes are the source's own bytes; the model is the same as without --link."""
    shutil.copytree(llama.folder, tmp_path / "source")  # on the same file system as the output
    source = replace(llama, spec=str(tmp_path / "source"), folder=tmp_path / "source")
    plan = by_alphas(32)
    plain = merge_checkpoint(plan, source, tmp_path / "plain")
    linked = merge_checkpoint(plan, source, tmp_path / "linked", Options(link=True))
    assert linked.bytes_linked > 0
    assert linked.bytes_copied + linked.bytes_linked == plain.bytes_copied
    assert set(linked.linked_by.values()) <= {"reflink", "hard link"}
    verify_folder(tmp_path / "linked", source)
    torch.testing.assert_close(logits(load(tmp_path / "linked")), logits(load(tmp_path / "plain")), rtol=0, atol=0)


def test_link_and_repeated_layers(llama, tmp_path):
    """A linked shard does not swallow a second use of its tensors."""
    shutil.copytree(llama.folder, tmp_path / "source")
    source = replace(llama, folder=tmp_path / "source")
    plan = Plan(tuple(unit_row(layer) for layer in [*range(32), 0]), 32)
    report = merge_checkpoint(plan, source, tmp_path / "out", Options(link=True, verify=True))
    assert report.num_hidden_layers == 33
    assert report.bytes_linked > 0
    load(tmp_path / "out")


def test_mixed_attention_is_refused_and_named(tiny_cache, tmp_path):
    source = tiny_source("gemma2-2b", tiny_cache)
    with pytest.raises(PlanError, match=r"row 22 mixes attention of different kinds.*--allow-mixed-attention"):
        merge_checkpoint(by_alphas(26), source, tmp_path / "out")
    with pytest.raises(PlanError, match=r"no longer follow the rule of gemma2"):
        merge_checkpoint(plan_dropping([4], 26), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_checkpoint(plan_dropping([4, 5], 26), source, tmp_path / "out")  # whole periods may go


def test_sliding_window_parity_survives(tiny_cache, models, tmp_path):
    """Dropping one layer of Gemma 2 shifts the alternation: written out in layer_types, the logits are those of the surgery."""
    source = tiny_source("gemma2-2b", tiny_cache)
    plan = plan_dropping([4], 26)
    merge_checkpoint(plan, source, tmp_path / "out", Options(allow_mixed_attention=True))
    expected = surgery(models["gemma2-2b"], plan.keep)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(expected), rtol=0, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["layer_types"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert (logits(load(tmp_path / "out")) - logits(expected)).abs().max() > 1e-3, "the test prompt is too short to tell"


def test_card(llama, tmp_path):
    from huggingface_hub import ModelCard

    source = replace(llama, folder=tmp_path / "source")
    shutil.copytree(llama.folder, source.folder)
    (source.folder / "README.md").write_text("---\nlicense: llama3\nlanguage:\n- en\n---\n# Theirs\n")
    merge_checkpoint(by_alphas(32), source, tmp_path / "out", base_model="meta-llama/Meta-Llama-3-8B", command="python x")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "base_model": ["meta-llama/Meta-Llama-3-8B"],
        "base_model_relation": "merge",
        "language": ["en"],
        "library_name": "transformers",
        "license": "llama3",
        "tags": ["merge", "layerfuse"],
    }
    assert "layers 0-27: original layers 0-27, unchanged" in card.text
    assert "python x" in card.text


def test_everything_that_belongs_is_there(llama, tmp_path):
    merge_checkpoint(by_alphas(32), llama, tmp_path / "out", Options(max_shard_size="20KB"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors", "model.safetensors.index.json", "plan.json",
        "report.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "out").iterdir() if umask() == 0o022)


def umask():
    status = Path("/proc/self/status")
    return int(status.read_text().split("Umask:")[1].split()[0], 8) if status.exists() else None


def test_source_that_leads_into_the_output(llama, tmp_path):
    """A source of links to an earlier output does not let that output be replaced."""
    merge_checkpoint(by_method("drop-last")(32), llama, tmp_path / "out")
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "out").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    source = replace(llama, folder=tmp_path / "links")
    with pytest.raises(OSError, match="leads to; choose a folder elsewhere"):
        merge_checkpoint(by_method("drop-last")(29), source, tmp_path / "out", Options(overwrite=True))
    load(tmp_path / "out")


def test_order_of_coefficients_does_not_matter(llama, tmp_path):
    """A plan made in Python with layers in any order sums as the same plan read back from its file, and verifies."""
    for name, mix in (("one", {9: 0.3, 4: 0.5, 6: 0.2}), ("two", {4: 0.5, 6: 0.2, 9: 0.3, 11: 0.0})):
        merge_checkpoint(Plan((Row(4, mix),), 32), llama, tmp_path / name, Options(verify=True))
    one, two = (load(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_fold_norms_and_a_group_on_the_same_norm(llama, tmp_path):
    plan = Plan((Row(4, {4: 0.5, 5: 0.5}, {"input_layernorm": {5: 1.0}}),), 32, tensors="fold-norms")
    with pytest.raises(PlanError, match="'input_layernorm' is folded"):
        merge_checkpoint(plan, llama, tmp_path / "out")


@pytest.mark.parametrize(("name", "key"), [("gemma2-2b", "layer_types"), ("smollm3-3b", "no_rope_layers")])
def test_null_in_a_config_is_absence(name, key, tiny_cache, models, tmp_path):
    """transformers fills in what is null; so does the cut, instead of leaving the old rule to shift."""
    source = tiny_source(name, tiny_cache)
    shutil.copytree(source.folder, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {key: None}))
    source = replace(source, folder=tmp_path / "source")
    plan = plan_dropping([1], source.checkpoint().num_hidden_layers)
    with pytest.raises(PlanError, match="no longer follow the rule"):
        merge_checkpoint(plan, source, tmp_path / "out")
    merge_checkpoint(plan, source, tmp_path / "out", Options(allow_mixed_attention=True))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(surgery(models[name], plan.keep)), rtol=0, atol=0)


def test_files_that_do_not_belong_are_found(llama, tmp_path):
    merge_checkpoint(by_alphas(32), llama, tmp_path / "out")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"adapter_config\.json does not belong"):
        verify_folder(tmp_path / "out", llama)


def test_broken_front_matter_of_the_source(llama, tmp_path):
    shutil.copytree(llama.folder, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: [unclosed\n---\n# x\n")
    merge_checkpoint(by_alphas(32), replace(llama, folder=tmp_path / "source"), tmp_path / "out", Options(verify=True))


def test_unknown_dtype(llama, tmp_path):
    with pytest.raises(PlanError, match="dtype is 'bf16', expected one of auto"):
        merge_checkpoint(by_alphas(32), llama, tmp_path / "out", Options(dtype="bf16"))
