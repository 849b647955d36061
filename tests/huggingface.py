"""Record what Hugging Face's GPT-2 computes and writes, as truth for the tests.

    pip install torch transformers
    python tests/huggingface.py

Running the tests asks for neither of the two. The script writes:

    huggingface.npz   the logits of small random models, and the probabilities that sampling leaves
    huggingface.json  one of them as `save_pretrained` writes it, and texts of the bundled model
    checkpoint/       the same one in OpenAI's layout, as TensorFlow's Saver writes it

After the bundled model is trained anew, run it again. What is there now comes from transformers
5.24 on PyTorch 2.13, CPU, float32, and from TensorFlow 2.21.
"""

import json
import shutil
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import write_vocabulary

from utils import HPARAMS, build_params, huggingface_name

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "1M"
RECORDED = Path(__file__).with_suffix(".npz")
WRITTEN = Path(__file__).with_suffix(".json")
CHECKPOINT = Path(__file__).with_name("checkpoint")
SAVED = (300, 16, 12, 3, 2, 16)  # the model whose folder is recorded: it has room for 256 bytes
# The five sizes of each model, and how many tokens go in.
MODELS = [(17, 8, 4, 1, 1, 1), (50, 16, 10, 5, 4, 1), (40, 16, 12, 3, 2, 16)]
MODELS += [(97, 32, 32, 4, 3, 20), (64, 64, 48, 12, 2, 64), (128, 40, 24, 2, 6, 39), SAVED]
# Temperature, top_k (None for all) and top_p.
WARPS = [(1.0, None, 1.0), (0.7, None, 1.0), (2.5, None, 1.0), (1.0, 1, 1.0), (1.0, 5, 1.0)]
WARPS += [(1.0, 1000, 1.0), (1.0, None, 0.9), (1.0, None, 0.3), (1.0, None, 0.0)]
WARPS += [(0.8, 40, 0.95), (1.5, 10, 0.5), (0.1, 3, 0.99)]
PROMPTS = ["But, soft! what light through yonder window breaks?", "JULIET:\nWhat's in a name?", ""]
PROMPTS += ["O Romeo, Romeo! wherefore art thou Romeo?", "ROMEO:", "The", "café 日本 42"]
NEWLINE, COMMA, COLON, NO_TOKEN = 198, 11, 25, 50256  # ids in the bundled model, but for the last
ENDS = [  # other fields of the bundled model
    {"config.json": {"eos_token_id": COMMA, "bos_token_id": COLON}},
    {"config.json": {"eos_token_id": [COLON, NEWLINE]}},
    {"generation_config.json": {"eos_token_id": COMMA, "bos_token_id": 1023}},
    {"generation_config.json": {"eos_token_id": [COLON, NO_TOKEN], "bos_token_id": 1023}},
]
TEXT = PROMPTS[0] + "\nIt is the east, and Juliet is the sun."


def random_model(*sizes):
    """Return hparams, parameters, the same by name, and ids, all the same on every machine."""
    *fields, n_seq = sizes
    hparams = dict(zip(HPARAMS, fields, strict=True))
    random, by_name = np.random.RandomState(sum(fields)), {}  # this generator's stream is frozen

    def leaf(name, *shape):
        by_name[name] = random.normal(name.endswith("/g"), 0.2, shape).astype(np.float32)
        return by_name[name]

    params = build_params(hparams, leaf)
    return hparams, params, by_name, random.randint(hparams["n_vocab"], size=n_seq)


def in_hugging_faces_names(by_name):
    """Rename the parameters: h0/ln_1/g is transformer.h.0.ln_1.weight there."""
    return {f"transformer.{huggingface_name(name)}": tensor for name, tensor in by_name.items()}


def save(folder, by_name, step=None, sharded=False):
    """Let TensorFlow save parameters: after a step of training, or in two files."""
    import tensorflow.compat.v1 as tf

    options = tf.ConfigProto(device_count={"CPU": 2})
    with tf.Graph().as_default(), tf.Session(config=options) as session:
        for i, (name, tensor) in enumerate(by_name.items()):
            tensor = tensor[None] if name.endswith("/w") else tensor  # as in OpenAI's files
            with tf.device(f"/cpu:{i % 2 if sharded else 0}"):
                tf.get_variable(f"model/{name}", initializer=tensor)
        step = step(tf) if step else tf.no_op()
        session.run(tf.global_variables_initializer())
        session.run(step)
        saver = tf.train.Saver(sharded=sharded, save_relative_paths=True)
        saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)


def load(hparams, by_name):
    """Let Hugging Face open the model."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": hparams["n_vocab"], "n_positions": hparams["n_ctx"]}
    model = GPT2LMHeadModel(GPT2Config(**hparams, **sizes)).eval()
    state = {name: torch.tensor(v) for name, v in in_hugging_faces_names(by_name).items()}
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return model


def warped(scores, temperature, top_k, top_p):
    """Let Hugging Face turn logits `[n, n_vocab]` into the probabilities that it draws by."""
    import torch
    from transformers import generation

    scores = generation.TemperatureLogitsWarper(temperature)(None, torch.tensor(scores))
    if top_k is not None:
        scores = generation.TopKLogitsWarper(top_k)(None, scores)
    return generation.TopPLogitsWarper(top_p)(None, scores).softmax(-1).numpy()


def texts(folder):
    """Return how Hugging Face goes on from each prompt, and the perplexity of `TEXT`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends, written = model.generation_config.eos_token_id, {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt") if prompt else {}
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0)[0]
        new = ids[inputs["input_ids"].shape[1] if prompt else 1 :].tolist()
        new = new[:-1] if new[-1] in (ends if isinstance(ends, list) else [ends]) else new
        written[prompt] = tokenizer.decode(new, clean_up_tokenization_spaces=False)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    return written, model(ids, labels=ids).loss.exp().item()  # the perplexity, of the mean loss


def with_fields(folder, files):
    """Copy the bundled model into a folder, with these fields in its files of JSON."""
    shutil.copytree(BUNDLED, folder, dirs_exist_ok=True)
    for path, fields in ((Path(folder, name), fields) for name, fields in files.items()):
        old = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps(old | fields), "utf-8")
    return Path(folder)


if __name__ == "__main__":
    import torch
    from safetensors.numpy import load_file

    recorded = {}
    for sizes in MODELS:
        hparams, _, by_name, ids = random_model(*sizes)
        model = load(hparams, by_name)
        recorded[str(sizes)] = model(torch.tensor(ids)[None]).logits[0].detach().numpy()
    scores = np.random.RandomState(0).normal(0, 3, (3, 50)).astype(np.float32)
    recorded["warped from"] = scores
    recorded |= {f"warped {warp}": warped(scores, *warp) for warp in WARPS}
    np.savez_compressed(RECORDED, **recorded)

    CHECKPOINT.mkdir(exist_ok=True)  # of the last model, which is `SAVED`
    save(CHECKPOINT, by_name)
    (CHECKPOINT / "model.ckpt.index").unlink()  # which `utils.py` does not need
    write_vocabulary(CHECKPOINT)
    (CHECKPOINT / "hparams.json").write_text(json.dumps(hparams), "utf-8")

    written = {"ends": []}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        written["config"] = json.loads(Path(folder, "config.json").read_text("utf-8"))
        written["weights"] = sorted(load_file(Path(folder, "model.safetensors")))
    written["texts"], written["perplexity"] = texts(BUNDLED)
    for files in ENDS:
        with tempfile.TemporaryDirectory() as folder:
            written["ends"].append(texts(with_fields(folder, files))[0])
    written["of weights"] = sha256((BUNDLED / "model.safetensors").read_bytes()).hexdigest()
    WRITTEN.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", "utf-8")
