"""Load a GPT-2 model from its folder, and download OpenAI's models.

    encoder, hparams, params = load_encoder_hparams_and_params("124M", "models")

The file of weights is mapped into memory, and the parameters are views of it. So numbers in float32
need no copy, and the system reads each page of the file when that page is first used.

Packages that only a download needs are imported in the functions that use them.
"""

import base64
import collections
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

from encoder import UserError, brief, get_encoder, home, read_json, read_text, require

MODELS = Path(__file__).resolve().parent / "models"
SIZES = ("124M", "355M", "774M", "1558M")
DATA = "model.ckpt.data-00000-of-00001"
FILES = ("checkpoint", "hparams.json", "encoder.json", "vocab.bpe", DATA)
# What a folder must have, for the message about a file that is missing.
LAYOUTS = (
    "A model has the files of `save_pretrained`: config.json, model.safetensors and tokenizer.json "
    f"(or vocab.json and merges.txt), or those of OpenAI's code: {', '.join(FILES)}."
)
BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
MAX_REQUESTS = 20  # for each file; if the connection breaks, the next request is for the rest
BUNDLED = "The bundled model, 1M, needs no network: --model_size 1M"

# --- Load: from a folder to the tokenizer, the sizes and the parameters ---

# OpenAI's names of the hparams, and Hugging Face's.
HPARAMS = {
    "n_vocab": "vocab_size", "n_ctx": "n_positions",
    "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer",
}  # fmt: skip
# Hugging Face's defaults for them.
DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
# Settings that change what a model computes, each with the only value that `gpt2` supports. None
# means that it must not be set.
FIXED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True, "scale_attn_weights": True, "add_cross_attention": False,
    "scale_attn_by_inverse_layer_idx": False, "quantization_config": None,
    # Other names for n_head and n_layer, which are not read. No shape would show a wrong n_head.
    "num_attention_heads": None, "num_hidden_layers": None,
}  # fmt: skip
# Hugging Face's other names for the formula of `gelu_new`.
GELU_NEW = ("gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")


def load_encoder_hparams_and_params(model_size, models_dir=None):
    """Load a model.

    `model_size` is a published size, the bundled 1M, the name of a folder in `models_dir`, or the
    path of any other folder. A published size that is missing is downloaded into
    `models_dir/model_size`. By default, `models_dir` is the folder `models` beside this file.

    A folder with a `config.json` has Hugging Face's layout. From its `generation_config.json`, only
    the ids that start and end a text are used. A file may pad `wte` with rows that belong to no
    token. They are cut off, so that they cannot be chosen.

    Returns the `Encoder`, OpenAI's hparams as a dict, and the parameters as nested dicts and lists
    of float32 arrays, which are read-only. Raises ValueError for a name that is not a model's, and
    for a file that is damaged or not GPT-2's; OSError for a file that is missing, or that cannot be
    read or downloaded.
    """
    folder = find_model(model_size, models_dir)
    try:
        if is_hugging_face(folder):
            hparams, params = load_hugging_face(folder)
        else:
            hparams = read_hparams(folder / "hparams.json", HPARAMS)
            params = load_gpt2_params_from_tf_ckpt(find_checkpoint(folder), hparams)
        encoder = get_encoder(folder.name, folder.parent)
    except FileNotFoundError as error:  # It comes from a file of the folder, so it has a name.
        missing = os.path.basename(error.filename)[:60]
        raise FileNotFoundError(f"{folder} has no {missing}. {LAYOUTS}") from None
    params["wte"] = params["wte"][: len(encoder.encoder)]
    hparams["n_vocab"] = len(params["wte"])
    set_ends(encoder, folder, hparams["n_vocab"])
    return encoder, hparams, params


def find_model(model_size, models_dir):
    """Return the folder of a model. A published size that is missing is downloaded first."""
    models = MODELS if models_dir is None else home(models_dir)
    if model_size in SIZES:
        folder = models / model_size
        if not is_hugging_face(folder):
            download_gpt2_files(model_size, folder)
        return folder
    is_path = re.search(r"[/\\]|^\.\.?$", str(model_size))
    # A path such as ../tuned starts in the current directory, and never in `models`. The bundled 1M
    # is in MODELS, whatever `models_dir` is.
    folders = [] if is_path else [models / model_size, MODELS / model_size]
    for folder in [*folders, home(model_size)]:
        if model_size and os.path.isdir(folder):  # which is False, and no error, for a long name
            return folder
    choices = f"{', '.join(SIZES)}, 1M, a folder in {models}, or the path of one"
    raise UserError(f"The model must be {choices}, not {brief(model_size)}")


def is_hugging_face(folder):
    """Whether a folder has Hugging Face's layout, even if some of its files are missing."""
    return (folder / "config.json").exists() or any(folder.glob("model*.safetensors*"))


def read_hparams(path, names, **defaults):
    """Return the content of a JSON file that has the hparams under these names.

    The names are OpenAI's or Hugging Face's. n_embd and n_head are the same in both. Raises
    UserError unless all are whole numbers from 1 to 999,999, and n_embd is a multiple of n_head.
    (A model of a billion layers would fill the memory before its file is found too small.)
    """
    hparams = defaults | read_json(path)
    for name in names:
        value = hparams.get(name)
        if type(value) is not int or not 0 < value < 10**6:
            limits = "a whole number from 1 to 999,999"
            raise UserError(f"{path}: {name} must be {limits}, not {brief(value)}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise UserError(f"{path}: n_embd must be a multiple of n_head")
    return hparams


def set_ends(encoder, folder, n_vocab):
    """Set the ids that start and end a text, if the model's configuration names some.

    A field in `generation_config.json` replaces the same field in `config.json`.
    """
    config = read_json(folder / "config.json", optional=True)
    config |= read_json(folder / "generation_config.json", optional=True)

    def valid_ids(value):
        ids = value if isinstance(value, list) else [value]
        return [id for id in ids if type(id) is int and 0 <= id < n_vocab]

    encoder.bos = valid_ids(config.get("bos_token_id")) or encoder.bos
    encoder.eos = {*valid_ids(config.get("eos_token_id"))} or encoder.eos


def build_params(hparams, leaf):
    """Build the tree of parameters, with `leaf(name, *shape)` for each of them.

    This is the only list of the parameters. The names are OpenAI's without the `model/` at their
    start. The shapes are those that `gpt2` takes, and the files have the same. The order of the
    calls only matters where `leaf` returns random numbers, as in `examples/train.py`.
    """
    n_embd = hparams["n_embd"]

    def norm(name):
        return {"g": leaf(f"{name}/g", n_embd), "b": leaf(f"{name}/b", n_embd)}

    def linear(name, n_in, n_out):
        return {"w": leaf(f"{name}/w", n_in, n_out), "b": leaf(f"{name}/b", n_out)}

    def block(name):
        return {
            "ln_1": norm(f"{name}/ln_1"),
            "attn": {
                "c_attn": linear(f"{name}/attn/c_attn", n_embd, 3 * n_embd),
                "c_proj": linear(f"{name}/attn/c_proj", n_embd, n_embd),
            },
            "ln_2": norm(f"{name}/ln_2"),
            "mlp": {
                "c_fc": linear(f"{name}/mlp/c_fc", n_embd, 4 * n_embd),
                "c_proj": linear(f"{name}/mlp/c_proj", 4 * n_embd, n_embd),
            },
        }

    wte, wpe = leaf("wte", hparams["n_vocab"], n_embd), leaf("wpe", hparams["n_ctx"], n_embd)
    blocks = [block(f"h{i}") for i in range(hparams["n_layer"])]
    return {"wte": wte, "wpe": wpe, "blocks": blocks, "ln_f": norm("ln_f")}


def map_file(path):
    """Return the bytes of a file as a read-only array, mapped into memory."""
    try:
        return np.asarray(np.memmap(path, np.uint8, "r"))  # slices of a plain array are faster
    except (OSError, ValueError):  # Some drives cannot map files. An empty file cannot be mapped.
        return np.frombuffer(Path(path).read_bytes(), np.uint8)  # A missing file fails again.


# --- OpenAI's layout: a checkpoint of TensorFlow ---


def find_checkpoint(folder):
    """Return the path of the checkpoint that the file `checkpoint` names, without its endings.

    A line of it is `model_checkpoint_path: "/home/me/run1/model-500"`. The folder may be from
    another machine, so only the last part counts. A name of more than 200 characters is refused,
    because the system's message about a missing file would repeat it.
    """
    path = folder / "checkpoint"
    pattern = r'(?m)^model_checkpoint_path: "(?:.*[/\\])?([^"/\\\0\n]{1,200})"'
    latest = re.search(pattern, read_text(path))
    if not latest:
        raise UserError(f"{path} names no checkpoint")
    return folder / latest[1]


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Read a TensorFlow checkpoint into nested dicts and lists of float32 arrays.

    `tf_ckpt_path` is the path without its endings. The data file has all arrays one after the
    other, without gaps, in the alphabetical order of their names. Nicholas Carlini's
    `c-chat-gpt-2` reads OpenAI's files in the same way. Raises ValueError if the size of the file
    does not fit `hparams`.
    """
    shapes = {}

    def collect(name, *shape):
        shapes[name] = shape

    build_params(hparams, collect)
    names = sorted(shapes)
    ends = [*itertools.accumulate(math.prod(shapes[name]) for name in names)]
    path, n_bytes = f"{tf_ckpt_path}.data-00000-of-00001", 4 * ends[-1]
    data = map_file(path)
    if data.size != n_bytes:
        reason = "It is cut off, or it holds more than the model, such as an optimizer's state."
        raise UserError(f"{path} has {data.size:,} bytes instead of {n_bytes:,}. {reason}")
    arrays = dict(zip(names, np.split(data.view("<f4"), ends[:-1]), strict=True))
    return build_params(hparams, lambda name, *shape: arrays[name].reshape(shape))


# --- Hugging Face's layout: huggingface.co/docs/safetensors describes the format ---

# NumPy's names for the types. NumPy has no bfloat16: it is read as uint16.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# A tensor in a file, with its bytes as an array.
Tensor = collections.namedtuple("Tensor", "path dtype shape data")


def load_hugging_face(folder):
    """Load the hparams and the parameters from a folder that `save_pretrained` wrote."""
    path = folder / "config.json"
    config = read_hparams(path, HPARAMS.values(), **DEFAULTS)
    if config.get("activation_function") in GELU_NEW:
        config["activation_function"] = "gelu_new"
    require(path, config, **FIXED)
    hparams = {name: config[other_name] for name, other_name in HPARAMS.items()}
    tensors = read_tensors(folder)
    lm_head = tensors.get("lm_head.weight")
    # GPT-2 scores tokens with `wte`. A file may have it as `lm_head.weight` only.
    if lm_head is not None:
        tensors.setdefault("wte.weight", lm_head)

    def leaf(name, *shape):
        name = huggingface_name(name)
        if name not in tensors:
            raise UserError(f"{folder}: {name} is missing from the weights")
        return as_float32(name, tensors[name], shape)

    params = build_params(hparams, leaf)
    if lm_head is not None:
        same = as_float32("lm_head.weight", lm_head, params["wte"].shape)
        # As integers, because NaN is not equal to NaN.
        if not np.array_equal(same.view("u4"), params["wte"].view("u4")):
            raise UserError(f"{folder}: lm_head.weight is not wte.weight, as it is in GPT-2")
    return hparams, params


def read_tensors(folder):
    """Return all tensors by name, from `model.safetensors` or the files that an index names."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():  # If both are missing, the message names `path`.
        return read_safetensors(path)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} is damaged: it has no weight_map")
    tensors = {}
    for name in sorted({*map(str, weight_map.values())}):
        if name not in os.listdir(folder):  # So the name cannot be a path to another folder.
            raise UserError(f"{index} is damaged: there is no file {brief(name)}")
        tensors |= read_safetensors(folder / name)
    return tensors


def read_safetensors(path):
    """Return the tensors of one file by name.

    The first 8 bytes are the length of the header. The header is JSON. For each tensor it has the
    type, the shape, and where the bytes begin and end, counted from the end of the header.
    """
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > len(data):
        advice = "If you cloned the folder with git, run `git lfs pull` (Git LFS)."
        raise UserError(f"{path} is damaged or cut off: its header is not complete. {advice}")
    tensors, numbers = {}, data[start:]
    try:
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            name = name.removeprefix("transformer.")
            dtype = str(entry["dtype"])  # A list could not be looked up in DTYPES.
            tensors[name] = Tensor(path, dtype, entry["shape"], numbers[begin:end])
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    # The sizes must add up, so that lost or added bytes are noticed. (An overlap and a gap of one
    # size would not be.)
    if sum(tensor.data.size for tensor in tensors.values()) != numbers.size:
        raise UserError(f"{path} is damaged or cut off: its tensors do not fill the file")
    return tensors


def as_float32(name, tensor, shape):
    """Return a tensor of this shape as a read-only float32 array.

    An aligned float32 tensor is a view of the mapped file. Any other tensor is copied once, here,
    because otherwise every matrix product would copy it.
    """
    if tensor.dtype not in DTYPES or tensor.shape != [*shape]:
        found = f"{brief(tensor.dtype)} {brief(tensor.shape)}"
        raise UserError(f"{tensor.path}: {name} is {found}, not F32, F16 or BF16 {[*shape]}")
    dtype = np.dtype(DTYPES[tensor.dtype])
    if tensor.data.size != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{tensor.path} is damaged or cut off: {name} is not complete")
    array = tensor.data.view(dtype).reshape(shape)
    if dtype == "<u2":  # bfloat16, which is the upper half of a float32
        array = (array.astype("<u4") << 16).view("<f4")
    array = np.require(array, np.float32, ["ALIGNED"])
    array.flags.writeable = False
    return array


def huggingface_name(name):
    """Turn OpenAI's name of a parameter into Hugging Face's.

    >>> huggingface_name("h0/attn/c_attn/w"), huggingface_name("wte")
    ('h.0.attn.c_attn.weight', 'wte.weight')
    """
    name = re.sub(r"^h(\d+)", r"h.\1", name).replace("/", ".")
    if name in ("wte", "wpe"):
        return f"{name}.weight"
    layer, last = name.rsplit(".", 1)
    return f"{layer}.bias" if last == "b" else f"{layer}.weight"


# --- Download: OpenAI's five files, each whole or not at all ---


def download_gpt2_files(model_size, model_dir):
    """Download the files of a published size that are not yet in `model_dir`.

    `GPT2_BASE_URL` in the environment replaces the address up to `/<size>/<file>`. Raises
    ValueError for a size that was not published, and OSError if the network, the server or the disk
    fails, or if a file does not have the size or the MD5 that the server announced. If the
    connection breaks, the part that has come is kept, and the next call continues there.
    """
    if model_size not in SIZES:
        raise UserError(f"model_size must be {', '.join(SIZES)}, not {brief(model_size)}")
    folder = home(model_dir)
    missing = [name for name in FILES if not (folder / name).exists()]
    if not missing:
        return
    base = f"{(os.environ.get('GPT2_BASE_URL') or BASE_URL).rstrip('/')}/{model_size}"
    print(f"Downloading {model_size} from {base} to {folder}", file=sys.stderr)
    with new_session() as session:
        for name in missing:
            url = f"{base}/{name}"
            try:
                fetch(session, url, folder / name)
            except (OSError, OverflowError, ValueError) as error:  # the last two: odd headers
                reason = str(root_cause(error))[:200].rstrip(".")
                raise OSError(f"{url} did not arrive: {reason}. {BUNDLED}") from None


def root_cause(error):
    """Return the original error. The library `requests` wraps it in several others.

    For example, an OSError comes in a NewConnectionError, in a MaxRetryError, in a ConnectionError.
    """
    is_wrapper = type(error).__module__.startswith(("requests.", "urllib3."))
    inner = error.__cause__ or error.__context__
    return root_cause(inner) if is_wrapper and inner else error


def new_session():
    """Return a session of the library `requests`.

    If the server is busy, fails or cannot be reached, a request is repeated up to four times, after
    0, 1, 2 and 4 seconds.
    """
    import requests

    statuses = [408, 429, 500, *range(502, 600)]  # 501 is final: a server that knows no HEAD
    # The first pause is 0, and the others are 2, 4 and 8 times `backoff_factor`. The server's
    # `Retry-After` is not read, because it could ask for hours.
    pauses = {"backoff_factor": 0.5, "respect_retry_after_header": False}
    retry = requests.adapters.Retry(4, status_forcelist=statuses, **pauses)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"  # no compression
    return session


def request(session, method, url, start=0):
    """Return the answer to a request for the bytes of a file from `start` on.

    `session.request` follows redirects for HEAD too, unlike `session.head`.
    """
    headers = {"Range": f"bytes={start}-"} if start else {}
    response = session.request(method, url, headers=headers, stream=True, timeout=(3, 10))
    if response.status_code not in (200, 206):
        raise OSError(f"the server answered {response.status_code}")
    if "html" in response.headers.get("Content-Type", "").lower():
        raise OSError("the answer is a web page, perhaps one to log in")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise OSError("the server compresses the file, which it was asked not to do")
    return response


def fetch(session, url, path):
    """Download a file under a temporary name, check it, and rename it.

    Nothing is written, not even a lock, before the server has announced the size. Only one process
    at a time downloads into a folder. Others wait, and then find the file.
    """
    from filelock import FileLock

    announced = request(session, "HEAD", url).headers
    size = int(announced.get("Content-Length", 0))
    if size < 1:
        raise OSError("the server does not announce the size of the file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(".lock")):
        if not path.exists():
            part = path.with_name(f"{path.name}.part")
            complete(session, url, part, size)
            check_md5(part, announced.get("Content-MD5"))
            part.replace(path)


def complete(session, url, part, size):
    """Request the rest of a file until `part` has this size. An earlier download is continued."""
    if not part.exists() or part.stat().st_size > size:
        part.write_bytes(b"")
    for _ in range(MAX_REQUESTS):
        if part.stat().st_size < size:
            receive(session, url, part, size)
    if part.stat().st_size < size:
        raise OSError(f"{MAX_REQUESTS} answers ended too early. Run again to continue")


def receive(session, url, part, size):
    """Request the rest of a file, and append to `part` what comes, until the connection breaks.

    A request without an answer has been repeated by the session already, and ends the download.
    """
    from requests.exceptions import BaseHTTPError
    from tqdm import tqdm

    with open(part, "r+b") as file:
        n_here = file.seek(0, os.SEEK_END)
        response = request(session, "GET", url, n_here)
        # From 0 on, the bytes that are here already are written once more, with the same result.
        start = file.seek(first_byte(response, n_here, size))
        bar = tqdm(desc=part.stem, total=size, initial=start, unit="B", unit_scale=True)
        # A broken connection is a BaseHTTPError. Then `complete` calls this again. A piece that has
        # not come whole is lost, so the pieces are small.
        with response, bar, contextlib.suppress(BaseHTTPError):
            for piece in response.raw.stream(1 << 11, decode_content=False):
                if file.tell() + len(piece) > size:
                    raise OSError("the file is longer than the server announced")
                bar.update(file.write(piece))


def first_byte(response, start, size):
    """Return where the bytes of an answer begin in the file: at `start`, or at 0.

    A server that ignores the range sends the whole file. Raises OSError if the answer has another
    place or another size. It may be a page that says what went wrong.
    """
    if response.status_code == 206:
        content_range = response.headers.get("Content-Range", "")
        if re.fullmatch(rf"bytes {start}-\d+/{size}", content_range):
            return start
    elif response.headers.get("Content-Length", str(size)) == str(size):
        return 0
    raise OSError("the server sent another file, or another part of it")


def check_md5(part, md5):
    """Check a file against its MD5 in base64. If that is wrong, delete the file and raise OSError.

    A server that does not announce the MD5 is trusted.
    """
    if not md5:
        return
    # The map has no name here, so it is closed at once. Windows could not delete a mapped file.
    digest = hashlib.md5(map_file(part), usedforsecurity=False).digest()
    if base64.b64encode(digest).decode() != md5:
        part.unlink()
        raise OSError("the file had a wrong MD5 and was deleted. Run again to download it again")
