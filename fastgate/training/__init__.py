"""Fine-tuning on a task: a dense model first, then prunings of it, one at a time or in sweeps."""

from fastgate.training.model import dense_model, load_tokenizer

__all__ = ["dense_model", "load_tokenizer"]
