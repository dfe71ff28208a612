"""Vocabulary maps, the bridge and the byte clock: no byte is lost and none is seen early."""

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_byte_tables import named
from tokenizers_for_tests import SMALL, STRESS, byte_level

from merge.fusion.byte_tables import ByteTable, text_encoder
from merge.fusion.errors import FusionError
from merge.fusion.vocabulary import VocabularyMap, aligned, bridge, clock, same_vocabulary, vocabulary_map

PAIRS = [*itertools.permutations(SMALL, 2), ("llama2", "llama2"), ("Llama-3", "Mistral"), ("Mistral", "Llama-3")]
ANY_PAIR = pytest.mark.parametrize(("host", "donor"), PAIRS)
ROLES = {"bos": None, "eos": None, "pad": None}


def table(*content, **roles):
    """A table by hand; ids without bytes are control tokens."""
    control = frozenset(index for index, data in enumerate(content) if not data)
    return ByteTable(content, control, ROLES | roles)


HOST = table(b"", b"", b"a", b"b", b"ab", b"abc", b"\xff", b"", bos=0, eos=1, pad=7)
DONOR = table(b"a", b"b", b"c", b"bc", b"\xff", b"", b"", b"", bos=5, eos=6, pad=7)


def rows(mapping):
    return [mapping.row(index) for index in range(len(mapping.offsets) - 1)]


@functools.cache
def mapped(host, donor, encoded=True):
    """The map from one tokenizer to another, and their tables."""
    _, host, _ = named(host)
    _, donor, encode = named(donor)
    return vocabulary_map(host, donor, encode if encoded else None), host, donor


@ANY_PAIR
@pytest.mark.parametrize("encoded", [True, False])
def test_the_bytes_of_every_id(host, donor, encoded):
    found, host, donor = mapped(host, donor, encoded)
    assert found.inexact == ()
    assert (found.offsets.dtype, found.tokens.dtype) == (torch.int32, torch.int32)
    assert found.offsets[0] == 0
    assert found.offsets[-1] == len(found.tokens)
    for index, row in enumerate(rows(found)):
        assert donor.join(row) == host.content[index]
        if host.content[index] in donor.ids:
            assert row == [donor.ids[host.content[index]]]
        assert (index in host.control) or donor.control.isdisjoint(row)


@ANY_PAIR
def test_the_bytes_of_texts(host, donor):
    """Also of those that the host reads with a space in front, composed, or with special tokens around."""
    tokenizer, *_ = named(host)
    found, host, donor = mapped(host, donor)
    for text in STRESS:
        ids = tokenizer(text)["input_ids"]
        assert donor.join(found.expand(ids)) == host.join(ids)


def test_numbers_of_real_tokenizers():
    for pair, ones in ((("Llama-3", "Mistral"), 29_110), (("Mistral", "Llama-3"), 29_235)):
        found, host, _ = mapped(*pair)
        has_text = torch.tensor([bool(data) for data in host.content])
        assert int((found.counts[has_text] == 1).sum()) == ones


def test_a_map_by_hand():
    found = vocabulary_map(HOST, DONOR)
    assert rows(found) == [[5], [6], [0], [1], [0, 1], [0, 3], [4], []]
    assert found.counts.tolist() == [1, 1, 1, 1, 2, 2, 1, 0]


def test_the_donors_own_encoding_where_it_spells_the_token():
    """Wrong bytes, or a control token among the right ones, and the longest matches are taken instead."""
    good = {"ab": [0, 1], "abc": [0, 1, 2]}
    assert vocabulary_map(HOST, DONOR, lambda texts: [good[text] for text in texts]).row(5) == [0, 1, 2]
    assert vocabulary_map(HOST, DONOR, lambda texts: [[0, 1] for _ in texts]).row(5) == [0, 3]
    assert vocabulary_map(HOST, DONOR, lambda texts: [[5, *good[text]] for text in texts]).row(5) == [0, 3]


@pytest.mark.parametrize(
    ("host", "donor", "expected"),
    [
        ({"bos": 0, "eos": 1}, {"bos": 5, "eos": 6}, [[5], [6]]),
        ({"bos": 0, "eos": 1}, {"eos": 6}, [[], [6]]),
        ({"bos": 0, "eos": 0, "pad": 1}, {"bos": 5, "eos": 6, "pad": 7}, [[5], []]),
        ({"bos": 0, "eos": 1, "pad": 1}, {"bos": 5, "eos": 6, "pad": 7}, [[5], [6]]),
        ({}, {"bos": 5, "eos": 6}, [[], []]),
    ],
)
def test_control_tokens_go_by_role(host, donor, expected):
    found = vocabulary_map(table(*HOST.content, **host), table(*DONOR.content, **donor))
    assert [found.row(0), found.row(1)] == expected


def test_control_tokens_go_where_the_user_says():
    found = vocabulary_map(HOST, DONOR, control={7: [6, 5], 0: []})
    assert [found.row(index) for index in (0, 1, 7)] == [[], [6], [6, 5]]


@pytest.mark.parametrize(
    ("control", "said"), [({2: [5]}, "host id 2"), ({0: [3]}, "donor id 3"), ({99: [99]}, "99, donor id 99")]
)
def test_text_is_no_control_token(control, said):
    with pytest.raises(FusionError, match=f"{said}; expected ids of control tokens"):
        vocabulary_map(HOST, DONOR, control=control)


def test_bytes_that_the_donor_lacks_are_counted():
    tokenizer = byte_level("abc abc", alphabet=False)
    donor = ByteTable.from_tokenizer(tokenizer)
    host = table(b"ab", b"xa", b"x")
    found = vocabulary_map(host, donor, text_encoder(tokenizer, donor))
    assert found.inexact == (1, 2)
    assert [donor.join(row) for row in rows(found)] == [b"ab", b"a", b""]


ENDS = st.lists(st.integers(0, 4), max_size=12).map(lambda lengths: list(itertools.accumulate(lengths)))


def two_pointers(host_ends, donor_ends):
    """What `aligned` computes, in one walk over both."""
    found, last = [], -1
    for end in host_ends:
        while last + 1 < len(donor_ends) and donor_ends[last + 1] <= end:
            last += 1
        found.append(last)
    return found


@given(ENDS, ENDS)
def test_alignment_is_its_definition(host_ends, donor_ends):
    brute = [max((j for j, d in enumerate(donor_ends) if d <= end), default=-1) for end in host_ends]
    host, donor = torch.tensor(host_ends, dtype=torch.int64), torch.tensor(donor_ends, dtype=torch.int64)
    assert aligned(host, donor).tolist() == brute == two_pointers(host_ends, donor_ends)


@given(st.lists(st.tuples(ENDS, ENDS), min_size=1, max_size=4))
def test_alignment_of_batches(rows):
    """Padding behind the rows changes nothing."""
    width = [max(len(row[side]) for row in rows) for side in (0, 1)]
    fill = (0, 1 << 40)
    host, donor = (
        torch.tensor([row[side] + [max([fill[side], *row[side]])] * (width[side] - len(row[side])) for row in rows])
        .reshape(len(rows), -1)
        .long()
        for side in (0, 1)
    )
    found = aligned(host, donor)
    for index, (host_ends, donor_ends) in enumerate(rows):
        assert found[index, : len(host_ends)].tolist() == two_pointers(host_ends, donor_ends)


def test_alignment_takes_any_layout():
    ends = torch.arange(12).reshape(3, 4).T
    assert aligned(ends, ends).tolist() == [[0, 1, 2]] * 4


def test_clock():
    assert clock(torch.tensor([[0, 1, 3], [2, 0, 0]], dtype=torch.int32)).tolist() == [[0, 1, 4], [2, 2, 2]]


@pytest.mark.parametrize(("host", "donor"), [("gpt2", "llama2"), ("Llama-3", "Mistral")])
def test_half_a_character_does_not_see_the_whole(host, donor):
    """Character offsets give both halves of the emoji the end that the donor's whole emoji has."""
    _, host, host_encode = named(host)
    _, donor, donor_encode = named(donor)
    (host_ids,), (donor_ids,) = host_encode(["你好🙂x"]), donor_encode(["你好🙂x"])
    emoji = [donor.content[index] for index in donor_ids].index("🙂".encode())
    host_ends = clock(host.lengths[host_ids])
    seen = aligned(host_ends, clock(donor.lengths[donor_ids]))
    inside = (host_ends > 6) & (host_ends < 10)
    assert inside.any()
    assert (seen[inside] < emoji).all()
    assert seen[host_ends == 10] == emoji


@ANY_PAIR
def test_the_map_ends_where_the_host_ends(host, donor):
    """The last donor slot by counting is the last by the clock, control tokens counted where they stand in both streams."""
    tokenizer, *_ = named(host)
    found, host, donor = mapped(host, donor)
    both = sorted(index for index in host.control if found.counts[index])
    text = tokenizer.convert_ids_to_tokens(both)
    for ids in (tokenizer(part.join(["", *STRESS[2:5], ""]))["input_ids"] for part in text):
        donor_ids = found.expand(ids)
        host_ends = clock(host.lengths[ids] + torch.isin(torch.tensor(ids), torch.tensor(both)))
        donor_ends = clock(donor.lengths[donor_ids] + torch.isin(torch.tensor(donor_ids), torch.tensor(sorted(donor.control))))
        torch.testing.assert_close(aligned(host_ends, donor_ends), clock(found.counts[ids]) - 1)


def test_a_control_token_without_a_count_is_seen_early():
    """Why it is counted: the letter before eos ends where eos does."""
    host, donor = torch.tensor([2, 1]), vocabulary_map(HOST, DONOR).expand([2, 1])
    assert aligned(clock(HOST.lengths[host]), clock(DONOR.lengths[donor])).tolist() == [1, 1]
    one = torch.tensor([0, 1])
    assert aligned(clock(HOST.lengths[host] + one), clock(DONOR.lengths[donor] + one)).tolist() == [0, 1]


def over_bridge(tables, p_host, p_donor):
    """q before it is divided by its sum, on tensors: (V), (U) -> (V)."""
    begins, lands = tables.begins.long(), tables.lands.long()
    known, landing = begins >= 0, lands >= 0
    within = torch.zeros_like(p_donor).index_add(0, begins[known], p_host[known])
    q = torch.zeros_like(p_host)
    q[known] = p_donor[begins[known]] * p_host[known] / within[begins[known]]
    return q.index_add(0, lands[landing], p_donor[landing])


def by_hand(there, back, p_host, p_donor):
    """The same from rows of the maps, one token at a time."""
    first = [row[0] if row else None for row in rows(there)]
    q = [0.0] * len(first)
    for token, mass in enumerate(p_donor):
        starting = [v for v, u in enumerate(first) if u == token]
        for v in starting:
            q[v] += float(mass * p_host[v] / sum(p_host[w] for w in starting))
        if not starting and back.row(token):
            q[back.row(token)[0]] += float(mass)
    return q


@pytest.mark.parametrize(("host", "donor"), [*itertools.permutations(["gpt2", "llama3", "llama2", "gemma"], 2)])
def test_bridge_is_its_definition(host, donor):
    """Everything that the donor says arrives, but for control tokens that the host lacks."""
    _, host, host_encode = named(host)
    _, donor, donor_encode = named(donor)
    generator = torch.Generator().manual_seed(0)
    p_host, p_donor = (torch.randn(len(side), generator=generator, dtype=torch.float64).softmax(0) for side in (host, donor))
    tables = bridge(host, donor, host_encode=host_encode, donor_encode=donor_encode)
    assert (len(tables.begins), len(tables.lands)) == (len(host), len(donor))
    q = over_bridge(tables, p_host, p_donor)
    back = vocabulary_map(donor, host, host_encode)
    expected = by_hand(vocabulary_map(host, donor, donor_encode), back, p_host, p_donor)
    torch.testing.assert_close(q, torch.tensor(expected, dtype=torch.float64))
    assert (q >= 0).all()
    heard = torch.ones(len(donor), dtype=torch.bool)
    heard[[index for index in donor.control if not back.row(index) and index not in tables.begins.tolist()]] = False
    torch.testing.assert_close(q.sum(), p_donor[heard].sum())
    assert heard[[index for index, data in enumerate(donor.content) if data]].all()


def test_bridge_of_real_tokenizers_loses_nothing():
    _, llama, llama_encode = named("Llama-3")
    _, mistral, mistral_encode = named("Mistral")
    sides = {"host": llama, "donor": mistral, "host_encode": llama_encode, "donor_encode": mistral_encode}
    swapped = {"host": mistral, "donor": llama, "host_encode": mistral_encode, "donor_encode": llama_encode}
    for case in (sides, swapped):
        tables = bridge(**case)
        p_host = torch.full((len(case["host"]),), 1 / len(case["host"]), dtype=torch.float64)
        has_text = torch.tensor([bool(data) for data in case["donor"].content])
        p_donor = has_text / has_text.sum(dtype=torch.float64)
        assert float(over_bridge(tables, p_host, p_donor).sum()) == pytest.approx(1.0, abs=1e-12)


def test_a_bridge_by_hand():
    """c and bc start no host token and have no host token of their own: the host cannot say them, b is how bc begins."""
    tables = bridge(HOST, DONOR)
    assert tables.begins.tolist() == [5, 6, 0, 1, 0, 0, 4, -1]
    assert tables.lands.tolist() == [-1, -1, -1, 3, -1, -1, -1, -1]


def test_a_map_is_read_by_rows():
    found = VocabularyMap(torch.tensor([0, 2, 2, 3]), torch.tensor([7, 8, 9]))
    assert rows(found) == [[7, 8], [], [9]]
    assert found.expand([2, 0, 1, 0]) == [9, 7, 8, 7, 8]


@pytest.mark.parametrize(("host", "donor"), [(5, 5), (5, 3), (3, 5)])
def test_with_one_tokenizer_every_id_stands_for_itself(host, donor):
    table, back = same_vocabulary(host, donor)
    assert [table.row(index) for index in range(host)] == [[index] if index < donor else [] for index in range(host)]
    assert back.begins.tolist() == [index if index < donor else -1 for index in range(host)]
    assert back.lands.tolist() == [-1] * donor
