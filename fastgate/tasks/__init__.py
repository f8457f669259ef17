"""Tasks to tune and score a model on: GLUE, IMDB, entities, parts of speech, and the user's own files."""

from .load import load_files, load_task
from .model import dense_model, load_tokenizer
from .task import Task

__all__ = ["Task", "dense_model", "load_files", "load_task", "load_tokenizer"]
