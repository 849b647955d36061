"""Record what Hugging Face's GPT-2 computes and writes, as truth for the tests.

    pip install torch transformers
    python tests/huggingface.py

It writes `huggingface.npz`, logits of small random models and the probabilities that sampling
leaves, and `huggingface.json`, the folder that `save_pretrained` makes of one of these models and
the texts of the bundled one; so running the tests asks for neither of the two. After the bundled
model is trained anew, run it again. What is there now comes from transformers 5.23 on PyTorch 2.13,
CPU, float32.
"""

import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import build_params

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "1M"
RECORDED = Path(__file__).with_suffix(".npz")
WRITTEN = Path(__file__).with_suffix(".json")
FIELDS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
SAVED = (300, 16, 12, 3, 2, 16)  # the model whose folder is recorded: it has room for 256 bytes
MODELS = [  # the five fields, and how many tokens go in
    (17, 8, 4, 1, 1, 1),
    (50, 16, 10, 5, 4, 1),
    (40, 16, 12, 3, 2, 16),
    (97, 32, 32, 4, 3, 20),
    (64, 64, 48, 12, 2, 64),
    (128, 40, 24, 2, 6, 39),
    SAVED,
]
WARPS = [  # temperature, top_k (None for all) and top_p
    (1.0, None, 1.0),
    (0.7, None, 1.0),
    (2.5, None, 1.0),
    (1.0, 1, 1.0),
    (1.0, 5, 1.0),
    (1.0, 1000, 1.0),
    (1.0, None, 0.9),
    (1.0, None, 0.3),
    (1.0, None, 0.0),
    (0.8, 40, 0.95),
    (1.5, 10, 0.5),
    (0.1, 3, 0.99),
]
PROMPTS = [
    "But, soft! what light through yonder window breaks?",
    "O Romeo, Romeo! wherefore art thou Romeo?",
    "JULIET:\nWhat's in a name?",
    "ROMEO:",
    "The",
    "café 日本 42",
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


def in_hugging_faces_names(by_name):
    """Rename the parameters: h0/ln_1/g is transformer.h.0.ln_1.weight there."""
    renamed = {}
    for name, tensor in by_name.items():
        *path, last = re.sub(r"^h(\d+)", r"h/\1", name).split("/")
        last = {"g": "weight", "w": "weight", "b": "bias"}.get(last, f"{last}.weight")
        renamed[".".join(["transformer", *path, last])] = tensor
    return renamed


def load(hparams, by_name):
    """Let Hugging Face open the model."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": hparams["n_vocab"], "n_positions": hparams["n_ctx"]}
    model = GPT2LMHeadModel(GPT2Config(**hparams, **sizes)).eval()
    state = {name: torch.tensor(v) for name, v in in_hugging_faces_names(by_name).items()}
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return model


def logits(model, ids):
    """Let Hugging Face compute `[n_seq, n_vocab]`."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0].numpy()


def warped(scores, temperature, top_k, top_p):
    """Let Hugging Face turn logits `[n, n_vocab]` into the probabilities that it draws by."""
    import torch
    from transformers import generation

    scores = generation.TemperatureLogitsWarper(temperature)(None, torch.tensor(scores))
    if top_k is not None:
        scores = generation.TopKLogitsWarper(top_k)(None, scores)
    return generation.TopPLogitsWarper(top_p)(None, scores).softmax(-1).numpy()


def saved(model):
    """Return the `config.json` and the names of the weights that `save_pretrained` writes."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        weights = load_file(Path(folder, "model.safetensors"))
    return {"config": config, "weights": sorted(weights)}


def texts(folder):
    """Let Hugging Face open a folder, and go on from each prompt with 40 greedy tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    model.generation_config.eos_token_id = None  # `generate` does not end there either
    written = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0)[0]
        new = ids[inputs["input_ids"].shape[1] :]
        written[prompt] = tokenizer.decode(new, clean_up_tokenization_spaces=False)
    return written


def sha256_of_the_bundled_weights():
    return hashlib.sha256((BUNDLED / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    recorded = {}
    for *fields, n_seq in MODELS:
        hparams, _, by_name, ids = random_model(*fields, n_seq=n_seq)
        model = load(hparams, by_name)
        recorded[str((*fields, n_seq))] = logits(model, ids)
        if (*fields, n_seq) == SAVED:
            folder = saved(model)
    scores = np.random.RandomState(0).normal(0, 3, (3, 50)).astype(np.float32)
    recorded["warped from"] = scores
    recorded |= {f"warped {warp}": warped(scores, *warp) for warp in WARPS}
    np.savez_compressed(RECORDED, **recorded)
    texts_of_1m = {"texts": texts(BUNDLED), "of weights": sha256_of_the_bundled_weights()}
    written = json.dumps(folder | texts_of_1m, indent=1, ensure_ascii=False)
    WRITTEN.write_text(written + "\n", "utf-8")
