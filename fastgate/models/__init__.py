"""BERT and RoBERTa of transformers: patching, pruning, freezing, and checkpoints of them."""

from fastgate.models import auto_classes  # noqa: F401  tells the Auto classes of transformers about pruned models
