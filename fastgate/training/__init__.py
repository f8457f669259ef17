"""Fine-tuning on a task: a dense model first, then prunings of it, in a single run or in a sweep."""

from fastgate.training.model import dense_model, load_tokenizer

__all__ = ["dense_model", "load_tokenizer"]
