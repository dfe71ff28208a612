"""Headers: what the safetensors library writes is read; what is damaged is refused in one line, whatever the damage."""

import contextlib
import json
import shutil
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import NAMES, tiny_source

from merge.checkpoint import encode_header, is_tied, read_checkpoint, read_header
from merge.errors import CheckpointError, MergeError, PlanError
from merge.families import group_of, kind_of, norm_read_by
from merge.layer_config import cut_config, layer_count
from merge.plan import unit_row


@pytest.mark.parametrize("name", NAMES)
def test_every_twin_is_read(name, tiny_cache):
    checkpoint = tiny_source(name, tiny_cache).checkpoint()
    assert checkpoint.num_hidden_layers == checkpoint.config["num_hidden_layers"]
    assert checkpoint.stack == "model.layers"
    assert sum(len(layer) for layer in checkpoint.layers) + len(checkpoint.rest) == len(checkpoint.tensors)
    assert all(kind_of(name) for layer in checkpoint.layers for name in layer)


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text(min_size=1, max_size=10).filter(lambda name: name != "__metadata__")


@given(st.dictionaries(names, shapes, max_size=6))
def test_header_round_trip(tmp_path_factory, entries):
    """What is encoded is what is read, and the safetensors library agrees."""
    from math import prod

    from safetensors import safe_open

    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    listed = [(name, "F32", shape, 4 * prod(shape)) for name, shape in entries.items()]
    head = encode_header(listed)
    assert len(head) % 8 == 0
    path.write_bytes(head + bytes(sum(size for *_, size in listed)))
    file, tensors = read_header(path)
    assert file.size_bytes == path.stat().st_size
    assert {tensor.name: tensor.shape for tensor in tensors} == entries
    with safe_open(path, "np") as opened:
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == entries


@given(st.data())
def test_any_damage_is_refused_in_one_line(tmp_path_factory, llama, data):
    """Whatever bytes of a shard's first kilobytes change: it is refused, or it is read to the same tensors or other names."""
    source = llama.folder / "model-00002-of-00003.safetensors"
    raw = bytearray(source.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, length + 7))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(raw), len(raw), length, 7, 0]))
    path = tmp_path_factory.mktemp("damage") / "x.safetensors"
    path.write_bytes(raw[:cut])
    said = None
    try:
        _, tensors = read_header(path)
    except CheckpointError as error:
        said = str(error)
    if said is None:
        assert all(tensor.start + tensor.nbytes <= cut for tensor in tensors)
    else:
        assert str(path) in said
        assert "\n" not in said
        assert len(said) < 600


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["num_hidden_layers", "layer_types", "model_type", "text_config", "x"]), inner, max_size=4
            )
        ),
    )
)
def test_any_config_is_read_or_refused(tmp_path_factory, llama, config):
    folder = tmp_path_factory.mktemp("config") / "model"
    shutil.copytree(llama.folder, folder)
    (folder / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(MergeError):  # anything else is a defect
        cut_config(read_checkpoint(folder).config, [0])


def test_header_with_a_name_twice(tmp_path):
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"x")
    with pytest.raises(CheckpointError, match="key 'a' stands twice"):
        read_header(tmp_path / "x.safetensors")


def test_both_single_file_and_index(copy_of, llama):
    folder = copy_of(llama)
    (folder / "model-00001-of-00003.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        read_checkpoint(folder)


def test_shards_without_index(copy_of, llama):
    folder = copy_of(llama)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"3 safetensors files .* but no model\.safetensors\.index\.json"):
        read_checkpoint(folder)


def test_tied_by_class_default():
    assert is_tied({"model_type": "gemma2"}, has_head=False)
    assert not is_tied({"model_type": "llama"}, has_head=False)
    assert is_tied({"model_type": "llama", "tie_word_embeddings": True}, has_head=True)
    assert is_tied({"model_type": "unknown"}, has_head=False)


def test_kinds_and_readers():
    assert group_of("mlp.up_proj.weight") == "mlp.up_proj"
    assert kind_of("self_attn.qkv_proj.weight") == "projection"
    assert kind_of("self_attn.q_proj.bias") == "projection"
    assert kind_of("block_sparse_moe.gate.weight") is None
    llama = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    gemma2 = [*llama, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"]
    olmo2 = ["post_attention_layernorm.weight", "post_feedforward_layernorm.weight"]
    assert norm_read_by("mlp.up_proj.weight", llama) == "post_attention_layernorm.weight"
    assert norm_read_by("mlp.up_proj.weight", gemma2) == "pre_feedforward_layernorm.weight"
    assert norm_read_by("mlp.up_proj.weight", olmo2) is None
    assert norm_read_by("self_attn.q_proj.weight", olmo2) is None
    assert norm_read_by("mlp.down_proj.weight", llama) is None
    assert norm_read_by("self_attn.q_proj.bias", llama) is None


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def test_lists_as_long_as_the_model_are_cut():
    config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "per_layer": [1, 2, 3], "eos_token_id": [7, 8, 9]}
    cut = cut_config(config, [0, 2])
    assert cut.config == {"num_hidden_layers": 2, "layer_types": ["a", "c"], "per_layer": [1, 3], "eos_token_id": [7, 8, 9]}
    assert len(cut.notes) == 2


def test_window_start_is_recounted():
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 6,
        "max_window_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 8,
    }
    assert cut_config(config, [0, 1, 4, 5]).config["max_window_layers"] == 2
    assert "layer_types" not in cut_config(config, [0, 1, 4, 5]).config
    mixed_up = cut_config(config, [4, 0]).config  # not a lower and an upper part any more: written out
    assert mixed_up["layer_types"] == ["sliding_attention", "full_attention"]


def test_layer_types_of_the_wrong_length():
    with pytest.raises(CheckpointError, match="has not one entry for each of the 3 layers"):
        cut_config({"num_hidden_layers": 3, "layer_types": ["a"]}, [0])


@pytest.mark.parametrize("bad", [None, 0, "3", True, 2.0])
def test_layer_count_has_to_be_one(bad):
    with pytest.raises(CheckpointError, match="'num_hidden_layers' is"):
        layer_count({"num_hidden_layers": bad})


def test_unit_rows_are_unit():
    assert unit_row(3).is_unit


@pytest.mark.parametrize("key", ["sliding_window_pattern", "sliding_window"])
def test_unknown_rules_for_attention_kinds(key):
    """A family whose rule is not known: dropping from the top is fine, anything else is refused by name."""
    config = {"model_type": "cohere2", "num_hidden_layers": 8, key: 4}
    assert cut_config(config, range(6)).config["num_hidden_layers"] == 6
    with pytest.raises(PlanError, match=f"{key} = 4 decides the attention kind"):
        cut_config(config, [0, 2, 3])
    cut_config(config | {"layer_types": ["full_attention"] * 8}, [0, 2, 3])


def test_layers_counted_from_the_top():
    with pytest.raises(PlanError, match="'num_kv_shared_layers' = 2 counts layers from the top"):
        cut_config({"num_hidden_layers": 6, "num_kv_shared_layers": 2}, range(4))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "smollm3", "no_rope_layers": [1, 0]},
        {"model_type": "smollm3", "no_rope_layer_interval": 0},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None},
        {"model_type": "gemma3_text", "sliding_window_pattern": "x"},
        {"model_type": ["llama"]},
    ],
)
def test_bad_values_are_named(config):
    with pytest.raises(CheckpointError, match=r"config\.json: '"):
        cut_config(config | {"num_hidden_layers": 6}, [0, 2])
