"""Loading: what TensorFlow's Saver and Hugging Face's library wrote arrives as it is."""

import json
import mmap
import shutil
import struct
from hashlib import sha256

import huggingface
import numpy as np
import pytest
from conftest import BUNDLED, MERGES, ROOT, TOKENS, write_checkpoint, write_vocabulary
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import utils
from gpt2 import gpt2, main
from utils import load_encoder_hparams_and_params, load_gpt2_params_from_tf_ckpt

COMMITTED = ROOT / "tests" / "checkpoint"
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
WRITTEN = json.loads(huggingface.WRITTEN.read_text("utf-8"))
RECORDED = np.load(huggingface.RECORDED)[str(huggingface.SAVED)]


def load(folder):
    return load_encoder_hparams_and_params(folder.name, folder.parent)


def by_name(params):
    """The leaves of the tree, by OpenAI's names."""
    leaves = {"wte": params["wte"], "wpe": params["wpe"]}
    leaves |= {f"ln_f/{p}": params["ln_f"][p] for p in "gb"}
    for i, block in enumerate(params["blocks"]):
        for part, layers in block.items():
            for name, leaf in layers.items():
                inner = leaf if isinstance(leaf, dict) else {"": leaf}
                leaves |= {f"h{i}/{part}/{name}/{p}".rstrip("/"): v for p, v in inner.items()}
    return leaves


def assert_same(params, tensors):
    """Compare the tree with the tensors, name by name, without the leading axis of matrices."""
    leaves = {f"model/{name}": leaf for name, leaf in by_name(params).items()}
    for name, leaf in leaves.items():
        assert leaf.dtype == np.float32
        expected = tensors[name][0] if name.endswith("/w") else tensors[name]
        np.testing.assert_array_equal(leaf, expected)


def assert_logits_are_recorded(folder, atol=1e-5):
    *fields, n_seq = huggingface.SAVED
    ids = huggingface.random_model(*fields, n_seq=n_seq)[3]
    _, hparams, params = load(folder)
    logits = gpt2(ids, **params, n_head=hparams["n_head"])
    np.testing.assert_allclose(logits, RECORDED[:, : len(TOKENS)], atol=atol)


# --- OpenAI's layout ---


@pytest.fixture
def openai_folder(tmp_path):
    """A copy of the small checkpoint that TensorFlow wrote and that is committed."""
    return shutil.copytree(COMMITTED, tmp_path / "mine")


@pytest.fixture
def written(tmp_path):
    """A folder with a random model, and its tensors as TensorFlow has them."""
    folder = tmp_path / "random"
    folder.mkdir()
    write_vocabulary(folder)
    return folder, write_checkpoint(folder, len(TOKENS), 64, 96, 3, 12)


def test_a_checkpoint_arrives_as_tensorflow_wrote_it(written):
    folder, tensors = written
    _, hparams, params = load(folder)
    assert_same(params, tensors)
    assert hparams == {"n_vocab": 300, "n_ctx": 64, "n_embd": 96, "n_head": 3, "n_layer": 12}
    assert_same(load_gpt2_params_from_tf_ckpt(str(folder / "model.ckpt"), hparams), tensors)


def save_as(folder, change):
    """Let TensorFlow write the tensors of a checkpoint anew, after a change."""
    why = "TensorFlow, which writes checkpoints, has no wheel for this Python"
    tf = pytest.importorskip("tensorflow", reason=why)
    prefix = str(folder / "model.ckpt")
    reader = tf.train.load_checkpoint(prefix)
    tensors = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    tensors = change(tensors) or tensors
    names, values = [*tensors], [*tensors.values()]
    slices = ["10 4 0,5:-" if name == "partitioned" else "" for name in names]
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=slices, tensors=values)
    return tf


SIZES = {"n_vocab": 300, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 2}
WEIGHTS = huggingface.random_model(*huggingface.SAVED[:-1], n_seq=1)[2]


@pytest.fixture
def small(tmp_path):
    """A folder that TensorFlow has just written."""
    write_vocabulary(tmp_path)
    write_checkpoint(tmp_path, **SIZES)
    return tmp_path


def assert_same_as_in_tensorflow(folder):
    from tensorflow import train

    reader = train.load_checkpoint(str(folder / "model.ckpt"))
    names = reader.get_variable_to_shape_map()
    assert_same(load(folder)[2], {name: reader.get_tensor(name) for name in names})


def adam(tf):
    loss = tf.add_n([tf.reduce_sum(v**2) for v in tf.trainable_variables()])
    return tf.train.AdamOptimizer().minimize(loss)


@pytest.mark.parametrize("how", [{"step": adam}, {"sharded": True}], ids=["Adam", "two files"])
def test_what_tensorflow_saves_besides_or_in_two_files_does_not_matter(how, small):
    huggingface.save(small, WEIGHTS, **how)
    assert len([*small.glob("*-of-00002")]) == 2 * ("sharded" in how)
    assert_same_as_in_tensorflow(small)


def test_a_large_checkpoint_with_an_index_of_several_blocks_arrives(small):
    sizes = dict(zip(SIZES, (300, 64, 192, 3, 4), strict=True))
    more = {f"{i:03}{'x' * 2000}": np.float32([i]) for i in range(400)}
    huggingface.save(small, huggingface.random_model(*sizes.values(), n_seq=1)[2] | more)
    # TensorFlow begins a new block after 256 KiB.
    assert (small / INDEX).stat().st_size > 2**19 and (small / DATA).stat().st_size > 2**22
    (small / "hparams.json").write_text(json.dumps(sizes))
    assert_same_as_in_tensorflow(small)


def test_the_committed_weights_are_those_of_the_recorded_model():
    tensors = {f"model/{n}": w[None] if n.endswith("/w") else w for n, w in WEIGHTS.items()}
    assert_same(load(COMMITTED)[2], tensors)


def test_float16_and_bfloat16_variables_are_widened(openai_folder):
    why = "TensorFlow, which writes checkpoints, has no wheel for this Python"
    tf = pytest.importorskip("tensorflow", reason=why)
    for kind in (tf.float16, tf.bfloat16):
        kept = {}

        def narrow(tensors, kind=kind, kept=kept):
            kept |= {name: tf.cast(tensor, kind) for name, tensor in tensors.items()}
            return kept

        save_as(openai_folder, narrow)
        assert_same(
            load(openai_folder)[2], {n: tf.cast(t, tf.float32).numpy() for n, t in kept.items()}
        )


def test_a_partitioned_variable_is_refused_by_name(openai_folder):
    why = "TensorFlow, which writes checkpoints, has no wheel for this Python"
    tf = pytest.importorskip("tensorflow", reason=why).compat.v1
    with tf.Graph().as_default(), tf.Session() as session:
        halves = tf.fixed_size_partitioner(2)
        ones = tf.ones_initializer()
        tf.get_variable("model/wte", (300, 12), initializer=ones, partitioner=halves)
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, str(openai_folder / "model.ckpt"))
    with pytest.raises(ValueError, match=r"wte is in partitions \[300, 12\]"):
        load(openai_folder)


@pytest.mark.parametrize("name", ["/run1/model-1000", r"C:\\run1\\model-1000", "model-1000"])
def test_a_checkpoint_may_be_named_by_the_folder_it_was_trained_in(name, openai_folder):
    for path in openai_folder.glob("model.ckpt.*"):
        path.rename(path.with_name(path.name.replace("model.ckpt", "model-1000")))
    lines = f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'
    (openai_folder / "checkpoint").write_text(lines)
    assert_logits_are_recorded(openai_folder)


def test_the_committed_checkpoint_has_the_logits_of_hugging_face(openai_folder):
    assert_logits_are_recorded(openai_folder)


def test_a_complete_folder_of_a_published_name_asks_no_network(openai_folder, monkeypatch):
    monkeypatch.setattr(utils, "fetch", lambda *args: pytest.fail("it asks the network"))
    assert_logits_are_recorded(openai_folder.rename(openai_folder.with_name("124M")))


def test_every_flipped_bit_of_an_index_is_an_error_or_changes_nothing(openai_folder):
    path = openai_folder / INDEX
    content, expected, refused = path.read_bytes(), utils.read_index(path), 0
    for i in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:
            assert utils.read_index(path) == expected
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.9 * 8 * len(content)


def test_every_truncation_of_an_index_is_an_error(openai_folder):
    path = openai_folder / INDEX
    content = path.read_bytes()
    for n in range(len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"model\.ckpt\.index is damaged or cut off"):
            utils.read_index(path)


@pytest.mark.parametrize("n_bytes", [0, 1, 7777, 30335])
def test_a_data_file_that_is_too_short_is_named(n_bytes, openai_folder):
    content = (openai_folder / DATA).read_bytes()
    (openai_folder / DATA).write_bytes(content[:n_bytes])
    with pytest.raises(ValueError, match=rf"{DATA} is damaged or cut off: ") as error:
        load(openai_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("hparams.json", "{", "hparams.json is not a JSON object"),
        ("hparams.json", "[]", "hparams.json is not a JSON object"),
        ("hparams.json", "{}", "hparams.json: n_vocab must be a number above 0"),
        ("checkpoint", "", "checkpoint names no checkpoint"),
        ("encoder.json", "{", "encoder.json is not a JSON object"),
    ],
)
def test_a_damaged_file_is_named(name, content, message, openai_folder):
    (openai_folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(openai_folder)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("n_ctx", 17, r"wpe is 1 \[16, 12\], not .*\[17, 12\]"),
        ("n_embd", 24, r"wte is 1 \[300, 12\], not .*\[300, 24\]"),
        ("n_layer", 3, "h2/ln_1/g is missing from the weights, which have h0/attn/c_attn/b"),
        ("n_head", 5, "n_embd must be a multiple of n_head"),
    ],
)
def test_sizes_that_do_not_fit_the_tensors_are_an_error(field, value, message, openai_folder):
    hparams = json.loads((openai_folder / "hparams.json").read_text()) | {field: value}
    (openai_folder / "hparams.json").write_text(json.dumps(hparams))
    with pytest.raises(ValueError, match=message):
        load(openai_folder)


@pytest.mark.parametrize("name", [DATA, INDEX, "hparams.json", "vocab.bpe"])
def test_a_missing_file_is_named(name, openai_folder):
    (openai_folder / name).unlink()
    with pytest.raises(OSError, match=name):
        load(openai_folder)


def test_a_missing_checkpoint_file_is_told_with_the_line_it_must_hold(openai_folder):
    (openai_folder / INDEX).rename(openai_folder / "model-500.index")
    (openai_folder / "checkpoint").unlink()
    with pytest.raises(OSError, match=r'checkpoint is missing.*model_checkpoint_path: "model-500"'):
        load(openai_folder)


@pytest.mark.parametrize("name", ["", ".", "..", "../mine", "mine/", "no_such", "1558m"])
def test_a_name_that_is_no_model_is_told_with_the_folders_there(name, openai_folder):
    words = r"must be 124M, 355M, 774M, 1558M, or a folder in .* \(mine\), not"
    with pytest.raises(ValueError, match=words):
        load_encoder_hparams_and_params(name, openai_folder.parent)


def test_a_tilde_stands_for_the_home_of_the_user(openai_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(openai_folder.parent))
    monkeypatch.setenv("USERPROFILE", str(openai_folder.parent))  # on Windows
    assert load_encoder_hparams_and_params("mine", "~")[1]["n_embd"] == 12


# --- Hugging Face's layout ---


@pytest.fixture
def saved(tmp_path):
    """A folder such as `save_pretrained` writes, of the model whose logits are recorded."""
    folder = tmp_path / "saved"
    folder.mkdir()
    write_config(folder)
    write_tokenizer(folder)
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_config(folder, name="config.json", **changes):
    config = WRITTEN["config"] if name == "config.json" else {}
    (folder / name).write_text(json.dumps(config | changes))


def write_tokenizer(folder, added=()):
    vocabulary = {token: id for id, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>"), *added])
    tokenizer.save(str(folder / "tokenizer.json"))


def weights():
    """The tensors of that model, by the names that `save_pretrained` wrote."""
    *fields, n_seq = huggingface.SAVED
    tensors = huggingface.random_model(*fields, n_seq=n_seq)[2]
    tensors = huggingface.in_hugging_faces_names(tensors)
    assert sorted(tensors) == WRITTEN["weights"]
    return tensors


def write_safetensors(path, tensors, kinds=None, padding=0):
    """Write the format by hand, so that types and places can be chosen."""
    head, content = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        kind = (kinds or {"float32": "F32", "float16": "F16", "uint16": "BF16"})[str(tensor.dtype)]
        offsets = [len(content), len(content) + tensor.nbytes]
        head[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": offsets}
        content += tensor.tobytes()
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8 + padding)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def test_what_save_pretrained_writes_has_the_logits_of_hugging_face(saved):
    assert load(saved)[1] == {"n_vocab": 300, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 2}
    assert_logits_are_recorded(saved)


@pytest.mark.parametrize("prompt", WRITTEN["texts"])
def test_the_bundled_model_writes_what_hugging_faces_library_writes_with_it(prompt):
    digest = sha256((BUNDLED / "model.safetensors").read_bytes()).hexdigest()
    assert digest == WRITTEN["of weights"], "models/1M has changed: run tests/huggingface.py"
    assert main(prompt, 40, "1M", str(ROOT / "models")) == WRITTEN["texts"][prompt]


def is_mapped(array):
    """Whether the numbers of an array lie in a mapped file."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_arrays_are_read_only_views_where_they_are_aligned_and_copies_elsewhere(saved, padding):
    write_safetensors(saved / "model.safetensors", weights(), padding=padding)
    assert_logits_are_recorded(saved)
    for leaf in by_name(load(saved)[2]).values():
        assert leaf.dtype == np.float32 and leaf.flags.aligned
        assert is_mapped(leaf) == (padding == 0)
        with pytest.raises(ValueError, match="read-only"):
            leaf[0] = 1


def test_openais_arrays_are_read_only_views(openai_folder):
    for leaf in by_name(load(openai_folder)[2]).values():
        assert is_mapped(leaf) and not leaf.flags.writeable


def test_float16_and_bfloat16_are_widened_to_the_same_numbers(saved):
    wide = weights()
    halves = {name: tensor.astype(np.float16) for name, tensor in wide.items()}
    upper = {
        name: (tensor.view(np.uint32) >> 16).astype(np.uint16) for name, tensor in wide.items()
    }
    cut = {name: (tensor.view(np.uint32) & 0xFFFF0000).view("f4") for name, tensor in wide.items()}
    name = "transformer.h.1.mlp.c_fc.weight"
    for narrow, expected in ((halves, halves[name]), (upper, cut[name])):
        write_safetensors(saved / "model.safetensors", narrow)
        params = load(saved)[2]
        np.testing.assert_array_equal(params["blocks"][1]["mlp"]["c_fc"]["w"], expected)
        assert not params["wte"].flags.writeable


def test_weights_may_be_in_several_files(saved):
    names = sorted(weights())
    parts = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in {*parts.values()}:
        save_file({n: t for n, t in weights().items() if parts[n] == file}, saved / file)
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    assert_logits_are_recorded(saved)


def bare(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors):
    return bare(tensors) | {"h.0.attn.bias": np.tri(16, dtype=np.float32)[None, None]}


def with_a_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].copy()}


@pytest.mark.parametrize("change", [bare, with_masks, with_a_head])
def test_weights_may_be_written_in_other_ways(change, saved):
    save_file(change(weights()), saved / "model.safetensors")
    assert_logits_are_recorded(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t | {"lm_head.weight": -t["transformer.wte.weight"]}, "lm_head.weight is not"),
        (lambda t: t | {"transformer.wpe.weight": np.zeros((15, 12), "f4")}, "wpe.weight is F32"),
        (lambda t: t | {"transformer.wpe.weight": np.zeros((16, 12), "i4")}, "wpe.weight is I32"),
        (lambda t: {n: v for n, v in t.items() if "ln_f" not in n}, "ln_f.weight is missing"),
        (
            lambda t: {f"_orig_mod.{n}": v for n, v in t.items()},
            r"which have _orig_mod\.transformer\.wte\.weight",
        ),
    ],
)
def test_weights_that_are_not_gpt2s_are_refused_by_name(change, message, saved):
    save_file(change(weights()), saved / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(saved)


OTHERS = {"model_type": "gptj", "activation_function": "gelu", "layer_norm_epsilon": 1e-6}
OTHERS |= {"tie_word_embeddings": False, "scale_attn_weights": False, "add_cross_attention": True}
OTHERS |= {"scale_attn_by_inverse_layer_idx": True, "quantization_config": {"bits": 8}}
OTHERS |= {"vocab_size": None, "n_positions": "16", "n_head": True}


@pytest.mark.parametrize("field", OTHERS)
def test_what_gpt2_does_not_compute_is_refused_by_its_field(field, saved):
    write_config(saved, **{field: OTHERS[field]})
    with pytest.raises(ValueError, match=rf"config\.json: {field} "):
        load(saved)


def test_a_key_that_is_missing_means_the_default_of_the_library(saved):
    (saved / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wte\.weight is .*\[50257, 768\]"):
        load(saved)


@pytest.mark.parametrize("n_rows", [298, 300, 304, 512])
def test_rows_without_a_token_are_cut_off_and_fewer_rows_load(n_rows, saved):
    write_config(saved, vocab_size=n_rows)
    tensors = weights()
    tensors["transformer.wte.weight"] = np.resize(tensors["transformer.wte.weight"], (n_rows, 12))
    save_file(tensors, saved / "model.safetensors")
    _, hparams, params = load(saved)
    assert hparams["n_vocab"] == len(params["wte"]) == min(n_rows, 300)
    if n_rows >= 300:
        assert_logits_are_recorded(saved)


def test_a_token_without_a_row_is_an_error_when_it_is_used(saved):
    write_tokenizer(saved, ["[PAD]"])
    assert_logits_are_recorded(saved)
    with pytest.raises(ValueError, match="an id without a row"):
        main("x[PAD]", 1, saved.name, str(saved.parent))


ENDS = [(None, None, {299}), (None, 5, {5}), (None, [5, 7, 999], {5, 7}), (None, 999, {299})]
ENDS += [(8, 5, {8}), ([8, 9], 5, {8, 9}), (999, 5, {5})]  # generation_config.json comes first


@pytest.mark.parametrize("generation, config, ends", ENDS)
def test_a_text_ends_where_the_configuration_says(generation, config, ends, saved):
    write_config(saved, eos_token_id=config)
    if generation is not None:
        write_config(saved, "generation_config.json", eos_token_id=generation)
    assert load(saved)[0].eos == ends


CASES = [*zip(huggingface.ENDS, WRITTEN["ends"], strict=True)]


@pytest.mark.parametrize("files, texts", CASES)
def test_texts_start_and_end_where_those_of_transformers_do(files, texts, tmp_path):
    huggingface.with_fields(tmp_path, files)
    for prompt, text in texts.items():
        assert main(prompt, 40, tmp_path.name, str(tmp_path.parent)) == text


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}])
def test_an_index_of_weights_that_is_damaged_is_an_error(weight_map, saved):
    (saved / "model.safetensors").unlink()
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((OSError, ValueError), match=r"weight_map|No such file|missing"):
        load(saved)


@pytest.mark.parametrize("bos, start", [(50256, [299]), (None, [299]), (5, [5])])
def test_an_empty_prompt_starts_from_bos_or_endoftext(bos, start, saved):
    write_config(saved, bos_token_id=bos)
    assert load(saved)[0].bos == start


UNREADABLE = {
    "pytorch_model.bin": r"two lines:\nmodel = .*from_pretrained.*\nmodel\.save_pretrained",
    "pytorch_model-00001-of-00002.bin": r"two lines:\n",
    "adapter_config.json": "is a LoRA adapter. Merge it",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_model_of_another_kind_is_told_with_what_to_do(name, saved):
    (saved / "model.safetensors").unlink()
    (saved / name).write_text("{}")
    with pytest.raises(ValueError, match=UNREADABLE[name]):
        load(saved)


@pytest.mark.parametrize("name", [None, "vocab.txt", "spiece.model"])
def test_a_folder_without_a_tokenizer_is_told_which_are_understood(name, saved):
    (saved / "tokenizer.json").unlink()
    if name:
        (saved / name).write_text("")
    with pytest.raises(ValueError, match=r"no tokenizer that is understood.*tokenizer\.json, or"):
        load(saved)


def test_with_both_layouts_in_a_folder_hugging_faces_is_read(openai_folder, saved):
    shutil.copytree(openai_folder, saved, dirs_exist_ok=True)
    (saved / INDEX).write_bytes(b"")
    assert_logits_are_recorded(saved.rename(saved.with_name("124M")))


def test_loading_needs_none_of_what_downloads(run):
    code = "import sys\nfor name in ('filelock', 'requests', 'tensorflow', 'tqdm', 'urllib3',"
    code += " 'safetensors'):\n    sys.modules[name] = None\n"
    code += "import gpt2; print(repr(gpt2.main('ROMEO:', 8, '1M')))"
    assert run(code=("-c", code)).stdout == f"{main('ROMEO:', 8, '1M', str(ROOT / 'models'))!r}\n"
