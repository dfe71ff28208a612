"""Scores a model and compares results: lm-eval's tasks and metrics on a model class that computes shared prefixes once."""
