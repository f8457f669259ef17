"""The parts of a model that stand for torch modules, and the distribution of its gates."""
