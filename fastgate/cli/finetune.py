"""`fastgate finetune`: a dense fine-tune and a self-pruning, with the scores of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fastgate.cli.command_group import print_note, resume_hint, typed_command
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
    choice_of,
    expand_path,
)
from fastgate.cli.progress import Display, console
from fastgate.errors import ArgumentError, format_error
from fastgate.extras import need
from fastgate.nn.choices import POOLINGS, Pooling
from fastgate.training.setting_ranges import DEFAULT_SPARSITY, option_of

if TYPE_CHECKING:
    from fastgate.training.config import FinetuneConfig

Out = Annotated[
    Path,
    typer.Option(
        help="New folder for the dense model, the pruned model and their scores.", callback=expand_path
    ),
]
TargetSparsity = Annotated[
    float | None,
    typer.Option(
        help=f"Share of the attention sublayers to remove, rounded to whole layers. Default: "
        f"{DEFAULT_SPARSITY}. It takes one pruning run, and MiniLM-L6 kept 98% to 102% of its dense score "
        f"on seven tasks, on average of three seeds.",
        callback=check_number,
    ),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        help="Remove attention until the FLOPs of the encoder are divided by this factor, for example 2.0. "
        "Use instead of --target-sparsity.",
        callback=check_number,
    ),
]
MaxDropShare = Annotated[
    float | None,
    typer.Option(
        help="Remove as much attention as possible while the score falls by at most this share, for example "
        "0.01. It takes several pruning runs, which are compared on held-out training rows. Use instead of "
        "--target-sparsity.",
        callback=check_number,
    ),
]
Epochs = Annotated[float, typer.Option(help="Epochs of the dense fine-tune.", callback=check_number)]
PruneEpochs = Annotated[
    float,
    typer.Option(help="Epochs of the pruning run: search and recovery together.", callback=check_number),
]
LearningRate = Annotated[
    float, typer.Option(help="Peak learning rate of both trainings.", callback=check_number)
]
Bf16 = Annotated[
    bool, typer.Option("--bf16", help="Train in bfloat16 with autocast. Weights and scores stay in float32.")
]
PoolingName = Annotated[
    str,
    typer.Option(
        help="What a text classifier reads: first (token 0) or mean (the mean over all tokens).",
        callback=choice_of(*POOLINGS),
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the run in --out from its last checkpoint. The target may change until pruning has "
        "begun.",
    ),
]


def finetune(  # typer reads the options from the signature
    context: typer.Context,
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
    pooling: PoolingName = "first",
    max_train_rows: MaxTrainRows = None,
    max_eval_rows: MaxEvalRows = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Fine-tune a dense model, prune it while training continues, and save both models with their scores."""
    numbers = {"sparsity": target_sparsity, "speedup": target_speedup, "max_drop": max_drop}
    _check_one_target(numbers)
    need("finetune", "train")
    from fastgate.training.config import FinetuneConfig
    from fastgate.training.targets import DEFAULT_TARGET, targets_in

    (target,) = targets_in(numbers) or [DEFAULT_TARGET]
    config = FinetuneConfig(
        model=model, task="", target=target, max_length=max_length, stride=stride,
        pooling=cast(Pooling, pooling),
        batch_size=batch_size, bf16=bf16, seed=seed, dense_epochs=epochs, prune_epochs=prune_epochs,
        dense_lr=lr, prune_lr=lr,
    )  # fmt: skip
    data = DataOptions(
        task=task, data_dir=data_dir, task_type=task_type, train=train, validation=validation,
        columns=columns, label_column=label_column, evaluate_on=evaluate_on, max_train_rows=max_train_rows,
        max_eval_rows=max_eval_rows,
    )  # fmt: skip
    _run(context, config, data, out, resume)


def _check_one_target(numbers: Mapping[str, float | None]) -> None:
    """Raises ArgumentError for several targets."""
    given = [option_of(name) for name, number in numbers.items() if number is not None]
    if len(given) > 1:
        options = "--target-sparsity, --target-speedup, --max-drop"
        got = " and ".join(given)
        raise ArgumentError(format_error("finetune", options, got, "one of them", "pass only one"))


def _run(context: typer.Context, config: FinetuneConfig, data: DataOptions, out: Path, resume: bool) -> None:
    from fastgate.training.finetune import finetune as run_finetune
    from fastgate.training.model import model_source
    from fastgate.training.run_folder import RUN, check_free

    check_free(out, resume)
    model_source(config.model, "--model", ("dense", "pruned"))

    def hint() -> str:
        if (out / RUN).is_file():
            return f"continue from the last checkpoint with: {typed_command(context, '--resume')}"
        return f"nothing was written to {out}"

    with resume_hint(hint):
        task = data.load("finetune", labels=[], seed=config.seed)
        sources = {**data.sources, "evaluate_on": list(task.evaluate_on)}
        config = replace(config, task=task.name, data=sources)
        with Display(console()) as display:
            result = run_finetune(
                config, task, out, resume=resume, listener=display, tell=print_note, announce=display.print
            )
    print_result(result, out)


def print_result(result: dict[str, Any], out: Path) -> None:
    """Print the scores of a finished run, and whether the search told the layers apart."""
    screen = console()
    dense, pruned, metric = result["dense"], result["pruned"], result["metric"]
    kept = f"attention kept in {pruned['kept']} of {pruned['layers']} layers"
    for line in (
        f"dense  {metric} {dense['score']:.4f}, attention in all {pruned['layers']} layers",
        f"pruned {metric} {pruned['score']:.4f}, {kept}",
        f"see {out / 'result.json'}; load it with fastgate.load({str(out / 'pruned')!r})",
    ):
        screen.print(line, soft_wrap=True)
    if pruned.get("separated") is False:
        print_note(
            f"the search did not tell the layers apart (margin {pruned.get('margin', 0.0):.3f}): the choice "
            "may follow their order; another --prune-epochs or --target-sparsity may find a better one"
        )
