"""Deciding: from scores to kept and dropped rows, in seconds and without a model."""
