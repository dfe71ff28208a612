"""Byte tables: what tokens stand for adds up to the text, for every kind of tokenizer and every kind of text."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers_for_tests import (
    BYTES,
    PROSE,
    SMALL,
    STRESS,
    byte_level,
    fast,
    llama3,
    mistral,
    sentencepiece,
    sentencepiece_around,
    small,
    trained,
    unigram,
    wordpiece,
)
from transformers import ByT5Tokenizer

from merge.fusion.byte_tables import ByteTable, text_encoder
from merge.fusion.errors import FusionError

REAL = {"Llama-3": llama3, "Mistral": mistral}
NAMES = [*SMALL, *REAL]
ANY_TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("▁ \n<0xA>é\u0301"))


def named(name):
    """A tokenizer, its table and its encoder; skips where a real one is not installed."""
    if name in SMALL:
        tokenizer = small(name)
    elif (tokenizer := REAL[name]()) is None:
        pytest.skip(f"the package with {name}'s tokenizer is not installed")
    if name not in _BUILT:
        table = ByteTable.from_tokenizer(tokenizer)
        _BUILT[name] = tokenizer, table, text_encoder(tokenizer, table)
    return _BUILT[name]


_BUILT = {}


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_tokens_are_the_bytes_of_the_text(name):
    _, table, encode = named(name)
    for text, ids in zip(STRESS, encode(STRESS), strict=True):
        assert table.join(ids) == text.encode()
        assert int(table.lengths[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=50)
@given(texts=st.lists(ANY_TEXT, max_size=4))
def test_any_text(name, texts):
    _, table, encode = named(name)
    assert [table.join(ids) for ids in encode(texts)] == [text.encode() for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizers_own_encoding_is_what_the_encoder_gives_for_its_bytes(name):
    """The space in front and composed characters are text like any other, and found in the bytes."""
    tokenizer, table, encode = named(name)
    for text in (text for text in STRESS if "▁" not in text):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        read = table.join(ids).decode()
        assert encode([read]) == [ids]
        if name != "qwen":
            assert read in ({text, " " + text} if table.leading_space else {text})


@pytest.mark.parametrize("name", NAMES)
def test_names_of_special_tokens_are_text(name):
    tokenizer, table, encode = named(name)
    tokens = tokenizer.convert_ids_to_tokens(sorted(table.control)[:8])
    for text, ids in zip(tokens, encode(tokens), strict=True):
        assert table.control.isdisjoint(ids)
        assert table.join(ids) == text.encode()


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=20)
@given(data=st.data())
def test_any_ids_have_bytes(name, data):
    """Models generate sequences that no text is encoded to, such as half a character."""
    _, table, _ = named(name)
    ids = data.draw(st.lists(st.integers(0, len(table) - 1)))
    assert len(table.join(ids)) == int(table.lengths[ids].sum())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(data=st.binary(max_size=20))
def test_any_bytes_have_ids(name, data):
    _, table, _ = named(name)
    assert table.join(table.longest_match(data)) == data


@pytest.mark.parametrize("name", NAMES)
def test_contents(name):
    """Control tokens stand for nothing, all others for something, and each content leads back to it."""
    tokenizer, table, _ = named(name)
    assert len(table) == len(tokenizer)
    assert {index for index, data in enumerate(table.content) if not data} == table.control
    assert table.roles == {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    assert all(table.content[index] == data for data, index in table.ids.items())
    assert set(table.content) == {b"", *table.ids}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", False), ("roberta", True), ("llama2", True), ("llama2-metaspace", True), ("gemma", False), ("Mistral", True)],
)
def test_leading_space(name, expected):
    _, table, _ = named(name)
    assert table.leading_space is expected


def test_real_tokenizers():
    """A character split over two tokens, and what stands for the space."""
    _, table, encode = named("Llama-3")
    assert [table.content[index] for index in encode(["好🙂x"])[0]] == ["好".encode(), b"\xf0\x9f", b"\x99\x82", b"x"]
    assert (len(table), table.roles) == (128256, {"bos": 128000, "eos": 128001, "pad": None})
    _, table, encode = named("Mistral")
    assert encode([" Hello  world\n"]) == [[22557, 28705, 1526, 13]]
    assert (len(table), table.roles) == (32000, {"bos": 1, "eos": 2, "pad": None})


def test_pieces_before_byte_tokens():
    """<0x41> stands for A as the piece A does, but no text leads to it."""
    table = ByteTable.from_tokenizer(sentencepiece("ABBA"))
    assert [table.content[index] for index in sorted(table.fallback)] == [bytes([byte]) for byte in range(256)]
    assert table.ids[b"B"] not in table.fallback
    assert table.ids[b"C"] in table.fallback


def test_ids_beyond_the_tokenizer_stand_for_nothing():
    tokenizer, table, _ = named("gemma")
    padded = ByteTable.from_tokenizer(tokenizer, len(table) + 3)
    assert padded.content == (*table.content, b"", b"", b"")
    assert padded.control == table.control


def test_control_tokens_beyond_the_model_are_left_out():
    """Gemma-3's tokenizer has one more than its text model."""
    tokenizer, table, _ = named("llama3")
    cut = ByteTable.from_tokenizer(tokenizer, len(table) - 1)
    assert cut.content == table.content[:-1]
    assert cut.roles == {"bos": 420, "eos": None, "pad": None}
    assert cut.control == {420}


def test_another_models_tokenizer_is_refused():
    with pytest.raises(FusionError, match=r"has the token .* at 300 but the model only 300 ids; expected the tokenizer that"):
        ByteTable.from_tokenizer(small("gpt2"), 300)


def test_added_tokens_stand_for_their_text():
    """Those that are in the vocabulary as well come from merges, and a marker in them is a space."""
    tokenizer, table, encode = named("gemma")
    assert table.content[tokenizer.convert_tokens_to_ids("<table>")] == b"<table>"
    assert table.content[tokenizer.convert_tokens_to_ids("▁▁")] == b"  "
    assert encode(["<table>", "  "]) == [[tokenizer.convert_tokens_to_ids(token)] for token in ("<table>", "▁▁")]


def test_tokens_that_swallow_spaces_are_text():
    """Phi-3's </s> is not special and takes the spaces behind it."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True), AddedToken("<tool>")])
    table = ByteTable.from_tokenizer(tokenizer)
    ids = text_encoder(tokenizer, table)(["a</s>  b<tool>"])[0]
    assert table.join(ids) == b"a</s>  b<tool>"
    assert table.content[ids[-1]] == b"<tool>"
    assert table.join(tokenizer("a</s>  b")["input_ids"]) == b"a</s>b"


def test_the_tokenizer_is_left_as_it_is():
    tokenizer = sentencepiece()
    before = tokenizer.backend_tokenizer.to_str()
    text_encoder(tokenizer, ByteTable.from_tokenizer(tokenizer))(STRESS)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_training_is_deterministic():
    assert byte_level().backend_tokenizer.to_str() == byte_level().backend_tokenizer.to_str()
    assert sentencepiece().backend_tokenizer.to_str() == sentencepiece().backend_tokenizer.to_str()


def test_a_tab_may_stand_for_itself():
    """Gemma's vocabulary has it in the place of <0x09>."""
    vocabulary = {"\t" if piece == "<0x09>" else piece: index for index, piece in enumerate(["<unk>", *BYTES])}
    tokenizer = sentencepiece_around(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"), dummy=False)
    table = ByteTable.from_tokenizer(tokenizer)
    assert text_encoder(tokenizer, table)(["\t\x0b"]) == [[10, 12]]
    assert table.fallback == frozenset(range(1, 257)) - {10}


def test_bytes_without_a_token_are_lost():
    """As by the tokenizer itself; SmolLM2's alphabet lacks 21 bytes."""
    tokenizer = byte_level("abc abc", alphabet=False)
    table = ByteTable.from_tokenizer(tokenizer)
    assert table.join(table.longest_match(b"xabcy cab")) == b"abc cab"
    assert table.join(text_encoder(tokenizer, table)(["xabcy cab"])[0]) == b"abc cab"
    assert table.join(tokenizer("xabcy cab")["input_ids"]) == b"abc cab"


def lowercasing():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return tokenizer


def dropping_spaces():
    tokenizer = byte_level()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(" "), "removed"), level])
    return tokenizer


def without_fallback():
    return sentencepiece_around(models.BPE({piece: index for index, piece in enumerate(trained(PROSE, 160))}, []))


def with_part_of_the_bytes():
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "\x00", *BYTES[1:200]])}
    return sentencepiece_around(models.BPE(vocabulary, [], byte_fallback=True))


def with_suffix():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.model.end_of_word_suffix = "</w>"
    return tokenizer


def with_dropout():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.model.dropout = 0.1
    return tokenizer


def replacing():
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" +"), "▁")
    return tokenizer


def on_white_space():
    backend = Tokenizer(models.BPE({"a": 0, **{piece: index for index, piece in enumerate(BYTES, 1)}}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(backend)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (wordpiece, "a WordPiece model, the normalizer BertNormalizer, the pre-tokenizer BertPreTokenizer"),
        (unigram, "a Unigram model, the normalizer NFKC"),
        (lowercasing, "the normalizer Lowercase"),
        (dropping_spaces, "the pre-tokenizer Split that removes its matches"),
        (without_fallback, "a BPE model without byte fallback"),
        (with_part_of_the_bytes, "byte fallback without <0xC8> (and 55 more)"),
        (with_suffix, "a BPE model with end_of_word_suffix"),
        (with_dropout, "a BPE model with dropout"),
        (replacing, "a normalizer that replaces ' +' by '▁'"),
        (on_white_space, "the pre-tokenizer Whitespace"),
    ],
)
def test_tokenizers_without_bytes_are_refused(make, found):
    tokenizer = make()
    tokenizer.name_or_path = "some/model"
    with pytest.raises(FusionError) as caught:
        ByteTable.from_tokenizer(tokenizer)
    expected = "expected byte-level BPE, or BPE with byte fallback, without a normalizer that rewrites the text"
    assert str(caught.value) == f"the tokenizer some/model has no bytes for its tokens: found {found}; {expected}"


def test_slow_tokenizers_are_refused():
    with pytest.raises(FusionError, match=r"the tokenizer ByT5Tokenizer is a slow one .*, as a fast tokenizer$"):
        ByteTable.from_tokenizer(ByT5Tokenizer())


@pytest.mark.parametrize("module", ["byte_tables", "errors"])
def test_what_travels_with_the_weights_imports_siblings_only(module):
    tree = ast.parse((ROOT / "merge" / "fusion" / f"{module}.py").read_text())
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert all((node.level, node.module) == (1, "errors") for node in relative)
