"""Whether transformers would load a result: every parameter that the model class wants is there in the right shape.

For the families in `shapes` a table answers at once (a test compares it with transformers). For all others the model is
built from the config on the meta device, which allocates nothing but takes some seconds to import; config classes check
themselves there, so a per-layer list of the wrong length is found too.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from .checkpoint import is_tied
from .errors import PlanError
from .families import FAMILIES, Config
from .shapes import tensor_shapes

Shapes = Mapping[str, tuple[int, ...]]


def check_loadable(source_config: Config, source: Shapes, config: Config, result: Shapes) -> str | None:
    """None when the model class accepts exactly the tensors in `result`; otherwise why that could not be checked.

    Some classes rename tensors on loading; what the source's own config and tensors differ in is not held against the result.

    Raises:
        PlanError: the result would not load, or not completely; the message names the first difference.
    """
    if _by_table(source_config, source) == []:
        known = _by_table(config, result)
        if known:
            raise PlanError(f"the result would not load completely: {known[0]} ({len(known)} differences)")
        return None
    try:
        before = _compare(source_config, source, _wanted(source_config))
    except _CannotTellError as error:
        return str(error)
    misshapen = [one for one in before if ", expected " in one]
    if misshapen:  # names may be changed on loading, shapes are not
        raise PlanError(f"the source does not load: {misshapen[0]}; config.json and the weights do not belong together")
    if before:
        return f"the source itself differs from its model class ({before[0]})"
    try:
        after = _compare(config, result, _wanted(config))
    except _CannotTellError as error:
        raise PlanError(f"the result would not load: {error}") from error
    if after:
        raise PlanError(f"the result would not load completely: {after[0]} ({len(after)} differences)")
    return None


class _CannotTellError(Exception):
    """No model could be built; the message says why."""


def _by_table(config: Config, tensors: Shapes) -> list[str] | None:
    """The differences from what `shapes` says; None where it does not know the model type."""
    if config.get("model_type") not in FAMILIES or not (_class_name(config) or "").endswith("ForCausalLM"):
        return None
    try:
        shapes = tensor_shapes(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # a size is missing or no number
        return None
    return _compare(config, tensors, shapes)


def _compare(config: Config, tensors: Shapes, wanted: Shapes) -> list[str]:
    found = {name: tuple(shape) for name, shape in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    wanted = dict(wanted)
    if is_tied(config, "lm_head.weight" in found):
        wanted.pop("lm_head.weight", None)
        found.pop("lm_head.weight", None)
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in wanted]
    both = [name for name in wanted if name in found]
    return problems + [f"{name} is {found[name]}, expected {wanted[name]}" for name in both if found[name] != wanted[name]]


def _wanted(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all parameters of the model class that the config names."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    data: dict[str, Any] = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    name = _class_name(config) or "AutoModelForCausalLM"
    model_class = getattr(transformers, name, None)
    if model_class is None or data.get("model_type") not in transformers.CONFIG_MAPPING:
        raise _CannotTellError(f"this transformers has no {name} for model_type {data.get('model_type')!r}")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        settings = transformers.AutoConfig.for_model(data.pop("model_type"), **data)
        with torch.device("meta"):
            model = model_class._from_config(settings)
    except Exception as error:  # config classes raise whatever their checks raise
        raise _CannotTellError(f"{name} cannot be built from the config: {_first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    return {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}


def _class_name(config: Config) -> str | None:
    """The model class that a config names, where it names one."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines) if len(lines) < 4 else f"{lines[0]} ..."
