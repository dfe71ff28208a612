"""What the YAML files beside this one call; lm-eval loads it by its path."""

from eval.arithmetic.text import documents

__all__ = ["documents"]
