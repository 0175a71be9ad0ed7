"""Build the distributions, install the wheel into this environment, and use it from elsewhere.

    python tests/packaging/check_wheel.py FOLDER

FOLDER receives the builds. Run this in an environment that holds nothing but `build`: what the
wheel fails to bring or to require is then missing, as it would be for a user. The wheel is made
from the unpacked source distribution, so that one is checked as well.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command and stop this script with its status if it fails."""
    print("$", *command, flush=True)
    if status := subprocess.run([str(part) for part in command], cwd=cwd, check=False).returncode:
        sys.exit(status)


def the_only(folder: Path, pattern: str) -> Path:
    """The one file in a folder that matches a pattern."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} holds {len(found)} files {pattern}; there must be one: {found}")
    return found[0]


def check_contents(sdist: Path, wheel: Path) -> None:
    """Compare the archives with the checkout; stop on the first difference."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    families = {path.relative_to(ROOT).as_posix() for path in (ROOT / "patches").rglob("*.toml")}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "src" / "ifkv").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    in_every_sdist = families | sources | {"LICENSE", "README.md", "pyproject.toml", "tox.ini"}
    in_every_wheel = {f"ifkv/{name}" for name in families}
    in_every_wheel |= {name.removeprefix("src/") for name in sources | {"src/ifkv/py.typed"}}
    if missing := sorted(in_every_sdist - in_sdist):
        sys.exit(f"{sdist.name} lacks {missing}")
    if missing := sorted(in_every_wheel - in_wheel):
        sys.exit(f"{wheel.name} lacks {missing}")
    if not any(name.endswith("licenses/LICENSE") for name in in_wheel):
        sys.exit(f"{wheel.name} lacks its licence")
    if strange := sorted(n for n in in_wheel if not n.startswith(("ifkv/", "ifkv-"))):
        sys.exit(f"{wheel.name} would install {strange} beside ifkv")


def main(folder: Path) -> None:
    """Build into a folder, install, and run the smoke test."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("ifkv-*.tar.gz"), *folder.glob("ifkv-*.whl")]:
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    wheel = the_only(folder, "ifkv-*.whl")
    check_contents(the_only(folder, "ifkv-*.tar.gz"), wheel)

    installer = ROOT / "tools" / "pip_install.py"
    run(sys.executable, installer, "--quiet", wheel, cwd=folder)
    # Once more without dependencies, in case this version was already there from an earlier run.
    run(sys.executable, installer, "--quiet", "--force-reinstall", "--no-deps", wheel, cwd=folder)
    with tempfile.TemporaryDirectory() as elsewhere:
        smoke = Path(elsewhere, "smoke.py")
        smoke.write_bytes(Path(__file__).with_name("smoke.py").read_bytes())
        names = [path.stem for path in sorted((ROOT / "patches").glob("*.toml"))]
        run(sys.executable, "-I", smoke, *names, cwd=Path(elsewhere))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
