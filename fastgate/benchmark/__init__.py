"""Timing a model against other runtimes on the same batches."""
