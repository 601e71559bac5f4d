"""Data sets of the Hugging Face Hub, as `hf://datasets/OWNER/NAME[@REVISION][/PATH]`."""

import hashlib
import re
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from tqdm import tqdm

from ds_cmli.common import checksums
from ds_cmli.common.errors import UserError
from ds_cmli.data.sources.patterns import Count, File, Listing, named

START = "hf://"
DATA_SET = re.compile(
    r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/\w+|[^/@{}*?\[]+))?(?:/(.*))?"
)
STALE_SECONDS = 600.0  # without a byte, and longer than the library waits for one
GIT_ID = 40  # hexadecimal digits; a SHA-256 has 64


class Hub:
    """A data set of the Hugging Face Hub, in the hub's own cache.

    Attributes:
        revision: of all files together, once they are listed.
        cache: the folder in which the files lie.
        remedy: what to do where there is no network.
    """

    def __init__(self, name: str):
        from huggingface_hub import constants

        parts = DATA_SET.fullmatch(name)
        if parts is None:
            raise UserError(
                f"data.source is {name!r}: write hf://datasets/OWNER/NAME, then @REVISION or /PATH "
                "where one is meant"
            )
        self.name, self.repo, self.pattern = name, parts[1], (parts[3] or "").rstrip("/")
        self.asked_for = unquote(parts[2] or "main")
        self.revision, self.endpoint = "", constants.ENDPOINT
        self.cache = Path(constants.HF_HUB_CACHE)
        self.of_repo = self.cache / f"datasets--{self.repo.replace('/', '--')}"
        self.remedy = (
            f"run `hf download {self.repo} --repo-type dataset --revision {self.asked_for}` where "
            "there is a network, and set HF_HOME to the folder that it filled"
        )

    def listed(self) -> Listing:
        """List the files of the name, from the network; errors are the library's."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api, files = HfApi(endpoint=self.endpoint), {}
        self.revision = api.dataset_info(self.repo, revision=self.asked_for).sha or ""
        for file in api.list_repo_tree(
            self.repo, recursive=True, revision=self.revision, repo_type="dataset"
        ):
            if isinstance(file, RepoFile):
                stamp = file.blob_id if file.lfs is None else file.lfs.sha256
                files[file.path] = File(file.path, file.size, stamp)
        return self._meant(files)

    def kept(self) -> Listing:
        """List what is in the cache, without the network; errors are the library's."""
        from huggingface_hub import snapshot_download

        snapshot = snapshot_download(
            self.repo,
            repo_type="dataset",
            revision=self.asked_for,
            cache_dir=self.cache,
            local_files_only=True,
            allow_patterns=[],
        )
        folder, files = Path(snapshot), {}
        self.revision = folder.name
        for local in filter(Path.is_file, folder.rglob("*")):
            path = local.relative_to(folder).as_posix()
            files[path] = File(path, local.stat().st_size)
        return self._meant(files)

    def _meant(self, files: dict[str, File]) -> Listing:
        folder = f"{self.pattern}/".lstrip("/")
        inside = sorted(path for path in files if path.startswith(folder))
        paths = inside or named(self.name, self.pattern, list(files))
        return Listing(files, paths, bool(inside))

    def local(self, path: str) -> Path:
        """The local copy of a file, which need not be there."""
        return self.of_repo / "snapshots" / self.revision / path

    def missing_bytes(self, file: File) -> int:
        """How many bytes are still to be fetched of a file without a local copy."""
        blob = self.of_repo / "blobs" / file.stamp
        return 0 if blob.exists() else file.size

    def fetch(self, file: File, again: bool, count: Count) -> None:
        """Make the local copy, `again` in the place of a wrong one; errors are the library's."""
        from huggingface_hub import hf_hub_download

        class Counted(tqdm):
            def __init__(self, **_: object):
                super().__init__(disable=True)

            def update(self, n: float | None = 1) -> None:
                count(int(n or 0))

        # A process that was killed leaves its part, which the library never uses again.
        for part in (self.of_repo / "blobs").glob(f"{file.stamp}.*.incomplete"):
            with suppress(OSError):  # another process may have come to its end
                if time.time() - part.stat().st_mtime > STALE_SECONDS:
                    part.unlink()
        hf_hub_download(
            self.repo,
            file.path,
            repo_type="dataset",
            revision=self.revision,
            endpoint=self.endpoint,
            cache_dir=self.cache,
            force_download=again,
            tqdm_class=Counted,
        )

    def digest(self, file: File) -> str:
        """The digest of the local copy, of the kind of its stamp."""
        path = self.local(file.path)
        if len(file.stamp) != GIT_ID:
            return checksums.of_file(path)
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with open(path, "rb") as content:
            checksums.feed(digest.update, content)
        return digest.hexdigest()
