"""A source that this package has never seen: a zip of pictures, each captioned by its file's name."""

import os
import zipfile
from pathlib import Path

from ds_cmli.data.bad import EMPTY
from ds_cmli.data.sources.base import Parts, Source
from ds_cmli.data.sources.listed import Strings


class Zips(Source):
    def __init__(self, where, file):
        self.where, self.bad, self.file, self.members = where, [], file, Strings()
        self.opened = (0, None)
        with zipfile.ZipFile(file) as archive:
            for member in sorted(archive.namelist()):
                if Path(member).stem.strip("_"):
                    self.members.append(member)
                else:
                    self.bad.append((member, EMPTY))

    def __len__(self):
        return len(self.members)

    def image(self, index):
        if self.opened[0] != os.getpid():  # an archive that was open before the fork has a position in common
            self.opened = os.getpid(), zipfile.ZipFile(self.file)
        return self.opened[1].read(self.members[index])

    def captions(self, index):
        return [Path(self.members[index]).stem.replace("_", " ")]

    def name(self, index):
        return self.members[index]

    def fingerprint(self):
        return {"pictures": len(self), "bytes": os.path.getsize(self.file)}


def load_zip(name, files, config):
    return Parts(Zips(name, files[0]), notices=[f"{name} is read as {config.separator or 'a whole'}"])
