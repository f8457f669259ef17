"""`fastgate finetune`: a dense fine-tune and a self-pruning, with the scores of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgate.cli.command_group import print_note, resume_hint
from fastgate.cli.options import (
    BatchSize,
    Columns,
    DataDir,
    DataOptions,
    EvaluateOn,
    LabelColumn,
    MaxEvalRows,
    MaxLength,
    MaxTrainRows,
    Model,
    Seed,
    Stride,
    TaskName,
    TaskType,
    TrainFile,
    ValidationFile,
    check_number,
    expand_path,
)
from fastgate.cli.progress import Display, console
from fastgate.errors import ArgumentError, format_error
from fastgate.training.setting_ranges import option_of

if TYPE_CHECKING:
    from fastgate.training.config import FinetuneConfig
    from fastgate.training.targets import RunTarget

Out = Annotated[Path, typer.Option(help="Folder for the dense and the pruned model.", callback=expand_path)]
TargetSparsity = Annotated[
    float | None,
    typer.Option(
        help="Share of the attention sublayers to remove; 0.8 if no target is given.", callback=check_number
    ),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        help="Target: divide the encoder's FLOPs by this factor. Replaces --target-sparsity.",
        callback=check_number,
    ),
]
MaxDropShare = Annotated[
    float | None,
    typer.Option(
        help="Target: remove as much as possible while at most this share of the score is lost. Replaces "
        "--target-sparsity.",
        callback=check_number,
    ),
]
Epochs = Annotated[float, typer.Option(help="Epochs of the dense fine-tune.", callback=check_number)]
PruneEpochs = Annotated[
    float, typer.Option(help="Epochs of the pruning, search and recovery together.", callback=check_number)
]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.", callback=check_number)]
Bf16 = Annotated[
    bool, typer.Option("--bf16", help="Train in bfloat16 by autocast; faster on hardware that supports it.")
]
Pooling = Annotated[
    str, typer.Option(help="What the pooler of a text classifier reads: first (token 0) or mean (all).")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Resume the run in --out. Until its pruning has begun, the target may change."
    ),
]


def finetune(  # typer reads the options from the signature
    model: Model,
    out: Out,
    task: TaskName = None,
    data_dir: DataDir = None,
    task_type: TaskType = None,
    train: TrainFile = None,
    validation: ValidationFile = None,
    columns: Columns = None,
    label_column: LabelColumn = None,
    evaluate_on: EvaluateOn = None,
    target_sparsity: TargetSparsity = None,
    target_speedup: TargetSpeedup = None,
    max_drop: MaxDropShare = None,
    epochs: Epochs = 3.0,
    prune_epochs: PruneEpochs = 3.0,
    batch_size: BatchSize = 32,
    lr: LearningRate = 5e-5,
    max_length: MaxLength = 128,
    stride: Stride = None,
    bf16: Bf16 = False,
    pooling: Pooling = "first",
    max_train_rows: MaxTrainRows = None,
    max_eval_rows: MaxEvalRows = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Fine-tune a dense model, prune it while training continues, and save both with their scores."""
    from fastgate.training.config import FinetuneConfig, check_pooling

    target = _target(sparsity=target_sparsity, speedup=target_speedup, max_drop=max_drop)
    check_pooling("finetune", "--pooling", pooling)
    config = FinetuneConfig(
        model=model, task="", target=target, max_length=max_length, stride=stride, pooling=pooling,
        batch_size=batch_size, bf16=bf16, seed=seed, dense_epochs=epochs, prune_epochs=prune_epochs,
        dense_lr=lr, prune_lr=lr,
    )  # fmt: skip
    data = DataOptions(
        task=task, data_dir=data_dir, task_type=task_type, train=train, validation=validation,
        columns=columns, label_column=label_column, evaluate_on=evaluate_on, max_train_rows=max_train_rows,
        max_eval_rows=max_eval_rows,
    )  # fmt: skip
    _run(config, data, out, resume)


def _target(**numbers: float | None) -> RunTarget:
    """The target of the options. Raises ArgumentError for several."""
    from fastgate.pruning import Sparsity
    from fastgate.training.targets import key_of, targets_in

    targets = targets_in(numbers)
    if len(targets) > 1:
        got = " and ".join(option_of(key_of(target)) for target in targets)
        options = "--target-sparsity, --target-speedup, --max-drop"
        raise ArgumentError(format_error("finetune", options, got, "one of them", "pass only one"))
    return targets[0] if targets else Sparsity(0.8)


def _run(config: FinetuneConfig, data: DataOptions, out: Path, resume: bool) -> None:
    from fastgate.training.finetune import finetune as run_finetune
    from fastgate.training.model import model_source
    from fastgate.training.run_folder import RUN, check_free

    check_free(out, resume)
    model_source(config.model, "--model", ("dense", "pruned"))

    def hint() -> str:
        if (out / RUN).is_file():
            return "run the same command with --resume to continue from the last checkpoint"
        return f"nothing was written to {out}"

    with resume_hint(hint):
        task = data.load("finetune", labels=[], seed=config.seed)
        sources = {**data.sources, "evaluate_on": list(task.evaluate_on)}
        config = replace(config, task=task.name, data=sources)
        with Display(console()) as display:
            result = run_finetune(config, task, out, resume=resume, listener=display, tell=print_note)
    print_result(result, out)


def print_result(result: dict[str, Any], out: Path) -> None:
    """Print the scores of a finished run, and whether the search told the layers apart."""
    screen = console()
    dense, pruned, metric = result["dense"], result["pruned"], result["metric"]
    kept = f"attention kept in {pruned['kept']} of {pruned['layers']} layers"
    for line in (
        f"dense  {metric} {dense['score']:.4f}, every attention",
        f"pruned {metric} {pruned['score']:.4f}, {kept}",
        f"see {out / 'result.json'}; load it with fastgate.load({str(out / 'pruned')!r})",
    ):
        screen.print(line, soft_wrap=True)
    if pruned.get("separated") is False:
        print_note(
            f"the search did not tell the layers apart (margin {pruned.get('margin', 0.0):.3f}): the choice "
            "may follow their order; another --prune-epochs or --target-sparsity may find a better one"
        )
