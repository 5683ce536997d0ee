"""Golden ids, a tiny tokenizer and what tests of the tokenizer share."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from hypothesis import HealthCheck, settings

from minqwen.errors import TokenizerError
from minqwen.tokenizer.backends import ByteLevelBPE
from support.paths import DATA

TOKENIZER_DATA = DATA / "tokenizer"
GOLDEN = json.loads((TOKENIZER_DATA / "golden.json").read_text(encoding="utf-8"))
CHATS = json.loads((TOKENIZER_DATA / "chat_golden.json").read_text(encoding="utf-8"))
ALPHABET = {symbol: id for id, symbol in enumerate(ByteLevelBPE.alphabet)}
USER = [{"role": "user", "content": "hi"}]
FUZZ = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def tiny_json(path: Path, specials=("<|im_end|>",), post_processor=None, **config) -> Path:
    """A byte-level tokenizer.json of the 256 bytes, three merges and some special tokens."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {**ALPHABET, "he": 256, "ll": 257, "hell": 258}
    library = Library(models.BPE(vocab=vocab, merges=[("h", "e"), ("l", "l"), ("he", "ll")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(specials))
    if post_processor:
        library.post_processor = post_processor
    path.mkdir(exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def edited_json(path: Path, **changes) -> None:
    """Change values in a JSON file; a__b names the key b in the object a."""
    data = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = data
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(data))


def write_qwen_vocabulary(path: Path) -> tuple[str, str]:
    """Write Qwen2.5's merges.txt and vocab.json; returns the two texts.

    The vocabulary follows from the merges: the 256 bytes, then what each merge makes.
    """
    merges = lzma.decompress((TOKENIZER_DATA / "merges.txt.xz").read_bytes()).decode()
    vocab = dict(ALPHABET)
    for line in merges.splitlines():
        vocab.setdefault(line.replace(" ", ""), len(vocab))
    compact = json.dumps(vocab, ensure_ascii=False, separators=(",", ":"))
    (path / "vocab.json").write_text(compact, encoding="utf-8")
    (path / "merges.txt").write_text(merges, encoding="utf-8")
    return merges, compact


def one_line(error) -> str:
    text = str(error.value)
    assert isinstance(error.value, TokenizerError) and "\n" not in text and 10 < len(text) < 700
    return text
