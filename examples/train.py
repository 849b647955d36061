"""Train a GPT-2 on your own text, from nothing or from an existing model.

    pip install -r examples/requirements.txt
    python examples/train.py my.txt models/mine                 # learns the text by heart
    python examples/train.py my.txt models/tuned --start 124M   # fine-tunes GPT-2

The model is the function `gpt2` of `gpt2.py`, with JAX in place of NumPy. JAX computes how the loss
depends on the parameters, and optax changes the parameters so that the loss falls.

A model learns from windows. A window is a run of tokens from the text. The model reads all but the
last of them, and learns to predict all but the first. This file has five parts: it cuts the text
into windows, plans the training, trains, saves the model, and tests how much of the text it knows.
"""

import collections
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # While JAX is imported, it can swallow a KeyboardInterrupt.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

try:
    import jax
    import numpy as np
    import optax
    import regex
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from safetensors import numpy as safetensors
    from tokenizers import ByteLevelBPETokenizer
    from tqdm import tqdm

    import gpt2
    import utils
    from command import command_line, read_options
    from encoder import END_OF_TEXT, Encoder, UserError, home, read_text
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install -r examples/requirements.txt")

SIZES = {"n_ctx": 256, "n_embd": 160, "n_head": 4, "n_layer": 4}  # of a model from nothing
# What an option must be: its kind and its limits.
LIMITS = dict(steps=(int, 0, 10**9), batch=(int, 1), length=(int, 1), lr=(float, 0, 1))
LIMITS |= dict(num_processes=(int, 1), process_id=(int, 0))
# A word is a run of at most 20 characters without spaces. In a longer run, as in Chinese or in a
# genome, each character is a word. The same holds for a run that has <|endoftext|> in it.
WORD = r"<\|endoftext\|>|(?<!\S)(?!\S*<\|endoftext\|>)\S{1,20}(?!\S)|\S"
N_ASKED, N_NEW = 500, 16  # the prompts of the exam, and the tokens that the model must know


def main(text_path, model_dir, start=None, steps=None, batch=None, length=None, lr=None,
         coordinator_address=None, num_processes=None, process_id=None):  # fmt: skip
    """Train a model on a text file, and save it in Hugging Face's layout.

    Without --start, a small model learns the text by heart. The default of 12,000 steps takes 30 to
    60 minutes on two processor cores. For a text of 10 KB, --steps 600 is enough and takes two to
    four minutes. With --start, an existing model is fine-tuned on the text. Ctrl-C ends the
    training after the current step, and what was learnt is saved. If several processes train
    together, a signal ends the one that gets it. Then the others end too, and nothing is saved.

    Args:
        text_path: a text file in UTF-8; if it holds several texts, put <|endoftext|> between them
        model_dir: the folder to save the model in; it must not exist yet
        start: the model to fine-tune: 124M, which is downloaded if it is missing, or a folder
        steps: the number of batches to learn from; by default 12000, or 200 with --start; with 0,
            train nothing, but test how much of the text the model in model_dir knows by heart
        batch: the number of windows in a batch; by default 48, or 4 with --start
        length: the number of tokens in a window; by default 40, or 128 with --start; without
            --start, one batch in seven has fewer windows of 256 tokens
        lr: the highest learning rate; by default 0.02, or 0.0001 with --start
        coordinator_address: the host and port of process 0, if several processes train together
        num_processes: how many processes there are
        process_id: the number of this process, from 0 on; only process 0 reports and saves
    """
    options = read_options(LIMITS, steps=steps, batch=batch, length=length, lr=lr)
    team = read_options(LIMITS, num_processes=num_processes, process_id=process_id)
    text_path, model_dir = home(text_path), Path(os.path.abspath(home(model_dir)))
    if not text_path.is_file():
        raise UserError(f"There is no text file {text_path}")
    text = read_text(text_path)
    if not text.replace(END_OF_TEXT, "").strip():
        raise UserError(f"{text_path} is empty.")
    if options.get("steps") == 0:
        return recite(text, model_dir)
    if os.path.lexists(model_dir):
        raise UserError(f"{model_dir} exists already. Choose another folder for the new model.")
    if coordinator_address or team:
        join(coordinator_address, **team)
    is_new = start is None
    plan = from_nothing(text, **options) if is_new else from_start(text, start, **options)
    # A name that cannot be written is noticed now, because later the training would be lost.
    try:
        model_dir.parent.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(prefix=model_dir.name, dir=model_dir.parent).close()
    except OSError as error:
        raise UserError(f"{model_dir} cannot be written: {error.strerror}") from None
    interrupted = note_ctrl_c() if jax.process_count() == 1 else []
    params, report = train(plan, interrupted)
    if jax.process_index() > 0:
        sys.exit()  # process 0 saves and reports
    while os.path.lexists(model_dir):  # Another program has taken the name meanwhile.
        model_dir = model_dir.with_name(f"{model_dir.name}-new")
    save(model_dir, plan.encoder, plan.hparams, params)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    report = f"The model is in {model_dir}.\n{report}"
    if interrupted:
        print("Stopped.", report)
        sys.exit(130)
    return f"{report}\n{recite(text, model_dir)}" if is_new else report


def join(coordinator_address, **team):
    """Join the other processes that train the same model. A signal then ends this one at once.

    JAX would keep the signals for itself, and wait for the other processes.
    """
    if not coordinator_address or not team.get("process_id", np.inf) < team.get("num_processes", 0):
        needs = "--coordinator_address, --num_processes and a --process_id below it"
        raise UserError(f"Several processes need {needs}.")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator_address, **team)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)


def note_ctrl_c():
    """Return a list in which Ctrl-C is noted from now on. A second one ends the program at once.

    It raises no exception, because one in the middle of a step would lose the parameters: the old
    ones are given away, and the new ones have not been returned yet.
    """
    interrupted = []

    def note(signum, _):
        interrupted.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    return interrupted


# --- Text: its vocabulary, and the windows that are cut from it ---


def learn_vocabulary(text):
    """Learn a byte-level BPE of at most 1,024 tokens. The last of them is <|endoftext|>."""
    tokenizer, texts = ByteLevelBPETokenizer(), text.split(END_OF_TEXT)
    tokenizer.train_from_iterator(texts, 1023, min_frequency=0, show_progress=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return Encoder(tokenizer.get_vocab(), merges)


def fast_tokenizer(encoder):
    """Return the same tokenizer as one of the library `tokenizers`, which is written in Rust."""
    tokenizer = ByteLevelBPETokenizer(encoder.encoder, [*encoder.bpe_ranks])
    tokenizer.add_special_tokens([*encoder.special])
    return tokenizer


class Text:
    """A text that is a ring: after its end comes <|endoftext|>, and then its start again."""

    def __init__(self, text, encoder):
        self.text, self.tokenizer = END_OF_TEXT + text, fast_tokenizer(encoder)
        self.words = [match.span() for match in regex.finditer(WORD, self.text)]
        self.longest = max(map(len, encoder.encoder))  # No token has more characters.
        self.ring = self.text * (2 + self.longest * (SIZES["n_ctx"] + 1) // len(self.text))

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def draw(self, random, n):
        """Return a random prompt of 1 to 18 words, its ids, and the ids of `n` tokens after it.

        The prompt is encoded by itself, and so is what follows, as when a user types the prompt
        and the model goes on. So the tokens at their ends can differ from those in the whole text.
        """
        i, n_words = random.integers(len(self.words)), random.integers(1, 19)
        start, end = self.words[i][0], self.words[i : i + n_words][-1][1]
        prompt, following = self.text[start:end], self.ring[end : end + n * self.longest]
        return prompt, self.encode(prompt), self.encode(following)[:n]

    def window(self, random, n):
        """Return `n` ids: a random prompt, and what follows it."""
        _, ids, following = self.draw(random, n)
        return [*ids, *following][:n]


# --- Plan: what to train, and on which windows ---

# `draw` returns a random batch of windows, and `held_out` are windows that are not learnt.
Plan = collections.namedtuple("Plan", "encoder hparams params draw optimizer held_out steps")


def from_nothing(text, steps=12000, batch=48, length=40, lr=0.02):
    """Plan a small model with its own vocabulary, which is to know all of `text` by heart."""
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
        n_windows = round(batch * length / n) or 1
        return np.array([text.window(random, n + 1) for _ in range(n_windows)], np.int32)

    def kind(name, *shape):
        # None leaves a parameter to Adam.
        return optax.contrib.MuonDimensionNumbers() if name.endswith("/w") else None

    def rate(highest):
        return optax.warmup_cosine_decay_schedule(0, highest, steps // 30, steps)

    optimizer = optax.contrib.muon(
        rate(lr),
        adam_learning_rate=rate(lr / 2),
        muon_weight_dimension_numbers=utils.build_params(hparams, kind),
    )
    params = utils.build_params(hparams, initial)
    return Plan(encoder, hparams, params, draw, optimizer, [], steps)


def from_start(text, start, steps=200, batch=4, length=128, lr=1e-4):
    """Plan to fine-tune the model in the folder `start`. The text's last twentieth is held out."""
    encoder, hparams, params = utils.load_encoder_hparams_and_params(start)
    ids = np.array(fast_tokenizer(encoder).encode(text).ids, np.int32)
    if ids.max(initial=0) >= hparams["n_vocab"]:
        raise UserError("The text has a token whose id has no row in wte.")
    n = len(ids) - len(ids) // 20
    check_length(length, min(hparams["n_ctx"], len(ids) - n - 1))
    windows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)
    places = np.linspace(n, len(windows) - 1, min(16, (len(ids) - n) // length), dtype=int)
    random = np.random.default_rng(0)

    def draw():
        return windows[random.integers(n - length, size=batch)]

    rate = optax.warmup_cosine_decay_schedule(0, lr, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    return Plan(encoder, hparams, params, draw, optimizer, windows[places], steps)


def check_length(length, most):
    """Raise ValueError if windows of this length do not fit the model or the text."""
    if length > most:
        allowed = f"this model and text allow {max(most, 0)}. Use more text, or a smaller --length."
        raise UserError(f"--length {length} is too long: {allowed}")


# --- Train: the loss, the step that lowers it, and the loop ---

on_jax = {}  # the functions of gpt2.py, with `jax.numpy` imported instead of NumPy
exec(read_text(gpt2.__file__).replace("import numpy as np", "import jax.numpy as np"), on_jax)


def loss(params, windows, n_head):
    """Return the mean of minus the log probability, over all but the first token of each window."""
    model = jax.vmap(lambda inputs: on_jax["gpt2"](inputs, **params, n_head=n_head))
    inputs, labels = windows[:, :-1], windows[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(model(inputs), labels).mean()


def train(plan, interrupted):
    """Train on all devices of all processes, until the steps are done or `interrupted` is filled.

    Returns the parameters and a report of the losses.
    """
    n_head = plan.hparams["n_head"]
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    whole = NamedSharding(mesh, PartitionSpec())  # each device has the whole array
    split = NamedSharding(mesh, PartitionSpec("devices"))

    def step(params, state, windows):
        # Every process draws the same batch. Each device computes its part of the windows.
        windows = jax.lax.with_sharding_constraint(windows, split)
        value, gradients = jax.value_and_grad(loss)(params, windows, n_head)
        updates, state = plan.optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    def held_out_loss():
        return np.mean([measure(params, window[None], n_head) for window in plan.held_out])

    # The old parameters are donated, which means that the new ones take their memory. The loaded
    # ones are views of a file, so they are copied first.
    step = jax.jit(step, donate_argnums=(0, 1), in_shardings=whole, out_shardings=whole)
    measure = jax.jit(loss, static_argnums=2, in_shardings=whole, out_shardings=whole)
    begin = jax.jit(lambda params: (params, plan.optimizer.init(params)), out_shardings=whole)
    params, state = begin(jax.tree.map(np.array, plan.params))
    before = held_out_loss() if len(plan.held_out) else None
    losses = []
    bar = tqdm(total=plan.steps, desc="Compiling", disable=jax.process_index() > 0)
    for _ in range(plan.steps):
        params, state, value = step(params, state, plan.draw())
        losses.append(float(value))
        if len(losses) == 1:  # JAX compiles in the first step. The bar forgets its time.
            bar.unpause()
            bar.set_description("Training")
        bar.set_postfix_str(f"loss {losses[-1]:.3f}")
        bar.update()
        if interrupted:
            break
    bar.close()
    # The loss at the end is the mean of 20 steps, because it differs from batch to batch.
    report = f"Training loss: {losses[0]:.4f} at first, {np.mean(losses[-20:]):.4f} at the end."
    if len(plan.held_out):
        report += f"\nHeld-out loss: {before:.4f} before training, {held_out_loss():.4f} after it."
    return jax.tree.map(np.asarray, params), report


# --- Save: in Hugging Face's layout ---


def save(model_dir, encoder, hparams, params):
    """Save a model in Hugging Face's layout. Its folder gets its name when it is complete."""
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    for name, ids in {"bos_token_id": [*encoder.bos], "eos_token_id": [*encoder.eos]}.items():
        config[name] = ids[0] if len(ids) == 1 else ids or None
    config |= {field: hparams[name] for name, field in utils.HPARAMS.items()}
    names = utils.build_params(hparams, lambda name, *_: utils.huggingface_name(name))
    tensors = dict(zip(jax.tree.leaves(names), jax.tree.leaves(params), strict=True))
    with tempfile.TemporaryDirectory(dir=Path(model_dir).parent) as folder:
        new = Path(folder, "model")
        new.mkdir()
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (new / "tokenizer.json").write_text(fast_tokenizer(encoder).to_str(pretty=True), "utf-8")
        (new / "model.safetensors").write_bytes(safetensors.save(tensors, {"format": "pt"}))
        new.rename(model_dir)


# --- Test: how much of the text the model knows by heart ---


def recite(text, folder):
    """Count how often the model continues the text word for word after a random prompt.

    The model reads a prompt together with the text that follows. If each token of that text has the
    highest logit, greedy generation would write the same. A prompt that occurs twice in the text is
    left out, because it may continue in two ways, and so is one that does not fit.
    """
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder))
    text, random, right = Text(text, encoder), np.random.default_rng(0), []
    for _ in tqdm(range(N_ASKED), "Testing"):
        prompt, ids, answer = text.draw(random, N_NEW)
        occurs_once = text.text.find(prompt) == text.text.rfind(prompt)
        if occurs_once and len(ids) + N_NEW <= hparams["n_ctx"]:
            logits = gpt2.gpt2([*ids, *answer[:-1]], **params, n_head=hparams["n_head"])
            right.append(np.array_equal(np.argmax(logits[-N_NEW:], axis=-1), answer))
    asked = f"{len(right)} of {N_ASKED} random prompts occur once in the text and fit the context"
    if len(right) < N_ASKED // 20:
        return f"There is no exam, because only {asked}."
    return f"{asked}. After {sum(right)} of these, the model knows the next {N_NEW} tokens."


if __name__ == "__main__":
    command_line(main)
