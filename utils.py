"""Open a GPT-2 from its folder, download OpenAI's models, and run the command.

    encoder, hparams, params = load_encoder_hparams_and_params("124M", "models")

A model is a table of contents and raw numbers. The table says for every tensor its name, its type,
its shape and where its bytes lie. OpenAI's table is `model.ckpt.index`, and Hugging Face's is the
head of `model.safetensors`. So nothing is converted: the file of numbers is mapped into memory, and
the parameters are views of it. The system reads a page of the file when it is first used.
"""

import collections
import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

from encoder import FILES as TOKENIZERS
from encoder import get_encoder, read_json, read_text

SIZES = ("124M", "355M", "774M", "1558M")
DATA = "model.ckpt.data-00000-of-00001"
FILES = ("checkpoint", "hparams.json", "encoder.json", "vocab.bpe", "model.ckpt.index", DATA)
SHA256 = {  # of the tokenizer, which is the same in all sizes
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"

# The five sizes by OpenAI's names; by Hugging Face's, with the defaults of its library; and the
# other fields of a config.json, with the values that `gpt2` computes.
HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
CONFIG = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
COMPUTED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
COMPUTED |= {"tie_word_embeddings": True, "scale_attn_weights": True, "add_cross_attention": False}
COMPUTED |= {"scale_attn_by_inverse_layer_idx": False, "quantization_config": None}
# NumPy's names for the types of safetensors, and for those of TensorFlow, which are numbers. NumPy
# has no bfloat16: it is read as whole numbers of the same size.
TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", 1: "<f4", 19: "<f2", 14: "<u2"}
QUOTES = "If a text has several words, put it in quotes."


# --- Load: from a folder to the tokenizer, the sizes and the parameters ---


def load_encoder_hparams_and_params(model_size, models_dir):
    """Load the model in `models_dir/model_size`. A published size that is missing is downloaded.

    Returns the `Encoder`, OpenAI's hparams as a dict, and the parameters as nested dicts and lists
    of float32 arrays, which are read-only. A folder with a `config.json` has Hugging Face's layout.
    `wte` may have more rows than there are tokens, to pad it to a round number. Such rows are cut
    off, so that they cannot be chosen.

    Raises ValueError for a name that is no model, and for a file that is damaged or that holds
    something else than GPT-2; OSError for a file that is missing or cannot be downloaded.
    """
    models = Path(models_dir).expanduser()
    names = sorted({path.parent.name for path in models.glob("*/*")}.difference(SIZES))
    if model_size not in (*SIZES, *names):
        where = f"a folder in {models.absolute()} ({', '.join(names) or 'there is none'})"
        raise ValueError(f"model_size must be {', '.join(SIZES)}, or {where}, not {model_size!r}")
    folder = models / model_size
    hugging_face = (folder / "config.json").exists()
    if model_size in SIZES and not hugging_face:
        download_gpt2_files(model_size, folder)
    check_folder(folder)
    hparams, params = (load_hugging_face if hugging_face else load_openai)(folder)
    encoder = get_encoder(model_size, models)
    params["wte"] = params["wte"][: len(encoder.encoder)]
    hparams["n_vocab"] = len(params["wte"])
    encoder.bos, encoder.eos = find_ends(folder, encoder, range(hparams["n_vocab"]))
    return encoder, hparams, params


def check_folder(folder):
    """Raise ValueError for a folder with a model of a kind that is not read, and say what to do."""
    if not any(folder.glob("model*.safetensors*")) and not any(folder.glob("*.index")):
        if any(folder.glob("adapter_config.json")):
            raise ValueError(f"{folder} is a LoRA adapter. Merge it with its base model first.")
        if any(folder.glob("pytorch_model*")):
            load = f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
            save = f"model.save_pretrained({str(folder)!r})"
            advice = f"Convert them with these two lines:\n{load}\n{save}"
            raise ValueError(f"{folder} has its weights as a pickle. {advice}")
    if not any((folder / name).exists() for name in TOKENIZERS):
        kinds = "tokenizer.json, or vocab.json and merges.txt, or encoder.json and vocab.bpe"
        raise ValueError(f"{folder} has no tokenizer that is understood. It must have {kinds}.")


def load_openai(folder):
    """Load the sizes and the parameters from OpenAI's layout."""
    hparams = read_sizes(folder / "hparams.json")
    return hparams, load_gpt2_params_from_tf_ckpt(find_checkpoint(folder / "checkpoint"), hparams)


def load_hugging_face(folder):
    """Load the sizes and the parameters from a folder as `save_pretrained` writes it."""
    path, table = folder / "config.json", read_safetensors(folder)
    config = read_sizes(path, CONFIG, **CONFIG, **COMPUTED)
    for field, value in COMPUTED.items():
        if config[field] != value:
            raise ValueError(f"{path}: {field} is {config[field]!r}, but GPT-2 has {value!r}")
    hparams = dict(zip(HPARAMS, map(config.get, CONFIG), strict=True))
    params = build_params(hparams, lambda name, *shape: take(table, huggingface_name(name), *shape))
    head = "lm_head.weight"
    if head in table and (take(table, head, *params["wte"].shape) != params["wte"]).any():
        raise ValueError(f"{folder}: {head} is not wte.weight, as it is in GPT-2")
    return hparams, params


def find_ends(folder, encoder, ids):
    """Return the ids that an empty prompt starts from, and the set of those that end a text.

    A fine-tuned model may have others than <|endoftext|>. As in Hugging Face's library, they stand
    in `generation_config.json`, or else in `config.json`, one id or several.
    """

    def known(value):
        return [id for id in (value if isinstance(value, list) else [value]) if id in ids]

    paths = (folder / "config.json", folder / "generation_config.json")
    config, generation = (read_json(path) if path.exists() else {} for path in paths)
    endoftext = known(encoder.encoder.get("<|endoftext|>"))
    ends = known(generation.get("eos_token_id")) or known(config.get("eos_token_id")) or endoftext
    return known(config.get("bos_token_id")) or endoftext, {*ends}


def read_sizes(path, fields=HPARAMS, **defaults):
    """Read a JSON file with these fields, which must be sizes that belong together.

    Sizes are whole numbers above 0, and the heads share the width. Raises ValueError otherwise.
    """
    config = defaults | read_json(path)
    for field in fields:
        if type(config.get(field)) is not int or config[field] < 1:
            raise ValueError(f"{path}: {field} must be a number above 0, not {config.get(field)!r}")
    if config["n_embd"] % config["n_head"]:
        raise ValueError(f"{path}: n_embd must be a multiple of n_head")
    return config


def build_params(hparams, leaf):
    """Build the tree of parameters, with `leaf(name, *shape)` for each, in a fixed order.

    Names are OpenAI's without the leading `model/`. Shapes are those that `gpt2` takes.
    """
    # The layers of a block. The numbers of their shapes are multiples of n_embd.
    block = {"ln_1": [1], "attn": {"c_attn": [1, 3], "c_proj": [1, 1]}}
    block |= {"ln_2": [1], "mlp": {"c_fc": [1, 4], "c_proj": [4, 1]}}
    n_embd = hparams["n_embd"]

    def build(name, part):
        if isinstance(part, dict):
            return {key: build(f"{name}/{key}", part[key]) for key in part}
        shape = [width * n_embd for width in part]
        first = "w" if len(shape) == 2 else "g"
        return {first: leaf(f"{name}/{first}", *shape), "b": leaf(f"{name}/b", shape[-1])}

    wte, wpe = leaf("wte", hparams["n_vocab"], n_embd), leaf("wpe", hparams["n_ctx"], n_embd)
    blocks = [build(f"h{i}", block) for i in range(hparams["n_layer"])]
    return {"wte": wte, "wpe": wpe, "blocks": blocks, "ln_f": build("ln_f", [1])}


def take(table, name, *shape):
    """Return a tensor of this shape from a table of contents, as a read-only float32 array.

    It is a view of the mapped file where that has aligned float32. Everything else is copied once,
    here: a product with numbers that are not aligned would copy them each time.
    """
    if name not in table:
        there = min(table, key=lambda other: (not other.endswith(name), other), default="nothing")
        raise ValueError(f"{name} is missing from the weights, which have {there}")
    path, kind, found, content = table[name]
    if kind not in TYPES or found not in ([*shape], [1, *shape]):  # OpenAI's have an axis of 1
        raise ValueError(f"{path}: {name} is {kind} {found}, not float32 or float16 {[*shape]}")
    if content.size != np.prod(shape) * int(TYPES[kind][-1]):
        raise ValueError(f"{path} is damaged or cut off: {name} is not complete")
    array = content.view(TYPES[kind]).reshape(shape)
    if TYPES[kind] == "<u2":  # bfloat16 is the upper half of a float32
        array = (array.astype("<u4") << 16).view("<f4")
    array = np.require(array, np.float32, "A")
    array.flags.writeable = False
    return array


def map_file(path):
    """Return the bytes of a file as an array, mapped into memory."""
    empty = os.path.getsize(path) == 0  # and cannot be mapped
    return np.zeros(0, np.uint8) if empty else np.asarray(np.memmap(path, np.uint8, "r"))


# --- Hugging Face's table of contents ---


def read_safetensors(folder):
    """Read the heads of the files of weights: `model.safetensors`, or several that an index names.

    A file begins with the length of its head in 8 bytes. The head is JSON. For each tensor it has
    the type, the shape, and where the bytes begin and end, counted from the end of the head.
    """
    path, table = folder / "model.safetensors.index.json", {}
    is_split = path.exists() and not (folder / "model.safetensors").exists()
    try:
        names = {*read_json(path)["weight_map"].values()} if is_split else {"model.safetensors"}
        for path in [folder / name for name in sorted(names)]:
            content = map_file(path)
            start = 8 + int.from_bytes(content[:8].tobytes(), "little")
            head = json.loads(content[8:start].tobytes())
            head.pop("__metadata__", None)
            for name, entry in head.items():
                begin, end = entry["data_offsets"]
                numbers = content[start + begin : start + end]
                name = name.removeprefix("transformer.")
                table[name] = path, str(entry["dtype"]), entry["shape"], numbers
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error!r}") from None
    return table


def huggingface_name(name):
    """Turn OpenAI's name of a parameter into Hugging Face's.

    >>> huggingface_name("h0/attn/c_attn/w"), huggingface_name("wte")
    ('h.0.attn.c_attn.weight', 'wte.weight')
    """
    *path, last = re.sub(r"^h(\d+)", r"h/\1", name).split("/")
    kinds = {"g": "weight", "w": "weight", "b": "bias"}
    return ".".join([*path, kinds.get(last, f"{last}.weight")])


# --- TensorFlow's table of contents ---


def find_checkpoint(path):
    """Return the checkpoint that the file `checkpoint` names, as TensorFlow takes it.

    A fine-tuned model may name the folder that it was trained in, so only the last part counts.
    """
    if not path.exists():
        name = next(path.parent.glob("*.index"), Path("model.ckpt.index")).stem
        raise OSError(f'{path} is missing. It must hold this line: model_checkpoint_path: "{name}"')
    latest = re.search(r'(?m)^model_checkpoint_path: "(?:.*[/\\])?(.+)"', read_text(path))
    if not latest:
        raise ValueError(f"{path} names no checkpoint")
    return path.with_name(latest[1])


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Read a TensorFlow checkpoint into nested dicts of float32 arrays, as `gpt2` takes them.

    `tf_ckpt_path` is the path up to `.index`. Raises ValueError for a damaged file, and for a
    tensor that is missing or not of the shape that `hparams` ask for.
    """
    index, table = read_index(f"{tf_ckpt_path}.index"), {}
    n_files = sum(index.pop("")[1])
    paths = [f"{tf_ckpt_path}.data-{i:05}-of-{n_files:05}" for i in range(n_files)]
    contents = [map_file(path) for path in paths]
    for name, entry in index.items():
        file, start, size = (sum(entry[number]) for number in (3, 4, 5))
        kind = "in partitions" if entry[7] else entry[1][0]
        shape = [sum(fields(dimension)[1]) for dimension in fields(entry[2][0])[2]]
        table[name] = paths[file], kind, shape, contents[file][start : start + size]
    return build_params(hparams, lambda name, *shape: take(table, f"model/{name}", *shape))


def read_index(path):
    """Read the table that TensorFlow writes in LevelDB's format: each tensor's fields, by name.

    The last 48 bytes have the places of two blocks. The values in the second one are the places of
    the blocks that matter here. Their keys are the names. Their values are protocol buffers with
    these fields: 1 type, 2 shape, 3 number of the data file, 4 first byte, 5 size, 6 checksum, 7
    partitions. A field that is 0 is left out, so that `sum` gives its value. Under the empty name,
    field 1 is the number of data files.
    """
    content = Path(path).read_bytes()
    try:
        if content[-8:] != bytes.fromhex("57fb808b247547db"):
            raise ValueError("it does not end as an index does")
        footer = io.BytesIO(content[-48:])
        _, _, start, size = (varint(footer) for _ in range(4))
        places = [io.BytesIO(value) for _, value in read_block(content, start, size)]
        blocks = [read_block(content, varint(place), varint(place)) for place in places]
        # The keys of partitions are not UTF-8. In Latin-1, every byte is a character.
        return {key.decode("latin-1"): fields(value) for block in blocks for key, value in block}
    except (IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from None


def read_block(content, start, size):
    """Yield the keys and values of a block, if its checksum is right.

    An entry has three numbers: how many bytes of the key before are taken over, how many follow,
    and how many bytes the value has. Behind the entries stand places for a search, and their
    number. Behind the block stand a byte, which is 0 if it is not compressed, and the checksum.
    """
    block, checksum = content[start : start + size + 1], content[start + size + 1 :][:4]
    if masked_crc32c(block) != int.from_bytes(checksum, "little") or block[-1]:
        raise ValueError("a checksum is wrong")
    end = size - 4 - 4 * int.from_bytes(block[-5:-1], "little")
    stream, key = io.BytesIO(block[:end]), b""
    while stream.tell() < end:
        shared, n_key, n_value = (varint(stream) for _ in range(3))
        key = key[:shared] + stream.read(n_key)
        yield key, stream.read(n_value)


def fields(message):
    """Read a protocol buffer: the values of each field, by its number."""
    found, stream = collections.defaultdict(list), io.BytesIO(message)
    while stream.tell() < len(message):
        number, kind = divmod(varint(stream), 8)
        size = {1: 8, 5: 4}.get(kind) or varint(stream)
        found[number].append(stream.read(size) if kind else size)
    return found


def varint(stream):
    """Read a number that has 7 bits in each byte, the lowest first.

    >>> varint(io.BytesIO(bytes([0b1010_1100, 0b0000_0010])))
    300
    """
    byte = stream.read(1)[0]
    return byte if byte < 128 else byte - 128 + 128 * varint(stream)


def masked_crc32c(content):
    """Return the checksum of some bytes as TensorFlow stores it."""
    import google_crc32c

    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


# --- Download: OpenAI's six files, each whole or not at all ---


def download_gpt2_files(model_size, model_dir):
    """Download those files of a published size that `model_dir` lacks.

    `GPT2_BASE_URL` in the environment replaces the address up to `/<size>/<file>`. Raises
    ValueError for a size that was not published, and OSError where the network, the server or the
    disk fails, or a file fails its check. What has come of a file is kept, and the next call goes
    on from there.
    """
    if model_size not in SIZES:
        raise ValueError(f"model_size must be {', '.join(SIZES)}, not {model_size!r}")
    paths = [Path(model_dir, name) for name in FILES]
    if all(path.exists() for path in paths):
        return
    from filelock import FileLock

    url = f"{(os.environ.get('GPT2_BASE_URL') or BASE_URL).rstrip('/')}/{model_size}"
    print(f"Downloading {model_size} from {url} to {model_dir}", file=sys.stderr)
    Path(model_dir).mkdir(parents=True, exist_ok=True)
    # One process at a time, so that none writes into what another one has checked.
    with FileLock(Path(model_dir, ".lock")):
        for path in paths:
            if not path.exists():
                fetch(f"{url}/{path.name}", path)


def fetch(url, path):
    """Bring one file under a temporary name, check it, and only then give it its own.

    A file that is there in part is asked for from its last byte on, so that a complete one is no
    case of its own. A line that breaks is taken up again as long as bytes come.
    """
    import requests
    import urllib3
    from tqdm import tqdm

    busy = [408, 429, *range(500, 600)]
    retry = urllib3.Retry(4, 2, backoff_factor=0.5, status_forcelist=busy, retry_after_max=30)
    session = requests.Session()
    session.mount(url, requests.adapters.HTTPAdapter(max_retries=retry))
    part = path.with_name(f"{path.name}.part")
    while True:
        with open(part, "ab") as file:
            size = file.tell()
            start = max(size - 1, 0)
            headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-" if start else None}
            try:
                response = session.get(url, headers=headers, stream=True, timeout=(3, 10))
                if response.status_code == 416 and start:  # the part is longer than the file
                    file.truncate(0)
                    continue
                response.raise_for_status()
                start = start if response.status_code == 206 else 0
                file.truncate(file.seek(start))
                total = start + (response.raw.length_remaining or 0)
                with tqdm.wrapattr(file, "write", total, desc=path.name, initial=start) as out:
                    while chunk := response.raw.read1(1 << 16):
                        out.write(chunk)
                break
            except (OSError, urllib3.exceptions.HTTPError) as error:
                if file.tell() <= size:
                    # The cause is inside urllib3's error, which is inside that of requests.
                    cause = getattr([*error.args, error][0], "reason", error)
                    advice = "Run again to go on from what came. --model_size 1M needs no network."
                    raise OSError(f"{url} did not arrive in {part}: {cause}\n{advice}") from None
    try:
        check_download(path.name, part)
    except ValueError as error:
        part.unlink()
        raise OSError(f"{error}\nThat file is deleted. Run again to download it anew.") from None
    part.replace(path)


def check_download(name, part):
    """Raise ValueError unless the file that came for a name is what the name promises."""
    if name in SHA256 and hashlib.sha256(part.read_bytes()).hexdigest() != SHA256[name]:
        raise ValueError(f"{part} is not OpenAI's file: it has another SHA-256.")
    readers = {"checkpoint": find_checkpoint, "hparams.json": read_sizes}
    readers |= {"model.ckpt.index": read_index}
    if name in readers:
        readers[name](part)  # This raises ValueError for a damaged file.
    if name == DATA:
        with open(part, "rb") as file:
            for tensor, entry in read_index(part.with_name("model.ckpt.index")).items():
                file.seek(sum(entry[4]))
                checksum = masked_crc32c(file.read(sum(entry[5])))
                if tensor and checksum != int.from_bytes(b"".join(entry[6]), "little"):
                    raise ValueError(f"{part} is damaged: {tensor} has another checksum.")


# --- Command: from the words in a shell to the text ---


def command_line(main):
    """Run `main` with the words typed in a shell. A mistake ends in a line that says what to do.

    What `main` returns is printed, or, if it takes an argument `show`, what it gives to that.
    """
    arguments = {}
    try:
        for stream in (sys.stdin, sys.stdout):
            if stream and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
                stream.reconfigure(encoding="utf-8")  # whatever the system's code page is
        sys.stdout.reconfigure(errors="replace")  # for a terminal that knows fewer characters
        arguments = read_arguments(main)
        text = main(**arguments)
        return print("" if "show" in arguments else text, flush=True)
    except ImportError as error:
        status = f"{error}: pip install -r requirements.txt"
    except BrokenPipeError:  # The reader has enough, as `head` may.
        status = 141
    except KeyboardInterrupt:
        status = 130
    except UnicodeDecodeError as error:
        status = f"Standard input is not {error.encoding}: {error.reason}"
    except (MemoryError, OSError, ValueError) as error:
        status = str(error) or "There is not enough memory."
        name = status.split(" ")[0]
        if name in arguments and name not in " ".join(sys.argv).replace("-", "_"):
            status += f"\n{QUOTES}"  # A word of the prompt was taken for the value of an option.
    try:
        print(end="\n" if status == 130 else "", flush=True)
    except OSError:  # The rest goes nowhere, so that Python's own end does not fail by it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def read_arguments(main):
    """Return what was typed for `main`, by name and as text. Prints help if that was asked for."""
    import fire

    def record(*words):
        typed.update(signature.bind_partial(*words).arguments)

    typed, signature = {}, inspect.signature(main)
    options = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    functools.update_wrapper(record, main).__signature__ = signature.replace(parameters=options)
    if {"-h", "--help"} & {*sys.argv}:
        trace = fire.trace.FireTrace(record, name=os.path.basename(sys.argv[0]))
        print(fire.helptext.HelpText(record, trace), flush=True)
        sys.exit()
    options = [p.replace(default=None) if p.name == "prompt" else p for p in options]
    record.__signature__ = signature.replace(parameters=options)
    fire.parser.DefaultParseValue = str  # Otherwise the prompt 42 would arrive as a number.
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            # What follows the last -- are Fire's own flags. Its separator would be -, a prompt.
            fire.Fire(record, [*sys.argv[1:], "--", "--separator=\0"])
    except fire.core.FireExit as error:
        fault = error.trace.elements[-1].ErrorAsStr()
        fault = fault.replace("Could not consume arg", "Not understood")
        hint = f"{QUOTES} " if re.match("Not understood: [^-]", fault) else ""
        raise ValueError(f"{fault}\n{hint}See python {sys.argv[0]} --help.") from None
    if "prompt" in signature.parameters:
        typed["prompt"] = read_prompt(typed.get("prompt"))
    if "show" in signature.parameters:
        typed["show"] = functools.partial(print, end="", flush=True)
    return typed


def read_prompt(prompt):
    """Return the prompt, from standard input where it is - or left out, with "\\n" as line ends."""
    left_out = prompt is None
    if prompt == "-" or (left_out and not sys.stdin.isatty()):
        prompt = sys.stdin.read().removesuffix("\n")
    if left_out and not prompt:
        raise ValueError(f"There is no prompt. See python {sys.argv[0]} --help.")
    prompt = re.sub("\r\n?", "\n", prompt.removeprefix("\ufeff").removesuffix("\r"))
    if prompt.endswith(" "):
        print("The prompt ends in a space. Omit it: GPT-2's words begin with one.", file=sys.stderr)
    return prompt


def number(name, value, kind, least, most=np.inf):
    """Read an option, which may be text, as a `kind` of number.

    Raises ValueError, with the limits, for anything else and for what is out of range.
    """
    with contextlib.suppress(ValueError):
        if least <= kind(str(value)) <= most:
            return kind(str(value))
    limits = f"{least} or more" if most == np.inf else f"from {least} to {most}"
    what = "a whole number" if kind is int else "a number"
    raise ValueError(f"{name} must be {what}, {limits}, not {value!r}")


def picker(sample, temperature, top_k, top_p, seed):
    """Return the function that picks each token: greedy, or `sample` with these limits.

    Any of the four options switches sampling on, at temperature 1 unless another one is given.
    Temperature 0 is greedy. What is typed arrives as text, so that even `--top_p 1.0` counts.
    """
    if temperature is None:
        temperature = 0 if (top_k, top_p, seed) == (None, 1.0, None) else 1
    limits = {"temperature": number("temperature", temperature, float, 0)}
    limits["top_k"] = None if top_k is None else number("top_k", top_k, int, 1)
    limits["top_p"] = number("top_p", top_p, float, 0, 1)
    random = np.random.default_rng(None if seed is None else number("seed", seed, int, 0))
    sampling = functools.partial(sample, random=random, **limits)
    return sampling if limits["temperature"] else np.argmax
