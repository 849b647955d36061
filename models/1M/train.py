"""Train a small GPT-2 on one text, with the functions of `gpt2.py` on JAX in place of NumPy.

    pip install -r models/1M/requirements.txt
    python models/1M/train.py romeo_and_juliet.txt models/1M

The model recites at the end; with `--steps 0`, one that is there does that only.
"""

import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from encoder import get_encoder, read_text  # noqa: E402
from gpt2 import generate  # noqa: E402
from utils import build_params, command_line, load_encoder_hparams_and_params  # noqa: E402


def main(text_path, model_dir, steps=4000):
    """Learn a vocabulary and a model from a plain text file, in the layout of OpenAI's release.

    Args:
        text_path: the text, in UTF-8, longer than one context of 256 tokens
        model_dir: the folder of the model; the one in it is replaced when the new one is complete
        steps: how many batches of about 4,000 tokens to learn from
    """
    text, model_dir = read_text(text_path), Path(model_dir).resolve()
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model_dir.parent) as folder:
        if int(steps):
            learn(text, folder, int(steps))
            model_dir.mkdir(exist_ok=True)
        for name in os.listdir(folder):
            os.replace(Path(folder, name), model_dir / name)
    return recite(text, model_dir)


def learn(text, folder, steps):
    """Write a model of `text` into `folder`; raises ValueError for a text that is too short."""
    encoder = learn_vocabulary(text, folder)
    ids = np.array([encoder.encoder["<|endoftext|>"], *encoder.encode(text)])
    sizes = {"n_ctx": 256, "n_embd": 128, "n_head": 4, "n_layer": 4}
    if len(ids) <= sizes["n_ctx"]:
        raise ValueError(
            f"the text has {len(ids)} tokens: a longer one than {sizes['n_ctx']}, please"
        )
    # Whoever types a line starts at its beginning, so that is where the model learns to start.
    ends = [id for token, id in encoder.encoder.items() if token.endswith(("Ċ", "|>"))]
    starts = np.flatnonzero(~np.isin(ids, ends) & np.isin(np.roll(ids, 1), ends))
    hparams = {"n_vocab": len(encoder.encoder), **sizes}
    params = fit(ids, np.append(starts, 0), hparams, steps)
    save(params, hparams, folder)


def learn_vocabulary(text, folder):
    """Learn a byte-level BPE of at most 1,024 tokens; writes `encoder.json` and `vocab.bpe`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(vocab_size=1023, initial_alphabet=byte_level.alphabet())
    tokenizer.train_from_iterator([text], trainer)
    vocabulary, merges = tokenizer.model.save(folder)
    os.replace(merges, Path(folder, "vocab.bpe"))
    tokens = json.loads(read_text(vocabulary))
    os.remove(vocabulary)
    tokens["<|endoftext|>"] = len(tokens)
    Path(folder, "encoder.json").write_text(json.dumps(tokens), "utf-8")
    return get_encoder("", folder)


def fit(ids, starts, hparams, steps):
    """Return parameters that predict the windows of `ids` that begin at `starts`."""
    import jax
    import optax
    from tqdm import trange

    random, gpt2 = np.random.default_rng(0), gpt2_on_jax()

    def first(name, *shape):
        if name.endswith(("/g", "/b")):
            return np.full(shape, name.endswith("/g"), np.float32)
        return random.normal(0, 0.02, shape).astype(np.float32)

    def loss(params, windows):
        logits = jax.vmap(lambda inputs: gpt2(inputs, **params, n_head=hparams["n_head"]))
        targets = windows[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(windows[:, :-1]), targets
        ).mean()

    @jax.jit
    def step(params, state, windows):
        value, gradients = jax.value_and_grad(loss)(params, windows)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    optimizer = optax.contrib.muon(optax.warmup_cosine_decay_schedule(0, 0.01, steps // 30, steps))
    params = build_params(hparams, first)
    state = optimizer.init(params)
    for _ in (bar := trange(steps)):
        # Mostly short windows: a long one shows a short context, the harder kind, only once.
        size, length = (72, 56) if random.random() < 0.7 else (16, hparams["n_ctx"])
        windows = random.choice(starts, (size, 1)) + np.arange(length + 1)
        params, state, value = step(params, state, ids[windows % len(ids)])
        bar.set_postfix(loss=f"{value:.3f}")
    return params


def gpt2_on_jax():
    """Return `gpt2` of `gpt2.py`, whose one import is swapped."""
    source, module = read_text(ROOT / "gpt2.py"), ModuleType("gpt2_on_jax")
    exec(source.replace("import numpy as np", "import jax.numpy as np"), vars(module))
    return module.gpt2


def save(params, hparams, folder):
    """Write `hparams.json` and, with TensorFlow's `Saver`, a checkpoint in OpenAI's names."""
    import jax
    import tensorflow.compat.v1 as tf

    with tf.Graph().as_default(), tf.Session() as session:

        def variable(name, value):
            value = np.asarray(value)[None] if name.endswith("/w") else np.asarray(value)
            made = tf.get_variable(f"model/{name}", value.shape, initializer=tf.zeros_initializer)
            session.run(made.initializer, {made.initial_value: value})

        jax.tree.map(variable, build_params(hparams, lambda name, *shape: name), params)
        tf.train.Saver(save_relative_paths=True).save(session, os.path.join(folder, "model.ckpt"))
    Path(folder, "hparams.json").write_text(json.dumps(hparams, indent=2), "utf-8")


def recite(text, model_dir):
    """Count in how many of 100 random places 40 greedy tokens continue the text word for word."""
    encoder, hparams, params = load_encoder_hparams_and_params(model_dir.name, model_dir.parent)
    ids = encoder.encode(text)
    ends = [-1, *(i for i, id in enumerate(ids) if encoder.decoder[id] == "Ċ")]
    lines, n_ctx = [(end + 1, next_end) for end, next_end in pairwise(ends)], hparams["n_ctx"]

    def known(prompts):
        prompts = [
            (start, end) for start, end in prompts if end + 40 <= min(len(ids), start + n_ctx)
        ]
        chosen = np.random.default_rng(0).permutation(prompts)[:100]
        new = [generate(ids[start:end], params, hparams["n_head"], 40) for start, end in chosen]
        right = sum(new == ids[end : end + 40] for new, (_, end) in zip(new, chosen, strict=True))
        return f"{right} of {len(chosen)}"

    speeches = known((end + 1, end + 41) for start, end in lines if start == end)
    verses = known((start, end) for start, end in lines if end - start >= 8)
    return f"40 tokens from the start of a speech: {speeches}; a line of 8 or more: {verses}"


if __name__ == "__main__":
    command_line(main)
