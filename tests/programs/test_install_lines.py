"""The install lines that messages and pages print are run, wherever the package came from.

Nothing is downloaded: an environment sees the packages of the one that runs the tests, but for
this package itself, and for one that the extra `serve` needs and a local index alone has.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for folder in (".", "docs", "export", "train", "benchmarks", "runtimes")
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
    if path.name != "CHANGELOG.md"
)

BROUGHT = "python-json-logger"  # by the extra `serve`
ASK = "from actionclip_deploy.installation import install_command as c; print(c('serve'))"


def write_wheel(folder: Path, name: str, version: str, *needs: str) -> Path:
    """A wheel of nothing but metadata."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", "\n".join(metadata) + "\n")
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{stem}.dist-info/WHEEL", tags)
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def write_index(folder: Path, wheels: list[Path]) -> str:
    """A simple index (PEP 503) of files; gives its address."""
    for wheel in wheels:
        name = canonicalize_name(wheel.name.partition("-")[0])
        page = folder / "simple" / name / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        link = f'<a href="{wheel.as_uri()}">{wheel.name}</a>\n'
        page.write_text((page.read_text() if page.exists() else "") + link)
    return (folder / "simple").as_uri()


def run_pip(*words: str | Path, index: str, cwd: Path, shell: str = "") -> str:
    """What pip prints, as nobody has configured it but for the index."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    clean.pop("PYTHONPATH", None)
    done = subprocess.run(
        shell or [str(word) for word in words],
        shell=bool(shell),
        cwd=cwd,
        env={**clean, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, ROOT], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def index(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("index")
    return write_index(folder, [wheel, write_wheel(folder, BROUGHT, "9.9")])


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is installed here, by links, without this package and the one that is brought."""
    folder = tmp_path_factory.mktemp("packages")
    hidden = ("actionclip_deploy", "_actionclip_deploy", BROUGHT.replace("-", "_"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(hidden) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def python(packages: Path, tmp_path: Path) -> Path:
    """The interpreter of a new environment."""
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return place / "bin" / "python"


def install_extra_as_told(python: Path, index: str, cwd: Path, **environment: str) -> str:
    """Ask the package for the line, run it in a shell, and see that the extra is there."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = subprocess.run(
        [python, "-c", ASK],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    printed = run_pip(shell=f"{line} --no-build-isolation", index=index, cwd=cwd)
    assert "does not provide the extra" not in printed
    ask = f"from importlib.metadata import version; print(version('{BROUGHT}'))"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "9.9", printed + found.stderr
    return line


@pytest.mark.parametrize("origin", ["editable", "folder", "wheel", "index"])
def test_the_line_that_is_told_brings_the_extra(
    origin: str, python: Path, wheel: Path, index: str, tmp_path: Path
) -> None:
    given = {
        "editable": ["-e", ROOT],
        "folder": [ROOT],
        "wheel": [wheel],
        "index": ["actionclip-deploy"],
    }[origin]
    install = [python, "-m", "pip", "install", "--no-build-isolation"]
    run_pip(*install, *given, index=index, cwd=tmp_path)
    line = install_extra_as_told(python, index, tmp_path)
    target = f'-e "{ROOT}[serve]"' if origin == "editable" else '"actionclip-deploy[serve]"'
    assert line.endswith(f"-m pip install {target}")


def test_the_line_works_where_a_checkout_is_only_on_the_path_of_imports(
    python: Path, index: str, tmp_path: Path
) -> None:
    line = install_extra_as_told(python, index, tmp_path, PYTHONPATH=str(ROOT))
    assert line.endswith(f'-m pip install -e "{ROOT}[serve]"')


# What pages print


def install_lines(path: Path) -> list[list[str]]:
    """The words after each `pip install` of this package on a page."""
    found = re.findall(r"pip install ([^`#\n]+)", path.read_text("utf-8"))
    lines = [shlex.split(line) for line in found if "[" in line or " ." in f" {line}"]
    return [words for words in lines if any(is_ours(word) for word in words)]


def is_ours(word: str) -> bool:
    name = r"\.|actionclip-deploy|\S*actionclip_deploy-\S+\.whl"
    return re.fullmatch(rf"({name})(\[[\w,-]+\])?", word) is not None


def extras_of(words: list[str]) -> set[str]:
    inside = [match[1] for word in words if (match := re.search(r"\[([\w,-]+)\]$", word))]
    return {extra for extras in inside for extra in extras.split(",")}


LINES = {tuple(words): path for path in PAGES for words in install_lines(path)}


@pytest.fixture
def extras(wheel: Path) -> set[str]:
    """Those that the package has."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith("dist-info/METADATA")]
        metadata = archive.read(name).decode()
    return set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))


def test_pages_name_extras_that_exist(extras: set[str]) -> None:
    named = {extra for words in LINES for extra in extras_of(list(words))}
    assert {"edge", "export", "serve"} <= named <= extras


def test_the_table_of_extras_has_them_all(extras: set[str]) -> None:
    lines = (ROOT / "docs" / "start.md").read_text("utf-8").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("|")]
    named = {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}
    # `onnxruntime` is what `edge` is made of, and `docs` is for those who write them.
    assert extras - named == {"onnxruntime", "docs"}


def test_the_lines_of_the_pages_are_taken_by_pip(
    python: Path, wheel: Path, index: str, tmp_path: Path
) -> None:
    # All at once, and without what they need, which other tests install.
    words = sorted({word for line in LINES for word in line if is_ours(word)})
    here = [str(wheel) + word.partition(".whl")[2] if ".whl" in word else word for word in words]
    options = ["--dry-run", "--no-deps", "--no-build-isolation"]
    for ours in ([w for w in here if w[0] == "."], [w for w in here if w[0] != "."]):
        assert ours
        given = [part for word in ours for part in (("-e", word) if word[0] == "." else (word,))]
        command = [python, "-m", "pip", "install", *options, *given]
        printed = run_pip(*command, index=index, cwd=ROOT)
        assert "Would install actionclip-deploy-" in printed
        assert "does not provide the extra" not in printed


# PyTorch for the CPU

CPU_FILE = ROOT / "requirements-cpu.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def cpu_pins() -> dict[str, Requirement]:
    lines = [line for line in CPU_FILE.read_text("utf-8").splitlines() if line.strip()]
    given = [Requirement(line) for line in lines if not line.startswith(("#", "--"))]
    return {requirement.name: requirement for requirement in given}


def test_the_cpu_file_pins_a_pair_of_builds_that_only_its_index_has() -> None:
    assert f"--extra-index-url {CPU_INDEX}" in CPU_FILE.read_text("utf-8").splitlines()
    pins = cpu_pins()
    assert set(pins) == {"torch", "torchvision"}
    versions = {}
    for name, requirement in pins.items():
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        assert specifier.version.endswith("+cpu")
        versions[name] = [int(part) for part in specifier.version.partition("+")[0].split(".")]
        assert str(requirement.marker) == 'sys_platform == "linux"'
    # torchvision 0.N belongs to torch 2.(N - 15).
    assert versions["torchvision"][1] == versions["torch"][1] + 15


def test_with_the_cpu_file_pip_takes_no_package_of_cuda(python: Path, tmp_path: Path) -> None:
    versions = {name: next(iter(pin.specifier)).version for name, pin in cpu_pins().items()}
    main, cpu = tmp_path / "main", tmp_path / "cpu"
    for folder in (main, cpu):
        folder.mkdir()
    newest = [
        write_wheel(main, "torch", "2.99.0", "nvidia-cublas"),
        write_wheel(main, "torchvision", "0.114.0", "torch==2.99.0"),
    ]
    wanted = {name: version.partition("+")[0] for name, version in versions.items()}
    same = [
        write_wheel(main, "torch", wanted["torch"], "nvidia-cublas"),
        write_wheel(main, "torchvision", wanted["torchvision"], f"torch=={wanted['torch']}"),
        write_wheel(main, "nvidia-cublas", "13.0"),
        write_wheel(main, "user-of-torch", "1.0", "torch>=2.9", "torchvision>=0.24"),
    ]
    builds = [
        write_wheel(cpu, "torch", versions["torch"]),
        write_wheel(cpu, "torchvision", versions["torchvision"], f"torch=={versions['torch']}"),
    ]
    here = tmp_path / "requirements-cpu.txt"
    text = CPU_FILE.read_text("utf-8")
    here.write_text(text.replace(CPU_INDEX, write_index(cpu, builds)), encoding="utf-8")
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    address = write_index(main, newest + same)

    without = run_pip(*command, "user-of-torch", index=address, cwd=tmp_path)
    assert "torch-2.99.0" in without
    assert "nvidia" in without
    with_file = run_pip(*command, "-r", here, "user-of-torch", index=address, cwd=tmp_path)
    for name, version in versions.items():
        assert f"{name}-{version}" in with_file
    assert "nvidia" not in with_file


# make


@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize("torch", ["pypi", "cpu"])
def test_make_says_what_it_installs_before_it_does_and_lets_pip_speak(
    target: str, torch: str, tmp_path: Path
) -> None:
    words = ["make", "-n", target, f"TORCH={torch}", f"VENV={tmp_path / 'none'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert re.search(r"Installing into .*: [\d.]+ GB to download and [\d.]+ GB on disk", lines[0])
    (pip,) = [line for line in lines if "-m pip install" in line]
    assert " -q" not in pip
    assert ("-r requirements-cpu.txt" in pip) == (torch == "cpu")
    assert ("TORCH=cpu" in lines[0]) == (torch == "pypi")
