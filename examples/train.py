"""Train a GPT-2 on your own text, from nothing or from an existing model.

    pip install -r examples/requirements.txt
    python examples/train.py my.txt models/mine                        # learns the text by heart
    python examples/train.py my.txt models/tuned --start models/124M   # fine-tunes GPT-2

The model is the function `gpt2` of `gpt2.py`, with JAX in place of NumPy. JAX computes how the loss
depends on the parameters, and optax changes the parameters so that the loss falls.

A model learns from windows. A window is a run of tokens from the text. The model reads all but the
last of them, and learns to predict all but the first. This file first chooses the windows, then
trains on them, then saves the model. At the end it tests how much of the text the model knows.
"""

import json
import signal
import sys
import tempfile
from itertools import islice, takewhile
from pathlib import Path

import jax  # if it is missing: pip install -r examples/requirements.txt
import numpy as np
import optax
import regex
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import numpy as safetensors
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpt2
import utils
from encoder import Encoder, read_text

END = "<|endoftext|>"  # the token between two texts
SIZES = {"n_ctx": 256, "n_embd": 160, "n_head": 4, "n_layer": 4}  # of a model from nothing

# The kinds of places in a text where a window or a prompt may begin. A regular expression finds the
# first word there. But it finds all of "a whole line", and the last of the "typed words". The
# numbers say how many of the short and of the long windows begin at such a place.
PLACES = {
    "the start of a line": (r"(?<=\n)\S+", (0.2, 0.9)),
    "the start of a clause": (r"(?<=[,;:.!?] )\S+", (0.15, 0)),
    "some words": (r"\S+", (0.45, 0)),
    "typed words": (r"(?<=\n\S+(?: +\S+){2,18} +)\S+", (0.2, 0)),
    "the text": (r"\A", (0, 0.1)),
    "the start of a speech": (r"(?<=\S\n\n)\S+", (0, 0)),
    "a whole line": (r"(?<=\n)\S(?:.*\S)?", (0, 0)),
}

# The exam has several kinds of questions. Each says where its prompts begin, how many tokens they
# have at least, how many tokens the model must add, and how the prompts are typed.
ASKED = 500  # the most questions of a kind
TYPED = {None: "as it is", 0: "lower case", 1: "no punctuation", 2: "lower case, no punctuation"}
EXAM = [("the start of a speech", 40, 40, None), ("a whole line", 8, 40, None)]
EXAM += [("the start of a clause", 5, 16, None), ("some words", 6, 16, None)]
EXAM += [("a whole line", 8, 16, manner) for manner in (0, 1, 2)]


def main(text_path, model_dir, start=None, steps=None, batch=None, length=None, lr=None):
    """Train a model on a text file, and save it in Hugging Face's layout.

    Without --start, a small model learns the text by heart. The default of 12,000 steps takes 30 to
    60 minutes on two processor cores. For a text of 10 KB, --steps 600 is enough and takes two or
    three minutes. With --start, an existing model is fine-tuned on the text.

    Args:
        text_path: a text file in UTF-8; if it holds several texts, put <|endoftext|> between them
        model_dir: the folder to save the model in; a model that is already there is replaced
        start: the folder of the model to fine-tune, such as models/124M
        steps: how many batches to learn from, 12000, or 200 with --start; --steps 0 trains nothing,
            but tests how much of the text the model in model_dir knows by heart
        batch: how many windows of the text are in a batch, 48, or 4 with --start
        length: how many tokens a window has, 40, or 128 with --start; without --start, one batch in
            seven has fewer windows of 256 tokens
        lr: the highest learning rate, 0.02, or 0.0001 with --start
    """
    given = {"steps": steps, "batch": batch, "length": length, "lr": lr}
    given = {name: number(name, value) for name, value in given.items() if value is not None}
    text = read_text(text_path)
    model_dir = Path(model_dir).expanduser().resolve()
    if given.get("steps") == 0:
        return recite(text, model_dir)
    encoder, hparams, params, *lesson = (
        from_start(text, start, **given) if start else from_nothing(text, **given)
    )
    # A folder that cannot be written should be noticed now, and not after the training.
    existing = next(path for path in (model_dir, *model_dir.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(f"{existing}: {error.strerror}. Choose another folder to save in.") from None
    signals = []  # Ctrl-C and SIGTERM are only noted here, so that the model can be saved
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: signals.append(signum))
    report, params = train(params, hparams["n_head"], *lesson, signals)
    if report:
        save(model_dir, encoder, hparams, params)
        report = f"The model is in {model_dir}.\n{report}"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signals:
        print("Stopped.", report or "Nothing was learnt yet, so nothing was saved.")
        sys.exit(128 + signals[0])
    return report if start else f"{report}\n{recite(text, model_dir)}"


def number(name, value):
    """Turn the value of an option into a number. Raises ValueError if it is out of range."""
    pattern, which = (r"\d*\.?\d+(e-\d+)?", "number") if name == "lr" else (r"\d+", "whole number")
    least = 1 if name in ("batch", "length") else 0
    if not regex.fullmatch(pattern, str(value)) or float(value) < least:
        raise ValueError(f"--{name} must be a {which}, {least} or more, not {value!r}")
    return float(value) if name == "lr" else int(value)


# --- Plan: what to train, and on which windows ---


def from_nothing(text, steps=12000, batch=48, length=40, lr=0.02):
    """Plan a small model with its own vocabulary, which is to know all of `text` by heart.

    A plan is the model's encoder, hparams and parameters, a function that returns a random batch,
    the optimizer, the windows that are held out, and the number of steps.
    """
    encoder = learn_vocabulary(text)
    hparams = {"n_vocab": len(encoder.encoder), **SIZES}
    prompts = Prompts(text, encoder)
    check_length("The text", len(prompts.ids), length, SIZES["n_ctx"])
    random = np.random.default_rng(0)

    def initial(name, *shape):
        if name.endswith(("/g", "/b")):
            return np.full(shape, name.endswith("/g"), np.float32)
        return random.normal(0, 0.02, shape).astype(np.float32)

    def draw():
        # The first tokens of a window are hard to predict, because the model has read little before
        # them. Short windows have more of these, and so most windows are short.
        is_long = random.random() >= 0.85
        n = SIZES["n_ctx"] if is_long else length
        size = round(batch * length / n) or 1
        rows = [prompts.window(random, is_long, n) for _ in range(size)]
        return tuple(np.array(column, np.int32) for column in zip(*rows, strict=True))

    # Muon trains the matrices. Adam trains the rest, with half the learning rate.
    matrix = optax.contrib.MuonDimensionNumbers()
    kinds = utils.build_params(hparams, lambda name, *_: matrix if name.endswith("/w") else None)
    rate = optax.warmup_cosine_decay_schedule(0, lr, steps // 30, steps)
    half = optax.warmup_cosine_decay_schedule(0, lr / 2, steps // 30, steps)
    muon = optax.contrib.muon(rate, adam_learning_rate=half, muon_weight_dimension_numbers=kinds)
    return encoder, hparams, utils.build_params(hparams, initial), draw, muon, [], steps


def from_start(text, start, steps=200, batch=4, length=128, lr=1e-4):
    """Plan to fine-tune the model in the folder `start`. The text's last twentieth is held out."""
    encoder, hparams, params = open_model("--start", start)
    ids = np.array(encoder.encode(text, "all"), np.int32)
    n = len(ids) - len(ids) // 20
    check_length("The last twentieth of the text", len(ids) - n, length, hparams["n_ctx"])
    windows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)
    places = np.linspace(n, len(windows) - 1, min(16, (len(ids) - n) // length), dtype=int)
    random = np.random.default_rng(0)

    def draw():
        return windows[random.integers(n - length, size=batch)], np.zeros(batch, np.int32)

    rate = optax.warmup_cosine_decay_schedule(0, lr, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    return encoder, hparams, params, draw, optimizer, windows[places], steps


def open_model(name, folder):
    """Load the model in a folder. Raises ValueError if there is no folder, and names the option."""
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise ValueError(f"{name} must be a model's folder, such as models/1M. There is no {path}.")
    return utils.load_encoder_hparams_and_params(path.name, path.parent)


def check_length(name, n_tokens, length, n_ctx):
    """Raise ValueError if windows of this length do not fit the model or the text."""
    if length > n_ctx:
        raise ValueError(f"--length must be {n_ctx} or less, which is the context of the model")
    if n_tokens <= length:
        raise ValueError(f"{name} needs more than {length} tokens, not {n_tokens}. Use more text.")


def learn_vocabulary(text):
    """Learn a byte-level BPE of at most 1,024 tokens. The last of them is <|endoftext|>."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text.split(END), 1023, min_frequency=0, show_progress=False)
    tokenizer.add_special_tokens([END])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return Encoder(tokenizer.get_vocab(), merges, {END: tokenizer.token_to_id(END)})


class Prompts:
    """The places of a text where prompts and windows may begin.

    A prompt is encoded by itself, as when a user types it. So its first word has no space before
    it, even if the text has one there. That makes it another token than in the text.
    """

    def __init__(self, text, encoder):
        self.text, self.encoder = END + text, encoder
        self.ids = np.array(encoder.encode(self.text, "all"))
        # The character of the text at which each token starts:
        self.starts = np.cumsum([0, *map(len, encoder.decode_stream(self.ids.tolist()))])
        # The text in which places are found. <|endoftext|> ends a line and a paragraph.
        self.lines = self.text.replace(END, "\n" * len(END))
        self.places = {}
        for kind, (pattern, _) in PLACES.items():
            self.places[kind] = [match.span() for match in regex.finditer(pattern, self.lines)]

    def window(self, random, is_long, length):
        """Return the ids of a random window, `length + 1` of them, and how many were typed.

        The prompt comes first, encoded by itself. Then follow the ids of the text.
        """
        kind = random.choice([*PLACES], p=[shares[is_long] for _, shares in PLACES.values()])
        places = self.places[kind] or self.places["some words"]
        start, end = places[random.integers(len(places))]
        manner = random.integers(4) if kind == "typed words" else None
        start = start if manner is None else self.lines.rfind("\n", 0, start) + 1
        words, n_past = self.typed(start, end, manner)
        prompt = self.encoder.encode(words)
        rest = self.ids.take(range(n_past, n_past + length + 1), mode="wrap")
        return [*prompt, *rest][: length + 1], 0 if manner is None else len(prompt)

    def typed(self, start, end, manner):
        """Return words as people type them, and how many ids the text has up to their end.

        Manner 0 is lower case, 1 is no punctuation, 2 is both, and 3 is both without apostrophes.
        None leaves the words as they are. Without punctuation, the words may end earlier.
        """
        words = self.text[start:end]
        if manner:
            words = regex.sub(r"[^\p{L}\p{N}]+\Z", "", words)
            end = start + len(words)
            signs = r"[^\p{L}\p{N}\s]" if manner == 3 else r"[^\p{L}\p{N}\s']"
            words = regex.sub(" +", " ", regex.sub(signs, "", words))
        return words if manner in (None, 1) else words.lower(), np.searchsorted(self.starts, end)


# --- Train: the loss, and the steps that lower it ---

on_jax = {}  # the functions of gpt2.py, with `jax.numpy` imported instead of NumPy
exec(read_text(gpt2.__file__).replace("import numpy as np", "import jax.numpy as np"), on_jax)


def loss(params, windows, n_typed, n_head):
    """Return minus the mean log probability of all tokens but the first one and the typed ones."""
    model = jax.vmap(lambda inputs: on_jax["gpt2"](inputs, **params, n_head=n_head))
    losses = optax.softmax_cross_entropy_with_integer_labels(model(windows[:, :-1]), windows[:, 1:])
    counted = np.arange(1, windows.shape[1]) >= n_typed[:, None]
    return (losses * counted).sum() / counted.sum().clip(1)


def train(params, n_head, draw, optimizer, held_out, steps, signals):
    """Train the parameters on all devices that JAX sees. A signal in `signals` ends the training.

    Returns a report of the losses, which is empty if no step was taken, and the parameters.
    """
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(batch):  # a batch that cannot be split evenly is computed whole by every device
        return jax.device_put(batch, everywhere if len(batch[0]) % mesh.size else split)

    def step(params, state, windows, n_typed):
        value, gradients = jax.value_and_grad(loss)(params, windows, n_typed, n_head)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    def held_out_loss():
        return np.mean([measure(params, window[None], np.zeros(1), n_head) for window in held_out])

    # The old parameters are donated, which means that the new ones take their memory. So they must
    # be a copy, because the loaded ones are views of a file.
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=everywhere)
    measure = jax.jit(loss, static_argnums=3)
    params = jax.device_put(jax.tree.map(jax.numpy.array, params), everywhere)
    state = jax.jit(optimizer.init, out_shardings=everywhere)(params)
    before = held_out_loss() if len(held_out) else None
    losses = []
    bar = tqdm(range(steps), "Training")
    for _ in takewhile(lambda _: not signals, bar):
        params, state, value = step(params, state, *place(draw()))
        losses.append(float(value))
        bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    if not losses:
        return "", params
    # The loss at the end is the mean of 20 steps, because it differs from batch to batch.
    report = f"Training loss: {losses[0]:.4f} at first, {np.mean(losses[-20:]):.4f} at the end."
    if len(held_out):
        report += f"\nHeld-out loss: {before:.4f} before training, {held_out_loss():.4f} after it."
    return report, jax.tree.map(np.asarray, params)


# --- Save: in Hugging Face's layout ---


def save(model_dir, encoder, hparams, params):
    """Save a model. An older one in the same folder stays until all new files are complete."""
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    config |= dict.fromkeys(("bos_token_id", "eos_token_id"), encoder.special.get(END))
    config |= zip(utils.CONFIG, map(hparams.get, utils.HPARAMS), strict=True)
    tokenizer = ByteLevelBPETokenizer(encoder.encoder | encoder.special, [*encoder.bpe_ranks])
    tokenizer.add_special_tokens([*encoder.special])
    names = utils.build_params(hparams, lambda name, *_: utils.huggingface_name(name))
    tensors = dict(zip(jax.tree.leaves(names), jax.tree.leaves(params), strict=True))
    model_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model_dir) as folder:
        Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        Path(folder, "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
        Path(folder, "model.safetensors").write_bytes(safetensors.save(tensors, {"format": "pt"}))
        for path in sorted(Path(folder).iterdir()):
            path.replace(model_dir / path.name)


# --- Test: how much of the text the model knows by heart ---


def recite(text, model_dir):
    """Count how often the model continues the text word for word after random prompts.

    The model reads a prompt together with the text that follows. Greedy generation would write the
    same text if the logit of each token in it is the highest.
    """
    encoder, hparams, params = open_model("MODEL_DIR", model_dir)
    prompts = Prompts(text, encoder)
    lines = ["How often the model continues the text word for word:"]
    for kind, least, n_new, manner in tqdm(EXAM, "Testing"):
        right = []
        for ids in islice(questions(prompts, kind, least, n_new, manner, hparams["n_ctx"]), ASKED):
            logits = gpt2.gpt2(ids[:-1], **params, n_head=hparams["n_head"])[-n_new:]
            right.append(np.array_equal(np.argmax(logits, axis=-1), ids[-n_new:]))
        prompt = f"{kind} ({least} tokens or more, {TYPED[manner]})"
        lines.append(f"  {n_new} tokens after {prompt}: {sum(right)} of {len(right)}")
    return "\n".join(lines)


def questions(prompts, kind, least, n_new, manner, n_ctx):
    """Yield random prompts of a kind, each with the `n_new` tokens of the text that follow.

    A prompt that occurs twice in the text is left out, because it may continue in two ways.
    """
    text, encode = prompts.text, prompts.encoder.encode
    whole, _ = prompts.typed(0, len(text), manner)
    for i in np.random.default_rng(0).permutation(len(prompts.places[kind])):
        start, end = prompts.places[kind][i]
        if kind != "a whole line":  # take just enough words
            ends = (word.end() for word in regex.finditer(r"\S+", prompts.lines, pos=start))
            end = next((end for end in ends if len(encode(text[start:end], "all")) >= least), end)
        words, n_past = prompts.typed(start, end, manner)
        prompt = encode(words, "all")
        following = prompts.ids[n_past : n_past + n_new]
        fits = len(prompt) >= least and len(following) == n_new and len(prompt) + n_new <= n_ctx
        if fits and whole.count(words) == 1:
            yield [*prompt, *following]


if __name__ == "__main__":
    utils.command_line(main)
