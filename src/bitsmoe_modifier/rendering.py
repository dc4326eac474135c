"""Texts from templates: pages, reports, model cards. The templates are in ``templates/``, one per text."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("bitsmoe_modifier"),
        autoescape=select_autoescape(["html"]),  # Markdown quotes recipes as they are
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **view: object) -> str:
    """A text from a template.

    Args:
        template: file in ``templates/``. In HTML every value is escaped that is not marked as markup.
        view: what the template shows.
    """
    return _environment().get_template(template).render(**view)
