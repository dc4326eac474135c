"""The examples in docs/ run, the site builds, and the shipped recipes are the ones that the texts name."""

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md") if ">>> " in p.read_text()))
def test_the_examples_of_a_page(page):
    found = doctest.testfile(str(ROOT / "docs" / page), module_relative=False)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_every_file_that_a_page_names_exists(page):
    """A path counts from the root or from the package; a mere name may stand in any of the project's folders."""
    named = set(re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|cpp))(?:::\w+)?`", (ROOT / page).read_text()))
    files = {
        file for folder in ("src", "kernels", "tests", "benchmarks", "examples") for file in ROOT.glob(f"{folder}/**/*")
    }
    places = {
        name for f in files for name in (f.name, str(f.relative_to(ROOT)), str(f).partition("/bitsmoe_modifier/")[2])
    }
    assert named <= places


def test_every_recipe_that_a_text_names_exists():
    texts = "".join(p.read_text() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = set(re.findall(r"(?:--recipe |recipes/)(?!recipes/)([a-z]\w+)(?:\.yaml)?\b", texts))
    assert named
    assert named <= {p.stem for p in (ROOT / "recipes").glob("*.yaml")}


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs (make docs)")
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {
        page: (tmp_path / page / "index.html").read_text(encoding="utf-8") for page in ("serve", "recipes", "fields")
    }
    assert "Serving with vLLM" in pages["serve"]
    assert all(recipe.stem in pages["recipes"] for recipe in (ROOT / "recipes").glob("*.yaml"))
    assert "refine_passes" in pages["fields"]
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "real-weights.png" in home
    assert "GPTQ W2 / W3 / W4" in home, "README's figures"
    assert "What it costs" in home, "README's first words"
    assert "make demo" in home
    assert 'style="color: #' in pages["recipes"], "code has colours without a network"
    assert 'href="../site.css"' in pages["fields"]
    assert "white-space: normal" in (tmp_path / "site.css").read_text(), "the theme lets no cell of a table wrap"
    assert (tmp_path / "search" / "search_index.json").exists()
    links = re.findall(r'href="([^"#]+)', "".join(page.read_text() for page in tmp_path.rglob("*.html")))
    assert not [link for link in links if link.endswith(".md")], (
        "links to files that are on the site are links to pages"
    )


def test_no_text_installs_what_no_index_has():
    """The package is not published: its name alone installs nothing, or something else."""
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
    texts += [*(ROOT / "src").rglob("*.md"), *(ROOT / "src").rglob("*.py"), *(ROOT / "examples").glob("*.ipynb")]
    named = re.compile(r"pip install [^\n]*[\"' ]bitsmoe-modifier\b")
    assert not [text.name for text in texts if named.search(text.read_text(encoding="utf-8"))]
