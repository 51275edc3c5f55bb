"""Meta JSON -> LMDB, under the name that it has had: the same as `flashi2v-data filter`."""

import sys

from flashi2v_data.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "filter")
    main()
