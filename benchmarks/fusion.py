"""What reading donors costs in time, and what it gives, on real weights and text.

overhead    scoring and decoding by the fused model against its host and donors run one after the other on the same tokens,
            pairs of runs in turn; the aim is a ratio of throughputs of at least 0.9
arms        scripts/bench_fusion.py's table: every mode trained alike, and the controls (--updates 0 leaves it out)

    python benchmarks/fusion.py --host SMOLLM2.gguf --donor STORIES260K --prose WIKI.txt

A second donor, shaped like Gemma-2 with a vocabulary of bytes, is trained here on the source code of Python's standard library
(every module whose position is not divisible by five; those are for measuring) and kept in --out. Last line of stdout: JSON.
"""

import argparse
import json
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BLOCK, ROWS = 256, 8  # bytes in a row, rows in an update of the byte model
CODE_BYTES = 6_000  # of every module


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--host", required=True)
    options.add_argument("--donor", action="append", default=[])
    options.add_argument(
        "--prose", type=Path, required=True, help="a text: the first three quarters to train on, the rest to measure"
    )
    options.add_argument("--byte-updates", type=int, default=600, help="of the byte model")
    options.add_argument("--updates", type=int, default=100, help="of every arm")
    options.add_argument("--arms", default="concat,weighted,gate,attention,cross")
    options.add_argument("--outputs", default="mixture,linear,geometric")
    options.add_argument("--sites", default="0.75,1.0")
    options.add_argument("--alignment", default="map", help="of the donors' tokens: map, prefix")
    options.add_argument("--mmlu", metavar="DIR", help="a folder of MMLU's files; without it MMLU is not asked")
    options.add_argument("--questions", type=int, default=2, help="of every subject")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--documents", type=int, default=24)
    options.add_argument("--repeats", type=int, default=5, help="pairs of timed runs")
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path("runs/fusion-benchmark"))
    arguments = options.parse_args()

    import torch

    from eval.fusion_bench import Arms, Bench, Mmlu, claims, record, table
    from eval.plots import differences
    from merge.fusion.assemble import make_parts
    from merge.fusion.make import assemble
    from merge.fusion.recipe import Backbone, Recipe, Training
    from merge.report import machine, versions
    from merge.source import resolve

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    learnt, measured = code()
    texts = {}
    prose = arguments.prose.read_text(encoding="utf-8")
    middle = 3 * len(prose) // 4
    for name, text in {
        "prose-train": prose[:middle],
        "prose": prose[middle:],
        "code-train": "\n\n".join(learnt),
        "code": "\n\n".join(measured),
    }.items():
        texts[name] = str(out / f"{name}.txt")
        Path(texts[name]).write_text(text, encoding="utf-8")
    donors = [*arguments.donor, byte_model(out, learnt, arguments.byte_updates)]
    modes = tuple(arguments.arms.split(","))
    sites = [float(one) for one in arguments.sites.split(",")]
    recipe = Recipe(
        Backbone(arguments.host),
        tuple(Backbone(str(one), taps=(0.5, 1.0), alignment=arguments.alignment) for one in donors),
        {"mode": modes[0], "sites": sites, "rank": 64, "heads": 4},
        training=Training((mixed(out, texts),), updates=max(1, arguments.updates), block=128, batch=4, learning_rate=2e-3),
    )  # fmt: skip
    parts = make_parts(recipe, [resolve(str(one.model)) for one in (recipe.host, *recipe.donors)], dtype="float32")
    assembled = out / f"assembled-{arguments.alignment}"
    assemble(parts, assembled)
    bench = Bench(
        {name: (texts[name],) for name in ("prose", "code")},
        modes,
        controlled="attention" if "attention" in modes else modes[0],
        outputs=tuple(name for name in arguments.outputs.split(",") if name),
        documents=arguments.documents,
        max_bytes=1000,
        seeds=arguments.seeds,
        mmlu=Mmlu(arguments.mmlu, num_fewshot=0, limit=arguments.questions) if arguments.mmlu else None,
    )
    arms = Arms(parts, assembled, bench, "cpu", "float32")
    result: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "alignment": arguments.alignment,
        **overhead(arms.model, arguments.repeats),
    }
    for key, value in result.items():
        print(f"{key:32} {value}", flush=True)
    if arguments.updates:
        rows = []
        results = out / f"results-{arguments.alignment}"
        results.mkdir(exist_ok=True)
        for row in arms.rows():
            rows.append(row)
            print(table(rows, bench).splitlines()[-1], flush=True)
            (results / "results.json").write_text(json.dumps(record(rows, bench), indent=1) + "\n")
        text = table(rows, bench) + "\n" + "".join(f"- {line}\n" for line in claims(rows, bench))
        (results / "table.md").write_text(text)
        differences(results / "differences.png", rows, bench)
        print(text)
        result["claims"] = claims(rows, bench)
        result["bits_per_byte"] = {
            row.arm: {name: round(one.per_byte, 4) for name, one in row.measured.bits.items()} for row in rows
        }
    print(json.dumps({**result, **machine(), "versions": versions()}))


def code() -> tuple[list[str], list[str]]:
    """(modules to learn from, modules to measure on): the beginnings of the standard library's own modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found: tuple[list[str], list[str]] = ([], [])
    for number, path in enumerate(sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/[a-z]*.py"))):
        if "packages" in path.parts[-2] or "test" in str(path.relative_to(folder)):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")[:CODE_BYTES]
        if text.strip():
            found[number % 5 == 0].append(text)
    return found


def mixed(out: Path, texts: dict[str, str]) -> str:
    """A file of prose and code in turn, as many documents of each."""
    import random

    pieces = []
    for name in ("prose-train", "code-train"):
        text = Path(texts[name]).read_text(encoding="utf-8")
        pieces.append([text[start : start + 2000] for start in range(0, min(len(text), 400_000), 2000)])
    turns = [piece for pair in zip(*pieces, strict=False) for piece in pair]
    random.Random(0).shuffle(turns)
    path = out / "train.jsonl"
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in turns), encoding="utf-8")
    return str(path)


def byte_model(out: Path, documents: list[str], updates: int) -> Path:
    """A small model shaped like Gemma-2 that has read code, one token per byte."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from merge.fusion.text import token_blocks
    from merge.publish import new_folder
    from merge.records import read_json
    from merge.tiny import VOCABULARY, small_config, tiny_config, write_tiny

    folder = out / f"gemma2-bytes-{updates}"
    if folder.exists():
        return folder
    config = tiny_config(read_json(ROOT / "configs" / "models" / "gemma2-2b.json")["config"]) | {"num_hidden_layers": 6}
    with new_folder(folder) as scratch:
        write_tiny(config, scratch)  # for its tokenizer of bytes
        tokenizer = AutoTokenizer.from_pretrained(scratch)
        for path in scratch.glob("model*"):
            path.unlink()
        sizes = small_config(config, 160, 480, 4, 40) | {"sliding_window": 128, "query_pre_attn_scalar": 40}
        config = {key: value for key, value in sizes.items() if key not in ("torch_dtype", "layer_types")}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        blocks = token_blocks(documents, tokenizer, BLOCK)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
        generator, started = torch.Generator().manual_seed(0), time.perf_counter()
        for update in range(updates):
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * min(1.0, (update + 1) / 50) * (1 - update / updates)
            ids = blocks[torch.randint(len(blocks), (ROWS,), generator=generator)]
            loss = model(ids, labels=ids, use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        print(
            f"byte model: {updates} updates, {loss.item():.3f} nats per byte, {time.perf_counter() - started:.0f} s", flush=True
        )
        assert model.config.vocab_size == VOCABULARY
        model.eval().save_pretrained(scratch)
    return folder


def overhead(model: Any, repeats: int) -> dict[str, Any]:
    """Throughput of the fused model over that of its parts one after the other, on the same tokens."""
    import torch

    ids = torch.randint(0, 40_000, (4, 128), generator=torch.Generator().manual_seed(0))
    ids = ids.clamp(max=model.config.text_config.vocab_size - 1)
    expanded: list[Any] = []
    hooks = [
        donor.register_forward_pre_hook(lambda module, args, given: expanded.append(given["input_ids"]), with_kwargs=True)
        for donor in model.donors
    ]
    model.features(ids)
    for hook in hooks:
        hook.remove()
    prompt, steps = ids[:1, :32], 24
    lengths = [max(1, round(steps * x.shape[1] / ids.shape[1])) for x in expanded]
    how = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps, "pad_token_id": 0}

    def together() -> None:
        model(ids, use_cache=False)

    def apart() -> None:
        for donor, tokens in zip(model.donors, expanded, strict=True):
            donor(tokens, use_cache=False)
        model.host(ids, use_cache=False)

    def decoded() -> None:
        model.generate(prompt, **how)

    def decoded_apart() -> None:
        """The host writes; every donor reads as many tokens as it would have read, one call per host token."""
        for donor, tokens, count in zip(model.donors, expanded, lengths, strict=True):
            cache = donor(tokens[:1, :32], use_cache=True).past_key_values
            each = -(-count // steps)
            for step in range(steps):
                donor(tokens[:1, 32 + step * each : 32 + (step + 1) * each], past_key_values=cache, use_cache=True)
        model.host.generate(prompt, **how)

    found = {}
    with torch.inference_mode():
        for name, one, other in (("scoring", together, apart), ("decoding", decoded, decoded_apart)):
            one()
            other()
            pairs = [(seconds(one), seconds(other)) for _ in range(repeats)]
            ratios = [b / a for a, b in pairs]
            found[f"{name}_ratio"] = round(statistics.median(ratios), 3)
            found[f"{name}_ratios"] = [round(one, 3) for one in ratios]
            found[f"{name}_s"] = round(statistics.median([a for a, _ in pairs]), 3)
    found["donor_tokens_per_host_token"] = [round(x.shape[1] / ids.shape[1], 2) for x in expanded]
    return found


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    main()
