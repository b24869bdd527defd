"""Stage 2 end to end on a tiny model: learning, the best epoch, resuming, baking, and what is refused."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from helpers.bits import weights
from helpers.interruptions import StopAfter
from helpers.prompt_runs import SHORT, delta_bits, rank, run
from helpers.ranks import free_port, start
from helpers.tiny_nli import TinyPair, ticket_of, tiny_language_model, toy_pairs
from transformers import TrainerCallback

import ltp_sparse as ls
from ltp_sparse.methods import LTP, PromptOnly, RandomTicket, SoftPrompt
from ltp_sparse.methods.prompt_learning import prompt_encoder
from ltp_sparse.prompting import Verbalizer, collator
from ltp_sparse.training import fit
from ltp_sparse.training.evaluation import evaluate
from ltp_sparse.training.method import load_trained
from ltp_sparse.weights.names import canonical_parameters


def assert_same_bits(one: ls.SparseDelta, other: ls.SparseDelta) -> None:
    assert one.ticket == other.ticket
    mine, theirs = delta_bits(one), delta_bits(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name].view(torch.int32), theirs[name].view(torch.int32)), name


def test_ltp_learns_the_toy_task_and_transfers(tokenizer):
    model = tiny_language_model(len(tokenizer))
    method = LTP(settings=dataclasses.replace(SHORT, epochs=10, learning_rate=1e-2))
    result = run(tokenizer, method, model=model, ticket=ticket_of(model, 0.5), train=toy_pairs(48))
    test = {"en": toy_pairs(60, seed=9), "xx": toy_pairs(30, seed=10, language="xx")}
    accuracies = evaluate(result, test, progress=False)
    assert min(accuracies.values()) > 0.9
    assert len(result.dev_scores) == 10
    assert result.seconds > 0


@pytest.mark.slow
def test_one_update_per_batch_and_epoch(tokenizer):
    """70 updates for 24 pairs or fewer, 140 for 48."""
    for pairs, per_epoch in ((24, 1), (32, 1), (33, 2), (48, 2)):
        steps = []

        class Count(TrainerCallback):
            def on_train_end(self, args, state, control, steps=steps, **kwargs) -> None:
                steps.append(state.global_step)

        short = LTP(settings=dataclasses.replace(SHORT, epochs=2))
        run(tokenizer, short, train=toy_pairs(pairs), callbacks=[Count()])
        assert steps == [2 * per_epoch]


def test_first_best_epoch_is_kept(tokenizer, monkeypatch, caplog):
    """Strictly better wins; the kept weights are those of that epoch and not live ones (trap 9)."""
    scores = iter([0.2, 0.6, 0.4, 0.6, 0.5, 0.1])
    monkeypatch.setattr(fit, "_metrics", lambda prediction: {"accuracy": next(scores)})
    with caplog.at_level(logging.INFO, "ltp_sparse"):
        result = run(tokenizer)
    assert result.best_epoch == 2
    assert result.dev_scores == (0.2, 0.6, 0.4, 0.6, 0.5, 0.1)
    assert result.delta.metadata["epoch"] == 2
    assert result.delta.metadata["dev_score"] == 0.6
    assert "LTP: epoch 2 is kept, dev accuracy 0.6000" in caplog.text
    # a run of two epochs, the second of which is the best, ends with the same bits
    scores = iter([0.2, 0.6])
    monkeypatch.setattr(fit, "_metrics", lambda prediction: {"accuracy": next(scores)})
    short = run(tokenizer, LTP(settings=dataclasses.replace(SHORT, epochs=2)))
    assert_same_bits(result.delta, short.delta)


def test_dev_scores_is_that_of_the_kept_model(tokenizer):
    dev = toy_pairs(15, seed=1)
    result = run(tokenizer, dev=dev, dropout=0.1)
    measured = evaluate(result, {"dev": dev}, progress=False)["dev"]
    assert measured == pytest.approx(max(result.dev_scores))
    assert result.dev_scores.index(max(result.dev_scores)) == result.best_epoch - 1


@pytest.mark.slow
def test_same_seed_same_bits_and_another_seed_others(tokenizer):
    first, second, other = (run(tokenizer, dropout=0.1, seed=seed) for seed in (1, 1, 2))
    assert_same_bits(first.delta, second.delta)
    assert first.dev_scores == second.dev_scores
    assert not torch.equal(first.delta.dense["prompt_encoder.rows"], other.delta.dense["prompt_encoder.rows"])


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_a_killed_run_resumes_to_the_same_bits(tokenizer, tmp_path, killed_at):
    """Dropout, order of pairs, moments, the best epoch so far and the history all continue."""
    options = {"dropout": 0.1, "train": toy_pairs(48), "seed": 4}
    method = LTP(settings=dataclasses.replace(SHORT, epochs=4))
    whole = run(tokenizer, method, **options)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, method, **options, output_dir=folder, save_every=1, callbacks=[StopAfter(killed_at)])
    resumed = run(tokenizer, method, **options, output_dir=folder, save_every=1, resume=True)
    assert_same_bits(resumed.delta, whole.delta)
    assert_same_bits(resumed.baked, whole.baked)
    assert resumed.dev_scores == whole.dev_scores
    assert resumed.best_epoch == whole.best_epoch


@pytest.mark.slow
def test_a_run_that_starts_anew_is_not_resumed_from_an_earlier_one(tokenizer, tmp_path):
    """Of the two runs in a folder the earlier one went further."""
    slow = LTP(settings=dataclasses.replace(SHORT, learning_rate=1e-4))
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, output_dir=tmp_path, save_every=1, callbacks=[StopAfter(5)])
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, slow, output_dir=tmp_path, save_every=3, callbacks=[StopAfter(2)])
    resumed = run(tokenizer, slow, output_dir=tmp_path, save_every=3, resume=True)
    assert_same_bits(resumed.delta, run(tokenizer, slow).delta)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_settings(tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, output_dir=tmp_path, save_every=1, callbacks=[StopAfter(2)])
    before = sorted(path.name for path in tmp_path.rglob("*"))
    slow = LTP(settings=dataclasses.replace(SHORT, learning_rate=1e-4))
    with pytest.raises(ValueError, match=rf"learning_rate {SHORT.learning_rate}, now 0.0001; resume it with these"):
        run(tokenizer, slow, output_dir=tmp_path, save_every=1, resume=True)
    with pytest.raises(ValueError, match="with seed 1, now 2"):
        run(tokenizer, output_dir=tmp_path, save_every=1, resume=True, seed=2)
    with pytest.raises(ValueError, match="with metric 'accuracy', now 'loss'"):
        run(tokenizer, output_dir=tmp_path, save_every=1, resume=True, metric="loss")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    run(tokenizer, output_dir=tmp_path, save_every=1, resume=True)


@pytest.mark.slow
def test_checkpoints_come_every_so_many_epochs_and_the_latest_is_kept(tokenizer, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs) -> None:
            seen.append(state.epoch)

    result = run(tokenizer, output_dir=tmp_path, save_every=2, callbacks=[Watch()])
    assert seen == [2, 4, 6]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert ls.SparseDelta.load(tmp_path / "best.safetensors").metadata["epoch"] == result.best_epoch
    # a finished run that is resumed gives its result again
    again = run(tokenizer, output_dir=tmp_path, save_every=2, resume=True)
    assert_same_bits(again.delta, result.delta)


def test_nothing_of_the_size_of_the_model_is_kept(tokenizer, tmp_path):
    model = tiny_language_model(len(tokenizer))
    ticket = ticket_of(model, 0.02)
    method = LTP(settings=dataclasses.replace(SHORT, encoder="none", epochs=2))
    result = run(tokenizer, method, model=model, ticket=ticket, output_dir=tmp_path, save_every=1)
    checkpoint = tmp_path / "checkpoint-2"
    held = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    tensors = 8 * ticket.k + 8 * 4 * 32  # two values per active entry, and those of the prompt
    for name in ("delta.safetensors", "best.safetensors", "optimizer.pt"):
        assert held[name] < 30_000 + 2 * tensors, held
    assert result.optimizer_bytes < 8 * (ticket.k + 128) + ticket.n / 8 + 10_000
    model_bytes = 4 * sum(p.numel() for p in model.parameters())
    assert max(held.values()) < model_bytes / 2, held


@pytest.mark.parametrize("method", [LTP, PromptOnly, SoftPrompt])
def test_a_saved_result_works_without_the_encoder_and_is_taken_back(tokenizer, tmp_path, method):
    result = run(tokenizer, method(settings=SHORT))
    base = tiny_language_model(len(tokenizer), decoupled=method is not SoftPrompt)
    before = weights(base)
    examples = result.encode(toy_pairs(12, seed=5))
    batch = collator(1)(examples)
    with torch.no_grad():
        expected = result.model(**batch)["logits"]

    result.delta.save(tmp_path / "delta.safetensors")
    result.baked.save(tmp_path / "baked.safetensors")
    assert set(result.baked.dense) == {"prompt_encoder.rows"}
    assert result.baked.dense["prompt_encoder.rows"].shape == (4, 32)
    for name in ("delta", "baked"):
        delta = ls.SparseDelta.load(tmp_path / f"{name}.safetensors")
        setup = load_trained(base, tokenizer, delta)
        assert setup.encode(toy_pairs(12, seed=5)) == examples
        with torch.no_grad():
            assert torch.equal(setup.model(**batch)["logits"], expected)
        delta.revert(setup.model)
        assert all(torch.equal(weights(base)[n], before[n]) for n in before)
    if method is not SoftPrompt:
        assert result.baked.nbytes < result.delta.nbytes


def test_the_language_model_goes_back_to_its_initial_bits(tokenizer):
    model = tiny_language_model(len(tokenizer))
    before = weights(model)
    ticket = ticket_of(model)
    result = run(tokenizer, model=model, ticket=ticket)
    assert any(not torch.equal(weights(model)[n], before[n]) for n in before)
    for method in (LTP(settings=SHORT), PromptOnly(settings=SHORT)):
        with pytest.raises(ValueError, match="result of an earlier run; call result.release"):
            run(tokenizer, method, model=model, **({"ticket": ticket} if method.needs_ticket else {}))
    result.delta.revert(result.model)
    assert all(torch.equal(weights(model)[n], before[n]) for n in before)
    again = run(tokenizer, model=model, ticket=ticket)
    assert_same_bits(again.delta, result.delta)


def test_a_run_that_fails_leaves_the_language_model_as_it_was(tokenizer):
    model = tiny_language_model(len(tokenizer))
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, model=model, callbacks=[StopAfter(3)])
    assert all(torch.equal(weights(model)[n], before[n]) for n in before)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.filterwarnings("ignore:SparseTrainer. the ticket was selected on another base")
def test_a_ticket_of_other_weights_is_refused(tokenizer):
    ticket = ticket_of(tiny_language_model(len(tokenizer), seed=1))
    for method in (LTP(settings=SHORT), RandomTicket(settings=SHORT)):
        model = tiny_language_model(len(tokenizer))
        before = weights(model)
        wanted = r"selected on other initial weights than these: 'roberta\..*' differs"
        with pytest.raises(ValueError, match=wanted):
            run(tokenizer, method, model=model, ticket=ticket)
        assert all(torch.equal(weights(model)[n], before[n]) for n in before)


def test_a_frozen_entry_that_moves_is_an_error(tokenizer):
    class Vandal(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            with torch.no_grad():
                model.lm_head.layer_norm.bias[0] += 1e-6

    with pytest.raises(RuntimeError, match=r"'lm_head.layer_norm.bias' that must not train have changed"):
        run(tokenizer, callbacks=[Vandal()])
    run(tokenizer, callbacks=[Vandal()], check_frozen=False)


def test_inactive_entries_of_the_ticket_are_watched_too(tokenizer):
    model = tiny_language_model(len(tokenizer))
    ticket = ticket_of(model)
    name = "roberta.encoder.layer.1.output.dense.weight"
    inactive = (~ticket.mask(name)).nonzero()[0].tolist()

    class Vandal(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            with torch.no_grad():
                canonical_parameters(model)[name][tuple(inactive)] += 1e-6

    with pytest.raises(RuntimeError, match=f"'{name}' that must not train have changed"):
        run(tokenizer, model=model, ticket=ticket, callbacks=[Vandal()])


def test_micro_batches_give_the_update_of_the_whole_batch(tokenizer):
    """Also when the last micro-batch is smaller: 22 pairs as 8 + 8 + 6."""
    method = LTP(settings=dataclasses.replace(SHORT, epochs=2))
    train = toy_pairs(22)
    whole = run(tokenizer, method, train=train)
    parts = run(tokenizer, method, train=train, micro_batch_size=8)
    for name, values in delta_bits(whole.delta).items():
        torch.testing.assert_close(delta_bits(parts.delta)[name], values, atol=3e-5, rtol=1e-4, msg=name)


def test_clipping_sees_active_and_prompt_gradients_only(tokenizer):
    """The logged norm is that of the ticket's entries and the prompt encoder, before clipping to 1."""
    model = tiny_language_model(len(tokenizer))
    ticket, pairs, logged = ticket_of(model), toy_pairs(24), []

    class Norms(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            logged.extend([logs["grad_norm"]] if "grad_norm" in logs else [])

    method = LTP(settings=dataclasses.replace(SHORT, epochs=1))
    result = run(tokenizer, method, model=model, ticket=ticket, train=pairs, callbacks=[Norms()])
    # the same first step by hand
    fresh = tiny_language_model(len(tokenizer))
    reference = load_trained(fresh, tokenizer, result.delta).model
    result.delta.revert(reference)
    reference.prompt_encoder = prompt_encoder(method.settings, fresh, tokenizer, 1)
    reference(**collator(1)(result.encode(pairs)))["loss"].backward()
    total = sum(float(p.grad.double().square().sum()) for p in reference.prompt_encoder.parameters())
    for name, parameter in canonical_parameters(fresh).items():
        if name in ticket.sets and parameter.grad is not None:
            total += float(parameter.grad.double()[ticket.mask(name)].square().sum())
    assert logged[0] == pytest.approx(total**0.5, rel=1e-4)


def test_bfloat16_keeps_float32_weights_and_deltas(tokenizer):
    """Trap 8."""
    result = run(tokenizer, bf16=True)
    exact = run(tokenizer)
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert all(t.dtype == torch.float32 for t in delta_bits(result.delta).values())
    name = "roberta.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(result.delta.values[name], exact.delta.values[name])


def test_vocabulary_init_starts_from_word_embeddings(tokenizer):
    model = tiny_language_model(len(tokenizer))
    settings = dataclasses.replace(SHORT, init="vocabulary", encoder="none")
    encoder = prompt_encoder(settings, model, tokenizer, seed=1)
    embedding = model.get_input_embeddings().weight
    at = [(embedding == row).all(1).nonzero().item() for row in encoder.rows]
    assert len(set(at)) == 4
    assert not set(at) & set(tokenizer.all_special_ids)


class Rates(TrainerCallback):
    """The learning rate of every update, and the optimizer."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        self.rates, self.optimizer = [], getattr(optimizer, "optimizer", optimizer)

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs) -> None:
        self.rates.append(lr_scheduler.get_last_lr()[0])


def test_every_setting_reaches_the_optimizer(tokenizer):
    settings = dataclasses.replace(
        SHORT, learning_rate=1e-2, schedule="linear", warmup=0.5, max_steps=4, weight_decay=0.3, max_grad_norm=0.7
    )
    seen = Rates()
    run(tokenizer, LTP(settings=settings), callbacks=[seen], states="8bit", gradients="dense")
    assert seen.rates == pytest.approx([0.0, 5e-3, 1e-2, 5e-3])  # half of four updates is warm-up
    assert [group["weight_decay"] for group in seen.optimizer.param_groups] == [0.3, 0.3]
    assert seen.optimizer.max_grad_norm == 0.7 and seen.optimizer.precision.states == "8bit"
    assert not seen.optimizer._packs
    constant = Rates()
    run(tokenizer, LTP(settings=dataclasses.replace(SHORT, max_grad_norm=0.0)), callbacks=[constant])
    assert constant.rates == pytest.approx([SHORT.learning_rate] * 6)
    assert constant.optimizer.max_grad_norm is None and constant.optimizer._packs


def test_own_words_and_further_arguments(tokenizer, tmp_path):
    words = {"contradiction": "word1", "entailment": "word2", "neutral": ["word3", "word4"]}
    verbalizer = Verbalizer.from_words(tokenizer, words)
    seen = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            seen.update(run_name=args.run_name, report_to=args.report_to, decay=args.weight_decay, seed=args.seed)

    arguments = {"run_name": "mine"}
    result = run(tokenizer, verbalizer=verbalizer, arguments=arguments, callbacks=[Look()], seed=7)
    assert result.delta.metadata["verbalizer"] == [list(ids) for ids in verbalizer.token_ids]
    assert seen == {"run_name": "mine", "report_to": [], "decay": 0.0, "seed": 7}
    model = load_trained(tiny_language_model(len(tokenizer)), tokenizer, result.baked).model
    assert model.word_ids.tolist() == result.model.word_ids.tolist()


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tokenizer, tmp_path):
    """DDP on gloo: each rank takes half of the batch, and clipping sees the whole gradient."""
    start(rank, (2, free_port(), str(tmp_path / "two.pt")), 2)
    two = torch.load(tmp_path / "two.pt")
    one = run(tokenizer, train=toy_pairs(32))
    assert two.pop("dev").tolist() == pytest.approx(one.dev_scores)
    for name, values in delta_bits(one.delta).items():
        torch.testing.assert_close(two[name], values, atol=3e-5, rtol=1e-4, msg=name)


def test_errors_come_before_training(tokenizer):
    unlabelled = [TinyPair("word1", "word2", None)]
    with pytest.raises(ValueError, match="expected labelled examples in train, got none or some without a label"):
        run(tokenizer, train=unlabelled)
    with pytest.raises(ValueError, match="expected labelled examples in dev"):
        run(tokenizer, dev=unlabelled)
    with pytest.raises(ValueError, match="max_length must be at most 64, the positions of the model, got 256"):
        run(tokenizer, LTP())
    with pytest.raises(ValueError, match="save_every and resume need an output_dir"):
        run(tokenizer, resume=True)
    with pytest.raises(ValueError, match="save_every must be at least 1"):
        run(tokenizer, output_dir="unused", save_every=-1)
    with pytest.raises(
        ValueError, match="batch of 32 examples must be a multiple of micro_batch_size x processes, got 5 x 1"
    ):
        run(tokenizer, micro_batch_size=5)
    with pytest.raises(ValueError, match="LTP: expected the ticket of stage 1"):
        run(tokenizer, ticket=None)


def test_a_foreign_delta_is_refused(tokenizer):
    model = tiny_language_model(len(tokenizer))
    foreign = ls.SparseDelta.between(model, model, ticket_of(model))
    with pytest.raises(ValueError, match="expected a delta of train_method, but this one has no 'method'"):
        load_trained(model, tokenizer, foreign)
