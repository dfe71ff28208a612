"""What a fused model of real shapes costs on a device: memory, prefill, decoding and training, with random weights.

    fused      host and donor as one model; host: the host alone; donor: the donor alone, on as many tokens as it reads
    prefill    host tokens per second of one pass without a cache
    decode     host tokens per second, batches of 1 and 16; reading the prompt is in the time
    train      host tokens per second of updates of the fusers (forward, backward, AdamW)

Beside each the share of what the floating-point operations would take at --peak (2 per weight and token forward; training adds
the same again for the host's layers above the first site and its head), and for decoding at batch 1 the share of what reading
the weights would take at --bandwidth.

    python benchmarks/fusion_shapes.py --device cuda                                   Llama-3 at 19 layers + Gemma-2-2B
    python benchmarks/fusion_shapes.py --tiny --tokens 64 --written 4                  the same layers, tiny, to try it

Last line of stdout: JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from _shapes import MODELS  # noqa: E402 (after the path is set)

DONOR_TOKENS = 1.25  # for a host token: a round figure for text with a donor of the larger vocabulary
PROMPT = 128


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--host", default="llama3-8b")
    options.add_argument("--host-layers", type=int, default=19)
    options.add_argument("--donor", default="gemma2-2b")
    options.add_argument("--donor-layers", type=int, default=26)
    options.add_argument("--tiny", action="store_true", help="the models' random twins")
    options.add_argument("--mode", default="attention")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--tokens", type=int, default=2048, help="of a row, in prefill and training")
    options.add_argument("--rows", type=int, default=4)
    options.add_argument("--written", type=int, default=64)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--peak", type=float, default=989e12, help="floating-point operations per second of the device")
    options.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes per second of its memory")
    arguments = options.parse_args()

    import torch

    from eval.memory import PeakMemory, weight_bytes
    from merge.report import machine, versions

    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    model = fused(arguments, torch)
    model.requires_grad_(False)
    shape, size = (arguments.rows, arguments.tokens), model.config.text_config.vocab_size
    ids = torch.randint(5, size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    count = round(arguments.tokens * DONOR_TOKENS)
    donor_ids = ids[:, :1].expand(-1, count).clamp(max=model.donors[0].config.vocab_size - 1)
    per_token = operations(model)
    result: dict[str, Any] = {
        "host": f"{arguments.host}, {arguments.host_layers} layers",
        "donor": f"{arguments.donor}, {arguments.donor_layers} layers",
        "mode": arguments.mode,
        "parameters": sum(value.numel() for value in model.parameters()),
        "weights_gb": round(weight_bytes(model) / 1e9, 3),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "dtype": arguments.dtype,
        "tokens": [arguments.rows, arguments.tokens],
        "gflop_per_token": {name: round(per_token[name] / 1e9, 3) for name in ("forward", "train")},
    }

    def timed(work: Callable[[], object], tokens: int) -> float:
        """Tokens per second, median."""
        times = []
        for _ in range(arguments.repeats + 1):
            if on_gpu:
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        return tokens / statistics.median(times[1:])

    def peak(work: Callable[[], object]) -> float:
        """GB, weights included."""
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            work()
            return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
        with PeakMemory() as memory:
            work()
        return round((weight_bytes(model) + memory.peak) / 1e9, 3)

    with torch.no_grad():
        works = {
            "fused": lambda: model(ids, use_cache=False, logits_to_keep=1),
            "host": lambda: model.host(ids, use_cache=False, logits_to_keep=1),
            "donor": lambda: model.donors[0](donor_ids, use_cache=False),
        }
        result["prefill_tokens_per_s"] = {name: round(timed(work, ids.numel())) for name, work in works.items()}
        result["prefill_peak_gb"] = peak(works["fused"])
        result["decode_tokens_per_s"] = {}
        for rows in (1, 16):
            prompt = ids[:1, :PROMPT].expand(rows, -1)
            how = {"do_sample": False, "min_new_tokens": arguments.written, "pad_token_id": 0}
            how |= {"max_new_tokens": arguments.written, "attention_mask": torch.ones_like(prompt)}
            for name, one in (("fused", model), ("host", model.host)):
                speed = timed(lambda one=one, prompt=prompt, how=how: one.generate(prompt, **how), rows * arguments.written)
                result["decode_tokens_per_s"][f"{name}, batch {rows}"] = round(speed, 1)
    model.fusers.float().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.fusers.parameters(), lr=1e-4)

    def update() -> None:
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    result["train_tokens_per_s"] = round(timed(update, ids.numel()))
    result["train_peak_gb"] = peak(update)
    speeds = result["prefill_tokens_per_s"]
    result["of_host_and_donor_in_turn"] = round(speeds["fused"] * (1 / speeds["host"] + 1 / speeds["donor"]), 3)
    result["of_peak"] = {
        "prefill": round(speeds["fused"] * per_token["forward"] / arguments.peak, 4),
        "train": round(result["train_tokens_per_s"] * per_token["train"] / arguments.peak, 4),
    }
    read = per_token["read"] * model.host.dtype.itemsize / arguments.bandwidth
    result["decode_of_bandwidth"] = round(result["decode_tokens_per_s"]["fused, batch 1"] * read, 4)
    for key, value in result.items():
        print(f"{key:28} {value}")
    print(json.dumps({**result, **machine(), "versions": versions()}))


def fused(arguments: argparse.Namespace, torch: Any) -> Any:
    """The model, made on the device, with a map of DONOR_TOKENS donor tokens for a host token."""
    from merge.fusion import FusionConfig, FusionForCausalLM
    from merge.tiny import tiny_config

    def config(name: str, layers: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())["config"]
        found = tiny_config(found) if arguments.tiny else found
        found["num_hidden_layers"] = layers
        if found.get("layer_types"):
            found["layer_types"] = found["layer_types"][:layers]
        return found

    host, donor = config(arguments.host, arguments.host_layers), config(arguments.donor, arguments.donor_layers)
    size = host["vocab_size"]
    counts = torch.ones(size, dtype=torch.long)
    counts[:: round(1 / (DONOR_TOKENS - 1))] = 2
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    settings = {"mode": arguments.mode, "rank": 8 if arguments.tiny else 256, "heads": 4}
    places = sorted({max(1, round(share * arguments.host_layers)) for share in (0.5, 0.75, 1.0)})
    taps = sorted({max(1, round(share * arguments.donor_layers)) for share in (0.5, 0.75, 1.0)})
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    try:
        with torch.device(arguments.device):
            donors = [{"config": donor, "taps": taps, "map_size": int(offsets[-1])}]
            model = FusionForCausalLM(FusionConfig(text_config=host, donors=donors, fusion=settings | {"sites": places}))
    finally:
        torch.set_default_dtype(before)
    model.tables[0].offsets.copy_(offsets)
    model.tables[0].tokens.copy_(torch.arange(len(model.tables[0].tokens)) % (donor["vocab_size"] - 1))
    return model.eval()


def operations(model: Any) -> dict[str, float]:
    """Floating-point operations per host token, but for attention's own; `read`: weights that a step reads, tables left out."""

    def weights(module: Any) -> int:
        return sum(value.numel() for value in module.parameters())

    layers = [weights(layer) for layer in model.host.model.layers]
    head = weights(model.host.get_output_embeddings())
    fusers = weights(model.fusers)
    forward = 2.0 * (sum(layers) + head + fusers + DONOR_TOKENS * weights(model.donors[0].layers))
    first = min(model.config.fusion["sites"])
    read = sum(layers) + head + fusers + weights(model.donors[0].layers)
    return {"read": float(read), "forward": forward, "train": forward + 2.0 * (sum(layers[first:]) + head + 2 * fusers)}


if __name__ == "__main__":
    main()
