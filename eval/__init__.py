"""Scores a model and compares results: lm-eval's tasks and metrics on a model class that computes shared prefixes once.

    >>> from eval import evaluate_mmlu, read_mmlu                                    # doctest: +SKIP
    >>> record, answers = evaluate_mmlu(source, read_mmlu(Path("mmlu")))             # doctest: +SKIP

Names are loaded when they are first used, so that `from eval import ...` costs only what it names. Never `import eval`: that
hides the builtin.
"""

import importlib
from typing import Any

_PUBLIC = {
    "question_texts": "activations",
    "Grid": "arithmetic.hugging_face", "read_grid": "arithmetic.hugging_face", "run_grid": "arithmetic.hugging_face",
    "read_published": "arithmetic.report",
    "Made": "arithmetic.run", "arithmetic_study": "arithmetic.run", "draw_arithmetic": "arithmetic.run",
    "run_arithmetic": "arithmetic.run",
    "Comparison": "compare", "Difference": "compare", "compare_results": "compare",
    "EvalError": "errors",
    "evaluate_mmlu": "evaluation", "evaluate_tasks": "evaluation",
    "Bench": "fusion_bench", "bench_fusion": "fusion_bench", "read_bench": "fusion_bench", "bench_report": "fusion_bench",
    "Subject": "mmlu", "read_mmlu": "mmlu",
    "write_report": "pipeline.report",
    "run_study": "pipeline.run",
    "Settings": "pipeline.settings", "make_settings": "pipeline.settings", "read_settings": "pipeline.settings",
    "Study": "pipeline.summary", "read_study": "pipeline.summary",
    "Projected": "projection_run", "project_weights": "projection_run",
    "Answer": "results", "read_results": "results",
    "dataset_texts": "run", "plain_text": "run",
    "Found": "search_run", "SearchSettings": "search_run", "search_alphas": "search_run",
    "Similarity": "similarity_run", "measure_similarity": "similarity_run",
}  # fmt: skip

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
