"""Measure this repository beside Hugging Face's transformers, in turns, in one run.

    python tests/benchmark.py

Both have the sizes of 124M and random weights, in float32, and are greedy. Every token needs every
weight once. So the limit is the read speed of the memory, measured in the same run, divided by the
weights' size. Run it on a quiet machine. It starts the busy program of the last figure itself.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib import metadata, util
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from safetensors.numpy import save_file

from command import command_line
from encoder import bytes_to_unicode
from gpt2 import stream
from utils import build_params, huggingface_name, load_encoder_hparams_and_params

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"n_embd": 768, "n_head": 12, "n_layer": 12}
FIGURES = {  # the tokens of the prompt, and how many steps after the first one are timed
    "tokens/s after a short prompt": (8, 40),
    "tokens/s after 900 tokens": (900, 40),
    "seconds to the first token after 512": (512, 0),
}


def main(rounds=5):
    """Print the speed as medians of all rounds.

    Args:
        rounds: how often each figure is measured
    """
    has_both = util.find_spec("torch") and util.find_spec("transformers")
    names = ["gpt2.py", "transformers"] if has_both else ["gpt2.py"]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder, "random"))
        size = Path(folder, "random", "model.safetensors").stat().st_size
        systems = {name: worker(name, folder) for name in names}
        memory, limits, seen = worker(), [], defaultdict(list)
        for _ in range(int(rounds)):
            limits.append(memory.submit(read_speed).result() / size)
            for figure, name in product(FIGURES, names):
                seen[figure, name].append(systems[name].submit(timed, *FIGURES[figure]).result())
        for pool in (memory, *systems.values()):
            pool.shutdown()
        seconds = median(command(folder) for _ in range(int(rounds)))
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
            beside = median(command(folder) for _ in range(int(rounds)))
            busy.kill()

    lines = [f"| | {' | '.join(names)} | share of the limit |", "| --- " * (2 + len(names)) + "|"]
    for figure, (_, n_steps) in FIGURES.items():
        shares = np.divide(seen[figure, names[0]], limits)  # in each round: machines change speed
        cells = [f"{median(seen[figure, name]):.3g}" for name in names]
        cells.append(f"{median(shares):.2f}" if n_steps else "")
        lines.append(f"| {' | '.join([figure, *cells])} |")
    empty = " |" * len(names)
    lines.append(f"| seconds for the command with 40 tokens | {seconds:.2f} |{empty}")
    lines.append(f"| the same beside one busy program | {beside:.2f} |{empty}")
    packages = [name for name in ("numpy", "torch", "transformers") if util.find_spec(name)]
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    versions += [f"Python {platform.python_version()}", f"{os.cpu_count()} processors"]
    lines += ["", f"{rounds} rounds, {platform.machine()}, {', '.join(versions)}"]
    return "\n".join(lines)


def worker(*system):
    """Start one process that holds one system, so that none disturbs the threads of another."""
    return ProcessPoolExecutor(1, get_context("spawn"), start if system else None, system)


def start(name, folder):
    """Load a system into this process."""
    global decode
    decode = transformers() if name == "transformers" else ours(folder)


def ours(folder):
    _, hparams, params = load_encoder_hparams_and_params("random", folder)
    return lambda ids, n: stream(ids, params, hparams["n_head"], n_tokens_to_generate=n)


def transformers():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**SIZES)).eval()

    @torch.inference_mode()
    def decode(ids, n):
        ids, past = torch.tensor([ids]), None
        for _ in range(n):
            output = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids, past = output.logits.argmax(-1), output.past_key_values
            yield ids

    return decode


def timed(n_prompt, n_steps):
    """Return tokens per second of the steps after the first, or the seconds of the first alone."""
    time.sleep(1)  # until the threads of the system before have gone to sleep
    list(decode(list(range(8)), 40))  # and those of this one are awake
    begin = time.perf_counter()
    first, *ends = [time.perf_counter() for _ in decode(list(range(n_prompt)), 1 + n_steps)]
    return n_steps / (ends[-1] - first) if n_steps else first - begin


def read_speed():
    """Return the bytes per second at which all processors together read memory, for a second."""
    time.sleep(1)
    parts = np.array_split(np.ones(1 << 27, np.float32), os.cpu_count())
    with ThreadPoolExecutor(len(parts)) as threads:
        begin, n_bytes = time.perf_counter(), 0
        while time.perf_counter() < begin + 1:
            list(threads.map(np.max, parts))
            n_bytes += sum(part.nbytes for part in parts)
        return n_bytes / (time.perf_counter() - begin)


def command(folder):
    """Return the seconds of `python gpt2.py x` with the model in a folder."""
    begin = time.perf_counter()
    words = [sys.executable, "gpt2.py", "x", "--model_size", "random", "--models_dir", folder]
    subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def write_model(folder):
    """Write random weights, and a vocabulary of GPT-2's size, in Hugging Face's layout."""
    tensors, random = {}, np.random.default_rng(0)

    def leaf(name, *shape):
        tensors[huggingface_name(name)] = random.standard_normal(shape, np.float32) / 50

    build_params({"n_vocab": 50257, "n_ctx": 1024} | SIZES, leaf)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SIZES))
    characters = list(bytes_to_unicode().values())
    merges = list(islice(product(characters, repeat=2), 50000))
    tokens = [*characters, *map("".join, merges), "<|endoftext|>"]
    ids = {token: id for id, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids), "utf-8")
    (folder / "merges.txt").write_text("\n".join(map(" ".join, merges)), "utf-8")


if __name__ == "__main__":
    command_line(main)
