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


@pytest.fixture(autouse=True)
def one_thread():
    """Forked processes must not wait for the threads of their parent, and the order of sums must not differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


ACCUMULATED = {**STEPS, "gradient_accumulation_steps": 2, "num_train_epochs": 4}
AVERAGED = {**STEPS, "ema_decay": 0.9}


# 13 steps per epoch for TIGER, 8 for the others
@pytest.mark.parametrize(
    ("kind", "step", "options"),
    [
        *((kind, 18, STEPS) for kind in KINDS),  # saved and killed in the middle of the second epoch
        ("rq_transformer", 18, {}),  # saved at the end of an epoch, killed in the next one
        ("tiger", 7, ACCUMULATED),
        ("rq_transformer", 12, AVERAGED),
        ("sasrec", 12, {**AVERAGED, "train_sampling_strategy": "random"}),
    ],
    ids=[*KINDS, "epochs", "accumulation", "average", "random order"],
)
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
from trainer_cases import small_trainer, weights
trainer = small_trainer("rq_transformer", {folder!r}, num_train_epochs=3, **{options!r})
trainer.train(resume_from_checkpoint=True)
save_file(weights(trainer.model), os.path.join({folder!r}, "final.safetensors"))
"""


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_killed_process_resumes_bit_exactly(tmp_path):
    """Three processes: a whole run here; one that dies at step 13; a new one that has only the files of the second."""
    whole = small_trainer("rq_transformer", tmp_path / "whole", num_train_epochs=3, **STEPS)
    whole.train()
    pid = os.fork()
    if pid == 0:
        torch.manual_seed(1)
        kill = [StopAt(13, lambda: os._exit(9))]
        small_trainer("rq_transformer", tmp_path / "parts", callbacks=kill, num_train_epochs=3, **STEPS).train()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert last_checkpoint(tmp_path / "parts")[0].name == "checkpoint-10"
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "parts"), options=STEPS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    resumed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    state = json.loads((tmp_path / "parts" / "checkpoint-24" / "trainer_state.json").read_text())
    assert state["global_step"] == 24
    assert same(weights(whole.model), load_file(tmp_path / "parts" / "final.safetensors"))


# ------------------------------------------------------------------------------------------------- kills during a save


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_save_killed_before_its_file_operations(tmp_path):
    """A second checkpoint is being written: whatever the moment, the newest whole one is the first or the second."""
    events = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "hf_genrec.artifacts")
    trainer = small_trainer("sasrec", tmp_path / "start", max_steps=8)
    trainer.train()
    outcomes = []
    for number in range(1, 400, 3):  # tests/test_artifacts.py does every single one
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
        if number % 4 != 1:
            continue
        trainer._save_checkpoint(trainer.model, None)  # goes on, and sweeps up
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-16", "checkpoint-8"]
    else:
        pytest.fail("the save never finished")
    assert len(outcomes) > 10 and outcomes[0] == "checkpoint-8" and outcomes[-1] == "checkpoint-16"
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
