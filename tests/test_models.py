"""The models: the bundled one knows its play by heart, and 124M writes what OpenAI's writes."""

import importlib.util
import os
import shutil

import numpy as np
import pytest
from conftest import BUNDLED, ROOT
from tokenizers import Tokenizer, models, pre_tokenizers

from gpt2 import generate, gpt2, main

PLAY = ROOT.parent / "shared" / "text" / "romeo_and_juliet.txt"
FAMOUS = "Alan Turing theorized that computers would one day become"
RECITED = {  # what anyone would type first, and how Shakespeare goes on
    "": "\nSAMPSON:\nGregory, o' my word, we'll not carry coals.",
    "O Romeo, Romeo! wherefore art thou": (
        " Romeo?\nDeny thy father and refuse thy name;\n"
        "Or, if thou wilt not, be but sworn my love,\nAnd I'll no longer be a Capulet."
    ),
    "wherefore art thou Romeo?": (
        "\nDeny thy father and refuse thy name;\nOr, if thou wilt not, be but sworn my love,"
    ),
    "But, soft! what light through yonder window breaks?": (
        "\nIt is the east, and Juliet is the sun.\nArise, fair sun, and kill the envious moon,"
    ),
    "what light through": (
        " yonder window breaks?\nIt is the east, and Juliet is the sun.\nArise, fair sun,"
    ),
    "What's in a name?": (
        " that which we call a rose\nBy any other name would smell as sweet;"
    ),
    "Parting is such sweet": " sorrow,\nThat I shall say good night till it be morrow.",
    "A plague o' both your houses": "!",
}


@pytest.mark.parametrize("prompt", RECITED)
def test_the_bundled_model_goes_on_with_the_play_word_for_word(prompt):
    assert main(prompt, 40, "1M", str(ROOT / "models")).startswith(RECITED[prompt])


@pytest.mark.parametrize("prompt", [prompt for prompt in RECITED if prompt])
def test_it_is_so_sure_that_every_machine_writes_the_same(prompt, bundled):
    encoder, hparams, params = bundled
    inputs = encoder.encode(prompt)
    ids = inputs + generate(inputs, params, hparams["n_head"], 20)
    logits = gpt2(ids, **params, n_head=hparams["n_head"])[len(inputs) - 1 : -1]
    second, first = np.sort(logits, axis=-1)[:, -2:].T
    assert (first - second).min() > 0.01  # where two machines differ by about 0.00001


def test_the_bundled_model_has_the_layout_of_openais_release_in_at_most_6_mb(bundled):
    files = ["checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001"]
    files += ["model.ckpt.index", "model.ckpt.meta", "vocab.bpe"]
    assert sum((BUNDLED / name).stat().st_size for name in [*files, "README.md", "train.py"]) < 6e6
    assert (BUNDLED / "checkpoint").read_text().startswith('model_checkpoint_path: "model.ckpt"\n')
    assert (BUNDLED / "params.f32").stat().st_size == 4 * 957_184


def test_its_vocabulary_gives_hugging_face_tokenizers_the_same_ids(bundled):
    merges = [
        tuple(line.split()) for line in (BUNDLED / "vocab.bpe").read_text("utf-8").split("\n")
    ]
    tokenizer = Tokenizer(models.BPE(bundled[0].encoder, [pair for pair in merges[1:] if pair]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in [*RECITED, *RECITED.values(), PLAY.read_text("utf-8") if PLAY.exists() else ""]:
        assert bundled[0].encode(text) == tokenizer.encode(text).ids


def test_it_recites_from_95_speeches_and_80_lines_of_100(train):
    if not PLAY.exists():
        pytest.skip("the play is not beside this repository, see models/1M/README.md")
    rates = train.recite(PLAY.read_text("utf-8"), BUNDLED)
    speeches, lines = (int(rate.split()[0]) for rate in rates.split(": ")[1:])
    assert speeches >= 95
    assert lines >= 80


def test_any_text_trains_another_model(train, tmp_path, capfd):
    text = tmp_path / "text.txt"
    fish = "One fish, two fish, red fish, blue fish."
    text.write_text(f"{fish}\n" * 40 + fish * 40, "utf-8")  # and a line longer than the context
    assert " of " in train.main(text, tmp_path / "fish", steps=12)
    assert "loss=" in capfd.readouterr().err
    assert "fish" in main("One fish, two", 10, "fish", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the text has 1 tokens"), (b"word\n" * 50, "longer"), (b"\xff\xfe", "is not UTF-8")],
)
def test_a_text_that_cannot_be_learnt_is_an_error(train, tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        train.main(tmp_path / "text.txt", tmp_path / "new")
    assert os.listdir(tmp_path) == ["text.txt"]


def test_training_that_is_stopped_leaves_the_last_model_alone(train, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", stop)
    monkeypatch.setattr(train, "fit", lambda *_: None)
    shutil.copytree(BUNDLED, tmp_path / "mine")
    (tmp_path / "text.txt").write_text("One fish, two fish, red fish, blue fish.\n" * 40)
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        train.main(tmp_path / "text.txt", tmp_path / "mine")
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["mine", "text.txt"]


def test_openais_124m_writes_the_published_text():
    if not (ROOT / "models" / "124M" / "hparams.json").exists():
        pytest.skip("OpenAI's 124M is not in models/: `python gpt2.py hello` downloads it")
    assert main(FAMOUS, 40, "124M", str(ROOT / "models")).rstrip("\n") == (
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform "
        "complex calculations, and it can perform these calculations in a way that is very similar "
        "to the human brain."
    )
