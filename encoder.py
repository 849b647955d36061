"""GPT-2's byte-level byte-pair encoding (BPE): from text to the ids of tokens, and back."""

import codecs
import json
import reprlib
from itertools import pairwise
from pathlib import Path

import regex

END_OF_TEXT = "<|endoftext|>"
# A text is cut into words first, and each word into tokens. A word is an ending such as 's, or a
# run of letters, of digits or of other signs, with the space before it. So a run of white space
# before a word is cut before its last character, which may be that space.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class UserError(ValueError):
    """A mistake that the user can correct, such as a damaged file or a number that is too large.

    The command prints only its message. Any other ValueError is a bug, and keeps its traceback.
    """


def bytes_to_unicode():
    """Return a visible character for each byte.

    A byte that is a visible character in Latin-1 stands for that character. The others get the
    characters from U+0100 on.

    >>> "".join(bytes_to_unicode()[byte] for byte in "a café".encode("utf-8"))
    'aĠcafÃ©'
    """
    chars = {byte: chr(byte) for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")}
    hidden = [byte for byte in range(256) if byte not in chars]
    return chars | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


class Encoder:
    """A tokenizer, made of the ids of its tokens, and of the pairs to merge, in order of priority.

    Special and added tokens, such as <|endoftext|>, can be found in a text before it is cut into
    words: the special ones first, and the added ones in the rest, as in Hugging Face's library
    `tokenizers`. `bos` are the ids that start a text, and `eos` those that end one. Both are
    <|endoftext|>, if the vocabulary has it. The loader of a model may set others.

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
        self.decoder = {id: token for token, id in encoder.items()}
        self.bpe_ranks = {tuple(pair): rank for rank, pair in enumerate(bpe_merges)}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        names = {*special, *added, END_OF_TEXT} - {""}  # An empty name cannot be found in a text.
        # `special` has the ids of both kinds, and `added` only the names of the second kind.
        self.special = {token: encoder[token] for token in names & encoder.keys()}
        self.added = {*added}
        self.bos = [encoder[END_OF_TEXT]] if END_OF_TEXT in encoder else []
        self.eos = {*self.bos}
        self.cache = {}

    def bpe(self, word):
        """Merge neighbours in one word, each time the pair with the highest priority."""
        # Each part has a space on both sides, so that only whole parts are replaced: with the pair
        # ("l", "o"), " l  o  w " becomes " lo  w ".
        parts = "".join(f" {char} " for char in word)
        while pairs := {pair for pair in pairwise(parts.split()) if pair in self.bpe_ranks}:
            first, second = min(pairs, key=self.bpe_ranks.get)
            parts = parts.replace(f" {first}  {second} ", f" {first}{second} ")
        return parts.split()

    def encode(self, text, allowed_special=()):
        """Turn text into ids. By default, <|endoftext|> is plain text, as in OpenAI's code.

        `allowed_special` is a set of special and added tokens, or "all". In the text, these become
        one id each. If several of one kind begin at one place, the longest is taken. Raises
        ValueError for a text that cannot be written in UTF-8, and for a byte without a token.
        """
        allowed = self.special if allowed_special == "all" else allowed_special
        names = self.special.keys() & allowed
        found_last = names & self.added
        found_first = names - found_last
        ids = []
        for piece in cut(text, found_first):
            # A token that was found is not cut again, even if the name of another one is in it.
            parts = [piece] if piece in found_first else cut(piece, found_last)
            for part in parts:
                ids += [self.special[part]] if part in names else self.encode_ordinary(part)
        return ids

    def encode_ordinary(self, text):
        """Turn text into ids, without looking for special and added tokens."""
        words = regex.findall(PATTERN, text)
        for word in {*words}.difference(self.cache):
            tokens = self.bpe(self.byte_encoder[byte] for byte in word.encode("utf-8"))
            for token in tokens:
                if token not in self.encoder:  # It is a single byte: every merge makes a token.
                    where = f"{self.byte_decoder[token]:#04x} in {reprlib.repr(word)}"
                    raise UserError(f"the vocabulary has no token for the byte {where}")
            self.cache[word] = [self.encoder[token] for token in tokens]
        return [id for word in words for id in self.cache[word]]

    def decode(self, ids):
        """Turn ids into text, with U+FFFD for bytes that are not UTF-8.

        Raises ValueError for an id that is not in the vocabulary.
        """
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids):
        """Yield the text of each id as it comes. A part of a character waits for the next id.

        >>> toy = Encoder({char: byte for byte, char in bytes_to_unicode().items()}, [])
        >>> list(toy.decode_stream(toy.encode("né!")))
        ['n', '', 'é', '!', '']
        """
        utf_8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            if id not in self.decoder:
                raise UserError(f"the vocabulary has no token with the id {id}")
            yield utf_8.decode(self.token_bytes(self.decoder[id]))
        yield utf_8.decode(b"", final=True)

    def token_bytes(self, token):
        """Return the bytes that a token stands for.

        Most tokens are spelled with one visible character for each byte. Special and added tokens
        are spelled as they look, and so are unused tokens such as [日本].
        """
        if token not in self.special and all(char in self.byte_decoder for char in token):
            return bytes(self.byte_decoder[char] for char in token)
        return token.encode("utf-8", "surrogatepass")


def cut(text, names):
    """Cut a text before and after each of these tokens."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(map(regex.escape, longest_first))
    return regex.split(f"({pattern})", text) if names else [text]


# --- Reading a tokenizer from its folder ---

# The files that can have the vocabulary, in order of priority, and the file that has the merges.
TOKENIZERS = {"tokenizer.json": None, "vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
# Hugging Face's classes that give GPT-2's ids with these files.
CLASSES = {"GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"}


def get_encoder(model_name, models_dir):
    """Read the tokenizer in the folder `models_dir/model_name`.

    It is in Hugging Face's `tokenizer.json`, or else in `vocab.json` and `merges.txt`, or else in
    OpenAI's `encoder.json` and `vocab.bpe`. The flags `lstrip`, `rstrip` and `single_word` of added
    tokens are ignored. Raises FileNotFoundError if the merges are missing, and ValueError if there
    is no tokenizer, or if it is damaged, or has settings that would change the ids.
    """
    folder = home(Path(models_dir, model_name))
    found = [folder / name for name in TOKENIZERS if (folder / name).exists()]
    if not found:
        kinds = "tokenizer.json, or vocab.json and merges.txt, or encoder.json and vocab.bpe"
        raise UserError(f"{folder} has no tokenizer that is understood. It must have {kinds}.")
    path = found[0]
    read = read_tokenizer_json if path.name == "tokenizer.json" else read_two_files
    added_ids = read_json(folder / "added_tokens.json", optional=True)
    named = read_named_tokens(folder)
    try:
        vocabulary, merges, special, added = read(path, added_ids, named)
        check_vocabulary(path, vocabulary, merges, special | added)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a byte-level BPE tokenizer: {error!r}") from None
    return Encoder(vocabulary, merges, special, added)


def read_tokenizer_json(path, added_ids, named):
    """Return the vocabulary, the merges, the special and the added tokens of a `tokenizer.json`.

    Settings that would give other ids in the library `tokenizers` are refused. The tests compare
    the ids with those of that library. All ids come from this file. If it lacks a token that is in
    `added_ids` or in `named`, `check_vocabulary` raises.
    """
    content = read_json(path)
    model, pre_tokenizer = content["model"], content["pre_tokenizer"]
    require(path, content, normalizer=None)
    require(path, pre_tokenizer, type="ByteLevel", add_prefix_space=False, use_regex=True)
    require(path, content.get("decoder") or {}, type="ByteLevel")
    require(path, model, dropout=None, ignore_merges=False, byte_fallback=False)
    require(path, model, continuing_subword_prefix=None, end_of_word_suffix=None)
    processor = content.get("post_processor") or {}
    # A sequence has a list of steps. Any other processor is a single step.
    steps = processor.get("processors", [processor])
    for step in steps:
        where = f"{path}: post_processor {reprlib.repr(step.get('type'))}"
        # A template adds `special_tokens` to every text. Some other steps add `cls` and `sep`. A
        # sequence in a sequence is not supported.
        require(where, step, special_tokens=None, cls=None, sep=None, processors=None)
    entries = content.get("added_tokens", [])
    ids = {entry["content"]: entry["id"] for entry in entries}
    # Tokens that are "normalized" are found last, as added ones, and all others first, as special
    # ones. If an entry does not say which, a token is normalized unless it is special.
    found_last = {e["content"] for e in entries if e.get("normalized", not e.get("special"))}
    # The names from other files are kept, so that `check_vocabulary` refuses those without an id.
    names = named | added_ids.keys() | ids.keys()
    found_first = names - found_last
    # Older files have each merge as one string.
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return model["vocab"] | ids, merges, found_first, found_last


def read_two_files(path, added_ids, named):
    """Return the same four parts of `vocab.json` and `merges.txt`, or of OpenAI's two files."""
    lines = read_text(path.with_name(TOKENIZERS[path.name])).split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    vocabulary = read_json(path) | added_ids
    return vocabulary, merges, named, added_ids.keys() - named


def read_named_tokens(folder):
    """Return the tokens that are named in the settings beside a tokenizer, such as a `pad_token`.

    Hugging Face's library finds these tokens in a text, even if the tokenizer itself does not.
    """
    values = []
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        settings = read_json(path, optional=True)
        tokenizer_class = str(settings.get("tokenizer_class") or "GPT2Tokenizer")
        if tokenizer_class not in CLASSES:
            raise UserError(f"{path}: tokenizer_class {reprlib.repr(tokenizer_class)} is unknown")
        require(path, settings, add_bos_token=False, add_eos_token=False, add_prefix_space=False)
        require(path, settings, split_special_tokens=False)
        for field, value in settings.items():
            if field.endswith(("_token", "special_tokens", "added_tokens_decoder")):
                values.append(value)
    tokens = set()
    # A value is a string, a dict with the string as its content, or a list or dict of these. What
    # is in a list or a dict is appended to `values`, and so it comes later in this loop.
    for value in values:
        if isinstance(value, str):
            tokens.add(value)
        elif isinstance(value, dict) and "content" in value:
            values.append(value["content"])
        elif isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
    return tokens


def check_vocabulary(path, vocabulary, merges, names):
    """Raise UserError unless the ids have no gap, every merge makes a token, and every token that
    needs a merge has one. `names` are the special and the added tokens, which need none.
    """
    ids = vocabulary.values()
    if any(type(id) is not int for id in ids) or sorted(ids) != [*range(len(ids))]:
        raise UserError(f"{path} does not number its tokens from 0 on without a gap")
    if any(not isinstance(token, str) for token in names):
        raise UserError(f"{path}: an added token must be a string")
    for token in names - vocabulary.keys() - {""}:
        raise UserError(f"{path} has no token {reprlib.repr(token)}, but a file beside it names it")
    problem = f"{path}: its tokens and its merges do not belong together"
    if any(len(pair) != 2 for pair in merges):
        raise UserError(f"{problem}: a merge does not have two parts")
    if len({*map(tuple, merges)}) < len(merges):
        raise UserError(f"{problem}: a merge appears twice")
    merged = {*map("".join, merges)}
    for token in merged - vocabulary.keys():
        raise UserError(f"{problem}: a merge makes {reprlib.repr(token)}, which is not a token")
    # The rest are single characters, an empty token, and unused ones such as [PAD] or <pad>.
    for token in vocabulary.keys() - merged - names:
        if not regex.fullmatch(r".?|<.+>|\[.+\]", token):
            raise UserError(f"{problem}: no merge makes the token {reprlib.repr(token)}")


# --- Reading files ---


def require(where, settings, **wanted):
    """Raise UserError if a setting is there and is not as wanted."""
    for name, value in wanted.items():
        if name not in settings:
            continue
        found = settings[name]
        both_are_off = not found and not value  # In a file, null, "" and false mean the same.
        if found != value and not both_are_off:
            raise UserError(f"{where}: {name} must be {value!r}, not {reprlib.repr(found)}")


def read_json(path, optional=False):
    """Return the dict in a JSON file. An optional file that is not there counts as an empty dict.

    Raises UserError, which names the file, if it holds anything else.
    """
    if optional and not path.exists():
        return {}
    text = read_text(path)
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is not a JSON object: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def read_text(path):
    """Read UTF-8, with or without a byte order mark. Every line end becomes a line feed.

    Raises UserError, which names the file, if it is not UTF-8.
    """
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason}") from None


def home(path):
    """Return a path, with the user's home in place of a ~ at its start."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from None
