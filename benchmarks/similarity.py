"""What it costs to compare all layers of a model, beside one full pass for every layer and sample as the published tool does.

One thread, processor seconds; one dev question of each MMLU subject, as a bare prompt.
  layerfuse   one pass per sample that keeps what enters every layer, then MKA as intended
  published   one pass per layer and sample, keeping that layer's hidden states only; its similarities are not computed here
The published tool's passes are all alike, so they are measured for --measured layers and multiplied.

    python benchmarks/similarity.py --model SMOLLM2.gguf --data-dir DIR

Last line of stdout: JSON.
"""

import argparse
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True)
    options.add_argument("--data-dir", type=Path, required=True)
    options.add_argument("--per-subject", type=int, default=1)
    options.add_argument("--measured", type=int, default=3, help="layers for which the published tool's passes are measured")
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported

    import torch

    from eval.activations import capture_activations, question_texts
    from eval.load import load_model
    from eval.mmlu import SUBJECTS, read_mmlu
    from merge.report import versions
    from merge.similarity import angular, linear_cka, mka
    from merge.source import resolve

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    checkpoint = resolve(arguments.model).checkpoint()
    lm, _ = load_model(checkpoint, "cpu", "float32", self_check=False)
    texts = question_texts(read_mmlu(arguments.data_dir, SUBJECTS), arguments.per_subject)

    @torch.inference_mode()
    def published() -> None:
        for layer in range(arguments.measured):
            for text in texts:
                ids = torch.tensor([lm.tok_encode(text)])
                lm.model(ids, output_hidden_states=True, use_cache=False).hidden_states[layer]

    ours, theirs, parts = [], [], {}
    for _ in range(arguments.repeats):
        start = time.process_time()
        activations = capture_activations(lm, texts)
        parts["capture"] = time.process_time() - start
        for name, method in (("mka", mka), ("cka", linear_cka), ("angular", angular)):
            before = time.process_time()
            method(activations, 0)
            parts[name] = time.process_time() - before
        ours.append(parts["capture"] + parts["mka"])
        start = time.process_time()
        published()
        theirs.append((time.process_time() - start) * checkpoint.num_hidden_layers / arguments.measured)
    ratios = sorted(their / our for their, our in zip(theirs, ours, strict=True))
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": versions(),
        "what": f"{Path(arguments.model).name}, {checkpoint.num_hidden_layers} layers, {len(texts)} prompts, float32, 1 thread",
        "layerfuse_cpu_s": [round(value, 2) for value in ours],
        "published_cpu_s": [round(value, 1) for value in theirs],
        "parts_cpu_s": {name: round(value, 3) for name, value in parts.items()},
        "times_cheaper": [round(ratio, 1) for ratio in ratios],
    }
    for key, value in result.items():
        print(f"{key:20} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
