"""Shapes from configs alone, against the model classes of transformers and the published parameter counts."""

import pytest
import torch
import transformers
from tiny import CONFIGS, NAMES, ROOT

from merge.alphas import plan_from_alphas, read_alphas
from merge.blueprint import make_blueprint
from merge.families import FAMILIES
from merge.layer_config import cut_config, layer_types
from merge.loadable import check_loadable
from merge.records import read_json
from merge.shapes import count_parameters, tensor_shapes
from merge.tiny import tiny_config


def config_of(name):
    return read_json(CONFIGS / "models" / f"{name}.json")


def built(config):
    """The model class of transformers on the meta device."""
    data = dict(config)
    settings = transformers.AutoConfig.for_model(data.pop("model_type"), **data)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(settings)


@pytest.mark.parametrize("name", NAMES)
def test_real_shapes_are_those_of_transformers(name):
    record = config_of(name)
    model = built(record["config"])
    parameters = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert tensor_shapes(record["config"]) == parameters
    assert count_parameters(record["config"]) == record["num_parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_tiny_twin_is_the_same_class_in_small(name):
    config = config_of(name)["config"]
    small = tiny_config(config)
    assert set(tensor_shapes(small)) == set(tensor_shapes(config))
    assert {key: tuple(p.shape) for key, p in built(small).named_parameters()} == tensor_shapes(small)
    assert count_parameters(small) < 50_000
    assert small.keys() >= config.keys()
    assert type(built(small)) is type(built(config))


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
@pytest.mark.parametrize("name", NAMES)
def test_bias_options(name, bias):
    config = tiny_config(config_of(name)["config"]) | {bias: True}
    assert {key: tuple(p.shape) for key, p in built(config).named_parameters()} == tensor_shapes(config)


@pytest.mark.parametrize("layers", [1, 5, 19])
@pytest.mark.parametrize("name", NAMES)
def test_layer_types_are_those_of_transformers(name, layers):
    """Where config.json is silent, our rule fills in what the config class fills in."""
    config = config_of(name)["config"] | {"num_hidden_layers": layers, "layer_types": None, "no_rope_layers": None}
    for change in ({}, {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8}):
        data = {key: value for key, value in (config | change).items() if value is not None}
        settings = transformers.AutoConfig.for_model(data.pop("model_type"), **data)
        expected = getattr(settings, "layer_types", None) or ["full_attention"] * layers
        assert layer_types(data | {"model_type": config["model_type"]}, layers) == expected


@pytest.mark.parametrize("name", NAMES)
def test_cut_configs_are_valid_for_transformers(name):
    """The config classes check per-layer lists; a cut config passes and says what the kept layers were."""
    config = config_of(name)["config"]
    layers = config["num_hidden_layers"]
    keep = [layer for layer in range(layers) if layer not in (1, 2, 7)]
    cut = cut_config(config, keep).config
    data = dict(cut)
    settings = transformers.AutoConfig.for_model(data.pop("model_type"), **data)
    kinds = layer_types(config, layers)
    assert (getattr(settings, "layer_types", None) or ["full_attention"] * len(keep)) == [kinds[layer] for layer in keep]
    assert settings.num_hidden_layers == len(keep)


def test_llama3_at_19_layers():
    """32 -> 19 layers of Llama-3-8B, from headers that were never written."""
    config = config_of("llama3-8b")["config"]
    checkpoint = checkpoint_of(config)
    plan = plan_from_alphas(read_alphas(ROOT / "alphas" / "base.json"), 32)
    blueprint = make_blueprint(plan, checkpoint)
    assert blueprint.num_parameters == 5_194_805_248
    assert blueprint.bytes_total == 2 * 5_194_805_248
    assert [len(shard.outputs) > 0 for shard in blueprint.shards] == [True] * 3  # 10.39 GB in 5 GB shards
    assert max(shard.nbytes for shard in blueprint.shards) <= 5_000_000_000
    assert count_parameters(blueprint.cut.config) == 5_194_805_248


def checkpoint_of(config):
    """A checkpoint as its headers would describe it."""
    from pathlib import Path

    from merge.checkpoint import Checkpoint, ShardFile, Tensor, _split_layers

    position, tensors = 0, {}
    for name, shape in tensor_shapes(config).items():
        size = 2 * int(torch.Size(shape).numel())
        tensors[name] = Tensor(name, "BF16", shape, "model.safetensors", position, size)
        position += size
    stack, layers, rest = _split_layers(Path("x"), tensors, config["num_hidden_layers"])
    return Checkpoint(Path("x"), config, (ShardFile("model.safetensors", position, ""),), tensors, stack, layers, rest)


@pytest.mark.parametrize("name", NAMES)
def test_loadable_agrees_with_transformers(name, monkeypatch):
    """The quick table and the model class find the same: nothing for a good result, the difference for a bad one."""
    config = tiny_config(config_of(name)["config"])
    cut = cut_config(config, range(4)).config
    good = tensor_shapes(cut)
    lacking = {key: shape for key, shape in good.items() if key != "model.layers.2.mlp.down_proj.weight"}
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr("merge.loadable._by_table", lambda config, tensors: None)
        assert check_loadable(config, tensor_shapes(config), cut, good) is None
        with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj\.weight is missing"):
            check_loadable(config, tensor_shapes(config), cut, lacking)
    broken = cut | {"num_hidden_layers": 5}
    with pytest.raises(ValueError, match="would not load"):
        check_loadable(config, tensor_shapes(config), broken, good)


def test_every_family_has_a_twin():
    assert set(FAMILIES) == {config_of(name)["config"]["model_type"] for name in NAMES}
