#!/usr/bin/env python3
"""Watches a video and talks about it: `python serve.py --video clip.mp4 --prompt "What is happening?"`."""

import sys

from moss_jax.serve import main

if __name__ == "__main__":
    sys.exit(main())
