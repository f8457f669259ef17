"""The command line: `fastgate demo | finetune | evaluate | sweep | report | explain | info | bench`."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional, TextIO

import typer
from typer.core import TyperGroup

from fastgate.cli.progress import console, print_what_cannot_be_encoded_as_escapes
from fastgate.errors import ArgumentError, DataError, FastgateError, format_error
from fastgate.training.setting_ranges import RANGES, option_of

_UsageError = typer.BadParameter.__base__  # of whichever click typer brings
_FAULT = "a fault of fastgate's own; please report it with this traceback and the output of `fastgate info`"


def _end(message: object, status: int) -> NoReturn:
    """End the command with one line on stderr."""
    line = " ".join(str(message).split())
    console(stderr=True).print(f"error: {line}", style="red", soft_wrap=True)
    raise typer.Exit(status)


def _end_usage(error: Any) -> NoReturn:
    command = error.ctx.command_path if error.ctx else "fastgate"
    _end(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What is worth knowing of a result, in one line and without the place in the code; no other warnings."""
    if issubclass(category, RuntimeWarning | UserWarning):
        console(stderr=True).print(f"warning: {' '.join(str(message).split())}", soft_wrap=True)


class _Commands(TyperGroup):
    """How every command ends: status 0 done, 1 refused or stopped by the system, 2 wrong usage, 130 Ctrl-C.

    Each but the first prints one line that says why; a traceback is a fault of fastgate.
    """

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except _UsageError as error:  # type: ignore[misc]
            if type(error).__name__ == "NoArgsIsHelpError":  # it shows the help
                raise
            _end_usage(error)

    def invoke(self, ctx: Any) -> Any:
        print_what_cannot_be_encoded_as_escapes()
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except FastgateError as error:
            _end(error, 1)
        except _UsageError as error:  # type: ignore[misc]
            _end_usage(error)
        except KeyboardInterrupt as error:
            _end(f"interrupted{_hint(error)}", 130)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            reason = error.strerror or str(error).strip().splitlines()[0]
            where = "" if error.filename is None else f"{error.filename}: "
            _end(f"{where}{reason}{_hint(error)}", 1)
        except MemoryError as error:
            _end(f"out of memory{_hint(error)}; lower --batch-size or --max-length", 1)
        except Exception as error:
            if type(error).__module__.startswith(("click", "typer")):
                raise
            console(stderr=True).print(
                f"error: {type(error).__name__}: {_FAULT}", style="red", soft_wrap=True
            )
            raise


@contextmanager
def _goes_on(how: Callable[[], str]) -> Iterator[None]:
    """What ends a run from outside says how to go on with it. how: makes that sentence."""
    try:
        yield
    except (KeyboardInterrupt, OSError, MemoryError) as error:
        error.fastgate_hint = how()  # type: ignore[union-attr]
        raise


def _hint(error: BaseException) -> str:
    hint = getattr(error, "fastgate_hint", "")
    return f"; {hint}" if hint else ""


def _checked(param: typer.CallbackParam, value: Any) -> Any:
    """The callback of every number: refuses one that is not in its range, nan and inf among them."""
    field = _FIELDS.get(param.name or "", param.name or "")
    if value is not None and not RANGES[field].holds(value):
        raise typer.BadParameter(f"got {value}, wanted {RANGES[field]}")
    return value


_FIELDS = {option_of(field).lstrip("-").replace("-", "_"): field for field in RANGES}


def _expanded(value: Optional[Path]) -> Optional[Path]:  # noqa: UP045
    """The callback of every path: `~` is the home folder, as the shell has it only after a blank."""
    try:
        str(value).encode()
        return None if value is None else value.expanduser()
    except UnicodeEncodeError as error:  # libraries that are not written in Python take UTF-8 alone
        shown = str(value).encode(errors="backslashreplace").decode()
        raise typer.BadParameter(
            f"{shown} is no name in this locale; set PYTHONUTF8=1, or rename it if it is not UTF-8"
        ) from error
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
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
    typer.Option(help="Read DIR/TASK/SPLIT.jsonl.gz; without it the hub's data set.", callback=_expanded),
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
    typer.Option("--train", help="Your training rows (jsonl, json, csv, tsv).", callback=_expanded),
]
ValidationFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--validation", help="Your rows to score on.", callback=_expanded),
]
Columns = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Input columns of your files, by commas: text, text,text_pair or tokens."),
]
LabelColumn = Annotated[Optional[str], typer.Option(help="Label column of your files: label or tags.")]  # noqa: UP045
MaxTrainRows = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Train on this many rows, drawn by the seed.", callback=_checked),
]
MaxEvalRows = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Score on this many rows, drawn by the seed.", callback=_checked),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxLength = Annotated[int, typer.Option(help="Tokens a row is cut at.", callback=_checked)]
Stride = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        help="Do not cut longer texts: windows of --max-length tokens that share so many.", callback=_checked
    ),
]
BatchSize = Annotated[int, typer.Option(help="Rows a batch.", callback=_checked)]
Seed = Annotated[int, typer.Option(help="Random seed.", callback=_checked)]


def _split(option: str, text: str | None) -> list[str]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and not parts:
        raise ArgumentError(
            format_error("fastgate", option, repr(text), "names by commas", "name one, or leave it out")
        )
    return parts


def _load(
    command: str,
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
    from fastgate.data import load_files, load_task

    if label_column is not None and not label_column:
        raise ArgumentError(
            format_error(command, "--label-column", "''", "the name of a column", "name it, or leave it out")
        )
    remedy = "pass --task NAME, or --task-type with --train and --validation"
    rows: dict[str, Any] = {"max_train_rows": max_train_rows, "max_eval_rows": max_eval_rows, "seed": seed}
    own = {
        "--train": train, "--validation": validation, "--columns": columns, "--label-column": label_column
    }  # fmt: skip
    named = {"--data-dir": data_dir, "--evaluate-on": evaluate_on}
    given = [
        option
        for option, value in {"--task": name, "--task-type": kind, **own, **named}.items()
        if value is not None
    ]
    if name is not None and kind is None:
        _refuse_others(command, "--task", [option for option in given if option in own])
        return load_task(name, data_dir, evaluate_on=_split("--evaluate-on", evaluate_on), **rows)
    known = train is not None or labels or kind == "regression"
    if name is None and kind is not None and validation is not None and known:
        _refuse_others(command, "--task-type", [option for option in given if option in named])
        return load_files(
            kind,
            train,
            validation,
            columns=_split("--columns", columns),
            target=label_column,
            labels=labels,
            **rows,
        )
    raise DataError(format_error(command, "data", ", ".join(given) or "nothing", "one task", remedy))


def _refuse_others(command: str, option: str, others: list[str]) -> None:
    if others:
        remedy = f"leave {'it' if len(others) == 1 else 'them'} out"
        raise ArgumentError(
            format_error(command, ", ".join(others), f"it with {option}", f"{option} alone", remedy)
        )


@app.command()
def demo(
    task: TaskName = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the checkpoint and the report.", callback=_expanded)
    ] = Path("fastgate-demo"),
    seed: Seed = 0,
) -> None:
    """Fine-tune, self-prune and compare a small BERT on text this machine has, in minutes."""
    from fastgate.cli.demo import demo as run
    from fastgate.training.run_folder import check_replaceable

    if task is None and data_dir is not None:
        raise ArgumentError(format_error("demo", "--data-dir", "it without --task", "a task", "pass --task"))
    check_replaceable(out)
    with _goes_on(lambda: "run the same command to begin again"):
        run(out, console(), task_name=task, data_dir=data_dir, seed=seed)


@app.command()
def finetune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the dense and the pruned model.", callback=_expanded)],
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
        typer.Option(
            help="Share of the attention sublayers to remove; 0.8 if no target is given.", callback=_checked
        ),
    ] = None,
    target_speedup: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="How many times cheaper the encoder shall be.", callback=_checked),
    ] = None,
    max_drop: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Instead: the largest cut that costs at most this share of the score.", callback=_checked
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes of the dense fine-tune.", callback=_checked)] = 3.0,
    prune_epochs: Annotated[
        float, typer.Option(help="Passes of the pruning, search and recovery.", callback=_checked)
    ] = 3.0,
    batch_size: BatchSize = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the weights.", callback=_checked)] = 5e-5,
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
    seed: Seed = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in the folder; until pruning begins with another target too."
        ),
    ] = False,
) -> None:
    """Fine-tune a dense model, prune it while tuning on, and save both with their scores."""
    from fastgate.cli.progress import Display
    from fastgate.training.finetune import Recipe
    from fastgate.training.finetune import finetune as run
    from fastgate.training.model import model_source
    from fastgate.training.run_folder import RUN, check_free

    if target_sparsity is None and target_speedup is None and max_drop is None:
        target_sparsity = 0.8
    recipe = Recipe(
        model=model, task="", sparsity=target_sparsity, speedup=target_speedup, max_drop=max_drop,
        epochs=epochs, prune_epochs=prune_epochs, batch_size=batch_size, lr=lr, max_length=max_length,
        stride=stride, pooling=pooling, bf16=bf16, seed=seed,
    )  # fmt: skip
    check_free(out, resume)
    model_source(model, "--model", ("dense", "pruned"))

    def how() -> str:
        if (out / RUN).is_file():
            return "the same command with --resume goes on from the last checkpoint"
        return f"nothing was written to {out}"

    with _goes_on(how):
        loaded = _load(
            "finetune", task, data_dir, task_type, train, validation, columns, label_column, evaluate_on, [],
            max_train_rows, max_eval_rows, seed,
        )  # fmt: skip
        data = {
            "data_dir": data_dir, "task_type": task_type, "train": train, "validation": validation,
            "columns": columns, "label_column": label_column, "max_train_rows": max_train_rows,
            "max_eval_rows": max_eval_rows, "evaluate_on": list(loaded.evaluate_on),
        }  # fmt: skip
        data = {key: str(value) if isinstance(value, Path) else value for key, value in data.items()}
        given = {key: value for key, value in data.items() if value is not None}
        recipe = replace(recipe, task=loaded.name, data=given)
        with Display(console()) as display:
            result = run(recipe, loaded, out, resume=resume, listener=display, tell=_print_note)
    _print_result(result, out)


def _print_note(note: str) -> None:
    console(stderr=True).print(f"note: {note}", soft_wrap=True)


def _print_result(result: dict[str, Any], out: Path) -> None:
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
        _print_note(
            f"the search did not tell the layers apart (margin {pruned.get('margin', 0.0):.3f}): the choice "
            "may be one by their order; another --prune-epochs or --target-sparsity may find a better one"
        )


@app.command()
def evaluate(
    path: Annotated[
        Path,
        typer.Argument(help="A fastgate checkpoint, or a fine-tuned model in a folder.", callback=_expanded),
    ],
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
    from fastgate.training import load_tokenizer
    from fastgate.training.evaluate import check_fits, class_names, read_model, score

    model = read_model(path)
    names = [] if task_type is None else class_names(model, task_type)
    loaded = _load(
        "evaluate", task, data_dir, task_type, train, validation, columns, label_column, evaluate_on, names,
        None, max_eval_rows, 0,
    )  # fmt: skip
    check_fits(model, loaded)
    tokenizer = load_tokenizer(path, loaded)
    rows = loaded.tokenize(tokenizer, max_length, stride)["evaluation"]
    count = len(loaded.evaluation)
    for note in loaded.notes:
        _print_note(note)
    scores = score(model, loaded, rows, loaded.collator(tokenizer), batch_size)
    if as_json:
        found = {"task": loaded.name, "rows": count, "metric": loaded.metric, "scores": scores}
        typer.echo(json.dumps({**found, "input": loaded.counts}))
        return
    screen = console()
    windows = f" in {len(rows)} windows" if len(rows) != count else ""
    screen.print(f"{loaded.name}: {count} rows{windows} of {', '.join(loaded.evaluate_on)}", soft_wrap=True)
    for name, value in scores.items():
        screen.print(f"  {name} {value:.4f}" + ("  (main metric)" if name == loaded.metric else ""))


@app.command()
def sweep(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="YAML: tasks, seeds, runs, settings, as in bench/sweeps/tasks.yaml.", callback=_expanded
        ),
    ],
    data_dir: DataDir = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Overrides the recipe's model."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Results, a JSON line a run.", callback=_expanded)] = Path(
        "tasks.jsonl"
    ),
    work: Annotated[
        Path, typer.Option(help="Folder for dense models and trainings under way.", callback=_expanded)
    ] = Path("sweep-work"),
    workers: Annotated[
        int, typer.Option(help="Processes; cores and GPUs are shared.", callback=_checked)
    ] = 1,
    left: Annotated[bool, typer.Option("--left", help="Print the runs that are left, and do none.")] = False,
    as_worker: Annotated[bool, typer.Option("--as-worker", hidden=True)] = False,
) -> None:
    """Methods, sparsities and seeds on tasks. Called again, it goes on where it was cut off."""
    from fastgate.cli.progress import Display
    from fastgate.training import sweep as sweeps
    from fastgate.training.model import model_source
    from fastgate.training.sweep_config import read_recipe
    from fastgate.training.workers import end_with_parent, run_workers

    if as_worker:
        end_with_parent()
    runs = read_recipe(recipe, model)
    for name in {settings.model for settings in runs} - {"minilm"}:
        model_source(name, "--model" if model else "model", ("dense",))
    if not (left or as_worker):
        sweeps.check_files(out, work)
    todo = sweeps.left(runs, out)
    if left:
        for run in todo:
            typer.echo(json.dumps(run.identity))
        return
    screen = console()

    def tell(line: str) -> None:
        screen.print(line, soft_wrap=True)

    statuses: list[int] = []
    with _goes_on(lambda: "the same command goes on from there"), Display(screen, as_worker) as display:
        if as_worker:
            sweeps.sweep(runs, data_dir, out, work, tell=tell, listener=display)
            return  # what is left is for the other workers; the process that started them looks
        tell(f"{len(runs)} runs, {len(runs) - len(todo)} of them in {out}, {len(todo)} left")
        if not todo:
            return
        sweeps.check_runs(todo, data_dir)
        if workers == 1:
            sweeps.sweep(runs, data_dir, out, work, tell=tell, listener=display)
    if workers > 1:
        with _goes_on(lambda: "the same command goes on from there"):
            again = ["sweep", recipe, "--out", out, "--work", work]
            again += ["--data-dir", data_dir] if data_dir else []
            again += ["--model", model] if model else []
            statuses = run_workers([str(part) for part in again], workers)
    skipped = sweeps.skipped(runs, out, work)
    failed = [status for status in statuses if status]
    for line in skipped:
        console(stderr=True).print(line, soft_wrap=True)
    if skipped or failed:
        ended = f", {len(failed)} of {workers} workers ended early" if failed else ""
        _end(f"sweep: {len(sweeps.left(runs, out))} of {len(runs)} runs are left{ended}", 1)


@app.command()
def report(
    lines: Annotated[Path, typer.Argument(help="What `fastgate sweep` wrote.", callback=_expanded)],
    out: Annotated[Path, typer.Option(help="Folder for tables.md and the plots.", callback=_expanded)] = Path(
        "report"
    ),
    data_dir: DataDir = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time each choice of layers here first, by `fastgate bench`.")
    ] = False,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="One table, of this recipe's tasks and cuts.", callback=_expanded),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, to measure in.")] = "float32",
) -> None:
    """Tables and plots of a sweep: scores, paired differences to dense, speed-ups, what survives."""
    from fastgate.benchmark.compare import dtype_of
    from fastgate.report.sweep_report import write_sweep_report
    from fastgate.training.disk import check_makeable
    from fastgate.training.sweep import check_results

    dtype_of("report", dtype)
    check_results(lines)
    check_makeable("report", "--out", out)
    write_sweep_report(lines, out, data_dir, measure, console(stderr=True), recipe, dtype)
    console().print((out / "tables.md").read_text(encoding="utf-8"), soft_wrap=True)


@app.command()
def explain(
    path: Annotated[
        Path,
        typer.Argument(
            help="A fastgate checkpoint, or a model in a folder or of the hub.", callback=_expanded
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what runs, layer by layer: live rows, steps, share of the FLOPs."""
    from fastgate.models.explanation import explain as run
    from fastgate.training.evaluate import read_model

    found = run(read_model(path))
    typer.echo(json.dumps(found.to_dict()) if as_json else str(found))


@app.command()
def info(as_json: AsJson = False) -> None:
    """Show versions, the build, and which implementation runs each op here, and why."""
    from fastgate.env import collect, render

    found = collect()
    typer.echo(json.dumps(found) if as_json else render(found))


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="minilm, bert-base or bert-large (random weights), a checkpoint, or a model.")
    ],
    task: Annotated[str, typer.Option(help="Task whose evaluation rows are run.")],
    data_dir: DataDir = None,
    against: Annotated[
        str, typer.Option(help="Baselines, by commas: sdpa, eager, compile, onnxruntime, openvino.")
    ] = "sdpa,eager",
    keep: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Layers whose attention stays, by commas; all by default."),
    ] = None,
    batch_size: BatchSize = 32,
    batches: Annotated[int, typer.Option(help="Number of batches.", callback=_checked)] = 8,
    order: Annotated[str, typer.Option(help="data: rows as they come; length: sorted by length.")] = "data",
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="CPU threads.", callback=_checked),
    ] = None,
    max_length: MaxLength = 128,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for everyone.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Time fastgate and its baselines in turn on the same real batches, once their outputs are equal."""
    from fastgate.benchmark.compare import bench as run
    from fastgate.benchmark.compare import bench_table

    layers = None if keep is None else [_layer(part.strip()) for part in keep.split(",") if part.strip()]
    if layers is not None and len(set(layers)) != len(layers):
        raise ArgumentError(format_error("bench", "--keep", keep, "different layers", "name each layer once"))
    found = run(
        model, task, data_dir, against=_split("--against", against), keep=layers, batch_size=batch_size,
        batches=batches, order=order, threads=threads, max_length=max_length, console=console(stderr=True),
        dtype=dtype,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        console().print(bench_table(found))


def _layer(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ArgumentError(
            format_error("bench", "--keep", repr(text), "layer indices", "pass e.g. --keep 0,4,8")
        )
    return int(text)


def main() -> None:
    """The entry point of the `fastgate` command."""
    app()


if __name__ == "__main__":
    main()
