"""Pages of the site that are written from files elsewhere in the repository, when mkdocs builds it (mkdocs.yml, hooks).

README's first words, figures and limits stand on the home page, examples/serve.md is the serving guide, and every
shipped recipe is shown.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_RECIPES_HEAD = """# Recipes

The recipes that come with the package, each by its name (`--recipe w2`). A recipe is YAML that llm-compressor reads
too; copy one, change a number, and give its file to `--recipe`. Every field: [fields](fields.md).
"""


def of_readme(part: str) -> str:
    """What README has between two marks, with links as they are on the site."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {part}:start -->\n(.*?)<!-- {part}:end -->", readme, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has nothing between <!-- {part}:start --> and <!-- {part}:end -->")
    return found[1].replace("](docs/", "](")


def serving_guide() -> str:
    """examples/serve.md, with links as they are on the site."""
    text = (ROOT / "examples" / "serve.md").read_text(encoding="utf-8")
    return text.replace("](../docs/", "](")


def recipes() -> str:
    """Every shipped recipe, its first comment as text."""
    parts = [_RECIPES_HEAD]
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        parts.append(f"## {file.stem}\n\n```yaml\n{file.read_text(encoding='utf-8').strip()}\n```\n")
    return "\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    """Add the written pages."""
    from mkdocs.structure.files import File

    for name, text in (("serve.md", serving_guide()), ("recipes.md", recipes())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put README's parts where a page asks for them; other links out of docs/ go to where the file is on the site."""
    text = markdown
    for part in ("intro", "figures", "limits"):
        text = text.replace(f"<!-- README {part} -->", of_readme(part))
    return text.replace("](../examples/serve.md)", "](serve.md)")
