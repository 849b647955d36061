"""Loading: what TensorFlow's Saver and Hugging Face's library wrote arrives as it is."""

import json
import os
import shutil

import huggingface
import numpy as np
import pytest
from conftest import MERGES, ROOT, SIZES, TOKENS, write_checkpoint, write_vocabulary
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import utils
from gpt2 import gpt2, main
from utils import load_encoder_hparams_and_params, load_gpt2_params_from_tf_ckpt

DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
WRITTEN = json.loads(huggingface.WRITTEN.read_text("utf-8"))


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
    """Compare the tree with the tensors, name by name, the leading axis of matrices gone."""
    leaves = {f"model/{name}": leaf for name, leaf in by_name(params).items()}
    assert leaves.keys() == tensors.keys()
    for name, leaf in leaves.items():
        assert leaf.dtype == np.float32
        expected = tensors[name][0] if name.endswith("/w") else tensors[name]
        np.testing.assert_array_equal(leaf, expected)


# --- OpenAI's layout ---


@pytest.fixture
def random_model(tmp_path):
    """A models_dir with a random model named `random`, and its tensors as TensorFlow has them."""
    folder = tmp_path / "models" / "random"
    folder.mkdir(parents=True)
    write_vocabulary(folder)
    return folder.parent, write_checkpoint(folder, len(TOKENS), 16, 12, 3, 2)


def test_a_checkpoint_arrives_as_tensorflow_wrote_it(random_model):
    models_dir, tensors = random_model
    encoder, hparams, params = load_encoder_hparams_and_params("random", models_dir)
    assert_same(params, tensors)
    assert hparams == {"n_vocab": 300, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 2}
    assert params["blocks"][0]["mlp"]["c_fc"]["w"].flags.f_contiguous  # one row is read faster so
    assert encoder.decode(encoder.encode("Romeo")) == "Romeo"
    path = str(models_dir / "random" / "model.ckpt")
    assert_same(load_gpt2_params_from_tf_ckpt(path, hparams), tensors)


def test_every_later_load_maps_one_file_and_imports_only_what_reads_it(models_dir, run):
    code = (
        "import sys, gpt2, utils; "
        "params = utils.load_encoder_hparams_and_params('mine', sys.argv[1])[2]; "
        "gpt2.main('x', 1, 'mine', sys.argv[1]); "
        "print(params['wte'].flags.writeable, {'filelock', 'requests', 'safetensors', "
        "'tensorflow', 'tqdm', 'urllib3'} & set(sys.modules))"
    )
    assert run(models_dir, code=("-c", code)).stdout == "False set()\n"


def test_the_weights_are_converted_once_and_nothing_is_left_beside_them(random_model):
    models_dir, _ = random_model
    load_encoder_hparams_and_params("random", models_dir)
    converted = models_dir / "random" / "params.f32"
    before = converted.stat()
    assert load_encoder_hparams_and_params("random", models_dir)
    assert converted.stat() == before
    assert sorted({*os.listdir(converted.parent)} - {".lock"}) == [
        *("checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001"),
        *("model.ckpt.index", "model.ckpt.meta", "params.f32", "vocab.bpe"),
    ]


def test_a_converted_model_takes_no_lock_and_says_nothing(models_dir, monkeypatch, capsys):
    monkeypatch.setattr(utils, "alone", lambda folder: pytest.fail("the lock is taken"))
    load_encoder_hparams_and_params("mine", models_dir)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("seconds", [-(10**6), 0, 10**6])
def test_a_converted_folder_that_is_copied_loads_whatever_its_times(
    seconds, openai, tmp_path, no_tensorflow
):
    folder = shutil.copytree(openai, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in folder.iterdir():
        if path.name != "params.f32":
            os.utime(path, (path.stat().st_mtime + seconds,) * 2)
    params = load_encoder_hparams_and_params("copy", tmp_path)[2]
    expected = load_encoder_hparams_and_params(openai.name, openai.parent)[2]
    np.testing.assert_array_equal(params["wte"], expected["wte"])


@pytest.mark.parametrize("age", [-1000, 0, 1000])
def test_another_checkpoint_is_converted_be_it_newer_or_older_or_as_old(random_model, age):
    models_dir, _ = random_model
    folder = models_dir / "random"
    load_encoder_hparams_and_params("random", models_dir)
    tensors = write_checkpoint(folder, len(TOKENS), 16, 12, 3, 2, seed=1)
    for path in folder.glob("model.ckpt.*"):
        os.utime(path, ((folder / "params.f32").stat().st_mtime + age,) * 2)
    assert_same(load_encoder_hparams_and_params("random", models_dir)[2], tensors)


def test_the_same_tensors_with_another_number_of_heads_are_not_converted_again(
    models_dir, no_tensorflow
):
    hparams = SIZES | {"n_head": 6}
    (models_dir / "mine" / "hparams.json").write_text(json.dumps(hparams))
    assert load_encoder_hparams_and_params("mine", models_dir)[1] == hparams


@pytest.mark.parametrize("first", ["", 'previous: model_checkpoint_path: "no"\n'])
@pytest.mark.parametrize("name", ["/run1/model-1000", r"C:\\run1\\model-1000", "model-1000"])
def test_a_fine_tuned_checkpoint_may_be_named_by_the_folder_it_was_trained_in(
    random_model, name, first
):
    models_dir, tensors = random_model
    for path in (models_dir / "random").glob("model.ckpt.*"):
        path.rename(path.with_name(path.name.replace("model.ckpt", "model-1000")))
    checkpoint = f'{first}model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'
    (models_dir / "random" / "checkpoint").write_text(checkpoint)
    assert_same(load_encoder_hparams_and_params("random", models_dir)[2], tensors)


def test_a_folder_named_as_a_published_size_is_used_as_it_is(random_model):
    models_dir, tensors = random_model
    (models_dir / "random").rename(models_dir / "124M")
    assert_same(load_encoder_hparams_and_params("124M", models_dir)[2], tensors)


def test_a_folder_that_cannot_take_the_converted_file_still_loads(random_model, capsys):
    models_dir, tensors = random_model
    part = models_dir / "random" / "params.f32.part"
    part.mkdir()  # nobody can open it as a file, not even root
    assert_same(load_encoder_hparams_and_params("random", models_dir)[2], tensors)
    assert "could not be kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    "gone", [[DATA], [INDEX], ["checkpoint"], ["checkpoint", DATA, INDEX, "model.ckpt.meta"]]
)
def test_the_checkpoint_may_be_deleted_once_converted(gone, models_dir, openai, no_tensorflow):
    for name in gone:
        (models_dir / "mine" / name).unlink()
    params = load_encoder_hparams_and_params("mine", models_dir)[2]
    expected = load_encoder_hparams_and_params(openai.name, openai.parent)[2]
    np.testing.assert_array_equal(params["ln_f"]["b"], expected["ln_f"]["b"])


def test_the_converted_file_may_be_deleted_at_any_time(random_model):
    models_dir, tensors = random_model
    for _ in range(2):
        assert_same(load_encoder_hparams_and_params("random", models_dir)[2], tensors)
        (models_dir / "random" / "params.f32").unlink()


def test_the_first_load_writes_a_bar_to_standard_error_and_no_more(random_model, run):
    code = (
        "import os, sys\n"
        "for name in ('TF_CPP_MIN_LOG_LEVEL', 'TF_ENABLE_ONEDNN_OPTS'):\n"
        "    os.environ.pop(name, None)\n"
        "import utils; utils.load_encoder_hparams_and_params('random', sys.argv[1])"
    )
    result = run(random_model[0], code=("-c", code))
    assert (result.returncode, result.stdout) == (0, "")
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and all(line.startswith("converting: ") for line in lines)


@pytest.mark.parametrize("name", ["125M", "1558m", "", "124M ", "None"])
def test_a_name_that_is_no_model_is_an_error_that_names_the_four(tmp_path, name):
    with pytest.raises(ValueError, match=r"must be 124M, 355M, 774M, 1558M, or .* not"):
        load_encoder_hparams_and_params(name, tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "../mine", "mine/", "./mine", "no_such", "/abs"])
def test_a_name_that_is_no_entry_of_models_dir_is_refused(name, models_dir):
    name = str(models_dir / "mine") if name == "/abs" else name
    with pytest.raises(ValueError, match="model_size must be 124M, 355M, 774M, 1558M, or"):
        load_encoder_hparams_and_params(name, models_dir)


def test_a_tilde_stands_for_the_home_of_the_user(models_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(models_dir.parent))
    monkeypatch.setenv("USERPROFILE", str(models_dir.parent))  # on Windows
    monkeypatch.chdir(models_dir)
    assert load_encoder_hparams_and_params("mine", "~/models")[1] == SIZES
    assert os.listdir(models_dir) == ["mine"]


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


def write_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(WRITTEN["config"] | changes))


def write_tokenizer(folder, added=()):
    vocabulary = {token: id for id, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>"), *added])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def weights():
    """The tensors of that model, by the names that `save_pretrained` wrote."""
    *fields, n_seq = huggingface.SAVED
    tensors = huggingface.random_model(*fields, n_seq=n_seq)[2]
    tensors = huggingface.in_hugging_faces_names(tensors)
    assert sorted(tensors) == WRITTEN["weights"]
    return tensors


def write_weights(folder, change):
    """Write the tensors after a change."""
    tensors = weights()
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def load(folder):
    return load_encoder_hparams_and_params(folder.name, folder.parent)


def assert_logits_are_recorded(folder, atol=1e-5):
    *fields, n_seq = huggingface.SAVED
    ids = huggingface.random_model(*fields, n_seq=n_seq)[3]
    _, hparams, params = load(folder)
    assert {str(leaf.dtype) for leaf in by_name(params).values()} == {"float32"}
    logits = gpt2(ids, **params, n_head=hparams["n_head"])[:, : len(TOKENS)]
    expected = np.load(huggingface.RECORDED)[str(huggingface.SAVED)]
    np.testing.assert_allclose(logits, expected, atol=atol)


def test_what_save_pretrained_writes_has_the_logits_of_hugging_face(saved):
    assert load(saved)[1] == {"n_vocab": 300, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 2}
    assert_logits_are_recorded(saved)


@pytest.mark.parametrize("prompt", WRITTEN["texts"])
def test_the_bundled_model_writes_what_hugging_faces_library_writes_with_it(prompt):
    assert huggingface.sha256_of_the_bundled_weights() == WRITTEN["of weights"], (
        "models/1M has changed: run python tests/huggingface.py"
    )
    assert main(prompt, 40, "1M", str(ROOT / "models")) == WRITTEN["texts"][prompt]


def test_this_layout_needs_neither_tensorflow_nor_what_downloads(run):
    code = (
        "import sys\nfor name in ('filelock', 'requests', 'tensorflow', 'tqdm', 'urllib3'):\n"
        "    sys.modules[name] = None\n"
        "import gpt2; print(repr(gpt2.main('ROMEO:', 8, '1M')))"
    )
    assert run(code=("-c", code)).stdout == f"{main('ROMEO:', 8, '1M', str(ROOT / 'models'))!r}\n"


def test_a_published_name_and_a_folder_with_both_layouts_are_read_in_this_one(openai, saved):
    shutil.copytree(openai, saved, dirs_exist_ok=True)
    assert_logits_are_recorded(saved.rename(saved.with_name("124M")))


def bare(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors):
    mask = np.tri(16, dtype=np.float32)[None, None]
    masks = {f"h.{i}.attn.bias": mask for i in range(2)}
    return bare(tensors) | masks | {"h.0.attn.masked_bias": np.array(-1e4, np.float32)}


def with_a_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].copy()}


def in_float16(tensors):
    return {name: tensor.astype(np.float16) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "change, atol",
    [
        (bare, 1e-5),
        (with_masks, 1e-5),
        (with_a_head, 1e-5),
        (in_float16, 1e-2),
        (lambda tensors: in_float16(with_masks(with_a_head(tensors))), 1e-2),
    ],
    ids=["names without transformer.", "masks", "a tied head", "float16", "all of it"],
)
def test_weights_may_be_written_in_other_ways(change, atol, saved):
    write_weights(saved, change)
    assert_logits_are_recorded(saved, atol)


def test_float16_is_widened_to_the_same_numbers(saved):
    write_weights(saved, in_float16)
    expected = weights()["transformer.h.1.mlp.c_fc.weight"].astype(np.float16)
    np.testing.assert_array_equal(load(saved)[2]["blocks"][1]["mlp"]["c_fc"]["w"], expected)


def set_to(name, function):
    def change(tensors):
        tensors[f"transformer.{name}"] = function(tensors.get(f"transformer.{name}"))

    return change


def without(name):
    return lambda tensors: {key: tensors[key] for key in tensors if not key.endswith(name)}


def some(_):
    return np.zeros(12, np.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t | {"lm_head.weight": t["transformer.wpe.weight"]}, "lm_head.weight is not"),
        (lambda t: t | {"lm_head.weight": -t["transformer.wte.weight"]}, "lm_head.weight is not"),
        (set_to("wte.weight", np.float64), r"wte.weight is \('F64', \[300, 12\]\)"),
        (set_to("h.1.ln_1.bias", np.int32), r"h.1.ln_1.bias is \('I32', \[12\]\)"),
        (set_to("h.0.mlp.c_fc.weight", lambda w: w.T.copy()), r"h.0.mlp.c_fc.weight is .*\[48, 12"),
        (set_to("wpe.weight", lambda w: w[:-1]), r"wpe.weight is \('F32', \[15, 12\]\), not"),
        (set_to("h.2.ln_1.bias", some), "h.2.ln_1.bias is no part of the model"),
        (set_to("score.weight", some), "score.weight is no part of the model"),
        (set_to("h.0.attn.bias.more", some), "h.0.attn.bias.more is no part of the model"),
        (without("ln_f.bias"), "ln_f.bias.* is missing"),
        (without("h.1.attn.c_proj.weight"), "h.1.attn.c_proj.weight.* is missing"),
    ],
)
def test_weights_that_are_not_gpt2s_are_refused_by_name(change, message, saved):
    write_weights(saved, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        load(saved)


def change_header(path, change):
    """Change the JSON at the beginning of a safetensors file, behind its length in 8 bytes."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])


def test_bfloat16_is_refused_by_name(saved):
    write_weights(saved, in_float16)
    name = "transformer.wpe.weight"
    change_header(saved / "model.safetensors", lambda h: h[name].update(dtype="BF16"))
    with pytest.raises(ValueError, match=r"wpe.weight is \('BF16', \[16, 12\]\), not float32 or"):
        load(saved)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:7],
        lambda content: content[:99],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: bytes(8) + content,
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content.replace(b"{", b"[", 1),
        lambda content: content.replace(b"F32", b"F\xff2", 1),
    ],
)
def test_a_damaged_file_of_weights_is_an_error_that_names_it(damage, saved):
    path = saved / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        load(saved)


@pytest.mark.parametrize("other", ["model.safetensors.index.json", "pytorch_model.bin"])
def test_weights_in_pieces_or_pickled_are_refused_in_a_line(other, saved):
    (saved / "model.safetensors").rename(saved / other)
    with pytest.raises(ValueError, match=r"model\.safetensors is missing; weights in pieces or p"):
        load(saved)


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "gptj"),
        ("activation_function", "relu"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("tie_word_embeddings", False),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("quantization_config", {"load_in_8bit": True}),
        ("n_inner", 47),
        ("vocab_size", None),
        ("vocab_size", 300.0),
        ("n_positions", "16"),
        ("n_embd", 0),
        ("n_head", True),
        ("n_layer", [2]),
    ],
)
def test_what_gpt2_does_not_compute_is_refused_by_its_field(field, value, saved):
    write_config(saved, **{field: value})
    with pytest.raises(ValueError, match=rf"config\.json: {field} "):
        load(saved)


@pytest.mark.parametrize(
    "field, value", [("n_inner", 48), ("activation_function", "gelu_pytorch_tanh")]
)
def test_other_words_for_what_it_computes_are_understood(field, value, saved):
    write_config(saved, **{field: value})
    assert_logits_are_recorded(saved)


def test_a_key_that_is_missing_means_the_librarys_default(saved):
    sizes = ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")
    config = {field: WRITTEN["config"][field] for field in sizes}
    (saved / "config.json").write_text(json.dumps(config))
    assert_logits_are_recorded(saved)
    (saved / "config.json").write_text(json.dumps(config | {"n_positions": 1024}))
    with pytest.raises(ValueError) as explicit:
        load(saved)
    del config["n_positions"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"wpe.weight is .*\[1024, 12\]") as left_out:
        load(saved)
    assert str(left_out.value) == str(explicit.value)
    (saved / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wte.weight is .*\[50257, 768\]"):
        load(saved)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", '{"n_embd": 10}', "n_embd must be a multiple of n_head"),
        ("tokenizer.json", "{}", "tokenizer.json is no byte-level BPE"),
    ],
)
def test_a_damaged_file_is_named(name, content, message, saved):
    (saved / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize("gone, left", [("tokenizer.json", ()), ("merges.txt", ("vocab.json",))])
def test_a_missing_vocabulary_is_named_by_the_file_of_this_layout(gone, left, saved):
    write_vocabulary(saved, "vocab.json", "merges.txt")
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - {*left}:
        (saved / name).unlink()
    with pytest.raises(OSError, match=f"{gone} is missing"):
        load(saved)


@pytest.mark.parametrize("n_rows", [300, 304, 512])
def test_rows_of_padding_after_the_vocabulary_load(n_rows, saved):
    write_config(saved, vocab_size=n_rows)
    write_weights(saved, set_to("wte.weight", lambda w: np.resize(w, (n_rows, 12))))
    assert_logits_are_recorded(saved)


def test_a_pad_token_that_the_weights_have_no_row_for_loads(saved):
    write_tokenizer(saved, ["[PAD]", "a b"])
    assert_logits_are_recorded(saved)


def test_a_vocabulary_that_needs_more_rows_than_there_are_is_refused(saved):
    write_config(saved, vocab_size=298)
    write_weights(saved, set_to("wte.weight", lambda w: w[:298]))
    with pytest.raises(ValueError, match=r"config\.json: vocab_size is less than the ids"):
        load(saved)


def test_endoftext_without_a_row_is_an_error_and_no_traceback(saved):
    write_config(saved, vocab_size=299)
    write_weights(saved, set_to("wte.weight", lambda w: w[:299]))
    with pytest.raises(ValueError):
        main("", 3, saved.name, str(saved.parent))
