"""Sentences and paragraphs of a page in Markdown, without code, tables, headings and pictures."""

import re

MOST_WORDS, MOST_LINES = 30, 6


def paragraphs(page: str) -> list[list[str]]:
    """The lines of each paragraph; a list's item is a paragraph of its own."""
    page = re.sub(r"(?ms)^---\n.*?^---\n|^ *```.*?^ *```$|<!--.*?-->", "", page)
    results: list[list[str]] = [[]]
    for line in page.splitlines():
        if not line.strip() or line.startswith(("#", "|", "![", ":::", "    ")):
            results.append([])
            continue
        if re.match(r" *([-*]|\d+\.) ", line):
            results.append([])
        results[-1].append(line)
    return [lines for lines in results if lines]


def sentences(lines: list[str]) -> list[str]:
    """A paragraph's sentences; a piece of code counts as a word, a link as its text."""
    text = " ".join(line.strip() for line in lines)
    text = re.sub(r"`[^`]*`", "CODE", text)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    return re.split(r"(?<=[.!?])[*)]*\s+(?=[A-Z(*])", text)


def complaints(page: str) -> list[str]:
    """A line for each paragraph that is too long, and for each sentence."""
    results: list[str] = []
    for lines in paragraphs(page):
        if len(lines) > MOST_LINES:
            results.append(f"{len(lines)} lines: {lines[0]}")
        for sentence in sentences(lines):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if len(words) > MOST_WORDS:
                results.append(f"{len(words)} words: {sentence}")
    return results
