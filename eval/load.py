"""Loads a model for scoring: placed and typed as merge/runtime.py decides, by accelerate, in one or several processes."""

import logging
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge.checkpoint import FUSED, Checkpoint, Tensor
from merge.fusion import register
from merge.runtime import FLOATS, Placement, place_model, torch_dtype

from .errors import LoadError
from .lm import PrefixLM

log = logging.getLogger(__name__)


def stored_dtype(tensors: Iterable[Tensor]) -> str:
    """The dtype of most elements, as torch names it."""
    elements = Counter[str]()
    for tensor in tensors:
        elements[FLOATS.get(tensor.dtype, "float32")] += tensor.numel
    return elements.most_common(1)[0][0]


def load_model(checkpoint: Checkpoint, device: str = "auto", dtype: str = "auto", **options: Any) -> tuple[PrefixLM, Placement]:
    """The model of a checked checkpoint folder, ready to be scored; and where it is run, in what dtype, and why.

    `options` are those of PrefixLM.

    Raises:
        LoadError: transformers cannot load the folder.
        MergeError: the device is not there.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by accelerate launch, and by torchrun
    own_device, accelerator = None, None
    if processes > 1:
        if device not in ("auto", "cpu", "cuda"):
            raise LoadError(f"device is {device!r}, but each of {processes} processes has its own; use auto")
        # While the first process measures text and writes, the others wait for as long as that takes.
        patience = InitProcessGroupKwargs(timeout=timedelta(weeks=1))
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[patience])
        own_device = "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)
    placement = place_model(
        "auto" if own_device else device,
        dtype,
        num_parameters=sum(tensor.numel for tensor in checkpoint.tensors.values()),
        stored=stored_dtype(checkpoint.tensors.values()),
        process_device=own_device,
        processes=processes,
    )
    log.info("%s in %s on %s (%s)", checkpoint.folder, placement.dtype, placement.device, placement.reason)
    loading: dict[str, Any] = {"dtype": torch_dtype(placement.dtype), "device_map": placement.device_map}
    if checkpoint.config.get("model_type") == FUSED:
        register()
    if checkpoint.config.get("attn_logit_softcapping"):
        loading["attn_implementation"] = "eager"  # the fused attention kernels leave soft-capping out
    if placement.device_map == "auto":
        loading["offload_folder"] = tempfile.mkdtemp(prefix="layerfuse-offload-")
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, **loading)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    except Exception as error:  # the code of many model classes
        if "offload_folder" in loading:
            shutil.rmtree(loading["offload_folder"], ignore_errors=True)
        first = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise LoadError(f"{checkpoint.folder} cannot be loaded by transformers ({first})") from error
    if "offload_folder" in loading:
        weakref.finalize(model, shutil.rmtree, loading["offload_folder"], ignore_errors=True)
    lm = PrefixLM(model.eval(), tokenizer=tokenizer, device=placement.device, accelerator=accelerator, **options)
    return lm, placement
