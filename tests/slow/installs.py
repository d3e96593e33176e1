"""Builds wheel and sdist, installs them on every installed Python, and writes
docs/validation/installs.md (`make installs`).

Without torch, vLLM and OpenRLHF: it tests the package itself and its start-up hook.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/validation/installs.md"
STARTUP = "sdpo_plugin_startup.pth"
LAUNCH = ("-m", "openrlhf.cli.train_ppo_ray", "--algo", "sdpo")
SDIST_HAS = {"LICENSE", "Makefile", "README.md", "docs", "pyproject.toml", "recipes", "sdpo_plugin", "tests"}
LARGEST = 2**20  # of any file in the sdist


def run(*command: object, fails: bool = False, **environment: str) -> str:
    """The output of a command that must succeed, or must fail (`fails`)."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environment
    found = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, cwd=tempfile.gettempdir())
    if (found.returncode != 0) != fails:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{found.stdout[-2000:]}{found.stderr[-4000:]}")
    return found.stdout + found.stderr


def pythons() -> list[Path]:
    """An interpreter of each supported version, and of the next one, if installed."""
    managed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = []
    for minor in (10, 11, 12, 13):
        here = [str(path) for path in sorted(managed.glob(f"3.{minor}.*/bin/python"))]
        if path := (here[-1] if here else shutil.which(f"python3.{minor}")):
            found.append(Path(path))
    return found


class Venv:
    def __init__(self, python: Path, directory: Path, *flags: str) -> None:
        run(python, "-m", "venv", *flags, directory)
        self.python = directory / "bin" / "python"
        self.site = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    def pip(self, *command: object, fails: bool = False) -> str:
        return run(self.python, "-m", "pip", *command, "-q", "--disable-pip-version-check", fails=fails)

    @property
    def has_startup(self) -> bool:
        return (self.site / STARTUP).exists()

    def is_quiet(self) -> None:
        """Interpreters that do not run OpenRLHF print nothing and import nothing of this package."""
        loaded = "import sys; print([name for name in sys.modules if name.startswith('sdpo_plugin')])"
        for flags in ((), ("-I",), ("-S",), ("-E", "-s")):
            assert run(self.python, *flags, "-c", loaded) == "[]\n", flags
        assert run(self.python, "-m", "pip", "--version").startswith("pip ")


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as file:
        return {name: hashlib.sha256(file.read(name)).hexdigest() for name in file.namelist()}


def built(directory: Path) -> tuple[Path, Path]:
    """Wheel and sdist; the wheel has the same contents when built from the tree or from the sdist."""
    tools = Venv(Path(sys.executable), directory / "tools")
    tools.pip("install", "build", "twine")
    run(tools.python, "-m", "build", "--sdist", "--wheel", "-o", directory / "tree", ROOT)
    (wheel,), (sdist,) = (directory / "tree").glob("*.whl"), (directory / "tree").glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(directory / "unpacked", filter="data")
    (unpacked,) = (directory / "unpacked").iterdir()
    run(tools.python, "-m", "build", "--wheel", "-o", directory / "again", unpacked)
    (again,) = (directory / "again").glob("*.whl")
    assert contents(wheel) == contents(again)
    assert contents(wheel).keys() >= {STARTUP, "sdpo_plugin/py.typed", "sdpo_plugin/__init__.py"}
    assert not any(name.startswith(("tests/", "recipes/", "docs/")) for name in contents(wheel))
    assert SDIST_HAS <= {path.name for path in unpacked.iterdir()} and not (unpacked / "runs").exists()
    assert max(path.stat().st_size for path in unpacked.rglob("*")) < LARGEST
    run(tools.python, "-m", "twine", "check", "--strict", wheel, sdist)
    return wheel, sdist


def installed(what: tuple[object, ...], venv: Venv, other: Venv) -> None:
    """Install, check, uninstall, check again. other: another environment, whose PYTHONPATH contains this one."""
    venv.pip("install", *what)
    assert venv.has_startup
    venv.is_quiet()
    assert "Error" in run(venv.python, "-c", "import sdpo_plugin; print(sdpo_plugin.ConfigError)")
    run(venv.python, "-m", "pip", "check")
    # Without OpenRLHF the command fails with one line that names what is missing.
    assert run(venv.python, *LAUNCH, fails=True).count("\n") == 1
    assert run(other.python, "-c", "print('quiet')", PYTHONPATH=str(venv.site)) == "quiet\n"
    assert "sdpo_plugin" not in run(other.python, *LAUNCH, fails=True)
    venv.pip("uninstall", "-y", "openrlhf-sdpo")
    assert not venv.has_startup and not (venv.site / "sdpo_plugin").exists()
    assert "No module named" in run(venv.python, "-c", "import sdpo_plugin", fails=True)
    venv.is_quiet()


def main() -> None:
    lines = []
    with tempfile.TemporaryDirectory() as name:
        wheel, sdist = built(directory := Path(name))
        for python in pythons():
            version = run(python, "-c", "import platform; print(platform.python_version())").strip()
            here = directory / version
            here.mkdir()
            if version.startswith("3.13"):
                venv = Venv(python, here / "wheel")
                assert "requires a different Python" in venv.pip("install", wheel, fails=True)
                cells = ["rejected by pip: requires Python 3.10 to 3.12"] * 3
            else:
                venv, other = Venv(python, here / "venv"), Venv(python, here / "other", "--without-pip")
                for what in ((wheel,), (sdist,), ("-e", ROOT)):
                    installed(what, venv, other)
                cells = ["yes"] * 3
            lines.append(f"| {version} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
        sizes = f"The wheel has {wheel.stat().st_size // 1024} KiB, the sdist {sdist.stat().st_size // 1024} KiB."
    head, _, rest = PAGE.read_text().partition("| Python |")
    table = ["| Python | wheel | sdist | editable |", "| --- | --- | --- | --- |", *lines, "", sizes]
    PAGE.write_text(head + "\n".join(table) + "\n" + rest[rest.index("\n## ") :])


if __name__ == "__main__":
    main()
