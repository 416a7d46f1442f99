"""The repository's address is written once, in pyproject.toml; everything that repeats it is rewritten from there.

usage: python docs/address.py https://github.com/OWNER/NAME
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINE = re.compile(r'^Repository = "(.*)"$', re.MULTILINE)


def followers() -> list[Path]:
    """Every file that repeats the address."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def current() -> str:
    return LINE.search((ROOT / "pyproject.toml").read_text()).group(1)


def badge(url: str, notebook: str) -> str:
    """Colab's address of a notebook in this repository."""
    return f"https://colab.research.google.com/github/{slug(url)}/blob/main/notebooks/{notebook}"


def slug(url: str) -> str:
    return url.removeprefix("https://github.com/")


def move(url: str) -> None:
    """Write `url` in place of the current address, in pyproject.toml and everywhere that follows it."""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise SystemExit(f"not the address of a GitHub repository: {url}")
    old = current()
    for path in [ROOT / "pyproject.toml", *followers()]:
        text = path.read_text().replace(old, url).replace(f"/github/{slug(old)}/", f"/github/{slug(url)}/")
        if path.suffix == ".ipynb":
            json.loads(text)  # still a notebook
        path.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    move(sys.argv[1])
