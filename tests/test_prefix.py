"""The donor's own tokens of every prefix: what is kept up step by step is what reading from the beginning gives."""

import codecs
import functools
import itertools
import re

import pytest
import torch
from fused import FAMILIES, HOST_TOKENIZER, fused, small_config, some_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from test_byte_tables import ANY_TEXT, named
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers_for_tests import BYTES, CODE, LLAMA3_SPLIT, PROSE, SMALL, STRESS, byte_level, sentencepiece
from tokenizers_for_tests import sentencepiece_around, small, trained
from transformers import AutoConfig, AutoModel, DynamicCache

from merge.fusion.byte_tables import ByteTable, text_encoder
from merge.fusion.errors import FusionError
from merge.fusion.prefix import PrefixTokens, Retokenizer, expand_rows, find_cuts

PAIRS = [*itertools.permutations(SMALL, 2), ("llama2", "llama2"), ("gpt2", "gpt2")]
REAL_PAIRS = [("Llama-3", "Mistral"), ("Mistral", "Llama-3")]
UNSPACED = "河水在夜里上涨了、田野都在水下。没有人相信预报。🌊🌊🙂川の水は夜のうちに増えた。"
TEXTS = (PROSE[:250], PROSE[-160:], CODE, UNSPACED, *STRESS)
PUTS_ANOTHER = {"llama2", "Mistral"}  # a space also in front of a text that begins with one
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O_SPLIT = re.sub(r"([+*])\|", r"\1(?i:'s|'t|'re|'ve|'m|'ll|'d)?|", TEKKEN_SPLIT, count=2).replace("N}|", "N}{1,3}|")


@functools.cache
def rules_of(host, donor):
    """From one named tokenizer to another."""
    (_, host, _), (tokenizer, donor, _) = named(host), named(donor)
    return Retokenizer(host, donor, tokenizer)


def canonical(host, donor, ids):
    """The definition: every segment's text as a whole, through the donor's encoder."""
    _, host, _ = named(host)
    found, data = [], b""
    for index in ids:
        if index in host.control:
            found += of_segment(donor, host, data, True)
            found += control_row(host, named(donor)[1], index)
            data = b""
        else:
            data += host.content[index]
    return found + of_segment(donor, host, data, False)


def of_segment(donor, host, data, closed):
    name, (_, table, encode) = donor, named(donor)
    data = data.removeprefix(b" ") if host.leading_space else data
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(data, closed)
    if text and table.leading_space and (name in PUTS_ANOTHER or text[0] != " "):
        text = " " + text
    found = []
    for part in re.split("([\udc80-\udcff])", text):
        stray = bool(re.match("[\udc80-\udcff]", part))
        found += table.longest_match(part.encode(errors="surrogateescape")) if stray else encode([part])[0]
    return found


def control_row(host, donor, index):
    for role in ("bos", "eos"):
        if index == host.roles[role]:
            return [donor.roles[role]] if donor.roles[role] is not None else []
    return []


def follow(steps):
    """The live ids after every step; checks slots and positions on the way."""
    live, slots = [], 0
    for step in steps:
        depth = len(live) - len(step.dead)
        assert tuple(slot for slot, _ in live[depth:]) == step.dead  # only the last ones die
        assert step.positions == range(depth, depth + len(step.ids))
        live[depth:] = enumerate(step.ids, slots)
        slots += len(step.ids)
        assert step.last == (live[-1][0] if live else -1)
        yield [index for _, index in live]


def host_ids(name, text):
    """A text between the control tokens that the host has."""
    tokenizer, table, _ = named(name)
    ends = [[index] if index is not None else [] for index in (table.roles["bos"], table.roles["eos"])]
    return [*ends[0], *tokenizer(text)["input_ids"], *ends[1]]


@pytest.mark.parametrize(("host", "donor"), PAIRS)
def test_every_step_is_the_encoding_of_the_prefix(host, donor):
    for text in TEXTS:
        ids = host_ids(host, text)
        for count, live in enumerate(follow(PrefixTokens(rules_of(host, donor)).push(ids)), 1):
            assert live == canonical(host, donor, ids[:count])


@pytest.mark.parametrize(("host", "donor"), REAL_PAIRS)
def test_steps_of_real_tokenizers(host, donor):
    """Most steps only add; what dies is the end of a word."""
    dead, new = [], 0
    for text in TEXTS:
        ids = host_ids(host, text)
        steps = PrefixTokens(rules_of(host, donor)).push(ids)
        for count, live in enumerate(follow(steps), 1):
            if count % 10 == 0 or count == len(ids):
                assert live == canonical(host, donor, ids[:count])
        dead += [len(step.dead) for step in steps]
        new += sum(len(step.ids) for step in steps)
    assert max(dead) <= 4
    assert sum(dead) < (0.02 if host == "Llama-3" else 0.3) * new


@pytest.mark.parametrize(("host", "donor"), [*itertools.permutations(["gpt2", "roberta", "llama2", "gemma"], 2), *REAL_PAIRS])
def test_the_end_is_what_the_donors_tokenizer_says_of_the_text(host, donor):
    """Spaces that tokenizers put in front of a text are neither lost nor counted twice."""
    tokenizer, *_ = named(host)
    donor_tokenizer, *_ = named(donor)
    for text in (text for text in (PROSE, CODE, *STRESS) if "▁" not in text):
        if host == "roberta" and text.startswith(" "):  # it gives the same ids with one space less
            continue
        *_, live = [[], *follow(PrefixTokens(rules_of(host, donor)).push(named_text(tokenizer, text)))]
        assert live == donor_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def named_text(tokenizer, text):
    """Ids without control tokens, whatever the text names."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize(("host", "donor"), [("gpt2", "llama2"), ("llama2", "llama3")])
def test_in_pieces_as_at_once(host, donor):
    ids = host_ids(host, PROSE)
    whole = PrefixTokens(rules_of(host, donor)).push(ids)
    for size in (1, 3, 50):
        row = PrefixTokens(rules_of(host, donor))
        assert [step for at in range(0, len(ids), size) for step in row.push(ids[at : at + size])] == whole


@pytest.mark.parametrize(("host", "donor"), [("gpt2", "llama2"), ("llama2", "llama3")])
def test_copies_go_on_by_themselves(host, donor):
    ids, other = host_ids(host, PROSE), host_ids(host, UNSPACED)
    whole = PrefixTokens(rules_of(host, donor)).push(ids)
    row = PrefixTokens(rules_of(host, donor))
    for at, expected in enumerate(whole):
        copies = [row.copy(), row.copy()]
        found = copies[0].push(other[: at % 7])
        assert row.push(ids[at : at + 1]) == [expected]
        assert copies[1].push(other[: at % 7]) == found


@settings(max_examples=100)
@given(
    pair=st.sampled_from([("gpt2", "llama2"), ("llama2", "gpt2"), ("llama3", "gemma"), ("gemma", "roberta")]), data=st.data()
)
def test_any_ids(pair, data):
    """Also half characters, and control tokens in the middle of them."""
    host, donor = pair
    ids = data.draw(st.lists(st.integers(0, len(named(host)[1]) - 1), max_size=30))
    for count, live in enumerate(follow(PrefixTokens(rules_of(host, donor)).push(ids)), 1):
        assert live == canonical(host, donor, ids[:count])


OTHERS = {
    "tekken": functools.partial(byte_level, split=TEKKEN_SPLIT),
    "gpt4o": functools.partial(byte_level, "the river's field's water's flood's " * 20 + PROSE, split=GPT4O_SPLIT),
    "smollm": lambda: with_pre_tokenizers(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "added": lambda: with_added("<a tool>", "e.", "."),
}
WORDS = st.lists(
    st.sampled_from([*"aZ1é你़ \n\t.'s,(/<>。\u00a0🙂", "'s", "river", " the", " river's", "<table>", "<a tool>", "e.", "  "])
)


def with_pre_tokenizers(*steps):
    tokenizer = byte_level(PROSE + CODE)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return tokenizer


def with_added(*tokens, **options):
    tokenizer = byte_level(PROSE + CODE)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False, **options) for token in tokens])
    return tokenizer


@functools.cache
def encoder_and_cuts(name):
    tokenizer, table, encode = named(name) if name not in OTHERS else (OTHERS[name](), None, None)
    table = table or ByteTable.from_tokenizer(tokenizer)
    return encode or text_encoder(tokenizer, table), find_cuts(tokenizer, table)


@pytest.mark.parametrize("name", [*SMALL, *OTHERS, "Llama-3", "Mistral"])
@settings(max_examples=100)
@given(text=st.one_of(ANY_TEXT, WORDS.map("".join), st.integers(0, 600).map(lambda at: (PROSE + CODE)[at : at + 40])))
def test_a_cut_is_one_whatever_is_around_it(name, text):
    encode, cut = encoder_and_cuts(name)
    (whole,) = encode([text])
    for at in range(1, len(text)):
        if cut(text[at - 1 : at + 1]):
            before, after = encode([text[:at], text[at:]])
            assert before + after == whole


@pytest.mark.parametrize("name", [*SMALL, *OTHERS, "Llama-3", "Mistral"])
def test_there_are_cuts_where_words_begin(name):
    """So that what is read again stays short, also without spaces."""
    _, cut = encoder_and_cuts(name)
    assert cut("r ")
    assert cut("。 ")
    assert not cut("er")
    assert cut("了、")


def without_cuts():
    """Tokenizers of whose steps or tokens nothing is known, or too little."""
    unknown = byte_level(split=LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"(?<=e) r|\p{N}"))
    gaps = byte_level(split=r"\p{L}+")
    single = with_added("foo", single_word=True)
    normalizing = byte_level()
    normalizing.backend_tokenizer.normalizer = normalizers.ByteLevel()
    normalizing.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    pieces = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, *trained(PROSE, 160)])}
    whole = sentencepiece_around(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    by_script = sentencepiece()
    by_script.backend_tokenizer.pre_tokenizer = pre_tokenizers.UnicodeScripts()
    return {"unknown": unknown, "gaps": gaps, "single word": single, "whole": whole, "scripts": by_script, "n": normalizing}


@pytest.mark.parametrize("name", without_cuts())
def test_without_cuts_everything_is_read_again(name):
    tokenizer = without_cuts()[name]
    host, table = named("gpt2")[1], ByteTable.from_tokenizer(tokenizer)
    rules, encode = Retokenizer(host, table, tokenizer), text_encoder(tokenizer, table)
    assert not any(rules.cut(pair) for pair in ("r ", "a.", "了、"))
    for text in ("The river foo rose 12 in.", PROSE[:120]):
        ids = named_text(named("gpt2")[0], text)
        for count, live in enumerate(follow(PrefixTokens(rules).push(ids)), 1):
            read = host.join(ids[:count]).decode(errors="ignore")
            assert live == encode([" " + read if read and table.leading_space else read])[0]


def characters(*roles):
    """A host with an id for each of some bytes, and control tokens behind them."""
    content = (b"a", b"b", b"c", b" ", b"\xc3", b"\xa9", b"\xff", b"", b"", b"")
    return ByteTable(content, frozenset({7, 8}), dict(zip(("bos", "eos", "pad"), (*roles, None, None, None), strict=False)))


def merging(*pieces, merges=(), dummy=False, specials=("<unk>", "<s>", "</s>")):
    vocabulary = {piece: index for index, piece in enumerate([*specials, *BYTES, *pieces])}
    model = models.BPE(vocabulary, list(merges), unk_token="<unk>", byte_fallback=True)
    return sentencepiece_around(model, dummy=dummy, specials=specials)


def by_hand(ids, *, dummy=False, host=None, control=None):
    """Steps as (pieces, first position, dead slots, last slot)."""
    merges = [("a", "b"), ("ab", "c"), ("▁", "a")]
    tokenizer = merging("a", "b", "c", "▁", "é", "ab", "abc", "▁a", merges=merges, dummy=dummy)
    table = ByteTable.from_tokenizer(tokenizer)
    rules = Retokenizer(host or characters(7, 8), table, tokenizer, control=control)
    steps = PrefixTokens(rules).push(ids)
    pieces = [tokenizer.convert_ids_to_tokens(step.ids) for step in steps]
    return [(found, step.positions.start, step.dead, step.last) for found, step in zip(pieces, steps, strict=True)]


def test_by_hand():
    """A word grows, a character waits for its second half, a new segment begins with bos."""
    assert by_hand([0, 1, 2, 3, 4, 5, 7, 0, 1]) == [
        (["a"], 0, (), 0),
        (["ab"], 0, (0,), 1),
        (["abc"], 0, (1,), 2),
        (["▁"], 1, (), 3),
        ([], 0, (), 3),
        (["é"], 2, (), 4),
        (["<s>"], 3, (), 5),
        (["a"], 4, (), 6),
        (["ab"], 4, (6,), 7),
    ]


def test_bytes_that_are_no_character():
    """They stand between texts, so that nothing merges across, and what never became a character is not forgotten."""
    found = [pieces for pieces, *_ in by_hand([0, 6, 1, 2, 4, 0, 4, 8])]
    assert found == [["a"], ["<0xFF>"], ["b"], ["c"], [], ["<0xC3>", "a"], [], ["<0xC3>", "</s>"]]


def test_a_space_in_front():
    """Of each segment; ids that no token has say nothing."""
    assert [pieces for pieces, *_ in by_hand([7, 9, 0, 1, 8, 4, 5], dummy=True)] == [
        ["<s>"], [], ["▁a"], ["▁", "ab"], ["</s>"], [], ["▁", "é"]
    ]  # fmt: skip
    spaced = ByteTable(characters().content, frozenset({7, 8}), characters(7, 8).roles, leading_space=True)
    assert [pieces for pieces, *_ in by_hand([3, 0, 3, 8, 3, 3, 0], host=spaced)] == [
        [], ["a"], ["▁"], ["</s>"], [], ["▁"], ["▁a"]
    ]  # fmt: skip
    assert [pieces for pieces, *_ in by_hand([3, 0], host=spaced, dummy=True)] == [[], ["▁a"]]


def test_control_tokens_go_where_the_user_says():
    assert [pieces for pieces, *_ in by_hand([7, 0, 8], control={7: [], 8: [2, 1]})] == [[], ["a"], ["</s>", "<s>"]]
    with pytest.raises(FusionError, match="names host id 0; expected ids of control tokens"):
        by_hand([], control={0: [1]})


def test_bytes_that_the_donor_lacks_are_left_out():
    """And the text around them is read as the donor reads text."""
    tokenizer = byte_level("abc abc", alphabet=False, size=20)
    table = ByteTable.from_tokenizer(tokenizer)
    *_, live = follow(PrefixTokens(Retokenizer(characters(7, 8), table, tokenizer)).push([0, 1, 6, 3, 4, 5, 0, 1, 2]))
    assert live == text_encoder(tokenizer, table)(["ab abc"])[0]


BATCH = [("gpt2", "llama2"), ("llama2", "llama3"), ("gemma", "gpt2"), ("llama3", "gemma")]


def batch_of(host, length=40):
    """Host ids [3, T] and their mask: padding on the left, emoji and a control token in the middle."""
    rows = [host_ids(host, text) for text in ("x[1]: unbelievable rivers, " + UNSPACED, "👍🏽 2.\nIt rose." + PROSE, CODE)]
    rows[1] = rows[1][-3:] + rows[1]
    rows = [[0] * 7 + rows[0][: length - 7], rows[1][:length], rows[2][:length]]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask


def read_by(ids, mask):
    """The ids of every row that are no padding."""
    return [row[there[: len(row)].bool()].tolist() for row, there in zip(ids, mask, strict=True)]


@pytest.mark.parametrize(("host", "donor"), BATCH)
@pytest.mark.parametrize("pieces", [[40], [1] * 40, [13, 1, 20, 6]], ids=str)
def test_what_is_alive_is_the_encoding_of_the_prefix(host, donor, pieces):
    ids, mask = batch_of(host)
    rows, nodes, read, at = [PrefixTokens(rules_of(host, donor)) for _ in ids], None, torch.zeros(3, 0, dtype=torch.long), 0
    for size in pieces:
        nodes = expand_rows(rows, ids[:, at : at + size], mask[:, at : at + size], nodes)
        read = torch.cat([read, nodes.ids], 1)
        assert nodes.valid.shape == nodes.ids.shape
        assert nodes.steps == at + size
        alive, visible = nodes.alive(), nodes.visible()
        for row, step in itertools.product(range(3), range(size)):
            seen = read_by(ids[:, : at + step + 1], mask)[row]
            assert read[row][alive[row, step]].tolist() == canonical(host, donor, seen)
            last = int(nodes.last[row, step])
            assert int(nodes.ends[row, step]) == max(0, last - nodes.before + 1)
            assert nodes.positions[row][alive[row, step]].tolist() == list(range(int(alive[row, step].sum())))
            if last >= nodes.before:
                assert torch.equal(visible[row, last - nodes.before], alive[row, step])
            elif last < 0:
                assert not alive[row, step].any()
        at += size


def test_nothing_of_the_future_is_seen():
    """Later tokens change nothing of the earlier ones, but for the step with which some die."""
    ids, mask = batch_of("llama2")
    changed = ids.clone()
    changed[:, 20:] = ids[:, 20:].flip(1)
    rules = rules_of("llama2", "llama3")
    one, two = (expand_rows([PrefixTokens(rules) for _ in ids], x, mask) for x in (ids, changed))
    assert torch.equal(one.last[:, :20], two.last[:, :20])
    assert not torch.equal(one.last, two.last)
    for row in range(3):
        before = [int((nodes.birth[row][nodes.valid[row]] < 20).sum()) for nodes in (one, two)]
        assert before[0] == before[1]
        past = slice(before[0])
        for name in ("ids", "positions", "birth"):
            assert torch.equal(getattr(one, name)[row, past], getattr(two, name)[row, past])
        assert torch.equal(one.death[row, past].clamp(max=20), two.death[row, past].clamp(max=20))
        assert torch.equal(one.visible()[row, past, past], two.visible()[row, past, past])
        assert not one.visible()[row, past, past.stop :].any()


@functools.cache
def small_donor(family):
    """Three layers with states of ordinary size, and room for every small tokenizer's ids."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(**small_config(family, 3) | {"vocab_size": 512}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(std=value.shape[-1] ** -0.5 if "embed" not in name else 1.0)
    return model.eval()


def masks_of(nodes, config):
    """As a donor takes them: added to the scores, one for each kind of layer where there are several."""

    def added(seen):
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]

    near = added(nodes.visible(getattr(config, "sliding_window", None)))
    if getattr(config, "layer_types", None) is None:
        return near
    return {"full_attention": added(nodes.visible()), "sliding_attention": near}


def read_nodes(donor, nodes, cache=None):
    """The states [B, N, D] of a call's tokens."""
    if not nodes.ids.shape[1]:
        return torch.zeros(*nodes.ids.shape, donor.config.hidden_size)
    with torch.no_grad():
        return donor(
            input_ids=nodes.ids,
            attention_mask=masks_of(nodes, donor.config),
            position_ids=nodes.positions[:, nodes.before :],
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


def from_scratch(donor, several, layer=-1):
    """The states [., D], at that number of layers, after sequences that the donor reads by themselves; zero of none."""
    width = max(map(len, several))
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in several])
    with torch.no_grad():
        # causal: padding behind the tokens is not seen
        states = donor(ids, use_cache=False, output_hidden_states=True).hidden_states[layer]
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    return states[torch.arange(len(several)), torch.tensor([len(tokens) for tokens in several])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pair", [("gpt2", "llama2"), ("llama2", "llama3")], ids=str)
def test_one_pass_over_all_tokens_is_every_prefix_from_scratch(family, pair):
    ids, mask = batch_of(pair[0])
    nodes = expand_rows([PrefixTokens(rules_of(*pair)) for _ in ids], ids, mask)
    assert (nodes.death < nodes.steps)[nodes.valid].any()  # some die
    assert not nodes.even
    donor = small_donor(family)
    states = torch.cat([torch.zeros(3, 1, donor.config.hidden_size), read_nodes(donor, nodes)], 1)
    prefixes = [canonical(*pair, read) for end in range(1, ids.shape[1] + 1) for read in read_by(ids[:, :end], mask)]
    found = torch.stack([states[torch.arange(3), ends] for ends in nodes.ends.T])
    torch.testing.assert_close(found.flatten(0, 1), from_scratch(donor, prefixes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cache_whose_rows_change_places(family):
    """As beams do, each of which goes on by itself."""
    pair = ("llama2", "llama3")
    ids, mask = batch_of(pair[0])
    donor, cache = small_donor(family), DynamicCache()
    rows, nodes = [PrefixTokens(rules_of(*pair)) for _ in ids], None
    last = torch.zeros(3, donor.config.hidden_size)
    for at, size in ((0, 15), (15, 1), (16, 1), (17, 6), (23, 1)):
        nodes = expand_rows(rows, ids[:, at : at + size], mask[:, at : at + size], nodes)
        states = torch.cat([last[:, None], read_nodes(donor, nodes, cache)], 1)
        last = states[torch.arange(3), nodes.ends[:, -1]]
        prefixes = [canonical(*pair, read) for read in read_by(ids[:, : at + size], mask)]
        torch.testing.assert_close(last, from_scratch(donor, prefixes), rtol=0, atol=1e-5)
        order = torch.tensor([2, 0, 0] if at % 2 else [1, 2, 0])
        mask, last, nodes = mask[order], last[order], nodes.select(order)
        ids = torch.cat([ids[order, : at + size], ids[:, at + size :]], 1)  # beams read what others did not
        rows = [rows[index].copy() for index in order.tolist()]
        cache.reorder_cache(order)


def test_a_models_donor_says_what_it_says_of_every_prefix():
    model = fused(donors=["gemma2-2b"], alignment="prefix")
    ids, mask = batch_of(HOST_TOKENIZER)
    model.give_tokenizers(small(HOST_TOKENIZER), {0: small("llama2")})
    aligned = model.features(ids, mask).aligned
    prefixes = [canonical(HOST_TOKENIZER, "llama2", read) for end in range(1, 41) for read in read_by(ids[:, :end], mask)]
    expected = from_scratch(model.donors[0], prefixes, layer=1)
    torch.testing.assert_close(aligned[0].transpose(0, 1).flatten(0, 1), expected, rtol=0, atol=1e-5)


def test_a_model_without_its_tokenizers_says_so():
    model = fused(donors=["gemma2-2b"], alignment="prefix")
    model.tokenizers, model._rules = None, {}
    with pytest.raises(
        FusionError, match=r"donor 0 reads its own tokens .* has no tokenizer; load the model with from_pretrained"
    ):
        model(some_ids())


def test_without_padding_and_deaths_causality_is_enough():
    rules, encode = rules_of("gpt2", "llama2"), named("gpt2")[2]

    def expanded(text, mask):
        ids = torch.tensor(encode([text, text]))
        return expand_rows([PrefixTokens(rules) for _ in ids], ids, torch.tensor(mask))

    nodes = expanded(" 1 2 3", [[1, 1, 1], [1, 1, 1]])
    assert nodes.even
    assert torch.equal(nodes.visible()[0], torch.ones(nodes.ids.shape[1], nodes.ids.shape[1]).tril().bool())
    assert not expanded(" 1 2 3", [[1, 1, 1], [1, 1, 0]]).even  # padding
    nodes = expanded(" river", [[1] * 5, [1] * 5])
    assert nodes.valid.all()
    assert not nodes.even  # deaths


def test_a_batch_of_control_tokens_or_padding_has_no_slots():
    rows = [PrefixTokens(rules_of("llama3", "gpt2")) for _ in range(2)]
    nodes = expand_rows(rows, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))
    assert nodes.ids.shape == (2, 0)
    assert nodes.last.tolist() == [[-1] * 3] * 2
    assert nodes.visible().shape == (2, 0, 0)
    assert nodes.alive().shape == (2, 3, 0)


def test_rows_of_other_calls_are_refused():
    ids = torch.tensor([[40, 41], [42, 43]])
    rows = [PrefixTokens(rules_of("gpt2", "llama2")) for _ in ids]
    nodes = expand_rows(rows, ids, torch.ones_like(ids))
    with pytest.raises(FusionError, match=r"rows have \[\d+, \d+\] slots; expected 2 rows of 0, as the call before left them"):
        expand_rows(rows, ids, torch.ones_like(ids))
    with pytest.raises(FusionError, match="expected 2 rows"):
        expand_rows(rows[:1], ids, torch.ones_like(ids), nodes)


def test_the_tokenizers_are_left_as_they_are():
    tokenizer = small("llama2")
    before = tokenizer.backend_tokenizer.to_str()
    PrefixTokens(Retokenizer(named("gpt2")[1], named("llama2")[1], tokenizer)).push(host_ids("gpt2", PROSE))
    assert tokenizer.backend_tokenizer.to_str() == before
