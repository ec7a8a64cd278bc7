"""`bench.data_repeats` with 64 rows that come 62 times each: where a small model overfits.

python -m bench.data_repeats_64      # the same as python -m bench.data_repeats --rows 64
"""

from __future__ import annotations

import sys

from bench import data_repeats

if __name__ == "__main__":
    sys.argv[1:] = ["--rows", "64", *sys.argv[1:]]  # also what the result says it was made by
    data_repeats.main()
