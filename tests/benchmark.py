"""Measure this repository beside Hugging Face's transformers, in turns, in one run.

    python tests/benchmark.py

Decoding is greedy, in float32, with one prompt at a time. Every token needs every weight once. So
the limit is the read speed of the memory, measured in the same run, divided by the weights' size.
Run it on a quiet machine. Only the last row is measured beside a program that keeps one processor
busy, which the benchmark starts itself.
"""

import collections
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
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
from utils import build_params, huggingface_name, load_encoder_hparams_and_params

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # n_embd, n_head, n_layer of OpenAI's release
    "124M": (768, 12, 12),
    "355M": (1024, 16, 24),
    "774M": (1280, 20, 36),
    "1558M": (1600, 25, 48),
}
FIGURES = {  # the tokens of the prompt, and how many steps after the first one are timed
    "tokens/s, short prompt": (8, 40),
    "tokens/s after 900 tokens": (900, 40),
    "s to the first token after 512": (512, 0),
}


def main(model_size="124M", models_dir=None, rounds=5):
    """Print speed and memory as medians of all rounds.

    Args:
        model_size: 124M, 355M, 774M or 1558M
        models_dir: the folder of that model; without it, random weights are used
        rounds: how often each figure is measured
    """
    with tempfile.TemporaryDirectory() as folder:
        if models_dir is None:
            models_dir = folder
            with worker() as writer:  # whose memory is not counted as that of the commands below
                writer.submit(write_model, Path(folder, model_size), *SIZES[model_size]).result()
        return table(model_size, models_dir, int(rounds))


def table(model_size, models_dir, rounds):
    """Take all systems in turn, and return the figures in Markdown."""
    has_both = util.find_spec("torch") and util.find_spec("transformers")
    names = ["this repository", "transformers"] if has_both else ["this repository"]
    systems = {name: worker(name, model_size, models_dir) for name in names}
    size = max(path.stat().st_size for path in Path(models_dir, model_size).glob("model*.*"))
    memory, limits, seen = worker(), [], collections.defaultdict(list)
    for _ in range(rounds):
        limits.append(memory.submit(read_speed).result() / size)
        for figure, name in product(FIGURES, names):
            seen[figure, name].append(systems[name].submit(timed, *FIGURES[figure]).result())
    for pool in (memory, *systems.values()):
        pool.shutdown()

    lines = [f"| | {' | '.join(names)} | of the limit |", "| --- " * (2 + len(names)) + "|"]
    for figure, (_, n_steps) in FIGURES.items():
        shares = np.divide(seen[figure, names[0]], limits)  # in each round: machines change speed
        cells = [f"{median(seen[figure, name]):.3g}" for name in names]
        lines.append(f"| {' | '.join([figure, *cells, f'{median(shares):.2f}' * bool(n_steps)])} |")
    lines += ["", f"- the limit: {median(limits):.3g} tokens/s"]
    words = ["gpt2.py", "x", "--model_size", model_size, "--models_dir", models_dir]
    seconds, peak = map(median, zip(*(command(*words) for _ in range(rounds)), strict=True))
    lines.append(f"- the command, for 40 tokens: {seconds:.2f} s, peak memory {peak:.0f} MB")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        seconds = median(command(*words)[0] for _ in range(rounds))
        busy.kill()
    lines.append(f"- the same, beside a program that keeps one processor busy: {seconds:.2f} s")
    packages = [name for name in ("numpy", "torch", "transformers") if util.find_spec(name)]
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    versions += [f"Python {platform.python_version()}", f"{os.cpu_count()} processors"]
    lines.append(f"- the weights: {size / 1e6:.0f} MB; {rounds} rounds")
    return "\n".join([*lines, f"- {platform.machine()}, {', '.join(versions)}"])


def worker(*system):
    """Start one process that holds one system, so that none disturbs the threads of another."""
    return ProcessPoolExecutor(1, get_context("spawn"), start if system else None, system)


def start(name, model_size, models_dir):
    """Load a system into this process."""
    global decode
    decode = transformers(model_size) if name == "transformers" else ours(model_size, models_dir)


def ours(model_size, models_dir):
    from gpt2 import stream

    _, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    return lambda ids, n: stream(ids, params, hparams["n_head"], n_tokens_to_generate=n)


def transformers(model_size):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(zip(("n_embd", "n_head", "n_layer"), SIZES[model_size], strict=True))
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()

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


def command(*arguments):
    """Run Python from the root; returns its seconds and its peak memory in MB."""
    begin = time.perf_counter()
    words = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise OSError(f"{arguments} failed")
    # In kilobytes, but on macOS in bytes.
    return time.perf_counter() - begin, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def write_model(folder, n_embd, n_head, n_layer):
    """Write random weights, and a vocabulary of GPT-2's size, in Hugging Face's layout."""
    config = {"n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    tensors, random = {}, np.random.default_rng(0)

    def leaf(name, *shape):
        tensors[huggingface_name(name)] = random.standard_normal(shape, np.float32) / 50

    build_params({"n_vocab": 50257, "n_ctx": 1024} | config, leaf)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    characters = list(bytes_to_unicode().values())
    merges = list(islice(product(characters, repeat=2), 50000))
    tokens = [*characters, *map("".join, merges), "<|endoftext|>"]
    ids = {token: id for id, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids), "utf-8")
    (folder / "merges.txt").write_text("\n".join(map(" ".join, merges)), "utf-8")


if __name__ == "__main__":
    command_line(main)
