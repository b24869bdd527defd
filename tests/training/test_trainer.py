"""`SparseTrainer` and `KeepBest`: what moves, what is kept on disk, and that a resumed run is the uninterrupted one."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same, weights
from helpers.interruptions import StopAfter
from torch import nn

pytest.importorskip("transformers")

from transformers import TrainerCallback, TrainingArguments, XLMRobertaConfig, XLMRobertaForSequenceClassification

from ltp_sparse import FileFormatError, SparseDelta, Ticket, canonical_parameters
from ltp_sparse.selection import pools
from ltp_sparse.training.run_folder import begin, last_checkpoint
from ltp_sparse.training.trainer import BEST_FILE, DELTA_FILE, KeepBest, SparseTrainer
from ltp_sparse.weights import manifest

EXAMPLES, BATCH, EPOCHS = 24, 4, 3
STEPS_PER_EPOCH = EXAMPLES // BATCH


def build_model(dropout=0.1):
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, type_vocab_size=1, num_labels=3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return XLMRobertaForSequenceClassification(config)


def dataset(size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 40, (size, 10), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in ids]


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder), "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH,
        "learning_rate": 5e-3, "lr_scheduler_type": "linear", "max_grad_norm": 0.5, "seed": 7,
        "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **options})


def ticket_of(model):
    return Ticket.random(model, density=0.2, seed=3, pool=pools.maskable)


def build(folder, *, model=None, trainer_options=None, **options):
    model = model or build_model()
    return SparseTrainer(
        model,
        arguments(folder, **options),
        ticket_of(model),
        dense=model.classifier,
        train_dataset=dataset(EXAMPLES),
        eval_dataset=dataset(8, seed=2),
        **{"keep_best": KeepBest(), **(trainer_options or {})},
    )


class Snapshots(TrainerCallback):
    """The weights at every evaluation, by step."""

    def __init__(self):
        self.at = {}

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = weights(model)


def test_only_active_and_dense_entries_move(tmp_path):
    trainer = build(tmp_path, trainer_options={"keep_best": None})
    before, ticket = weights(trainer.model), trainer.ticket
    flags = [p.requires_grad for p in trainer.model.parameters()]
    trainer.train()
    after = weights(trainer.model)
    for name in before:
        moved = before[name] != after[name]
        if name.startswith("classifier."):
            assert moved.any(), name
        elif name in ticket.names:
            assert moved.any() and not moved[~ticket.mask(name)].any(), name
        else:
            assert not moved.any(), name
    assert [p.requires_grad for p in trainer.model.parameters()] == flags


def test_observed_norm_and_schedule_are_logged(tmp_path):
    """The logged norm is that of active and dense entries before clipping, recomputed here from the raw gradients."""
    trainer = build(tmp_path, trainer_options={"keep_best": None})
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            total = 0.0
            for name, p in canonical_parameters(model).items():
                if name.startswith("classifier."):
                    total += float(p.grad.double().square().sum())
                elif name in trainer.ticket.active_names:
                    total += float(p.grad[trainer.ticket.mask(name)].double().square().sum())
            norms.append(total**0.5)

    trainer.add_callback(Norm())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == EPOCHS * STEPS_PER_EPOCH
    assert [entry["grad_norm"] for entry in logs] == pytest.approx(norms, rel=1e-6)
    assert max(norms) > 0.5  # the limit was reached, so what is logged is the norm before clipping
    total = EPOCHS * STEPS_PER_EPOCH
    assert [entry["learning_rate"] for entry in logs] == pytest.approx([5e-3 * (1 - s / total) for s in range(total)])


def test_nan_gradients_of_inactive_entries_do_not_spread(tmp_path):
    trainer = build(tmp_path, trainer_options={"keep_best": None})
    before, ticket = weights(trainer.model), trainer.ticket
    for name in ticket.active_names:
        mask = ticket.mask(name)
        canonical_parameters(trainer.model)[name].register_hook(lambda g, m=mask: g.masked_fill(~m, torch.nan))
    trainer.train()
    for name, parameter in canonical_parameters(trainer.model).items():
        assert parameter.isfinite().all(), name
        if name in ticket.names:
            assert torch.equal(parameter[~ticket.mask(name)], before[name][~ticket.mask(name)]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_steps", "killed_at", "options"),
    [
        pytest.param(5, 8, {}, id="mid-epoch"),
        pytest.param(6, 7, {}, id="epoch-boundary", marks=pytest.mark.slow),
        pytest.param(2, 5, {"gradient_accumulation_steps": 2}, id="accumulation", marks=pytest.mark.slow),
        pytest.param(5, 12, {"bf16": True}, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_is_the_uninterrupted_run(tmp_path, save_steps, killed_at, options):
    options = {"save_strategy": "steps", "save_steps": save_steps, **options}
    extra = {"pull": 1e-3}
    whole = build(tmp_path / "whole", trainer_options=extra, **options)
    whole.train()

    killed = build(tmp_path / "killed", trainer_options={**extra, "callbacks": [StopAfter(killed_at)]}, **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = build(tmp_path / "killed", trainer_options=extra, **options)
    torch.manual_seed(123)  # whatever state the new process happens to be in
    resumed.train(resume_from_checkpoint=True)

    assert resumed.resumed_from.name == f"checkpoint-{killed_at // save_steps * save_steps}"
    assert_same(weights(whole.model), weights(resumed.model))
    assert whole.keep_best.best == resumed.keep_best.best
    one, two = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert one.keys() == two.keys() and one
    for index in one:
        assert_same(one[index], two[index])
    # The wall clock is the only difference between the two histories.
    histories = [
        [{k: v for k, v in e.items() if not k.endswith(("_runtime", "_per_second"))} for e in t.state.log_history[:-1]]
        for t in (whole, resumed)
    ]
    assert histories[0] == histories[1]


def test_a_finished_run_that_is_resumed_takes_no_further_step(tmp_path):
    """It ends within an epoch, of which the Trainer would train a further batch."""
    options = {"max_steps": STEPS_PER_EPOCH + 2, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = (build(tmp_path, **options) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == STEPS_PER_EPOCH + 2
    assert whole.keep_best.best == resumed.keep_best.best
    assert_same(weights(whole.model), weights(resumed.model))


def test_checkpoints_hold_what_has_changed_only(tmp_path):
    trainer = build(tmp_path, save_strategy="steps", save_steps=6, save_total_limit=1)
    trainer.train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    k = trainer.ticket.k + sum(p.numel() for p in trainer.model.classifier.parameters())
    tensors = sum((checkpoint / name).stat().st_size for name in (DELTA_FILE, BEST_FILE, "optimizer.pt"))
    n = sum(p.numel() for p in trainer.model.parameters())
    assert tensors < (8 + 8 + 8) * k + n // 4 + 40_000  # delta, best delta, moments; indices; headers of many tensors
    assert not list(checkpoint.glob("model*")) and not list(checkpoint.glob("*.bin"))
    assert (checkpoint / BEST_FILE).samefile(tmp_path / BEST_FILE)


class Scripted:
    """Metrics in a given order, whatever the model says."""

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, prediction):
        return {"accuracy": next(self.values)}


def test_first_best_wins_and_is_restored(tmp_path):
    values = [float("nan"), 0.3, 0.7, 0.5, 0.7, 0.1]
    seen = Snapshots()
    keep = KeepBest("accuracy")
    options = {"keep_best": keep, "compute_metrics": Scripted(values), "callbacks": [seen]}
    trainer = build(tmp_path, trainer_options=options, eval_steps=3)
    base = weights(trainer.model)
    trainer.train()
    assert keep.best == {"metric": "eval_accuracy", "value": 0.7, "step": 9, "epoch": 1.5}
    assert_same(weights(trainer.model), seen.at[9])
    assert any(not torch.equal(seen.at[9][name], seen.at[18][name]) for name in base)

    delta = SparseDelta.load(tmp_path / BEST_FILE)  # a file that works without the trainer
    assert delta.metadata == keep.best
    fresh = build_model()
    delta.apply(fresh)
    assert_same(weights(fresh), seen.at[9])
    delta.revert(fresh)
    assert_same(weights(fresh), base)


def test_losses_are_minimised_by_default():
    assert KeepBest().greater_is_better is False and KeepBest("eval_loss").metric == "eval_loss"
    assert KeepBest("f1").greater_is_better is True and KeepBest("f1").metric == "eval_f1"


def test_best_in_memory_writes_no_file(tmp_path):
    seen, keep = Snapshots(), KeepBest("accuracy", on_disk=False)
    options = {"keep_best": keep, "compute_metrics": Scripted([0.1, 0.9, 0.2]), "callbacks": [seen]}
    trainer = build(tmp_path, trainer_options=options, eval_steps=6)
    trainer.train()
    assert not (tmp_path / BEST_FILE).exists()
    assert_same(weights(trainer.model), seen.at[12])


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [True, False])
def test_best_of_abandoned_steps_does_not_decide(tmp_path, on_disk):
    """Killed after a lucky evaluation that no checkpoint holds; the resumed run takes another course."""
    options = {"save_strategy": "steps", "save_steps": 6, "eval_steps": 3}

    def trainer(values, *callbacks):
        keep = KeepBest("accuracy", on_disk=on_disk)
        extra = {"keep_best": keep, "compute_metrics": Scripted(values), "callbacks": list(callbacks)}
        return build(tmp_path, trainer_options=extra, **options)

    with pytest.raises(KeyboardInterrupt):
        trainer([0.2, 0.4, 0.9], StopAfter(10)).train()
    resumed = trainer([0.3, 0.5, 0.1, 0.1])
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.keep_best.best["value"], resumed.keep_best.best["step"]) == (0.5, 12)

    fresh = trainer([0.1, 0.2, 0.1, 0.1, 0.1, 0.1, *[0.05] * 6])
    for expected in (0.2, 0.05):  # nor does the first run of two
        fresh.train()
        assert fresh.keep_best.best["value"] == expected
    with pytest.raises(KeyboardInterrupt):
        trainer([], StopAfter(1)).train()
    assert not (tmp_path / BEST_FILE).exists()


def test_metric_that_never_comes_is_an_error(tmp_path):
    trainer = build(tmp_path, trainer_options={"keep_best": KeepBest("accuracy")}, max_steps=2)
    with pytest.raises(
        ValueError, match=r"no evaluation has given a number for 'eval_accuracy'; metrics seen: .*eval_loss"
    ):
        trainer.train()


def test_evaluation_outside_training_is_not_kept(tmp_path):
    trainer = build(tmp_path, trainer_options={"keep_best": KeepBest("accuracy")})
    trainer.compute_metrics = Scripted([0.4] * 9 + [1.0])
    trainer.train()
    trainer.evaluate()
    assert trainer.keep_best.best["value"] == 0.4


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    trainer = build(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-18"
    state = tmp_path / "checkpoint-18" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    with pytest.warns(
        UserWarning, match=r"checkpoint-18/trainer_state.json: expected .* continuing from .*checkpoint-12"
    ):
        assert last_checkpoint(tmp_path).name == "checkpoint-12"
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-12/trainer_state.json: is missing"):
        assert last_checkpoint(tmp_path).name == "checkpoint-6"
    shutil.rmtree(tmp_path / "checkpoint-6")
    for call in (lambda: last_checkpoint(tmp_path), lambda: build(tmp_path).train(resume_from_checkpoint=True)):
        with pytest.raises(FileFormatError, match="No checkpoint is left to continue from; delete"):
            call()
    manifest.start(tmp_path / "checkpoint-12")  # as if its writing had never come to an end
    shutil.rmtree(tmp_path / "checkpoint-18")
    with pytest.warns(UserWarning, match="interrupted: skipped, no checkpoint is complete"):
        assert last_checkpoint(tmp_path) is None


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", BEST_FILE, DELTA_FILE, "manifest.json"]


def _remove(path):
    path.unlink()


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Checkpoints of a run, and the weights it ends with."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder, save_strategy="steps", save_steps=9, max_steps=18)
    trainer.train()
    return folder, weights(trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [_remove, _flip], ids=["missing", "damaged"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_never_changes_the_result(name, harm, whole_run, tmp_path):
    """The one before it is taken, and told; without one before it, it is an error."""
    folder = shutil.copytree(whole_run[0], tmp_path / "run")
    harm(folder / "checkpoint-18" / name)
    options = {"save_strategy": "steps", "save_steps": 9, "max_steps": 18}
    resumed = build(folder, **options)
    with pytest.warns(UserWarning, match="checkpoint-18.*skipped, continuing from .*checkpoint-9"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_from.name == "checkpoint-9"
    assert_same(weights(resumed.model), whole_run[1])

    harm(folder / "checkpoint-9" / name)
    shutil.rmtree(folder / "checkpoint-18")
    last = build(folder, **options)
    before = weights(last.model)
    for resume in (True, folder / "checkpoint-9"):
        with pytest.raises(FileFormatError, match="checkpoint-9"):
            last.train(resume_from_checkpoint=resume)
    assert_same(weights(last.model), before)


@pytest.mark.slow
def test_the_checkpoint_of_before_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    """A limit of one, and a kill between the files of the second and its manifest."""
    options = {"save_strategy": "steps", "save_steps": 6, "save_total_limit": 1}
    whole = build(tmp_path / "whole", **options)
    whole.train()
    assert [path.name for path in (tmp_path / "whole").glob("checkpoint-*")] == ["checkpoint-18"]
    finish = manifest.finish

    def killed(folder, *names):
        if folder.name == "checkpoint-12":
            raise KeyboardInterrupt
        finish(folder, *names)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "run", **options).train()
    resumed = build(tmp_path / "run", **options)
    with pytest.warns(UserWarning, match="checkpoint-12: its writing was interrupted: skipped, continuing from"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_from.name == "checkpoint-6"
    assert_same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("harm", [_remove, _flip], ids=["missing", "damaged"])
def test_settings_are_needed_to_resume(harm, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 9, "max_steps": 9}
    begin(tmp_path, {"seed": 1}, what="test", resume=False)
    build(tmp_path, **options).train()
    assert begin(tmp_path, {"seed": 1}, what="test", resume=True).name == "checkpoint-9"
    harm(tmp_path / "settings.json")
    with pytest.raises(ValueError, match=r"settings|holds checkpoints of a run with"):
        begin(tmp_path, {"seed": 1}, what="test", resume=True)
    assert (tmp_path / "checkpoint-9").is_dir()


@pytest.mark.parametrize("at", range(1, 4))
def test_restoring_is_all_or_nothing(at, tmp_path, monkeypatch):
    trainer = build(tmp_path, trainer_options={"keep_best": None}, max_steps=2)
    trainer.train()
    trained, delta = weights(trainer.model), trainer.delta()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1)
    moved, calls = weights(trainer.model), []

    def stopped(write):
        calls.append(write)
        if len(calls) == at:
            raise KeyboardInterrupt
        write()

    writes = trainer.base._writes
    with monkeypatch.context() as patched:
        patched.setattr(trainer.base, "_writes", lambda *values: [partial(stopped, one) for one in writes(*values)])
        with pytest.raises(KeyboardInterrupt):
            trainer.base.restore(delta)
    assert_same(weights(trainer.model), moved)
    trainer.base.restore(delta)
    for name in delta.ticket.active_names:
        assert torch.equal(
            weights(trainer.model)[name][delta.ticket.mask(name)], trained[name][delta.ticket.mask(name)]
        )


def test_resuming_on_other_weights_or_from_other_files_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    build(tmp_path, **options).train()
    other = build_model()
    with torch.no_grad():
        other.roberta.embeddings.word_embeddings.weight[0, 0] += 1
    before = weights(other)
    with pytest.raises(ValueError, match="another ticket or another base model"):
        build(tmp_path, model=other, **options).train(resume_from_checkpoint=True)
    assert_same(weights(other), before)
    (shards := tmp_path / "checkpoint-6" / "optimizer_0").mkdir()
    with pytest.raises(ValueError, match="was written with fsdp"):
        build(tmp_path, model=other, **options).train(resume_from_checkpoint=shards.parent)
    shards.rmdir()
    (tmp_path / "checkpoint-6" / DELTA_FILE).unlink()
    with pytest.raises(ValueError, match=f"{DELTA_FILE}: is missing"):
        build(tmp_path, **options).train(resume_from_checkpoint=tmp_path / "checkpoint-6")


def test_arguments_are_not_touched(tmp_path):
    model, args = build_model(), arguments(tmp_path, eval_strategy="no")
    trainer = SparseTrainer(model, args, ticket_of(model), train_dataset=dataset(4))
    assert args.max_grad_norm == 0.5
    assert trainer.create_optimizer().max_grad_norm == 0.5


@pytest.mark.parametrize("l2", [0.0, 0.01], ids=["masked", "coupled"])
def test_every_argument_reaches_the_optimizer(l2, tmp_path):
    model = build_model()
    own = {"learning_rate": 0.25, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.2}
    ticket = Ticket.full(model, pool=pools.maskable) if l2 else ticket_of(model)
    args = arguments(tmp_path, eval_strategy="no", **own)
    groups = SparseTrainer(model, args, ticket, dense=model.classifier, l2=l2).create_optimizer().param_groups
    assert len(groups) == 2
    assert all((g["lr"], g["betas"], g["eps"]) == (0.25, (0.8, 0.95), 1e-5) for g in groups)
    assert {group["weight_decay"] for group in groups} == ({l2, 0.0} if l2 else {0.2})


def test_dense_may_be_a_single_parameter(tmp_path):
    model = build_model()
    bias, weight = model.classifier.out_proj.bias, model.classifier.out_proj.weight
    for dense in (weight, [{"params": weight, "lr": 0.1}]):
        trainer = SparseTrainer(model, arguments(tmp_path, eval_strategy="no"), ticket_of(model), dense=dense)
        assert list(trainer.delta().dense) == ["classifier.out_proj.weight"]
        groups = trainer.create_optimizer().param_groups
        assert groups[1]["params"] == [weight] and not any(bias is p for group in groups for p in group["params"])


def test_refusals(tmp_path):
    model = build_model()
    best = arguments(tmp_path, load_best_model_at_end=True, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="pass keep_best"):
        SparseTrainer(model, best, ticket_of(model))
    with pytest.raises(ValueError, match="not part of the model"):
        SparseTrainer(model, arguments(tmp_path, eval_strategy="no"), ticket_of(model), dense=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="SparseTrainer: dense must be a module, parameters, or parameter groups"):
        SparseTrainer(
            model, arguments(tmp_path, eval_strategy="no"), ticket_of(model), dense=[model.classifier.dense.weight, {}]
        )
    model.roberta.encoder.layer[0].output.dense.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'roberta.encoder.layer.0.output.dense.weight' .* requires_grad off"):
        SparseTrainer(model, arguments(tmp_path, eval_strategy="no"), ticket_of(model))


def test_ticket_of_another_base_warns(tmp_path):
    model = build_model()
    ticket = ticket_of(model)
    ticket.fingerprint = {ticket.active_names[0]: "0" * 32}
    with pytest.warns(UserWarning, match="selected on another base model"):
        SparseTrainer(model, arguments(tmp_path, eval_strategy="no"), ticket)


def test_whole_model_can_still_be_saved(tmp_path):
    trainer = build(tmp_path, trainer_options={"keep_best": None}, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "whole"))
    loaded = XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert_same(weights(loaded), weights(trainer.model))


def test_checkpoint_records_are_plain_json(tmp_path):
    trainer = build(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    state = json.loads((Path(last_checkpoint(tmp_path)) / "trainer_state.json").read_text())
    assert state["global_step"] == 18
    assert SparseDelta.load(last_checkpoint(tmp_path) / BEST_FILE).metadata["step"] == trainer.keep_best.best["step"]


# --- the pull's initial values ---


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_initial_values_exist_once_and_change_nothing(on_disk, tmp_path, monkeypatch):
    """Weights, deltas and files are those of a run that holds them twice, also when it is resumed."""

    def run(folder, resume=False, **options):
        trainer_options = {"pull": 0.01, "keep_best": KeepBest(on_disk=on_disk), **options}
        trainer = build(folder, trainer_options=trainer_options, save_strategy="steps", save_steps=7)
        before = {name: values.clone() for name, values in trainer.base.originals.items()}
        trainer.train(resume_from_checkpoint=resume)
        assert_same(trainer.base.originals, before)
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr("ltp_sparse.optim.snapshot.Snapshot.share", lambda *_: None)
        twice = run(tmp_path / "twice")
    for place in ("device", "host"):
        once = run(tmp_path / place, optimizer_options={"pull_on": place})
        assert_same(weights(once.model), weights(twice.model))
        for trainer, shared in ((once, True), (twice, False)):
            held = trainer._unwrapped_optimizer().initial_values()
            parameters = canonical_parameters(trainer.model)
            for name, values in trainer.base.originals.items():
                assert (values.data_ptr() == held[parameters[name]].data_ptr()) == shared, name
        for file in sorted(p.relative_to(tmp_path / "twice") for p in (tmp_path / "twice").rglob("*.safetensors")):
            assert (tmp_path / place / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file
        assert_same(once.delta().originals, twice.delta().originals)
        shutil.rmtree(tmp_path / place / "checkpoint-14")
        shutil.rmtree(tmp_path / place / "checkpoint-18", ignore_errors=True)
        assert_same(weights(run(tmp_path / place, resume=True).model), weights(twice.model))


def test_weights_edited_before_training_are_not_taken_for_the_base(tmp_path):
    trainer = build(tmp_path, trainer_options={"pull": 0.01, "keep_best": None})
    name = trainer.ticket.active_names[0]
    before = {name: values.clone() for name, values in trainer.base.originals.items()}
    with torch.no_grad():
        canonical_parameters(trainer.model)[name].add_(1)
    trainer.train()
    assert_same(trainer.base.originals, before)
    held = trainer._unwrapped_optimizer().initial_values()
    shared = {
        other
        for other, parameter in canonical_parameters(trainer.model).items()
        if other in before and held[parameter].data_ptr() == trainer.base.originals[other].data_ptr()
    }
    assert shared == set(before) - {name}
