"""Links of all Markdown of the repository lead somewhere, in the repository and in the site."""

from pathlib import Path

import pytest

from docs.making.links import OUTSIDE, ROOT, anchors, for_the_site, is_elsewhere, links, repository_path

FOLDERS = ("docs", "kernels", "results", "benchmarks", "launch", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))])


def broken(page: Path) -> list[str]:
    """The targets that lead nowhere."""
    found = []
    for target in links(page.read_text(encoding="utf-8")):
        if is_elsewhere(target):
            continue
        path, _, anchor = target.partition("#")
        leads_to = (page.parent / path).resolve() if path else page
        if not leads_to.exists() or (anchor and anchor not in anchors(leads_to.read_text(encoding="utf-8"))):
            found.append(target)
    return found


def test_there_are_pages():
    assert len(PAGES) > 30 and ROOT / "docs/guides/first-run.md" in PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One thing\n[a](page.md#one-thing) [b](page.md#two) [c](none.md) `[d](none.md)`\n")
    assert broken(page) == ["page.md#two", "none.md"]


def test_every_file_of_the_site_from_outside_docs_is_there():
    assert [path for path in OUTSIDE if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize(
    ("place", "text", "expected"),
    [
        ("index.md", "[a](docs/method.md#x) ![b](docs/p.svg)", "[a](method.md#x) ![b](p.svg)"),
        ("index.md", "[`c`](megatron_sd/trainer.py), [d](https://x.org)", "`c`, [d](https://x.org)"),
        ("guides/your-own.md", "[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("evidence.md", "[a](../results/claim_c/results.md)", "[a](results/claim_c.md)"),
        ("results/claim_c.md", "![a](results.svg)", "![a](results.svg)"),
        ("method.md", "`[a](../README.md)` [b](#here)\n```\n[c](../README.md)\n```\n", None),
    ],
)
def test_links_as_the_site_has_them(place, text, expected):
    assert for_the_site(text, place) == (text if expected is None else expected)


def test_where_a_page_comes_from():
    assert repository_path("index.md") == "README.md"
    assert repository_path("decisions/ops.md") == "docs/decisions/ops.md"


def test_anchors_are_spelled_as_github_spells_them():
    page = (
        "# A `gate`, and [more](x.md)\n## Rewards (`reward.*`)\n## Again\n## Again\n```\n# no heading\n```\n"
    )
    assert anchors(page) == {"a-gate-and-more", "rewards-reward", "again", "again-1"}
