"""The wheel, the sdist, and a wheel built from the sdist: each works from another folder, in a new environment."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.e2e.helpers import TINY, names, result

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def command(*arguments: str | Path, cwd: Path) -> str:
    """Runs a program without this checkout on its path; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(a) for a in arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    command(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source, cwd=out.parent)
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The three distributions: `wheel`, `sdist`, and `from_sdist`, the wheel built from the unpacked sdist."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    where = tmp_path_factory.mktemp("built")
    wheel, sdist = build("wheel", ROOT, where / "wheel"), build("sdist", ROOT, where / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(where / "unpacked", filter="data")
    (source,) = (where / "unpacked").iterdir()
    return {"wheel": wheel, "sdist": sdist, "from_sdist": build("wheel", source, where / "again")}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


def test_a_wheel_from_the_sdist_is_the_same(built):
    one, other = contents(built["wheel"]), contents(built["from_sdist"])
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == set()


def test_the_wheel_holds_what_the_package_needs(built):
    found = set(contents(built["wheel"]))
    python = {str(path.relative_to(ROOT)) for folder in ("jdistill", "hydra_plugins") for path in (ROOT / folder).rglob("*.py")}
    yaml = {f"jdistill/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert python | yaml | {"jdistill/py.typed"} <= found
    assert not [name for name in found if name.startswith(("tests/", "benchmarks/", "experiments/", "results/"))]
    assert not [name for name in found if name.endswith((".pyc", ".npz", ".jsonl"))]


@pytest.mark.parametrize("kind", ["wheel", "sdist", "from_sdist"])
def test_installed_it_lists_and_runs_from_another_folder(built, kind, tmp_path):
    environment, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    own = Path(command(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=elsewhere).strip())
    paths = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    (own / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")  # an editable install there is not followed
    command(*pip, "--no-build-isolation", "--ignore-installed", built[kind], cwd=elsewhere)
    where = command(
        python, "-c", "import jdistill, jdistill.cli as c; print(jdistill.__file__, c.conf_dir())", cwd=elsewhere
    ).split()
    assert all(Path(path).is_relative_to(own) for path in where), where
    script = environment / "bin" / "jdistill"
    experiments = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert set(names(command(script, "list", "experiments", cwd=elsewhere))) == experiments
    assert "jobs in" in command(script, "plan", "experiment=quickstart", cwd=elsewhere)
    command(script, *TINY, "hydra.run.dir=run", cwd=elsewhere)
    assert result(elsewhere / "run")["status"] == "finished"
    command(python, "-m", "jdistill", "-m", *TINY, "loss=none,kd", "hydra.sweep.dir=sweep", cwd=elsewhere)
    assert (elsewhere / "sweep" / "table.md").is_file()
