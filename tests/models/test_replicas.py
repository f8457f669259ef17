"""Replicas, as nn.DataParallel makes them: modules without parameters, whose weights are plain attributes."""

import pytest
import torch
from helpers.encoders import batch, draw_replacements, make

import fastgate


def replicate(model):
    """What torch.nn.parallel.replicate does, on the CPU."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, replicas[child])
        for members in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, members).items():
                if tensor is None:
                    getattr(replica, members)[name] = None
                else:
                    setattr(replica, name, tensor.clone())
    return replicas[model]


@pytest.mark.parametrize("kind", ["zero", "mean", "affine", "shift"])
def test_a_replica_gives_what_the_model_gives(kind):
    model = fastgate.prune(make("Bert", "ForSequenceClassification"), keep=[1], replacement=kind)
    draw_replacements(model)
    inputs = batch(model, "ForSequenceClassification")
    with torch.no_grad():
        torch.testing.assert_close(
            replicate(model)(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-6
        )
