"""Data files: texts come through as they are written; what cannot be read is refused by file and line."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
from helpers import tiny_models

from fastgate.data import load_files, load_task
from fastgate.data.files import read_file
from fastgate.errors import DataError

ODD = [
    "NA",
    "null",
    "nan",
    "None",
    "001",
    "1e5",
    "True",
    " a b ",
    "",
    "1_000",
    "a\u2028b",
    "\u00e9\U0001f600",
]


def columns(path):
    table = read_file(path)
    return {name: table.column(name) for name in table.column_names}


def refused(path, content, **options):
    """The message for a file of this content as training and validation rows."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load_files(options.pop("kind", "text"), path, path, **options)
    message = str(caught.value)
    assert message.startswith(f"--train {path}: ") and "\n" not in message, message
    return message


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
def test_no_text_is_taken_for_a_number_or_a_gap(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    rows = [{"text": text, "label": str(i % 2)} for i, text in enumerate(ODD)]
    if ending in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    assert columns(path) == {"text": ODD, "label": [row["label"] for row in rows]}
    assert load_files("text", path, path).train["text"][:] == ODD


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_column_whose_type_changes_late_is_text(tmp_path, ending):
    path, sep = tmp_path / f"rows.{ending}", "," if ending == "csv" else "\t"
    texts = [str(i) for i in range(30000)] + ["a word"]
    path.write_text(f"text{sep}label\n" + "".join(f"{t}{sep}{i % 2}\n" for i, t in enumerate(texts)))
    task = load_files("text", path, path)
    assert task.train["text"][:] == texts and task.labels == ("0", "1")


@pytest.mark.parametrize(
    "texts",
    [
        ['"Great film', "dull plot", 'they call it "art"', "so good", 'five" tall', "so bad"],
        ['"Great film"', '"', '""', "plain"],  # as GLUE has them: the marks are part of the text
        ['"""', 'a "b" c', '"a" and "b"', "plain"],
        ["it's", "a,b", "'", "plain"],
    ],
)
def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path, texts):
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{t}\t{i % 2}\n" for i, t in enumerate(texts)))
    assert load_files("text", path, path).train["text"][:] == texts


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_a_tsv_by_a_csv_writer_loses_the_quotation_marks_around_cells(tmp_path, quoting):
    path, texts = tmp_path / "rows.tsv", ['say "hi"', "plain", '"', "a, b"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=quoting)
        writer.writerows([("text", "label"), *((t, i % 2) for i, t in enumerate(texts))])
    assert load_files("text", path, path).train["text"][:] == texts


def test_a_csv_follows_rfc_4180(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbf,text,label\r\n0,"a, ""b""\r\nc",x\r\n\r\n1,five" tall,y\r\n2,"",x\r\n3, "d",y'
    )
    assert columns(path) == {
        "text": ['a, "b"\r\nc', 'five" tall', "", ' "d"'],
        "label": ["x", "y", "x", "y"],
    }  # the column without a name is a written index
    long = "x" * 300_000
    path.write_text(f"text,label\n{long},a\nb,c\n")
    assert columns(path)["text"] == [long, "b"]
    assert csv.field_size_limit() == 131072


@pytest.mark.parametrize(
    "content, expected",
    [
        ('text,label\n"a film,neg\nfine,pos\n', "line 2: got damaged quotation marks"),
        ('text,label\nfine,neg\n"a" b,pos\n', "line 3: got damaged quotation marks"),
        ('text,label\nok,neg\nok,pos\n"a film,neg\nso bad",pos\n', "line 4: got one cell over 2 lines that"),
        ("text,label\na\n", "line 2: got 1 fields under a header of 2"),
        ("text,label,label\na,b,c\n", "header: got 'label' twice"),
        ("text;label\na;b\n", "no comma in 'text;label'"),
        ('"text";"label"\n"a";"b"\n', 'no comma in \'"text";"label"\''),
        ("text,label\n", "got no rows"),
        ("great,1\nbad,0\n", "got great, 1, wanted text, label among them"),
        ("text, label\na,1\n", "got text, ' label', wanted label among them"),
        (" \n\n", "got none (empty)"),
        ("text,label\na,x\nb,y\0\n", "line 3: got a NUL byte"),
        (
            "text,label\nfine,x\ncaf\u00e9,y\n".encode("latin-1"),
            "line 3: got bytes that are not UTF-8 (0xe9 at",
        ),
        ("text,label\na,x\n".encode("utf-16"), "line 1: got bytes that are not UTF-8"),
        ("text,label\na,0\nb,nan\nc,1\n", "line 3, row 1: got 'nan', wanted a class"),
        ("text,label\na,0.5\nb,1\nc,2\n", "line 2, row 0: got '0.5', wanted a class"),
        ("text,label\na,x\nb, \nc,y\n", "line 3, row 1: got an empty label"),
        ("text,label\na,x\nb,x \n", "'x' and 'x ', which differ in blanks only"),
        ("text,label\na,1\nb,-1\n", "got -1 (no label)"),
    ],
)
def test_a_damaged_csv_is_refused_by_line(tmp_path, content, expected):
    message = refused(tmp_path / "rows.csv", content)
    assert expected in message
    assert "UTF-8" not in expected or "iconv" in message


def test_quoted_line_ends_are_no_swallowed_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\nfine,pos\n"Hello, moon\nGood night, sun",neg\n"one\ntwo",pos\n')
    assert columns(path)["text"] == ["fine", "Hello, moon\nGood night, sun", "one\ntwo"]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("text\tlabel\na\tb\tc\n", "line 2: got 3 fields under a header of 2"),
        ('text\tlabel\n"one\ntwo"\tpos\n', "line 2: got 1 fields under a header of 2"),
        ("text\tlabel\n   \nx\ty\n", "line 2: got 1 fields"),
        ("text\tlabel\n\t\n", "column text: got blank in every row"),
        ("text,label\na,b\n", "got text,label, wanted text, label among them"),
    ],
)
def test_a_damaged_tsv_is_refused_by_line(tmp_path, content, expected):
    assert expected in refused(tmp_path / "rows.tsv", content)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_every_line_end_gives_the_same_rows(tmp_path, ending, end):
    sep = {"csv": ",", "tsv": "\t"}.get(ending)
    lines = (
        [f"text{sep}label", f"a{sep}x", f"b{sep}y"]
        if sep
        else ['{"text": "a", "label": "x"}', '{"text": "b", "label": "y"}']
    )
    path = tmp_path / f"rows.{ending}"
    for content in (end.join(lines), end.join(lines) + end, end.join(lines) + 2 * end):
        path.write_bytes(content.encode())
        assert columns(path) == {"text": ["a", "b"], "label": ["x", "y"]}


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 0', "line 2: got no JSON"),
        ('{"text": "a", "label": 1, "label": 0}\n', "the key 'label' twice"),
        ('{"text": "a", "label": 1}\n' + "[" * 100_000 + "\n", "line 2: got brackets nested too deeply"),
        ('{"text": ' * 50_000 + "\n", "nested too deeply"),
        ('{"text": "a", "label": ' + "1" * 5000 + "}\n", "a number of thousands of digits"),
        (
            '{"text": "a", "label": NaN}\n{"text": "b", "label": 1}\n',
            "line 1, row 0: got nan, wanted a class",
        ),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 1e999}\n', "line 2, row 1: got inf"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": true}\n', "true or false among other labels"),
        ('{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2, row 1: got null, wanted a label"),
        ('{"text": "a", "label": 1}\n{"text": "\\ud800", "label": 0}\n', "half of a surrogate pair"),
        ('{"text": "a", "label": [1]}\n{"text": "b", "label": 0}\n', "got a list, wanted a class"),
        ('{"text": {"a": 1}, "label": 1}\n{"text": "b", "label": 0}\n', "got a dict, wanted a text"),
        ('{\n "text": ["a"],\n "label": [1]\n}\n', "line 1: got no JSON"),
        ("3\n", "line 1: got a int, not an object"),
        ("{}\n{}\n", "wanted text, label among them"),
    ],
)
def test_damaged_json_is_refused_by_line(tmp_path, content, expected):
    for name in ("rows.jsonl", "rows.json"):
        assert expected in refused(tmp_path / name, content)


def test_what_is_no_file_is_refused_by_name(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "locked" / "x").mkdir(parents=True)
    whole = gzip.compress(b'{"text": "a", "label": 1}\n' * 100)
    for name, content in (("cut", whole[:-9]), ("flipped", whole[:20] + b"\xff\xff" + whole[22:])):
        message = refused(tmp_path / f"{name}.jsonl.gz", content)
        assert "damaged gzip" in message
    good = tiny_models.write_rows(tmp_path / "good.jsonl", [{"text": "a", "label": i} for i in (0, 1)])
    for path, expected in (
        (tmp_path / "folder.csv", "a folder"),
        (tmp_path / "none.csv", "no such file"),
        (tmp_path / ("n" * 300 + ".csv"), "no access"),
        ("a\0b.csv", "no "),
        (3, "wanted a path"),
    ):
        with pytest.raises(DataError, match=expected) as caught:
            load_files("text", good, path)
        assert str(caught.value).startswith("--validation") and str(caught.value).count("got ") == 1
    upper = tmp_path / "ROWS.CSV"
    upper.write_text("text,label\na,x\nb,y\n")
    assert load_files("text", upper, upper).labels == ("x", "y")


@pytest.mark.parametrize(
    "train, validation, names, ids",
    [
        (["2", "10", "9"], [10, 9.0, "2.0"], ("2", "9", "10"), [2, 1, 0]),
        (["b", "10", "9"], ["9", "b"], ("9", "10", "b"), [0, 2]),
        (["01", "1", "1e0"], [1, "1e0", "01"], ("1", "01", "1e0"), [0, 2, 1]),
        (["None", "NA", "x"], ["NA"], ("NA", "None", "x"), [0]),
    ],
)
def test_a_whole_number_is_one_class_however_it_is_written(tmp_path, train, validation, names, ids):
    paths = [
        tiny_models.write_rows(tmp_path / f"{n}.jsonl", [{"text": "a", "label": v} for v in values])
        for n, values in (("t", train), ("v", validation))
    ]
    task = load_files("text", *paths)
    assert task.labels == names and task.evaluation["label"][:] == ids


@pytest.mark.parametrize(
    "names, labels, ids",
    [
        (("neg", "pos"), [1, 0], [1, 0]),
        (("neg", "pos"), ["1", 0.0], [1, 0]),
        (("pos", "neg"), ["neg", "pos"], [1, 0]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ["1.0", "2"], [1, 2]),
        (("3", "1"), [1, 3], [1, 0]),  # names that are numbers are names
        (("neg", "pos"), [0, 2], "got '2', wanted a known label (0 for neg, 1 for pos)"),
        (("neg", "pos"), ["neg", "2"], "got '2', wanted a known label (neg, pos)"),
        (("3", "5"), [0, 3], "got '0', wanted a known label (3, 5)"),
        (("neg", "neg"), [0, 1], "'neg' twice"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_labels_are_names_or_ids_of_the_names_that_are_given(tmp_path, kind, names, labels, ids):
    rows = [{"text": "a", "label": v} for v in labels]
    if kind == "tokens":
        rows = [{"tokens": ["a"] * len(labels), "tags": labels}]
    path = tiny_models.write_rows(tmp_path / "v.jsonl", rows)
    if isinstance(ids, str):
        with pytest.raises(DataError) as caught:
            load_files(kind, None, path, labels=names)
        assert ids in str(caught.value)
        return
    for train in (None, path):
        task = load_files(kind, train, path, labels=names)
        read = task.evaluation["label"][:] if kind == "text" else task.evaluation["tags"][0]
        assert task.labels == names and read == ids


LISTS = [
    (["EU", "rejects", "it's", 'a "b"'], ["B-ORG", "O", "O", "I-X"]),
    (["Peter"], ["B-PER"]),
    (["\u00e9\U0001f600", "\\", "[", ","], ["O", "O", "O", "B-ORG"]),
]


@pytest.mark.parametrize("written", [repr, json.dumps, lambda value: json.dumps(value, ensure_ascii=False)])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_lists_that_a_table_keeps_as_text_are_lists(tmp_path, ending, written):
    path = tmp_path / f"rows.{ending}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="," if ending == "csv" else "\t")
        writer.writerows([("tokens", "tags"), *((written(w), written(t)) for w, t in LISTS)])
    task = load_files("tokens", path, path)
    assert task.train["tokens"][:] == [words for words, _ in LISTS]
    assert task.labels == ("B-ORG", "B-PER", "I-X", "O") and task.metric == "entity_f1"


def test_words_between_blanks_may_be_brackets(tmp_path):
    rows = [{"tokens": "[ laughter ]", "tags": "O B O"}, {"tokens": "a [x] b)", "tags": "O B O"}]
    path = tiny_models.write_rows(tmp_path / "rows.jsonl", rows)
    assert load_files("tokens", path, path).train["tokens"][:] == [["[", "laughter", "]"], ["a", "[x]", "b)"]]


def test_tags_between_blanks_may_have_marks(tmp_path):
    """Of the tag sets of the Penn Treebank, of STTS and of the Spoken Dutch Corpus."""
    tags = ["$,", ",", "''", "``", ";", "N(soort,ev)", "JJ|VBG", "Case=Nom|Number=Sing", "_"]
    for written in (" ".join(tags), tags, repr(tags), json.dumps(tags)):
        path = tiny_models.write_rows(
            tmp_path / "rows.jsonl", [{"tokens": ["x"] * len(tags), "tags": written}]
        )
        assert set(load_files("tokens", path, path).labels) == set(tags)


@pytest.mark.parametrize(
    "tokens, tags, expected",
    [
        ("EU,rejects", "B-ORG,O", "wanted tags separated by blanks"),
        ("EU, rejects", "B-ORG, O", "wanted tags separated by blanks"),
        ("EU; rejects", "B-ORG; O", "wanted tags separated by blanks"),
        ("'EU', 'rejects'", "'B-ORG', 'O'", "wanted tags separated by blanks"),
        ("EU", "'B-ORG'", "wanted tags separated by blanks"),
        ("list(['EU', 'x'])", "list(['B', 'O'])", "which is no complete list"),
        ("EU x", "tensor([1, 0])", "which is no complete list"),
        ("['EU' 'rejects']", "['B' 'O']", "which is no complete list"),  # NumPy's; Python would join the two
        ("EU rejects", "[3 0]", "which is no complete list"),
        ("EU rejects", "[3\n 0]", "which is no complete list"),
        ("['EU', 'rej", "['B', 'O']", "which is no complete list"),
        ("[__import__('os').getcwd()]", "['B']", "which is no complete list"),
        ("('EU', 'x')", "O O", "which is no complete list"),
        ("[" * 100_000 + "]" * 100_000, "['B']", "which is no complete list"),
        ("['a', ['b']]", "['B', 'O']", "which is no complete list"),
        ('[["a"], "b"]', "['B', 'O']", "a list among the words"),
        ("[null]", "['B']", "null or nothing"),
        ("['a', 'b']", "['B']", "got 2 words and 1 tags"),
        ("a b", "O -100", "-1 or -100"),
        (["a", ""], ["O", "B"], "null or nothing"),
        (["a", True], ["O", "B"], "a bool among the words"),
        ({"a": 1}, ["O"], "got a dict, wanted a list"),
    ],
)
def test_what_is_no_list_of_words_is_refused_by_row(tmp_path, tokens, tags, expected):
    good = {"tokens": ["x", "y"], "tags": ["O", "B"]}
    lines = "".join(json.dumps(row) + "\n" for row in (good, {"tokens": tokens, "tags": tags}))
    message = refused(tmp_path / "rows.jsonl", lines, kind="tokens")
    assert expected in message and "line 2, row 1" in message


@pytest.mark.parametrize("value", ["-1", "-1.0"])
def test_a_minus_one_is_no_label_however_it_is_written(tmp_path, value):
    message = refused(tmp_path / "rows.csv", f"text,label\na,1\nb,0\nc,{value}\n")
    assert "line 4, row 2: got -1 (no label)" in message and "another name if it is one" in message
    path = tmp_path / "rows.jsonl"
    tags = f'{{"tokens": ["a", "b"], "tags": ["O", "B"]}}\n{{"tokens": ["a"], "tags": [{value}]}}\n'
    assert "-1 or -100" in refused(path, tags, kind="tokens")
    path = tmp_path / "scores.csv"
    path.write_text(f"text,label\na,{value}\nb,2\n")
    assert load_files("regression", None, path).evaluation["label"][:] == [-1.0, 2.0]


@pytest.mark.parametrize("value", ["4,5", "1_0", "nan", "inf", "\uff11", "0x10", True, [1], 10**400, "high"])
def test_a_score_is_a_plain_finite_number(tmp_path, value):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": value}]
    message = refused(
        tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows), kind="regression"
    )
    assert "line 2, row 1" in message and "wanted a finite number" in message
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,4.5\nb, -1e-1\nc,3\n")
    assert load_files("regression", None, path).evaluation["label"][:] == [4.5, -0.1, 3.0]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"columns": ["text", "text_pair"]}, "--columns: got text, text_pair, wanted 1 input"),
        ({"target": "text"}, "--columns: got text with --label-column text"),
        ({"max_train_rows": 0}, "--max-train-rows: got 0, wanted at least 1"),
        ({"max_eval_rows": -1}, "--max-eval-rows: got -1, wanted at least 1"),
        ({"max_eval_rows": 2.5}, "--max-eval-rows: got 2.5"),
    ],
)
def test_options_are_called_what_the_user_types(tmp_path, options, expected):
    path = tiny_models.write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": i} for i in (0, 1)])
    with pytest.raises(DataError) as caught:
        load_files("text", path, path, **options)
    assert expected in str(caught.value)
    with pytest.raises(DataError, match="--train: got none"):
        load_files("text", None, path)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 113, 114, 200])
def test_as_many_rows_are_scored_as_were_asked_for(tmp_path, count):
    for split, size in (("train", 10), ("validation", 37), ("test", 77)):
        tiny_models.write_rows(tmp_path / "sst2" / f"{split}.jsonl", tiny_models.sentiment(size))
    task = load_task("sst2", tmp_path, max_eval_rows=count)
    assert len(task.evaluation) == min(count, 114)


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ("train.jsonl", "train.json", "validation.jsonl"):
        tiny_models.write_rows(tmp_path / "sst2" / name, tiny_models.sentiment(4))
    with pytest.raises(DataError, match=r"train\.json and train\.jsonl"):
        load_task("sst2", tmp_path)
    (tmp_path / "sst2" / "train.json").unlink()
    with pytest.raises(DataError, match="--evaluate-on: got validation, validation"):
        load_task("sst2", tmp_path, evaluate_on=["validation", "validation"])
