"""What projected RegMean is worth between two small models of different shape that were trained independently on bytes.

The host learns docstrings of Python's standard library, the donor its code without them; every tenth module is for choosing
alpha, every tenth is reported, the rest is learnt from. Bits per byte (prose, code) of
  host, donor       each alone
  alpha             the host's write matrices moved towards the donor's writes, for every --alphas
  untrained         the same step towards a donor of the same shape with random weights: what the step does without knowledge
  rotated           a donor that computes what the host computes, in another basis: has to change nothing
  healed            host and merged model (--heal-alpha) after the same --heal steps on prose and code, for every --heal-seeds

    python benchmarks/projection.py

One thread. Last line of stdout: JSON.
"""

import argparse
import ast
import copy
import json
import math
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WINDOW = 256  # bytes
PARTS = ("train", "choose", "report")
SHAPES = {
    "host": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3},
    "donor": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=600, help="of training host and donor each")
    options.add_argument("--batch-size", type=int, default=8, help=f"windows of {WINDOW} bytes per step")
    options.add_argument("--positions", type=int, default=65536, help="aligned positions, half of them of prose")
    options.add_argument("--alphas", default="0,0.1,0.25,0.5,1")
    options.add_argument("--heal", type=int, default=100, help="steps")
    options.add_argument("--heal-alpha", type=float, default=0.1)
    options.add_argument("--heal-seeds", type=int, default=3)
    options.add_argument("--eval-windows", type=int, default=256, help="per domain")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from merge.fusion.moments import BASES
    from merge.fusion.positions import same_tokens
    from merge.fusion.projection import choose_alpha, project, replaced
    from merge.report import versions

    torch.set_num_threads(1)
    started = time.perf_counter()
    text = standard_library()
    data = {key: torch.tensor(list(value[: len(value) // WINDOW * WINDOW])).reshape(-1, WINDOW) for key, value in text.items()}

    def log(said: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {said}", file=sys.stderr, flush=True)

    def built(shape: str, seed: int) -> Any:
        torch.manual_seed(seed)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": False}
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape], **heads, pad_token_id=0))

    def loss_of(model: Any, batch: Any) -> Any:
        logits = model(batch, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def trained(model: Any, windows: Any, steps: int, rate: float, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            loss = loss_of(model, windows[torch.randint(len(windows), (arguments.batch_size,), generator=generator)])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        log(f"{steps} steps: last loss {float(loss.detach()) / math.log(2):.3f} bits per byte")
        return model.eval()

    def spread(key: tuple[str, str], count: int) -> Any:
        """Windows from everywhere in a part."""
        return data[key][torch.linspace(0, len(data[key]) - 1, min(count, len(data[key]))).long()]

    @torch.inference_mode()
    def bits(model: Any, part: str) -> dict[str, float]:
        found = {}
        for domain in ("prose", "code"):
            windows = spread((domain, part), arguments.eval_windows)
            losses = [float(loss_of(model, batch)) * len(batch) for batch in windows.split(32)]
            found[domain] = sum(losses) / len(windows) / math.log(2)
        return found

    both = torch.cat([data["prose", "train"], data["code", "train"][: len(data["prose", "train"])]])
    host = trained(built("host", arguments.seed), data["prose", "train"], arguments.steps, 3e-3, arguments.seed)
    donor = trained(built("donor", arguments.seed + 1), data["code", "train"], arguments.steps, 3e-3, arguments.seed + 1)
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": versions() | {"python": platform.python_version()},
        "what": {name: f"{shape['hidden_size']} x {shape['num_hidden_layers']}" for name, shape in SHAPES.items()},
        "bytes": {" ".join(key): len(value) for key, value in text.items()},
        "arguments": vars(arguments),
        "train_s": round(time.perf_counter() - started, 1),
        "donor": bits(donor, "report"),
        "merged": {},
    }
    count = arguments.positions // WINDOW // 2
    texts = [bytes(row).decode("latin-1") for key in ("prose", "code") for row in spread((key, "train"), count).tolist()]
    align = same_tokens(lambda texts: [list(text.encode("latin-1")) for text in texts])
    alphas = [float(alpha) for alpha in arguments.alphas.split(",")]

    def mean_loss(model: Any) -> float:
        return sum(bits(model, "choose").values()) / 2

    for name, other in (("trained", donor), ("untrained", built("donor", 99).eval()), ("rotated", rotated(host, torch))):
        for basis in BASES:
            before = time.perf_counter()
            projection = project(host, other, texts, align, basis=basis)
            seconds = time.perf_counter() - before
            held_out = choose_alpha(host, projection, mean_loss, alphas)
            found: dict[str, Any] = {}
            for alpha in held_out.losses:
                with replaced(host, projection.weights(host, alpha)):
                    found[str(alpha)] = bits(host, "report")
            log(f"{name} {basis}: mean gap {projection.report.mean_gap:.3g}, alpha {held_out.alpha:g}")
            result["merged"][f"{name} {basis}"] = {
                "depth_map": projection.report.depth_map,
                "cka": [round(one.cka or 0.0, 3) for one in projection.report.layers],
                "gaps": [{place: round(gap, 7) for place, gap in one.gaps.items()} for one in projection.report.layers],
                "mean_gap": round(projection.report.mean_gap, 7),
                "chosen_alpha": held_out.alpha,
                "bits_per_byte": found,
                "project_s": round(seconds, 1),
            }
            if (name, basis) == ("trained", "ridge"):
                healed = copy.deepcopy(host)
                healed.load_state_dict(projection.weights(host, arguments.heal_alpha), strict=False)
                result["healed"] = [
                    {
                        which: bits(trained(copy.deepcopy(model).train(), both, arguments.heal, 1e-3, seed), "report")
                        for which, model in (("host", host), ("merged", healed))
                    }
                    for seed in range(arguments.heal_seeds)
                ]
    result["total_s"] = round(time.perf_counter() - started, 1)
    table(result)
    print(json.dumps(result))


def standard_library() -> dict[tuple[str, str], bytes]:
    """(prose or code, part) -> text: docstrings of the standard library's modules, and their other lines."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[tuple[str, str], list[str]] = {(domain, part): [] for domain in ("prose", "code") for part in PARTS}
    paths = [path for path in sorted(folder.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(path.parts)]
    for number, path in enumerate(paths):
        part = {0: "choose", 5: "report"}.get(number % 10, "train")
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):  # some are broken on purpose
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    found["prose", part].append(docstring)
                    where = node.body[0]
                    lines[where.lineno - 1 : where.end_lineno] = [""] * ((where.end_lineno or 0) - where.lineno + 1)
        found["code", part].append("\n".join(line for line in lines if line.strip()))
    return {key: "\n\n".join(texts).encode() for key, texts in found.items()}


def rotated(host: Any, torch: Any) -> Any:
    """What the host computes, with its residual stream in another basis; its norms' gains go into what reads them."""
    d = host.config.hidden_size
    Q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    found = copy.deepcopy(host)

    def change(matrix: Any, gain: Any = None, *, writes: bool = False) -> None:
        value = matrix.weight.data.double()
        value = Q @ value if writes else (value if gain is None else value * gain) @ Q.T
        matrix.weight.data = value.to(matrix.weight.dtype)

    def taken(norm: Any) -> Any:
        gain = norm.weight.data.double()
        norm.weight.data = torch.ones_like(norm.weight)
        return gain

    for layer in found.model.layers:
        gain = taken(layer.input_layernorm)
        for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            change(matrix, gain)
        gain = taken(layer.post_attention_layernorm)
        for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
            change(matrix, gain)
        for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
            change(matrix, writes=True)
    change(found.model.embed_tokens)
    change(found.lm_head, taken(found.model.norm))
    return found


def table(result: dict[str, Any]) -> None:
    """The results as the documentation has them."""

    def cell(bits: dict[str, float]) -> str:
        return f"{bits['prose']:.3f} / {bits['code']:.3f}"

    merged: dict[str, Any] = result["merged"]
    columns: Sequence[str] = list(next(iter(merged.values()))["bits_per_byte"])
    print(f"donor alone: {cell(result['donor'])}")
    print("| donor, basis | mean relative gap | " + " | ".join(f"alpha {alpha}" for alpha in columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for name, one in merged.items():
        print(
            f"| {name} | {one['mean_gap']:.3g} | " + " | ".join(cell(one["bits_per_byte"][alpha]) for alpha in columns) + " |"
        )
    for seed, one in enumerate(result["healed"]):
        print(f"healed, seed {seed}: host {cell(one['host'])}, merged {cell(one['merged'])}")


if __name__ == "__main__":
    main()
