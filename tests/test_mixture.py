"""Fused outputs: the softmax of the logits is the mixture, across vocabularies, and the model is a model like any other."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from fused import FAMILIES, VOCABULARY, fused, small_config, some_ids
from safetensors.torch import load_file
from test_byte_tables import named
from test_vocabulary import by_hand
from tiny import CONFIGS, ROOT, load, tiny_source
from transformers import AutoConfig, AutoModelForCausalLM

from merge.fusion import FusionConfig, FusionForCausalLM, register
from merge.fusion.assemble import FUSERS_FILE, make_parts
from merge.fusion.budget import BudgetError, mixer_parameters
from merge.fusion.errors import FusionError
from merge.fusion.make import fuse, load_fused
from merge.fusion.mixers import MODES, PACE, carry, held
from merge.fusion.recipe import Backbone, Recipe, Training, read_recipe
from merge.fusion.train import held_out_loss, train
from merge.fusion.vocabulary import bridge, vocabulary_map

HOST, DONORS = "llama3.2-1b", ("gemma2-2b", "phi3-mini")
TEXT = "".join(f"Line {i} of a text that says {i * i} and then some more.\n" for i in range(60))

register()


def mixed(mode="mixture", **options):
    """A model that mixes; `fused.fused`."""
    return fused(mode, **options)


@pytest.fixture(scope="module", params=MODES)
def model(request):
    """A model that mixes, of every mode."""
    return mixed(request.param)


@pytest.mark.parametrize(("host", "donor"), [*itertools.permutations(["gpt2", "llama3", "llama2", "gemma"], 2)])
def test_a_distribution_is_carried_token_by_token(host, donor):
    """All that the donor says of text arrives; only what neither side has a word for is shared out."""
    _, host, host_encode = named(host)
    _, donor, donor_encode = named(donor)
    generator = torch.Generator().manual_seed(0)
    p_host, p_donor = (torch.randn(3, len(side), generator=generator).softmax(-1) for side in (host, donor))
    tables = bridge(host, donor, host_encode=host_encode, donor_encode=donor_encode)
    there, back = vocabulary_map(host, donor, donor_encode), vocabulary_map(donor, host, host_encode)
    text = torch.tensor([bool(data) for data in donor.content])
    for some, whole in ((p_donor, False), (p_donor * text / (p_donor * text).sum(-1, keepdim=True), True)):
        q = carry(p_host, some, tables.begins, tables.lands)
        torch.testing.assert_close(q.sum(-1), torch.ones(3), rtol=0, atol=1e-6)
        for row in range(3):
            expected = torch.tensor(by_hand(there, back, p_host[row].double(), some[row].double()))
            assert expected.sum() == pytest.approx(1.0, abs=1e-6 if whole else 0.05)
            torch.testing.assert_close(q[row], expected / expected.sum(), rtol=1e-5, atol=1e-8, check_dtype=False)


def test_what_has_no_mass_is_carried_too():
    begins, lands = torch.tensor([0, 0, 1, -1]), torch.tensor([-1, -1, 3, -1])
    p_host = torch.tensor([[0.0, 0.0, 1.0, 0.0]] * 3)
    p_donor = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]])
    expected = [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [0.0] * 4]  # the last: the donor says nothing the host could
    torch.testing.assert_close(carry(p_host, p_donor, begins, lands), torch.tensor(expected))


def said_alone(model, number, ids):
    """What a donor expects after what stands for host ids [T], from scratch; None where nothing stands for them."""
    donor = model.donors[number]
    whole = AutoModelForCausalLM.from_config(donor.config).eval()
    whole.model, whole.lm_head = donor, model.donor_heads[number]
    offsets, tokens = model.tables[number].offsets, model.tables[number].tokens
    read = [token for index in ids.tolist() for token in tokens[offsets[index] : offsets[index + 1]].tolist()]
    return whole(torch.tensor([read]), use_cache=False).logits[0, -1].softmax(-1) if read else None


@pytest.mark.parametrize("mode", MODES)
def test_the_softmax_of_the_logits_is_the_mixture(mode):
    model, ids = mixed(mode), some_ids(2, 7)
    mixer = model.fusers[0]
    with torch.no_grad():
        found = model(ids, use_cache=False).logits.softmax(-1)
        host = model.host(ids, use_cache=False, output_hidden_states=True)
        p_host, h = host.logits.softmax(-1), host.hidden_states[-1]
        states = model.features(ids).aligned
        for row, position in itertools.product(range(2), range(7)):
            p, q = p_host[row, position], []
            for number in range(2):
                said = said_alone(model, number, ids[row, : position + 1])
                tables = model.tables[number].begins, model.tables[number].lands
                q.append(p if said is None else carry(p, said, *tables))
                assert q[-1].sum() == pytest.approx(1.0, abs=1e-6)
            g = torch.tensor([0.25, 0.25])
            if mode == "mixture":
                units = [x[row, position] for x in (h, *states)]
                units = torch.cat([x / (x.square().mean() + 1e-6).sqrt() for x in units])
                g = 0.8 * (mixer.gate.weight @ units + mixer.gate.bias).softmax(0)[1:]
            expected = (1 - g.sum()) * p + g[0] * q[0] + g[1] * q[1]
            if mode == "geometric":
                some = (q[0] > 0) & (q[1] > 0)
                expected = some * p ** (1 - g.sum()) * q[0] ** g[0] * q[1] ** g[1]
                expected = expected / expected.sum()
            torch.testing.assert_close(found[row, position], expected, rtol=0, atol=1e-6)


def test_all_weight_on_donors_stays_finite():
    ids = some_ids()
    for mode in ("linear", "geometric"):
        with torch.no_grad():
            output = mixed(mode, weight=1)(ids, labels=ids)
        assert torch.isfinite(output.logits).all()
        assert torch.isfinite(output.loss)


def test_a_donor_that_has_read_nothing_changes_nothing(model):
    """Host ids that stand for nothing, first; then one that stands for something."""
    silent = [(model.tables[number].offsets.diff() == 0).nonzero().flatten().tolist() for number in range(2)]
    none = sorted(set(silent[0]) & set(silent[1]))[0]
    ids = torch.tensor([[none, none, int(some_ids()[0, 0])]])
    with torch.no_grad():
        found, host = model(ids).logits, model.host(ids).logits
    assert torch.equal(found[:, :2], host[:, :2])
    assert not torch.equal(found[:, 2], host[:, 2])


def test_only_the_positions_asked_for_are_mixed(model):
    ids = some_ids()
    with torch.no_grad():
        whole = model(ids).logits
        for kept, expected in ((1, whole[:, -1:]), (4, whole[:, -4:]), (torch.tensor([2, 5]), whole[:, [2, 5]])):
            torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected, rtol=0, atol=1.5e-5)


def test_the_loss_is_of_the_mixed_logits(model):
    ids = some_ids()
    labels = ids.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
        expected = torch.nn.functional.cross_entropy(output.logits[:, 2:-1].flatten(0, 1), ids[:, 3:].flatten())
        torch.testing.assert_close(output.loss, expected)
        assert abs(output.loss - model.host(ids, labels=labels).loss) > 1e-3
        assert list(output)[:2] == ["loss", "logits"]
        loss, logits, *_ = model(ids, labels=labels, return_dict=False)
        half = model(ids, labels=labels, num_items_in_batch=torch.tensor(2 * 42)).loss
    assert torch.equal(logits, output.logits)
    assert torch.equal(loss, output.loss)
    torch.testing.assert_close(half, loss / 2)


def test_heads_that_are_embeddings_are_stored_once(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert [name for name in stored if name.startswith("donor_heads")] == ["donor_heads.1.weight"]  # Gemma's is its embeddings
    assert loaded.donor_heads[0].weight is loaded.donors[0].embed_tokens.weight


def test_only_the_gate_and_its_size_get_gradients():
    model = mixed()
    model(some_ids(), labels=some_ids(), use_cache=False).loss.backward()
    got = {name for name, value in model.named_parameters() if value.grad is not None}
    assert got == {"fusers.0.gate.weight", "fusers.0.gate.bias", "fusers.0.scale"} == set(model.fuser_parameters())


def test_the_size_of_the_weights_is_held_and_let_go():
    """Gradient descent goes against the gradient: what would lead further outward is stopped, what leads back is not."""
    for value, sign, expected in (
        (-0.5, 1, 0),
        (-0.5, -1, -1),
        (0, 1, 0),
        (0, -1, -1),
        (1.5, -1, 0),
        (1.5, 1, 1),
        (0.5, -1, -1),
    ):
        s = torch.tensor([float(value)], requires_grad=True)
        found = held(s)
        assert found == min(max(value, 0), 1)
        (sign * found).backward()
        assert s.grad == expected


@pytest.mark.parametrize("scale", [-0.05, 0.0, 0.15])
def test_the_weights_stay_weights(scale):
    model, ids = mixed(trained=False), some_ids()
    with torch.no_grad():
        model.fusers[0].scale.fill_(scale)
    output = model(ids, labels=ids)
    assert torch.isfinite(output.logits).all()
    if scale <= 0:
        assert torch.equal(output.logits, model.host(ids).logits)


def test_controls_take_the_donors_words_away():
    model, ids = mixed(), some_ids()
    with torch.no_grad():
        plain, host = model(ids).logits, model.host(ids).logits
        model.control = "shuffle"
        shuffled = model(ids).logits
        model.control = "zero"
        assert torch.equal(model(ids).logits, host)
    assert (plain - shuffled).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("donors", [DONORS[:1], DONORS, FAMILIES], ids=len)
def test_the_budget_counts_what_there_is(mode, donors):
    model = mixed(mode, donors=donors)
    widths = [donor.config.hidden_size for donor in model.donors]
    count = sum(value.numel() for value in model.fusers.parameters())
    assert count == mixer_parameters(mode, model.host.config.hidden_size, widths)


def cycle(first, rows, length=12):
    """Rows [rows, length] that go round eight ids from `first` on, from anywhere."""
    return first + (torch.arange(rows)[:, None] * 3 + torch.arange(length)) % 8


def teach(model, ids, updates=60):
    """A causal model that knows how ids go on."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(updates):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return loss


def test_a_mixture_learns_which_donor_knows_better():
    """Host and donor each know one of two languages; the mixture gets to know who to ask, which fixed weights cannot."""
    torch.manual_seed(0)
    own, other = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**small_config(name, 2))) for name in ("llama3-8b", "phi3-mini")
    )
    assert teach(own, cycle(65, 8)) < 0.3
    assert teach(other, cycle(97, 8)) < 0.3
    donor = {"config": other.config.to_dict(), "taps": [2], "map_size": VOCABULARY}
    blocks, losses = torch.cat([cycle(65, 16), cycle(97, 16)]), {}
    for mode in MODES:
        model = FusionForCausalLM(FusionConfig(own.config, [donor], {"mode": mode}), own, [other.model]).eval()
        model.donor_heads[0].load_state_dict(other.lm_head.state_dict())
        model.tables[0].offsets.copy_(torch.arange(VOCABULARY + 1))
        for name in ("tokens", "begins"):
            getattr(model.tables[0], name).copy_(torch.arange(VOCABULARY))
        model.tables[0].lands.fill_(-1)
        if mode == "mixture":
            losses["host"] = held_out_loss(model, blocks, 8, Accelerator(cpu=True))
            recipe = Training(("x",), updates=60, block=12, batch=8, learning_rate=0.03)
            train(model, blocks, blocks[:0], recipe, accelerator=Accelerator(cpu=True))
        losses[mode] = held_out_loss(model, blocks, 8, Accelerator(cpu=True))
    assert losses["linear"] < losses["host"] / 2
    assert losses["mixture"] < 0.6 * min(losses["linear"], losses["geometric"])


@pytest.mark.parametrize(
    ("fusion", "said"),
    [
        ({"mode": "mixture", "rank": 8}, "'rank' does not apply to mode 'mixture', which has no settings; leave it out"),
        ({"mode": "linear", "sites": [2]}, "'sites' does not apply to mode 'linear', which has weight; leave it out"),
        ({"mode": "mixture", "weight": 0.5}, "'weight' does not apply to mode 'mixture'"),
        ({"mode": "gate", "weight": 0.5}, "'weight' does not apply to mode 'gate', which has sites, rank"),
        ({"mode": "linear", "weight": 1.5}, "weight is 1.5; expected a number from 0 to 1"),
        ({"mode": "geometric", "weight": True}, "weight is True; expected"),
        ({"mode": "mixtures"}, "no mode 'mixtures'; there are concat, .*, mixture, linear, geometric"),
    ],
)
def test_settings_that_do_not_apply_are_refused(fusion, said):
    config = mixed().config
    with pytest.raises(FusionError, match=said):
        FusionConfig(config.text_config, config.donors, fusion)
    donors = [config.donors[0] | {"taps": [1, 3]}]
    with pytest.raises(
        FusionError, match=r"donor 0: taps are \[1, 3\], but mode mixture reads its output alone; expected \[3\]"
    ):
        FusionConfig(config.text_config, donors, {"mode": "mixture"})


def recipe_of(mode="mixture", **changes):
    return replace(
        Recipe(Backbone(f"tiny:{HOST}"), tuple(Backbone(f"tiny:{name}") for name in DONORS), {"mode": mode}), **changes
    )


def parts_of(recipe, cache):
    return make_parts(recipe, [tiny_source(name, cache) for name in (HOST, *DONORS)])


def test_assembled_donors_have_all_layers_and_their_heads(tmp_path, tiny_cache):
    parts = parts_of(recipe_of(), tiny_cache)
    assert parts.taps == ((26,), (32,))
    found = fuse(parts, tmp_path / "out")
    model = load(tmp_path / "out")
    assert sum(value.numel() for value in model.parameters()) == found.parameters == parts.combination.parameters
    assert found.fuser_parameters == sum(value.numel() for value in model.fusers.parameters())
    assert {value.dtype for value in model.parameters()} == {torch.float32}  # the sources are in bfloat16
    tensors = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    for number, name in enumerate((HOST, *DONORS)):
        source = tiny_source(name, tiny_cache).checkpoint()
        for file in source.files:
            for name, value in load_file(source.folder / file.name).items():
                place = f"donors.{number - 1}.{name.removeprefix('model.')}" if number else f"host.{name}"
                place = f"donor_heads.{number - 1}.weight" if number and name == "lm_head.weight" else place
                assert torch.equal(tensors.pop(place), value)
    assert set(tensors) == {
        "fusers.0.scale", "fusers.0.gate.weight", "fusers.0.gate.bias",
        *(f"tables.{number}.{name}" for number in range(2) for name in ("offsets", "tokens", "begins", "lands")),
    }  # fmt: skip
    ids = torch.tensor([[256, *TEXT.encode()[:40]]])
    own = load(tiny_source(HOST, tiny_cache).folder)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, own(ids).logits)
        assert "- fusion: mixture of outputs" in (tmp_path / "out" / "README.md").read_text()
        model.fusers[0].scale.fill_(1 / PACE)
        model.fusers[0].gate.weight.zero_()
        found = model(ids).logits[0].softmax(-1)
        said = [load(tiny_source(name, tiny_cache).folder)(ids).logits[0].softmax(-1) for name in (HOST, *DONORS)]
    torch.testing.assert_close(found, sum(said) / 3, rtol=0, atol=1e-5)  # the twins have one tokenizer


def test_a_folder_is_trained_and_loads(tmp_path, tiny_cache):
    (tmp_path / "text.txt").write_text(TEXT)
    training = Training((str(tmp_path / "text.txt"),), updates=3, block=16, batch=2, learning_rate=0.01, evaluate_every=3)
    found = fuse(parts_of(recipe_of(training=training), tiny_cache), tmp_path / "out")
    assert found.held_out < found.held_out_before
    fuse(parts_of(recipe_of(), tiny_cache), tmp_path / "plain")
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert (path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()) == (path.name != FUSERS_FILE)
    model = load_fused(tmp_path / "out", "cpu")
    assert model.fusers[0].scale > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"donors": (Backbone("tiny:gemma2-2b", taps=(1.0,)), Backbone("tiny:phi3-mini"))},
            "tiny:gemma2-2b: 'taps' do not apply to mode 'mixture', which reads its output; leave them out",
        ),
        ({"fusion": {"mode": "mixture", "norm": "rms"}}, "'norm' does not apply to mode 'mixture'"),
        (
            {"fusion": {"mode": "linear"}, "training": Training(("x",))},
            "mode 'linear' has nothing to train; leave 'training' out",
        ),
        ({"budget": 61_860}, r"76 of them in fusers: 1 too many .* what fits: 1 more host layer fused away \(down to 15\)$"),
    ],
)
def test_what_cannot_be_fused_is_refused(tiny_cache, changes, said):
    with pytest.raises(FusionError, match=said) as caught:
        parts_of(recipe_of(**changes), tiny_cache)
    assert isinstance(caught.value, BudgetError) == ("budget" in changes)


def test_the_example_is_read():
    recipe = read_recipe(CONFIGS / "fusion" / "tiny-mixture.yaml")
    assert recipe.fusion == {"mode": "mixture"}
    assert [one.taps for one in recipe.donors] == [(), ()]


def test_the_budget_script_keeps_donors_whole(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "plan_budget.py"), "--mode", "mixture", "--donor", "gemma2-2b"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in said.splitlines()]
    assert "llama3-8b 19/32 13 gemma2-2b 26/26 26 7,809,147,136 190,852,864 12,803 -".split() in rows
    assert "mixture of the outputs of host and donors" in said
