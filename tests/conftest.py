"""What the tests share: the bundled model, the command, and a small vocabulary."""

import os

# The models of the tests are so small that more threads only cost. NumPy reads this when it is
# imported, and so do the processes that the tests start.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from encoder import bytes_to_unicode

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "1M"
COMMITTED = ROOT / "tests" / "checkpoint"  # a small model that TensorFlow wrote
PAIRS = "Ġt Ġa he in re on er ou nd Ġs Ġw is or at en it es Ġb ll Ġm st me an Ġh ar le to Ġc ve Ġd"
PAIRS += " ng al Ġf ed Ġo Ġp th ha Ġy Ro"
MERGES = [*map(tuple, PAIRS.split()), ("Ġt", "he"), ("Ro", "me"), ("Rome", "o")]
TOKENS = [*bytes_to_unicode().values(), *map("".join, MERGES), "<|endoftext|>"]  # 300
# JAX simulates eight devices on one processor. It reads this once, when it is first used.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="session")
def train():
    """`examples/train.py` as a module."""
    return importlib.import_module("train")


def run(*args, code=("gpt2.py",), command=None, stdin=b"", **env):
    """Run `python gpt2.py` with these arguments, without any setting of Python by the caller."""
    words = [word if isinstance(word, bytes) else str(word) for word in (*code, *args)]
    env = {k: v for k, v in os.environ.items() if k[:6] != "PYTHON" or k == "PYTHONPATH"} | env
    env = {name: value for name, value in env.items() if value is not None}
    pipes = {"input": stdin, "capture_output": True, "cwd": ROOT, "timeout": 60}
    result = subprocess.run(command or [sys.executable, *words], env=env, **pipes)
    texts = (pipe.decode("utf-8", "replace") for pipe in (result.stdout, result.stderr))
    result.out, result.err = (text.replace(os.linesep, "\n") for text in texts)
    return result


def write_vocabulary(folder, tokens="encoder.json", merges="vocab.bpe"):
    """Write `TOKENS` and `MERGES` as two files, as OpenAI did."""
    ids = json.dumps({token: id for id, token in enumerate(TOKENS)})
    (folder / tokens).write_text(ids, "utf-8")
    lines = ["#version: 0.2", *map(" ".join, MERGES), ""]
    (folder / merges).write_bytes("\n".join(lines).encode())
