"""GPT-2's byte-level byte-pair encoding: text to the ids of tokens, and back."""

import codecs
import heapq
import json
from itertools import pairwise
from pathlib import Path

import regex

# No token reaches from one word into the next: a word is letters, digits or signs, and the space
# before them; or white space, which leaves its last character to what follows.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The files of a vocabulary: its tokens, and the merges where they are in a file of their own.
FILES = {"tokenizer.json": None, "vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
# What a `tokenizer.json` must say, or leave out, to give GPT-2's ids.
OPTIONS = {"type": "ByteLevel", "normalizer": None, "add_prefix_space": False, "use_regex": True}


def bytes_to_unicode():
    """Write each byte as a visible character: those of Latin-1 as they are, others from U+0100 on.

    >>> "".join(bytes_to_unicode()[byte] for byte in "a café".encode("utf-8"))
    'aĠcafÃ©'
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Encoder:
    """Encode with a vocabulary, token to id, and the pairs to merge into tokens, the first first.

    >>> merges = [("l", "o"), ("lo", "w"), ("e", "r")]
    >>> tokens = [*bytes_to_unicode().values(), *map("".join, merges)]
    >>> toy = Encoder({token: id for id, token in enumerate(tokens)}, merges)
    >>> toy.bpe("lower")
    ['low', 'er']
    >>> toy.encode("lower")
    [257, 258]
    >>> toy.decode([257, 258])
    'lower'
    """

    def __init__(self, encoder, bpe_merges):
        self.encoder = encoder
        self.decoder = {id: token for token, id in encoder.items()}
        self.bpe_ranks = {tuple(pair): rank for rank, pair in enumerate(bpe_merges)}
        self.endoftext = [id for token, id in encoder.items() if token == "<|endoftext|>"]
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        self.cache = {}

    def bpe(self, word):
        """Merge neighbours in one word, each time the pair of lowest rank, as long as any has one.

        Ranks wait in a heap and neighbours are linked: a word of n bytes takes O(n log n) steps.
        """
        parts = [*word, None]  # a ring: None, between the last and the first, has no rank
        before, after = [*range(-1, len(word))], [*range(1, len(word) + 1), 0]
        ranks = self.bpe_ranks
        heap = sorted((ranks[pair], i) for i, pair in enumerate(pairwise(word)) if pair in ranks)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if ranks.get((parts[i], parts[j])) != rank:
                continue  # one of the two was merged with its other neighbour in the meantime
            parts[i], parts[j] = parts[i] + parts[j], None
            after[i], before[after[j]] = after[j], i
            for k in (before[i], i):
                if (pair := (parts[k], parts[after[k]])) in ranks:
                    heapq.heappush(heap, (ranks[pair], k))
        return [part for part in parts if part]

    def encode(self, text):
        """Turn text into ids; raises ValueError for a lone surrogate, which has no UTF-8."""
        if lone := regex.search(r"[\ud800-\udfff]", text):
            raise ValueError(f"the text has a lone surrogate, {lone[0]!r} at {lone.start()}")
        # Words are kept, since most come again, but not so many that they fill the memory.
        ids, self.cache = [], self.cache if len(self.cache) <= 100_000 else {}
        for word in regex.findall(PATTERN, text):
            if word not in self.cache:
                chars = [self.byte_encoder[byte] for byte in word.encode("utf-8")]
                self.cache[word] = [self.encoder[token] for token in self.bpe(chars)]
            ids += self.cache[word]
        return ids

    def decode(self, ids):
        """Turn ids into text, U+FFFD where a character is cut; raises ValueError for a false id."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids):
        """Yield the text of each id as it comes; a character that is cut in two waits for its rest.

        >>> toy = Encoder({char: byte for byte, char in bytes_to_unicode().items()}, [])
        >>> list(toy.decode_stream(toy.encode("né!")))
        ['n', '', 'é', '!', '']
        """
        utf_8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            if id not in self.decoder:
                raise ValueError(f"the vocabulary has no token with the id {id}")
            yield utf_8.decode(bytes(map(self.byte_decoder.get, self.decoder[id])))
        yield utf_8.decode(b"", final=True)


def get_encoder(model_name, models_dir):
    """Read the vocabulary in `models_dir/model_name`, and check that it is of GPT-2's kind.

    It is in Hugging Face's `tokenizer.json`, or else in `vocab.json` and `merges.txt`, or else in
    OpenAI's `encoder.json` and `vocab.bpe`. Raises OSError where a file is missing, and ValueError
    where one is not what it should be.
    """
    folder = Path(models_dir, model_name)
    usual = "tokenizer.json" if (folder / "config.json").exists() else "encoder.json"
    name = next((name for name in FILES if (folder / name).exists()), usual)
    encoder = read_json(folder / name)
    if name == "tokenizer.json":
        encoder, merges, special = read_tokenizer(encoder, folder / name)
    else:
        merges = regex.findall(r"(?m)^(?!#version)(\S+) (\S+)$", read_text(folder / FILES[name]))
        special = {token for token in encoder if regex.fullmatch(r"<.+>|\[.+\]", token)}
    if {*map(repr, encoder.values())} != {*map(repr, range(len(encoder)))}:
        raise ValueError(f"{folder / name} does not number its tokens from 0 on")
    byte_encoder = bytes_to_unicode()
    tokens = {*byte_encoder.values(), *map("".join, merges)}
    special -= tokens
    if any(len(pair) != 2 for pair in merges) or tokens != encoder.keys() - special:
        raise ValueError(f"{folder / (FILES[name] or name)} and {name} do not belong together")
    # A special token is a text, the others are bytes written as characters: now that one is too.
    spelt = {token: "".join(map(byte_encoder.get, token.encode())) for token in special}
    return Encoder({spelt.get(token, token): id for token, id in encoder.items()}, merges)


def read_tokenizer(content, path):
    """Take tokens, merges and special tokens from what Hugging Face's `tokenizers` writes."""
    try:
        model, special = content["model"], {t["content"]: t["id"] for t in content["added_tokens"]}
        tokens = model["vocab"] | special
        found = OPTIONS | content | model | content["pre_tokenizer"]
        lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no byte-level BPE of `tokenizers`: {error!r}") from None
    if wrong := [name for name in OPTIONS if found[name] != OPTIONS[name]]:
        raise ValueError(f"{path}: {wrong[0]} must be {OPTIONS[wrong[0]]!r}, as in GPT-2")
    return tokens, [line.split(" ") for line in lines], special.keys()


def read_json(path):
    """Read the dict in a JSON file; raises ValueError, with the path, for anything else."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def read_text(path):
    """Read a file as UTF-8, whatever the platform prefers; raises ValueError, with the path."""
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason}") from None
