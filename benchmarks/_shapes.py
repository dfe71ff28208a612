"""Models of real shapes with random weights, for what depends on shapes alone."""

import json
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent.parent / "configs" / "models"


def random_model(name: str, device: str, dtype: Any, layers: int | None = None) -> Any:
    """A model as configs/models/NAME.json says, made on the device; of so many layers if given."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())["config"]
    if layers:
        config["num_hidden_layers"] = layers
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    finally:
        torch.set_default_dtype(before)
