"""Open a GPT-2 from its folder; download and convert OpenAI's; run the command.

    encoder, hparams, params = load_encoder_hparams_and_params("124M", "models")

A model is a folder `models_dir/model_size` in one of two layouts:

- Hugging Face's, known by its `config.json`: the weights are read from `model.safetensors`.
- OpenAI's: at the first load TensorFlow converts the checkpoint into one flat file beside it,
  `params.f32`, which every later load maps into memory, without TensorFlow and without a network.
"""

import base64
import contextlib
import functools
import hashlib
import inspect
import io
import math
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from encoder import get_encoder, read_json

SIZES = ("124M", "355M", "774M", "1558M")
SHARD = ".data-00000-of-00001"
FILES = {  # of each size, and their SHA-256 in 124M; the vocabulary is the same in all
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "model.ckpt" + SHARD: "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
PAUSES = (1, 2, 3)  # seconds before each new try, as long as nothing comes
TIMEOUT = 10  # seconds without a word from the server
SLOWEST = 1000  # bytes a second: what comes more slowly counts as nothing
PATIENCE = 30  # seconds at less than that

# The sizes by OpenAI's names; by Hugging Face's, with what its library takes for one left out; and
# what else a config.json must say or leave out, since `gpt2` computes nothing else.
HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
CONFIG = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
COMPUTED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
COMPUTED |= {"tie_word_embeddings": True, "scale_attn_weights": True, "add_cross_attention": False}
COMPUTED |= {"scale_attn_by_inverse_layer_idx": False, "quantization_config": None, "n_inner": None}


# --- Load: from a folder to its vocabulary, sizes and parameters ---


def load_encoder_hparams_and_params(model_size, models_dir):
    """Load the model in `models_dir/model_size`, downloading a published size that is not there.

    Returns the `Encoder`, OpenAI's hparams as a dict, and the parameters as nested dicts of float32
    arrays. A folder with a `config.json` is read in Hugging Face's layout, whatever else it holds.
    Raises ValueError for a name that is neither a published size nor a folder there, and for a file
    that is not what it should be; OSError where a file is missing or cannot be downloaded.
    """
    models_dir = os.path.expanduser(models_dir)
    folders = next(os.walk(models_dir), (models_dir, [], []))[1]
    if model_size not in (*SIZES, *folders):
        where = f"or the name of a folder with a model in {os.path.abspath(models_dir)}"
        raise ValueError(f"model_size must be {', '.join(SIZES)}, {where}, not {model_size!r}")
    model_dir, fetched = os.path.join(models_dir, model_size), None
    hugging_face = os.path.exists(os.path.join(model_dir, "config.json"))
    published = model_size in SIZES and not hugging_face
    remedy = "Delete the file and run again: it will be downloaded anew."
    if not published:
        other = "" if hugging_face else ", or config.json in Hugging Face's layout"
        remedy = f"Put back the file that came with the model{other}."
    while True:
        try:
            return (load_hugging_face if hugging_face else load_openai)(model_size, models_dir)
        except FileNotFoundError as error:
            if fetched is not None or not published:
                raise OSError(f"{error.filename} is missing.\n{remedy}") from None
            fetched = download_gpt2_files(model_size, model_dir)
        except DamagedError as error:
            if error.path in (fetched or []):
                os.remove(error.path)
                remedy = "That file is deleted: run again to download it anew."
            raise ValueError(f"{error}\n{remedy}") from None
        except ValueError as error:
            raise ValueError(f"{error}\n{remedy}" if published else error) from None


def load_openai(model_size, models_dir):
    """Load a folder in OpenAI's layout; raises FileNotFoundError where it is not complete."""
    model_dir = os.path.join(models_dir, model_size)
    path = os.path.join(model_dir, "hparams.json")
    hparams = read_json(path)
    check_sizes(hparams, HPARAMS, path)
    encoder = get_encoder(model_size, models_dir)
    if len(encoder.encoder) != hparams["n_vocab"]:
        raise ValueError(f"{path}: n_vocab must be {len(encoder.encoder)}, as in encoder.json")
    return encoder, hparams, load_params(model_dir, hparams)


def load_hugging_face(model_size, models_dir):
    """Load a folder as `save_pretrained` writes it; raises ValueError for what `gpt2` is not."""
    path = os.path.join(models_dir, model_size, "config.json")
    config = CONFIG | COMPUTED | read_json(path)
    check_sizes(config, CONFIG, path)
    synonyms = {"activation_function": "gelu_pytorch_tanh", "n_inner": 4 * config["n_embd"]}
    for field, value in COMPUTED.items():
        if config[field] not in (value, synonyms.get(field, value)):
            raise ValueError(f"{path}: {field} is {config[field]!r}, but GPT-2 has {value!r}")
    hparams = dict(zip(HPARAMS, map(config.get, CONFIG), strict=True))
    encoder = get_encoder(model_size, models_dir)
    tokens = [*encoder.byte_decoder, *map("".join, encoder.bpe_ranks)]
    if max(map(encoder.encoder.get, tokens)) >= hparams["n_vocab"]:
        raise ValueError(f"{path}: vocab_size is less than the ids of the tokenizer need")
    encoder.endoftext = [id for id in encoder.endoftext if id < hparams["n_vocab"]]
    path = os.path.join(models_dir, model_size, "model.safetensors")
    return encoder, hparams, read_safetensors(path, hparams)


def check_sizes(config, fields, path):
    """Raise ValueError unless all sizes are numbers above 0 and the heads divide the width."""
    for field in fields:
        if type(config.get(field)) is not int or config[field] < 1:
            raise ValueError(f"{path}: {field} must be a number above 0, not {config.get(field)!r}")
    if config["n_embd"] % config["n_head"]:
        raise ValueError(f"{path}: n_embd must be a multiple of n_head")


def read_safetensors(path, hparams):
    """Read the parameters from Hugging Face's file, widened to float32 where they are narrower."""
    from safetensors import SafetensorError, safe_open

    def leaf(name, *shape):
        name = huggingface_name(name)
        part = file.get_slice(names.pop(name))
        found = part.get_dtype(), part.get_shape()
        if found[0] not in ("F32", "F16") or found[1] != [*shape]:
            raise ValueError(f"{path}: {name} is {found}, not float32 or float16 {[*shape]}")
        return np.asarray(part[:], np.float32)

    if not os.path.exists(path):
        raise ValueError(f"{path} is missing; weights in pieces or pickled are not read")
    try:
        with safe_open(path, "numpy") as file:
            names = {name.removeprefix("transformer."): name for name in file.keys()}  # noqa: SIM118
            params = build_params(hparams, leaf)
            head = names.pop("lm_head.weight", None)
            if head and not np.array_equal(file.get_tensor(head), params["wte"]):
                raise ValueError(f"{path}: lm_head.weight is not wte.weight, as it is in GPT-2")
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    # Old files also hold the causal masks, which are no parameters.
    rest = [name for name in names if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)]
    if rest:
        raise ValueError(f"{path}: {rest[0]} is no part of the model in config.json")
    return params


def huggingface_name(name):
    """Turn OpenAI's name of a parameter into Hugging Face's.

    >>> huggingface_name("h0/attn/c_attn/w"), huggingface_name("wte")
    ('h.0.attn.c_attn.weight', 'wte.weight')
    """
    *path, last = re.sub(r"^h(\d+)", r"h/\1", name).split("/")
    kinds = {"g": "weight", "w": "weight", "b": "bias"}
    return ".".join([*path, kinds.get(last, f"{last}.weight")])


def load_params(model_dir, hparams):
    """Open the converted weights, converting the checkpoint first where that is due."""
    converted = os.path.join(model_dir, "params.f32")
    try:
        tf_ckpt_path = find_checkpoint(model_dir)
        mark = fingerprint(tf_ckpt_path, hparams)
    except FileNotFoundError:
        params = open_converted(converted, hparams)  # the checkpoint may be gone, to save its space
        if params is None:
            raise
        return params
    params = open_converted(converted, hparams, mark)
    if params is None:
        os.stat(tf_ckpt_path + SHARD)  # raises FileNotFoundError before TensorFlow is imported
        try:
            with alone(model_dir):
                params = open_converted(converted, hparams, mark)  # another process did it?
                if params is None:
                    convert(tf_ckpt_path, hparams, converted, mark)
                    params = open_converted(converted, hparams, mark)
        except OSError as error:
            if error.errno is None:  # it is not the system that refuses
                raise
            params = load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams)
            say(f"The converted weights could not be kept for next time: {error}")
    return params


def open_converted(converted, hparams, mark=None):
    """Map a converted file into memory, if it is whole and of the checkpoint with that mark."""
    end = 0

    def view(name, *shape):
        nonlocal end
        start, end = end, end + math.prod(shape)
        return flat[start:end].reshape(shape, order=memory_order(name))

    try:
        content = np.asarray(np.memmap(converted, np.uint8, "r"))
        flat = content[:-32].view(np.float32)
        params = build_params(hparams, view)
    except (FileNotFoundError, ValueError):  # ValueError: empty, or too short for one of the views
        return None
    return params if end == flat.size and mark in (None, content[-32:].tobytes()) else None


def memory_order(name):
    """Keep each column of a matrix in one piece: a product with one row reads it faster so."""
    return "F" if name.endswith("/w") else "C"


def build_params(hparams, leaf):
    """Build the tree of parameters, with `leaf(name, *shape)` for each, in a fixed order.

    Names are OpenAI's without the leading `model/`, shapes those that `gpt2` takes.
    """
    n_embd = hparams["n_embd"]

    def norm(name):
        return {"g": leaf(f"{name}/g", n_embd), "b": leaf(f"{name}/b", n_embd)}

    def dense(name, n_in, n_out):
        return {"w": leaf(f"{name}/w", n_in, n_out), "b": leaf(f"{name}/b", n_out)}

    def block(h):
        params = {"ln_1": norm(f"{h}/ln_1")}
        c_attn = dense(f"{h}/attn/c_attn", n_embd, 3 * n_embd)
        params["attn"] = {"c_attn": c_attn, "c_proj": dense(f"{h}/attn/c_proj", n_embd, n_embd)}
        params["ln_2"] = norm(f"{h}/ln_2")
        c_fc = dense(f"{h}/mlp/c_fc", n_embd, 4 * n_embd)
        params["mlp"] = {"c_fc": c_fc, "c_proj": dense(f"{h}/mlp/c_proj", 4 * n_embd, n_embd)}
        return params

    params = {"wte": leaf("wte", hparams["n_vocab"], n_embd)}
    params["wpe"] = leaf("wpe", hparams["n_ctx"], n_embd)
    params["blocks"] = [block(f"h{i}") for i in range(hparams["n_layer"])]
    return params | {"ln_f": norm("ln_f")}


# --- Download: OpenAI's seven files, each whole or not at all ---


def download_gpt2_files(model_size, model_dir):
    """Download those of the seven files of a published size that `model_dir` lacks.

    Returns their paths. `GPT2_BASE_URL` in the environment replaces the address up to
    `/<size>/<file>`. Raises ValueError for a size that was not published, and OSError where the
    network, the server or the disk fails, or a file fails its check; what had arrived of a file is
    kept, and the next call goes on from there.
    """
    if model_size not in SIZES:
        raise ValueError(f"model_size must be {', '.join(SIZES)}, not {model_size!r}")
    url = f"{(os.environ.get('GPT2_BASE_URL') or BASE_URL).rstrip('/')}/{model_size}"
    with alone(model_dir):
        missing = [name for name in FILES if not os.path.exists(os.path.join(model_dir, name))]
        if missing:
            say(f"Downloading {', '.join(missing)} from {url} to {model_dir}")
        for name in missing:
            known = model_size == "124M" or name in ("encoder.json", "vocab.bpe")
            fetch(f"{url}/{name}", os.path.join(model_dir, name), FILES[name] if known else None)
    return [os.path.join(model_dir, name) for name in missing]


def fetch(url, path, sha256):
    """Bring one file under a temporary name, verify it, and only then give it its own."""
    import requests
    import urllib3

    part, pauses, most = path + ".part", iter(PAUSES), size_of(path + ".part")
    while True:
        begin = time.monotonic()
        try:
            md5 = receive(url, part, size_of(part))
            break
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            if size_of(part) - most > SLOWEST * (time.monotonic() - begin):
                pauses = iter(PAUSES)  # the line works, if not for long
            most = max(most, size_of(part))
            lasting = isinstance(error, (ValueError, requests.HTTPError))
            pause = None if lasting else next(pauses, None)
            cause = str(error).rsplit(": ", 1)[-1].strip("\"')").replace(" (", ": ")
            if pause is None:
                advice = "Run again to go on from what came; --model_size 1M needs no network."
                raise OSError(f"{url} did not arrive: {cause}\n{advice}") from None
            say(f"{url}: {cause}; trying again in {pause} s")
            time.sleep(pause)
        except OSError as error:
            raise OSError(
                f"{part}: {error}\nMend that and run again, to go on from there."
            ) from None
    fault = find_fault(part, sha256, md5)
    if fault:
        os.remove(part)
        raise OSError(f"{url} is deleted again, since {fault}.\nRun again to download it anew.")
    os.replace(part, path)


def receive(url, part, start):
    """Append to `part` what it lacks of the file at `url`, from the byte `start` on.

    Returns the MD5 of the whole, if the server tells it. Raises requests.HTTPError if it refuses,
    and other errors of requests and urllib3 if another try may help.
    """
    import requests

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    get = functools.partial(requests.get, url, headers=headers, stream=True, timeout=TIMEOUT)
    name = os.path.basename(part)
    with progress(desc=name, unit="B", unit_scale=True, leave=False) as bar, get() as response:
        status, told = response.status_code, response.headers
        if status == 416 and start:  # nothing is missing, or `part` is of another file
            complete = told.get("Content-Range") == f"bytes */{start}"
            return None if complete else receive(url, part, 0)
        if status not in (200, 206):
            passing = status in (408, 429) or status >= 500
            kind = requests.ConnectionError if passing else requests.HTTPError
            raise kind(f"the server answered {status} {response.reason}")
        sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", told.get("Content-Range", ""))
        if told.get("Content-Encoding", "identity") != "identity":
            raise requests.ConnectionError("the server sends it compressed, unasked")
        if status == 200 and told.get("Content-Length", "").isdecimal():
            start, total = 0, int(told["Content-Length"])
        elif status == 206 and sent and int(sent[1]) == start:
            total = int(sent[2])
        else:
            raise requests.ConnectionError("the server does not say which bytes it sends")
        if size_of(part) != total or not total:
            bar.total, bar.initial, bar.n = total, start, start
            with open(part, "ab" if start else "wb") as file:
                keep_writing(response.raw, file, bar)
        if size_of(part) != total:
            raise requests.ConnectionError(f"{size_of(part)} of {total} bytes came")
        bar.leave = True
        return told.get("Content-MD5") if status == 200 else told.get("x-ms-blob-content-md5")


def keep_writing(source, file, bar):
    """Write what comes as it comes; raises requests.ConnectionError where it hardly does."""
    import requests

    begin, written = time.monotonic(), 0
    while chunk := source.read1(1 << 16):
        written += file.write(chunk)
        bar.update(len(chunk))
        if time.monotonic() > begin + PATIENCE:
            if written < SLOWEST * PATIENCE:
                raise requests.ConnectionError(f"only {written} bytes came in {PATIENCE} seconds")
            begin, written = time.monotonic(), 0
    file.flush()
    os.fsync(file.fileno())


def find_fault(part, sha256, md5):
    """Say what is wrong with a file that has come, "" for nothing."""
    with open(part, "rb") as file:
        head = file.read(99)
    if not head or re.match(rb"\W*<(!doctype|\?xml|html|error)\b", head, re.IGNORECASE):
        return "a web page came in its place" if head else "it is empty"
    if sha256 and digest(part, "sha256").hex() != sha256:
        return "its SHA-256 is not OpenAI's"
    if md5 and not sha256 and base64.b64encode(digest(part, "md5")).decode() != md5:
        return "its MD5 is not the server's"
    return ""


def digest(path, kind):
    """Return the digest of a file, with a bar where that takes long."""
    content, sizes = hashlib.new(kind), {"total": size_of(path), "unit": "B", "unit_scale": True}
    with open(path, "rb") as file, progress(desc="verifying", delay=1, **sizes) as bar:
        while chunk := file.read(1 << 20):
            content.update(chunk)
            bar.update(len(chunk))
    return content.digest()


def size_of(path):
    """Return the size of a file in bytes, 0 where there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


@contextlib.contextmanager
def alone(folder):
    """Keep other processes out of `folder`; the system frees a lock when its owner ends or dies."""
    from filelock import FileLock, Timeout

    os.makedirs(folder, exist_ok=True)
    lock = FileLock(os.path.join(folder, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        desc = f"waiting for another process that is at work in {folder}"
        with progress(desc=desc, bar_format="{desc}: {elapsed}"):
            lock.acquire()
    except (NotImplementedError, OSError) as error:
        say(f"Going on without a lock on {folder}, so start no second process there: {error}")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            if lock.is_locked:
                os.remove(lock.lock_file)
            os.rmdir(folder)  # if nothing has come into it
        lock.release()


@contextlib.contextmanager
def progress(**options):
    """Show a bar whose clock goes on while nothing else does."""
    from tqdm import tqdm

    done = threading.Event()
    with tqdm(**options) as bar, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: [bar.refresh() for _ in iter(lambda: done.wait(1), True)])
        try:
            yield bar
        finally:
            done.set()


def say(line):
    """Tell the user something that is not the text asked for."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def give_up(stream):
    """Let what is left in a broken stream go nowhere, so that Python's end does not fail by it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- Convert: a checkpoint of TensorFlow's to one flat file ---


class DamagedError(ValueError):
    """A file, at `path`, that is not as TensorFlow wrote it."""

    def __init__(self, path, message):
        super().__init__(message)
        self.path = path


def find_checkpoint(model_dir):
    """Return the checkpoint that the file `checkpoint` names, as TensorFlow takes it."""
    path = os.path.join(model_dir, "checkpoint")
    with open(path, encoding="utf-8", errors="replace") as file:
        latest = re.search(r'(?m)^model_checkpoint_path: "(.+)"', file.read())
    if not latest:
        raise ValueError(f"{path} names no checkpoint")
    # A fine-tuned model may name the folder that it was trained in: only the last part counts.
    return os.path.join(model_dir, re.split(r"[/\\]", latest[1])[-1])


def fingerprint(tf_ckpt_path, hparams):
    """Identify the weights by their index, which has the place and the checksum of every tensor."""
    with open(tf_ckpt_path + ".index", "rb") as file:
        sizes = [hparams[field] for field in HPARAMS if field != "n_head"]
        return hashlib.sha256(file.read() + repr(sizes).encode()).digest()


def convert(tf_ckpt_path, hparams, converted, mark):
    """Write the weights, tensor by tensor, and then `mark`, which says whose they are."""
    part = converted + ".part"
    try:
        with open(part, "wb") as file:
            load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams, lambda t: file.write(t.ravel("K")))
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, converted)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams, keep=lambda tensor: tensor):
    """Read a TensorFlow checkpoint into nested dicts of float32 arrays, as `gpt2` takes them.

    `keep` says what to put in the place of each tensor as it arrives. Raises ValueError for a
    damaged file, and for a tensor that is missing or not of the shape that `hparams` ask for;
    OSError where TensorFlow or the machine fails.
    """
    n_layer, files = hparams["n_layer"], f"{tf_ckpt_path}.*"
    with progress(desc="converting", total=4 + 12 * n_layer, unit=" tensors") as bar:
        tf = import_tensorflow()

        def read(name, *shape):
            bar.update()
            found = shapes.get(f"model/{name}", "missing")
            if found not in ([*shape], [1, *shape]):
                raise ValueError(f"{files}: model/{name} is {found}, hparams.json says {[*shape]}")
            tensor = checkpoint.get_tensor(f"model/{name}").reshape(shape)
            return keep(np.asarray(tensor, np.float32, order=memory_order(name)))

        path = tf_ckpt_path + ".index"
        try:
            checkpoint = tf.train.load_checkpoint(tf_ckpt_path)
            shapes, path = checkpoint.get_variable_to_shape_map(), tf_ckpt_path + SHARD
            if f"model/h{n_layer}/ln_1/g" in shapes:
                raise ValueError(f"{files}: more layers than n_layer in hparams.json, {n_layer}")
            return build_params(hparams, read)
        except (tf.errors.OpError, IndexError, RuntimeError) as error:
            fault = f"{files}: {os.path.basename(path)}: {str(error).splitlines()[0]}"
            if re.search("(?i)checksum|sstable|less bytes", fault):
                raise DamagedError(path, fault) from None
            raise OSError(fault) from None


def import_tensorflow():
    """Import TensorFlow without its messages; raises OSError that says what to do without it."""
    os.environ.update({"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"} | os.environ)
    try:
        import tensorflow
    except Exception as error:  # whatever a package that does not fit raises
        advice = "Install it, or take the model in Hugging Face's layout, or a converted folder."
        raise OSError(f"OpenAI's checkpoints need TensorFlow: {error}\n{advice}") from None
    return tensorflow


# --- Command: what a shell hands over, what it gets back ---


def command_line(main):
    """Run `main` with the arguments of the shell; a mistake ends in a line that says what to do.

    What `main` returns is printed, or, if it takes an argument `show`, what it gives to that.
    """
    # Where the shell closed it, no other file is to come in its place.
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    shown = []

    def show(piece):
        shown.append(piece)
        print(piece, end="", flush=True)

    try:
        if sys.stdout is None:
            raise OSError("Standard output is closed.")
        sys.stdout.reconfigure(errors="replace")  # for a terminal that knows fewer characters
        text = read_arguments(main)(show)
        return print("" if shown else text, flush=True)
    except ImportError as error:
        status = f"{error}: pip install -r requirements.txt"
    except BrokenPipeError:  # whoever reads has enough, as `head` may
        status = 141
    except KeyboardInterrupt:
        status = 130
    except UnicodeDecodeError as error:
        status = f"Standard input is not UTF-8: {error.reason}"
    except (MemoryError, OSError, ValueError) as error:
        status = str(error) or "There is not enough memory."
    try:
        print(end="\n" if any(shown) else "", flush=True)
    except OSError:
        give_up(sys.stdout)
    sys.exit(status)


def read_arguments(main):
    """Return a call of `main` with what Fire reads from the shell, as text; it takes `show`."""
    import fire

    def note(*args, **kwargs):
        noted.update(inspect.signature(note).bind(*args, **kwargs).arguments)

    noted, signature = {}, inspect.signature(main)
    typed = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    functools.update_wrapper(note, main).__signature__ = signature.replace(parameters=typed)
    if {"-h", "--help"} & {*sys.argv}:
        trace = fire.trace.FireTrace(note, name=os.path.basename(sys.argv[0]))
        return lambda show: fire.helptext.HelpText(note, trace)
    if typed and typed[0].name == "prompt":
        typed[0] = typed[0].replace(default=None)
        note.__signature__ = signature.replace(parameters=typed)
    fire.parser.DefaultParseValue = str  # otherwise the prompt 42 would arrive as a number
    try:
        # By itself, - would be Fire's separator; what follows the last --, flags of its own.
        words = ["--prompt=-" if word == "-" else word for word in sys.argv[1:]]
        with contextlib.redirect_stderr(io.StringIO()):
            fire.Fire(note, [*words, "--"])
    except fire.core.FireExit as error:
        fault = error.trace.elements[-1].ErrorAsStr()
        raise ValueError(f"{fault}\npython {sys.argv[0]} --help tells what it takes.") from None
    if typed and typed[0].name == "prompt":
        noted["prompt"] = read_prompt(noted.get("prompt"))
    return lambda show: main(**noted, **({"show": show} if "show" in signature.parameters else {}))


def read_prompt(prompt):
    """Return the prompt, from standard input where it is - or left out."""
    if prompt in (None, "-"):
        silent = sys.stdin is None or (prompt is None and sys.stdin.isatty())
        content = b"" if silent else sys.stdin.buffer.read()
        if prompt is None and not content:
            raise ValueError(f"There is no prompt: see python {sys.argv[0]} --help")
        prompt = re.sub(r"\r?\n\Z", "", content.decode("utf-8"))
    if prompt.endswith(" "):
        say("The prompt ends in a space, but GPT-2's words begin with theirs: better leave it out.")
    return prompt


def whole_number(name, value):
    """Read a count, which may be text; raises ValueError if it is not 0, 1, 2 ..."""
    if not str(value).isdecimal():
        raise ValueError(f"{name} must be a whole number, 0 or more, not {value!r}")
    return int(value)


def picker(sample, temperature, top_k, top_p, seed):
    """Return what chooses each token: the likeliest at temperature 0, else a draw by `sample`."""
    try:
        temperature, top_p = float(temperature), float(top_p)
    except ValueError as error:
        raise ValueError(f"temperature and top_p must be numbers: {error}") from None
    top_k = None if top_k is None else whole_number("top_k", top_k)
    random = np.random.default_rng(None if seed is None else whole_number("seed", seed))
    limits = {"temperature": temperature or 1.0, "top_k": top_k, "top_p": top_p}
    sample(np.zeros(1), np.random.default_rng(0), **limits)  # a fault is told before any download
    return functools.partial(sample, random=random, **limits) if temperature else np.argmax
