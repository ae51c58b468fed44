"""Checkpoints of RecommenderTrainer: bit-exact resume, kills during a save, half checkpoints, rotation."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import KINDS, same, small_model, small_tokenizer, small_trainer, weights
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_genrec.alignment.trainers.checkpoints import check_checkpoint, checkpoints, last_checkpoint
from hf_genrec.artifacts import verify_manifest
from hf_genrec.errors import ArtifactError

STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 5}


class Interrupted(BaseException):
    pass


class StopAt(TrainerCallback):
    """Ends the run without any clean-up once `step` is reached."""

    def __init__(self, step: int, how) -> None:
        self.step, self.how = step, how

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.how()


def interrupt() -> None:
    raise Interrupted


def interrupted_and_resumed(kind: str, folder: Path, step: int, **options):
    """Train until `step`, then go on from the last checkpoint with a differently initialised model."""
    torch.manual_seed(1)
    with suppress(Interrupted):
        small_trainer(kind, folder, callbacks=[StopAt(step, interrupt)], **options).train()
        pytest.fail("was not interrupted")
    torch.manual_seed(2)  # nothing of the first process is left
    other = small_model(kind, small_tokenizer(kind), seed=99)
    trainer = small_trainer(kind, folder, model=other, **options)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def history(trainer):
    """Everything that was measured, without the times."""
    timeless = [
        {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
        for entry in trainer.state.log_history
    ]
    return [entry for entry in timeless if "train_loss" not in entry]


# 13 steps per epoch for TIGER, 8 for the others
@pytest.mark.parametrize(
    ("step", "options"),
    [
        (18, {}),  # saved at the epoch's end, killed in the next epoch
        (18, STEPS),  # saved in the middle of the second epoch
        (7, {**STEPS, "gradient_accumulation_steps": 2, "num_train_epochs": 4}),
        (12, {**STEPS, "ema_decay": 0.9, "train_sampling_strategy": "random"}),
    ],
    ids=["epochs", "mid-epoch", "accumulation", "average"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_exact(tmp_path, kind, step, options):
    options = {"num_train_epochs": 3, "logging_steps": 1, **options}
    torch.manual_seed(1)
    whole = small_trainer(kind, tmp_path / "whole", **options)
    whole.train()
    resumed = interrupted_and_resumed(kind, tmp_path / "parts", step, **options)
    assert resumed._initial_global_step > 0
    assert same(weights(whole.model), weights(resumed.model)), "the best model differs"
    assert history(whole) == history(resumed)
    last = f"checkpoint-{whole.state.global_step}"
    for name in ("model.safetensors", "training_weights.safetensors"):
        first, second = (tmp_path / part / last / name for part in ("whole", "parts"))
        assert first.exists() == second.exists() == (name.startswith("model") or "ema_decay" in options)
        assert not first.exists() or same(load_file(first), load_file(second))


SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from test_trainer_resume import StopAt, small_trainer, weights
folder, stop = sys.argv[1], int(sys.argv[2])
torch.manual_seed(1)
kill = [StopAt(stop, lambda: os._exit(9))] if stop else []
trainer = small_trainer("rq_transformer", folder, callbacks=kill, num_train_epochs=3, **{options!r})
trainer.train(resume_from_checkpoint=True)
save_file(weights(trainer.model), os.path.join(folder, "final.safetensors"))
"""


def test_killed_process_resumes_bit_exactly(tmp_path):
    """Three processes: one whole run; one that dies at step 13; one that goes on with the files of the second."""
    script = SCRIPT.format(tests=str(Path(__file__).parent), options=STEPS)

    def start(folder, stop):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", script, str(tmp_path / folder), str(stop)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    whole, parts = start("whole", 0), start("parts", 13)
    errors = [process.communicate()[1][-1500:] for process in (whole, parts)]
    resumed = start("parts", 0)
    errors.append(resumed.communicate()[1][-1500:])
    assert [whole.returncode, parts.returncode, resumed.returncode] == [0, 9, 0], errors
    state = json.loads((tmp_path / "parts" / "checkpoint-24" / "trainer_state.json").read_text())
    assert state["global_step"] == 24
    whole, parts = (load_file(tmp_path / folder / "final.safetensors") for folder in ("whole", "parts"))
    assert same(whole, parts)


# ------------------------------------------------------------------------------------------------- kills during a save


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_save_killed_before_every_file_operation(tmp_path):
    """A second checkpoint is being written: whatever the moment, the newest whole one is the first or the second."""
    events = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "hf_genrec.artifacts")
    trainer = small_trainer("sasrec", tmp_path / "start", max_steps=8)
    trainer.train()
    outcomes = []
    for number in range(1, 400):
        folder = tmp_path / str(number)
        copy_of(tmp_path / "start", folder)
        trainer.args.output_dir = str(folder)
        trainer.state.best_global_step = trainer.state.best_model_checkpoint = None
        trainer.state.global_step = 16
        pid = os.fork()
        if pid == 0:
            count = 0

            def hook(event, arguments, number=number, folder=str(folder)):
                nonlocal count
                if event in events and any(folder in str(argument) for argument in arguments):
                    count += 1
                    if count == number:
                        os._exit(9)

            sys.addaudithook(hook)
            trainer._save_checkpoint(trainer.model, None)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        newest, skipped = last_checkpoint(folder)
        assert not skipped, "no half checkpoint may have the name of one"
        verify_manifest(newest, deep=True)
        outcomes.append(newest.name)
        if code == 0:
            break
        assert code == 9
        if number % 4:
            continue
        trainer._save_checkpoint(trainer.model, None)  # goes on, and sweeps up
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-16", "checkpoint-8"]
    else:
        pytest.fail("the save never finished")
    assert len(outcomes) > 30 and outcomes[0] == "checkpoint-8" and outcomes[-1] == "checkpoint-16"
    assert outcomes == sorted(outcomes, key=["checkpoint-8", "checkpoint-16"].index)


# ----------------------------------------------------------------------------------------------------- half checkpoints


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    small_trainer("sasrec", folder, num_train_epochs=2).train()
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    for source in folder.rglob("*"):
        if source.is_file():
            path = target / source.relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read_bytes())
    return target


@pytest.mark.parametrize("manifest", [True, False], ids=["ours", "plain trainer's"])
@pytest.mark.parametrize("missing", ["trainer_state.json", "optimizer.pt", "scheduler.pt"])
def test_half_checkpoint_is_skipped(run_folder, tmp_path, missing, manifest, caplog):
    folder = copy_of(run_folder, tmp_path)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-8", "checkpoint-16"]
    (folder / "checkpoint-16" / missing).unlink()
    if not manifest:
        (folder / "checkpoint-16" / "manifest.json").unlink()
    newest, skipped = last_checkpoint(folder)
    assert newest.name == "checkpoint-8" and len(skipped) == 1 and missing in skipped[0]
    trainer = small_trainer("sasrec", folder)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 8 and missing in caplog.text
    check_checkpoint(folder / "checkpoint-16")


def test_truncated_weights_are_noticed(run_folder, tmp_path):
    folder = copy_of(run_folder, tmp_path)
    path = folder / "checkpoint-16" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert last_checkpoint(folder)[0].name == "checkpoint-8"
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        small_trainer("sasrec", folder).train(resume_from_checkpoint=str(folder / "checkpoint-16"))
    with pytest.raises(ArtifactError, match="does not exist"):
        small_trainer("sasrec", folder).train(resume_from_checkpoint=str(folder / "checkpoint-99"))


def test_checkpoints_of_a_plain_trainer_can_be_resumed(run_folder, tmp_path):
    folder = copy_of(run_folder, tmp_path)
    (folder / "checkpoint-16" / "manifest.json").unlink()
    check_checkpoint(folder / "checkpoint-16")
    trainer = small_trainer("sasrec", folder, num_train_epochs=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 16 and trainer.state.global_step == 24


def test_resume_without_checkpoint_starts_afresh(tmp_path, caplog):
    trainer = small_trainer("sasrec", tmp_path, num_train_epochs=1)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "starts from the beginning" in caplog.text and trainer.state.global_step == 8


# --------------------------------------------------------------------------------------------------- state of callbacks


def test_finished_run_can_be_prolonged(run_folder, tmp_path):
    folder = copy_of(run_folder, tmp_path)
    trainer = small_trainer("sasrec", folder, num_train_epochs=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 32


def test_early_stopping_counts_over_a_resume(tmp_path):
    def trainer_with(values, **options):
        trainer = small_trainer("sasrec", tmp_path, num_train_epochs=9, early_stopping_patience=3, **options)
        values = iter(values)
        trainer.compute_metrics = lambda prediction: {"ndcg@10": next(values)}
        return trainer

    with suppress(Interrupted):
        trainer_with([0.5, 0.2, 0.2], callbacks=[StopAt(28, interrupt)]).train()
    resumed = trainer_with([0.2, 0.9, 0.9, 0.9, 0.9, 0.9])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 32, "one bad evaluation more was enough"
    counters = [c for c in resumed.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    assert len(counters) == 1 and counters[0].early_stopping_patience == 3


def test_best_checkpoint_is_found_in_a_moved_folder(run_folder, tmp_path):
    folder = copy_of(run_folder, tmp_path / "elsewhere")
    trainer = small_trainer("sasrec", folder, num_train_epochs=3)
    trainer.compute_metrics = lambda prediction: {"ndcg@10": -1.0}  # the best stays an earlier one
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(folder / f"checkpoint-{trainer.state.best_global_step}")
    assert trainer.state.best_global_step < 24


def test_average_can_be_switched_on_at_a_resume(run_folder, tmp_path, caplog):
    folder = copy_of(run_folder, tmp_path)
    trainer = small_trainer("sasrec", folder, num_train_epochs=3, ema_decay=0.5)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "made without ema_decay" in caplog.text
    assert (folder / "checkpoint-24" / "training_weights.safetensors").is_file()


def test_plain_training_is_transformers_training(tmp_path):
    """Everything off: the weights after n steps are those of Trainer with the same batches (and data epochs)."""
    options = {
        "eval_strategy": "no",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 2,
    }
    ours = small_trainer("sasrec", tmp_path / "a", **options)
    ours.train()
    reference = small_trainer("sasrec", tmp_path / "b", **options)
    plain = Trainer(
        model=reference.model,
        args=reference.args,
        data_collator=reference.data_collator,
        train_dataset=reference.train_dataset,
        processing_class=reference.processing_class,
    )
    plain.train()
    assert same(weights(ours.model), weights(plain.model))
