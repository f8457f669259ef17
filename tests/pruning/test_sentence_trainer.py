"""Self-pruning in the trainers of sentence-transformers, whose losses run the model themselves."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import subprocesses, tiny_models
from torch import nn
from transformers import TrainerCallback

import fastgate
from fastgate.errors import ArgumentError, Unsupported
from fastgate.pruning import Distill
from fastgate.pruning.sentences import is_sentence_model, watching

pytestmark = pytest.mark.slow

STEPS = 20
ROWS = [
    {"sentence1": "a good film", "sentence2": "the film was good", "score": 1.0},
    {"sentence1": "a bad plot", "sentence2": "paris", "score": 0.0},
    {"sentence1": "she went to london", "sentence2": "he went in", "score": 0.7},
    {"sentence1": "one two three", "sentence2": "it is very bad", "score": 0.1},
] * 8


def parts():
    """What is used of sentence-transformers, and the data; or skips."""
    pytest.importorskip("sentence_transformers")
    import sentence_transformers
    from datasets import Dataset
    from sentence_transformers import cross_encoder
    from sentence_transformers.sentence_transformer import losses, modules

    return sentence_transformers, cross_encoder, losses, modules, Dataset.from_list(ROWS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.model_folder(tmp_path_factory.mktemp("model"))


def embedder(folder, seed=0, dropout=None):
    _, _, _, modules, _ = parts()
    library = parts()[0]
    found = library.SentenceTransformer(
        modules=[modules.Transformer(str(folder)), modules.Pooling(32, "mean")], device="cpu"
    )
    torch.manual_seed(seed)
    for name, p in found.named_parameters():
        nn.init.normal_(p, mean=float("LayerNorm.weight" in name), std=0.1)
    for module in found.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout
    return found


def config(**options):
    return fastgate.PruningConfig(fastgate.Sparsity(0.67), gate_lr=0.3, **options)


def trainer(folder, tmp_path, loss=None, teacher=None, pruning=None, model=None, **options):
    library, _, losses, _, data = parts()

    class Pruning(fastgate.SelfPruningMixin, library.SentenceTransformerTrainer):
        pass

    model = model or embedder(folder)
    given = dict(
        output_dir=str(tmp_path / "out"), max_steps=STEPS, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    data = data if "Cosine" in (loss or "Cosine") else data.remove_columns("score")
    return Pruning(
        model=model,
        args=library.SentenceTransformerTrainingArguments(**(given | options)),
        train_dataset=data,
        eval_dataset=data,
        loss=getattr(losses, loss or "CosineSimilarityLoss")(model),
        pruning=pruning or config(),
        teacher=teacher,
    )


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("loss", ["CosineSimilarityLoss", "MultipleNegativesRankingLoss"])
def test_an_embedding_model_is_pruned(folder, tmp_path, taught, loss):
    found = trainer(folder, tmp_path, loss, embedder(folder, seed=1) if taught else None)
    found.train()
    pruner = found.pruner
    assert len(pruner.kept) == 1 and sum(pruner.handle.is_removed(i) for i in range(3)) == 2
    assert pruner.learner.log_alpha.detach().std() > 0
    embeddings = found.model.encode(["a good film", "paris"])
    assert embeddings.shape == (2, 32) and (pruner.teacher_seconds > 0)


def test_accumulated_steps_are_one_draw(folder, tmp_path):
    found = trainer(folder, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    found.train()
    assert found.pruner.steps == STEPS and len(found.pruner.kept) == 1


def test_each_forward_of_the_loss_is_distilled(folder, tmp_path):
    """The mean over both columns of: hidden states layer by layer, and one minus the cosine."""
    student, teacher = embedder(folder, dropout=0.0), embedder(folder, seed=1, dropout=0.0)
    plain, taught = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    found = trainer(
        folder, tmp_path, teacher=teacher, model=student, pruning=config(distill=Distill(swap=0.0))
    )
    found.pruner.plan_steps(STEPS)
    inputs = next(iter(found.get_train_dataloader()))
    columns, labels = found.collect_features(inputs)
    expected, embeddings = [], []
    for features in columns:
        mask = features["attention_mask"].bool()
        outputs = []
        for model in (plain, taught):
            bert = model[0].model
            states = bert(features["input_ids"], features["attention_mask"], output_hidden_states=True)
            rows = [h[mask] for h in states.hidden_states[1:]]
            outputs.append((rows, model(dict(features))["sentence_embedding"]))
        (mine, embedded), (theirs, known) = outputs
        hidden = torch.stack([F.mse_loss(a, b) for a, b in zip(mine, theirs, strict=True)]).mean()
        expected.append(2.0 * hidden + 1.0 - F.cosine_similarity(embedded, known).mean())
        embeddings.append(embedded)
    task = F.mse_loss(torch.cosine_similarity(*embeddings), labels.float())
    loss = found.compute_loss(found.model.train(), inputs)
    torch.testing.assert_close(loss, 0.3 * task + sum(expected) / 2, rtol=1e-3, atol=1e-5)


def test_a_copy_teaches_nothing(folder, tmp_path):
    student = embedder(folder, dropout=0.0)
    distill = Distill(labels=0.0, swap=0.0)
    teacher = copy.deepcopy(student)
    found = trainer(folder, tmp_path, teacher=teacher, model=student, pruning=config(distill=distill))
    found.pruner.plan_steps(STEPS)
    loss = found.compute_loss(found.model.train(), next(iter(found.get_train_dataloader())))
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-5)


def test_tokens_are_swapped_for_student_and_teacher_alike(folder, tmp_path):
    teacher = embedder(folder, seed=1)
    found = trainer(folder, tmp_path, teacher=teacher, pruning=config(distill=Distill(swap=0.9)))
    seen = {"student": [], "teacher": []}
    for name, model in (("student", found.model), ("teacher", teacher)):
        forward = model[0].forward
        model[0].forward = lambda features, name=name, forward=forward, **kw: (
            seen[name].append(features["input_ids"].clone()),
            forward(features, **kw),
        )[1]
    found.train()
    assert len(seen["student"]) == len(seen["teacher"]) == 2 * STEPS
    pairs = zip(seen["student"], seen["teacher"], strict=True)
    # In a step the student runs both columns before the teacher does, and both lists have them in order.
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    original = {tuple(row.tolist()) for i in range(1) for column in seen["student"][:2] for row in column}
    assert any(tuple(row.tolist()) not in original for column in seen["student"][2:] for row in column)


def test_a_loss_that_caches_gradients_is_pruned_without_distillation(folder, tmp_path):
    loss = "CachedMultipleNegativesRankingLoss"
    with pytest.raises(Unsupported, match=r"distill: got forwards without gradient.*distill=None"):
        trainer(folder, tmp_path, loss).train()
    found = trainer(folder, tmp_path, loss, pruning=config(distill=None))
    found.train()
    assert len(found.pruner.kept) == 1


@pytest.mark.parametrize("around", ["MatryoshkaLoss", "AdaptiveLayerLoss"])
def test_a_loss_that_replaces_forwards_is_distilled_where_the_encoder_ran(folder, tmp_path, around):
    losses = parts()[2]
    model = embedder(folder)
    found = trainer(folder, tmp_path, "MultipleNegativesRankingLoss", embedder(folder, seed=1), model=model)
    inside = losses.MultipleNegativesRankingLoss(model)
    arguments = ([32, 16],) if around == "MatryoshkaLoss" else ()
    found.loss = getattr(losses, around)(model, inside, *arguments)
    found.train()
    assert len(found.pruner.kept) == 1 and found.pruner.teacher_seconds > 0


def test_a_forward_without_gradient_is_measured_and_not_distilled(folder, tmp_path):
    found = trainer(folder, tmp_path, pruning=config(distill=None))
    found.pruner.plan_steps(STEPS)
    inputs = next(iter(found.get_train_dataloader()))
    features = found.collect_features(inputs)[0][0]
    with watching(found.model, found.pruner) as forwards, torch.no_grad():
        found.model.train()(dict(features))
    assert [forward.has_gradient for forward in forwards] == [False]
    assert float(found.pruner.calibration.sizes[0]) == float(features["attention_mask"].sum())


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("taught", [True, False])
def test_a_cross_encoder_is_pruned(folder, tmp_path, labels, taught):
    _, library, _, _, data = parts()

    class Pruning(fastgate.SelfPruningMixin, library.CrossEncoderTrainer):
        pass

    def model():
        torch.manual_seed(0)
        return library.CrossEncoder(str(folder), num_labels=labels, device="cpu")

    if labels > 1:
        data = data.map(lambda row: {"label": int(2 * row["score"])}, remove_columns="score")
    arguments = library.CrossEncoderTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=STEPS, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    found = Pruning(
        model=model(),
        args=arguments,
        train_dataset=data,
        pruning=config(),
        teacher=model() if taught else None,
    )
    found.train()
    assert len(found.pruner.kept) == 1 and found.pruner.teacher_seconds > 0
    assert len(found.model.predict([("a good film", "bad"), ("paris", "london")])) == 2


def test_a_teacher_of_another_kind_is_refused(folder, tmp_path):
    library = parts()[1]
    teacher = library.CrossEncoder(str(folder), num_labels=1, device="cpu")
    with pytest.raises(
        ArgumentError, match="teacher: got ForSequenceClassification with 1 labels, wanted no head"
    ):
        trainer(folder, tmp_path, teacher=teacher)


def ends_alike(first, second):
    assert first.pruner.kept == second.pruner.kept
    assert first.pruner.history == second.pruner.history
    other = second.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.model.state_dict().items())


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    found = trainer(folder, tmp_path_factory.mktemp("whole"), save_strategy="steps", save_steps=4)
    found.train()
    return found


@pytest.mark.parametrize("left", [4, 12])
def test_a_training_of_an_embedding_model_is_resumed(folder, whole, tmp_path, left):
    """In the search, and after hardening."""
    again = trainer(folder, tmp_path)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{left}")
    ends_alike(whole, again)


def test_the_best_embedding_model_is_loaded(folder, tmp_path):
    scores = iter([0.9, 0.1, 0.3, 0.2, 0.1])

    class Evaluator:
        def __call__(self, model, *args, **kwargs):
            return {"score": next(scores)}

    evaluate = dict(eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4)
    best = dict(load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True)
    found = trainer(folder, tmp_path, **evaluate, **best)
    found.evaluator = Evaluator()
    weights = {}

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 12:
                weights.update({name: value.clone() for name, value in found.model.state_dict().items()})

    found.add_callback(Note())
    found.train()
    assert found.state.best_global_step == 12 and len(found.pruner.kept) == 1
    assert all(torch.equal(value, weights[name]) for name, value in found.model.state_dict().items())


def test_models_of_transformers_are_called_as_ever(folder):
    from helpers.training_loop import bert

    assert is_sentence_model(embedder(folder)) and not is_sentence_model(bert())


def train_as_rank(folder, tmp_path, rank, port):
    torch.set_num_threads(1)
    subprocesses.join(rank, 2, port)
    folder, tmp_path = Path(folder), Path(tmp_path)
    found = trainer(folder, tmp_path, teacher=embedder(folder, seed=1), max_steps=12)
    found.train()
    torch.save([found.pruner.kept, found.model.state_dict()], tmp_path / f"end-{rank}.pt")
    subprocesses.leave()


def test_two_processes_end_with_the_same_embedding_model(folder, tmp_path):
    parts()
    port = subprocesses.free_port()
    calls = [[str(folder), str(tmp_path), rank, port] for rank in (0, 1)]
    lazy = "datasets sentence_transformers.cross_encoder sentence_transformers.sentence_transformer.losses"
    subprocesses.fork("pruning.test_sentence_trainer", "train_as_rank", *calls, imports=lazy)
    (kept, first), (other, second) = (torch.load(tmp_path / f"end-{rank}.pt") for rank in (0, 1))
    assert kept == other and len(kept) == 1
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not os.path.exists(tmp_path / "out" / "checkpoint-12")
