"""The models: the bundled one knows its play by heart, and 124M writes what OpenAI's writes."""

import math
import re

import pytest
from conftest import BUNDLED, ROOT
from safetensors import safe_open

from gpt2 import main

PLAY = ROOT.parent / "shared" / "text" / "romeo_and_juliet.txt"
RECITED = {  # what anyone would type first, and how Shakespeare goes on
    "": "\nSAMPSON:\nGregory, o' my word, we'll not carry coals.",
    "O Romeo, Romeo! wherefore art thou": " Romeo?\nDeny thy father and refuse thy name;\nOr, if",
    "wherefore art thou Romeo?": "\nDeny thy father and refuse thy name;\nOr, if thou wilt not,",
    "But, soft! what light through yonder window breaks?": "\nIt is the east, and Juliet is the",
    "what light through": " yonder window breaks?\nIt is the east, and Juliet is the sun.\nArise,",
    "What's in a name?": " that which we call a rose\nBy any other name would smell as sweet;",
    "parting is such": "\nsweet sorrow,\nThat I shall say good night till it be morrow.",
    "A plague o' both your houses": "!",
}


@pytest.mark.parametrize("prompt", RECITED)
def test_the_bundled_model_continues_the_play_word_for_word(prompt):
    assert main(prompt, 40, "1M").startswith(RECITED[prompt])


def test_the_bundled_model_has_hugging_faces_layout_and_less_than_6_mb_and_a_half():
    committed = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert sum((BUNDLED / name).stat().st_size for name in committed) < 6.5e6
    assert sorted(path.name for path in BUNDLED.iterdir()) == committed
    with safe_open(BUNDLED / "model.safetensors", "numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    assert sum(map(math.prod, shapes)) == 1_442_240


def test_the_bundled_model_continues_the_play_from_any_place(train, monkeypatch):
    if not PLAY.exists():
        pytest.skip("the play is not beside this repository, see models/1M/README.md")
    monkeypatch.setattr(train, "N_ASKED", 100)
    told = train.recite(PLAY.read_text("utf-8"), BUNDLED)
    n_asked, n_right = map(int, re.search(r"^(\d+) of 100 .* After (\d+) of these", told).groups())
    assert n_right >= 0.95 * n_asked >= 80, told


def test_openais_124m_writes_the_published_text():
    if not (ROOT / "models" / "124M").exists():
        pytest.skip("OpenAI's 124M is not in models/: `python gpt2.py hello` downloads it")
    text = main("Alan Turing theorized that computers would one day become", 40, "124M")
    assert text.rstrip("\n") == (
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform "
        "complex calculations, and it can perform these calculations in a way that is very similar "
        "to the human brain."
    )
