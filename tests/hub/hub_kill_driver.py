"""kill -9 a saving process before each of its file operations, and at moments spread over it. Run by test_kill.py.

Usage: hub_kill_driver.py FOLDER EVENTS MOMENTS [journal]: at most so many of the file operations (all with 0), so many
moments. `journal` takes the way of file systems that cannot exchange two folders in one step. At the end one process
saves over and over while another loads. Prints one line of JSON.

One process imports everything once; every killed saver is a fork of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from hub_samples import make_items, make_metrics, make_model, make_tokenizer

import hf_genrec.artifacts as artifacts
from hf_genrec.errors import ArtifactError
from hf_genrec.hub import load_artifact, save_artifact

WATCHED = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "shutil.copyfile", "shutil.rmtree", "hf_genrec.artifacts",
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

home, wanted_events, wanted_moments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if "journal" in sys.argv:
    artifacts._exchange = lambda first, second: False
torch.set_num_threads(1)
target = home / "artefact"


def save(generation: int, folder: Path) -> None:
    tokenizer = make_tokenizer(30 if generation == 0 else 12, prefix="AB"[generation])
    save_artifact(
        folder,
        model=make_model(tokenizer, seed=generation),
        tokenizer=tokenizer,
        items=make_items(tokenizer),
        recipe={"name": f"generation-{generation}"},
        metrics=make_metrics("shop", seed=generation),
        plots={f"plot-{generation}": b"\x89PNG\r\n\x1a\n" + bytes(generation)},
        max_shard_size="8KB" if generation == 0 else "50GB",  # the old shards must not survive beside the new weights
    )


def identity(folder: Path) -> str:
    """Digest of everything an artefact says; a mixture of two artefacts has another one."""
    said = loaded(folder)  # first: loading finishes an interrupted swap
    pictures = " ".join(sorted(p.name for p in folder.rglob("*.png")))
    return said + hashlib.sha256((folder / "README.md").read_bytes() + pictures.encode()).hexdigest()


def loaded(folder: Path) -> str:
    """Digest of what `load_artifact` gives."""
    artifact = load_artifact(folder)
    digest = hashlib.sha256()
    for name, value in sorted(artifact.model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    parts = [artifact.tokenizer.catalogue_fingerprint, artifact.items.item_ids, artifact.recipe, artifact.metrics]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def fork_saver(hook=None, ready: int | None = None) -> int:
    """A process that saves generation 1 over the target and exits."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if ready is not None:
                os.write(ready, b".")
            if hook is not None:
                sys.addaudithook(hook)
            save(1, target)
            code = 0
        finally:
            os._exit(code)
    return pid


def operations(callback) -> object:
    """Audit hook that calls back with the running number of each file operation of this process."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if (writes and str(args[0]).startswith(str(home))) or event in WATCHED:
            count += 1
            callback(count, event)

    return hook


def reset(source: Path | None) -> None:
    for path in home.iterdir():
        if path.name.startswith((".artefact", "artefact")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if source is not None:
        shutil.copytree(source, target)


def outcome(source: Path | None) -> str:
    """ "old", "new" or "nothing"; anything else is a failure of the promise."""
    try:
        found = identity(target)
    except ArtifactError:
        if source is None and not target.exists():
            return "nothing"
        raise
    assert found in (OLD, NEW), "a mixture of two artefacts"
    if source is not None:
        assert (target / "notes.txt").read_text() == "mine", "the user's notes are gone"
    return "old" if found == OLD else "new"


save(0, home / "old")
OLD = identity(home / "old")
(home / "old" / "notes.txt").write_text("mine")
save(1, home / "new")
NEW = identity(home / "new")
assert OLD != NEW

report: dict[str, object] = {}
for name, source in (("over", home / "old"), ("fresh", None)):
    reset(source)
    log = home / "operations.log"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pid = fork_saver(operations(lambda count, event, handle=handle: os.write(handle, f"{event}\n".encode())))
    assert os.waitpid(pid, 0)[1] == 0
    events = log.read_text().split()
    assert outcome(source) == "new"
    total = len(events)
    numbers = list(range(1, total + 1))
    if wanted_events and wanted_events < total:
        # always the operations of the swap itself, the rest spread evenly
        last = [n for n in numbers if events[n - 1] in ("hf_genrec.artifacts", "os.rename")]
        step = max(1.0, total / max(1, wanted_events - len(last)))
        numbers = sorted({*last, *(int(1 + i * step) for i in range(int(total / step)))})
    results: Counter[str] = Counter()
    for number in numbers:
        reset(source)
        pid = fork_saver(
            operations(lambda count, event, at=number: count == at and os.kill(os.getpid(), signal.SIGKILL))
        )
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"operation {number} of {total} never came"
        results[outcome(source)] += 1
    # the next save of the same folder cleans up after the last dead one
    save(1, target)
    left = [p.name for p in home.iterdir() if p.name.startswith(".artefact")]
    assert identity(target) == NEW and not left, left
    report[name] = {"operations": total, "killed": len(numbers), **results}

    durations = []
    for _ in range(3):
        reset(source)
        start = time.perf_counter()
        os.waitpid(fork_saver(), 0)
        durations.append(time.perf_counter() - start)
    span, results = sorted(durations)[1], Counter()
    for moment in range(wanted_moments):
        reset(source)
        read, write = os.pipe()
        pid = fork_saver(ready=write)
        os.read(read, 1)
        time.sleep(span * (moment + 0.5) / wanted_moments)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
        results[outcome(source)] += 1
    report[f"{name}_moments"] = {"span_ms": round(1000 * span), "killed": wanted_moments, **results}
if "journal" not in sys.argv:
    generations = {loaded(home / "old"): "old", loaded(home / "new"): "new"}
    saver = os.fork()
    if saver == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        while True:
            save(0, target)
            save(1, target)
    try:
        while not target.exists():  # the last kill may have left nothing, and the first save takes its time
            time.sleep(0.01)
        end = time.monotonic() + 4
        results = Counter()
        while time.monotonic() < end:
            try:
                results[generations.get(loaded(target), "mixture")] += 1
            except ArtifactError as error:  # saved over and over without a pause: giving up is an honest answer
                if "kept changing" not in str(error):
                    raise
                results["gave_up"] += 1
    finally:
        os.kill(saver, signal.SIGKILL)
        os.waitpid(saver, 0)
    report["loads_while_saving"] = results
print(json.dumps(report))
