"""GPT-2's byte-level byte-pair encoding (BPE): from text to the ids of tokens, and back."""

import codecs
import json
from itertools import pairwise
from pathlib import Path

import regex

# The text is cut into words first, because no token reaches from one word into the next. A word is
# a run of letters, of digits or of other signs, with the space before it. In longer white space,
# the last character belongs to the word that follows.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The files of a tokenizer: the one with the tokens, and the one with the merges.
FILES = {"tokenizer.json": None, "vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
# What a tokenizer.json must say, or leave out, so that it gives GPT-2's ids.
OPTIONS = {"type": "ByteLevel", "normalizer": None, "add_prefix_space": False, "use_regex": True}


def bytes_to_unicode():
    """Return a visible character for each byte: Latin-1's own, or one from U+0100 on.

    >>> "".join(bytes_to_unicode()[byte] for byte in "a café".encode("utf-8"))
    'aĠcafÃ©'
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Encoder:
    """A tokenizer: the ids of its tokens, and the pairs to merge into tokens, the first one first.

    `special` and `added` name the tokens that stand for a text as a whole, such as <|endoftext|>.
    Special ones are found first and added ones in the rest, as in Hugging Face's `tokenizers`.

    >>> merges = [("l", "o"), ("lo", "w"), ("e", "r")]
    >>> tokens = [*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    >>> toy = Encoder({token: id for id, token in enumerate(tokens)}, merges, ["<|endoftext|>"])
    >>> toy.bpe("lower")
    ['low', 'er']
    >>> toy.encode("lower<|endoftext|>", allowed_special="all")
    [257, 258, 259]
    >>> toy.decode([257, 258])
    'lower'
    """

    def __init__(self, encoder, bpe_merges, special=(), added=()):
        self.encoder = encoder
        self.bpe_ranks = {tuple(pair): rank for rank, pair in enumerate(bpe_merges)}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        self.special = {token: encoder[token] for token in (*special, *added)}
        self.added = {*added}
        self.decoder = {id: self.spell(token) for token, id in encoder.items()}
        self.cache = {}

    def spell(self, token):
        """Write a token with one visible character for each byte, as most are written already."""
        if token in self.special or not self.byte_decoder.keys() >= {*token}:
            return "".join(self.byte_encoder[byte] for byte in token.encode("utf-8"))
        return token

    def bpe(self, word):
        """Merge neighbours in one word, each time the pair that comes first in the merges."""
        # Every part stands between two spaces of its own, so that only whole parts are replaced.
        parts = "".join(f" {char} " for char in word)
        while pairs := {pair for pair in pairwise(parts.split()) if pair in self.bpe_ranks}:
            first, second = min(pairs, key=self.bpe_ranks.get)
            parts = parts.replace(f" {first}  {second} ", f" {first}{second} ")
        return parts.split()

    def encode(self, text, allowed_special=()):
        """Turn text into ids. As in OpenAI's code, <|endoftext|> is plain text like any other.

        With `allowed_special`, special and added tokens in the text become one id each: "all" of
        them, or those in a set of their names. Where several begin, the longest counts. Raises
        ValueError for a lone surrogate, which has no UTF-8, and for a byte that has no token.
        """
        allowed = self.special if allowed_special == "all" else allowed_special
        names = (self.special.keys() & allowed) - {""}
        ids = []
        for piece in cut(text, names - self.added):
            for part in [piece] if piece in names else cut(piece, names & self.added):
                ids += [self.special[part]] if part in names else self.encode_ordinary(part)
        return ids

    def encode_ordinary(self, text):
        """Turn text into ids, without a look for special and added tokens."""
        words = regex.findall(PATTERN, text)
        for word in {*words}.difference(self.cache):
            parts = self.bpe(self.byte_encoder[byte] for byte in word.encode("utf-8"))
            if lost := [part for part in parts if part not in self.encoder]:
                byte = f"{self.byte_decoder[lost[0]]:#04x}"
                raise ValueError(f"the vocabulary has no token for the byte {byte} in {word!r}")
            self.cache[word] = [self.encoder[part] for part in parts]
        return [id for word in words for id in self.cache[word]]

    def decode(self, ids):
        """Turn ids into text, with U+FFFD for what is no UTF-8. Raises ValueError for no id."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids):
        """Yield the text of each id as it comes. A character that is cut in two waits for its rest.

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


def cut(text, names):
    """Cut a text before and after each of these tokens."""
    pattern = "|".join(map(regex.escape, sorted(names, key=len, reverse=True)))
    return regex.split(f"({pattern})", text) if names else [text]


def get_encoder(model_name, models_dir):
    """Read the tokenizer in the folder `models_dir/model_name`.

    It is in Hugging Face's `tokenizer.json`, or else in `vocab.json` and `merges.txt`, or else in
    OpenAI's `encoder.json` and `vocab.bpe`. The flags `lstrip`, `rstrip` and `single_word` of added
    tokens are ignored. Raises FileNotFoundError where a file is missing, and ValueError where one
    is damaged, or is not of GPT-2's kind.
    """
    folder = Path(models_dir, model_name)
    name = next((name for name in FILES if (folder / name).exists()), "tokenizer.json")
    content = read_json(folder / name)
    if FILES[name]:
        merges = regex.findall(r"(?m)^(?!#version).+$", read_text(folder / FILES[name]))
        content = {"model": {"vocab": content, "merges": merges}, "pre_tokenizer": {}}
    try:
        model, found = content["model"], OPTIONS | content | content["pre_tokenizer"]
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        ids, special = read_added_tokens(folder, content.get("added_tokens", []))
        encoder, merged = model["vocab"] | ids, {*map("".join, merges)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / name} is no byte-level BPE: {error!r}") from None
    if wrong := [option for option in OPTIONS if found[option] != OPTIONS[option]]:
        rule = f"{wrong[0]} must be {OPTIONS[wrong[0]]!r}, as in GPT-2's byte-level BPE"
        raise ValueError(f"{folder / name}: {rule}")
    if {*map(repr, encoder.values())} != {*map(repr, range(len(encoder)))}:
        raise ValueError(f"{folder / name} does not number its tokens from 0 on without a gap")
    # All other tokens are single bytes or come from merges, but for unused ones such as [PAD].
    others = encoder.keys() - ids.keys() - special
    plain = {token for token in others if not regex.fullmatch(r".|<.+>|\[.+\]", token)}
    if {*map(len, merges)} - {2} or not plain <= merged <= encoder.keys():
        raise ValueError(f"{folder / (FILES[name] or name)} and {name} do not belong together")
    return Encoder(encoder, merges, special & encoder.keys(), ids.keys() - special)


def read_added_tokens(folder, entries):
    """Return the ids of special and added tokens, and the names of the special ones.

    `tokenizers` lists them in tokenizer.json, as `entries`. Slow tokenizers wrote three files
    beside vocab.json, and some of these only name a token that has its id in the vocabulary.
    """
    files = ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
    paths = [folder / name for name in files]
    ids, config, roles = (read_json(path) if path.exists() else {} for path in paths)
    decoder = config.pop("added_tokens_decoder", {})
    entries = [*entries, *({"id": int(id)} | entry for id, entry in decoder.items())]
    ids |= {entry["content"]: entry["id"] for entry in entries}
    # Tokens that are not "normalized" are those that `tokenizers` finds first.
    first = {e["content"] for e in entries if not e.get("normalized", not e.get("special"))}
    named = names([value for key, value in (config | roles).items() if "_token" in key])
    return ids, first | named | ({"<|endoftext|>"} - ids.keys())


def names(field):
    """Return all texts in a value of JSON, however deep they stand in dicts and lists."""
    if isinstance(field, str):
        return {field}
    items = field.values() if isinstance(field, dict) else field if isinstance(field, list) else ()
    return {name for item in items for name in names(item)}


def read_json(path):
    """Read the dict in a JSON file. Raises ValueError, which names the file, for anything else."""
    try:
        return {**json.loads(read_text(path))}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None


def read_text(path):
    """Read UTF-8, with or without a byte order mark; every line end becomes "\\n".

    Raises ValueError, which names the file, for anything else.
    """
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason}") from None
