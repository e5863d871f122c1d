"""MkDocs' hooks: what becomes of links from pages to files of the repository outside docs/.

A page links to such a file as a viewer of the repository needs it (`../jobs/LOG.md`). In the site, pictures of
reports/ are served beside the pages; other files are named, or linked where `repo_url` is set.
Called by: MkDocs, as mkdocs.yml says.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PICTURES = (".png", ".svg")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pictures of reports/ to the site."""
    from mkdocs.structure.files import File

    for path in sorted((REPOSITORY / "reports").rglob("*")):
        if path.suffix in PICTURES:
            name = path.relative_to(REPOSITORY).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page's text, with links that leave docs/ made into what the site has."""
    return rewrite_links(markdown, page.file.src_uri, config.repo_url or "")


def rewrite_links(markdown: str, page: str, repo_url: str) -> str:
    """`page`: its path below docs/."""

    def replace(match: re.Match[str]) -> str:
        sign, text, target = match.groups()
        path, hash_sign, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
        if place.startswith("docs/"):
            return match[0]
        if place.endswith(PICTURES):
            return f"{sign}[{text}]({posixpath.relpath(place, posixpath.dirname(page) or '.')})"
        if repo_url:
            kind = "tree" if (REPOSITORY / place).is_dir() else "blob"
            return f"[{text}]({repo_url.rstrip('/')}/{kind}/main/{place}{hash_sign}{anchor})"
        shown = text.strip("`")
        return (
            f"`{place}`" if place in (shown, f"{shown}/") or shown.endswith(Path(place).name) else f"{text} (`{place}`)"
        )

    return _LINK.sub(replace, markdown)
