"""Damage to files, drawn from a seeded generator: what a disk, a copy, an editor or an attacker does."""

from __future__ import annotations

import codecs
import json
import random
from typing import Any

HOSTILE = (
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e308, -1e308, 10**9, 2**31, 2**63,
    -(2**63), 10**30, 10**400,
    float("nan"), float("inf"), float("-inf"), "", "0", "1", "gelu", "\x00", "\ud800",
    "\u202e", "é" * 3, "x" * 10_000,
    "../../etc/passwd", "/dev/zero", "__import__('os').getcwd()", [], {}, [[]], [None], [0],
    [0, 0], [-1], [1, 2, 3],
    ["0"], [True], {"0": 1}, {"": None}, [[[[0]]]],
)  # fmt: skip
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "utf-7", "cp500")


def damage(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """(what was done, the bytes): flips, cuts, zeros, repeats, insertions, other encodings."""
    kind = rng.choice((
        "flip a bit", "flip a bit", "flip bits", "cut the end", "cut the start", "zeros",
        "noise", "insert", "repeat",
        "append", "empty", "encode", "a NUL", "a BOM", "drop a byte", "change a digit",
    ))  # fmt: skip
    size = len(data)
    if kind == "empty" or not size:
        return "empty", b""
    at = rng.randrange(size)
    more = min(size, at + rng.choice((1, 2, 8, 64, 4096)))
    if kind in ("flip a bit", "flip bits"):
        flipped = bytearray(data)
        for _ in range(1 if kind == "flip a bit" else rng.randrange(2, 30)):
            # Half of the flips near the start, where headers are.
            place = rng.randrange(min(size, 256)) if rng.random() < 0.5 else rng.randrange(size)
            flipped[place] ^= 1 << rng.randrange(8)
        return kind, bytes(flipped)
    if kind == "cut the end":
        return kind, data[: rng.choice((at, size - 1, size // 2))]
    if kind == "cut the start":
        return kind, data[rng.choice((at, 1, 3)) :]
    if kind == "zeros":
        return kind, data[:at] + bytes(more - at) + data[more:]
    if kind == "noise":
        return kind, data[:at] + rng.randbytes(more - at) + data[more:]
    if kind == "insert":
        return kind, data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]
    if kind == "repeat":
        return kind, data[:more] + data[at:]
    if kind == "append":
        return kind, data + rng.choice((b"\n", b"\n\n", b"}", b"\x00", b"x", data, rng.randbytes(50)))
    if kind == "a NUL":
        return kind, data[:at] + b"\x00" + data[at:]
    if kind == "a BOM":
        return kind, rng.choice((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) + data
    if kind == "drop a byte":
        return kind, data[:at] + data[at + 1 :]
    if kind == "change a digit":
        digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
        if digits:
            place = rng.choice(digits)
            return kind, data[:place] + str(rng.randrange(10)).encode() + data[place + 1 :]
        return "drop a byte", data[:at] + data[at + 1 :]
    encoding = rng.choice(ENCODINGS)
    try:
        return f"encode as {encoding}", data.decode().encode(encoding)
    except (UnicodeDecodeError, UnicodeEncodeError):
        return "drop a byte", data[:at] + data[at + 1 :]


def nested(depth: int, shape: str) -> str:
    """JSON text so many levels deep."""
    return "[" * depth + "]" * depth if shape == "list" else '{"a":' * depth + "1" + "}" * depth


def hostile_json(rng: random.Random, data: dict[str, Any]) -> tuple[str, bytes]:
    """(what was done, the text): an object of JSON with a value, a key or the text itself changed."""
    paths = list(_paths(data))
    kind = rng.choice(
        ("value", "value", "value", "value", "delete", "key", "duplicate", "deep", "long number", "extra")
    )
    copy: dict[str, Any] = json.loads(json.dumps(data))
    path = rng.choice(paths)
    parent, key = _at(copy, path)
    if kind == "value":
        parent[key] = rng.choice(HOSTILE)
    elif kind == "delete":
        del parent[key]
    elif kind == "key":
        copy[
            rng.choice(
                ("", "\x00", "self", "cls", "class", "__class__", "config", "args", "kwargs", "model_type")
            )
        ] = 1
    elif kind == "extra":
        name, value = rng.choice(EXTRA)
        copy[name] = value
    elif kind in ("deep", "long number"):
        mark = "a-place-to-fill"
        parent[key] = mark
        filled = nested(rng.choice((100, 990, 5000, 200_000)), rng.choice(("list", "object")))
        if kind == "long number":
            filled = rng.choice(
                ("9" * 5000, "-" + "9" * 400, "1e999999", "1" + "0" * 4300, "0." + "1" * 5000)
            )
        return f"{kind} at {_named(path)}", _text(copy).replace(f'"{mark}"', filled).encode()
    else:
        text = _text(copy)
        name = str(path[0])
        double = json.dumps(name) + ": " + json.dumps(rng.choice(HOSTILE[:20])) + ", "
        where = 1 if rng.random() < 0.5 else len(text) - 1
        text = text[:1] + double + text[1:] if where == 1 else text[:-1] + ", " + double[:-2] + text[-1:]
        return f"duplicate {name}", text.encode()
    return f"{kind} at {_named(path)}", _text(copy).encode("utf-8", "surrogatepass")


EXTRA: tuple[tuple[str, Any], ...] = (
    ("auto_map", {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ("attn_implementation", "evil/kernel"),
    ("_attn_implementation", "flash_attention_2"),
    ("dtype", "os.system"),
    ("torch_dtype", "float9"),
    ("model_type", "gpt2"),
    ("is_decoder", True),
    ("add_cross_attention", True),
    ("num_labels", 10**8),
    ("id2label", {"a": "b"}),
    ("label2id", [1]),
    ("use_cache", "x"),
    ("tie_word_embeddings", False),
    ("pruned_heads", {"0": [0]}),
    ("per_layer_config", {"0": {"skip": ["attention"]}}),
    ("trust_remote_code", True),
    ("_name_or_path", "../../.."),
    ("adapter_path", "evil"),
    ("fastgate_pooling", "mean"),
    ("base_model_name_or_path", "evil"),
    ("_commit_hash", 3),
    ("transformers_version", [9]),
)


def _text(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)


def _paths(data: Any, so_far: tuple[Any, ...] = ()) -> Any:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*so_far, key)
        yield from _paths(value, (*so_far, key))


def _at(data: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    for key in path[:-1]:
        data = data[key]
    return data, path[-1]


def _named(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
