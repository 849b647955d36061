"""Loading: what TensorFlow's Saver and Hugging Face's library wrote arrives as it is."""

import errno
import json
import mmap
import os
import shutil
from hashlib import sha256

import huggingface
import jax
import numpy as np
import pytest
from conftest import BUNDLED, COMMITTED, ROOT, TOKENS, run, write_vocabulary
from safetensors.numpy import save_file

from gpt2 import gpt2, main
from utils import DATA, build_params, load_encoder_hparams_and_params

WRITTEN = json.loads(huggingface.WRITTEN.read_text("utf-8"))
# The model whose logits are recorded: as a tree, by OpenAI's names, and by Hugging Face's.
HPARAMS, PARAMS, WEIGHTS, IDS = huggingface.random_model(*huggingface.SAVED)
RENAMED = huggingface.in_hugging_faces_names(WEIGHTS)
WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"


@pytest.fixture
def openai(tmp_path):
    """That model in OpenAI's layout: a copy of the folder that TensorFlow wrote."""
    return shutil.copytree(COMMITTED, tmp_path / "openai")


@pytest.fixture
def saved(tmp_path):
    """That model in Hugging Face's layout, as `save_pretrained` writes it."""
    folder = tmp_path / "saved"
    folder.mkdir()
    edit_json(folder / "config.json", WRITTEN["config"])
    write_vocabulary(folder, "vocab.json", "merges.txt")
    save_file(RENAMED, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_json(path, fields):
    old = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(old | fields), "utf-8")


def edit_header(path, change):
    """Change the header of a file of safetensors. The numbers stay as they are."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = change(content[8:start])
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])


def load(folder):
    return load_encoder_hparams_and_params(folder.name, folder.parent)


def assert_same(params, expected):
    """Compare number for number."""
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, other)


def assert_logits_are_recorded(folder):
    _, hparams, params = load(folder)
    logits = gpt2(IDS, **params, n_head=hparams["n_head"])
    recorded = np.load(huggingface.RECORDED)[str(huggingface.SAVED)]
    np.testing.assert_allclose(logits, recorded[:, : len(TOKENS)], atol=1e-5)


# --- OpenAI's layout ---


def test_a_committed_checkpoint_has_its_weights_and_the_logits_of_hugging_face():
    assert load(COMMITTED)[1] == HPARAMS
    assert_same(load(COMMITTED)[2], PARAMS)
    assert_logits_are_recorded(COMMITTED)


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow", reason="TensorFlow has no wheel for this Python")


def test_what_tensorflow_saves_is_read_as_tensorflow_reads_it(openai, tf):
    """Of twelve layers, h10 and h11 come before h2 in the alphabet, and so in the file."""
    hparams, _, weights, _ = huggingface.random_model(300, 16, 12, 3, 12, 1)
    edit_json(openai / "hparams.json", hparams)
    huggingface.save(openai, weights)
    reader = tf.train.load_checkpoint(str(openai / "model.ckpt"))
    theirs = {name: reader.get_tensor(f"model/{name}") for name in weights}
    params = build_params(hparams, lambda name, *shape: theirs[name].reshape(shape))
    assert_same(load(openai)[2], params)


def adam(tf):
    loss = tf.add_n([tf.reduce_sum(v**2) for v in tf.trainable_variables()])
    return tf.train.AdamOptimizer().minimize(loss)


@pytest.mark.parametrize("change", ["adam", "sharded", "float16"])
def test_a_checkpoint_with_more_or_less_than_the_parameters_is_refused(change, openai, tf):
    n_bytes, weights = (openai / DATA).stat().st_size, WEIGHTS
    if change == "float16":
        weights = {name: weight.astype(np.float16) for name, weight in WEIGHTS.items()}
    for path in openai.glob("model.ckpt.*"):
        path.unlink()
    options = {"adam": {"step": adam}, "sharded": {"sharded": True}}.get(change, {})
    huggingface.save(openai, weights, **options)
    words = rf"has [\d,]+ bytes instead of {n_bytes:,}\." if change != "sharded" else f"no {DATA}"
    with pytest.raises((ValueError, OSError), match=words):
        load(openai)


@pytest.mark.parametrize("name", ["/run1/model-1000", r"C:\\run1\\model-1000", "model-1000"])
def test_a_checkpoint_may_be_named_by_the_folder_it_was_trained_in(name, openai):
    for path in openai.glob("model.ckpt.*"):
        path.rename(path.with_name(path.name.replace("model.ckpt", "model-1000")))
    lines = f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'
    (openai / "checkpoint").write_text(lines)
    assert_logits_are_recorded(openai)


MISFITS = [
    ("n_ctx", 17, rf"{DATA} has 30,336 bytes instead of 30,384"),
    ("n_layer", 3, rf"{DATA} has 30,336 bytes instead of 37,872"),
    ("n_head", 5, "n_embd must be a multiple of n_head"),
    ("n_layer", 0, "hparams.json: n_layer must be a whole number from 1 to 999,999, not 0"),
    ("n_layer", 10**9, "hparams.json: n_layer must be .* to 999,999, not 1000000000"),
]


@pytest.mark.parametrize(("field", "value", "message"), MISFITS)
def test_sizes_that_do_not_fit_the_tensors_are_an_error(field, value, message, openai):
    edit_json(openai / "hparams.json", {field: value})
    with pytest.raises(ValueError, match=message):
        load(openai)


# --- Both layouts ---

HEADERS = ["", "[]", '{"a": 1}', '{"a": {}}', '{"a": {"data_offsets": ["b", 1]}}', "[" * 100_000]
HEADERS += ["\x80" * 10**6, '{"a": {"dtype": "%s", "data_offsets": [0, 1]}}' % ("x" * 10**6)]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
PICKLE = b"\x80\x02}q" + bytes(10**6)


CHANGES = (  # bytes that are added, line ends that are changed, and an end that is missing
    lambda data: data[:-2000] + bytes(4) + data[-2000:],
    lambda data: data[:-9000] + data[-9000:].replace(b"\n", b"\r\n"),
    *(lambda data, n=n: data[:n] for n in (0, 5, -4)),
)
DAMAGED = [
    *(("openai", DATA, change, r"has [\d,]+ bytes instead of [\d,]+\.") for change in CHANGES),
    ("openai", "hparams.json", b"{", "is not a JSON object"),
    ("openai", "hparams.json", b"{}", "n_vocab must be a whole number"),
    ("openai", "checkpoint", b"", "names no checkpoint"),
    ("openai", "checkpoint", b'model_checkpoint_path: "%s"' % (b"x" * 999), "names no checkpoint"),
    *(("saved", "model.safetensors", change, "is damaged or cut off: ") for change in CHANGES),
    *(("saved", "model.safetensors", header, "is damaged or cut off: ") for header in HEADERS),
    *(("saved", "model.safetensors", data, "is damaged.*Git LFS") for data in (POINTER, PICKLE)),
    ("saved", "config.json", b"[]", "is not a JSON object"),
    ("saved", "generation_config.json", b"x", "is not a JSON object"),
]


@pytest.mark.parametrize(("layout", "name", "content", "message"), DAMAGED)
def test_a_damaged_file_is_named_in_a_line(layout, name, content, message, request):
    """The content is changed by a function, or it is other bytes or another header."""
    path = request.getfixturevalue(layout) / name
    if isinstance(content, str):
        edit_header(path, lambda _: content.encode("latin-1"))
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    with pytest.raises(ValueError, match=f"{name}:? {message}") as error:
        load(path.parent)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 200


MISSING = [("openai", name) for name in (DATA, "checkpoint", "hparams.json", "vocab.bpe")]
MISSING += [("saved", name) for name in ("model.safetensors", "merges.txt", "config.json")]


@pytest.mark.parametrize(("layout", "name"), MISSING)
def test_a_missing_file_is_named_with_all_that_a_model_has(layout, name, request):
    folder = request.getfixturevalue(layout)
    (folder / name).unlink()
    words = f"{folder.name} has no {name}. .*model.safetensors.*tokenizer.json.*{DATA}"
    with pytest.raises(FileNotFoundError, match=words) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "no_such", "../no_such", "1558m", "x\0", "x" * 10**6])
def test_a_name_that_is_no_model_is_told_with_the_published_sizes(name, openai):
    words = "must be 124M, 355M, 774M, 1558M, 1M, a folder in .*, or the path of one, not "
    with pytest.raises(ValueError, match=f"{words}.{{,43}}$"):
        load_encoder_hparams_and_params(name, openai.parent)


def test_the_path_of_a_folder_opens_it_and_a_name_in_models_dir_comes_first(openai, monkeypatch):
    model = shutil.copytree(openai, openai.parent / "models" / "tuned")
    monkeypatch.chdir(openai.parent)
    monkeypatch.setenv("HOME", str(openai.parent))
    paths = [openai, "openai", "openai/", "./openai", "models/../openai", "models/tuned", "tuned"]
    for path in paths if os.name == "nt" else [*paths, "~/openai"]:
        assert load_encoder_hparams_and_params(path, "models")[1] == HPARAMS
    monkeypatch.chdir(openai)
    for path in (".", "../openai"):  # not from the folder of models
        assert load_encoder_hparams_and_params(path, model)[1] == HPARAMS
    other = shutil.copytree(openai, openai.parent / "tuned")
    edit_json(other / "hparams.json", {"n_layer": 0})
    monkeypatch.chdir(openai.parent)
    assert load_encoder_hparams_and_params("tuned", "models")[1] == HPARAMS
    shutil.rmtree(model)
    with pytest.raises(ValueError, match=r"tuned.hparams\.json: n_layer"):
        load_encoder_hparams_and_params("tuned", "models")


def is_mapped(array):
    """Whether the numbers of an array lie in a mapped file."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


@pytest.mark.parametrize(("layout", "padding"), [("openai", 0), *(("saved", n) for n in (0, 1, 3))])
def test_arrays_are_read_only_views_if_they_are_aligned_and_copies_if_not(layout, padding, request):
    folder = request.getfixturevalue(layout)
    if padding:
        edit_header(folder / "model.safetensors", lambda header: header + b" " * padding)
    _, _, params = load(folder)
    assert_same(params, PARAMS)
    for leaf in jax.tree.leaves(params):
        assert leaf.flags.aligned and is_mapped(leaf) == (padding == 0)
        with pytest.raises(ValueError, match="read-only"):
            leaf[0] = 1


@pytest.mark.parametrize("layout", ["openai", "saved"])
def test_a_file_is_read_where_it_cannot_be_mapped_and_a_pickle_is_not(layout, request, monkeypatch):
    def memmap(*args):
        raise OSError(errno.ENODEV, "No such device")

    folder = request.getfixturevalue(layout)
    (folder / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setattr(np, "memmap", memmap)
    assert_logits_are_recorded(folder)


def test_loading_needs_no_package_that_downloads():
    code = "import sys\nfor name in ('filelock', 'requests', 'tensorflow', 'tqdm', 'safetensors'):"
    code += "\n    sys.modules[name] = None\n"
    code += "import gpt2; print(repr(gpt2.main('ROMEO:', 8, '1M')))"
    assert run(code=("-c", code)).out == f"{main('ROMEO:', 8, '1M', str(ROOT / 'models'))!r}\n"


# --- Hugging Face's layout ---


def test_what_save_pretrained_writes_has_the_logits_of_hugging_face(saved):
    assert sorted(RENAMED) == WRITTEN["weights"]
    assert load(saved)[1] == HPARAMS
    assert_logits_are_recorded(saved)


@pytest.mark.parametrize("prompt", WRITTEN["texts"])
def test_the_bundled_model_writes_what_hugging_faces_library_writes_with_it(prompt):
    digest = sha256((BUNDLED / "model.safetensors").read_bytes()).hexdigest()
    assert digest == WRITTEN["of weights"], "models/1M has changed: run tests/huggingface.py"
    assert main(prompt, 40, "1M", str(ROOT / "models")) == WRITTEN["texts"][prompt]


def test_float16_is_widened_and_bfloat16_is_the_upper_half_of_the_same_numbers(saved):
    save_file({n: w.astype(np.float16) for n, w in RENAMED.items()}, saved / "model.safetensors")
    assert_same(load(saved)[2], jax.tree.map(np.float16, PARAMS))
    halves = {n: (w.view(np.uint32) >> 16).astype(np.uint16) for n, w in RENAMED.items()}
    save_file(halves, saved / "model.safetensors")
    edit_header(saved / "model.safetensors", lambda header: header.replace(b"U16", b"BF16"))
    upper = jax.tree.map(lambda w: (w.view(np.uint32) & 0xFFFF0000).view(np.float32), PARAMS)
    assert_same(load(saved)[2], upper)
    assert not load(saved)[2]["wte"].flags.writeable


def test_weights_may_be_in_several_files_with_an_index_or_in_one_file(saved):
    parts = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(RENAMED)}
    for file in {*parts.values()}:
        save_file({n: w for n, w in RENAMED.items() if parts[n] == file}, saved / file)
    (saved / "model.safetensors").unlink()
    index = saved / "model.safetensors.index.json"
    edit_json(index, {"weight_map": parts})
    assert_logits_are_recorded(saved)
    for damaged in (None, [], "x", {"a": 1}, {"a": "../x"}, {"a": "x" * 999}):
        edit_json(index, {"weight_map": damaged})
        with pytest.raises(ValueError, match=r"index\.json is damaged: .*[^\n]{,50}$"):
            load(saved)
    save_file(RENAMED, saved / "model.safetensors")  # One file is read before several.
    assert_logits_are_recorded(saved)


BARE = {name.removeprefix("transformer."): weight for name, weight in RENAMED.items()}
OTHER_WAYS = {
    "without a prefix": BARE,
    "with the mask of attention": BARE | {"h.0.attn.bias": np.tri(16, dtype="f4")[None, None]},
    "with its head": RENAMED | {HEAD: RENAMED[WTE].copy()},
    # `safetensors.torch.save_model` writes only one of two names for the same numbers.
    "with its head only": {HEAD if name == WTE else name: RENAMED[name] for name in RENAMED},
}


@pytest.mark.parametrize("way", OTHER_WAYS)
@pytest.mark.parametrize("formula", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_weights_and_their_formula_may_be_written_in_other_ways(way, formula, saved):
    save_file(OTHER_WAYS[way], saved / "model.safetensors")
    edit_json(saved / "config.json", {"activation_function": formula})
    assert_logits_are_recorded(saved)


def test_a_head_may_have_another_type_and_be_no_number(saved):
    """It is compared with `wte` bit for bit, after both are float32."""
    wte = np.float16(RENAMED[WTE]) * np.float16(np.nan)
    save_file(RENAMED | {WTE: wte, HEAD: np.float32(wte)}, saved / "model.safetensors")
    assert np.isnan(load(saved)[2]["wte"]).all()


NOT_GPT2S = [
    (RENAMED | {HEAD: -RENAMED[WTE]}, "lm_head.weight is not wte.weight"),
    (RENAMED | {WPE: RENAMED[WPE][1:]}, r"wpe.weight is 'F32' \[15, 12\], not .* \[16, 12\]"),
    (RENAMED | {WPE: np.zeros((16, 12), "i4")}, "wpe.weight is 'I32'"),
    ({n: w for n, w in RENAMED.items() if "ln_f" not in n}, "ln_f.weight is missing"),
    ({f"_orig_mod.{n}": w for n, w in RENAMED.items()}, r"wte\.weight is missing"),
]


@pytest.mark.parametrize(("weights", "message"), NOT_GPT2S, ids=lambda value: str(value)[:20])
def test_weights_that_are_not_gpt2s_are_refused_by_name(weights, message, saved):
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(saved)


NESTED = [[[["x" * 99] * 9] * 9] * 9]
OTHERS = {"model_type": "gptj", "activation_function": "gelu", "layer_norm_epsilon": 1e-6}
OTHERS |= {"tie_word_embeddings": False, "scale_attn_weights": False, "add_cross_attention": True}
OTHERS |= {"scale_attn_by_inverse_layer_idx": True, "quantization_config": {"bits": 8}}
OTHERS |= {"vocab_size": None, "n_positions": "16", "n_head": True, "n_embd": NESTED}
OTHERS |= {"num_attention_heads": 2, "num_hidden_layers": 10**9}  # other names, which count more


@pytest.mark.parametrize("field", OTHERS)
def test_what_gpt2_does_not_compute_is_refused_by_its_field(field, saved):
    edit_json(saved / "config.json", {field: OTHERS[field]})
    with pytest.raises(ValueError, match=rf"config\.json: {field} ") as error:
        load(saved)
    assert len(str(error.value)) < len(str(saved)) + 120


def test_sizes_that_are_left_out_have_the_defaults_of_hugging_faces_library(saved):
    (saved / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wte\.weight is .*\[50257, 768\]"):
        load(saved)
    edit_json(saved / "config.json", {"vocab_size": 300, "n_embd": 12})
    with pytest.raises(ValueError, match=r"wpe\.weight is .*\[1024, 12\]"):
        load(saved)
    edit_json(saved / "config.json", {"n_positions": 16})
    with pytest.raises(ValueError, match=r"h\.2\.ln_1\.weight is missing"):
        load(saved)


@pytest.mark.parametrize("n_rows", [298, 300, 304, 512])
def test_rows_without_a_token_are_cut_off_and_fewer_rows_load(n_rows, saved):
    edit_json(saved / "config.json", {"vocab_size": n_rows})
    save_file(RENAMED | {WTE: np.resize(RENAMED[WTE], (n_rows, 12))}, saved / "model.safetensors")
    _, hparams, params = load(saved)
    assert hparams["n_vocab"] == len(params["wte"]) == min(n_rows, 300)
    np.testing.assert_array_equal(params["wte"], PARAMS["wte"][:n_rows])
    edit_json(saved / "added_tokens.json", {"[PAD]": 300})
    if n_rows <= 300:
        with pytest.raises(ValueError, match="its id has no row in wte"):
            main("x[PAD]", 1, saved)


@pytest.mark.parametrize("files, texts", [*zip(huggingface.ENDS, WRITTEN["ends"], strict=True)])
def test_texts_start_and_end_where_those_of_transformers_do(files, texts, tmp_path):
    huggingface.with_fields(tmp_path, files)
    for prompt, text in texts.items():
        assert main(prompt, 40, tmp_path.name, str(tmp_path.parent)) == text
