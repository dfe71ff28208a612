"""Projected RegMean: exact where a donor is the host in another basis, shapes of every family, and what is refused."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st
from tiny import ROOT, load, tiny_source
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
)

from merge.errors import OutputError
from merge.fusion.errors import FusionError
from merge.fusion.decoders import check_host, decoder_of
from merge.fusion.moments import BASES, Moments, _sketch, collect, layer_cka, match_depths, write_step
from merge.fusion.positions import Aligned, mapped_tokens, same_tokens
from merge.fusion.projection import HeldOut, choose_alpha, merge_projected, project, save
from merge.fusion.vocabulary import VocabularyMap

VOCABULARY = 64
WRITTEN = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DONORS = {
    "gemma2": Gemma2Config(
        **COMMON, **HEADS, hidden_size=24, intermediate_size=40, num_hidden_layers=5, head_dim=8, query_pre_attn_scalar=8
    ),
    "phi3": Phi3Config(**COMMON, **HEADS, hidden_size=48, intermediate_size=56, num_hidden_layers=2),
    "mistral": MistralConfig(**COMMON, **HEADS, hidden_size=16, intermediate_size=72, num_hidden_layers=6),
}
TEXTS = ["".join(chr(48 + (7 * i * i + 3 * j * j + i * j) % 60) for j in range(9 + i % 5)) for i in range(24)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for one another cost more than these sizes take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def encode(texts):
    return [[ord(char) - 48 + 3 for char in text] for text in texts]


ALIGN = same_tokens(encode)


def built(config, seed=0, dtype=torch.float32):
    """A model whose norms are not all one and whose logits are of size one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(0.3 * torch.randn_like(value))
            else:
                value.normal_(0.0, 1.0 if "embed" in name else value.shape[1] ** -0.5)
        model.get_output_embeddings().weight.mul_(0.25)
    return model


def llama(seed=0, dtype=torch.float32, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3} | changes
    return built(LlamaConfig(**COMMON, **HEADS, **sizes), seed, dtype)


def logits(model, texts=TEXTS[:6]):
    with torch.inference_mode():
        return model(ALIGN(texts).host_ids, use_cache=False).logits


def merged(host, weights):
    """A copy of the host with other weights."""
    copy = AutoModelForCausalLM.from_config(host.config, dtype=host.dtype).eval()
    copy.load_state_dict(host.state_dict() | weights)
    return copy


def turned(host, seed=7):
    """The host's function in another basis: gains folded in, states rotated, neurons and heads in another order.

    With gains of one, RMSNorm commutes with a rotation Q: what writes becomes Q W, what reads W Q^T.
    """
    config, generator = host.config, torch.Generator().manual_seed(seed)
    d, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    found = {name: value.double() for name, value in host.state_dict().items()}

    def ordered(value, axis, order):
        """Whole heads in another order."""
        opened = value.unflatten(axis, (len(order), -1))
        return opened.index_select(axis, order).flatten(axis, axis + 1)

    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        of_groups = torch.randperm(groups, generator=generator)
        per = heads // groups
        of_heads = torch.cat([group * per + torch.randperm(per, generator=generator) for group in of_groups])
        neurons = torch.randperm(config.intermediate_size, generator=generator)
        for name, axis, order in (("q", 0, of_heads), ("k", 0, of_groups), ("v", 0, of_groups), ("o", 1, of_heads)):
            key = f"{at}self_attn.{name}_proj.weight"
            found[key] = ordered(found[key], axis, order)
        for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
            key = f"{at}mlp.{name}_proj.weight"
            found[key] = found[key].index_select(axis, neurons)
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for reader in readers:
                found[f"{at}{reader}.weight"] = found[f"{at}{reader}.weight"] * found[f"{at}{norm}.weight"] @ Q.T
            found[f"{at}{norm}.weight"] = torch.ones(d)
        for name in WRITTEN:
            found[at + name] = Q @ found[at + name]
    found["model.embed_tokens.weight"] = found["model.embed_tokens.weight"] @ Q.T
    found["lm_head.weight"] = found["lm_head.weight"] * found["model.norm.weight"] @ Q.T
    found["model.norm.weight"] = torch.ones(d)
    return merged(host, {name: value.to(host.dtype) for name, value in found.items()})


def test_a_donor_in_another_basis_changes_nothing():
    """...at any alpha, while the mean of the same weights is another function."""
    host = llama()
    donor = turned(host)
    expected = logits(host)  # of size one
    torch.testing.assert_close(logits(donor), expected, atol=2e-6, rtol=0)
    donor_state = donor.state_dict()
    naive = merged(host, {name: (value + donor_state[name]) / 2 for name, value in host.state_dict().items()})
    assert (logits(naive) - expected).abs().max() > 0.5
    for basis, near in (("procrustes", 2e-6), ("ridge", 2e-5)):  # as far as rounding goes, and as the ridge shrinks
        projection = project(host, donor, TEXTS, ALIGN, basis=basis)
        assert projection.report.depth_map == (0, 1, 2)
        assert max(gap for one in projection.report.layers for gap in one.gaps.values()) < near
        for alpha in (0.0, 0.5, 1.0):
            found = logits(merged(host, projection.weights(host, alpha)))
            torch.testing.assert_close(found, expected, atol=near if alpha else 0.0, rtol=0)


def test_steps_are_the_formula():
    """Against activations that are all kept, gathered without hooks on the layers' insides."""
    host, donor = llama(dtype=torch.float64), llama(seed=1, dtype=torch.float64, hidden_size=24, num_hidden_layers=2)
    ridge, alpha, pi = 1e-3, 0.4, [0, 0, 1]
    weights, report = merge_projected(host, donor, TEXTS, ALIGN, alpha=alpha, ridge=ridge, depth_map=pi, batch_size=5)
    batch = ALIGN(TEXTS)
    at = tuple(batch.host_positions.T)
    kept = [gathered(model, batch.host_ids, at) for model in (host, donor)]
    assert report.positions == sum(map(len, TEXTS)) == len(kept[0][0, "left"])

    def solved(gram, rows):
        return rows @ torch.linalg.inv(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)))

    for layer, m in enumerate(pi):
        R, R_d = kept[0][layer, "left"], kept[1][m, "left"]
        B = solved(R_d.T @ R_d, R.T @ R_d)
        for name, gap in zip(WRITTEN, report.layers[layer].gaps.values(), strict=True):
            Z, Y = kept[0][layer, name]
            change = kept[1][m, name][1] @ B.T - Y
            assert gap == pytest.approx(float(change.norm() / Y.norm()))
            key = f"model.layers.{layer}.{name}"
            torch.testing.assert_close(weights[key], host.state_dict()[key] + alpha * solved(Z.T @ Z, change.T @ Z))


def gathered(model, ids, at):
    """(layer, "left") -> states; (layer, matrix) -> (what it reads, what it writes), at some positions."""
    found, handles = {}, []
    for number, layer in enumerate(model.model.layers):
        for name in WRITTEN:

            def keep(_, inputs, output, key=(number, name)):
                found[key] = inputs[0][at], output[at]

            handles.append(layer.get_submodule(name.removesuffix(".weight")).register_forward_hook(keep))

        def left(_, inputs, output, key=(number, "left")):
            found[key] = (output[0] if isinstance(output, tuple) else output)[at]

        handles.append(layer.register_forward_hook(left))
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", DONORS)
@pytest.mark.parametrize("basis", BASES)
def test_donors_of_other_families_and_shapes(family, basis):
    """Only write matrices change, in shape and dtype they stay, and the merged model runs."""
    host, donor = llama(), built(DONORS[family], seed=3)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    weights, report = merge_projected(host, donor, TEXTS, ALIGN, alpha=0.5, basis=basis, batch_size=7)
    assert set(weights) == {f"model.layers.{layer}.{name}" for layer in range(3) for name in WRITTEN}
    assert list(report.depth_map) == sorted(report.depth_map)
    assert set(report.depth_map) <= set(range(donor.config.num_hidden_layers))
    assert all(0.0 < one.cka <= 1.0 and set(one.gaps) == {"attention", "mlp"} for one in report.layers)
    result = merged(host, weights)
    assert logits(result).isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in result.state_dict().items() if name not in weights)
    assert not any(torch.equal(weights[name], before[name]) for name in weights)


def test_every_family_as_host_and_donor(any_tiny):
    """The twins of real models; those with norms behind their write matrices are donors only."""
    model, partner = load(any_tiny.folder), llama(num_hidden_layers=2)
    total = model.config.num_hidden_layers
    _, report = merge_projected(partner, model, TEXTS[:8], ALIGN, alpha=0.5, depth_map=[0, total - 1])
    assert report.mean_gap > 0
    if model.config.model_type in ("gemma2", "gemma3_text"):
        with pytest.raises(FusionError, match="take it as donor"):
            project(model, partner, TEXTS, ALIGN)
        return
    weights, _ = merge_projected(model, partner, TEXTS[:8], ALIGN, alpha=0.5, depth_map=[0] * total)
    assert set(weights) == {f"model.layers.{layer}.{name}" for layer in range(total) for name in WRITTEN}
    assert all(value.isfinite().all() for value in weights.values())


def test_what_a_gemma_2_writes_is_behind_its_post_norms():
    donor = built(DONORS["gemma2"])
    decoder, seen = decoder_of(donor, "donor"), {}
    layer = decoder.layers[2]
    hooks = {
        decoder.writer(2, place): lambda _, output, place=place: seen.update({place: output}) for place in ("attention", "mlp")
    }
    decoder.run(ALIGN(TEXTS).host_ids, hooks | {layer: lambda entered, left: seen.update(change=left - entered)})
    torch.testing.assert_close(seen["attention"] + seen["mlp"], seen["change"])
    with pytest.raises(FusionError, match="norms behind its write matrices"):
        check_host(decoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_zero_is_the_host_bit_for_bit(dtype):
    host, donor = llama(dtype=dtype), built(DONORS["gemma2"], dtype=dtype)
    projection = project(host, donor, TEXTS, ALIGN)
    for name, value in projection.weights(host, 0.0).items():
        assert value.dtype == dtype
        assert torch.equal(value, host.state_dict()[name])
    assert projection.weights(host, 1.0)["model.layers.1.mlp.down_proj.weight"].dtype == dtype
    with pytest.raises(FusionError, match=r"alpha is 1.5; expected 0"):
        projection.weights(host, 1.5)
    with pytest.raises(FusionError, match=r"model.layers.2.self_attn.o_proj.weight is absent in this model"):
        projection.weights(llama(num_hidden_layers=2), 0.5)


def test_pieces_and_passes_give_the_same():
    """Texts in any batches, layers in any number of passes; and the accumulator by itself."""
    host, donor = llama(dtype=torch.float64), built(DONORS["mistral"], dtype=torch.float64)
    whole = project(host, donor, TEXTS, ALIGN, batch_size=len(TEXTS))
    for options in ({"batch_size": 1}, {"batch_size": 7, "layers_per_pass": 1}, {"layers_per_pass": 2}):
        pieces = project(host, donor, TEXTS, ALIGN, **options)
        assert pieces.report.depth_map == whole.report.depth_map
        for name, value in whole.deltas.items():
            torch.testing.assert_close(pieces.deltas[name], value, rtol=1e-6, atol=1e-8)
    x, y = torch.randn(50, 3), torch.randn(50, 4)
    moments = Moments("xy", "yy")
    for i in range(0, 50, 7):
        moments.add(x=x[i : i + 7], y=y[i : i + 7])
    assert moments["xy"].dtype == torch.float64
    torch.testing.assert_close(moments["xy"], x.double().T @ y.double())
    torch.testing.assert_close(moments["yy"], y.double().T @ y.double())


def test_full_step_writes_what_the_donor_writes():
    """With as many inputs as positions the regression is exact: at alpha 1, W' Z is B Y_d."""
    generator = torch.Generator().manual_seed(0)
    Z, Y, D = (torch.randn(20, size, dtype=torch.float64, generator=generator) for size in (30, 5, 4))
    W, B = (torch.randn(size, dtype=torch.float64, generator=generator) for size in ((5, 30), (5, 4)))
    Y = Z @ W.T
    moments = Moments("zz", "yz", "dz", "yy", "dy", "dd")
    moments.add(z=Z, y=Y, d=D)
    step, gap = write_step(moments, B, 1e-9)
    torch.testing.assert_close(Z @ (W + step).T, D @ B.T, atol=1e-6, rtol=1e-6)
    assert gap == pytest.approx(float((D @ B.T - Y).norm() / Y.norm()))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
def test_depth_map_is_the_best_of_all(layers, donor_layers, seed):
    scores = torch.rand(layers, donor_layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = match_depths(scores)
    assert list(found) == sorted(found)
    best = max(
        sum(float(scores[i, m]) for i, m in enumerate(path))
        for path in itertools.combinations_with_replacement(range(donor_layers), layers)
    )
    assert sum(float(scores[i, m]) for i, m in enumerate(found)) == pytest.approx(best)


def test_cka_is_its_definition():
    """Centred, between states of different width; 1 for the same function in another basis."""
    host, donor = llama(), built(DONORS["phi3"])
    sides = decoder_of(host, "host"), decoder_of(donor, "donor")
    batches = [ALIGN(TEXTS[:9]), ALIGN(TEXTS[9:])]
    found = layer_cka(*sides, batches)
    whole = ALIGN(TEXTS)
    at = tuple(whole.host_positions.T)
    one, two = (gathered(model, whole.host_ids, at) for model in (host, donor))
    for i in range(3):
        for m in range(2):
            X, Y = (states[key, "left"].double() for states, key in ((one, i), (two, m)))
            X, Y = X - X.mean(0), Y - Y.mean(0)
            expected = (X.T @ Y).norm() ** 2 / (X.T @ X).norm() / (Y.T @ Y).norm()
            assert float(found[i, m]) == pytest.approx(float(expected), rel=1e-4)
    same = layer_cka(sides[0], decoder_of(turned(host), "donor"), batches)
    torch.testing.assert_close(same.diagonal(), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_sketch_keeps_its_share():
    P, Q = _sketch(600, seed=0), _sketch(300, seed=1)
    torch.testing.assert_close(P.T @ P, torch.eye(256, dtype=torch.float64))
    generator = torch.Generator().manual_seed(2)
    C = torch.randn(600, 5, dtype=torch.float64, generator=generator) @ torch.randn(
        5, 300, dtype=torch.float64, generator=generator
    )
    share = 256 / 600 * 256 / 300
    assert float((P.T @ C @ Q).square().sum() / share) == pytest.approx(float(C.square().sum()), rel=0.1)


def test_a_donor_with_another_vocabulary():
    """Every host token becomes one to three donor tokens; the last of them is where it ends."""
    counts = torch.tensor([0, 1, 1] + [1 + v % 3 for v in range(3, VOCABULARY)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(torch.int32)
    tokens = (torch.arange(int(counts.sum())) % VOCABULARY).to(torch.int32)
    align = mapped_tokens(lambda texts: [[0, 1, *row] for row in encode(texts)], VocabularyMap(offsets, tokens), max_tokens=8)
    batch = align(["048", "9"])
    rows = [[0, 1, 3, 7, 11], [0, 1, 12]]
    assert batch.host_ids.tolist() == [rows[0], [*rows[1], 0, 0]]
    assert batch.host_positions.tolist() == [[0, 1], [0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]  # the donor does not see id 0
    ends = [
        sum(int(counts[v]) for v in row[: i + 1]) - 1
        for row, i in [(rows[0], i) for i in range(1, 5)] + [(rows[1], 1), (rows[1], 2)]
    ]
    assert batch.donor_positions[:, 1].tolist() == ends
    for (row, i), (_, j) in zip(batch.host_positions.tolist(), batch.donor_positions.tolist(), strict=True):
        v = int(batch.host_ids[row, i])
        assert int(batch.donor_ids[row, j]) == int(tokens[offsets[v + 1] - 1])
    _, report = merge_projected(llama(), built(DONORS["mistral"]), TEXTS, align, alpha=0.1)
    assert report.positions == sum(1 + min(6, len(text)) for text in TEXTS)


def test_alpha_is_zero_unless_loss_falls():
    host, donor = llama(), built(DONORS["mistral"])
    before = {name: value.clone() for name, value in host.state_dict().items()}
    pointers = {name: value.data_ptr() for name, value in host.named_parameters()}
    projection = project(host, donor, TEXTS, ALIGN)
    ids = ALIGN(TEXTS[:8]).host_ids

    def loss(model):
        return float(torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1).detach(), ids[:, 1:].flatten()))

    held_out = choose_alpha(host, projection, loss, (0.1, 1.0))
    assert list(held_out.losses) == [0.0, 0.1, 1.0]
    assert held_out.losses[1.0] == loss(merged(host, projection.weights(host, 1.0)))
    assert held_out.alpha == min(held_out.losses, key=held_out.losses.get)
    with pytest.raises(ZeroDivisionError):
        choose_alpha(host, projection, lambda model: 1 / 0)
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    assert all(value.data_ptr() == pointers[name] for name, value in host.named_parameters())
    assert HeldOut({0.0: 2.0, 0.1: 2.0, 0.5: 3.0}).alpha == 0.0
    assert HeldOut({0.0: 2.0, 0.1: 1.5, 0.5: float("nan")}).alpha == 0.1
    assert HeldOut({0.0: 2.0, 0.5: float("nan")}).rises(0.5)
    assert HeldOut({0.0: float("nan"), 0.5: 1.0}).alpha == 0.0
    with pytest.raises(FusionError, match=r"at alpha 0.3 is not known; it was measured at \[0.0\]"):
        HeldOut({0.0: 2.0}).rises(0.3)
    with pytest.raises(FusionError, match="expected 0, the host, among them"):
        HeldOut({0.1: 2.0})


def test_saving_is_refused_where_loss_rises(tmp_path):
    host = llama()
    projection = project(host, built(DONORS["mistral"]), TEXTS, ALIGN)
    held_out = HeldOut({0.0: 2.0, 0.1: 1.9, 0.5: 2.5, 1.0: float("inf")})
    out = tmp_path / "out"
    for alpha in (0.5, 1.0):
        with pytest.raises(
            FusionError, match=rf"loss rises from 2.0000 to .* at alpha {alpha}; the best alpha is 0.1; .*--force"
        ):
            save(host, projection, held_out, out, alpha=alpha)
    assert list(tmp_path.iterdir()) == []
    assert save(host, projection, held_out, out) == 0.1
    expected = logits(merged(host, projection.weights(host, 0.1)))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), expected)
    assert not torch.equal(logits(host), expected)
    with pytest.raises(OutputError, match="not empty"):
        save(host, projection, held_out, out)
    assert save(host, projection, held_out, out, alpha=1.0, force=True, overwrite=True) == 1.0
    record = json.loads((out / "projection.json").read_text())
    assert record["alpha"] == 1.0
    assert record["held_out"][-1] == {"alpha": 1.0, "loss": None}
    assert [one["donor_layer"] for one in record["layers"]] == list(projection.report.depth_map)


def run_script(folder, *arguments, status=0):
    command = [sys.executable, str(ROOT / "scripts" / "project.py"), *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done


def test_the_script_writes_what_held_out_loss_allows(tmp_path, tiny_cache):
    """A donor that is the host changes nothing; another one is refused unless its alpha is forced."""
    host, donor = (tiny_source(name, tiny_cache).folder for name in ("llama3.2-1b", "gemma2-2b"))
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(300)))
    common = ["--host", host, "--text", "text.txt", "--documents", 4, "--max-tokens", 128, "--dtype", "float32", "--quiet"]
    done = run_script(tmp_path, *common, "--donor", host, "--alpha", 0.5, "--force", "--out", "same")
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["mean_gap"] < 1e-3
    assert told["held_out"]["0.5"] == pytest.approx(told["held_out"]["0.0"], abs=1e-4)
    one, two = load(tmp_path / "same"), load(host)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, two(ids).logits.to(one.dtype), rtol=0, atol=2e-2)
    assert "Held-out loss" in (tmp_path / "same" / "README.md").read_text()
    done = run_script(
        tmp_path, *common, "--donor", donor, "--alpha", 1.0, "--alphas", 1.0, "--layers-per-pass", 8, "--out", "moved",
        "--force",
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["held_out"]["1.0"] != told["held_out"]["0.0"]
    assert told["held_out"]["1.0"] > told["held_out"]["0.0"]
    for asked, expected in (
        (("--alphas", 1.0), "no alpha lowers held-out loss"),
        (("--alphas", 0.5, "--alpha", 1.0), "held-out loss rises from"),
    ):
        said = run_script(tmp_path, *common, "--donor", donor, *asked, "--out", "refused", status=1).stderr
        assert expected in said
        assert not (tmp_path / "refused").exists()
    said = run_script(tmp_path, *common, "--donor", host, "--out", "moved", status=1).stderr
    assert "moved is not empty" in said
    said = run_script(tmp_path, *common, "--donor", host, "--alpha", 1.5, "--out", "more", status=2).stderr
    assert "alpha is 1.5; expected more than 0" in said
    assert not (tmp_path / "more").exists()


def test_what_is_refused():
    host, donor = llama(), built(DONORS["mistral"])
    gemma = built(DONORS["gemma2"])
    nothing = same_tokens(lambda texts: [[] for _ in texts])
    granite = GraniteConfig(
        **COMMON,
        **HEADS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        residual_multiplier=0.2,
        embedding_multiplier=2.0,
    )
    sick = llama(seed=2)
    sick.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    gpt2 = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    for arguments, options, said in (
        ((gemma, donor, TEXTS, ALIGN), {}, "take it as donor"),
        ((host, donor, TEXTS, ALIGN), {"basis": "affine"}, "there is no basis 'affine'; known: ridge, procrustes"),
        ((host, donor, TEXTS, ALIGN), {"ridge": 0.0}, "ridge is 0.0"),
        ((host, donor, TEXTS, ALIGN), {"batch_size": 0}, "batch_size is 0"),
        ((host, donor, TEXTS, ALIGN), {"depth_map": [0, 2, 1]}, r"the depth map is \[0, 2, 1\]; expected 3 donor layers"),
        ((host, donor, TEXTS, nothing), {}, "24 texts has no positions"),
        ((host, donor, [], ALIGN), {}, "0 texts has no positions"),
        ((host, sick, TEXTS, ALIGN), {}, "not finite"),
        ((host, built(granite), TEXTS, ALIGN), {}, "donor: layer 0 does not add to its input .* cannot be projected"),
        ((host, built(gpt2), TEXTS, ALIGN), {}, r"the donor \(gpt2\) has no list of layers"),
        ((host, llama().train(), TEXTS, ALIGN), {}, "training mode"),
        ((host, llama().to("meta"), TEXTS, ALIGN), {}, "expected a plain, loaded matrix"),
    ):
        with pytest.raises(FusionError, match=said):
            project(*arguments, **options)
    ids, at = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 0], [1, 2]])
    with pytest.raises(FusionError, match="donor positions have shape"):
        Aligned(ids, ids, at, at[:1])
    with pytest.raises(FusionError, match="host positions lie outside"):
        Aligned(ids, ids, at + 1, at)


def test_moments_of_chosen_layers_only():
    """What is not asked for is not held."""
    host, donor = (decoder_of(model, side) for model, side in ((llama(), "host"), (built(DONORS["gemma2"]), "donor")))
    states, writes = collect(host, donor, [ALIGN(TEXTS)], {1: 4})
    assert list(states) == [1]
    assert sorted(writes) == [(1, "attention"), (1, "mlp")]
    assert writes[1, "mlp"]["zz"].shape == (48, 48)
    assert writes[1, "mlp"]["dz"].shape == (24, 48)
    assert states[1]["rd"].shape == (32, 24)
