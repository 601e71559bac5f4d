"""Files by the URLs that fsspec opens, such as https:// and s3://.

Credentials are those that the libraries find themselves, such as AWS_PROFILE. A URL that holds one
is refused, as the names of sources are printed and kept with a run.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from ds_cmli.common import checksums
from ds_cmli.common.cache import cache_folder
from ds_cmli.common.errors import UserError
from ds_cmli.data.sources.patterns import (
    WILDCARD,
    Count,
    File,
    Listing,
    braces,
    check_there,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

HTTP, S3 = ("http", "https"), ("s3", "s3a")
NO_SIZE = -1
OUTSIDE = {".", ".."}
AT_ONCE = 16  # requests
BLOCK = 2**23  # bytes of one request
CONNECT_SECONDS, READ_SECONDS = 10, 60


class Urls:
    """URLs that fsspec opens; the cache of this package has a folder for each host or bucket.

    Attributes and methods are those of `Hub`.
    """

    home, has_digests, revision = "DS_CMLI_CACHE", False, ""

    def __init__(self, name: str):
        self.name, parts = name, urlsplit(name)
        self.http = parts.scheme in HTTP
        if "@" in parts.netloc or (self.http and "?" in name):
            raise UserError(
                f"data.source is a URL of {parts.scheme} with a user, a password or a query, which "
                "would be printed and kept with the run: leave it out; credentials are read from "
                "~/.netrc or the library's own settings"
            )
        if OUTSIDE & set(name.split("/")):
            raise UserError(f"data.source is {name!r}: leave '.' and '..' out")
        self.cache = cache_folder() / "remote"
        self.remedy = (
            f"copy its files to {self.local(name).parent}, or give the path of a copy instead"
        )
        self.files = self._file_system(parts.scheme)

    def _file_system(self, scheme: str) -> "AbstractFileSystem":
        from fsspec import filesystem

        options: dict[str, object] = {}
        try:
            if self.http:
                from aiohttp import ClientTimeout

                limit = ClientTimeout(None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
                uncompressed = {"Accept-Encoding": "identity"}  # sizes are those of the files
                session = {"timeout": limit, "trust_env": True, "headers": uncompressed}
                options = {"client_kwargs": session}
            if scheme in S3:  # the attempts are those of `attempts.patiently`
                options = {"config_kwargs": {"retries": {"max_attempts": 0}}}
            # The library keeps it: to collect one as garbage can wait for its thread for seconds.
            files = filesystem(scheme, **options)
        except (ImportError, ValueError) as error:
            install = f"pip install 'ds-cmli[remote]' for {', '.join((*HTTP, 's3'))}"
            raise UserError(f"data.source is {self.name!r}: {error}: {install}") from None
        files.retries = 1  # of s3fs
        files.invalidate_cache()
        if getattr(files, "local_file", False):
            raise UserError(f"data.source is {self.name!r}, a local file: give its path")
        return files

    def listed(self) -> Listing:
        whole, urls, names = False, list[str](), braces(self.name)
        one = len(names) == 1 and not self.http
        for url in names:
            if WILDCARD.search(url):
                matches = self.files.glob(url)
            elif url.endswith("/") or (one and self.files.isdir(url)):
                entries, whole = self.files.ls(url, detail=True), True
                matches = [entry["name"] for entry in entries if entry["type"] == "file"]
            else:
                matches = [url]
            urls += sorted(map(self.files.unstrip_protocol, matches))
        files, missing = {}, []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for url, file in zip(urls, pool.map(self._file, urls), strict=True):
                if file is None and not whole:
                    missing.append(url)
                files[url] = file or File(url, NO_SIZE)
        check_there(self.name, urls, missing)
        return Listing(files, urls, whole)

    def _file(self, url: str) -> File | None:
        """What the server tells of a file; None if it has none."""
        if OUTSIDE & set(url.split("/")):  # a link on a page could lead out of the cache
            return None
        try:
            info = self.files.info(url)
        except FileNotFoundError as error:
            cause = error.__cause__  # fsspec makes it of every error of HTTP
            status = getattr(cause, "status", None)
            if cause is None or status == 404 or isinstance(cause, FileNotFoundError):
                return None
            raise cause from None
        stamps = map(info.get, ("ETag", "etag", "Last-Modified", "mtime"))
        size = NO_SIZE if info["size"] is None else info["size"]  # such as of the links of a page
        return File(url, size, str(next(filter(None, stamps), "")))

    def kept(self) -> Listing:
        whole = self.local(self.name).is_dir()
        urls: list[str] = []
        for url in braces(f"{self.name.rstrip('/')}/*" if whole else self.name):
            matches = [url]
            if WILDCARD.search(url):
                some = glob(self._relative(url), root_dir=self.cache)
                matches = [path.replace("/", "://", 1) for path in sorted(some)]
            urls += matches
        files, missing = {}, []
        for url in urls:
            if self.local(url).is_file():
                files[url] = File(url, self.local(url).stat().st_size)
            elif not whole:
                missing.append(url)
        check_there(self.name, urls, missing)
        return Listing(files, list(files), whole)

    def _relative(self, path: str) -> str:
        return path.replace("://", "/", 1)

    def local(self, path: str) -> Path:
        return self.cache / self._relative(path)

    def _part(self, file: File) -> Path:
        """The file for what has come; another for another content on the server."""
        mark = hashlib.sha256(f"{file.size} {file.stamp}".encode()).hexdigest()[:8]
        local = self.local(file.path)
        return local.with_name(f".{local.name}.{mark}.part")

    def missing_bytes(self, file: File) -> int:
        if file.size == NO_SIZE:
            raise UserError(f"data.source is {self.name!r}: {file.path} has no size on its server")
        part = self._part(file)
        return file.size - (part.stat().st_size if part.exists() else 0)

    def fetch(self, file: File, again: bool, count: Count) -> None:
        local, part = self.local(file.path), self._part(file)
        local.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(part.with_suffix(".lock")):  # another source may name it too
            if not again and local.exists() and local.stat().st_size == file.size:
                return
            with open(part, "ab") as out:
                try:
                    self._append(file, out, count)
                except ValueError:  # a server that sends no ranges
                    out.seek(0)
                    out.truncate()
                    self._append(file, out, count, block_size=0)
                size = out.tell()
            if self._file(file.path) != file:
                part.unlink()
                raise UserError(
                    f"data.source is {self.name!r}: {file.path} has changed on its server while it "
                    "was fetched: start again"
                )
            if size != file.size:
                part.unlink()
                raise OSError(f"{size:,} bytes have come, and there are {file.size:,}")
            os.replace(part, local)

    def _append(self, file: File, out: IO[bytes], count: Count, **how: int) -> None:
        known = {"size": file.size} if self.http else {}
        with self.files.open(file.path, "rb", cache_type="none", **known, **how) as content:
            if out.tell():
                content.seek(out.tell())
            while out.tell() < file.size and (block := content.read(BLOCK)):
                out.write(block)
                count(len(block))

    def digest(self, file: File) -> str:
        return checksums.of_file(self.local(file.path))
