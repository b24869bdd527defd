"""What ranks of FSDP2 hold and exchange: as predicted, and as the committed rows say."""

import csv
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TICKET = "ticket 5 %, packed, float32 states, master"


@pytest.fixture(scope="module")
def rows():
    """Way -> its committed rows, by the number of ranks."""
    with (BENCHMARKS / "results" / "static" / "sharded.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    number = {column for column in table[0] if column != "way"}
    found = [{key: int(value) if key in number else value for key, value in row.items()} for row in table]
    return {(row["way"], row["ranks"]): row for row in found}


def test_every_row_is_predicted_within_five_percent(rows):
    assert {ranks for _, ranks in rows} == {2, 4}
    for row in rows.values():
        assert row["held"] == row["weights"] + row["gradients"] + row["states"]
        assert row["held"] == pytest.approx(row["predicted"], rel=0.05), row["way"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("density", [1, 5, 20])
def test_compressed_gradients_take_density_times_the_bytes(density, ranks, rows):
    name = TICKET.replace("5 %", f"{density} %")
    whole, compressed = rows[name, ranks], rows[f"{name}, compressed", ranks]
    assert whole["reduce_scatter"] == rows["AdamW, all bfloat16", ranks]["reduce_scatter"]
    assert compressed["reduce_scatter"] <= 1.05 * density / 100 * whole["reduce_scatter"]
    assert compressed["all_gather"] == whole["all_gather"] and compressed["all_reduce"] == whole["all_reduce"] == 0


@pytest.mark.slow
def test_the_rows_are_what_ranks_count(rows, monkeypatch):
    pytest.importorskip("peft", reason="the peer LoRA needs peft")
    pytest.importorskip("bitsandbytes", reason="the peer QLoRA needs the extra quantised")
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = [TICKET, f"{TICKET}, compressed", "AdamW, all bfloat16"]
    names += ["LoRA, rank 16, bfloat16 weights", "QLoRA, rank 16, nf4 weights"]
    found = importlib.import_module("bench_sharded").rows(2, names)
    assert found == [rows[row["way"], 2] for row in found]
