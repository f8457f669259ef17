"""BERT and RoBERTa of transformers: patching, pruning, freezing, and checkpoints of them."""
