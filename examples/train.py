"""Train a GPT-2 on a text of your own, from nothing or from the weights of another model.

    pip install -r examples/requirements.txt
    python examples/train.py my.txt models/mine                        # learns the text by heart
    python examples/train.py my.txt models/mine --start models/124M    # teaches GPT-2 its manner

The model is `gpt2` of `gpt2.py` with JAX in NumPy's place; JAX and optax do the rest. Told in
order: the data, the model, the step, the loop, how a model is saved, and what it knows by heart.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import regex
    from jax.experimental.multihost_utils import process_allgather
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from safetensors import numpy as safetensors
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as error:
    sys.exit(f"{error}: pip install -r examples/requirements.txt")

from encoder import PATTERN, Encoder, bytes_to_unicode, read_text  # noqa: E402
from gpt2 import gpt2  # noqa: E402
from utils import (  # noqa: E402
    CONFIG,
    HPARAMS,
    build_params,
    command_line,
    huggingface_name,
    load_encoder_hparams_and_params,
    progress,
)

SIZES = {"n_ctx": 256, "n_embd": 160, "n_head": 4, "n_layer": 4}  # of a model from nothing
FROM_NOTHING = {"steps": 12000, "batch": 48, "length": 40, "lr": 0.02}
FROM_START = {"steps": 200, "batch": 4, "length": 128, "lr": 1e-4}
CLOCK = {"bar_format": "{desc} {elapsed}"}  # as long as nobody knows how much there is to do
# Where windows begin: short ones where a prompt may, long ones where a text does.
SHORT = {"line": 0.2, "clause": 0.15, "word": 0.45, "typed": 0.2}
LONG = {"line": 0.9, "text": 0.1}
ASKED = 500  # prompts of a kind
# What it is asked in the end: where prompts begin, how many tokens they have at least, how many
# are to follow, and how the prompt is typed.
EXAM = {
    "40 tokens or more from the start of a speech": ("speech", 40, 40, None),
    "a line of 8 tokens or more": ("line", 8, 40, None),
    "5 tokens or more from the start of a clause": ("clause", 5, 16, None),
    "6 tokens or more from any word on": ("word", 6, 16, None),
    "a line of 8 tokens or more in small letters": ("line", 8, 16, 0),
    "a line of 8 tokens or more without punctuation": ("line", 8, 16, 1),
    "a line of 8 tokens or more without either": ("line", 8, 16, 2),
}


def main(text_path, model_dir, start=None, steps=None, batch=None, length=None, lr=None,
         coordinator_address=None, num_processes=None, process_id=None):  # fmt: skip
    """Train a model on a plain text, and write it in the layout of Hugging Face.

    Args:
        text_path: the text, in UTF-8
        model_dir: the folder of the model; the one in it stays until the new one is complete
        start: the folder of a model to go on from; without it, one begins from nothing
        steps: how many batches to learn from, 12000, or 200 with --start; 0 trains nothing, and
            counts how much of the text the model in model_dir knows by heart
        batch: how many windows of the text make a batch, 48, or 4 with --start
        length: how many tokens a window has, 40 (in one batch of seven, 256), or 128 with --start
        lr: the highest learning rate, 0.02, or 0.0001 with --start
        coordinator_address: the host and port of process 0, where several train together; "auto"
            leaves it and the next two to JAX, which knows Slurm, MPI and Kubernetes
        num_processes: how many processes there are
        process_id: which of them this one is, from 0 on
    """
    given = {"steps": steps, "batch": batch, "length": length, "lr": lr}
    given = {name: number(name, value) for name, value in given.items() if value is not None}
    options = (FROM_START if start else FROM_NOTHING) | given
    team = {"num_processes": num_processes, "process_id": process_id}
    team = {name: number(name, value) for name, value in team.items() if value is not None}
    text, model_dir = read_text(text_path), Path(model_dir).resolve()
    if not options["steps"]:
        return recite(text, model_dir)
    with (
        progress(desc="Waiting for the others" if team else "Reading", **CLOCK) as bar,
        joined(coordinator_address, **team) as writes,
        stoppable() as signals,  # after JAX, which takes SIGTERM for itself
    ):
        bar.disable = not writes
        bar.set_description_str("Reading")
        model, *lesson = (from_start if start else from_nothing)(text, start, **options)
        if writes:
            expect_room(model_dir, model["params"])
        report, signum = train(model, *lesson, options["steps"], signals, bar)
        if writes and report:
            bar.set_description_str(f"Saving {model_dir}")
            save(model_dir, **model)
    if signum:
        kept = report and f"{model_dir} has what was learnt until then. {report}"
        if writes:
            print("Stopped.", kept or "Nothing was learnt yet, and nothing is written.")
        sys.exit(128 + signum)
    if not writes:
        return ""
    return report if start else f"{report}\n{recite(text, model_dir)}"


def number(name, value):
    """Read the value of an option; raises ValueError for one that makes no sense."""
    kind, least = float if name == "lr" else int, int(name in ("batch", "length", "num_processes"))
    with contextlib.suppress(ValueError):
        if least <= kind(value) < float("inf"):
            return kind(value)
    which = "number" if kind is float else "whole number"
    raise ValueError(f"--{name} must be a {which}, {least} or more, not {value!r}")


def from_nothing(text, _, steps, batch, length, lr):
    """Plan a small model with a vocabulary of its own, that is to know all of `text` by heart.

    A plan is the model; a function that draws a batch; the optimizer; and what is held out.
    """
    encoder, random = learn_vocabulary(text), np.random.default_rng(0)
    hparams = {"n_vocab": len(encoder.encoder), **SIZES}
    prompts, n_ctx = Prompts(text, encoder), hparams["n_ctx"]
    check_lengths("the text", len(prompts.ids), n_ctx, length, n_ctx)

    def first(name, *shape):
        if name.endswith(("/g", "/b")):
            return np.full(shape, name.endswith("/g"), np.float32)
        return random.normal(0, 0.02, shape).astype(np.float32)

    def draw():
        # Mostly short windows: a long one shows a short context, the harder kind, only once.
        if random.random() < 0.85:
            return prompts.batch(random, SHORT, batch, length)
        return prompts.batch(random, LONG, round(batch * length / n_ctx) or 1, n_ctx)

    def rate(peak):
        return optax.warmup_cosine_decay_schedule(0, peak, steps // 30, steps)

    def kinds(params):  # Muon is for matrices that multiply; the rest, embeddings too, is Adam's
        matrix = optax.contrib.MuonDimensionNumbers()
        return build_params(hparams, lambda name, *_: matrix if name.endswith("/w") else None)

    model = {"encoder": encoder, "hparams": hparams, "params": build_params(hparams, first)}
    muon = {"adam_learning_rate": rate(lr / 2), "muon_weight_dimension_numbers": kinds}
    return model, draw, optax.contrib.muon(rate(lr), **muon), []


def from_start(text, start, steps, batch, length, lr):
    """Plan to go on from the model in `start`, with its vocabulary, on all but the text's end."""
    start = Path(start).resolve()
    encoder, hparams, params = load_encoder_hparams_and_params(start.name, start.parent)
    ids, random = np.array(encoder.encode(text), np.int32), np.random.default_rng(0)
    ids, rest = np.split(ids, [len(ids) - len(ids) // 20])
    check_lengths("the text's last twentieth", len(rest), length, length, hparams["n_ctx"])

    def windows(ids, starts):
        return ids[starts[:, None] + np.arange(length + 1)], np.zeros(len(starts), np.int32)

    def draw():
        return windows(ids, random.integers(len(ids) - length, size=batch))

    model = {"encoder": encoder, "hparams": hparams, "params": params}
    rate = optax.warmup_cosine_decay_schedule(0, lr, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    places = np.linspace(0, len(rest) - length - 1, min(16, len(rest) // length), dtype=int)
    held_out = np.array_split(places, -(-len(places) // batch))
    return model, draw, optimizer, [windows(rest, starts) for starts in held_out]


def check_lengths(name, n_tokens, least, length, n_ctx):
    """Raise ValueError where the text has no whole window, or a window does not fit the context."""
    if n_tokens <= least:
        raise ValueError(f"{name} has {n_tokens} tokens: it takes more than {least}")
    if length > n_ctx:
        raise ValueError(f"--length must be {n_ctx}, the context of the model, or less")


def learn_vocabulary(text):
    """Learn a byte-level BPE of at most 1,024 tokens, the last of which is <|endoftext|>."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    alphabet = byte_level.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1023, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return Encoder(tokenizer.get_vocab(), json.loads(tokenizer.to_str())["model"]["merges"])


class Prompts:
    """The places of a text where a prompt may begin, and how the text goes on from there.

    A prompt is encoded from its first character on, as a user types it: a word from the middle of
    a line, which has a space before it in the text, is another token without it.
    """

    def __init__(self, text, encoder):
        self.text, self.encoder = text, encoder
        self.ids = [*encoder.endoftext]
        self.n_ids = {0: len(self.ids)}  # how many ids lead up to the end of a piece of the text
        for piece in regex.finditer(PATTERN, text):
            self.ids += encoder.encode(piece[0])
            self.n_ids[piece.end()] = len(self.ids)
        self.ids = np.array(self.ids)
        self.places = {"line": [], "clause": [], "word": [], "typed": []}
        for word in regex.finditer(r"\S+", text):
            start, end = word.span()
            self.places["word"].append((start, end))
            if start == 0 or text[start - 1] == "\n":
                line, n_words = start, 0
                self.places["line"].append((start, end))
            elif regex.search("[,;:.!?] $", text[start - 2 : start]):
                self.places["clause"].append((start, end))
            n_words += 1
            if 4 <= n_words <= 20:
                self.places["typed"].append((line, end))

    def batch(self, random, shares, size, length):
        """Draw windows `[size, length + 1]`, and how many ids of each are typed, not the text's."""
        rows = [self.window(random, shares, length) for _ in range(size)]
        return tuple(np.array(column, np.int32) for column in zip(*rows, strict=True))

    def window(self, random, shares, length):
        """Draw a window: the ids of its first word or typed words, then those of the text."""
        kind, prompt, n_past, n_typed = random.choice([*shares], p=[*shares.values()]), [], 0, 0
        if kind != "text":
            places = self.places[kind] or self.places["word"]
            start, end = places[random.integers(len(places))]
            words = self.text[start:end]
            if kind == "typed":
                words, end = self.typed(start, end, random.integers(4))
            prompt, n_past = self.encoder.encode(words), self.n_ids[end]
            n_typed = len(prompt) if kind == "typed" else 0
        rest = self.ids.take(range(n_past, n_past + length + 1), mode="wrap")
        return [*prompt, *rest][: length + 1], n_typed

    def typed(self, start, end, manner):
        """Change words to how people type them: 0 in small letters, 1 without punctuation, 2 both,
        3 both and without apostrophes; returns them, and where in the text they now end.
        """
        if manner:
            letters = regex.search(r"(?s).*[\p{L}\p{N}]", self.text[start:end])
            end = start + letters.end() if letters else end
        words = self.text[start:end]
        words = words if manner == 1 else words.lower()
        if manner:
            signs = r"[^\p{L}\p{N}\s]" if manner == 3 else r"[^\p{L}\p{N}\s']"
            words = regex.sub(" +", " ", regex.sub(signs, "", words))
        return words, end


def gpt2_on_jax():
    """Return `gpt2` of `gpt2.py`, whose one import is swapped."""
    source, module = read_text(ROOT / "gpt2.py"), ModuleType("gpt2_on_jax")
    exec(source.replace("import numpy as np", "import jax.numpy as np"), vars(module))
    return module.gpt2


def make_loss(n_head):
    """Return the mean surprise at the tokens of a batch, those that were typed aside."""
    gpt2 = gpt2_on_jax()

    def loss(params, windows, n_typed):
        model = jax.vmap(lambda inputs: gpt2(inputs, **params, n_head=n_head))
        targets = windows[:, 1:]
        surprise = optax.softmax_cross_entropy_with_integer_labels(model(windows[:, :-1]), targets)
        learnt = jnp.arange(1, windows.shape[1]) >= n_typed[:, None]
        return (surprise * learnt).sum() / jnp.maximum(learnt.sum(), 1)

    return loss


def train(model, draw, optimizer, held_out, steps, signals, bar):
    """Take the steps, each batch split over all devices of all processes, and change the model.

    Returns what to report of the losses, "" before the first step, and the signal that stopped it.
    """
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(tree, sharding):
        def array(leaf):  # a copy: what is donated below must not be the file that was loaded
            make = jax.make_array_from_callback
            return make(leaf.shape, sharding, lambda part: np.array(leaf[part]))

        return jax.tree.map(array, tree)

    def whole(windows, n_typed):
        """Add windows of which nothing is learnt, until the devices divide the batch."""
        missing = -len(windows) % mesh.size
        n_typed = np.pad(n_typed, (0, missing), constant_values=windows.shape[1])
        return place((np.pad(windows, ((0, missing), (0, 0))), n_typed), split)

    def step(params, state, windows, n_typed):
        value, gradients = jax.value_and_grad(loss)(params, windows, n_typed)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    def measure():
        bar.set_description_str("Measuring the loss")
        losses = [float(held_out_loss(params, *whole(*batch))) for batch in held_out]
        return np.average(losses, weights=[len(windows) for windows, _ in held_out])

    loss = make_loss(model["hparams"]["n_head"])
    held_out_loss = jax.jit(loss, out_shardings=everywhere)
    # Donated, the old parameters make room for the new ones.
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=everywhere)
    params = place(model["params"], everywhere)
    state = jax.jit(optimizer.init, out_shardings=everywhere)(params)
    losses, measured, compiled, signum = [], [], set(), 0
    bar.bar_format = None  # tqdm's own, now that it is known how much there is to do
    bar.reset(steps)
    for i in range(steps):
        # The processes agree when to stop, since none can take a step alone.
        signum = int(process_allgather(np.array([*signals, 0][0])).max())
        if signum:
            break
        if held_out and i % -(-steps // 10) == 0:
            measured.append(measure())
        windows, n_typed = draw()
        bar.set_description_str("Training" if windows.shape in compiled else "Compiling")
        compiled.add(windows.shape)
        params, state, value = step(params, state, *whole(windows, n_typed))
        losses.append(float(value))
        shown = f", held out {measured[-1]:.3f}" if held_out else ""
        bar.set_postfix_str(f"loss {losses[-1]:.3f}{shown}")
        bar.update()
    report = f"Loss: {np.mean(losses[-max(1, steps // 10) :]):.4f}" if losses else ""
    if held_out and losses:
        report += f" on the text, {measure():.4f} on its last twentieth, which it was not trained "
        report += f"on (before: {measured[0]:.4f})"
    model["params"] = jax.tree.map(np.asarray, params)
    return report, signum


@contextlib.contextmanager
def joined(coordinator_address, **team):
    """Join the other processes, if there are any; yields whether this is the one that writes."""
    if coordinator_address not in (None, "auto"):
        team["coordinator_address"] = coordinator_address
        if ":" not in coordinator_address:
            raise ValueError(f"--coordinator_address must be host:port, not {coordinator_address}")
    try:
        if team or coordinator_address:
            # Where there are only CPUs, whose processes JAX joins in more than one way.
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(**team)
        yield jax.process_index() == 0
    except (RuntimeError, OSError, ValueError) as error:
        fault = str(error).split("\n")[0]
        if jax.process_count() == 1:
            raise (OSError(f"JAX: {fault}") if isinstance(error, RuntimeError) else error) from None
        # Left at once, without the farewell that the others could not answer: they see it go.
        print(f"\nProcess {jax.process_index()} ends, as the others will: {fault}", file=sys.stderr)
        os._exit(1)


@contextlib.contextmanager
def stoppable():
    """Note Ctrl-C and SIGTERM in the list that this yields, so that the step can be finished."""
    signals, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda signum, _: signals.append(signum)) for number in numbers]
    try:
        yield signals
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def expect_room(model_dir, params):
    """Raise OSError now where the model could not be written in the end."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + 10_000_000
    new = not model_dir.exists()
    model_dir.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=model_dir).close()
        if shutil.disk_usage(model_dir).free < needed:
            raise OSError(f"{model_dir} needs {needed / 1e6:.0f} MB of free space")
    finally:
        if new:
            model_dir.rmdir()


def save(model_dir, encoder, hparams, params):
    """Write the files that `transformers` reads too, and then put all of them in their place."""
    end = encoder.encoder.get("<|endoftext|>")
    config = dict(zip(CONFIG, map(hparams.get, HPARAMS), strict=True)) | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
    plain = {*bytes_to_unicode().values(), *map("".join, encoder.bpe_ranks)}
    tokenizer = Tokenizer(models.BPE(encoder.encoder, [*encoder.bpe_ranks]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in encoder.encoder if token not in plain])
    tensors = {}
    names = build_params(hparams, lambda name, *shape: huggingface_name(name))
    jax.tree.map(tensors.__setitem__, names, params)
    model_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model_dir) as folder:
        Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        weights = safetensors.save(tensors, metadata={"format": "pt"})
        Path(folder, "model.safetensors").write_bytes(weights)
        for name in sorted(os.listdir(folder)):
            os.replace(Path(folder, name), model_dir / name)


def recite(text, model_dir):
    """Count how often the model goes on with the text, word for word, from random prompts.

    Greedy tokens are the text's where each of them is the likeliest after those before: one pass
    over prompt and continuation tells that of all at once. A prompt that occurs more than once, so
    that it may go on in more than one way, is left out of the count.
    """
    encoder, hparams, params = load_encoder_hparams_and_params(model_dir.name, model_dir.parent)
    counts = {}
    with progress(desc="Reading", **CLOCK) as bar:
        prompts = Prompts(text, encoder)
        lines = [line.span() for line in regex.finditer(r"(?m)^\S(?:.*\S)?", text)]
        places = {kind: [(start, None) for start, _ in at] for kind, at in prompts.places.items()}
        places["speech"] = [
            (start, None) for start, _ in lines if text[max(0, start - 2) : start] in ("", "\n\n")
        ]
        places["line"] = lines
        bar.set_description_str("Measuring what it knows by heart")
        bar.bar_format = None
        bar.reset(ASKED * len(EXAM))
        for name, (kind, least, n_new, manner) in EXAM.items():
            rows = questions(prompts, places[kind], least, n_new, manner, hparams["n_ctx"])
            right = []
            for row in rows:
                logits = gpt2(row[:-1], **params, n_head=hparams["n_head"])[-n_new:]
                right.append(np.array_equal(np.argmax(logits, axis=-1), row[-n_new:]))
                bar.update()
            if right:
                counts[f"{name}, {n_new} tokens"] = sum(right), len(right)
        bar.total = bar.n  # a short text has fewer places to ask about
    if sum(right for right, _ in counts.values()) < sum(asked for _, asked in counts.values()) / 10:
        return f"{model_dir} does not know this text by heart; training with more --steps may help."
    return "The text goes on word for word after\n" + "\n".join(
        f"  {name}: {right} of {asked}" for name, (right, asked) in counts.items()
    )


def questions(prompts, places, least, n_new, manner, n_ctx):
    """Yield random prompts, each with the `n_new` ids of the text that follow."""
    text, encode, asked = prompts.text, prompts.encoder.encode, 0
    whole = text if manner is None else prompts.typed(0, len(text), manner)[0]
    for i in np.random.default_rng(0).permutation(len(places)):
        start, end = places[i]
        if end is None:  # the fewest words that have enough tokens
            ends = (word.end() for word in regex.finditer(r"\S+", text, pos=start))
            end = next((end for end in ends if len(encode(text[start:end])) >= least), len(text))
        words = text[start:end]
        if manner is not None:
            words, end = prompts.typed(start, end, manner)
        prompt, n_past = encode(words), prompts.n_ids[end]
        following = prompts.ids[n_past : n_past + n_new].tolist()
        fits = len(prompt) >= least and len(following) == n_new and len(prompt) + n_new <= n_ctx
        if fits and whole.count(words) == 1:
            yield prompt + following
            asked += 1
        if asked == ASKED:
            break


if __name__ == "__main__":
    command_line(main)
