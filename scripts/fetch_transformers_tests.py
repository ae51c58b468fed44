"""Get transformers' own common tests, which `pytest -m official` runs on our tokenizers and models.

They ship in the source distribution of the installed transformers version only. This script downloads it with pip and
unpacks `tests/*.py` into `<environment>/share/transformers-tests`. It does nothing when they are there already, and it
never fails: without a network it says so and the official tests are skipped.

    python scripts/fetch_transformers_tests.py [--sdist transformers-X.Y.Z.tar.gz] [--target DIR]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

MARKER = "VERSION"  # written last: a folder without it is incomplete


def is_present(target: Path, version: str) -> bool:
    marker = target / MARKER
    return marker.is_file() and marker.read_text(encoding="utf-8").strip() == version


def download(version: str, folder: Path, timeout: float) -> Path:
    """Source distribution of transformers in `folder`. Raises OSError or subprocess.SubprocessError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    command += [
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        f"transformers=={version}",
        "-d",
        str(folder),
    ]
    subprocess.run(command, check=True, timeout=timeout, capture_output=True, text=True)
    return next(folder.glob("transformers-*.tar.gz"))


def unpack(sdist: Path, target: Path, version: str) -> int:
    """Put the top-level test files of `sdist` into `target/tests`, replacing what is there. Returns their number."""
    wanted = re.compile(r"transformers-[^/]+/tests/(\w+\.py)")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        (staging / "tests").mkdir()
        number = 0
        with tarfile.open(sdist) as archive:
            for member in archive:
                match = wanted.fullmatch(member.name)
                if match and member.isfile():
                    source = archive.extractfile(member)
                    assert source is not None
                    (staging / "tests" / match[1]).write_bytes(source.read())
                    number += 1
        if not number:
            raise OSError(f"{sdist.name} holds no tests")
        (staging / "tests" / "__init__.py").touch()
        (staging / MARKER).write_text(version + "\n", encoding="utf-8")
        staging.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return number


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="use this source distribution instead of downloading one")
    parser.add_argument("--target", type=Path, default=Path(sys.prefix) / "share" / "transformers-tests")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds pip may take")
    options = parser.parse_args(arguments)
    try:
        version = importlib.metadata.version("transformers")
        if is_present(options.target, version):
            print(f"transformers {version} tests: already in {options.target}")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            sdist = options.sdist or download(version, Path(folder), options.timeout)
            number = unpack(sdist, options.target, version)
        print(f"transformers {version} tests: {number} files in {options.target}")
    except Exception as error:  # an optional extra must not break an installation
        print(f"transformers tests not available, the official tests will be skipped ({error})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
