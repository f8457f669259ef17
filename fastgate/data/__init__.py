"""Tasks to tune and score a model on: GLUE, IMDB, entities, parts of speech, and the user's own files."""

from fastgate.data.load import load_files, load_task
from fastgate.data.task import Task

__all__ = ["Task", "load_files", "load_task"]
