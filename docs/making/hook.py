"""What the site has besides docs/: the files of links.OUTSIDE, the reference, and links that lead there."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.making.links import OUTSIDE, ROOT, for_the_site
from docs.making.reference import pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that lie outside docs/, and those that are written now."""
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""
    return for_the_site(markdown, page.file.src_uri)
