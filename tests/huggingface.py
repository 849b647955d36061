"""Record the logits of Hugging Face's GPT-2 for small random models, as truth for test_gpt2.py.

    pip install torch transformers
    python tests/huggingface.py

It writes `huggingface.npz`, so that running the tests asks for neither of the two. What is there
now comes from transformers 5.23 on PyTorch 2.13, CPU, float32.
"""

import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import build_params

RECORDED = Path(__file__).with_suffix(".npz")
FIELDS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
MODELS = [  # the five fields, and how many tokens go in
    (17, 8, 4, 1, 1, 1),
    (50, 16, 10, 5, 4, 1),
    (40, 16, 12, 3, 2, 16),
    (97, 32, 32, 4, 3, 20),
    (64, 64, 48, 12, 2, 64),
    (128, 40, 24, 2, 6, 39),
]


def random_model(*fields, n_seq):
    """Return hparams, parameters, the same by name, and ids, all the same on every machine."""
    hparams = dict(zip(FIELDS, fields, strict=True))
    random, by_name = np.random.RandomState(sum(fields)), {}  # this generator's stream is frozen

    def leaf(name, *shape):
        by_name[name] = random.normal(name.endswith("/g"), 0.2, shape).astype(np.float32)
        return by_name[name]

    params = build_params(hparams, leaf)
    return hparams, params, by_name, random.randint(hparams["n_vocab"], size=n_seq)


def logits(hparams, by_name, ids):
    """Let Hugging Face compute `[n_seq, n_vocab]`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": hparams["n_vocab"], "n_positions": hparams["n_ctx"]}
    model = GPT2LMHeadModel(GPT2Config(**hparams, **sizes)).eval()
    state = {}
    for name, tensor in by_name.items():  # h0/ln_1/g is transformer.h.0.ln_1.weight there
        *path, last = re.sub(r"^h(\d+)", r"h/\1", name).split("/")
        last = {"g": "weight", "w": "weight", "b": "bias"}.get(last, f"{last}.weight")
        state[".".join(["transformer", *path, last])] = torch.tensor(tensor)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0].numpy()


if __name__ == "__main__":
    recorded = {}
    for *fields, n_seq in MODELS:
        hparams, _, by_name, ids = random_model(*fields, n_seq=n_seq)
        recorded[str((*fields, n_seq))] = logits(hparams, by_name, ids)
    np.savez_compressed(RECORDED, **recorded)
