"""What the tests share: the models, the command, and checkpoints by TensorFlow itself."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import utils
from encoder import bytes_to_unicode

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "1M"
PAIRS = "Ġt Ġa he in re on er ou nd Ġs Ġw is or at en it es Ġb ll Ġm st me an Ġh ar le to Ġc ve Ġd"
PAIRS += " ng al Ġf ed Ġo Ġp th ha Ġy Ro"
MERGES = [*map(tuple, PAIRS.split()), ("Ġt", "he"), ("Ro", "me"), ("Rome", "o")]
TOKENS = [*bytes_to_unicode().values(), *map("".join, MERGES), "<|endoftext|>"]  # 300
SIZES = {"n_vocab": len(TOKENS), "n_ctx": 24, "n_embd": 96, "n_head": 3, "n_layer": 4}
# JAX simulates eight devices on one processor. It reads this once, when it is first used.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="session")
def bundled():
    """The bundled model's encoder, hparams and parameters."""
    return utils.load_encoder_hparams_and_params("1M", str(ROOT / "models"))


@pytest.fixture(scope="session")
def openai(tmp_path_factory):
    """A folder in OpenAI's layout, with weights of almost two megabytes."""
    folder = tmp_path_factory.mktemp("models") / "openai"
    folder.mkdir()
    write_vocabulary(folder)
    write_checkpoint(folder, **SIZES)
    return folder


@pytest.fixture(scope="session")
def train():
    """`examples/train.py` as a module."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "examples" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def models_dir(tmp_path, openai):
    """A models_dir with a copy of that folder under the name `mine`."""
    shutil.copytree(openai, tmp_path / "models" / "mine")
    return tmp_path / "models"


@pytest.fixture
def run():
    """Run `python gpt2.py` with these arguments, and these environment variables besides."""

    def run(*args, code=("gpt2.py",), encoding="utf-8", **env):
        return subprocess.run(
            [sys.executable, *code, *map(str, args)],
            cwd=ROOT,
            env=os.environ | env,
            capture_output=True,
            encoding=encoding,
            timeout=120,
        )

    return run


def write_vocabulary(folder, tokens="encoder.json", merges="vocab.bpe"):
    """Write `TOKENS` and `MERGES` as two files, as OpenAI did."""
    ids = json.dumps({token: id for id, token in enumerate(TOKENS)})
    (folder / tokens).write_text(ids, "utf-8")
    lines = ["#version: 0.2", *map(" ".join, MERGES), ""]
    (folder / merges).write_bytes("\n".join(lines).encode())


def write_checkpoint(folder, n_vocab, n_ctx, n_embd, n_head, n_layer, seed=0):
    """Write random weights by TensorFlow's `Saver`, in OpenAI's names and shapes; returns them."""
    why = "TensorFlow, which writes OpenAI's checkpoints, has no wheel for this Python"
    tf = pytest.importorskip("tensorflow", reason=why).compat.v1

    dense = {"attn/c_attn": (1, 3), "attn/c_proj": (1, 1), "mlp/c_fc": (1, 4), "mlp/c_proj": (4, 1)}
    shapes = {"wte": (n_vocab, n_embd), "wpe": (n_ctx, n_embd)}
    shapes |= {"ln_f/g": (n_embd,), "ln_f/b": (n_embd,)}
    for i in range(n_layer):
        shapes |= {f"h{i}/{ln}/{p}": (n_embd,) for ln in ("ln_1", "ln_2") for p in "gb"}
        for name, (n_in, n_out) in dense.items():
            shapes[f"h{i}/{name}/w"] = (1, n_in * n_embd, n_out * n_embd)
            shapes[f"h{i}/{name}/b"] = (n_out * n_embd,)
    random, tensors = np.random.default_rng(seed), {}
    with tf.Graph().as_default(), tf.Session() as session:
        for name, shape in shapes.items():
            tensor = random.standard_normal(shape, np.float32) / 5 + name.endswith("/g")
            variable = tf.get_variable(f"model/{name}", shape, initializer=tf.zeros_initializer)
            session.run(variable.initializer, {variable.initial_value: tensor})
            tensors[f"model/{name}"] = tensor
        tf.train.Saver(save_relative_paths=True).save(session, str(folder / "model.ckpt"))
    hparams = dict(n_vocab=n_vocab, n_ctx=n_ctx, n_embd=n_embd, n_head=n_head, n_layer=n_layer)
    (folder / "hparams.json").write_text(json.dumps(hparams))
    return tensors
