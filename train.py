#!/usr/bin/env python3
"""Trains a model: `python train.py --gin_file configs/tabletop_tiny.gin --workdir workdir/tabletop`."""

import sys

from moss_jax.train.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
