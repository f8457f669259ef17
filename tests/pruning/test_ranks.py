"""The self-pruning Trainer in two real processes: both end with the model that one process ends with."""

import warnings

import pytest
import torch
from helpers import subprocesses
from helpers.trainer_runs import arguments, config, rows, trainer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastgate

pytestmark = pytest.mark.slow

# Name of a run -> what its arguments have besides. Each sees 8 rows a step in all, whatever the processes.
RUNS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True},
    "accumulation and checkpointing": {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
    "speed": {},
    "a rank without labels": {},
    "best": {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "score", "greater_is_better": True, "save_strategy": "steps",
        "save_steps": 2, "save_total_limit": 2,
    },
}  # fmt: skip


def token_rows(count=48):
    """Each second block of four rows, what rank 1 gets, has no label."""
    found = rows(count)
    for i, row in enumerate(found):
        labels = row["input_ids"] % 2
        row["labels"] = torch.full_like(labels, -100) if i // 4 % 2 else labels
    return found


def run(folder, name, world):
    tokens = name == "a rank without labels"
    options = dict(RUNS[name])
    steps = options.get("gradient_accumulation_steps", 1)

    def model(seed):
        set_seed(seed)
        head = BertForTokenClassification if tokens else BertForSequenceClassification
        sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
        quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return head(
            BertConfig(vocab_size=40, max_position_embeddings=16, initializer_range=0.3, **sizes, **quiet)
        )

    class Ordered(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            # transformers' own loss of a batch without a label is NaN.
            loss = outputs.loss if (inputs["labels"] != -100).any() else 0.0 * outputs.logits.sum()
            return (loss, outputs) if return_outputs else loss

    class InOrder(fastgate.SelfPruningMixin, Ordered):
        pass

    metrics = iter([0.9, 0.8, 0.7, 0.1, 0.3, 0.2])
    pruning = config(
        target=fastgate.Speedup(1.3) if name == "speed" else fastgate.Sparsity(0.67),
        distill=fastgate.Distill(swap=0.0, labels=1.0),
    )
    found = InOrder(
        model(0),
        arguments(
            folder, optim="sgd", learning_rate=1e-2, max_grad_norm=0.0,
            per_device_train_batch_size=8 // world // steps, **({"save_strategy": "no"} | options),
        ),
        pruning=pruning,
        teacher=model(5),
        train_dataset=token_rows() if tokens else rows(),
        eval_dataset=rows(16),
        compute_metrics=lambda prediction: {"score": next(metrics)},
    )  # fmt: skip
    found.train()
    state = found.pruner.state_dict()
    return {
        "weights": {key: value.clone() for key, value in found.model.state_dict().items()},
        "kept": found.pruner.kept,
        "log_alpha": state["learner"]["log_alpha"],
        "multipliers": state["learner"]["multipliers"],
        "history": state["history"],
        "gram": state["measured"]["gram"],
        "sizes": state["measured"]["sizes"],
        "costs": found.pruner.learner.costs,
        "best": found.state.best_model_checkpoint,
        "world": found.args.world_size,
    }


def run_all(folder, rank, world, port):
    """What a process does: every run, as a rank of `world`."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if world > 1:
        subprocesses.join(rank, world, port)
    ends = {name: run(f"{folder}/{name}", name, world) for name in RUNS}
    torch.save(ends, f"{folder}/end-{rank}.pt")
    if world > 1:
        subprocesses.leave()


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What each of two ranks, and a process by itself, ended with: run -> (rank 0, rank 1, alone)."""
    together, alone = (tmp_path_factory.mktemp(name) for name in ("together", "alone"))
    port = subprocesses.free_port()
    calls = [[str(together), rank, 2, port] for rank in (0, 1)]
    subprocesses.fork("pruning.test_ranks", "run_all", *calls, [str(alone), 0, 1, port])
    paths = [together / "end-0.pt", together / "end-1.pt", alone / "end-0.pt"]
    loaded = [torch.load(path, weights_only=False) for path in paths]
    return {name: [end[name] for end in loaded] for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_end_with_the_same_model(ends, name):
    first, second, _ = ends[name]
    assert first["world"] == second["world"] == 2
    for fact in ("kept", "history", "costs", "best"):
        assert first[fact] == second[fact], fact
    for fact in ("log_alpha", "multipliers", "gram", "sizes"):
        assert torch.equal(first[fact], second[fact]), fact
    assert first["weights"].keys() == second["weights"].keys()
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_end_as_one_process_does(ends, name):
    together, _, alone = ends[name]
    assert together["kept"] == alone["kept"] and alone["world"] == 1
    torch.testing.assert_close(together["sizes"], alone["sizes"])
    torch.testing.assert_close(together["gram"], alone["gram"], rtol=1e-4, atol=1e-4)
    if name == "a rank without labels":
        return  # a mean over each rank's labels is not the mean over all
    torch.testing.assert_close(together["log_alpha"], alone["log_alpha"], rtol=1e-2, atol=1e-2)
    for key, value in together["weights"].items():
        torch.testing.assert_close(value, alone["weights"][key], rtol=2e-2, atol=2e-3, msg=key)


def test_every_rank_loads_the_best_model_and_not_the_last(ends):
    first, _, alone = ends["best"]
    assert first["best"].endswith("/checkpoint-10") and alone["best"].endswith("/checkpoint-10")
    plain = ends["plain"][0]
    same = [torch.equal(value, plain["weights"][key]) for key, value in first["weights"].items()]
    assert plain["kept"] == first["kept"] and not all(
        same
    )  # the same run without a best model: the last step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters: got False, wanted None or True"),
        ({"ddp_static_graph": True}, "ddp_static_graph: got True, wanted None or False"),
        (
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": True},
            },
            "checkpointing_kwargs: got use_reentrant=True",
        ),
    ],
)
def test_settings_that_fail_in_several_processes_are_refused(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(fastgate.Unsupported, match=message):
        trainer(tmp_path, **settings)
