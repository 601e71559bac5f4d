import sys

# When this file is run by its path, this folder is first on sys.path and would hide packages
# named like its modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

from ds_cmli.evaluate.command import main  # noqa: E402

if __name__ == "__main__":
    main()
