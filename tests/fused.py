"""Small fused models: real families' configs with few layers, random weights, and maps that no tokenizers are needed for."""

from collections.abc import Sequence

import torch
from tiny import CONFIGS
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from merge.fusion import FusionConfig, FusionForCausalLM
from merge.records import read_json
from merge.tiny import tiny_config

FAMILIES = ("llama3-8b", "mistral-7b", "gemma2-2b", "phi3-mini")
MODES = ("concat", "weighted", "gate", "attention", "cross")
VOCABULARY = 264
PAD = 258


def small_config(name, layers):
    """A real model's config, tiny and cut to a few layers."""
    config = tiny_config(read_json(CONFIGS / "models" / f"{name}.json")["config"]) | {"num_hidden_layers": layers}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    config.pop("torch_dtype", None)
    return config


def random_map(seed, rows=VOCABULARY, most=3):
    """Offsets and tokens: 0 to `most` donor tokens for every host id, none for padding."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (rows,), generator=generator)
    counts[PAD : PAD + 1] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    return offsets.int(), torch.randint(0, 256, (int(offsets[-1]),), generator=generator).int()


def fused(mode="attention", host="llama3-8b", donors: Sequence[str] = ("gemma2-2b", "phi3-mini"), *, trained=True,
          dtype=torch.float32, seed=0, **fusion):  # fmt: skip
    """A fused model of four host layers and three donor layers, in eval mode; `trained`: with fusers that do something."""
    torch.manual_seed(seed)
    own = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small_config(host, 4)))
    others = [AutoModel.from_config(AutoConfig.for_model(**small_config(name, 3))) for name in donors]
    maps = [random_map(seed + number) for number in range(len(donors))]
    config = FusionConfig(
        text_config=own.config,
        donors=[
            {"config": one.config.to_dict(), "taps": [1, 3], "map_size": len(tokens)}
            for one, (_, tokens) in zip(others, maps, strict=True)
        ],
        fusion={"mode": mode, "sites": [2, 4], "rank": 8, "heads": 2, **fusion},
    )
    model = FusionForCausalLM(config, own, others)
    for number, (offsets, tokens) in enumerate(maps):
        getattr(model, f"offsets_{number}").copy_(offsets)
        getattr(model, f"tokens_{number}").copy_(tokens)
    with torch.no_grad():
        for name, value in model.named_parameters():  # random models whose states are of ordinary size
            if not name.startswith("fusers.") and value.ndim > 1:
                value.normal_(std=value.shape[-1] ** -0.5 if "embed" not in name else 1.0)
        if trained:
            for value in model.fuser_parameters().values():
                value.add_(0.2 * torch.randn_like(value))
    return model.to(dtype).eval()


def some_ids(rows=3, length=17, seed=1):
    """Host ids of ordinary tokens."""
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))
