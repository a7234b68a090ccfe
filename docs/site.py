"""A hook of mkdocs: what pages link to elsewhere in the repository comes into the site, below `repository/`."""

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|#)[^)\s#]+")


def _place(path: str) -> str:
    """Where a file or a folder of the repository is in the site."""
    path += "/README.md" * (ROOT / path).is_dir()
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("modeling_cards/*.md")]
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text("utf-8"))}
    for path in sorted(linked - {ROOT / "docs"}):
        name = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            listing = "\n".join(f"- `{entry.name}`" for entry in sorted(path.iterdir()))
            files.append(File.generated(config, _place(name), content=f"# {name}\n\n{listing}\n"))
        elif not name.startswith("docs/"):
            files.append(File.generated(config, _place(name), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    folder = dirname(here.removeprefix("repository/") if here.startswith("repository/") else f"docs/{here}")
    return LINK.sub(lambda link: relpath(_place(normpath(f"./{folder}/{link[0]}")), dirname(here) or "."), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names and types of docstrings as transformers writes them, [`Name`], *optional*, without these marks."""
    html = re.sub(r"\[(<code>)~?([\w.]+</code>)\]", r"\1\2", html)
    types = re.compile(r"(?<=<code>)[^<\n]*[`*][^<\n]*(?=</code>)")
    return types.sub(lambda found: re.sub(r"\[?`~?([^`]*)`\]?|\*(optional)\*", r"\1\2", found[0]), html)
