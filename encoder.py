"""GPT-2's byte-level byte-pair encoding: text to the ids of tokens, and back."""

import heapq
import json
import os
from itertools import pairwise

import regex

# No token reaches from one word into the next: a word is letters, digits or signs, and the space
# before them; or white space, which leaves its last character to what follows.
PATTERN = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


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
        heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(word)) if pair in ranks]
        heapq.heapify(heap)
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
        lone = regex.search(r"[\ud800-\udfff]", text)
        if lone:
            raise ValueError(f"the text has a lone surrogate, {lone[0]!r} at {lone.start()}")
        if len(self.cache) > 100_000:  # words: it is there to save time, not to fill the memory
            self.cache = {}
        ids, cache = [], self.cache
        for word in PATTERN.findall(text):
            if word not in cache:
                chars = [self.byte_encoder[byte] for byte in word.encode("utf-8")]
                cache[word] = [self.encoder[token] for token in self.bpe(chars)]
            ids += cache[word]
        return ids

    def decode(self, ids):
        """Turn ids into text, U+FFFD where a character is cut; raises ValueError for a false id."""
        try:
            text = "".join([self.decoder[id] for id in ids])
        except KeyError as error:
            raise ValueError(f"the vocabulary has no token with the id {error.args[0]}") from None
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
