"""A hook of mkdocs: links to files outside of docs/ lead to the repository."""

import re

from mkdocs.config.defaults import MkDocsConfig


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: object) -> str:
    return re.sub(r"\]\((?:\.\./)+(?=\w)", f"]({config.repo_url}/blob/main/", markdown)
