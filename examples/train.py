"""Train a GPT-2 on your own text, from nothing or from an existing model.

    pip install -r examples/requirements.txt
    python examples/train.py my.txt models/mine                        # learns the text by heart
    python examples/train.py my.txt models/tuned --start models/124M   # fine-tunes GPT-2

The model is the function `gpt2` of `gpt2.py`, with JAX in place of NumPy. JAX computes how the loss
depends on the parameters, and optax changes the parameters so that the loss falls.

A model learns from windows. A window is a run of tokens from the text. The model reads all but the
last of them, and learns to predict all but the first. This file has five parts: it cuts the text
into windows, plans the training, trains, saves the model, and tests how much of the text it knows.
"""

import json
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import jax
    import numpy as np
    import optax
    import regex
    from jax.experimental.multihost_utils import process_allgather
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from safetensors import numpy as safetensors
    from tokenizers import ByteLevelBPETokenizer
    from tqdm import tqdm

    import gpt2
    import utils
    from encoder import END_OF_TEXT, Encoder, UserError, read_json, read_text
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install -r examples/requirements.txt")

SIZES = {"n_ctx": 256, "n_embd": 160, "n_head": 4, "n_layer": 4}  # of a model from nothing
# What an option must be: its kind and its limits. The others are whole numbers above 0.
LIMITS = {"steps": (int, 0), "process_id": (int, 0), "lr": (float, 0, 1)}
# A word is a run of at most 20 characters without spaces. In a longer run, as in Chinese or in a
# genome, each character is one, and so it is beside the token between two texts.
WORD = r"<\|endoftext\|>|(?<!\S)(?!\S*<\|endoftext\|>)\S{1,20}(?!\S)|\S"
N_READ, N_NEW, N_ASKED = 6, 16, 500  # the least tokens of a prompt, those to add, and questions
# Files of an older model that would contradict a new one.
OLD = {"generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}
OLD |= {"added_tokens.json", "vocab.json", "merges.txt", "model.safetensors.index.json"}


def main(text_path, model_dir, start=None, steps=None, batch=None, length=None, lr=None,
         replace=False, coordinator_address=None, num_processes=None, process_id=None):  # fmt: skip
    """Train a model on a text file, and save it in Hugging Face's layout.

    Without --start, a small model learns the text by heart. The default of 12,000 steps takes 30 to
    60 minutes on two processor cores. For a text of 10 KB, --steps 600 is enough and takes two to
    four minutes. With --start, an existing model is fine-tuned on the text.

    Args:
        text_path: a text file in UTF-8; if it holds several texts, put <|endoftext|> between them
        model_dir: the folder to save the model in
        start: the folder of the model to fine-tune, such as models/124M
        steps: the number of batches to learn from; by default 12000, or 200 with --start; with 0,
            train nothing, but test how much of the text the model in model_dir knows by heart
        batch: the number of windows in a batch; by default 48, or 4 with --start
        length: the number of tokens in a window; by default 40, or 128 with --start; without
            --start, one batch in seven has fewer windows of 256 tokens
        lr: the highest learning rate; by default 0.02, or 0.0001 with --start
        replace: replace the model that is already in model_dir
        coordinator_address: the host and port of process 0, if several processes train together
        num_processes: how many processes there are
        process_id: the number of this process, from 0 on; only process 0 reports and saves
    """
    options = read_numbers(steps=steps, batch=batch, length=length, lr=lr)
    team = read_numbers(num_processes=num_processes, process_id=process_id)
    text = read_text(text_path)
    if not text.replace(END_OF_TEXT, "").strip():
        raise UserError(f"{text_path} is empty.")
    model_dir = utils.home(model_dir).resolve()
    if options.get("steps") == 0:
        return recite(text, model_dir)
    # In a shell, the value of --replace arrives as text.
    has_model = any(model_dir.glob("*.json")) or any(model_dir.glob("*.safetensors"))
    if has_model and str(replace) != "True":
        raise UserError(f"{model_dir} has a model already. Use another folder, or add --replace.")
    old_files(model_dir)  # A damaged index of weights is noticed now.
    if coordinator_address or team:
        if not coordinator_address or len(team) < 2:
            raise UserError("Several processes need an address, --num_processes and --process_id.")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator_address, **team)
    plan = from_start if start else from_nothing
    encoder, hparams, params, *lesson = plan(text, start, **options)
    # A folder that cannot be written is noticed now, because later the training would be lost.
    model_dir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=model_dir).close()
    signals = []

    def note(signum, _):
        signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # The second one ends the program at once.

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)
    # In the main thread, Python would call `note` only after a step, which can take minutes.
    training = ThreadPoolExecutor(1).submit(train, params, hparams["n_head"], *lesson, signals)
    params, report, signum = training.result()
    if jax.process_index() > 0:
        sys.exit(signum and 128 + signum)  # process 0 saves and reports
    save(model_dir, encoder, hparams, params)
    report = f"The model is in {model_dir}.\n{report}"
    if signum:
        print("Stopped.", report)
        sys.exit(128 + signum)
    return report if start else f"{report}\n{recite(text, model_dir)}"


def read_numbers(**options):
    """Turn the options that were given into numbers. Raises ValueError for one out of range."""
    given = {name: value for name, value in options.items() if value is not None}
    return {n: utils.number(n, value, *LIMITS.get(n, (int, 1))) for n, value in given.items()}


# --- Text: its vocabulary, and the windows that are cut from it ---


def learn_vocabulary(text):
    """Learn a byte-level BPE of at most 1,024 tokens. The last of them is <|endoftext|>."""
    tokenizer, texts = ByteLevelBPETokenizer(), text.split(END_OF_TEXT)
    tokenizer.train_from_iterator(texts, 1023, min_frequency=0, show_progress=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return Encoder(tokenizer.get_vocab(), merges, [END_OF_TEXT])


def fast_tokenizer(encoder):
    """Return the same tokenizer as one of the library `tokenizers`, which is written in Rust."""
    tokenizer = ByteLevelBPETokenizer(encoder.encoder, [*encoder.bpe_ranks])
    tokenizer.add_special_tokens([*encoder.special.keys() - encoder.added])
    tokenizer.add_tokens([*encoder.added])
    return tokenizer


def as_typed(text):
    """Write a text as people type it."""
    return " ".join(regex.sub(r"[^\p{L}\p{N}\s']", "", text).lower().split())


class Text:
    """A text that is a ring: after its end comes <|endoftext|>, and then its start again.

    Windows and prompts begin with a word. They are encoded by themselves, as when a user types
    them. So their first word has no space before it, which makes it another token than in the text.
    """

    def __init__(self, text, encoder):
        self.text, self.tokenizer = END_OF_TEXT + text, fast_tokenizer(encoder)
        self.words = [match.span() for match in regex.finditer(WORD, self.text)]
        # The most characters that a window can have.
        self.most = max(map(len, encoder.encoder)) * (SIZES["n_ctx"] + 1)
        self.ring = self.text * (2 + self.most // len(self.text))

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def ids_from(self, place, n):
        """Return the ids of the next `n` tokens."""
        size = 8 * n  # characters, usually more than enough
        while len(ids := self.encode(self.ring[place : place + size])) < 2 * n and size < self.most:
            size *= 2
        return ids[:n]

    def prompt(self, i, n_words, is_typed):
        """Return `n_words` words as a prompt, and the place where the text goes on after it.

        People type a prompt on one line, in lower case, and without punctuation but apostrophes. If
        the words end with a sign, the text goes on with it.
        """
        start, (_, end) = self.words[i][0], self.words[i : i + n_words][-1]
        words = self.text[start:end]
        if is_typed:
            line = regex.split(r"\n|<\|endoftext\|>", words)[0]
            words = regex.sub(r"[^\p{L}\p{N}]+\Z", "", line)
        return as_typed(words) if is_typed else words, start + len(words)

    def window(self, random, length):
        """Return the ids of a random window, `length + 1` of them, and how many were typed.

        A window begins with a prompt of 2 to 18 words. A fifth of the prompts are as people type.
        """
        i, n_words = random.integers(len(self.words)), random.integers(2, 19)
        is_typed = random.random() < 0.2
        prompt, place = self.prompt(i, n_words, is_typed)
        ids = self.encode(prompt)
        following = self.ids_from(place, length + 1)
        return [*ids, *following][: length + 1], len(ids) if is_typed else 0


# --- Plan: what to train, and on which windows ---


def from_nothing(text, _, steps=12000, batch=48, length=40, lr=0.02):
    """Plan a small model with its own vocabulary, which is to know all of `text` by heart.

    A plan is the model's encoder, hparams and parameters, a function that returns a random batch,
    the optimizer, the windows that are held out, and the number of steps.
    """
    encoder = learn_vocabulary(text)
    hparams = {"n_vocab": len(encoder.encoder), **SIZES}
    text = Text(text, encoder)
    check_length(length, min(SIZES["n_ctx"], len(text.encode(text.text)) - 1))
    random = np.random.default_rng(0)

    def initial(name, *shape):
        if name.endswith(("/g", "/b")):
            return np.full(shape, name.endswith("/g"), np.float32)
        return random.normal(0, 0.02, shape).astype(np.float32)

    def draw():
        # The first tokens of a window are hard to predict, because the model has read little before
        # them. Short windows have more of these, and so most windows are short.
        n = SIZES["n_ctx"] if random.integers(7) == 0 else length
        rows = [text.window(random, n) for _ in range(round(batch * length / n) or 1)]
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
    encoder, hparams, params = utils.load_encoder_hparams_and_params(start, None)
    ids = np.array(fast_tokenizer(encoder).encode(text).ids, np.int32)
    if ids.max(initial=0) >= hparams["n_vocab"]:
        raise UserError("The text has a token whose id has no row in wte.")
    n = len(ids) - len(ids) // 20
    check_length(length, min(hparams["n_ctx"], len(ids) - n - 1))
    windows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)
    places = np.linspace(n, len(windows) - 1, min(16, (len(ids) - n) // length), dtype=int)
    random = np.random.default_rng(0)

    def draw():
        return windows[random.integers(n - length, size=batch)], np.zeros(batch, np.int32)

    rate = optax.warmup_cosine_decay_schedule(0, lr, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    return encoder, hparams, params, draw, optimizer, windows[places], steps


def check_length(length, most):
    """Raise ValueError if windows of this length do not fit the model or the text."""
    if length > most:
        allowed = f"this model and text allow {max(most, 0)}. Use more text, or a smaller --length."
        raise UserError(f"--length {length} is too long: {allowed}")


# --- Train: the loss, the step that lowers it, and the loop ---

on_jax = {}  # the functions of gpt2.py, with `jax.numpy` imported instead of NumPy
exec(read_text(gpt2.__file__).replace("import numpy as np", "import jax.numpy as np"), on_jax)


def loss(params, windows, n_typed, n_head):
    """Return minus the mean log probability of all tokens but the first one and the typed ones."""
    model = jax.vmap(lambda inputs: on_jax["gpt2"](inputs, **params, n_head=n_head))
    losses = optax.softmax_cross_entropy_with_integer_labels(model(windows[:, :-1]), windows[:, 1:])
    counted = np.arange(1, windows.shape[1]) >= n_typed[:, None]
    return (losses * counted).sum() / counted.sum().clip(1)


def train(params, n_head, draw, optimizer, held_out, steps, signals):
    """Train on all devices of all processes. A signal in any process's `signals` ends the training.

    Returns the parameters, a report of the losses, and the signal, or 0.
    """
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    whole = NamedSharding(mesh, PartitionSpec())  # each device has the whole array
    split = NamedSharding(mesh, PartitionSpec("devices"))

    def step(params, state, windows, n_typed):
        # Every process draws the same batch. Each device computes its part of the windows.
        windows, n_typed = jax.lax.with_sharding_constraint((windows, n_typed), split)
        value, gradients = jax.value_and_grad(loss)(params, windows, n_typed, n_head)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    def held_out_loss():
        return np.mean([measure(params, window[None], np.zeros(1), n_head) for window in held_out])

    # The old parameters are donated, which means that the new ones take their memory. So they must
    # be a copy, because the loaded ones are views of a file.
    step = jax.jit(step, donate_argnums=(0, 1), in_shardings=whole, out_shardings=whole)
    measure = jax.jit(loss, static_argnums=3, in_shardings=whole, out_shardings=whole)
    begin = jax.jit(lambda params: (params, optimizer.init(params)), out_shardings=whole)
    params, state = begin(jax.tree.map(np.array, params))
    before = held_out_loss() if len(held_out) else None
    losses = []
    for _ in (bar := tqdm(range(steps), "Training", disable=jax.process_index() > 0)):
        params, state, value = step(params, state, *draw())
        losses.append(float(value))
        bar.set_postfix_str(f"loss {losses[-1]:.3f}")
        # No process can take a step alone, so all processes agree on when to stop.
        if signum := int(process_allgather(np.array([*signals, 0][0])).max()):
            break
    # The loss at the end is the mean of 20 steps, because it differs from batch to batch.
    report = f"Training loss: {losses[0]:.4f} at first, {np.mean(losses[-20:]):.4f} at the end."
    if len(held_out):
        report += f"\nHeld-out loss: {before:.4f} before training, {held_out_loss():.4f} after it."
    return jax.tree.map(np.asarray, params), report, signum


# --- Save: in Hugging Face's layout ---


def save(model_dir, encoder, hparams, params):
    """Save a model in Hugging Face's layout, in the place of an older one if there is one."""
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    for name, ids in {"bos_token_id": [*encoder.bos], "eos_token_id": [*encoder.eos]}.items():
        config[name] = ids[0] if len(ids) == 1 else ids or None
    config |= {field: hparams[name] for name, field in utils.HPARAMS.items()}
    names = utils.build_params(hparams, lambda name, *_: utils.huggingface_name(name))
    tensors = dict(zip(jax.tree.leaves(names), jax.tree.leaves(params), strict=True))
    with tempfile.TemporaryDirectory(dir=model_dir) as folder:
        new = Path(folder)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (new / "tokenizer.json").write_text(fast_tokenizer(encoder).to_str(pretty=True), "utf-8")
        (new / "model.safetensors").write_bytes(safetensors.save(tensors, {"format": "pt"}))
        replace_model(model_dir, new)


def old_files(model_dir):
    """Return the names of the files of an older model that would contradict a new one."""
    index = read_json(model_dir / "model.safetensors.index.json", optional=True)
    weight_map = index.get("weight_map")
    parts = {*map(str, weight_map.values())} if isinstance(weight_map, dict) else set()
    parts &= {path.name for path in model_dir.glob("*.safetensors")} - {"model.safetensors"}
    return parts | OLD


def replace_model(model_dir, new):
    """Move the complete files of a new model into the place of an old one.

    Without its config.json, a model is refused as not complete. So this file goes first and comes
    last. An old model in OpenAI's layout has none, but with a model.safetensors it needs one.
    """
    names = old_files(model_dir)
    (model_dir / "config.json").unlink(missing_ok=True)
    (new / "model.safetensors").replace(model_dir / "model.safetensors")
    for name in names:
        (model_dir / name).unlink(missing_ok=True)
    (new / "tokenizer.json").replace(model_dir / "tokenizer.json")
    (new / "config.json").replace(model_dir / "config.json")


# --- Test: how much of the text the model knows by heart ---


def recite(text, folder):
    """Count how often the model continues the text word for word after random prompts.

    The model reads a prompt together with the text that follows. Greedy generation would write the
    same text if the logit of each token in it is the highest.
    """
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder), None)
    text, lines = Text(text, encoder), []
    for is_typed in (False, True):
        right = []
        rows = islice(questions(text, is_typed, hparams["n_ctx"]), N_ASKED)
        for ids in tqdm(rows, "Testing", N_ASKED):
            logits = gpt2.gpt2(ids[:-1], **params, n_head=hparams["n_head"])[-N_NEW:]
            right.append(np.array_equal(np.argmax(logits, axis=-1), ids[-N_NEW:]))
        manner = "as people type them" if is_typed else "as they stand in the text"
        count = f"it knows the next {N_NEW} tokens: {sum(right)} of {len(right)}"
        reason = "there is no test: the text is too short, or it repeats itself"
        lines.append(f"After prompts {manner}, {count if right else reason}")
    return "\n".join(lines)


def questions(text, is_typed, n_ctx):
    """Yield random prompts, each with the `N_NEW` tokens of the text that follow.

    A prompt that occurs twice in the text is left out, because it may continue in two ways.
    """
    whole = as_typed(text.text) if is_typed else text.text
    for i in np.random.default_rng(0).permutation(len(text.words)):
        for n_words in range(1, 99):
            prompt, place = text.prompt(i, n_words, is_typed)
            if len(text.encode(prompt)) >= N_READ:
                break
        ids = [*text.encode(prompt), *text.ids_from(place, N_NEW)]
        if whole.find(prompt) == whole.rfind(prompt) != -1 and N_READ + N_NEW <= len(ids) <= n_ctx:
            yield ids


if __name__ == "__main__":
    utils.command_line(main)
