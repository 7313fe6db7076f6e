"""The Chinese README says what the English one says: the same commands, tables, links and numbers."""

import re

from docs.pages import ROOT, Page, page

ENGLISH, CHINESE = "README.md", "README.zh-CN.md"


def code(shown: Page) -> list[tuple[str, str, str | None]]:
    """Blocks without their comments, which are translated."""
    return [(block.language, re.sub(r"\s+#.*", "", block.text), block.not_run) for block in shown.blocks]


def test_the_commands_are_the_same() -> None:
    assert code(page(CHINESE)) == code(page(ENGLISH))


def test_the_tables_have_the_same_rows() -> None:
    """By what is code in the first column, and by the numbers of the models."""

    def rows(name: str) -> list[list[str]]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        firsts = [line.split("|")[1] for line in lines if line.startswith("|")]
        return [re.findall(r"`([^`]+)`", first) for first in firsts]

    def numbers(name: str) -> set[str]:
        return set(re.findall(r"\d[\d,]{5,}", (ROOT / name).read_text(encoding="utf-8")))

    assert rows(CHINESE) == rows(ENGLISH)
    assert numbers(CHINESE) == numbers(ENGLISH)


def test_the_chinese_one_links_to_every_page_of_the_english_one() -> None:
    def links(name: str) -> set[str]:
        return {target for _, target in page(name).links} - {ENGLISH, CHINESE}

    assert links(ENGLISH) <= links(CHINESE)
