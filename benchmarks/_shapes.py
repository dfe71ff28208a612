"""Models of real shapes with random weights, for what depends on shapes alone."""

import json
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent.parent / "configs" / "models"


def random_model(name: str, device: str, dtype: Any, layers: int | None = None) -> Any:
    """A model as configs/models/NAME.json says, or its twin for tiny:NAME, made on the device; of so many layers if given."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from merge.tiny import PREFIX, tiny_config

    config: dict[str, Any] = json.loads((MODELS / f"{name.removeprefix(PREFIX)}.json").read_text())["config"]
    if name.startswith(PREFIX):
        window = config["max_position_embeddings"]  # its tokens are bytes: prompts are long
        config = tiny_config(config) | {"max_position_embeddings": window}
    if layers:
        config["num_hidden_layers"] = layers
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).eval()  # not the config's dtype
