"""GPT-2's byte-level byte-pair encoding."""

import heapq
import json
import os

import regex

# One word with its leading space, one number, one run of signs, or white space; English endings apart.
PATTERN = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def bytes_to_unicode():
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Encoder:
    def __init__(self, encoder, bpe_merges):
        self.encoder = encoder
        self.decoder = {id: token for token, id in encoder.items()}
        self.bpe_ranks = {tuple(pair): rank for rank, pair in enumerate(bpe_merges)}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        self.cache = {}

    def bpe(self, word):
        parts = list(word)
        before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
        heap = []

        def push(i, j):
            if i >= 0 and j < len(parts) and (parts[i], parts[j]) in self.bpe_ranks:
                heapq.heappush(heap, (self.bpe_ranks[parts[i], parts[j]], i, j, parts[i] + parts[j]))

        for i in range(len(parts) - 1):
            push(i, i + 1)
        while heap:
            _, i, j, merged = heapq.heappop(heap)
            if parts[i] and parts[j] and after[i] == j and parts[i] + parts[j] == merged:
                parts[i], parts[j] = merged, None
                after[i] = after[j]
                if after[i] < len(parts):
                    before[after[i]] = i
                push(before[i], i)
                push(i, after[i])
        return [part for part in parts if part]

    def encode(self, text):
        ids = []
        for word in PATTERN.findall(text):
            if word not in self.cache:
                chars = "".join(self.byte_encoder[byte] for byte in word.encode("utf-8"))
                self.cache[word] = [self.encoder[token] for token in self.bpe(chars)]
            ids += self.cache[word]
        return ids

    def decode(self, ids):
        text = "".join(self.decoder[id] for id in ids)
        return bytes(self.byte_decoder[char] for char in text).decode("utf-8", errors="replace")


def get_encoder(model_name, models_dir):
    """Read the vocabulary in `models_dir/model_name`: `encoder.json` and `vocab.bpe`.

    Raises OSError where a file is missing, and ValueError where one is not what it should be.
    """
    path = os.path.join(models_dir, model_name, "encoder.json")
    encoder = read_json(path)
    ids = list(encoder.values())
    if any(type(id) is not int for id in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"{path} does not number its tokens from 0 on")
    path = os.path.join(models_dir, model_name, "vocab.bpe")
    merges = [tuple(line.split(" ")) for line in read_text(path).split("\n")[1:] if line]
    tokens = {*bytes_to_unicode().values(), *map("".join, merges)}
    strange = [t for t in tokens ^ encoder.keys() if not (t.startswith("<|") and t.endswith("|>"))]
    if strange or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path} and encoder.json do not belong together, or one is damaged")
    return Encoder(encoder, merges)


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
    with open(path, encoding="utf-8") as file:
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error.reason}") from None
