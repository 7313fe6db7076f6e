"""Every link and image of the pages leads somewhere, every anchor is a heading, every page is in the site's list.

Links to the web are looked at, not followed.
"""

from __future__ import annotations

import importlib.util
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.pages import ROOT, page, page_names, read_page, slug

SITE = "mkdocs.yml"


def _site() -> Any:
    """The site's hooks, .ci/docs_site.py."""
    found = importlib.util.spec_from_file_location("docs_site", ROOT / ".ci" / "docs_site.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


site = _site()


@pytest.mark.parametrize("name", page_names())
def test_links_lead_somewhere(name: str) -> None:
    found = [f"{name}:{line}: {fault}" for line, target in page(name).links for fault in faults(name, target)]
    assert not found, "\n".join(found)


def faults(name: str, target: str) -> Iterator[str]:
    address = urllib.parse.urlsplit(target)
    if address.scheme or address.netloc:
        if address.scheme not in ("http", "https", "mailto") or not re.fullmatch(r"[\w.-]+\.[a-z]+", address.netloc):
            yield f"{target} is not a web address"
        return
    if target.startswith("/"):
        yield f"{target}: write it relative to the page; code hosts and the site differ in what / is"
        return
    path = (ROOT / name).parent / urllib.parse.unquote(address.path) if address.path else ROOT / name
    if not path.resolve().is_relative_to(ROOT):
        yield f"{target} leads out of the project"
    elif not path.exists():
        yield f"{target}: there is no {path.resolve().relative_to(ROOT)}"
    elif not path.resolve().is_relative_to(ROOT / "docs") and path.resolve().name not in site.OUTSIDE:
        yield f"{target}: the site holds docs/ and {', '.join(site.OUTSIDE)}; write the name without a link"
    elif address.fragment:
        yield from _anchor(target, path.resolve().relative_to(ROOT).as_posix(), address.fragment)


def _anchor(target: str, name: str, fragment: str) -> Iterator[str]:
    anchors = page(name).anchors if name.endswith(".md") else []
    times = anchors.count(urllib.parse.unquote(fragment))
    if times == 0:
        yield f"{target}: {name} has no such heading; it has {', '.join(anchors)}"
    if times > 1:
        yield f"{target}: {name} has {times} such headings; give them different names"


def listed() -> Iterator[str]:
    """The pages that mkdocs.yml lists, relative to docs/."""
    left: list[Any] = [yaml.safe_load((ROOT / SITE).read_text())["nav"]]
    while left:
        match left.pop():
            case str(target):
                yield target
            case list(entries):
                left += entries
            case dict(entries):
                left += entries.values()


def test_every_page_is_reached() -> None:
    """From the list in mkdocs.yml, for decisions by way of their own list."""
    reached = {f"docs/{target}" for target in listed()}
    of_decisions = {urllib.parse.urlsplit(target).path for _, target in page("docs/decisions/README.md").links}
    reached |= {f"docs/decisions/{target}" for target in of_decisions}
    reached |= {name for name in site.OUTSIDE if f"docs/{site.in_site(name)}" in reached}
    lost = [name for name in page_names() if name not in reached]
    assert not lost, (
        f"{lost}: not in the nav of {SITE} (those beside docs/ as {site.in_site('NAME.md')}), or for decisions in "
        "docs/decisions/README.md"
    )


def test_every_listed_page_is_there() -> None:
    """project/ holds the copies of the pages beside docs/ (.ci/docs_site.py)."""
    gone = [
        target
        for target in listed()
        if not (ROOT / "docs" / target).is_file()
        and target not in [site.in_site(name) for name in site.OUTSIDE if (ROOT / name).is_file()]
    ]
    assert not gone, f"{SITE} lists pages that are not there: {gone}"
    assert len(set(listed())) == len(list(listed()))


def test_every_picture_is_shown() -> None:
    shown = {((ROOT / name).parent / target).resolve() for name in page_names() for _, target in page(name).links}
    unused = [str(path) for path in (ROOT / "docs" / "images").iterdir() if path.resolve() not in shown]
    assert not unused, f"no page shows {unused}"


@pytest.mark.parametrize(
    ("link", "told"),
    [
        ("[x](gone.md)", "there is no docs/gone.md"),
        ("[x](data.md#gone)", "no such heading"),
        ("[x](#gone)", "no such heading"),
        ("![x](images/gone.png)", "there is no docs/images/gone.png"),
        ("[x][y]\n\n[y]: ../gone.md", "there is no gone.md"),
        ("[x](/docs/data.md)", "relative"),
        ("[x](../configs/small.yaml)", "the site holds"),
        ("[x](../../shared)", "leads out"),
        ("[x](https:/example.org)", "not a web address"),
        ("[x](htps://example.org)", "not a web address"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(link: str, told: str, tmp_path: Path) -> None:
    wrong = read_page("docs/log.md", f"# Title\n\n{link}\n")
    (fault,) = [fault for _, target in wrong.links for fault in faults("docs/log.md", target)]
    assert told in fault


def test_links_that_are_right_are_not_found() -> None:
    text = "[a](data.md#batches) [b](../README.md) [c](https://arxiv.org/abs/1) ![d](images/health-plateau.png) [e](.)"
    shown = read_page("docs/log.md", text)
    assert len(shown.links) == 5
    assert [fault for _, target in shown.links for fault in faults("docs/log.md", target)] == []


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("NeMo's own encoder", "nemos-own-encoder"),
        ("120M, 32M, 1.2B", "120m-32m-12b"),
        ("Keys & values, `train_ds`", "keys--values-train_ds"),
        ("安装：第一步", "安装第一步"),
    ],
)
def test_anchors_are_those_of_code_hosts(heading: str, anchor: str) -> None:
    assert slug(heading) == anchor
    assert read_page("x.md", f"# A\n\n## {heading}\n").anchors == ["a", anchor]


def test_the_site_makes_the_same_anchors() -> None:
    for heading in ("NeMo's own encoder", "Keys & values, `train_ds`", "安装：第一步", "A_b - c"):
        assert site.slug(heading) == slug(heading)
