"""Small fused models: real families' configs with few layers, random weights, and tables that no tokenizers are needed for."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from tiny import CONFIGS, ROOT
from tokenizers_for_tests import CODE, PROSE, small
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from merge.fusion import FusionConfig, FusionForCausalLM
from merge.fusion.fusers import MODES as FUSERS
from merge.fusion.mixers import MODES as MIXERS
from merge.fusion.mixers import PACE
from merge.records import read_json
from merge.tiny import tiny_config

FAMILIES = ("llama3-8b", "mistral-7b", "gemma2-2b", "phi3-mini")
MODES = (*FUSERS, *MIXERS)
HOST_TOKENIZER, DONOR_TOKENIZERS = "gpt2", ("llama2", "gemma", "llama3", "qwen")  # small ones, where tokenizers are needed
VOCABULARY = 512  # room for every small tokenizer's ids
PAD = 511


def small_config(name, layers):
    """A real model's config, tiny and cut to a few layers."""
    config = tiny_config(read_json(CONFIGS / "models" / f"{name}.json")["config"])
    config |= {"num_hidden_layers": layers, "vocab_size": VOCABULARY}
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


def random_bridge(seed):
    """`begins` and `lands` of vocabularies of equal size: some tokens without counterpart on either side."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.randint(-20, VOCABULARY // 2, (VOCABULARY,), generator=generator).clamp(min=-1)
    lands = torch.randint(-20, VOCABULARY, (VOCABULARY,), generator=generator).clamp(min=-1)
    lands[begins[begins >= 0]] = -1
    return begins.int(), lands.int()


def ordinary(model, names=lambda name: True):
    """Has the states of a random model be of ordinary size."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if names(name) and value.ndim > 1:
                value.normal_(std=value.shape[-1] ** -0.5 if "embed" not in name else 1.0)
    return model


def fused(mode="attention", host="llama3-8b", donors: Sequence[str] = ("gemma2-2b", "phi3-mini"), *, alignment="map",
          trained=True, dtype=torch.float32, seed=0, **fusion):  # fmt: skip
    """A fused model of four host layers and three donor layers, in eval mode; `trained`: with fusers that do something, or
    a mixture whose s is 0.8.
    """
    torch.manual_seed(seed)
    own = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small_config(host, 4)))
    others = [AutoModel.from_config(AutoConfig.for_model(**small_config(name, 3))) for name in donors]
    maps = [random_map(seed + number) for number in range(len(donors))]
    settings = {"sites": [2, 4], "rank": 8, "heads": 2} if mode in FUSERS else {}
    config = FusionConfig(
        text_config=own.config,
        donors=[
            {"config": one.config.to_dict(), "taps": [1, 3] if mode in FUSERS else [3], "alignment": alignment}
            | {"map_size": len(tokens) if alignment == "map" else 0}
            for one, (_, tokens) in zip(others, maps, strict=True)
        ],
        fusion={"mode": mode, **settings, **fusion},
    )
    model = FusionForCausalLM(config, own, others)
    for number, several in enumerate(maps):
        tables = dict(zip(("offsets", "tokens", "begins", "lands"), (*several, *random_bridge(seed + number)), strict=True))
        for name, value in tables.items():
            if hasattr(model.tables[number], name):
                getattr(model.tables[number], name).copy_(value)
    if alignment == "prefix":
        several = [small(name) for name in DONOR_TOKENIZERS[: len(donors)]]
        model.give_tokenizers(small(HOST_TOKENIZER), dict(enumerate(several)))
    ordinary(model, lambda name: not name.startswith("fusers."))
    with torch.no_grad():
        for name, value in model.fuser_parameters().items() if trained else ():
            if mode in FUSERS:
                value.add_(0.2 * torch.randn_like(value))
            elif name.endswith("scale"):
                value.fill_(0.8 / PACE)
    return model.to(dtype).eval()


@functools.cache
def _text_ids():
    return torch.tensor(small(HOST_TOKENIZER)(PROSE + CODE)["input_ids"])


def some_ids(rows=3, length=17, seed=1):
    """Host ids of pieces of text."""
    starts = torch.randint(0, len(_text_ids()) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([_text_ids()[start : start + length] for start in starts.tolist()])


def elsewhere(folder):
    """The environment of a process that does not know this package, and has no network."""
    kept = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return os.environ | offline | {"HF_HOME": str(folder / "hub"), "PYTHONPATH": os.pathsep.join(kept)}


def loaded_elsewhere(folder, ids, expected):
    """Loads a folder with trust_remote_code in a process of its own; its last logits of ids [1, T] are `expected` [V]."""
    program = f"""
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
ids = torch.tensor({ids.tolist()})
with torch.no_grad():
    logits = model(ids).logits.float()
written = model.generate(ids, max_new_tokens=2, min_new_tokens=2)
print(json.dumps([logits[0, -1].tolist(), written.shape[1], [name for name in sys.modules if name.split(".")[0] == "merge"]]))
"""
    command, where = [sys.executable, "-c", program], folder.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=where, env=elsewhere(where), timeout=300)
    assert done.returncode == 0, done.stderr
    logits, length, ours = json.loads(done.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(logits), expected.float(), rtol=0, atol=1e-6)
    assert length == ids.shape[1] + 2
    assert ours == []
