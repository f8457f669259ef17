"""The command line: `fastgate demo | finetune | evaluate | sweep | report | explain | info | bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from typer.core import TyperGroup

from .errors import ArgumentError, DataError, FastgateError, say


class _Commands(TyperGroup):
    """Errors raised on purpose end a command with one line and exit status 1, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FastgateError as error:
            Console(stderr=True).print(
                f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
            )
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    help="Find out which self-attention a task does not need, remove it, and run what is left.",
)

Model = Annotated[str, typer.Option(help="A BERT or RoBERTa of the hub, or a folder with one.")]
TaskName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--task",
        help="sst2, cola, mrpc, stsb, qqp, mnli, qnli, rte, wnli, imdb, conll2003, wnut17, ptb, ud_ewt "
        "or ud_ewt_xpos.",
    ),
]
DataDir = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Read DIR/TASK/SPLIT.jsonl.gz; without it the hub's data set."),
]
EvaluateOn = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Splits to score together, by commas; by default the task's own."),
]
TaskType = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="For your own files: text, pair, regression or tokens."),
]
TrainFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--train", help="Your training rows (jsonl, json, csv, tsv)."),
]
ValidationFile = Annotated[Optional[Path], typer.Option("--validation", help="Your rows to score on.")]  # noqa: UP045
Columns = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Input columns of your files, by commas: text, text,text_pair or tokens."),
]
LabelColumn = Annotated[Optional[str], typer.Option(help="Label column of your files: label or tags.")]  # noqa: UP045
MaxTrainRows = Annotated[Optional[int], typer.Option(help="Train on this many rows, drawn by the seed.")]  # noqa: UP045
MaxEvalRows = Annotated[Optional[int], typer.Option(help="Score on this many rows, drawn by the seed.")]  # noqa: UP045
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxLength = Annotated[int, typer.Option(help="Tokens a row is cut at.")]
Stride = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Do not cut longer texts: windows of --max-length tokens that share so many."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows a batch.")]


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _load(
    name: str | None,
    data_dir: Path | None,
    kind: str | None,
    train: Path | None,
    validation: Path | None,
    columns: str | None,
    label_column: str | None,
    evaluate_on: str | None,
    labels: list[str],
    max_train_rows: int | None,
    max_eval_rows: int | None,
    seed: int,
) -> Any:
    """The task that the data options describe: a name, or a type with files."""
    from .tasks import load_files, load_task

    remedy = "pass --task NAME, or --task-type with --train and --validation"
    rows: dict[str, Any] = {"max_train_rows": max_train_rows, "max_eval_rows": max_eval_rows, "seed": seed}
    if name is not None and kind is None:
        return load_task(name, data_dir, evaluate_on=_split(evaluate_on), **rows)
    known = train is not None or labels or kind == "regression"
    if name is None and kind is not None and validation is not None and known:
        return load_files(
            kind, train, validation, columns=_split(columns), target=label_column, labels=labels, **rows
        )
    given = [
        o
        for o, v in (
            ("--task", name),
            ("--task-type", kind),
            ("--train", train),
            ("--validation", validation),
        )
        if v
    ]
    raise DataError(say("fastgate", "data", ", ".join(given) or "nothing", "one task", remedy))


@app.command()
def demo(
    task: TaskName = None,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the report.")] = Path(
        "fastgate-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Fine-tune, self-prune and compare a small BERT on text this machine has, in minutes."""
    from .demo import demo as run

    run(out, Console(), task_name=task, data_dir=data_dir, seed=seed)


@app.command()
def finetune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the dense and the pruned model.")],
    task: TaskName = None,
    data_dir: DataDir = None,
    task_type: TaskType = None,
    train: TrainFile = None,
    validation: ValidationFile = None,
    columns: Columns = None,
    label_column: LabelColumn = None,
    evaluate_on: EvaluateOn = None,
    target_sparsity: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Share of the attention sublayers to remove; 0.8 if no target is given."),
    ] = None,
    target_speedup: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="How many times cheaper the encoder shall be."),
    ] = None,
    max_drop: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Instead: the largest cut that costs at most this share of the score."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes of the dense fine-tune.")] = 3.0,
    prune_epochs: Annotated[float, typer.Option(help="Passes of the pruning, search and recovery.")] = 3.0,
    batch_size: BatchSize = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the weights.")] = 5e-5,
    max_length: MaxLength = 128,
    stride: Stride = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Train in bfloat16 by autocast; faster where the machine has it.")
    ] = False,
    pooling: Annotated[
        str, typer.Option(help="What the pooler of a text classifier reads: first (token 0) or mean (all).")
    ] = "first",
    max_train_rows: MaxTrainRows = None,
    max_eval_rows: MaxEvalRows = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
) -> None:
    """Fine-tune a dense model, prune it while tuning on, and save both with their scores."""
    from .display import Display
    from .memory import bound_compiled_products
    from .tasks.recipes import Recipe
    from .tasks.recipes import finetune as run

    bound_compiled_products()
    console = Console()
    loaded = _load(
        task, data_dir, task_type, train, validation, columns, label_column, evaluate_on, [], max_train_rows,
        max_eval_rows, seed,
    )  # fmt: skip
    if target_sparsity is None and target_speedup is None and max_drop is None:
        target_sparsity = 0.8
    data = {
        "data_dir": data_dir, "task_type": task_type, "train": train, "validation": validation,
        "columns": columns, "label_column": label_column, "max_train_rows": max_train_rows,
        "max_eval_rows": max_eval_rows, "evaluate_on": list(loaded.evaluate_on),
    }  # fmt: skip
    data = {key: str(value) if isinstance(value, Path) else value for key, value in data.items()}
    recipe = Recipe(
        model=model, task=loaded.name, sparsity=target_sparsity, speedup=target_speedup, max_drop=max_drop,
        epochs=epochs, prune_epochs=prune_epochs, batch_size=batch_size, lr=lr, max_length=max_length,
        stride=stride, pooling=pooling, bf16=bf16, seed=seed,
        data={key: value for key, value in data.items() if value is not None},
    )  # fmt: skip
    with Display(console) as display:
        result = run(recipe, loaded, out, resume=resume, listener=display)
    dense, pruned, metric = result["dense"], result["pruned"], result["metric"]
    console.print(f"dense  {metric} {dense['score']:.4f}, every attention", highlight=False)
    kept = f"attention kept in {pruned['kept']} of {pruned['layers']} layers"
    console.print(f"pruned {metric} {pruned['score']:.4f}, {kept}", highlight=False)
    console.print(
        f"see {out / 'result.json'}; load it with fastgate.load({str(out / 'pruned')!r})", soft_wrap=True
    )


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(help="A fastgate checkpoint, or a fine-tuned model in a folder.")],
    task: TaskName = None,
    data_dir: DataDir = None,
    task_type: TaskType = None,
    train: TrainFile = None,
    validation: ValidationFile = None,
    columns: Columns = None,
    label_column: LabelColumn = None,
    evaluate_on: EvaluateOn = None,
    batch_size: BatchSize = 64,
    max_length: MaxLength = 128,
    stride: Stride = None,
    max_eval_rows: MaxEvalRows = None,
    as_json: AsJson = False,
) -> None:
    """Score a model on a task."""
    from .tasks import load_tokenizer
    from .tasks.score import check_fits, class_names, read_model, score

    model = read_model(path)
    names = [] if task_type is None else class_names(model, task_type)
    loaded = _load(
        task, data_dir, task_type, train, validation, columns, label_column, evaluate_on,
        names, None, max_eval_rows, 0,
    )  # fmt: skip
    check_fits(model, loaded)
    tokenizer = load_tokenizer(path, loaded)
    rows = loaded.tokenize(tokenizer, max_length, stride)["evaluation"]
    scores = score(model, loaded, rows, loaded.collator(tokenizer), batch_size)
    if as_json:
        typer.echo(
            json.dumps({"task": loaded.name, "rows": len(rows), "metric": loaded.metric, "scores": scores})
        )
        return
    console = Console(highlight=False)
    console.print(f"{loaded.name}: {len(rows)} rows of {', '.join(loaded.evaluate_on)}")
    for name, value in scores.items():
        console.print(f"  {name} {value:.4f}" + ("  (main metric)" if name == loaded.metric else ""))


@app.command()
def sweep(
    recipe: Annotated[
        Path, typer.Argument(help="YAML: tasks, seeds, runs, settings, as in bench/tasks.yaml.")
    ],
    data_dir: DataDir = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="In place of the recipe's."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Results, a JSON line a run.")] = Path("tasks.jsonl"),
    work: Annotated[Path, typer.Option(help="Folder for dense models and trainings under way.")] = Path(
        "sweep-work"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Processes; cores and GPUs are shared.")] = 1,
    left: Annotated[bool, typer.Option("--left", help="Print the runs that are left, and do none.")] = False,
) -> None:
    """Methods, sparsities and seeds on tasks. Called again, it goes on where it was cut off."""
    from .memory import bound_compiled_products
    from .tasks import sweep as sweeps
    from .tasks.settings import read_recipe

    bound_compiled_products()
    runs = read_recipe(recipe, model)
    if left:
        for run in sweeps.left(runs, out):
            typer.echo(json.dumps(run.identity))
        return
    if workers > 1:
        again = [
            "sweep",
            recipe,
            "--out",
            out,
            "--work",
            work,
            *(["--data-dir", data_dir] if data_dir else []),
        ]
        raise typer.Exit(sweeps.run_workers([str(part) for part in again], workers))
    sweeps.sweep(runs, data_dir, out, work, tell=Console(highlight=False, soft_wrap=True).print)


@app.command()
def report(
    lines: Annotated[Path, typer.Argument(help="What `fastgate sweep` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for tables.md and the plots.")] = Path("report"),
    data_dir: DataDir = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time each choice of layers here first, by `fastgate bench`.")
    ] = False,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="One table, of this recipe's tasks and cuts."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, to measure in.")] = "float32",
) -> None:
    """Tables and plots of a sweep: scores, paired differences to dense, speed-ups, what survives."""
    from .summary import write

    write(lines, out, data_dir, measure, Console(stderr=True), recipe, dtype)
    Console(highlight=False, soft_wrap=True).print((out / "tables.md").read_text(), markup=False)


@app.command()
def explain(
    path: Annotated[
        Path, typer.Argument(help="A fastgate checkpoint, or a model in a folder or of the hub.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show what runs, layer by layer: live rows, steps, share of the FLOPs."""
    from .explain import explain as run
    from .tasks.score import read_model

    found = run(read_model(path))
    typer.echo(json.dumps(found.to_dict()) if as_json else str(found))


@app.command()
def info(as_json: AsJson = False) -> None:
    """Show versions, the build, and which implementation runs each op here, and why."""
    from .info import collect, render

    found = collect()
    typer.echo(json.dumps(found) if as_json else render(found))


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="minilm, bert-base or bert-large (random weights), a checkpoint, or a model.")
    ],
    task: Annotated[str, typer.Option(help="Whose evaluation rows to run.")],
    data_dir: DataDir = None,
    against: Annotated[
        str, typer.Option(help="Peers, by commas: sdpa, eager, compile, onnxruntime, openvino.")
    ] = "sdpa,eager",
    keep: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Layers whose attention stays, by commas; all by default."),
    ] = None,
    batch_size: BatchSize = 32,
    batches: Annotated[int, typer.Option(min=1, help="Number of batches.")] = 8,
    order: Annotated[str, typer.Option(help="data: rows as they come; length: sorted by length.")] = "data",
    threads: Annotated[Optional[int], typer.Option(min=1, help="CPU threads.")] = None,  # noqa: UP045
    max_length: MaxLength = 128,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for everyone.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Time fastgate and its peers on the same real batches in turn, once their outputs are found equal."""
    from .compare import bench as run
    from .compare import bench_table

    layers = None if keep is None else [_layer(part) for part in _split(keep)]
    found = run(
        model, task, data_dir, against=_split(against), keep=layers, batch_size=batch_size, batches=batches,
        order=order, threads=threads, max_length=max_length, console=Console(stderr=True), dtype=dtype,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        Console(highlight=False).print(bench_table(found))


def _layer(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentError(say("bench", "keep", repr(text), "layer indices", "pass e.g. --keep 0,4,8"))
    return int(text)


def main() -> None:
    """The entry point of the `fastgate` command."""
    app()


if __name__ == "__main__":
    main()
