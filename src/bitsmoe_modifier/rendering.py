"""Texts from templates: pages, reports, model cards. The templates are in ``templates/``, one per text."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape


def _breakable(name: str) -> Markup:
    """A name that HTML may break after each underscore, and nowhere else."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("bitsmoe_modifier"),
        autoescape=select_autoescape(["html"]),  # Markdown quotes recipes as they are
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["breakable"] = _breakable
    return made


def render(template: str, **view: object) -> str:
    """A text from a template.

    Args:
        template: file in ``templates/``. In HTML every value is escaped that is not marked as markup.
        view: what the template shows.
    """
    return _environment().get_template(template).render(**view)
