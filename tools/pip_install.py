"""Run ``pip install``, with the small CPU build of torch on a machine without an NVIDIA GPU.

    python tools/pip_install.py -e '.[demo]'

All arguments go to ``pip install``, together with the pins of ``constraints.txt``. Only the
standard library is used, so this runs in a new virtual environment.

Why: the torch on PyPI for Linux is the CUDA build, several gigabytes with its libraries. The CPU
build is published on a separate index. That index is used for one package in one step, torch
without its dependencies; everything else comes from where pip is configured to look. The step asks
for the local version ``+cpu``. So a machine that cannot reach the index, and has no other source
for that build, gets an error at once and never the large download.

``IFKV_TORCH`` overrides the choice. ``cpu`` takes the CPU build although there is a GPU. ``any``
sets no rule for torch and so keeps an installed one (for ROCm, or one that you built).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def pinned_torch(pins: str) -> str:
    """Return the version of torch that a constraints file pins.

    Raises:
        SystemExit: There is no such line.
    """
    found = re.search(r"^torch==(\S+)", pins, re.MULTILINE)
    if found is None:
        sys.exit(f"pip_install: {CONSTRAINTS} has no line 'torch==VERSION'; add one.")
    return found.group(1)


def gpu_is_visible() -> bool:
    """Return True if a CUDA program started from here would find an NVIDIA GPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return False
    if tool := shutil.which("nvidia-smi"):
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
        return listing.returncode == 0 and "GPU" in listing.stdout
    return Path("/dev/nvidia0").exists()


def installed_torch() -> tuple[str, str | None] | None:
    """Return the installed torch as (version, CUDA version or None); None without torch.

    Reads torch's own ``version.py`` rather than importing torch, which takes seconds.
    """
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return importlib.metadata.version("torch"), facts.get("cuda")


def pip_install(arguments: list[str], constraints: str) -> int:
    """Run ``pip install`` in this interpreter's environment.

    Args:
        arguments: Arguments of ``pip install``.
        constraints: Text of a constraints file.

    Returns:
        pip's exit status.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "constraints.txt")
        file.write_text(constraints, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "-c", str(file), *arguments]
        return subprocess.run(command, check=False).returncode


def main(arguments: list[str]) -> int:
    """Install ``arguments``; return an exit status for the shell."""
    choice = os.environ.get("IFKV_TORCH", "auto")
    if choice not in ("auto", "cpu", "any"):
        print(
            f"pip_install: IFKV_TORCH is {choice!r}; it must be auto, cpu or any.", file=sys.stderr
        )
        return 2
    pins = CONSTRAINTS.read_text(encoding="utf-8")
    if choice == "any":
        return pip_install(arguments, re.sub(r"^torch==.*$", "", pins, flags=re.MULTILINE))
    if choice == "auto" and gpu_is_visible():
        return pip_install(arguments, pins)

    # Only Linux needs the step: for macOS and Windows PyPI has CPU builds, under the plain version.
    wanted = pinned_torch(pins) + ("+cpu" if platform.system() == "Linux" else "")
    present = installed_torch()
    if present is None or present[0] != wanted:
        print(f"pip_install: no NVIDIA GPU in use, installing torch {wanted}", flush=True)
        step = ["--no-deps", "--retries", "1", "--timeout", "30", "--extra-index-url", CPU_INDEX]
        if failed := pip_install([*step, f"torch=={wanted}"], ""):
            print(
                f"pip_install: torch {wanted} could not be installed (see pip's message above). "
                f"Check that {CPU_INDEX} can be reached or give pip another source for this build "
                "(find-links); or set IFKV_TORCH=any to let pip choose a build, which on Linux is "
                "the large one for CUDA.",
                file=sys.stderr,
            )
            return failed

    # With the exact build as a constraint no argument can bring the CUDA build in again.
    if failed := pip_install(arguments, f"{pins}\ntorch=={wanted}\n"):
        return failed

    present = installed_torch()
    if present is not None and present[1] is not None:
        print(
            f"pip_install: torch {present[0]} is a build for CUDA {present[1]}, but no NVIDIA GPU "
            "is in use. Make a new virtual environment and install again, or set IFKV_TORCH=any "
            "to keep this build.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
