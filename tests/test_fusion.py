"""Every fused model: its host before training, causal, in pieces as at once, and to transformers a model like any other.

What holds for all modes and all alignments of tokens is asked of all; test_mixture.py has what only mixed outputs have.
"""

import copy
import itertools
import json
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import infer_auto_device_map
from fused import FAMILIES, HOST_TOKENIZER, MODES, PAD, elsewhere, fused, loaded_elsewhere, random_map, some_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import small
from transformers import AutoModelForCausalLM, DynamicCache

from merge.fusion import FusionConfig
from merge.fusion.budget import fuser_parameters
from merge.fusion.errors import FusionError
from merge.fusion.fusers import MODES as FUSERS
from merge.fusion.fusers import NORMS, Features, TapMemory
from merge.fusion.streams import ALIGNMENTS, FusionCache, expand

GENERATION = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}


@pytest.fixture(scope="module", params=[*itertools.product(MODES, ALIGNMENTS)], ids="-".join)
def model(request):
    """A model with fusers that do something, of every kind."""
    mode, alignment = request.param
    return fused(mode, alignment=alignment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_without_training_or_weight_it_is_its_host(mode, dtype):
    for number, host in enumerate(FAMILIES):
        others = [name for name in FAMILIES if name != host]
        settings = {"norm": NORMS[number % 3], "dropout": 0.5 * (number % 2)} if mode in FUSERS else {"weight": 0.0}
        settings = {} if mode == "mixture" else settings
        alignment = list(ALIGNMENTS)[number % 2]
        model = fused(mode, host, others, trained=False, dtype=dtype, alignment=alignment, **settings)
        model.train(bool(number // 2))
        ids = some_ids()
        with torch.no_grad():
            found, expected = (one(ids, labels=ids, use_cache=False) for one in (model, model.host))
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)


def test_fusion_does_something(model):
    with torch.no_grad():
        ids = some_ids()
        assert (model(ids).logits - model.host(ids).logits).abs().max() > 0.01


def test_nothing_of_the_future_is_seen(model):
    ids, changed = some_ids(), some_ids()
    changed[:, 9:] = some_ids(seed=2)[:, 9:]
    with torch.no_grad():
        one, two = (model(x, use_cache=False).logits for x in (ids, changed))
    difference = (one[:, :9] - two[:, :9]).abs().max()
    donor = model.config.donors[0]
    sums = model.config.fusion["mode"] == "cross" or donor["alignment"] == "prefix"  # other sizes, other order of sums
    assert difference <= (2e-6 if sums else 0.0)
    assert (one[:, 9:] - two[:, 9:]).abs().max() > 0.1


@pytest.mark.parametrize("pieces", [[1] * 17, [5, 1, 7, 4], [16, 1]], ids=str)
def test_pieces_with_a_cache_are_the_whole(model, pieces):
    ids, cache, found = some_ids(), None, []
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for piece in ids.split(pieces, 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    assert isinstance(cache, FusionCache)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1.5e-5)


def test_a_row_does_not_depend_on_its_batch(model):
    """Left padding, as generation has it; windows of attention are shorter than the texts here."""
    ids = some_ids()
    padded = torch.cat([torch.full((1, 5), PAD), ids[:1, :12]], 1)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    batch = torch.cat([padded, ids[1:]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, 5:]
        alone = model(ids[:1, :12], use_cache=False).logits[0]
        torch.testing.assert_close(together, alone, rtol=0, atol=1.5e-5)
        for beams in (1, 3):
            found = [
                model.generate(batch, attention_mask=mask, num_beams=beams, use_cache=cached, **GENERATION)
                for cached in (True, False)
            ]
            assert torch.equal(*found)
            assert torch.equal(found[0][0, 17:], model.generate(ids[:1, :12], num_beams=beams, **GENERATION)[0, 12:])
        # right padding without a mask, as lm-eval sends it
        right = torch.cat([ids[:1, :12], torch.full((1, 5), PAD)], 1)
        torch.testing.assert_close(model(torch.cat([right, ids[1:]])).logits[0, :12], alone, rtol=0, atol=1.5e-5)


def test_several_samples_of_one_prompt_share_a_cache(model):
    with torch.no_grad():
        many = model.generate(some_ids(1), num_return_sequences=3, num_beams=3, **GENERATION)
        cache = model(some_ids(2), use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        after = model(some_ids(1, 1), past_key_values=cache).logits
        alone = model(torch.cat([some_ids(2)[1:], some_ids(1, 1)], 1), use_cache=False).logits[:, -1:]
    assert many.shape == (3, 23)
    torch.testing.assert_close(after, alone, rtol=0, atol=1.5e-5)
    cache.reset()
    with torch.no_grad():
        again = model(some_ids(2), past_key_values=cache).logits
        torch.testing.assert_close(again, model(some_ids(2), use_cache=False).logits, rtol=0, atol=1.5e-5)


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids, copied = some_ids(), pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        for one in (loaded, copied):
            assert torch.equal(one(ids).logits, model(ids).logits)
    assert loaded.config.fusion == model.config.fusion
    for name in ("taps", "alignment", "map_size"):
        assert [one[name] for one in loaded.config.donors] == [one[name] for one in model.config.donors]
    for one in (model, loaded):
        trained = {name for name, value in one.named_parameters() if value.requires_grad}
        assert trained == set(one.fuser_parameters())


def test_only_fusers_get_gradients(model):
    if not model.fuser_parameters():
        assert not any(value.requires_grad for value in model.parameters())
        return
    model(some_ids(), labels=some_ids(), use_cache=False).loss.backward()
    for name, value in model.named_parameters():
        assert (value.grad is not None) == name.startswith("fusers."), name
    model.zero_grad()


def test_all_four_families_are_hosts_and_donors():
    for host in FAMILIES:
        model = fused("cross", host, [name for name in FAMILIES if name != host])
        ids = some_ids(2, 9)
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            first = model(ids[:, :4], use_cache=True)
            rest = model(ids[:, 4:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=0, atol=1.5e-5)


@given(seed=st.integers(0, 1000), rows=st.integers(1, 4), length=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_expansion_is_the_map_written_out(seed, rows, length):
    offsets, tokens = random_map(seed, 12)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (rows, length), generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.8
    found = expand(ids, mask.long(), offsets, tokens)
    for row in range(rows):
        expected, ends = [], []
        for index, there in zip(ids[row].tolist(), mask[row].tolist(), strict=True):
            expected += tokens[offsets[index] : offsets[index + 1]].tolist() if there else []
            ends.append(len(expected))
        assert found.ids[row][found.valid[row]].tolist() == expected
        assert found.ends[row].tolist() == ends
        assert found.valid[row].tolist() == sorted(found.valid[row].tolist(), reverse=True)


def test_features_are_the_donors_states_at_the_last_token_that_ended():
    model = fused()
    ids = some_ids(2, 9)
    aligned = model.features(ids).aligned
    for row in range(2):
        for number, donor in enumerate(model.donors):
            offsets, tokens = model.tables[number].offsets, model.tables[number].tokens
            read = []
            for position, index in enumerate(ids[row].tolist()):
                read += tokens[offsets[index] : offsets[index + 1]].tolist()
                with torch.no_grad():  # every prefix from scratch
                    states = donor(torch.tensor([read]), output_hidden_states=True).hidden_states if read else None
                expected = states[1][0, -1] if read else torch.zeros(donor.config.hidden_size)
                torch.testing.assert_close(aligned[2 * number][row, position], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", FUSERS)
def test_fusers_have_the_parameters_that_the_budget_counts(mode, norm):
    fuser = FUSERS[mode](1, 24, [8, 12, 20], 16, 4, norm, 0.0)
    assert sum(value.numel() for value in fuser.parameters()) == fuser_parameters(mode, 24, [8, 12, 20], 16, 4, norm)


def test_attention_over_taps_and_tokens_is_the_formula():
    """Both attentions against sums written out, for one query."""
    torch.manual_seed(0)
    widths, h = [6, 10], torch.randn(1, 1, 8)
    states = [torch.randn(1, 3, width) for width in widths]
    for mode, seen in (("attention", 1), ("cross", 3)):
        fuser = FUSERS[mode](0, 8, widths, 4, 2, "rms", 0.0)
        with torch.no_grad():
            for value in fuser.parameters():
                value.add_(torch.randn_like(value))
            tokens = torch.arange(3)[None]
            memories = [TapMemory(x, tokens, tokens >= 0, torch.tensor([[2]])) for x in states]
            features = Features([x[:, 2:] for x in states], memories)
            q = fuser.query(fuser.host_norm(h))[0, 0]
            mixed = torch.zeros(4)
            for head in range(2):
                part = slice(2 * head, 2 * head + 2)
                scores = [q[part] @ fuser.none[part] / 2**0.5 if mode == "attention" else torch.zeros(())]
                values = [torch.zeros(2)]
                for norm, to_key, to_value, x in zip(fuser.norms, fuser.keys, fuser.values, states, strict=True):
                    for slot in range(3 - seen, 3):
                        token = norm(x[0, slot])
                        near = fuser.slopes[head] * (2 - slot) if mode == "cross" else 0.0
                        scores.append(q[part] @ to_key(token)[part] / 2**0.5 - near)
                        values.append(to_value(token)[part])
                mixed[part] = torch.stack(scores).softmax(0) @ torch.stack(values)
            torch.testing.assert_close(fuser(h, features)[0, 0], fuser.out(mixed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_controls_take_the_donors_words_away(alignment):
    model, ids = fused("cross", alignment=alignment), some_ids()
    with torch.no_grad():
        plain, aligned = model(ids).logits, model.features(ids).aligned
        model.control = "shuffle"
        for own, found in zip(aligned, model.features(ids).aligned, strict=True):
            assert torch.equal(found, own[[2, 0, 1]])  # another row's
        shuffled = model(ids).logits
        model.control = "zero"
        assert all(not x.any() for x in model.features(ids).aligned)
        zeroed = model(ids).logits
        model.control = "nothing"
        with pytest.raises(FusionError, match="no control 'nothing'; there are zero, shuffle"):
            model(ids)
    assert (plain - shuffled).abs().max() > 0.01
    assert (plain - zeroed).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fusion": {"mode": "concatenate"}}, "no mode 'concatenate'; there are concat, weighted"),
        ({"fusion": {"norm": "batch"}}, "no norm 'batch'; there are rms"),
        ({"fusion": {"sites": [5]}}, "site 5 is outside the model; expected 1 to 4"),
        ({"fusion": {"sites": [2, 2]}}, "expected different numbers in rising order"),
        ({"fusion": {"rank": 6, "heads": 4}}, "4 heads do not divide a rank of 6"),
        ({"fusion": {"dropout": 1.0}}, "dropout is 1.0; expected"),
        ({"fusion": {"ranks": 4}}, "fusion has no 'ranks'"),
        ({"alignment": "text"}, "donor 0: there is no alignment 'text'; there are map, prefix"),
        ({"taps": [4]}, "donor 0: tap 4 is outside the model; expected 1 to 3"),
        ({"taps": [2]}, "donor 0 has 3 layers, but none above its last tap 2 is of use"),
    ],
)
def test_what_cannot_be_is_refused(change, said):
    config = fused().config
    donor = config.donors[0] | {name: change[name] for name in ("taps", "alignment") if name in change}
    with pytest.raises(FusionError, match=said):
        FusionConfig(text_config=config.text_config, donors=[donor], fusion=change.get("fusion", {}))


def test_what_cannot_be_run_is_refused():
    model, ids = fused(), some_ids()
    with pytest.raises(FusionError, match="reads input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 8))
    with pytest.raises(FusionError, match="expected a FusionCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(FusionError, match=r"attention_mask has shape \(3, 1, 17, 17\)"):
        model(ids, attention_mask=torch.ones(3, 1, 17, 17))
    with pytest.raises(FusionError, match="cannot be cropped"):
        model(ids).past_key_values.crop(-1)
    with pytest.raises(FusionError, match="cache_implementation is 'static'"):
        model.generate(ids, cache_implementation="static", **GENERATION)


@pytest.mark.parametrize(("mode", "alignment"), [("attention", "map"), ("mixture", "prefix")])
def test_a_saved_folder_loads_without_this_package(tmp_path, mode, alignment):
    model, ids = fused(mode, alignment=alignment), some_ids(1, 5)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model(ids).logits[0, -1]
    loaded_elsewhere(tmp_path / "saved", ids, expected)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("mode", ["attention", "cross", "mixture"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_what_has_no_room_is_brought_from_the_disk(tmp_path, mode, alignment, share):
    """As accelerate spreads a model by itself."""
    model, ids = fused(mode, alignment=alignment), some_ids(2, 9)
    model.save_pretrained(tmp_path / "saved")
    room = {"cpu": int(share * sum(value.nbytes for value in model.parameters())), "disk": 10**9}
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=spread(model, room), offload_folder=tmp_path / "offload"
    )
    assert "meta" in {value.device.type for value in found.parameters()}
    with torch.no_grad():
        assert torch.equal(found.eval()(ids).logits, model(ids).logits)
        assert torch.equal(found.generate(ids, **GENERATION), model.generate(ids, **GENERATION))


def spread(model, room, **options):
    """Where accelerate puts the parts."""
    return infer_auto_device_map(model, room, **{"no_split_module_classes": model._no_split_modules} | options)


def test_no_layer_is_put_on_two_devices():
    model, cut = fused(), 0
    sizes = [sum(value.nbytes for value in part.parameters()) for part in (model.host, model.donors)]

    def halves(places):
        return [name for name in places if ".layers." in name and name.split(".layers.")[1].count(".")]

    for more in range(0, sizes[1], 2_000):
        room = {"cpu": sizes[0] + more, "disk": 10**9}
        assert not halves(spread(model, room))
        cut += any(name.startswith("donors") for name in halves(spread(model, room, no_split_module_classes=[])))
    assert cut  # without being told it would


def test_lm_eval_as_it_is_scores_it(tmp_path):
    """Its own command, without this package: the log-likelihoods are the model's."""
    model = fused("gate", alignment="prefix")
    model.save_pretrained(tmp_path / "saved")  # with the host's tokenizer
    (tmp_path / "tasks").mkdir()
    rows = [{"q": "The river", "a": " rose"}, {"q": "It is", "a": " unbelievable"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "rivers.yaml").write_text(
        f"task: rivers\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'rows.jsonl'}}}\ntest_split: train\n"
        "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list: [{metric: acc}]\n"
    )
    command = [
        *(
            sys.executable,
            "-m",
            "lm_eval",
            "run",
            "--model",
            "hf",
            "--tasks",
            "rivers",
            "--include_path",
            str(tmp_path / "tasks"),
        ),
        *("--model_args", f"pretrained={tmp_path / 'saved'},trust_remote_code=True,dtype=float32", "--device", "cpu"),
        *("--batch_size", "2", "--log_samples", "--output_path", str(tmp_path / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=elsewhere(tmp_path), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        found[sample["doc"]["a"]] = float(sample["filtered_resps"][0][0])
    tokenizer = small(HOST_TOKENIZER)
    for row in rows:
        whole, context = (tokenizer(text)["input_ids"] for text in (row["q"] + row["a"], row["q"]))
        with torch.no_grad():
            said = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected = sum(float(said[at - 1, whole[at]]) for at in range(len(context), len(whole)))
        assert found[row["a"]] == pytest.approx(expected, abs=1e-3)
