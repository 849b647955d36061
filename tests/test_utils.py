"""Loading: what TensorFlow's own Saver wrote arrives as it is, converted once, from any folder."""

import os
import shutil

import numpy as np
import pytest
from conftest import BUNDLED, write_checkpoint

from utils import load_encoder_hparams_and_params, load_gpt2_params_from_tf_ckpt


@pytest.fixture
def random_model(tmp_path):
    """A models_dir with a random model named `random`, and its tensors as TensorFlow has them."""
    folder = tmp_path / "models" / "random"
    folder.mkdir(parents=True)
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(BUNDLED / name, folder)
    return folder.parent, write_checkpoint(folder, 1024, 16, 12, 3, 2)


def assert_same(params, tensors):
    """Compare the tree with the tensors, name by name, the leading axis of matrices gone."""
    leaves = {"wte": params["wte"], "wpe": params["wpe"]}
    leaves |= {f"ln_f/{p}": params["ln_f"][p] for p in "gb"}
    for i, block in enumerate(params["blocks"]):
        for part, layers in block.items():
            for name, leaf in layers.items():
                inner = leaf if isinstance(leaf, dict) else {"": leaf}
                leaves |= {f"h{i}/{part}/{name}/{p}".rstrip("/"): v for p, v in inner.items()}
    assert {f"model/{name}" for name in leaves} == set(tensors)
    for name, leaf in leaves.items():
        assert leaf.dtype == np.float32
        tensor = tensors[f"model/{name}"]
        np.testing.assert_array_equal(leaf, tensor[0] if name.endswith("/w") else tensor)


def test_a_checkpoint_arrives_as_tensorflow_wrote_it(random_model):
    models_dir, tensors = random_model
    encoder, hparams, params = load_encoder_hparams_and_params("random", models_dir)
    assert_same(params, tensors)
    assert hparams == {"n_vocab": 1024, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 2}
    assert encoder.decode(encoder.encode("Romeo")) == "Romeo"
    path = str(models_dir / "random" / "model.ckpt")
    assert_same(load_gpt2_params_from_tf_ckpt(path, hparams), tensors)


def test_every_later_load_maps_one_file_and_imports_neither_tensorflow_nor_requests(
    models_dir, run
):
    load_encoder_hparams_and_params("mine", models_dir)
    code = (
        "import sys, gpt2, utils; "
        "params = utils.load_encoder_hparams_and_params('mine', sys.argv[1])[2]; "
        "print(gpt2.main('x', 1, 'mine', sys.argv[1]), params['wte'].flags.writeable, "
        "{'tensorflow', 'requests'} & set(sys.modules))"
    )
    assert run(models_dir, code=("-c", code)).stdout.endswith(" False set()\n")


def test_the_weights_are_converted_once(random_model):
    models_dir, _ = random_model
    load_encoder_hparams_and_params("random", models_dir)
    converted = models_dir / "random" / "params.f32"
    before = converted.stat()
    assert load_encoder_hparams_and_params("random", models_dir)
    assert converted.stat() == before
    assert sorted(os.listdir(converted.parent)) == [
        *("checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001"),
        *("model.ckpt.index", "model.ckpt.meta", "params.f32", "vocab.bpe"),
    ]


@pytest.mark.parametrize("age", [-1000, 1000])
def test_another_checkpoint_is_converted_again_be_it_newer_or_older(random_model, age):
    models_dir, _ = random_model
    folder = models_dir / "random"
    load_encoder_hparams_and_params("random", models_dir)
    tensors = write_checkpoint(folder, 1024, 16, 12, 3, 2, seed=1)
    for path in folder.glob("model.ckpt.*"):
        os.utime(path, (path.stat().st_mtime + age,) * 2)
    assert_same(load_encoder_hparams_and_params("random", models_dir)[2], tensors)


def test_a_fine_tuned_checkpoint_may_be_named_by_the_folder_it_was_trained_in(random_model):
    models_dir, tensors = random_model
    for path in (models_dir / "random").glob("model.ckpt.*"):
        path.rename(path.with_name(path.name.replace("model.ckpt", "model-1000")))
    for name in ("/content/run1/model-1000", r"C:\\run1\\model-1000", "model-1000"):
        checkpoint = f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'
        (models_dir / "random" / "checkpoint").write_text(checkpoint)
        assert_same(load_encoder_hparams_and_params("random", models_dir)[2], tensors)


def test_a_folder_named_as_a_published_size_is_used_as_it_is(random_model):
    models_dir, tensors = random_model
    (models_dir / "random").rename(models_dir / "124M")
    assert_same(load_encoder_hparams_and_params("124M", models_dir)[2], tensors)


def test_a_folder_that_cannot_take_the_converted_file_still_loads(random_model, capsys):
    models_dir, tensors = random_model
    (
        models_dir / "random" / "params.f32.part"
    ).mkdir()  # nobody can open it as a file, not even root
    assert_same(load_encoder_hparams_and_params("random", models_dir)[2], tensors)
    assert "could not be kept" in capsys.readouterr().err


def test_the_checkpoint_may_be_deleted_once_converted(random_model):
    models_dir, tensors = random_model
    load_encoder_hparams_and_params("random", models_dir)
    (models_dir / "random" / "model.ckpt.data-00000-of-00001").unlink()
    assert_same(load_encoder_hparams_and_params("random", models_dir)[2], tensors)


def test_the_converted_file_may_be_deleted_at_any_time(random_model):
    models_dir, tensors = random_model
    for _ in range(2):
        assert_same(load_encoder_hparams_and_params("random", models_dir)[2], tensors)
        (models_dir / "random" / "params.f32").unlink()


@pytest.mark.parametrize("name", ["125M", "1558m", "", "124M ", "None"])
def test_a_name_that_is_no_model_is_an_error_that_names_the_four(tmp_path, name):
    with pytest.raises(ValueError, match=r"must be 124M, 355M, 774M, 1558M, or .* not"):
        load_encoder_hparams_and_params(name, tmp_path)
    assert not os.listdir(tmp_path)
