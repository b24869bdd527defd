"""A model, a ticket and labelled data of one's own, and a run that was trained on them."""

import pytest
from helpers.own_data import COLUMNS, QUICK, WORDS_GIVEN, rows, run, write_tsv
from helpers.tiny_nli import tiny_language_model, tiny_tokenizer

import ltp_sparse as ls


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    tokenizer = tiny_tokenizer()
    model = tiny_language_model(len(tokenizer), decoupled=False)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    ls.Ticket.random(dict(ls.canonical_parameters(model)), density=0.5, seed=0, pool=ls.selection.pools.maskable).save(
        root / "ticket.safetensors"
    )
    write_tsv(root / "train.tsv", rows(48))
    write_tsv(root / "dev.tsv", rows(16, seed=1))
    write_tsv(root / "test.tsv", rows(24, seed=2))
    return root


@pytest.fixture(scope="module")
def own_run(own_files):
    folder = own_files / "run"
    data = [
        "--train",
        own_files / "train.tsv",
        "--dev",
        own_files / "dev.tsv",
        "--test",
        own_files / "test.tsv",
        *COLUMNS,
    ]
    model = ["--model", own_files / "model", "--ticket", own_files / "ticket.safetensors"]
    assert run("train", *model, *data, *COLUMNS, *WORDS_GIVEN, *QUICK, "--output", folder) == 0
    return folder
