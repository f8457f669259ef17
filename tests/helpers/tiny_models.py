"""A tiny tokenizer, tiny random models and tiny data files, so that whole runs take seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_TEXT = "good bad film story plot the a is was not very it one two three paris london in went to she he"
WORDS = _TEXT.split()


def tokenizer(folder: Path):
    """A WordPiece tokenizer that knows WORDS, the letters, and `##s`, `##ing`."""
    from transformers import BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz.,!?"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters]
    vocabulary += [f"##{piece}" for piece in ("s", "ing", *letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    words = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), vocab=str(folder / "vocab.txt"))
    words.model_max_length = 64
    return words


def model_folder(folder: Path, layers: int = 3) -> Path:
    """A random BERT of 32 hidden units with its tokenizer, as Hugging Face saves them."""
    from transformers import BertConfig, BertModel

    words = tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def roberta_folder(folder: Path, layers: int = 4) -> Path:
    """A random RoBERTa of 32 hidden units, and a byte-level BPE trained on WORDS."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel

    folder.mkdir(parents=True, exist_ok=True)
    words = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words.train_from_iterator([_TEXT] * 4, vocab_size=400, special_tokens=special, show_progress=False)
    words.save_model(str(folder))
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=66,
        type_vocab_size=1,
    )
    RobertaModel(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentiment_folder(folder: Path, **counts: int) -> Path:
    """A data folder with the task sst2. counts: split -> number of rows, 48 each if none is named."""
    for split, count in (counts or dict.fromkeys(("train", "validation", "test"), 48)).items():
        write_rows(folder / "sst2" / f"{split}.jsonl", sentiment(count))
    return folder


def sentiment(count: int) -> list[dict]:
    """Rows a tiny model can learn: the class is whether `good` or `bad` stands in the sentence."""
    rows = []
    for i in range(count):
        noise = " ".join(
            WORDS[(7 * i + j) % len(WORDS)] for j in range(2 + i % 9) if (7 * i + j) % len(WORDS) > 1
        )
        rows.append({"sentence": f"{noise} {'good' if i % 2 else 'bad'} film", "label": i % 2})
    return rows
